"""Many items in a coroutine function: what `items.py` is to a plain one, awaited.

Read next: `items.py` (keys, outcomes), `aio.py` (the context).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from ckptd.sdk.declare import RetryPolicy
from ckptd.sdk.items import RETRY, Item, Items, Outcome, Tally, outcome_of
from ckptd.sdk.outcomes import (
    CheckpointTooLarge,
    CorruptCheckpointError,
    NotJson,
    Parked,
    StopRequested,
)

if TYPE_CHECKING:
    from ckptd.sdk.aio import ResumableContext


class AsyncItem(Item):
    """An item in a coroutine function."""

    __slots__ = ()

    async def step(self, name: str, function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """Run a step inside of this item, as `ctx.step` does.

        Durable: that it is done, and its result.
        """
        return await self.items.ctx.step(self.step_name(name), function, *args, **kw)

    async def record(self, status: str, result: Any = None, error: str | None = None) -> None:
        """Take note of how it came out, before the loop goes on.

        Durable: the result.
        """
        self.is_recorded = True
        await self.items.ctx._record_item(self.key, status, result, error)
        await self.items.ctx._safe_point()


class AsyncItems(Items):
    """The items of a coroutine function: an `async for` loop over them, or `run`."""

    ctx: "ResumableContext"

    async def __aiter__(self) -> AsyncIterator[AsyncItem]:
        """Yield what is to be done; an item is passed when the next one is asked for.

        Durable: the result of each, before the next.
        """
        source = iter(self._source)
        while (item := self._next_of(source, AsyncItem)) is not None:  # Bound: the source
            assert isinstance(item, AsyncItem)
            yield item
            if not item.is_recorded:
                await item.record("pass")
            self._tell()

    async def run(
        self,
        function: Callable[[Any], Awaitable[Any]],
        retry: RetryPolicy = RETRY,
        *,
        gives_item: bool = False,
    ) -> Tally:
        """Await `function(value)` for each item, up to `concurrency` at once.

        See `SyncItems.run` for what exceptions mean.

        Raises:
            TransientError: items are left that could not be done now.

        Durable: each result, before another item takes its place.
        """
        function = self._given(function, gives_item=gives_item)
        flying: set[asyncio.Task[None]] = set()
        try:
            await self._run_all(function, retry, flying)
        except Parked as parked:  # raised beside us: to park is the business of this coroutine
            await asyncio.gather(*flying, return_exceptions=True)
            await self.ctx._wait(parked.until_s, parked.reason, parked.scope)
            self.tally.leave(parked.reason)
        except StopRequested:  # a wait of an item ended: the state is saved before we go
            await asyncio.gather(*flying, return_exceptions=True)
            await self.ctx._safe_point()
            raise
        finally:
            await asyncio.gather(*flying, return_exceptions=True)
        if self.tally.undone:
            raise self._left()
        return self.tally

    async def _run_all(
        self,
        function: Callable[[Any], Awaitable[Any]],
        retry: RetryPolicy,
        flying: set[asyncio.Task[None]],
    ) -> None:
        source = iter(self._source)
        while (item := self._next_of(source, AsyncItem)) is not None:  # Bound: the source
            flying.add(asyncio.create_task(self._do(function, item, retry)))
            while len(flying) >= self.concurrency:  # Bound: the items in flight
                await self._gathered(flying)
        while flying:  # Bound: the items in flight
            await self._gathered(flying)

    async def _gathered(self, flying: set[asyncio.Task[None]]) -> None:
        done, _ = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
        flying -= done
        for one in done:
            one.result()
        self._tell(len(flying))
        await self.ctx._safe_point()

    async def _do(
        self, function: Callable[[Any], Awaitable[Any]], item: Item, retry: RetryPolicy
    ) -> None:
        failures = 0
        while True:  # Bound: the retry policy; a rate limit waits as long as it is told to
            outcome = await self._call(function, item, failures + 1, retry)
            if outcome.status:
                break
            if outcome.is_limited:
                await self.ctx._limited(outcome.scope, outcome.delay_s)
                continue
            failures += 1
            if outcome.is_over:
                self.tally.leave(outcome.error)
                return
            await self.ctx._hold(outcome.delay_s)
            self.ctx._work.raise_if_stopped()
        try:
            await self.ctx._record_item(item.key, outcome.status, outcome.result, outcome.error)
        except (NotJson, CheckpointTooLarge) as unfit:  # nothing of it was recorded
            outcome = Outcome("error", error=str(unfit))
            await self.ctx._record_item(item.key, outcome.status, None, outcome.error)
        self.tally.add(outcome.status)

    @staticmethod
    async def _call(
        function: Callable[[Any], Awaitable[Any]], item: Item, failures: int, retry: RetryPolicy
    ) -> Outcome:
        try:
            return Outcome("pass", await function(item))
        except CorruptCheckpointError:  # of the task, not of the item
            raise
        except Exception as error:  # noqa: BLE001 - an item's failure is its own
            return outcome_of(error, failures, retry)
