"""The members that both contexts share: what is known, what is asked, what needs no waiting.

    ctx.task_id attempt epoch resumed resume_point input deadline node directory
    ctx.was_step_completed get_intermediate_result state cursor file saved_file files drop_file
    ctx.on_checkpoint on_restore idempotency_key should_stop stop_reason grace_left set_progress

Read next: `context.py` (those that make something durable, or wait), `work.py` (the engine).
"""

import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from ckptd.sdk import steps, waits
from ckptd.sdk.outcomes import DuplicateStepError
from ckptd.sdk.state import Cursor
from ckptd.sdk.values import decode, encode
from ckptd.sdk.work import Work
from ckptd.storage import facts
from ckptd.storage.journal import Fact


class ResumePoint(NamedTuple):
    """Where this attempt goes on from; `checkpoint` is 0 where only facts are there."""

    checkpoint: int
    at_s: float
    step: str
    progress: tuple[float, float] | None


class TaskContext:
    """The members that need no waiting; base of both contexts."""

    def __init__(self, work: Work, *, park_after_s: float = waits.PARK_AFTER_S) -> None:
        self._work = work
        self._park_after_s = park_after_s
        self._steps = steps.Steps(work)
        self._loops: set[str] = set()
        self._can_be_stopped = False
        self._begun_once: set[str] = set()  # steps that would count as interrupted
        self._is_stop_seen = False  # by the author's code, in any thread
        self._is_last_saved = False

    # --- who and where --------------------------------------------------------------------------

    @property
    def task_id(self) -> int:
        """The task's number; 0 without a daemon."""
        return self._work.around.task

    @property
    def attempt(self) -> int:
        """Which start of the task this is, from 1."""
        return self._work.around.attempt

    @property
    def epoch(self) -> int:
        """The fencing token to hand to external stores; grows with each reign of a daemon."""
        return self._work.around.epoch

    @property
    def resumed(self) -> bool:
        """Whether an earlier attempt left anything durable."""
        return self._work.is_resumed

    @property
    def resume_point(self) -> ResumePoint | None:
        """Where this attempt goes on from; None on a first start."""
        if not self.resumed:
            return None
        saved = self._work.resumed_from
        told = saved.get("progress")
        is_told = isinstance(told, dict)
        progress = (float(told["done"]), float(told["total"])) if is_told and told else None
        at_s = float(saved.get("at_ns") or 0) / 1e9
        return ResumePoint(
            int(saved.get("seq") or 0), at_s, str(saved.get("current_step") or ""), progress
        )

    @property
    def input(self) -> dict[str, Any]:
        """The input as it was submitted."""
        return dict(self._work.given)

    @property
    def deadline(self) -> float | None:
        """Unix seconds at which the task is stopped, or None."""
        return float(self._work.around.deadline_s) or None

    @property
    def node(self) -> str:
        """The host's name."""
        return os.uname().nodename

    @property
    def directory(self) -> str:
        """The task's private directory, kept over all attempts."""
        return self._work.around.dir

    # --- what is remembered ---------------------------------------------------------------------

    def was_step_completed(self, name: str) -> bool:
        """Return whether a step of this name is completed, whenever that was."""
        return name in self._work.known.steps

    def get_intermediate_result(self, key: str, default: Any = None) -> Any:
        """Return a stored value, or the default."""
        values = self._work.known.values
        return decode(values[key]) if key in values else default

    def item_results(self, name: str = "") -> dict[str, Any]:
        """Return {key: result} of the items that passed, in any attempt; `name`: of one source."""
        start = f"{name}/" if name else ""
        return {
            key.removeprefix(start): decode(fact.get("result"))
            for key, fact in list(self._work.known.items.items())
            if fact["status"] == "pass" and key.startswith(start)
        }

    @property
    def state(self) -> Any:
        """The bulk state: a dict, or an object of the task's schema; saved by the strategy."""
        return self._work.state

    @state.setter
    def state(self, value: Any) -> None:
        if self._work.task.state_schema is None:
            self._work.state.replace(value)
        else:
            self._work.state = value

    def cursor(self, name: str, start: Any = 0) -> Cursor:
        """Return a position that is saved with the state; `start` where there is none yet."""
        self._work.cursors.setdefault(name, encode(start, f"the cursor {name!r}"))
        return Cursor(self._work.cursors, name)

    def _tracked(self, name: str) -> Cursor:
        """Return the position of a `track` loop; a second loop would skip what the first has done.

        Raises:
            DuplicateStepError: a loop of that name ran already.
        """
        if name in self._loops:
            raise DuplicateStepError(name, "track loop")
        self._loops.add(name)
        return self.cursor(name, 0)

    def file(self, name: str) -> str:
        """Return the path to write a file to that becomes part of the next checkpoint.

        It goes in with everything else that is staged, or not at all. What is not written anew is
        carried over from the checkpoint before.
        """
        path = os.path.join(self._work.around.dir, "stage", _inner(name))
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        return path

    def saved_file(self, name: str) -> str | None:
        """Return the path of a file in the newest checkpoint, or None; read it, never write it."""
        if not self._work.around.last:
            return None
        path = os.path.join(self._work.around.last, _inner(name))
        return path if os.path.exists(path) else None

    def files(self, prefix: str = "") -> list[str]:
        """Return the names of the files in the newest checkpoint."""
        names = (entry["name"] for entry in self._work.saved.get("files", []))
        return sorted(name for name in names if name.startswith(prefix))

    def drop_file(self, name: str) -> None:
        """Leave a file out of the next checkpoint."""
        self._work.files_dropped.add(_inner(name))

    def on_checkpoint(
        self, collect: Callable[[], None], *, background: bool = False
    ) -> Callable[[], None]:
        """Call `collect` before each save, to bring state and files up to date; a decorator, too.

        It runs between two safe points, never beside the task's own code. With `background` the
        strategy's saves are sealed and synced behind the work: `collect` must leave a snapshot in
        state and files.
        """
        self._work.collectors.append(collect)
        self._work.saves_behind |= background
        return collect

    def on_restore(self, restore: Callable[[], None]) -> Callable[[], None]:
        """Call `restore` now if there is a checkpoint to go on from; a decorator, too."""
        if self._work.resumed_from:
            restore()
        return restore

    def idempotency_key(self, step: str, item: str | None = None) -> str:
        """Return a text to hand to another side, the same in every attempt, for ever.

        Durable: the secret that it is made with, before the first one is returned.
        """
        return steps.idempotency_key(self._work, step, item)

    # --- stopping and telling -------------------------------------------------------------------

    @property
    def should_stop(self) -> bool:
        """Whether somebody asked the task to stop."""
        return self.stop_reason is not None

    @property
    def stop_reason(self) -> str | None:
        """Why: cancel, timeout, deadline, shutdown, drill, terminated; None where nobody asked."""
        return self._told_of(self._work.attention.reason() or None)

    @property
    def grace_left(self) -> float:
        """Seconds until the task is killed; infinite where nobody asked it to stop."""
        self._told_of(self._work.attention.reason())
        return self._work.attention.grace_left_s()

    def _told_of(self, reason: str | None) -> str | None:
        """Take note that the author looks for a stop himself, and whether he has seen one."""
        self._can_be_stopped = True
        self._is_stop_seen |= bool(reason)
        return reason

    def set_progress(
        self, done: float, total: float | None = None, unit: str = "", message: str = ""
    ) -> None:
        """Tell how far the work is; telemetry, and what `Progress` goes by."""
        facts.progress_made(done, total or 0.0)  # checks the range
        text = " ".join(part for part in (message, unit and f"({unit})") if part)
        self._work.tell_progress(done, total or 0.0, text)

    # --- for both contexts ----------------------------------------------------------------------

    def _is_stopped(self) -> bool:
        """Tell whether somebody asked to stop; the author's code does not hear of it by this."""
        return bool(self._work.attention.reason())

    def _leave_untold(self, *, is_stopped: bool) -> None:
        """Raise StopRequested after a save that the author asked for, where he knows of no stop.

        Who knows of it has his own way to leave, in which this save must not be the last line:
        one save, for what looked may be a line that logs, or a thread that this one never asks.
        An at-most-once step is not cut in two.
        """
        self._can_be_stopped = True
        if not is_stopped or self._begun_once or self._work.is_leaving:
            return
        if self._is_stop_seen and not self._is_last_saved:
            self._is_last_saved = True
            return
        self._work.raise_if_stopped()

    @staticmethod
    def _item_fact(key: str, status: str, result: Any = None, error: str | None = None) -> Fact:
        stored = encode(result, f"the result of item {key!r}")
        return facts.item_done(key, status, stored, (error or "")[:500])

    def _completed(self, step: str | None, progress: Any) -> list[Fact]:
        """Return what `checkpoint_if_needed` makes durable always; takes note of the progress."""
        if progress is not None:
            done, total = progress if isinstance(progress, tuple | list) else (progress, 1.0)
            self.set_progress(done, total)
        if step is None or self.was_step_completed(step):
            return []
        return [facts.step_done(step)]

    def _warn_without_safe_point(self) -> None:
        work = self._work
        if self._can_be_stopped:
            return
        without, loss = "step, item or safe point", "after a crash it would start from zero"
        if work.pace.saves or work.known.count:
            without, loss = "safe point", "asked to stop, it would go on until it is killed"
        sys.stderr.write(
            f"ckptd: {work.task.name} runs for {waits.WARN_AFTER_S:.0f} s without a {without}: "
            f"{loss}; call ctx.checkpoint_if_needed()\n"
        )


def _inner(name: str) -> str:
    """Return a name that stays inside of a checkpoint."""
    parts = name.split("/")
    if not name or any(part in {"", ".", ".."} for part in parts) or name.startswith("MANIFEST."):
        raise ValueError(f"{name!r} cannot be a file's name in a checkpoint: a/b.bin can")
    return name
