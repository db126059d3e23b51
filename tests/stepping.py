"""Stop a real process before each of its system calls: every crash point there is, without hooks.

    with Stepped(pid) as process:
        process.run_to(17)      # it is about to make its 18th system call from here
        process.kill()

Source: ptrace(2). The traced process must not be told; nothing in it changes but its speed.
"""

import ctypes
import errno
import os
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Self

import pytest

from tests.waiting import until

_SEIZE, _INTERRUPT, _SYSCALL, _DETACH = 0x4206, 0x4207, 24, 17
_TRACESYSGOOD = 1
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_WALL = 0x40000000
_ENDED, _THROUGH = -1, -2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    if _libc.ptrace(request, pid, None, data) < 0:
        error = ctypes.get_errno()
        if error in {errno.EPERM, errno.ENOSYS}:
            pytest.skip("needs ptrace of a descendant, which this system does not allow")
        raise OSError(error, os.strerror(error))


class Stepped:
    """One traced process, stopped where it was when tracing began."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.is_alive = True
        self._is_stopped = True
        self._is_inside = False  # of a system call
        _ptrace(_SEIZE, pid, _TRACESYSGOOD)
        _ptrace(_INTERRUPT, pid)
        until(self._look)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.is_alive:
            return
        if not self._is_stopped:
            _ptrace(_INTERRUPT, self.pid)
            until(self._look)
        if self.is_alive:
            _ptrace(_DETACH, self.pid)

    def run_to(self, calls: int, is_through: Callable[[], bool]) -> bool:
        """Let it make so many system calls and stop before the next.

        False where it ended, or `is_through` while it waits for something in a call.
        """
        while self.is_alive and calls >= 0:
            _ptrace(_SYSCALL, self.pid)
            self._is_stopped = False
            stop = until(lambda: self._look() or (is_through() and _THROUGH), every_s=0)
            if stop == _THROUGH:
                return False
            if stop == _SYSCALL_STOP:
                self._is_inside = not self._is_inside
                calls -= self._is_inside
        return self.is_alive

    def kill(self) -> None:
        """SIGKILL it where it stands; return when it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        while self.is_alive:
            until(self._look, every_s=0)

    def _look(self) -> int:
        """Return the signal of its next stop, _ENDED at its end, 0 while it runs."""
        pid, status = os.waitpid(self.pid, _WALL | os.WNOHANG)
        if pid == 0:
            return 0
        self._is_stopped = os.WIFSTOPPED(status)
        self.is_alive = self._is_stopped
        return os.WSTOPSIG(status) if self._is_stopped else _ENDED
