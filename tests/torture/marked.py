"""Kill processes where it hurts most: just before or just after a system call of a chosen class.

    $ python -m tests.torture.marked 3.0 1 4711 "task before rename" "task after sync"
    {"pid": 4720, "how": "task after sync", "ticks": 99, "name": "python", "task": 7, ...}
    {"tried": ["task before rename"]}

For 3.0 s it holds every thread of process 4711 and, where a mark is of a `task` or a `batch`,
whoever is or comes below it. At each mark it kills the first that comes to the 1st such call, a few
in all; `after` is after a call that succeeded. `tried` are the marks that nobody came to, though
there was somebody of that kind and time was not cut short.

A process of its own: a thread beside busy ones waits milliseconds for its turn at each of a
thousand stops; and at its end, whatever that is, the kernel lets go of all whom it traced, and
they run on. Signals are passed on, and a stop by job control stays one.
Source: ptrace(2), "Attaching and detaching", "Stopped states", "PTRACE_EVENT stops", "Group-stop".
"""

import ctypes
import errno
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from tests.torture.stage import identity, role

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long
_SEIZE, _INTERRUPT, _LISTEN, _CONT, _SYSCALL = 0x4206, 0x4207, 0x4208, 7, 24
_GETEVENTMSG, _INFO = 0x4201, 0x420E
_SYSGOOD, _FORK, _VFORK, _CLONE, _EXEC = 1, 2, 4, 8, 16  # PTRACE_O_TRACE...
_EVENT_EXEC, _EVENT_STOP = 4, 128
_ENTRY = 1  # op of struct ptrace_syscall_info; what else stops there leaves a call
_WALL: Final = 0x40000000
_SYSCALL_STOP: Final = signal.SIGTRAP | 0x80
_JOB_STOPS: Final = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
_GONE: Final = frozenset({errno.ESRCH, errno.ECHILD, errno.EPERM})
_LOOKS: Final = 2  # that find no new thread
_KILLS_MAX: Final = {False: 1, True: 6}  # by whether there are always others

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
    "send": frozenset({44, 46, 307}),
}
_CLASS: Final = {number: call for call, numbers in CALLS.items() for number in numbers}
_ONCE: Final = frozenset({"exec", "exit"})
FOLLOWED: Final = frozenset({"task", "batch"})
"""Short lives: they are traced from their birth, as children of whoever forks them."""
IS_POSSIBLE: Final = os.uname().machine == "x86_64" and os.geteuid() == 0


class Tracer:
    """All threads of a process, and of those that it forks, on their way from call to call."""

    def __init__(self, marks: Iterable[str], nth: int) -> None:
        self._nth = nth
        self._aims = set(marks)
        self._is_following = any(mark.split()[0] in FOLLOWED for mark in self._aims)
        self._passed: set[int] = set()  # threads of which only the forks count
        self._call: dict[int, str] = {}  # by thread: which it is in
        self._met: Counter[str] = Counter()
        self._kinds: set[str] = set()  # of whom was seen
        self._has_steps = False  # nor does an idle one show what can be met

    def seize(self, pid: int) -> None:
        """Trace it and, where children count, all that are below it; who is gone is passed over."""
        self._take(pid, is_passed=self._is_following and role(identity(pid)) not in FOLLOWED)
        if self._is_following:
            for child in below(pid):  # who is forked from here on comes by itself
                self._take(child)

    def _take(self, pid: int, *, is_passed: bool = False) -> None:
        options = _SYSGOOD | _CLONE | _EXEC | (_FORK | _VFORK if self._is_following else 0)
        if not is_passed:
            self._kinds.add(self._kind(pid))
        for tid in _threads(pid):
            try:
                _ptrace(_SEIZE, tid, options)
                if is_passed:
                    self._passed.add(tid)
                else:
                    _ptrace(_INTERRUPT, tid)
            except OSError as error:  # it ended, or came to us by itself, or another tracer has it
                if error.errno not in _GONE:
                    raise

    def run(self) -> Iterator[dict[str, Any]]:
        """Kill at marks and yield who that was, until nobody is left or it is enough.

        Raises TimeoutError by the alarm.
        """
        killed = 0
        while self._aims and killed < _KILLS_MAX[self._is_following]:  # Bound: the alarm
            try:
                tid, status = os.waitpid(-1, _WALL)
            except ChildProcessError:
                break
            if not os.WIFSTOPPED(status):
                self._call.pop(tid, None)
            elif mark := self._step(tid, status):
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # what is done is told
                self._aims.discard(mark)
                if victim := _killed(tid, mark):
                    killed += 1
                    yield victim
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        self._aims.clear()  # what is left was not tried for as long as it should

    def tried(self) -> list[str]:
        """Return the marks to which nobody came of those who could have."""
        kinds = self._kinds if self._has_steps else set[str]()
        return sorted(mark for mark in self._aims if mark.split()[0] in kinds)

    def _step(self, tid: int, status: int) -> str:
        """Let a stopped thread go on, or leave it where it is and return its mark."""
        stop, event = os.WSTOPSIG(status), status >> 16
        try:
            if stop == _SYSCALL_STOP and (mark := self._mark(tid)):
                return mark
            if event == _EVENT_EXEC:  # whichever thread calls it is the leading one from here on
                former = ctypes.c_ulong()
                _ptrace(_GETEVENTMSG, tid, ctypes.addressof(former))
                self._call[tid] = self._call.pop(former.value, "")
                self._kinds.add(self._kind(tid))
            if event == _EVENT_STOP and stop in _JOB_STOPS:
                _ptrace(_LISTEN, tid)
                return ""
            passed_on = 0 if event or stop == _SYSCALL_STOP else stop
            _ptrace(_CONT if tid in self._passed else _SYSCALL, tid, passed_on)
        except ProcessLookupError:  # somebody killed it while it was stopped
            pass
        return ""

    def _mark(self, tid: int) -> str:
        """Return the mark at which it stands, "" at none that is wanted."""
        info = (ctypes.c_uint64 * 11)()
        _ptrace(_INFO, tid, ctypes.addressof(info), ctypes.sizeof(info))
        if info[0] & 0xFF == _ENTRY:
            self._call[tid] = call = _CLASS.get(int(info[3]), "")
            when = "before"
        else:
            call, when = self._call.pop(tid, ""), "after"
            if info[4] & 0xFF:  # is_error
                return ""
            self._has_steps = True
        end = f"{when} {call}"
        if not any(aim.endswith(end) for aim in self._aims):
            return ""
        mark = f"{self._kind(tid)} {end}"
        self._met[mark] += 1
        is_due = self._met[mark] >= (1 if call in _ONCE else self._nth)
        return mark if is_due and mark in self._aims else ""

    def _kind(self, tid: int) -> str:
        """Return what it counts as; a child of a supervisor is the task, also before its exec."""
        found = role(identity(tid))
        return "task" if self._is_following and found != "batch" else found


def _threads(pid: int) -> Iterable[int]:
    """Yield every thread once, also those that begin while the first ones are taken."""
    known: set[int] = set()
    looks = 0
    while looks < _LOOKS:  # Bound: a thread that is taken hands over those that it begins
        try:
            new = {int(tid) for tid in os.listdir(f"/proc/{pid}/task")} - known
        except FileNotFoundError:
            return
        looks = 0 if new else looks + 1
        known |= new
        yield from sorted(new)


def below(pid: int) -> Iterable[int]:
    """Yield the children of a process, and theirs."""
    try:
        for tid in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{tid}/children") as children:
                for child in children.read().split():
                    yield int(child)
                    yield from below(int(child))
    except OSError:
        return


def _killed(tid: int, mark: str) -> dict[str, Any]:
    """Kill the process of a thread that is stopped; return who that was, {}: somebody was first."""
    try:
        with open(f"/proc/{tid}/status") as file:
            (pid,) = (int(line.split()[1]) for line in file if line.startswith("Tgid:"))
        who = identity(pid)
        os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {"pid": pid, **who, "how": mark, "at_ns": time.time_ns()}


def _ptrace(request: int, tid: int, data: int = 0, address: int = 0) -> None:
    if _libc.ptrace(request, tid, address, data) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _too_late(*_: object) -> None:
    raise TimeoutError


def main(argv: list[str]) -> int:
    """Do as the command line says."""
    within_s, nth, pid, *marks = argv
    tracer = Tracer(marks, int(nth))
    signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, float(within_s))
    try:
        tracer.seize(int(pid))
        for victim in tracer.run():
            print(json.dumps(victim), flush=True)
    except TimeoutError:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    print(json.dumps({"tried": tracer.tried()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
