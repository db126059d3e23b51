"""The sole source of time and randomness of the daemon; read once a turn, then passed as a value.

Invariant: `at_ns` is wall clock, `mono_ns` monotonic; nothing subtracts one from the other.
Read next: `loop.py`, which reads it; `ckptd/core/policy.py` for `Now`.
"""

import os
import random
import time

from ckptd.core.policy import Now

BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Clock:
    """Reads the machine's clocks. Tests of the daemon use one that they turn by hand."""

    def __init__(self) -> None:
        self._random = random.Random(os.urandom(32))  # noqa: S311  # jitter, not secrets

    def now(self) -> Now:
        """Return this moment and fresh randomness for its jitter."""
        return Now(time.time_ns(), self._random.getrandbits(64))

    def mono_ns(self) -> int:
        """Return the monotonic clock, for durations inside this process."""
        return time.monotonic_ns()


def time_of_day() -> str:
    """Return local `HH:MM:SS`, for lines that people read on a terminal."""
    return time.strftime("%H:%M:%S")


def boot_id() -> str:
    """Return the id of this boot of the kernel; another one means that no process is left."""
    with open(BOOT_ID, encoding="ascii") as file:
        return file.read().strip()
