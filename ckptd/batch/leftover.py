"""Processes of items whose runner is dead, or that left their group: found by their environment.

A runner that is killed takes nobody along. What it started lives on, and must be gone before the
same items run again. Every process of an item has CKPTD_BATCH_RUN=<directory> in its environment,
and so has what it started, unless it was given another.
Invariant: only processes of our own user are looked at, and they are killed by pidfd, so a pid
that was reused meanwhile is never hit. Read next: `runner.py`.
"""

import contextlib
import os
import select
import signal
import time
from typing import Final

from ckptd.batch.itemdir import RUN_VARIABLE

_GONE_S_MAX: Final = 10.0
_ENVIRON_BYTES_MAX: Final = 4 << 20
_ROUNDS_MAX: Final = 20


def end_all(path: str) -> int:
    """Kill every process that belongs to a run of this batch; return how many there were.

    Raises:
        TimeoutError: one does not die: it is stuck in the kernel.
    """
    killed = 0
    for _ in range(_ROUNDS_MAX):  # Bound: each round kills what the one before left forking
        found = _found(path)
        if not found:
            return killed
        killed += len(found)
        try:
            for fd in found:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
            _wait(found)
        finally:
            for fd in found:
                os.close(fd)
    raise TimeoutError(f"processes of {path} keep starting others faster than they can be killed")


def _found(path: str) -> list[int]:
    """Return a pidfd for each of them."""
    wanted = os.fsencode(f"{RUN_VARIABLE}={path}")
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid() and _is_of(name, wanted):
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(int(name))
                if _is_of(name, wanted):  # still the same one
                    found.append(fd)
                else:
                    os.close(fd)
    return found


def _is_of(pid: str, wanted: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return wanted in file.read(_ENVIRON_BYTES_MAX).split(b"\0")
    except OSError:
        return False  # gone, or somebody else's


def _wait(fds: list[int]) -> None:
    until_s = time.monotonic() + _GONE_S_MAX
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    left = set(fds)
    while left:  # Bound: _GONE_S_MAX
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"{len(left)} processes of an earlier run do not die")
        for fd, _ in poll.poll(left_s * 1000):
            poll.unregister(fd)
            left.discard(fd)
