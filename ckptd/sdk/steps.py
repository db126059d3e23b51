"""Steps by name: remembered or run, once in an attempt; retries, time limits, idempotency keys.

What both contexts share; nothing here waits or writes. Read next: `context.py`.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple, TypeVar

from ckptd.sdk.declare import RetryPolicy
from ckptd.sdk.outcomes import (
    DuplicateStepError,
    PermanentError,
    SdkError,
    StepInterrupted,
    StepTimeout,
    TransientError,
)
from ckptd.sdk.values import decode, encode
from ckptd.sdk.work import Work
from ckptd.storage import facts
from ckptd.storage.journal import Fact

T = TypeVar("T")
TRIES_MAX: Final = 1_000  # of a step whose policy says "as long as it takes"
# An exception must not strike there: the facts of other threads are under way, too.
_UNDIVIDED: Final = frozenset(
    {Work.record.__code__, Work.write.__code__, Work.write_behind.__code__}
)
_AGAIN_S: Final = 0.001
_ONE_SECRET: Final = threading.Lock()


class Memo(NamedTuple):
    """The result of a step that was completed before."""

    value: Any


class Steps:
    """Which steps this attempt came by, and the facts that they leave."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._used: set[str] = set()

    def memo(self, name: str, version: int) -> Memo | None:
        """Return what a step came to, or None if it is to be run.

        Raises:
            DuplicateStepError: this attempt came by a step of that name already.
        """
        if name in self._used:
            raise DuplicateStepError(name)
        self._used.add(name)
        done = self._work.known.steps.get(name)
        if done is None or done.get("version", 1) != version:
            return None
        return Memo(decode(done.get("result")))

    def begin(
        self, name: str, version: int, semantics: str, retry: RetryPolicy | None
    ) -> list[Fact]:
        """Return what must be durable before the step runs.

        Raises:
            StepInterrupted: it began before and must not run twice.
        """
        if semantics not in {"at_least_once", "at_most_once"}:
            raise ValueError(f"semantics {semantics!r}: expected at_least_once or at_most_once")
        if semantics == "at_least_once":
            return []
        if retry is not None:
            raise ValueError(f"step {name!r}: at_most_once and a retry contradict each other")
        if name in self._work.known.started:
            raise StepInterrupted(name)
        return [facts.step_start(name, version)]

    def end(self, name: str, result: Any, version: int, invalidates: Iterable[str]) -> list[Fact]:
        """Return what must be durable once the step has run."""
        self._used.add(name)
        stored = encode(result, f"the result of step {name!r}")
        stale = [one for one in invalidates if one in self._work.known.steps]
        return [*map(facts.step_reset, stale), facts.step_done(name, stored, version)]


def delay_s(error: Exception, retry: RetryPolicy | None, failures: int) -> float | None:
    """Return the pause before a step is tried again, or None if it is not."""
    if retry is None or isinstance(error, PermanentError | SdkError):
        return None
    retry = retry.checked()
    if failures >= (retry.max_failures or TRIES_MAX):
        return None
    asked_s = error.retry_after_s if isinstance(error, TransientError) else 0.0
    return max(asked_s, retry.delay_s(failures))


def timed(
    name: str,
    function: Callable[..., T],
    timeout_s: float | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> T:
    """Call a function, and raise StepTimeout inside of it once its time is over."""
    if timeout_s is None:
        return function(*args, **kwargs)
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(f"step {name!r}: a timeout needs the main thread (a signal carries it)")

    def over(number: int, frame: FrameType | None) -> None:
        del number
        if _is_within(frame, _UNDIVIDED):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)  # it ends soon, then it is time
            return
        raise StepTimeout(f"step {name!r} took longer than {timeout_s:g} s")

    before = signal.signal(signal.SIGALRM, over)
    began_s = time.monotonic()
    outer_s = signal.setitimer(signal.ITIMER_REAL, timeout_s)[0]
    try:
        return function(*args, **kwargs)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer_s:  # somebody else's limit, of a step around this one or of a test, goes on
            left_s = outer_s - (time.monotonic() - began_s)
            signal.setitimer(signal.ITIMER_REAL, max(left_s, _AGAIN_S))


def _is_within(frame: FrameType | None, codes: frozenset[CodeType]) -> bool:
    while frame is not None:  # Bound: the stack
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def job_key(name: str) -> str:
    """Return the key under which the id of an external job is stored."""
    return f"ckptd:job:{name}"


def idempotency_key(work: Work, step: str, item: str | None) -> str:
    """Return an HMAC of step and item under the task's own secret, the same in every attempt.

    Durable: the secret, made by the first call.
    """
    import hmac  # noqa: PLC0415  (with it comes OpenSSL; few tasks ask)

    with _ONE_SECRET:  # two threads that ask first must not make two
        secret = work.known.values.get(facts.SECRET)
        if secret is None:
            import secrets  # noqa: PLC0415

            work.record(facts.set_value(facts.SECRET, secrets.token_hex(16)))
            secret = work.agreed(facts.SECRET)
    text = f"{work.around.task}\0{step}\0{'' if item is None else item}"
    return hmac.new(str(secret).encode(), text.encode(), "sha256").hexdigest()[:32]
