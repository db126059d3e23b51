"""How a task or an item can come out other than by returning; what an author raises or catches.

    Exception                          raised by   means
    ├─ TransientError(retry_after=)    author      not now; try again later, no failure is counted
    │  └─ RateLimited(.., scope=)      author      the same for all that share the scope
    ├─ PermanentError                  author      will not get better; do not try again
    ├─ SkipItem, QuarantineItem        author      of an item: leave it out; isolate it
    └─ SdkError                        SDK         not kept to the contract, or what is stored
       ├─ StepInterrupted              an at-most-once step began, and nobody knows whether it ended
       ├─ DuplicateStepError           two steps, or loops, of one attempt have the same name
       ├─ StepTimeout                  a step took longer than its timeout
       ├─ NotJson                      a value that cannot be stored
       ├─ CheckpointTooLarge           a state or value over its bound; save a file instead
       ├─ StateVersionError            saved by a version that cannot be read; blocks the task
       └─ CorruptCheckpointError       what is stored does not check; blocks the task
    BaseException                      so that `except Exception` in a task never swallows them
    └─ StopRequested(reason)           a safe point was reached after somebody asked to stop
       ├─ Parked(until)                waits without a process; started again when due
       └─ LeaseLost                    a newer attempt runs; this one touches nothing more

Stdlib only, and nothing imported: every process of a task pays for this file.
"""

from typing import Final

OK: Final = 0
FAILED: Final = 1
BAD_DATA: Final = 65
TRY_AGAIN: Final = 75
INTERRUPTED: Final = 130


class TransientError(Exception):
    """Not now. `retry_after` is in seconds, or what a Retry-After header says in either form.

    0, or a header that is neither, leaves the delay to the daemon.
    """

    def __init__(self, text: str = "", *, retry_after: float | str = 0.0) -> None:
        super().__init__(text or "try again later")
        self.is_of_sdk = False  # raised by the SDK: it says nothing of what a function has done
        self.retry_after_s = _seconds(retry_after)


class RateLimited(TransientError):
    """The other side wants fewer requests; `scope` names who else must wait."""

    def __init__(self, text: str = "", *, retry_after: float | str = 0.0, scope: str = "") -> None:
        super().__init__(text or "rate limited", retry_after=retry_after)
        self.scope = scope


def _seconds(retry_after: float | str) -> float:
    if not isinstance(retry_after, str):
        return float(retry_after)
    import time  # noqa: PLC0415  (only where a header is handed on as it came)

    from ckptd.sdk.rate import parse_retry_after  # noqa: PLC0415

    try:
        return parse_retry_after(retry_after, time.time())
    except ValueError:  # the other side's nonsense must not hide that it wants us to wait
        return 0.0


class PermanentError(Exception):
    """Will not get better by trying again."""


class SkipItem(Exception):
    """This item is left out; that is no error."""


class QuarantineItem(Exception):
    """This item is poison: nobody tries it again without being told to."""


class SdkError(Exception):
    """Base of what the SDK itself raises."""


class StepInterrupted(SdkError):
    """An at-most-once step was begun and not completed: look before it is run again."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"step {name!r} was begun by an earlier attempt and not completed; it must not run "
            f"twice: find out what it did, then complete_step({name!r}, result) or start over"
        )
        self.name = name


class DuplicateStepError(SdkError):
    """Names are what steps are remembered by, so each may run once in an attempt."""

    def __init__(self, name: str, what: str = "step") -> None:
        super().__init__(f"a {what} named {name!r} already ran in this attempt; give each its own")
        self.name = name


class StepTimeout(SdkError):
    """A step took longer than it may."""


class NotJson(SdkError, TypeError):
    """A value is neither JSON nor bytes, so it would not come back as it was."""


class CheckpointTooLarge(SdkError):
    """A state, result or value is over its bound; large things belong into files."""


class StateVersionError(SdkError):
    """The saved state has a version that this code has no way to read."""


class CorruptCheckpointError(SdkError):
    """What is stored does not check, and nothing older that does is left."""


class StopRequested(BaseException):
    """Leave now; everything durable is saved. Let it pass, or clean up and raise it again."""

    def __init__(self, reason: str, text: str = "") -> None:
        super().__init__(text or f"asked to stop: {reason}")
        self.reason = reason


class Parked(StopRequested):
    """The task waits until `until_s` (Unix seconds) without a process."""

    def __init__(self, until_s: float, why: str, scope: str = "") -> None:
        super().__init__(why, f"parked: {why}")
        self.until_s = until_s
        self.scope = scope


class LeaseLost(StopRequested):
    """A newer attempt of the task exists; this one is over."""

    def __init__(self, text: str) -> None:
        super().__init__("lease_lost", text)


def exit_code_of(error: BaseException) -> int:
    """Return the exit code that tells the daemon how to go on; see docs/CHECKPOINTS.md."""
    if isinstance(error, StopRequested | TransientError):
        return TRY_AGAIN
    if isinstance(error, PermanentError | SdkError):
        return BAD_DATA
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
