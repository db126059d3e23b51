"""What every back end does in the same way: a task's files before its start and at its end.

    effect -> prepare files -> (worker: find the checkpoint) -> `launch`        the back end's own
    end    -> (worker: read what was saved -> MarkSeen) -> EndSeen

A back end brings the middle: how a process is made, watched, signalled, adopted, and how its end
is known. Read next: `fork.py` and `ckptd/units/runner.py`, the two that there are.
"""

from abc import ABC, abstractmethod
from collections import deque
from functools import partial
from typing import Generic, TypeVar

from ckptd.core.port import (
    UNLIMITED,
    Control,
    Delete,
    Deliver,
    DropCheckpoints,
    Effect,
    EndSeen,
    Forget,
    Freeze,
    MarkSeen,
    Sighting,
    Start,
    StartSeen,
    Starve,
)  # fmt: skip
from ckptd.runner import environment, identity, quota
from ckptd.runner.files import TaskFiles
from ckptd.runner.instance import Instance, Stage
from ckptd.runner.marks import Marks
from ckptd.runner.notify import Hints, Listener
from ckptd.runner.watch import Watch, Worker
from ckptd.storage.blobs import Found
from ckptd.storage.lost import Known
from ckptd.storage.untrusted import NotTrusted

SIGHTINGS_PER_POLL_MAX = 1_000
WATCH_FILES_AFTER_S = 1.0  # adding and removing an inotify watch costs as much as running true

I = TypeVar("I", bound=Instance)  # noqa: E741 - the usual letter for it


class Backend(ABC, Generic[I]):
    """The common half of a Runner. One thread calls it, and a worker reads files."""

    name: str
    cgroup: str

    def __init__(self, state_dir: str, run_dir: str, boot_id: str, ckpt_dir: str | None) -> None:
        self.state_dir = state_dir
        self.boot_id = boot_id or identity.boot_id()
        self._ckpt_dir = ckpt_dir or environment.where_ckpt_is()
        self._files = TaskFiles(state_dir, self.boot_id)
        self._instances: dict[tuple[int, int], I] = {}
        self._seen: deque[Sighting] = deque()
        self._is_closed = False
        self._adopting: set[tuple[int, int]] = set()
        self._watch = Watch()
        self._worker = Worker(self._watch.wake)
        self._hints = Hints(f"{run_dir}/notify", self._watch)
        self._marks = Marks(self._files, self._watch, self._worker, self._see, self._tell_end)

    # --- the port ---------------------------------------------------------------------------

    @property
    def is_adopting(self) -> bool:
        """Tell whether the fate of an adopted attempt is still to be told."""
        return bool(self._adopting)

    def fileno(self) -> int:
        """Return the epoll that is readable when `poll` has news."""
        return self._watch.fileno()

    def poll(self) -> list[Sighting]:
        """Return what was seen since the last call, oldest first, at most 1,000."""
        self._watch.dispatch()
        self._worker.settle()
        self._seen.extend(self._hints.told())
        count = min(len(self._seen), SIGHTINGS_PER_POLL_MAX)
        seen = [self._seen.popleft() for _ in range(count)]
        if self._seen:
            self._watch.wake()
        return seen

    def carry_out(self, effect: Effect) -> None:
        """Bring one effect about; what is asked of an attempt that is not there is done already."""
        match effect:
            case Start():
                self._start(effect)
            case Deliver():
                self._watch.patiently(partial(self._deliver, effect))
            case Starve():
                if one := self._running(effect.task, effect.attempt):
                    self._starve(one)
            case Freeze():
                if one := self._running(effect.task, effect.attempt):
                    self._watch.patiently(partial(self._freeze, one, frozen=effect.frozen))
            case Control():
                self._control(effect)
            case Forget():
                self._forget_seen(effect)
            case Delete():
                deletion = self._files.deletion(effect.task)
                self._worker.submit(effect.task, deletion, lambda _: None)
            case DropCheckpoints():
                drop = partial(self._files.drop_checkpoints, effect.task, effect.attempt)
                self._worker.submit(effect.task, drop, lambda _: None)

    def adopt(self, task: int, attempt: int) -> None:
        """Find out what became of an attempt that an earlier daemon ordered; sightings follow."""
        key = (task, attempt)
        if key in self._instances:
            return
        one = self._instances[key] = self._made(*key, self._files.owner(task))
        self._adopting.add(key)
        self._watch.patiently(partial(self._take_up, one))

    def close(self) -> None:
        """Let go: what runs lives on, and keeps its record."""
        if self._is_closed:
            return
        self._is_closed = True
        self._worker.close()
        self._hints.close()
        self._let_go()
        self._instances.clear()
        self._watch.close()

    # --- what the back end brings -------------------------------------------------------------

    @abstractmethod
    def _made(self, task: int, attempt: int, uid: int) -> I:
        """Return a new instance."""

    @abstractmethod
    def _launch(self, one: I, start: Start, found: Found) -> None:
        """Bring the attempt to life, or end it by `_refuse`."""

    @abstractmethod
    def _refuse(self, one: I, cause: str, text: str, error: Exception | None = None) -> None:
        """End an attempt that runs nowhere, so that it never will."""

    @abstractmethod
    def _take_up(self, one: I) -> None:
        """Find out about one attempt. May raise OSError: tried again later."""

    @abstractmethod
    def _deliver(self, effect: Deliver) -> None:
        """Send a signal. May raise OSError: tried again later."""

    @abstractmethod
    def _freeze(self, one: I, *, frozen: bool) -> None:
        """Stop an attempt where it is, or let it go on. May raise OSError."""

    def _starve(self, one: I) -> None:
        """Take its memory away. Only units are ever asked to (`decide.py`)."""

    @abstractmethod
    def _forget(self, one: I | None, task: int, attempt: int) -> None:
        """Drop every trace of an attempt that is over or was never known."""

    @abstractmethod
    def _let_go(self) -> None:
        """Close what the back end has open; descriptors of `_watch` are closed after it."""

    # --- starting ---------------------------------------------------------------------------

    def _start(self, start: Start) -> None:
        key = (start.task, start.attempt)
        if key in self._instances:
            return
        one = self._instances[key] = self._made(*key, start.uid)
        try:
            one.published_ns = self._files.prepare(start)
            has_saved = self._files.has_saved(start.task)
        except (OSError, NotTrusted) as error:
            self._refuse(one, "spawn_error", f"cannot prepare its directory: {error}", error)
            return
        known = Known(start.checkpoint, start.has_journal)
        if has_saved or known.is_anything:
            find = partial(self._files.checkpoint_to_resume, start.task, start.uid, known)
            self._worker.submit(start.task, find, partial(self._found, one, start))
        else:
            self._found(one, start, Found())

    def _found(self, one: I, start: Start, found: Found) -> None:
        if one.is_dying:
            self._refuse(one, "not_started", "killed before it started")
        elif found.passing:
            self._refuse(one, "spawn_error", f"cannot seal or read: {found.passing}", found.passing)
        elif found.problem:
            self._see(MarkSeen(*one.key, 0, 0, "", problem=found.problem))
            self._refuse(one, "not_started", found.problem)
        else:
            self._listen(one)
            one.warning, one.has_journal = found.warning, found.has_journal
            self._launch(one, start, found)

    @staticmethod
    def _warn_of_limits(
        one: Instance, start: Start, controllers: frozenset[str], *, has_memory: bool
    ) -> None:
        """Say which limits nothing here can hold: a task is never unlimited in silence."""
        wanted = start.memory_bytes, start.cpus, start.tasks_max, start.io_weight
        unheld = quota.not_held(controllers, has_memory=has_memory, limits=wanted)
        if unheld:
            text = UNLIMITED + unheld
            one.warning = f"{one.warning}; {text}" if one.warning else text

    def _place(self, one: I) -> environment.Place:
        notify = one.listener.path if one.listener else ""
        return environment.Place(
            self._files.directory(one.task), self._files.output(one.task), notify
        )

    def _listen(self, one: I) -> None:
        listener = self._hints.listen(*one.key, one.uid, partial(self._marks.hinted, one))
        one.listener = listener
        self._watch.after(WATCH_FILES_AFTER_S, partial(self._watch_files, one, listener))

    def _watch_files(self, one: I, listener: Listener) -> None:
        if one.listener is listener:
            self._hints.look_at(listener, f"{self._files.directory(one.task)}/ckpt")
            self._marks.caught_up(one)

    # --- while it runs ------------------------------------------------------------------------

    def _running(self, task: int, number: int) -> I | None:
        one = self._instances.get((task, number))
        return one if one is not None and one.stage < Stage.ENDING else None

    def _control(self, effect: Control) -> None:
        """Write the control file. A task that is asked to stop must be able to hear it: thaw it."""
        one = self._running(effect.task, effect.attempt)
        if one is None:
            return
        self._files.write_control(effect, one.uid)
        if effect.stop and one.may_be_frozen:
            self._watch.patiently(partial(self._freeze, one, frozen=False))

    # --- ends -----------------------------------------------------------------------------------

    def _over(self, one: I, end: EndSeen) -> None:
        """The end is known: read once more what was saved, then tell it."""
        one.end = end
        one.stage = Stage.ENDING
        if one.listener is not None:
            last_words = self._hints.unlisten(one.listener)
            one.listener = None
            if last_words is not None:
                self._see(last_words)
        else:
            self._hints.clear(one.task)
        self._marks.finish(one)

    def _tell_end(self, one: Instance) -> None:
        assert one.end is not None
        one.stage = Stage.OVER
        self._see(one.end)

    def _forget_seen(self, effect: Forget) -> None:
        key = (effect.task, effect.attempt)
        one = self._instances.get(key)
        if one is not None and one.stage != Stage.OVER:
            return
        self._forget(one, *key)
        self._instances.pop(key, None)

    def _see(self, sighting: Sighting) -> None:
        if not self._seen:
            self._watch.wake()
        if isinstance(sighting, StartSeen | EndSeen):
            self._adopting.discard((sighting.task, sighting.attempt))
        self._seen.append(sighting)
