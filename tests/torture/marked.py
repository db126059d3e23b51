"""Kill a process where it hurts most: about to make the n-th call of a chosen kind.

    python -m tests.torture.marked PID CALL NTH SECONDS     prints whom it killed; exit 1: nobody

With `child-exec` instead of `exec` it is a child of the process that is killed: the next one that
comes to that call.

A process of its own: a thread beside busy ones waits milliseconds for its turn at each of a
thousand stops. Signals pass through to a process that lives on, and a stop by job control stays
one. Source: ptrace(2), "Stopped states", "PTRACE_EVENT stops", "Group-stop".
"""

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Mapping
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long
_SEIZE, _INTERRUPT, _SYSCALL, _DETACH, _INFO = 0x4206, 0x4207, 24, 17, 0x420E
_CONT, _SETOPTIONS, _GETEVENTMSG, _EVENT_STOP = 7, 0x4200, 0x4201, 128
_TRACESYSGOOD = 1
_TRACEFORKS: Final = _TRACESYSGOOD | 2 | 4 | 8  # fork, vfork, clone: children are traced, too
_WALL: Final = 0x40000000
_SYSCALL_STOP: Final = signal.SIGTRAP | 0x80
_JOB_STOPS: Final = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
_ENDED: Final = -1
_DETACH_S: Final = 1.0

CALLS: Final[Mapping[str, frozenset[int]]] = {  # numbers of x86-64
    "sync": frozenset({74, 75, 277, 306}),  # fsync fdatasync sync_file_range syncfs
    "rename": frozenset({82, 264, 316}),
    "link": frozenset({86, 265}),
    "unlink": frozenset({84, 87, 263}),
    "write": frozenset({1, 18, 20, 296, 328}),
    "open": frozenset({2, 257, 437}),
    "fork": frozenset({56, 57, 58, 435}),
    "exec": frozenset({59, 322}),
    "exit": frozenset({60, 231}),
    "lock": frozenset({72, 73}),
    "send": frozenset({44, 46}),
}
CHILD: Final = "child-"
IS_POSSIBLE: Final = os.uname().machine == "x86_64" and os.geteuid() == 0


def kill_before(pid: int, call: str, nth: int, within_s: float) -> int:
    """Kill the process before its nth such call from here on; return it, 0: that never came."""
    signal.signal(signal.SIGALRM, _too_late)
    _ptrace(_SEIZE, pid, _TRACESYSGOOD)
    signal.setitimer(signal.ITIMER_REAL, within_s)
    try:
        return pid if _run_to(pid, CALLS[call], nth) else 0
    except TimeoutError:
        _let_go(pid)
        return 0


def _too_late(*_: object) -> None:
    raise TimeoutError


def kill_child_before(pid: int, call: str, nth: int, within_s: float) -> int:
    """Kill the first child that it forks and that comes to its nth such call; return the child."""
    signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, within_s)
    traced = pid
    try:
        while True:  # Bound: the alarm, or the end of the process
            _ptrace(_SEIZE, pid, _TRACEFORKS)
            traced = _child_of(pid)
            if not traced or _run_to(traced, CALLS[call], nth, is_new=True):
                return traced
            traced = pid
    except TimeoutError:
        _let_go(traced)
        return 0


def _child_of(pid: int) -> int:
    """Let it run until it forks, and let go of it; return the child, which waits; 0: it ended."""
    _ptrace(_INTERRUPT, pid)
    while (status := _status(pid)) is not None:  # Bound: the alarm
        stop = os.WSTOPSIG(status)
        if status >> 16:
            if status >> 16 == _EVENT_STOP:
                _ptrace(_CONT, pid)
                continue
            child = ctypes.c_ulong()
            _ptrace(_GETEVENTMSG, pid, ctypes.addressof(child))
            _ptrace(_DETACH, pid)
            return child.value
        _ptrace(_CONT, pid, stop)
    return 0


def _run_to(pid: int, numbers: frozenset[int], nth: int, *, is_new: bool = False) -> bool:
    """Step from call to call; raises TimeoutError by the alarm, while the process runs."""
    if not is_new:  # a new child is born stopped
        _ptrace(_INTERRUPT, pid)
    stop, is_inside = _stop(pid), False
    if is_new and stop != _ENDED:  # what it forks itself would wait for us for ever
        _ptrace(_SETOPTIONS, pid, _TRACESYSGOOD)
    while stop != _ENDED:  # Bound: the alarm
        if stop == _SYSCALL_STOP:
            is_inside = not is_inside
            nth -= is_inside and _number(pid) in numbers
            if nth == 0:
                os.kill(pid, signal.SIGKILL)
                return _stop(pid) == _ENDED
        if stop in _JOB_STOPS:
            _ptrace(_DETACH, pid, stop)
            return False
        _ptrace(_SYSCALL, pid, 0 if stop in {_SYSCALL_STOP, signal.SIGTRAP} else stop)
        stop = _stop(pid)
    return False


def _let_go(pid: int) -> None:
    """Stop it once more and leave it to itself; at our end the kernel does the same."""
    signal.setitimer(signal.ITIMER_REAL, _DETACH_S)
    try:
        _ptrace(_INTERRUPT, pid)
        stop = _stop(pid)
        if stop != _ENDED:
            _ptrace(_DETACH, pid, 0 if stop in {_SYSCALL_STOP, signal.SIGTRAP} else stop)
    except TimeoutError:  # it is frozen: no stop before it thaws
        return


def _stop(pid: int) -> int:
    """Wait for its next stop; return the signal of it."""
    status = _status(pid)
    return _ENDED if status is None else os.WSTOPSIG(status)


def _status(pid: int) -> int | None:
    """Wait for its next stop; return the status of it, None at its end."""
    _, status = os.waitpid(pid, _WALL)
    return status if os.WIFSTOPPED(status) else None


def _number(pid: int) -> int:
    """Return which call it is about to make. Source: struct ptrace_syscall_info."""
    info = (ctypes.c_uint64 * 11)()
    _ptrace(_INFO, pid, ctypes.addressof(info), ctypes.sizeof(info))
    return int(info[3])


def _ptrace(request: int, pid: int, data: int = 0, address: int = 0) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def main(argv: list[str]) -> int:
    """Do as the command line says."""
    pid, call, nth, within_s = argv
    kill = kill_child_before if call.startswith(CHILD) else kill_before
    try:
        victim = kill(int(pid), call.removeprefix(CHILD), int(nth), float(within_s))
    except OSError as error:
        if error.errno not in {errno.ESRCH, errno.ECHILD, errno.EPERM}:
            raise
        return 1  # it ended meanwhile, or somebody else traces it
    print(victim)
    return 0 if victim else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
