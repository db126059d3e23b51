"""One attempt of a task, seen from inside: what is known, what is made durable, when to save.

Both contexts stand on this; it waits for nothing but the disk. Facts (steps, values, items) go to
the journal and are durable when `record` returns; the bulk state goes into a checkpoint when the
strategy, the daemon, a stop or the author asks. What is on disk if the process dies on any line:
every fact that was recorded, and the newest checkpoint that was published; the next attempt
reads both here.
Invariant: facts are applied to `known` only after they are durable.
Read next: `context.py`, `ckptd/storage/journal.py`, `save.py`.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from ckptd.protocol.version import VERSION
from ckptd.sdk import save as saver
from ckptd.sdk import state as states
from ckptd.sdk.attention import Attention
from ckptd.sdk.behind import CheckpointRef, Pending
from ckptd.sdk.declare import Task
from ckptd.sdk.group import Appends, Recorder
from ckptd.sdk.outcomes import (
    CheckpointTooLarge,
    CorruptCheckpointError,
    LeaseLost,
    StopRequested,
    TransientError,
)
from ckptd.sdk.strategy import numbers, pace_of
from ckptd.sdk.surroundings import Surroundings
from ckptd.storage import manifest as seals
from ckptd.storage.facts import Facts, read_durable
from ckptd.storage.journal import Fact, Journal, StaleAttempt, TooLarge
from ckptd.storage.manifest import Manifest, TooNew, sha256
from ckptd.storage.untrusted import Damaged, NotTrusted, is_empty, is_passing, open_directory

_TELL_EVERY_S: Final = 0.1  # progress is telemetry; a fast loop must not pay for it
_CODE_CHARS: Final = 16


class Draft(NamedTuple):
    """A checkpoint that is collected and not written yet."""

    header: Manifest
    content: Any
    began_s: float


def _journal(around: Surroundings) -> Appends:
    return Journal(around.dir, around.task, around.attempt, around.epoch)


def _finished(saving: saver.Saving, header: Manifest) -> saver.Saved:
    return saving.finish(header)


class Ports(NamedTuple):
    """What an attempt writes through, and its clock; `ckptd.testing` gives others."""

    journal: Callable[[Surroundings], Appends] = _journal
    save: Callable[[saver.Saving, Manifest], saver.Saved] = _finished
    now_s: Callable[[], float] = time.monotonic


class Work:
    """The engine of one attempt. `record` may be called by many threads, the rest by one."""

    def __init__(
        self,
        around: Surroundings,
        task: Task,
        given: dict[str, Any],
        ports: Ports | None = None,
    ) -> None:
        """Read what earlier attempts left.

        Raises:
            StateVersionError, CorruptCheckpointError: it cannot be gone on from; nothing changed.
            LeaseLost: a newer attempt exists. TransientError: the disk has trouble.
        """
        began_s = time.monotonic()
        self.around, self.task, self.given = around, task, given
        self.ports = ports or Ports()
        self.known = self._read_facts()
        self.saved = self._read_manifest()
        self.resumed_from = self.saved  # as it was found; `saved` follows what this attempt saves
        self.is_resumed = bool(self.saved) or self.known.has_any
        self.state: Any = self._restored()
        found = self.saved.get("cursors")
        self.cursors: dict[str, Any] = dict(found) if isinstance(found, dict) else {}
        self.current_step = str(self.saved.get("current_step") or "")
        self.progress: tuple[float, float] | None = None
        self.files_dropped: set[str] = set()
        self._dropping: set[str] = set()
        self._has_warned = False
        self.collectors: list[Callable[[], None]] = []
        self.saves_behind = False  # strategy's saves: an author's collector allows it
        self._pending: Pending | None = None
        self.pauses = int(self.saved.get("pause_count") or 0)
        self.resumes = int(self.saved.get("resume_count") or 0) + bool(self.saved)
        self.wait_s = float(self.saved.get("wait_s") or 0.0) + self._parked_s()
        self._told_at_s = 0.0
        self._provenance: dict[str, Any] = {}
        interruptions = max(0, around.attempt - 1 - self.pauses)
        self.pace = pace_of(self.saved.get("numbers"), interruptions)
        self.pace.began_at_s = self.pace.saved_at_s = self.ports.now_s()
        self.pace.jitter = 0.9 + (hash((around.task, around.attempt)) % 201) / 1000
        self.pace.resume_s = time.monotonic() - began_s
        self._content = self._content_now() if self.saved else None
        self.recorder = Recorder(self.ports.journal(around), self._know)
        self.attention = Attention(around)
        self.owner = threading.get_ident()  # whose state it is, and whose safe points
        self.is_leaving = False  # StopRequested was raised into that thread
        try:
            self._migrate()
        except BaseException:
            self.close()
            raise

    # --- what is there --------------------------------------------------------------------------

    def _read_facts(self) -> Facts:
        """Durable: what it returns; its writer may have been killed before its sync."""
        around = self.around
        try:
            known = read_durable(around.dir, around.task, os.getuid(), around.attempt)
        except (Damaged, NotTrusted) as error:
            raise CorruptCheckpointError(f"the journal does not check: {error}") from error
        except OSError as error:
            raise trouble(error, "the journal cannot be read") from error
        if known.problem:
            raise CorruptCheckpointError(known.problem)
        return known

    def _read_manifest(self) -> Manifest:
        """Return the manifest to go on from; its files were compared before the task started."""
        if not self.around.last:
            return {}
        uid = os.getuid()
        try:
            fd = open_directory(self.around.last, uid)
            try:
                return seals.load(fd, uid)
            finally:
                os.close(fd)
        except (Damaged, NotTrusted, TooNew) as error:
            raise CorruptCheckpointError(f"{self.around.last} does not check: {error}") from error
        except OSError as error:
            raise trouble(error, f"{self.around.last} cannot be read") from error

    def _restored(self) -> Any:
        saved = self.saved
        version = int(saved.get("state_version") or 0)
        is_there = bool(saved) and (version > 0 or saved.get("state") is not None)
        return states.restored(self.task, saved.get("state"), version, is_there=is_there)

    def _migrate(self) -> None:
        """Save state that an earlier version left as that of this one: once, and kept.

        Crash: before the save, the next attempt migrates again from what is untouched.
        """
        version = int(self.saved.get("state_version") or 0)
        if 0 < version < self.task.version:
            self._provenance = {"migrated_from": version, "of": int(self.saved["seq"])}
            self.write(self.draft())

    def _parked_s(self) -> float:
        parked_ns = self.saved.get("parked_at_ns")
        if not isinstance(parked_ns, int) or not 0 < parked_ns < time.time_ns():
            return 0.0
        return (time.time_ns() - parked_ns) / 1e9

    # --- facts ----------------------------------------------------------------------------------

    def record(self, *facts: Fact) -> None:
        """Make facts durable, then know them, in the order of the journal.

        Durable: all of them, before it returns.
        """
        with _told_as_ours("a fact could not be recorded"):
            self.recorder.record(list(facts))

    def _know(self, facts: list[Fact]) -> None:
        for fact in facts:
            self.known.take(self.around.attempt, fact)

    def agreed(self, key: str) -> Any:
        """Return a value as the journal has it: another process of this attempt may be first."""
        value = self._read_facts().values.get(key, self.known.values[key])
        self.known.values[key] = value
        return value

    # --- checkpoints ----------------------------------------------------------------------------

    def draft(self, **more: Any) -> Draft:
        """Collect what a checkpoint shall hold; runs the author's callbacks, in this thread.

        Invariant: nothing waits between this and `_begin`: state and files are of one moment.
        """
        self.settle()
        began_s = self.ports.now_s()
        for collect in self.collectors:
            collect()
        content = self._content_now()
        state, cursors, progress = content
        header = {
            "task": self.around.task,
            "attempt": self.around.attempt,
            "epoch": self.around.epoch,
            "state": state,
            "state_version": self.task.version,
            "cursors": cursors,
            "progress": progress,
            "current_step": self.current_step,
            "pause_count": self.pauses,
            "resume_count": self.resumes,
            "wait_s": round(self.wait_s, 3),
            "task_name": self.task.name,
            "task_version": self.task.version,
            "sdk_version": VERSION,
            "code_digest": code_digest(self.task),
            "config_digest": input_digest(self.given),
            "numbers": numbers(self.task.strategy, self.pace, self.ports.now_s()),
            **({"provenance": self._provenance} if self._provenance else {}),
            # Copies: other threads record while this is hashed and written.
            **saver.facts_for_header(sorted(self.known.steps), dict(self.known.values)),
            **more,
        }
        return Draft(header, content, began_s)

    def _content_now(self) -> Any:
        has_schema = self.task.state_schema is not None
        done_total = self.progress and {"done": self.progress[0], "total": self.progress[1]}
        return states.packed(self.state, has_schema=has_schema), dict(self.cursors), done_total

    def is_dirty(self) -> bool:
        """Return whether a save now would hold anything that the last one does not."""
        if self.collectors or not is_empty(f"{self.around.dir}/stage"):
            return True
        state, cursors, _ = self._content_now()
        if self._content is None:
            return bool(state) or bool(cursors)
        return bool((state, cursors) != self._content[:2])

    def write(self, draft: Draft) -> CheckpointRef:
        """Write a draft, in this thread.

        Raises:
            CheckpointTooLarge, CorruptCheckpointError, LeaseLost, TransientError: the one before
            stands.

        Durable: the checkpoint it returns.
        """
        self.settle()
        with _told_as_ours("the checkpoint could not be saved"):
            saving = self._begin(waits=True)
        try:
            return self._finish(draft, saving, None)
        finally:  # does nothing, unless a signal's exception struck on the way
            saving.drop()
            if saving.saved is not None:
                self._take_over(saving.saved, draft)

    def write_behind(
        self, draft: Draft, *, is_waited_for: bool = False, waits: bool = True
    ) -> Pending:
        """Take what is staged and return; sealing and syncing go on in a thread, one at a time.

        Without `waits` it raises BlockingIOError where another process saves or prunes just now.
        """
        self.settle()
        with _told_as_ours("the checkpoint could not be saved"):
            saving = self._begin(waits=waits)
        now_s = self.ports.now_s()
        self.pace.saved_at_s = now_s
        block_s = None if is_waited_for else now_s - draft.began_s
        self._pending = Pending(lambda: self._finish(draft, saving, block_s))
        self._pending.start()
        return self._pending

    def settle(self) -> None:
        """Wait for the checkpoint that is on its way; raises what became of it.

        Durable: that checkpoint.
        """
        if self._pending is not None:  # it stays: who is struck while waiting must wait again
            self._pending.settle()

    def _begin(self, *, waits: bool) -> saver.Saving:
        """Take the stage, and carry on what the last checkpoint has that was not written anew."""
        stage = f"{self.around.dir}/stage"
        self._dropping = set(self.files_dropped)  # what is dropped from now on is of the next one
        names = (str(entry["name"]) for entry in self.saved.get("files", []))
        carry = [
            name
            for name in names
            if name not in self._dropping and not os.path.lexists(f"{stage}/{name}")
        ]
        last = os.path.basename(self.around.last)
        return saver.begin(
            self.around.dir, [], self.around.attempt, carry, carry_from=last, waits=waits
        )

    def _finish(self, draft: Draft, saving: saver.Saving, block_s: float | None) -> CheckpointRef:
        """Durable: the checkpoint it returns."""
        with _told_as_ours("the checkpoint could not be saved"):
            saved = self.ports.save(saving, draft.header)
        now_s = self.ports.now_s()
        took_s = now_s - draft.began_s
        self._take_over(saved, draft)
        self.pace.saved(now_s, took_s if block_s is None else block_s, saved.size_bytes)
        self.pace.interval_s = self.task.strategy.interval_s(self.pace, now_s)
        self._warn_once(self.task.strategy.warning(self.pace))
        self._provenance = {}
        self.around.notify("CHECKPOINT=1")
        return CheckpointRef(saved.seq, saved.manifest["digest"], saved.size_bytes, took_s)

    def _warn_once(self, text: str) -> None:
        if text and not self._has_warned:
            self._has_warned = True
            sys.stderr.write(f"ckptd: {self.task.name}: {text}\n")

    def _take_over(self, saved: saver.Saved, draft: Draft) -> None:
        self.saved, self.around.last, self._content = saved.manifest, saved.path, draft.content
        self.files_dropped -= self._dropping

    def is_save_due(self) -> bool:
        """Return whether to save at this safe point, by the daemon's wish or the strategy's."""
        if self.attention.takes_save():
            return True
        if not self.task.strategy.is_due(self.pace, self.ports.now_s()):
            return False
        if self.is_dirty():
            return True
        self.pace.saved_at_s = self.ports.now_s()  # nothing to save: look again an interval later
        return False

    def raise_if_stopped(self) -> None:
        """Raise StopRequested where somebody asked."""
        reason = self.attention.reason()
        if reason:
            self.is_leaving |= threading.get_ident() == self.owner
            raise StopRequested(reason)

    # --- telemetry ------------------------------------------------------------------------------

    def tell_progress(self, done: float, total: float, text: str) -> None:
        """Remember how far it is, and tell the daemon now and then; never waits."""
        self.progress = (float(done), float(total))
        self.pace.done_share = min(1.0, done / total) if total > 0 else 0.0
        if self.pace.done_share < self.pace.saved_share:
            self.pace.saved_share = 0.0  # another loop counts from its own beginning
        now_s = self.ports.now_s()
        if now_s - self._told_at_s >= _TELL_EVERY_S or (total and done >= total):
            self._told_at_s = now_s
            lines = [f"STATUS={text}"] if text else []
            self.around.notify(f"PROGRESS={done:.15g}/{total:.15g}", *lines)

    def close(self) -> None:
        """Give the files back; what was recorded is on the disk already."""
        try:
            # `settle` tells; here it only must not run on
            with contextlib.suppress(Exception, StopRequested):
                self.settle()
        finally:
            self.recorder.close()
            self.attention.close()


@contextlib.contextmanager
def _told_as_ours(what: str) -> Iterator[None]:
    """Raise what the storage raises as what an author knows."""
    try:
        yield
    except StaleAttempt as error:
        raise LeaseLost(str(error)) from error
    except TooLarge as error:
        raise CheckpointTooLarge(f"{error}; nothing of it was recorded") from error
    except NotTrusted as error:
        raise CheckpointTooLarge(f"{what}: {error}") from error
    except Damaged as error:
        raise CorruptCheckpointError(f"{what}: {error}") from error
    except OSError as error:
        raise trouble(error, what) from error


def trouble(error: OSError, what: str) -> Exception:
    """Return what to raise for an error of the machine: what passes is waited out."""
    if is_passing(error):
        passing = TransientError(f"{what}: {error.strerror}; it is tried again")
        passing.is_of_sdk = True
        return passing
    return error


def input_digest(given: dict[str, Any]) -> str:
    """Return a digest of the input. Without a daemon it may be anything, not JSON alone."""
    text = json.dumps(given, sort_keys=True, default=_plain)
    return sha256(text.encode()).hexdigest()[:_CODE_CHARS]


def _plain(value: Any) -> str:
    return os.fspath(value) if isinstance(value, os.PathLike) else type(value).__name__


def code_digest(task: Task) -> str:
    """Return a digest of the function's code: for people who compare, never enforced."""
    code = getattr(task.function, "__code__", None)
    return sha256(code.co_code).hexdigest()[:_CODE_CHARS] if code is not None else ""


def since_process_start_s() -> float:
    """Return how long this process is there: what a resume cost before the work goes on."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    began_s = ticks / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began_s)
