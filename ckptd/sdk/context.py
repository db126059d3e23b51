"""What a task's function gets: `ctx`.

Here are the members that both contexts share, and the synchronous context; `aio.py` has the
asynchronous one, with the same names.

    def ingest(ctx, path):
        for row in ctx.track(rows(path), key=lambda row: row["id"]):
            store(row)
        ctx.step("index", build_index)

A *safe point* is a call at which the task may be saved and stopped: `checkpoint_if_needed`, the
begin of a step, an item, `track`, every wait. A stop raises StopRequested there, after a save.
Invariant: a completed step, item or intermediate result is durable before its call returns.
Read next: `work.py` (the engine), `items.py`, docs/SDK.md.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple, TypeVar

from ckptd.sdk import steps, waits
from ckptd.sdk.declare import RetryPolicy
from ckptd.sdk.items import Keys, SyncItems, key_of, size_of
from ckptd.sdk.outcomes import Parked, StopRequested
from ckptd.sdk.state import Cursor
from ckptd.sdk.values import decode, encode
from ckptd.sdk.work import CheckpointRef, Draft, Work
from ckptd.storage import facts
from ckptd.storage.journal import Fact

T = TypeVar("T")
AT_LEAST_ONCE: Final = "at_least_once"
AT_MOST_ONCE: Final = "at_most_once"


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
        self._has_safe_point = False
        self._owner = threading.get_ident()

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
        saved = self._work.saved
        told = saved.get("progress")
        is_told = isinstance(told, dict)
        progress = (float(told["done"]), float(told["total"])) if is_told and told else None
        at_s = float(saved.get("at_ns") or 0) / 1e9
        return ResumePoint(int(saved.get("seq") or 0), at_s, self._work.current_step, progress)

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

    def on_checkpoint(self, collect: Callable[[], None]) -> Callable[[], None]:
        """Call `collect` before each save, to bring state and files up to date; a decorator, too.

        It runs between two safe points, never beside the task's own code.
        """
        self._work.collectors.append(collect)
        return collect

    def on_restore(self, restore: Callable[[], None]) -> Callable[[], None]:
        """Call `restore` now if there is a checkpoint to go on from; a decorator, too."""
        if self._work.saved:
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
        return bool(self._work.attention.reason())

    @property
    def stop_reason(self) -> str | None:
        """Why: cancel, timeout, deadline, shutdown, terminated; None where nobody asked."""
        return self._work.attention.reason() or None

    @property
    def grace_left(self) -> float:
        """Seconds until the task is killed; infinite where nobody asked it to stop."""
        return self._work.attention.grace_left_s()

    def set_progress(
        self, done: float, total: float | None = None, unit: str = "", message: str = ""
    ) -> None:
        """Tell how far the work is; telemetry, and what `Progress` goes by."""
        facts.progress_made(done, total or 0.0)  # checks the range
        text = " ".join(part for part in (message, unit and f"({unit})") if part)
        self._work.tell_progress(done, total or 0.0, text)

    # --- for both contexts ----------------------------------------------------------------------

    @staticmethod
    def _item_fact(key: str, status: str, result: Any = None, error: str | None = None) -> Fact:
        stored = encode(result, f"the result of item {key!r}")
        return facts.item_done(key_of(key), status, stored, (error or "")[:500])

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
        if not (self._has_safe_point or work.pace.saves or work.known.count):
            sys.stderr.write(
                f"ckptd: {work.task.name} runs for {waits.WARN_AFTER_S:.0f} s without a step, item "
                "or safe point: after a crash it would start from zero; call "
                "ctx.checkpoint_if_needed()\n"
            )


class SyncResumableContext(TaskContext):
    """The context of a plain function."""

    def __init__(self, work: Work, *, park_after_s: float = waits.PARK_AFTER_S) -> None:
        super().__init__(work, park_after_s=park_after_s)
        self._thread = threading.get_ident()

    # --- safe points ----------------------------------------------------------------------------

    def checkpoint(self, reason: str = "manual") -> CheckpointRef:
        """Save state, cursors and staged files.

        Raises:
            CheckpointTooLarge, NotJson: it does not fit; the one before stands.
            TransientError: the disk is full or fails.

        Durable: the checkpoint it returns.
        """
        return self._save(self._work.draft(reason=reason))

    def _save(self, draft: Draft) -> CheckpointRef:
        return self._work.write(draft)

    def checkpoint_if_needed(
        self, step: str | None = None, progress: Any = None, *, force: bool = False
    ) -> bool:
        """Take a safe point; return whether the bulk state was saved.

        `step`: this step is completed. `progress`: a share of 1, or (done, total).

        Raises:
            StopRequested: somebody asked to stop; everything is saved.

        Durable: the completion of `step`, always.
        """
        done = self._completed(step, progress)
        if done:
            self._work.record(*done)
        return self._safe_point(force=force)

    def _safe_point(self, *, force: bool = False) -> bool:
        """Invariant: state is collected in the task's own thread alone, never beside its code."""
        self._has_safe_point = True
        work = self._work
        if threading.get_ident() != self._owner:
            work.raise_if_stopped()
            return False
        is_stopped = self.should_stop
        is_saved = force or work.is_save_due() or (is_stopped and work.is_dirty())
        if is_saved:
            self._save(work.draft(reason="stop" if is_stopped else "strategy"))
        work.raise_if_stopped()
        return is_saved

    # --- steps and values -----------------------------------------------------------------------

    def step(  # noqa: PLR0913 - what an author may say of a step
        self,
        name: str,
        function: Callable[..., T],
        *args: Any,
        semantics: str = AT_LEAST_ONCE,
        retry: RetryPolicy | None = None,
        timeout: float | None = None,
        version: int = 1,
        invalidates: Iterable[str] = (),
        risky: bool = False,
        **kwargs: Any,
    ) -> T:
        """Run a function unless this step is completed; return its result, now or as remembered.

        `version`: a completed step of another version runs again, and those that it
        `invalidates`, too. `at_most_once`: its start is durable first, and one that was
        interrupted is never run again. `timeout` (seconds) needs the main thread.

        Raises:
            DuplicateStepError, StepInterrupted, StepTimeout; what the function raises.

        Durable: that the step is done, and its result, before it returns.
        """
        memo = self._steps.memo(name, version)
        if memo is not None:
            return memo.value  # type: ignore[no-any-return]
        self._work.current_step = name
        self._safe_point(force=risky and self._work.is_dirty())
        begin = self._steps.begin(name, version, semantics, retry)
        if begin:
            self._work.record(*begin)
        result = self._tried(lambda: steps.timed(name, function, timeout, args, kwargs), retry)
        self._work.record(*self._steps.end(name, result, version, invalidates))
        self._save_after_step()
        return decode(encode(result, f"the result of step {name!r}"))  # type: ignore[no-any-return]

    def _tried(self, call: Callable[[], T], retry: RetryPolicy | None) -> T:
        for failures in range(1, (retry.max_failures or steps.TRIES_MAX) + 1 if retry else 2):
            try:
                return call()
            except Exception as error:
                delay_s = steps.delay_s(error, retry, failures)
                if delay_s is None:
                    raise
                self._pause(delay_s)
        raise AssertionError

    def _save_after_step(self) -> None:
        work = self._work
        if threading.get_ident() != self._owner:
            return
        is_worth = work.task.strategy.is_worth_at_step_end(work.pace, work.ports.now_s())
        if is_worth and work.is_dirty():
            self._save(work.draft(reason="step"))

    def complete_step(self, name: str, result: Any = None) -> None:
        """Take note that a step is completed.

        Durable: that, before it returns.
        """
        self._work.record(*self._steps.end(name, result, 1, ()))
        self._safe_point()

    def set_intermediate_result(self, key: str, value: Any) -> None:
        """Store a value under a key.

        Durable: the value, before it returns.
        """
        stored = encode(value, f"the intermediate result {key!r}")
        self._work.record(facts.set_value(key, stored))

    def delete_intermediate_result(self, key: str) -> None:
        """Forget a value.

        Durable: that it is gone, before it returns.
        """
        if key in self._work.known.values:
            self._work.record(facts.delete_value(key))

    # --- items ----------------------------------------------------------------------------------

    def items(
        self, source: Iterable[Any], key: Any = None, concurrency: int = 1, name: str = ""
    ) -> SyncItems:
        """Return those of `source` that have no result yet; `key` is a function or a field.

        Two sources with the same keys in one task need a `name` each.
        """
        return SyncItems(self, source, Keys(key, name), concurrency)

    def record_item(
        self, key: str, status: str, result: Any = None, error: str | None = None
    ) -> None:
        """Take note of how an item came out: pass, fail, error, skipped or quarantined.

        Durable: the result, before it returns.
        """
        self._record_item(key, status, result, error)
        self._safe_point()

    def _record_item(
        self, key: str, status: str, result: Any = None, error: str | None = None
    ) -> None:
        self._work.record(self._item_fact(key, status, result, error))
        self._work.pace.items_since += 1

    def track(
        self, source: Iterable[T], total: float | None = None, key: Any = None, name: str = "track"
    ) -> Iterator[T]:
        """Yield what is not done yet, and tell the progress.

        With `key` each one is done, durably, when the next is asked for. Without, the position is
        a cursor, saved by the strategy: at most the work since the last save is repeated.
        """
        total = size_of(source) if total is None else total
        if key is not None:
            yield from (
                item.value for item in SyncItems(self, source, Keys(key, name), total=total)
            )
            return
        position = self.cursor(name, 0)
        skipped = position.value
        for number, one in enumerate(source):
            if number < skipped:
                continue
            yield one
            position.set(number + 1)
            self.set_progress(number + 1, total)
            self._safe_point()

    # --- waits ----------------------------------------------------------------------------------

    def sleep_until(self, until_s: float) -> None:
        """Wait until a time (Unix seconds), without a process where that is longer than 10 s.

        Raises:
            Parked: let it pass; the task is started again when it is due.
        """
        self._wait(until_s, "sleep", "")

    def wait_rate_limit(
        self, scope: str, *, retry_after: float | str | None = None, rate: str | None = None
    ) -> None:
        """Wait for a shared rate limit; `retry_after` sets it, `rate` ("10/s") takes a turn of it.

        Raises:
            Parked: let it pass; the task is started again when it is due.

        Durable: the limit, for everybody who shares the scope.
        """
        is_beside = threading.get_ident() != self._thread  # of an item: saving is not its business
        wait_s = waits.limit_wait_s(scope, retry_after, rate)
        while wait_s > 0:  # Bound: the limit; whoever had to wait has not had its turn yet
            if is_beside:
                self._wait_beside(wait_s, scope)
            else:
                self._wait(time.time() + wait_s, "rate_limit", scope)
            wait_s = waits.limit_wait_s(scope, None, rate)
        if not is_beside:
            self._safe_point()

    def _limited(self, scope: str, seconds: float) -> None:
        """Wait for a rate limit that an item came upon."""
        self._wait_beside(waits.limit_wait_s(scope, seconds, None) if scope else seconds, scope)

    def _wait_beside(self, wait_s: float, scope: str) -> None:
        """Wait in a thread of an item; a stop or a park ends it by raising."""
        if wait_s > self._park_after_s:
            raise Parked(time.time() + wait_s, "rate_limit", scope)
        self._hold(wait_s)

    def _hold(self, seconds: float) -> None:
        """Wait in place, in any thread; raises StopRequested, saves nothing."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:  # Bound: the clock
            self._work.raise_if_stopped()
            self._work.attention.wait(min(left_s, waits.LOOK_EVERY_S))

    def _wait(self, until_s: float, why: str, scope: str) -> None:
        left_s = until_s - time.time()
        if left_s > self._park_after_s:
            draft = waits.parking_draft(self._work)
            self._save(draft)
            self._work.record(waits.parking_fact(until_s, scope))
            raise Parked(until_s, why, scope)
        self._pause(left_s)

    def _pause(self, seconds: float) -> None:
        """Wait in place; what was waited is counted, a stop ends it."""
        until_s = time.monotonic() + seconds
        began_s = time.monotonic()
        while (left_s := until_s - time.monotonic()) > 0:  # Bound: the clock
            if self.should_stop:
                break
            self._work.attention.wait(min(left_s, waits.LOOK_EVERY_S))
        self._work.wait_s += time.monotonic() - began_s
        self._safe_point()

    def external_job(
        self,
        name: str,
        submit: Callable[[str], Any],
        poll: Callable[[Any], Any],
        cancel: Callable[[Any], None] | None = None,
        *,
        every: float = 5.0,
    ) -> Any:
        """Have another system do the work, and outlive it all: its id is durable before polling.

        `submit(idempotency_key)` returns the job's id; `poll(id)` returns None while it runs, then
        the result. `cancel(id)` is called when this task is cancelled.

        Raises:
            StepInterrupted: the submit was begun, and its answer was lost.
        """
        memo = self._steps.memo(name, 1)
        if memo is not None:
            return memo.value
        job_key = steps.job_key(name)
        if job_key not in self._work.known.values:
            self._safe_point()
            self._work.record(*self._steps.begin(name, 1, AT_MOST_ONCE, None))
            made = encode(submit(self.idempotency_key(name)), f"the id of job {name!r}")
            self._work.record(facts.set_value(job_key, made))
        job = self.get_intermediate_result(job_key)
        result = self._polled(job, poll, cancel, every)
        self._work.record(*self._steps.end(name, result, 1, ()))
        return decode(encode(result, f"the result of job {name!r}"))

    def _polled(
        self,
        job: Any,
        poll: Callable[[Any], Any],
        cancel: Callable[[Any], None] | None,
        every_s: float,
    ) -> Any:
        try:
            while (result := poll(job)) is None:  # Bound: the other system, or a stop
                self._pause(every_s)
        except StopRequested as stop:
            if stop.reason == "cancel" and cancel is not None:
                cancel(job)
            raise
        return result


def _inner(name: str) -> str:
    """Return a name that stays inside of a checkpoint."""
    parts = name.split("/")
    if not name or any(part in {"", ".", ".."} for part in parts) or name.startswith("MANIFEST."):
        raise ValueError(f"{name!r} cannot be a file's name in a checkpoint: a/b.bin can")
    return name
