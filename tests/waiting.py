"""Wait for a real condition with a deadline: the only clock that tests look at."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_pause = threading.Event()  # never set: `wait` on it is a bounded pause between two looks


def until(condition: Callable[[], T], timeout_s: float = 10.0, every_s: float = 0.01) -> T:
    """Return the first truthy value of `condition`; raise TimeoutError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:  # Bound: the deadline
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            what = getattr(condition, "__qualname__", repr(condition))
            raise TimeoutError(f"not within {timeout_s} s: {what}; last value {value!r}")
        _pause.wait(every_s)


def let_pass(seconds: float) -> None:
    """Let a chosen moment pass, for faults that strike at random times, not for hoping."""
    _pause.wait(seconds)
