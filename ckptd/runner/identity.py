"""Who a process is: its pid and the tick it started at, so that a reused pid fools nobody.

Loaded by the supervisors too: stdlib only, and of that only what costs no memory (see `shim.py`).
Read next: `attempt.py`.
"""

import os

from ckptd.runner import linux

_STAT_BYTES_MAX = 4_096


class Stat:
    """What /proc/PID/stat says, as far as it matters here."""

    __slots__ = ("group", "parent", "session", "state", "threads", "ticks")

    def __init__(self, line: bytes) -> None:
        # "12 (any) name) S 1 12 12 ...": the name may hold spaces and brackets. Source: proc(5).
        fields = line[line.rindex(b")") + 2 :].split(b" ", 20)
        self.state = fields[0]
        self.parent = int(fields[1])
        self.group = int(fields[2])
        self.session = int(fields[3])
        self.threads = int(fields[17])
        self.ticks = int(fields[19])

    @property
    def is_alive(self) -> bool:
        """Return whether it can still run code.

        A zombie cannot, unless it is only the first thread that has ended, and others go on.
        """
        return self.state not in {b"Z", b"X", b"x"} or self.threads > 1

    @property
    def is_stopped(self) -> bool:
        """Return whether it stands still until somebody sends SIGCONT, or lets go of it."""
        return self.state in {b"T", b"t"}


def look(pid: int) -> Stat | None:
    """Return what the kernel says of `pid` now, None where there is no such process."""
    line = _stat_line(pid)
    return Stat(line) if line else None


def ticks_of(pid: int) -> int:
    """Return the start tick of `pid`; 0 where there is no such process. Makes few objects."""
    line = _stat_line(pid)
    return int(line[line.rindex(b")") + 2 :].split(b" ", 20)[19]) if line else 0


def is_alive(pid: int, ticks: int) -> bool:
    """Return whether exactly this process still runs."""
    found = look(pid)
    return found is not None and found.ticks == ticks and found.is_alive


def open_exactly(pid: int, ticks: int) -> int:
    """Return a pidfd of exactly this process, -1 where it does not run any more.

    Raises:
        OSError: for want of descriptors nothing can be said.
    """
    fd = -1
    try:
        fd = os.pidfd_open(pid)
        if is_alive(pid, ticks):
            return fd
    except OSError as error:
        if linux.is_shortage(error):
            if fd >= 0:
                os.close(fd)
            raise
    if fd >= 0:
        os.close(fd)
    return -1


def _stat_line(pid: int) -> bytes:
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if linux.is_shortage(error):  # of ours: it says nothing about the process
            raise
        return b""
    try:
        return os.read(fd, _STAT_BYTES_MAX)
    except OSError:  # it went while we read
        return b""
    finally:
        os.close(fd)


def boot_id() -> str:
    """Return the identity of this boot of this machine."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def every_pid() -> list[int]:
    """Return all processes of the machine that /proc shows us."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]
