"""What daemon and supervisor share about one attempt: its directory, its order, its exit record.

    attempts/reign              link to the token of the daemon that may start attempts now
    attempts/7.2/               attempt 2 of task 7, 0700, the daemon's
        claim                   link to "BOOT-ID:PID:TICKS": who runs it. THE START FENCE
        exit.tmp                4 KiB, written before the task may run: a full disk cannot refuse
                                the record. Holds the start until it becomes
        exit                    the exit record:
                                {"task":7,"attempt":2,...,"cause":"exit","code":0,...}
                                1a2b3c4d            CRC-32 of the line above, then NUL bytes

A claim is a symbolic link because making one is a single atomic system call that fails where the
name exists, and its content is there at once: there is no empty claim. It does what O_EXCL, a
write, a link(2) and an unlink(2) would do in four.
Invariant: who makes the claim, and nobody else, may run or end the attempt.
Loaded by the supervisors: stdlib only. Read next: `shim.py`.
"""

import marshal
import os
import zlib

RECORD_BYTES = 4_096  # one block
TEXT_CHARS_MAX = 600  # escaped six times as long, and still inside one block
_CLAIM, _START, _EXIT, _REIGN = "claim", "exit.tmp", "exit", "reign"


class Order:
    """All that a supervisor needs to know to run one attempt."""

    __slots__ = (
        "argv", "attempt", "cwd", "env", "gid", "groups", "memory_bytes", "output", "reign",
        "resumed_from", "stdin", "task", "uid", "umask",
    )  # fmt: skip
    task: int
    attempt: int
    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    stdin: str
    output: str
    umask: int
    uid: int  # -1: stay who we are
    gid: int
    groups: tuple[int, ...]
    memory_bytes: int
    resumed_from: int
    reign: str

    def pack(self) -> bytes:
        """Return the bytes for `unpack` in another process of the same interpreter."""
        return marshal.dumps(tuple(getattr(self, name) for name in self.__slots__))

    @classmethod
    def unpack(cls, packed: bytes) -> "Order":
        """Return what was packed by a daemon that runs the same interpreter."""
        order = cls()
        for name, value in zip(cls.__slots__, marshal.loads(packed), strict=True):  # noqa: S302
            setattr(order, name, value)
        return order


def place_of(attempts_dir: str, task: int, attempt: int) -> str:
    """Return the attempt's directory."""
    return f"{attempts_dir}/{task}.{attempt}"


# --- the fence ------------------------------------------------------------------------------


def claim(place: str, boot_id: str, pid: int, ticks: int) -> bool:
    """Take the attempt for a process; False where somebody has it already.

    Durable: nothing. After a power loss no process of that boot is left to be kept apart.
    """
    if not os.path.isdir(place):
        try:
            os.mkdir(place, 0o700)
        except FileExistsError:
            pass
    try:
        os.symlink(f"{boot_id}:{pid}:{ticks}", f"{place}/{_CLAIM}")
    except FileExistsError:
        return False
    return True


def claimed_by(place: str) -> tuple[str, int, int] | None:
    """Return (boot id, pid, ticks) of who holds the attempt, None where nobody does."""
    try:
        boot_id, pid, ticks = os.readlink(f"{place}/{_CLAIM}").rsplit(":", 2)
        return boot_id, int(pid), int(ticks)
    except (OSError, ValueError):
        return None


def begin_reign(attempts_dir: str, token: str) -> None:
    """Revoke all orders of earlier daemons that no supervisor has claimed yet.

    Without this an order that lies unread in a socket could run after the next daemon has
    declared the attempt not started, and has forgotten it.
    """
    aside = f"{attempts_dir}/{_REIGN}.tmp"
    if os.path.lexists(aside):
        os.unlink(aside)
    os.symlink(token, aside)
    os.rename(aside, f"{attempts_dir}/{_REIGN}")


def is_reigning(attempts_dir: str, token: str) -> bool:
    """Return whether orders with this token are still to be carried out."""
    return os.readlink(f"{attempts_dir}/{_REIGN}") == token


# --- start and exit record ------------------------------------------------------------------


def reserve(place: str, start: bytes) -> int:
    """Write the start and the room for the exit record; return the open file.

    Durable: nothing yet; but the block is allocated, and `record_exit` overwrites it.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    fd = os.open(f"{place}/{_START}", flags, 0o600)
    os.write(fd, start.ljust(RECORD_BYTES, b"\0"))
    return fd


def record_exit(place: str, fd: int, record: bytes) -> None:
    """Make the exit record final.

    Durable: the record, under its name.
    """
    os.pwrite(fd, record.ljust(RECORD_BYTES, b"\0"), 0)
    os.rename(f"{place}/{_START}", f"{place}/{_EXIT}")
    # Crash: named but torn or empty after a power loss. The CRC tells, and the boot id differs.
    os.fsync(fd)
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.fsync(directory)
    os.close(directory)
    os.close(fd)


def encode(fields: dict[str, int | float | str]) -> bytes:
    """Return a flat JSON object and its CRC; `json` itself would cost each fork its memory."""
    body = ",".join(f'"{name}":{_json(value)}' for name, value in fields.items()).join("{}")
    line = body.encode("ascii")
    return b"%s\n%08x\n" % (line, zlib.crc32(line))


def _json(value: float | str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return repr(value)
    plain = "".join(
        char if " " <= char <= "~" and char not in '"\\' else f"\\u{min(ord(char), 0xFFFD):04x}"
        for char in value[:TEXT_CHARS_MAX]
    )
    return f'"{plain}"'


def checked(data: bytes) -> bytes | None:
    """Return the JSON of what `encode` made, None where it is torn or none at all."""
    line, newline, rest = data.partition(b"\n")
    is_whole = newline and rest[:9] == b"%08x\n" % zlib.crc32(line)
    return line if is_whole else None


def read_exit(place: str) -> bytes | None:
    """Return the exit record's JSON, None where there is no whole one."""
    return _read(f"{place}/{_EXIT}")


def read_start(place: str) -> bytes | None:
    """Return the start's JSON, None while the main process has not been made."""
    return _read(f"{place}/{_START}")


def _read(path: str) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return checked(os.read(fd, RECORD_BYTES))
    finally:
        os.close(fd)


def remove(place: str) -> None:
    """Forget the attempt; what is missing is no error.

    Durable: nothing; a directory that comes back after a power loss is forgotten again.
    """
    for name in (_EXIT, _START, _CLAIM):
        try:
            os.unlink(f"{place}/{name}")
        except FileNotFoundError:
            continue
    try:
        os.rmdir(place)
    except FileNotFoundError:
        return
