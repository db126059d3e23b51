"""The asynchronous context: the names and promises of `SyncResumableContext`, awaited.

The disk never holds the loop: facts of all coroutines that come meanwhile share one append and
one sync in a thread, a checkpoint is collected on the loop and written in a thread.
Read next: `context.py`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from typing import Any, TypeVar

from ckptd.sdk import steps, waits
from ckptd.sdk.aio_items import AsyncItems
from ckptd.sdk.behind import CheckpointRef, Pending
from ckptd.sdk.context import AT_LEAST_ONCE, AT_MOST_ONCE
from ckptd.sdk.declare import RetryPolicy
from ckptd.sdk.items import Keys, key_of, size_of
from ckptd.sdk.members import TaskContext
from ckptd.sdk.outcomes import (
    CheckpointTooLarge,
    Parked,
    StepTimeout,
    StopRequested,
    TransientError,
)
from ckptd.sdk.values import decode, encode
from ckptd.sdk.work import Draft, Work
from ckptd.storage import facts
from ckptd.storage.journal import Fact

T = TypeVar("T")
_GROUP_MAX = 250  # calls in one append
_LOCKED_S = 0.02  # until one looks again whether another process still saves or prunes


def run_async(work: Work, park_after_s: float) -> Any:
    """Run a coroutine function to its end on a loop of its own; return its result."""

    async def called() -> Any:
        ctx = ResumableContext(work, park_after_s=park_after_s)
        loop = asyncio.get_running_loop()
        loop.add_reader(work.attention.wake_fd, ctx._wake)
        warning = loop.call_later(waits.WARN_AFTER_S, ctx._warn_without_safe_point)
        try:
            result = await work.task.function(ctx, **work.given)
            await ctx._settled()
            return result
        finally:
            warning.cancel()
            loop.remove_reader(work.attention.wake_fd)

    return asyncio.run(called())


class ResumableContext(TaskContext):
    """The context of a coroutine function."""

    def __init__(self, work: Work, *, park_after_s: float = waits.PARK_AFTER_S) -> None:
        super().__init__(work, park_after_s=park_after_s)
        self._queue: list[tuple[tuple[Fact, ...], asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None
        self._saving = asyncio.Lock()
        self._woken = asyncio.Event()

    def _wake(self) -> None:
        self._woken.set()
        asyncio.get_running_loop().remove_reader(self._work.attention.wake_fd)

    # --- the disk, off the loop -----------------------------------------------------------------

    async def _record(self, *group: Fact) -> None:
        """Make facts durable, together with those of others.

        Durable: all of them, before it returns.
        """
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((group, settled))
        if self._flusher is None:
            self._begin_flush()
        await settled

    def _begin_flush(self) -> None:
        self._flusher = asyncio.create_task(self._flush())
        self._flusher.add_done_callback(self._flushed)

    async def _flush(self) -> None:
        while self._queue:  # Bound: each turn settles what was queued before it
            group, self._queue = self._queue[:_GROUP_MAX], self._queue[_GROUP_MAX:]
            await self._settle(group)

    def _flushed(self, _: asyncio.Task[None]) -> None:
        """Begin again where somebody waits: an author may cancel all tasks, ours too."""
        self._flusher = None
        if any(not settled.done() for _, settled in self._queue):
            self._begin_flush()

    async def _settle(self, group: list[tuple[tuple[Fact, ...], asyncio.Future[None]]]) -> None:
        error: BaseException | None = None
        try:
            await asyncio.to_thread(self._work.record, *(one for some, _ in group for one in some))
        except CheckpointTooLarge as large:
            if len(group) > 1:  # nothing was written; one call must not cost the others theirs
                for one in group:
                    await self._settle([one])
                return
            error = large
        except BaseException as failed:  # noqa: BLE001 - each of the callers gets it raised
            error = failed
        for _, settled in group:
            if settled.done():
                continue  # its coroutine was cancelled
            if error is None:
                settled.set_result(None)
            else:
                settled.set_exception(error)

    async def _save(self, collect: Callable[[], Draft]) -> CheckpointRef:
        """Save; who is cancelled while it waits leaves the save to the next one, or the end."""
        pending = await self._taken(collect, is_waited_for=True)
        return await asyncio.to_thread(pending.wait)

    async def _taken(self, collect: Callable[[], Draft], *, is_waited_for: bool) -> Pending:
        """Collect, take what is staged, and let a thread go on with it.

        Invariant: no coroutine runs between the two: state and files are of one moment.
        """
        while True:  # Bound: whoever has the lock on `ckpt/` saves or prunes, and ends
            await self._settled()
            try:
                return self._work.write_behind(collect(), is_waited_for=is_waited_for, waits=False)
            except BlockingIOError:
                await asyncio.sleep(_LOCKED_S)

    async def _settled(self) -> None:
        await asyncio.to_thread(self._work.settle)

    # --- safe points ----------------------------------------------------------------------------

    async def checkpoint(self, reason: str = "manual") -> CheckpointRef:
        """Save state, cursors and staged files; see `SyncResumableContext.checkpoint`.

        Raises:
            StopRequested: somebody asked to stop before the save; everything is saved. Not once
                it was raised, nor the first time after the task's code has seen the wish: that is
                its own last save; nor in an at-most-once step, which could not be run again.

        Durable: the checkpoint it returns.
        """
        async with self._saving:
            is_stopped = self._is_stopped()
            saved = await self._save(partial(self._work.draft, reason=reason))
        self._leave_untold(is_stopped=is_stopped)
        return saved

    async def checkpoint_if_needed(
        self, step: str | None = None, progress: Any = None, *, force: bool = False
    ) -> bool:
        """Take a safe point; return whether the bulk state was saved.

        Raises:
            StopRequested: somebody asked to stop; everything is saved.

        Durable: the completion of `step`, always.
        """
        done = self._completed(step, progress)
        if done:
            await self._record(*done)
        return await self._safe_point(force=force)

    async def _safe_point(self, *, force: bool = False) -> bool:
        self._can_be_stopped = True
        work = self._work
        is_saved = False
        async with self._saving:
            is_stopped = self._is_stopped()
            if force or work.is_save_due() or (is_stopped and work.is_dirty()):
                collect = partial(work.draft, reason="stop" if is_stopped else "strategy")
                if work.saves_behind and not (is_stopped or force):
                    await self._taken(collect, is_waited_for=False)
                else:
                    await self._save(collect)
                is_saved = True
        if is_stopped:  # and saved here; one that came meanwhile is seen at the next safe point
            work.raise_if_stopped()
        return is_saved

    # --- steps and values -----------------------------------------------------------------------

    async def step(  # noqa: PLR0913 - what an author may say of a step
        self,
        name: str,
        function: Callable[..., Any],
        *args: Any,
        semantics: str = AT_LEAST_ONCE,
        retry: RetryPolicy | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the same names in both contexts
        version: int = 1,
        invalidates: Iterable[str] = (),
        risky: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run a function, plain or async, unless this step is completed; return its result.

        See `SyncResumableContext.step`. A plain function runs on the loop.

        Durable: that the step is done, and its result, before it returns.
        """
        memo = self._steps.memo(name, version)
        if memo is not None:
            return memo.value
        self._work.current_step = name
        await self._safe_point(force=risky and self._work.is_dirty())
        begin = self._steps.begin(name, version, semantics, retry)
        result = await self._begun(
            name,
            begin,
            lambda: self._tried(lambda: _timed(name, function, timeout, args, kwargs), retry),
        )
        await self._record(*self._steps.end(name, result, version, invalidates))
        await self._save_after_step()
        return decode(encode(result, f"the result of step {name!r}"))

    async def _begun(self, name: str, begin: list[Fact], call: Callable[[], Awaitable[T]]) -> T:
        """Run what may have to be durable as begun first; its TransientError takes that back."""
        if not begin:
            return await call()
        await self._record(*begin)
        self._begun_once.add(name)
        try:
            return await call()
        except TransientError as error:
            if not error.is_of_sdk:
                await self._record(facts.step_reset(name))
            raise
        finally:
            self._begun_once.discard(name)

    async def _tried(self, call: Callable[[], Awaitable[T]], retry: RetryPolicy | None) -> T:
        for failures in range(1, (retry.max_failures or steps.TRIES_MAX) + 1 if retry else 2):
            try:
                return await call()
            except Exception as error:
                delay_s = steps.delay_s(error, retry, failures)
                if delay_s is None:
                    raise
            await self._pause(delay_s)
        raise AssertionError

    async def _save_after_step(self) -> None:
        work = self._work
        async with self._saving:
            is_worth = work.task.strategy.is_worth_at_step_end(work.pace, work.ports.now_s())
            if is_worth and work.is_dirty():
                await self._save(partial(work.draft, reason="step"))

    async def complete_step(self, name: str, result: Any = None) -> None:
        """Take note that a step is completed.

        Durable: that, before it returns.
        """
        await self._record(*self._steps.end(name, result, 1, ()))
        await self._safe_point()

    async def set_intermediate_result(self, key: str, value: Any) -> None:
        """Store a value under a key.

        Durable: the value, before it returns.
        """
        stored = encode(value, f"the intermediate result {key!r}")
        await self._record(facts.set_value(key, stored))

    async def delete_intermediate_result(self, key: str) -> None:
        """Forget a value.

        Durable: that it is gone, before it returns.
        """
        if key in self._work.known.values:
            await self._record(facts.delete_value(key))

    # --- items ----------------------------------------------------------------------------------

    def items(
        self, source: Iterable[Any], key: Any = None, concurrency: int = 1, name: str = ""
    ) -> AsyncItems:
        """Return those of `source` that have no result yet; `key` is a function or a field.

        Two sources with the same keys in one task need a `name` each.
        """
        return AsyncItems(self, source, Keys(key, name), concurrency)

    async def record_item(
        self, key: str, status: str, result: Any = None, error: str | None = None
    ) -> None:
        """Take note of how an item came out: pass, fail, error, skipped or quarantined.

        Durable: the result, before it returns.
        """
        await self._record_item(key_of(key), status, result, error)
        await self._safe_point()

    async def _record_item(
        self, key: str, status: str, result: Any = None, error: str | None = None
    ) -> None:
        await self._record(self._item_fact(key, status, result, error))
        self._work.pace.items_since += 1

    async def track(
        self, source: Iterable[T], total: float | None = None, key: Any = None, name: str = "track"
    ) -> AsyncIterator[T]:
        """Yield what is not done yet, and tell the progress; see `SyncResumableContext.track`."""
        total = size_of(source) if total is None else total
        if key is not None:
            async for item in AsyncItems(self, source, Keys(key, name), total=total):
                yield item.value
            return
        position = self._tracked(name)
        skipped = position.value
        for number, one in enumerate(source):
            if number < skipped:
                continue
            yield one
            position.set(number + 1)
            self.set_progress(number + 1, total)
            await self._safe_point()

    # --- waits ----------------------------------------------------------------------------------

    async def sleep_until(self, until_s: float) -> None:
        """Wait until a time (Unix seconds), without a process where that is longer than 10 s.

        Raises:
            Parked: let it pass; the task is started again when it is due.
        """
        await self._wait(until_s, "sleep", "")

    async def wait_rate_limit(
        self, scope: str, *, retry_after: float | str | None = None, rate: str | None = None
    ) -> None:
        """Wait for a shared rate limit; see `SyncResumableContext.wait_rate_limit`.

        Raises:
            Parked: let it pass; the task is started again when it is due.

        Durable: the limit, for everybody who shares the scope.
        """
        wait_s = await asyncio.to_thread(waits.limit_wait_s, scope, retry_after, rate)
        while wait_s > 0:  # Bound: the limit; whoever had to wait has not had its turn yet
            await self._wait(time.time() + wait_s, "rate_limit", scope)
            wait_s = await asyncio.to_thread(waits.limit_wait_s, scope, None, rate)
        await self._safe_point()

    async def _wait(self, until_s: float, why: str, scope: str) -> None:
        left_s = until_s - time.time()
        if left_s > self._park_after_s:
            async with self._saving:
                await self._save(partial(waits.parking_draft, self._work))
            await self._record(waits.parking_fact(until_s, scope))
            raise Parked(until_s, why, scope)
        await self._pause(left_s)

    async def _pause(self, seconds: float) -> None:
        """Wait in place; what was waited is counted, a stop ends it."""
        began_s = time.monotonic()
        await self._hold(seconds)
        self._work.wait_s += time.monotonic() - began_s
        await self._safe_point()

    async def _hold(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:  # Bound: the clock
            if self._is_stopped():
                return
            try:
                await asyncio.wait_for(self._woken.wait(), min(left_s, waits.LOOK_EVERY_S))
            except TimeoutError:
                continue

    async def _limited(self, scope: str, seconds: float) -> None:
        """Wait for a rate limit beside other items; to park is the business of `run`."""
        wait_s = seconds
        if scope:
            wait_s = await asyncio.to_thread(waits.limit_wait_s, scope, seconds, None)
        if wait_s > self._park_after_s:
            raise Parked(time.time() + wait_s, "rate_limit", scope)
        await self._hold(wait_s)
        self._work.raise_if_stopped()

    async def external_job(
        self,
        name: str,
        submit: Callable[[str], Awaitable[Any]],
        poll: Callable[[Any], Awaitable[Any]],
        cancel: Callable[[Any], Awaitable[None]] | None = None,
        *,
        every: float = 5.0,
    ) -> Any:
        """Have another system do the work; see `SyncResumableContext.external_job`.

        Raises:
            StepInterrupted: the submit was begun, and its answer was lost.
        """
        memo = self._steps.memo(name, 1)
        if memo is not None:
            return memo.value
        job_key = steps.job_key(name)
        if job_key not in self._work.known.values:
            await self._safe_point()
            key = self.idempotency_key(name)
            begin = self._steps.begin(name, 1, AT_MOST_ONCE, None)
            job_id = await self._begun(name, begin, lambda: submit(key))
            made = encode(job_id, f"the id of job {name!r}")
            await self._record(facts.set_value(job_key, made))
        job = self.get_intermediate_result(job_key)
        try:
            while (result := await poll(job)) is None:  # Bound: the other system, or a stop
                await self._pause(every)
        except StopRequested as stop:
            if stop.reason == "cancel" and cancel is not None:
                await cancel(job)
            raise
        await self._record(*self._steps.end(name, result, 1, ()))
        return decode(encode(result, f"the result of job {name!r}"))


async def _timed(
    name: str,
    function: Callable[..., Any],
    timeout_s: float | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            made = function(*args, **kwargs)
            return await made if isinstance(made, Awaitable) else made
    except TimeoutError as error:
        if limit.expired():
            raise StepTimeout(f"step {name!r} took longer than {timeout_s:g} s") from error
        raise
