"""Many items in one task: each has one durable result, keyed by its content, not by its place.

    for item in ctx.items(rows, key="id"):             done when the next one is asked for
        store(item.value)

    tally = ctx.items(rows, key="id", concurrency=8).run(fetch)     8 threads, grouped syncs

Completed means attempted: pass, fail, error, skipped and quarantined all count, so a second run
does what is new. Input may be reordered or extended. For batches of commands, and for items that
may kill their process, see `ckptctl batch`. Read next: `context.py`; `aio.py` has the async form.
"""

import json
import re
from _thread import allocate_lock
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ckptd.sdk.declare import RetryPolicy
from ckptd.sdk.outcomes import (
    CheckpointTooLarge,
    CorruptCheckpointError,
    NotJson,
    Parked,
    PermanentError,
    QuarantineItem,
    RateLimited,
    SkipItem,
    StepInterrupted,
    StopRequested,
    TransientError,
)
from ckptd.storage.facts import NAME_CHARS_MAX
from ckptd.storage.manifest import sha256

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ckptd.sdk.context import SyncResumableContext

RETRY: Final = RetryPolicy(max_failures=5, backoff=0.5, backoff_max=60.0)
_KEY_CHARS_MAX: Final = 512  # a longer one is its begin and a digest
_TEXT_CHARS_MAX: Final = 300
_ADDRESS: Final = re.compile(r" at 0x[0-9a-f]+>")


def key_of(value: Any, key: Any = None) -> str:
    """Return the key of an item: what `key` says (a function, a field), or its content.

    Raises:
        ValueError: it has no such field, or an empty key.
    """
    if callable(key):
        value = key(value)
    elif key is not None:
        try:
            value = value[key]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"an item has no field {key!r}: {str(value)[:80]!r}") from error
    text = value if isinstance(value, str) else _canonical(value)
    if not text:
        raise ValueError("an item has an empty key")
    if len(text) <= min(_KEY_CHARS_MAX, NAME_CHARS_MAX):
        return text
    return f"{text[:_KEY_CHARS_MAX]}#{sha256(text.encode(errors='surrogatepass')).hexdigest()}"


class Keys(NamedTuple):
    """How the items of one source are keyed: `by` a function or field, under a `name`."""

    by: Any = None
    name: str = ""

    def of(self, value: Any) -> str:
        """Return the key of an item."""
        key = key_of(value, self.by)
        return f"{self.name}/{key}" if self.name else key


def size_of(source: Any) -> float | None:
    """Return how many there are, where the source knows."""
    return len(source) if hasattr(source, "__len__") else None


def _canonical(value: Any) -> str:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_as_text
    )


def _as_text(value: Any) -> str:
    """Return an object's text, if that says what is in it, and the same in another process."""
    text = str(value)
    if isinstance(value, set | frozenset) or _ADDRESS.search(text):
        raise ValueError(
            f"an item holds a {type(value).__name__}, which has no text of its own that another "
            "attempt would find again: say what its key is, with key="
        )
    return text


class Item:
    """One item that has no result yet. `value` is what the source gave."""

    __slots__ = ("is_recorded", "items", "key", "value")

    def __init__(self, key: str, value: Any, items: "Items") -> None:
        self.key = key
        self.value = value
        self.items = items
        self.is_recorded = False

    def step_name(self, name: str) -> str:
        """Return the name of a step inside of this item."""
        return f"{self.key}/{name}"

    def was_step_completed(self, name: str) -> bool:
        """Return whether a step inside of this item is completed."""
        return bool(self.items.ctx.was_step_completed(self.step_name(name)))


class SyncItem(Item):
    """An item in a plain function."""

    __slots__ = ()

    def step(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a step inside of this item, as `ctx.step` does.

        Durable: that it is done, and its result.
        """
        return self.items.ctx.step(self.step_name(name), function, *args, **kwargs)

    def record(self, status: str, result: Any = None, error: str | None = None) -> None:
        """Take note of how it came out, before the loop goes on.

        Durable: the result.
        """
        self.is_recorded = True
        self.items.ctx._record_item(self.key, status, result, error)
        self.items.ctx._safe_point()


class Tally:
    """How a run over items came out; `undone` ones wait for the next attempt."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.known = 0
        self.undone = 0
        self.last_error = ""
        self._lock = allocate_lock()  # items end in many threads

    def __repr__(self) -> str:
        """Return the counts, as `print` shows them."""
        told = [f"{status} {count}" for status, count in sorted(self.counts.items())]
        return ", ".join([*told, f"known before {self.known}"])

    def add(self, status: str) -> None:
        """Count one."""
        with self._lock:
            self.counts[status] = self.counts.get(status, 0) + 1

    def leave(self, error: str) -> None:
        """Count one that is left for a later attempt."""
        with self._lock:
            self.undone += 1
            self.last_error = error


class Outcome(NamedTuple):
    """What an item came to; `delay_s` asks for another try, `status` "" for a later attempt."""

    status: str
    result: Any = None
    error: str = ""
    delay_s: float = 0.0
    scope: str = ""
    is_limited: bool = False
    is_over: bool = False  # tried as often as the policy allows


def outcome_of(error: Exception, failures: int, retry: RetryPolicy) -> Outcome:
    """Return what an exception of an item's function means."""
    text = f"{type(error).__name__}: {error}"[:_TEXT_CHARS_MAX]
    match error:
        case SkipItem():
            return Outcome("skipped", error=str(error))
        case QuarantineItem() | StepInterrupted():  # a person looks before it runs again
            return Outcome("quarantined", error=str(error))
        case RateLimited():
            delay_s = error.retry_after_s or retry.delay_s(failures)
            return Outcome("", error=text, delay_s=delay_s, scope=error.scope, is_limited=True)
        case TransientError():
            is_over = failures >= (retry.max_failures or failures + 1)
            delay_s = max(error.retry_after_s, retry.delay_s(failures))
            return Outcome("", error=text, delay_s=delay_s, is_over=is_over)
        case PermanentError() | AssertionError():
            return Outcome("fail", error=text)
        case _:
            return Outcome("error", error=text)


class Items:
    """The items of a source that have no result yet; base of both forms."""

    def __init__(
        self,
        ctx: Any,
        source: Iterable[Any],
        keys: Keys,
        concurrency: int = 1,
        total: float | None = None,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}, expected at least 1")
        self.ctx = ctx
        self.concurrency = concurrency
        self.total = size_of(source) if total is None else total
        self.seen = 0
        self.tally = Tally()
        self._source = source
        self._keys = keys
        self._handed_out: set[str] = set()

    def _next_of(self, source: Iterator[Any], kind: type[Item]) -> Item | None:
        """Return the next item to do; None at the end of the source."""
        known = self.ctx._work.known.items
        for value in source:
            key = self._keys.of(value)
            self.seen += 1
            if key in known or key in self._handed_out:
                self.tally.known += 1
                continue
            self._handed_out.add(key)
            return kind(key, value, self)
        return None

    @staticmethod
    def _given(function: Callable[[Any], Any], *, gives_item: bool) -> Callable[[Item], Any]:
        return function if gives_item else lambda item: function(item.value)

    def _left(self) -> TransientError:
        error = TransientError(f"{self.tally.undone} items left: {self.tally.last_error}")
        error.is_of_sdk = True
        return error

    def _tell(self, in_flight: int = 0) -> None:
        self.ctx.set_progress(max(0, self.seen - in_flight), self.total)


class SyncItems(Items):
    """The items of a plain function: a `for` loop over them, or `run`."""

    ctx: "SyncResumableContext"

    def __iter__(self) -> Iterator[SyncItem]:
        """Yield what is to be done; an item is passed when the next one is asked for.

        Durable: the result of each, before the next.
        """
        source = iter(self._source)
        while (item := self._next_of(source, SyncItem)) is not None:  # Bound: the source
            assert isinstance(item, SyncItem)
            yield item
            if not item.is_recorded:
                item.record("pass")
            self._tell()

    def run(
        self,
        function: Callable[[Any], Any],
        retry: RetryPolicy = RETRY,
        *,
        gives_item: bool = False,
    ) -> Tally:
        """Call `function(value)` for each item, in up to `concurrency` threads.

        With `gives_item` it gets the item, whose `step` resumes inside of it. What it returns is
        the result. SkipItem, QuarantineItem, PermanentError choose the status;
        TransientError and RateLimited wait and try again; any other exception is an error of the
        item alone.

        Raises:
            TransientError: items are left that could not be done now.

        Durable: each result, before another item takes its place.
        """
        source = iter(self._source)
        function = self._given(function, gives_item=gives_item)
        try:
            if self.concurrency == 1:
                self._run_one_by_one(function, source, retry)
            else:
                self._run_many(function, source, retry)
        except Parked as parked:  # raised beside us: to park is the business of this thread
            self.ctx._wait(parked.until_s, parked.reason, parked.scope)
            self.tally.leave(parked.reason)
        except StopRequested:  # a wait beside us ended: the state is saved before we go
            self.ctx._safe_point()
            raise
        if self.tally.undone:
            raise self._left()
        return self.tally

    def _run_one_by_one(
        self, function: Callable[[Any], Any], source: Iterator[Any], retry: RetryPolicy
    ) -> None:
        while (item := self._next_of(source, SyncItem)) is not None:  # Bound: the source
            self._do(function, item, retry)
            self._after()

    def _run_many(
        self, function: Callable[[Any], Any], source: Iterator[Any], retry: RetryPolicy
    ) -> None:
        from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  (10 ms; few need it)

        flying: set[Future[None]] = set()
        with ThreadPoolExecutor(self.concurrency) as pool:
            while (item := self._next_of(source, SyncItem)) is not None:  # Bound: the source
                flying.add(pool.submit(self._do, function, item, retry))
                while len(flying) >= self.concurrency:  # Bound: the items in flight
                    flying = self._gathered(flying)
            while flying:  # Bound: the items in flight
                flying = self._gathered(flying)

    def _gathered(self, flying: "set[Future[None]]") -> "set[Future[None]]":
        from concurrent.futures import FIRST_COMPLETED, wait  # noqa: PLC0415  (as above)

        done, flying = wait(flying, return_when=FIRST_COMPLETED)
        for one in done:
            one.result()
        self._after(len(flying))
        return flying

    def _after(self, in_flight: int = 0) -> None:
        self._tell(in_flight)
        self.ctx._safe_point()

    def _do(self, function: Callable[[Any], Any], item: Item, retry: RetryPolicy) -> None:
        """Do one item; may run in a thread of its own."""
        failures = 0
        while True:  # Bound: the retry policy; a rate limit waits as long as it is told to
            outcome = self._call(function, item, failures + 1, retry)
            if outcome.status:
                break
            if outcome.is_limited:
                self.ctx._limited(outcome.scope, outcome.delay_s)
                continue
            failures += 1
            if outcome.is_over:
                self.tally.leave(outcome.error)
                return
            self.ctx._hold(outcome.delay_s)
        try:
            self.ctx._record_item(item.key, outcome.status, outcome.result, outcome.error)
        except (NotJson, CheckpointTooLarge) as unfit:  # nothing of it was recorded
            outcome = Outcome("error", error=str(unfit))
            self.ctx._record_item(item.key, outcome.status, None, outcome.error)
        self.tally.add(outcome.status)

    @staticmethod
    def _call(
        function: Callable[[Any], Any], item: Item, failures: int, retry: RetryPolicy
    ) -> Outcome:
        try:
            return Outcome("pass", function(item))
        except CorruptCheckpointError:  # of the task, not of the item
            raise
        except Exception as error:  # noqa: BLE001 - an item's failure is its own
            return outcome_of(error, failures, retry)
