"""Who a process is: its pid and the tick it started at, so that a reused pid fools nobody.

Loaded by the supervisors too: stdlib only, and of that only what costs no memory (see `shim.py`).
Read next: `attempt.py`.
"""

import os

_STAT_BYTES_MAX = 4_096


class Stat:
    """What /proc/PID/stat says, as far as it matters here."""

    __slots__ = ("group", "parent", "session", "state", "ticks")

    def __init__(self, line: bytes) -> None:
        # "12 (any) name) S 1 12 12 ...": the name may hold spaces and brackets. Source: proc(5).
        fields = line[line.rindex(b")") + 2 :].split(b" ", 20)
        self.state = fields[0]
        self.parent = int(fields[1])
        self.group = int(fields[2])
        self.session = int(fields[3])
        self.ticks = int(fields[19])

    @property
    def is_alive(self) -> bool:
        """Return whether it can still run code: a zombie cannot."""
        return self.state not in {b"Z", b"X", b"x"}


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


def _stat_line(pid: int) -> bytes:
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
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
