"""What a task's function gets: `ctx`.

Here is the synchronous context; `aio.py` has the asynchronous one, with the same names, and
`members.py` what both share.

    def ingest(ctx, path):
        for row in ctx.track(rows(path), key=lambda row: row["id"]):
            store(row)
        ctx.step("index", build_index)

A *safe point* is a call at which the task may be saved and stopped: `checkpoint_if_needed`,
`checkpoint`, the begin of a step, an item, `track`, every wait. A stop raises StopRequested there,
after a save; `checkpoint` does so only to who does not know of the stop yet.
Invariant: a completed step, item or intermediate result is durable before its call returns.
Read next: `work.py` (the engine), `items.py`, docs/SDK.md.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

from ckptd.sdk import steps, waits
from ckptd.sdk.behind import CheckpointRef, Pending
from ckptd.sdk.declare import RetryPolicy
from ckptd.sdk.items import Keys, SyncItems, key_of, size_of
from ckptd.sdk.members import TaskContext
from ckptd.sdk.outcomes import Parked, StopRequested, TransientError
from ckptd.sdk.values import decode, encode
from ckptd.sdk.work import Draft
from ckptd.storage import facts
from ckptd.storage.journal import Fact

T = TypeVar("T")
AT_LEAST_ONCE: Final = "at_least_once"
AT_MOST_ONCE: Final = "at_most_once"


class SyncResumableContext(TaskContext):
    """The context of a plain function."""

    # --- safe points ----------------------------------------------------------------------------

    def checkpoint(self, reason: str = "manual") -> CheckpointRef:
        """Save state, cursors and staged files; in the task's own thread a safe point, too.

        Raises:
            StopRequested: somebody asked to stop before the call; everything is saved. Not once
                it was raised, nor the first time after the task's code has seen the wish: that is
                its own last save; nor in an at-most-once step, which could not be run again.
            CheckpointTooLarge, NotJson: it does not fit; the one before stands.
            TransientError: the disk is full or fails.

        Durable: the checkpoint it returns.
        """
        is_stopped = self._is_stopped()
        saved = self._save(self._work.draft(reason=reason))
        if threading.get_ident() == self._work.owner:
            self._leave_untold(is_stopped=is_stopped)
        return saved

    def checkpoint_behind(self, reason: str = "manual") -> Pending:
        """Take state and staged files now, and save them beside the work; `.wait()` for the end.

        One is on its way at a time: the next save waits for it, and so does the end of the task.
        """
        return self._work.write_behind(self._work.draft(reason=reason))

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
        """Invariant: state is collected in the task's own thread alone, never beside its code.

        Invariant: who is told to stop has been saved here; a stop that comes meanwhile is seen at
        the next safe point.
        """
        self._can_be_stopped = True
        work = self._work
        if threading.get_ident() != self._work.owner:
            work.raise_if_stopped()
            return False
        is_stopped = self._is_stopped()
        is_saved = force or work.is_save_due() or (is_stopped and work.is_dirty())
        if is_saved and work.saves_behind and not (is_stopped or force):
            work.write_behind(work.draft(reason="strategy"))
        elif is_saved:
            self._save(work.draft(reason="stop" if is_stopped else "strategy"))
        if is_stopped:
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
        interrupted is never run again, unless it raised TransientError: that says nothing was
        done. `timeout` (seconds) needs the main thread.

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
        result = self._begun(
            name,
            begin,
            lambda: self._tried(lambda: steps.timed(name, function, timeout, args, kwargs), retry),
        )
        self._work.record(*self._steps.end(name, result, version, invalidates))
        self._save_after_step()
        return decode(encode(result, f"the result of step {name!r}"))  # type: ignore[no-any-return]

    def _begun(self, name: str, begin: list[Fact], call: Callable[[], T]) -> T:
        """Run what may have to be durable as begun first; its TransientError takes that back."""
        if not begin:
            return call()
        self._work.record(*begin)
        self._begun_once.add(name)
        try:
            return call()
        except TransientError as error:
            if not error.is_of_sdk:
                self._work.record(facts.step_reset(name))
            raise
        finally:
            self._begun_once.discard(name)

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
        if threading.get_ident() != self._work.owner:
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
        self._record_item(key_of(key), status, result, error)
        self._safe_point()

    def _record_item(
        self, key: str, status: str, result: Any = None, error: str | None = None
    ) -> None:
        """Record it under a key as `key_of` made it: one made of that would be another."""
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
        position = self._tracked(name)
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
        # Of an item: saving is not its business.
        is_beside = threading.get_ident() != self._work.owner
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
            if self._is_stopped():
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
            StepInterrupted: the submit was begun, and its answer was lost. TransientError of
                `submit`: nothing was submitted, it is tried again.
        """
        memo = self._steps.memo(name, 1)
        if memo is not None:
            return memo.value
        job_key = steps.job_key(name)
        if job_key not in self._work.known.values:
            self._safe_point()
            key = self.idempotency_key(name)
            begin = self._steps.begin(name, 1, AT_MOST_ONCE, None)
            made = encode(self._begun(name, begin, lambda: submit(key)), f"the id of job {name!r}")
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
