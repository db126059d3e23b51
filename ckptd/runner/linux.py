"""The few calls of Linux that Python 3.11 has no name for: prctl, timerfd, inotify; bare signals.

Loaded by the supervisors too: stdlib only. Read next: `identity.py`.
"""

import ctypes
import fcntl
import os
import sys

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
CLOCK_MONOTONIC = 1
CLOEXEC_NONBLOCK = os.O_CLOEXEC | os.O_NONBLOCK
_EVENT_BYTES_PER_READ = 65_536
IN_MODIFY = 0x2
IN_CLOSE_WRITE = 0x8
IN_CREATE = 0x100
IN_MOVED_TO = 0x80
IN_ONLYDIR = 0x1000000
IN_DONT_FOLLOW = 0x2000000
NO_SIGNALS = bytes(128)
_SIG_DFL, _SIG_IGN, _SIGCHLD, _SIG_SETMASK, _SIGNALS, _MASK_BYTES = 0, 1, 17, 2, 65, 128

_ENOMEM, _ENFILE, _EMFILE = 12, 23, 24
_GET_FLAGS, _SET_FLAGS, _SYNC_FLAG = 0x80086601, 0x40086602, 0x8  # Source: linux/fs.h
_KEEP_SIZE, _ENOSYS, _EOPNOTSUPP = 1, 38, 95  # Source: fallocate(2)
_SYS_CLONE3, _CLONE_INTO_CGROUP = 435, 0x200000000

_libc = ctypes.CDLL(None, use_errno=True)

# For what is called between fork and exec, where every page touched is copied: without errno and
# without letting go of the interpreter's lock a call touches 10 pages instead of 80 (200 us).
_bare = ctypes.PyDLL(None)
_bare.syscall.restype = ctypes.c_long
_bare.execve.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
_syscall, _prctl, _execve, _sigprocmask = (
    _bare.syscall, _bare.prctl, _bare.execve, _bare.sigprocmask
)  # fmt: skip
_errno_location = _bare["__errno_location"]
_errno_location.restype = ctypes.POINTER(ctypes.c_int)


class _CloneArgs(ctypes.Structure):
    """Source: clone3(2)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size",
            "tls", "set_tid", "set_tid_size", "cgroup",
        )
    )  # fmt: skip


class _TimerSpec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


def _checked(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def is_shortage(error: OSError) -> bool:
    """Return whether a call failed for want of descriptors or memory, not for what it asked."""
    return error.errno in {_ENOMEM, _ENFILE, _EMFILE}


class CgroupFork:
    """A fork whose child is born inside a v2 control group.

    Moving a process there afterwards waits for every processor to pass through the scheduler
    (percpu rwsem, RCU): 5 ms on an idle machine, against nothing. Python's own after-fork work is
    passed by: there is one thread, nothing is locked, and the child does little before its exec.
    """

    __slots__ = ("_args", "_size")

    def __init__(self, group: int) -> None:
        self._args = _CloneArgs(flags=_CLONE_INTO_CGROUP, exit_signal=_SIGCHLD, cgroup=group)
        self._size = ctypes.sizeof(_CloneArgs)

    def __call__(self) -> int:
        """Return the child's pid, 0 in the child, -1 where the system has no such fork for us."""
        return int(_syscall(_SYS_CLONE3, ctypes.byref(self._args), self._size))


def strings(joined: bytes) -> "Strings":
    """Return an array as execve takes it of NUL-separated strings."""
    words = joined.split(b"\0")
    return (ctypes.c_char_p * (len(words) + 1))(*words, None)


def execute(program: bytes, argv: "Strings", env: "Strings") -> int:
    """Become another program; return errno where that failed. Allocates next to nothing.

    After a fork every page that is written to is copied first; `os.execve` would build its
    arrays from dictionaries there, this takes what was built before the fork.
    """
    _execve(program, argv, env)
    return int(_errno_location()[0])


def die_with_parent() -> None:
    """Have the kernel SIGKILL this process when its parent dies; undone by a change of uid."""
    _prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies (subreaper)."""
    _checked(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def name_process(name: bytes) -> None:
    """Set what `ps` and `top` show, at most 15 bytes."""
    _libc.prctl(PR_SET_NAME, name, 0, 0, 0)


def hush_signals() -> None:
    """Give every signal its default effect, and block them all; SIGKILL and SIGSTOP remain.

    Without `signal`, whose enums would be in the memory of each fork.
    """
    for number in range(1, _SIGNALS):
        _libc.signal(number, _SIG_DFL)
    set_mask(b"\xff" * _MASK_BYTES)


def set_mask(mask: bytes) -> None:
    """Block exactly the signals in `mask`, a sigset_t: all zero blocks none."""
    _sigprocmask(_SIG_SETMASK, mask, None)


def leave_children_to_kernel(*, is_so: bool) -> None:
    """Have the kernel reap children (SIGCHLD ignored), or keep them for `wait`."""
    _libc.signal(_SIGCHLD, _SIG_IGN if is_so else _SIG_DFL)


def timer() -> int:
    """Return a descriptor that is readable once its time has come."""
    return _checked(_libc.timerfd_create(CLOCK_MONOTONIC, CLOEXEC_NONBLOCK), "timerfd_create")


def set_timer(fd: int, seconds: float) -> None:
    """Let `fd` become readable after `seconds` (at least a microsecond), once."""
    nanoseconds = max(1_000, int(seconds * 1e9))
    spec = _TimerSpec(0, 0, nanoseconds // 10**9, nanoseconds % 10**9)
    _checked(_libc.timerfd_settime(fd, 0, ctypes.byref(spec), None), "timerfd_settime")


def reserve(fd: int, size_bytes: int) -> None:
    """Give a file its blocks and leave its size as it is.

    Raises:
        OSError: there is no room. A file system that cannot do this is none.
    """
    result = _libc.fallocate(fd, _KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(size_bytes))
    if result < 0 and ctypes.get_errno() not in {_ENOSYS, _EOPNOTSUPP}:
        _checked(result, "fallocate")


def make_synchronous(fd: int) -> bool:
    """Have every later write to a file, by whomever, return only once it is on disk (chattr +S).

    Returns False where the file system has no such flag.
    """
    flags = bytearray(8)
    try:
        fcntl.ioctl(fd, _GET_FLAGS, flags)
        wanted = int.from_bytes(flags, sys.byteorder) | _SYNC_FLAG
        fcntl.ioctl(fd, _SET_FLAGS, wanted.to_bytes(8, sys.byteorder))
    except OSError:
        return False
    return True


def inotify() -> int:
    """Return a descriptor that reports changes of watched directories."""
    return _checked(_libc.inotify_init1(CLOEXEC_NONBLOCK), "inotify_init1")


def watch_arrivals(fd: int, directory: str) -> int:
    """Report names that appear in a real directory; return the watch's number."""
    mask = IN_CREATE | IN_MOVED_TO | IN_ONLYDIR | IN_DONT_FOLLOW
    return _checked(_libc.inotify_add_watch(fd, os.fsencode(directory), mask), "inotify_add_watch")


def watch_writes(fd: int, directory: str) -> int:
    """Report files of a directory that were written and closed; return the watch's number."""
    mask = IN_CLOSE_WRITE | IN_ONLYDIR | IN_DONT_FOLLOW
    return _checked(_libc.inotify_add_watch(fd, os.fsencode(directory), mask), "inotify_add_watch")


def watch_growth(fd: int, file: int) -> int:
    """Report writes to an open file, wherever its name leads by now; return the watch's number."""
    path = b"/proc/self/fd/%d" % file
    return _checked(_libc.inotify_add_watch(fd, path, IN_MODIFY), "inotify_add_watch")


def arrivals(fd: int) -> list[tuple[int, str]]:
    """Return what is reported now: (number of the watch, name in its directory)."""
    try:
        events = os.read(fd, _EVENT_BYTES_PER_READ)
    except BlockingIOError:
        return []
    found = []
    offset = 0
    while offset < len(events):  # Bound: each event is at least its head long
        number = int.from_bytes(events[offset : offset + 4], sys.byteorder, signed=True)
        length = int.from_bytes(events[offset + 12 : offset + 16], sys.byteorder)
        name = events[offset + 16 : offset + 16 + length].rstrip(b"\0")
        found.append((number, os.fsdecode(name)))
        offset += 16 + length  # Source: inotify(7): watch, mask, cookie, length of the name
    return found


def unwatch(fd: int, number: int) -> None:
    """Forget a watch; one that went with its directory is no error."""
    _libc.inotify_rm_watch(fd, number)


TYPE_CHECKING = False
if TYPE_CHECKING:
    Strings = ctypes.Array[ctypes.c_char_p]
