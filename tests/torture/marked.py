"""Kill a process where it hurts most: about to make the n-th call of a chosen kind.

Unlike `Stepped` alone, signals pass through to a process that lives on, and a stop by job control
stays one. Source: ptrace(2), "Stopped states", "PTRACE_EVENT stops", "Group-stop".
"""

import ctypes
import os
import signal
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Final

from tests.stepping import Stepped, _libc, _ptrace
from tests.waiting import let_pass, until

_SYSCALL, _DETACH, _INTERRUPT, _GET_SYSCALL_INFO = 24, 17, 0x4207, 0x420E
_STOPS: Final = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
_SYSCALL_STOP: Final = signal.SIGTRAP | 0x80

CALLS: Final[Mapping[str, frozenset[int]]] = {  # numbers of x86-64
    "sync": frozenset({74, 75, 306, 277}),  # fsync fdatasync syncfs sync_file_range
    "rename": frozenset({82, 264, 316}),
    "link": frozenset({86, 265}),
    "unlink": frozenset({87, 263, 84}),
    "write": frozenset({1, 18, 20, 296, 328}),
    "open": frozenset({257, 2, 437}),
    "fork": frozenset({56, 57, 58, 435}),
    "exec": frozenset({59, 322}),
    "exit": frozenset({60, 231}),
    "lock": frozenset({72, 73}),
    "send": frozenset({44, 46}),
}
IS_KNOWN: Final = os.uname().machine == "x86_64"


class Marked(Stepped):
    """A traced process that can be stopped before a call of a kind."""

    _last = 0  # what it was stopped by

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.is_alive and not self._is_stopped:
            _ptrace(_INTERRUPT, self.pid)
            self._last = until(self._look)
        if self.is_alive:
            is_signal = self._last not in {0, signal.SIGTRAP, _SYSCALL_STOP}
            _ptrace(_DETACH, self.pid, self._last if is_signal else 0)

    def run_to_call(self, kind: str, nth: int, within_s: float) -> bool:
        """Stop it before its nth call of the kind from here on; False where that never came."""
        numbers = CALLS[kind] if IS_KNOWN else frozenset()
        deadline = time.monotonic() + within_s
        passed = 0
        while passed < nth and self._on(deadline):  # Bound: the deadline
            if self._is_inside and (not numbers or self._number() in numbers):
                passed += 1
        return passed == nth and self.is_alive

    def _on(self, deadline: float) -> bool:
        """Let it run to its next stop at a call; False at its end or at the deadline."""
        passed_on = 0
        while self.is_alive:  # Bound: the deadline
            _ptrace(_SYSCALL, self.pid, passed_on)
            self._is_stopped = False
            stop = self._last = self._stop_by(deadline)
            if stop == _SYSCALL_STOP:
                self._is_inside = not self._is_inside
                return True
            if stop <= 0 or stop in _STOPS:
                return False
            passed_on = 0 if stop == signal.SIGTRAP else stop
        return False

    def _stop_by(self, deadline: float) -> int:
        while True:  # Bound: the deadline
            stop = self._look()
            if stop or time.monotonic() > deadline:
                return stop
            let_pass(0.0002)

    def _number(self) -> int:
        """Return which call it is about to make. Source: struct ptrace_syscall_info."""
        info = (ctypes.c_uint64 * 11)()
        size = ctypes.sizeof(info)
        _libc.ptrace(_GET_SYSCALL_INFO, self.pid, size, ctypes.addressof(info))
        return int(info[3])
