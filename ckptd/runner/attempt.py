r"""What daemon and supervisor share about one attempt: its order and its record.

    attempts/reign              link to the token of the daemon whose orders are valid now
    attempts/7.2                attempt 2 of task 7: one block, a hard link to a record file
    attempts/spare/TOKEN.K      the record files, recycled from attempt to attempt

    offset  bytes   in a record, each line with its CRC-32: {"pid":...,...}\n1a2b3c4d\n NUL...
         0   1,024  claim: boot id, pid and start tick of who runs the attempt; of which `attempts/`
     1,024   1,024  start: the same, with the main process; written before it may run
     2,048   2,048  exit: {"task":7,"attempt":2,"cause":"exit","code":0,...}

THE START FENCE is link(2): it fails where the name exists, and what it makes visible is complete.
Records are recycled because making and removing inodes at a thousand a second is what ext4 is slow
at (it scans past all recently deleted ones), and because a record that exists needs no room on a
full disk.
Invariant: who makes the link, and nobody else, may run or end the attempt.
Invariant: a claim is never changed while its link exists; start and exit are written once each.
Invariant: a claim says by device and inode for which directory it was made. A copy of the store has
all the claims and is another directory; what they speak of is not the copy's to follow or to end.
Loaded by the supervisors: stdlib only. Read next: `shim.py`.
"""

import marshal
import os
import zlib

RECORD_BYTES = 4_096
_START_AT = 1_024
_EXIT_AT = 2_048
_TEXT_CHARS_MAX = 240  # six bytes each at worst: still inside the block
_SPARE, _REIGN = "spare", "reign"
_BOOLS = (b"false", b"true")


class Order:
    """All that a supervisor needs to know to run one attempt."""

    __slots__ = (
        "argv", "attempt", "cpus", "cwd", "env", "gid", "groups", "io_weight", "memory_bytes",
        "nice", "output", "programs", "reign", "resumed_from", "spare", "stdin", "task",
        "tasks_max", "uid", "umask",
    )  # fmt: skip
    task: int
    attempt: int
    programs: tuple[bytes, ...]  # files to try, in this order
    argv: bytes  # words separated by NUL, as execve will see them
    env: bytes  # NAME=value, likewise
    cwd: str
    stdin: str
    output: str
    umask: int
    uid: int  # -1: stay who we are
    gid: int
    groups: tuple[int, ...]
    memory_bytes: int  # 0: no limit, here and below
    cpus: float
    tasks_max: int
    io_weight: int
    nice: int  # 0: as the supervisor's
    resumed_from: int
    reign: str
    spare: int  # number of the record file to use

    def pack(self) -> bytes:
        """Return the bytes for `unpack` in another process of the same interpreter."""
        return marshal.dumps([getattr(self, name) for name in self.__slots__])

    @classmethod
    def unpack(cls, packed: bytes) -> "Order":
        """Return what was packed by a daemon that runs the same interpreter."""
        self = cls()
        (
            self.argv, self.attempt, self.cpus, self.cwd, self.env, self.gid, self.groups,
            self.io_weight, self.memory_bytes, self.nice, self.output, self.programs, self.reign,
            self.resumed_from, self.spare, self.stdin, self.task, self.tasks_max, self.uid,
            self.umask,
        ) = marshal.loads(packed)  # noqa: S302  # fmt: skip
        return self


class Holder:
    """Who holds an attempt: a supervisor, or a daemon (ticks 0) so that nobody runs it.

    The lines are made by one formatting each: between fork and exec every object touched is a
    page copied.
    """

    __slots__ = ("_start", "claim", "pid", "ticks")

    def __init__(self, boot_id: str, pid: int, ticks: int, home: str = "") -> None:
        self.pid = pid
        self.ticks = ticks
        me = f'"boot_id":"{boot_id}","shim_pid":{pid},"shim_ticks":{ticks},"home":"{home}"'
        self.claim = sealed(f"{{{me}}}".encode())
        self._start = f'{{{me},"pid":%d,"ticks":%d,"started_ns":%d,"resumed_from":%d}}'.encode()

    def start(self, pid: int, ticks: int, started_ns: int, resumed_from: int) -> bytes:
        """Return the line that says which main process was made for the attempt."""
        return sealed(self._start % (pid, ticks, started_ns, resumed_from))


class End:
    """How an attempt ended, to become its exit record."""

    __slots__ = (
        "blame", "cause", "code", "cpu_s", "ended_ns", "has_core", "is_oom", "pid", "rss_bytes",
        "signal", "started_ns", "text",
    )  # fmt: skip

    def __init__(self, cause: str, *, code: int = 0, signal: int = 0, text: str = "") -> None:
        self.cause = cause
        self.code = code
        self.signal = signal
        self.text = text
        self.blame = ""  # of an oom: limit, host; of an exit: disk
        self.has_core = self.is_oom = False
        self.pid = self.started_ns = self.ended_ns = self.rss_bytes = 0
        self.cpu_s = 0.0

    def line(self, task: int, attempt: int) -> bytes:
        """Return the exit record."""
        return sealed(
            b'{"task":%d,"attempt":%d,"cause":"%s","code":%d,"signal":%d,"core":%s,"pid":%d,'
            b'"started_ns":%d,"ended_ns":%d,"cpu_s":%.6f,"rss_bytes":%d,"oom":%s,"blame":"%s",'
            b'"text":"%s"}'
            % (
                task, attempt, self.cause.encode(), self.code, self.signal, _BOOLS[self.has_core],
                self.pid, self.started_ns, self.ended_ns, self.cpu_s, self.rss_bytes,
                _BOOLS[self.is_oom], self.blame.encode(), escaped(self.text) if self.text else b"",
            )
        )  # fmt: skip


def place_of(attempts_dir: str, task: int, attempt: int) -> str:
    """Return the path of the attempt's record."""
    return f"{attempts_dir}/{task}.{attempt}"


def home_of(attempts: str | int) -> str:
    """Return what tells the directory from any copy of it, as long as it is open somewhere.

    It stays with the directory when the store is moved on its file system.
    """
    found = os.stat(attempts)
    return f"{found.st_dev}:{found.st_ino}"


# --- the fence ------------------------------------------------------------------------------


class Record:
    """An open record file, before and after it is an attempt's."""

    __slots__ = ("_fd", "_spare", "place")

    def __init__(self, attempts_dir: str, place: str, spare: str, claim: bytes) -> None:
        """Write the claim into a record file, new or used before, for `take` to make visible."""
        self.place = place
        self._spare = f"{attempts_dir}/{_SPARE}/{spare}"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._spare, flags, 0o600)
        try:
            os.pwrite(self._fd, claim.ljust(RECORD_BYTES, b"\0"), 0)
        except OSError:
            self.close()
            raise

    def take(self) -> bool:
        """Claim the attempt; False where somebody has it already.

        Durable: nothing. After a power loss no process of that boot is left to be kept apart.
        """
        try:
            os.link(self._spare, self.place)
        except FileExistsError:
            return False
        return True

    def write_start(self, start: bytes) -> None:
        """Keep who the main process is.

        Durable: nothing, as the claim; the block exists, a full disk cannot refuse it.
        """
        os.pwrite(self._fd, start.ljust(_EXIT_AT - _START_AT, b"\0"), _START_AT)

    def write_exit(self, exit_record: bytes, directory: int) -> None:
        """Make the end final.

        Durable: the exit record and the name of the attempt.
        """
        assert len(exit_record) <= RECORD_BYTES - _EXIT_AT, "an exit record has a bound"
        os.pwrite(self._fd, exit_record.ljust(RECORD_BYTES - _EXIT_AT, b"\0"), _EXIT_AT)
        # Crash: torn after a power loss. The CRC tells, and then the boot id differs.
        os.fsync(self._fd)
        os.fsync(directory)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)


def begin_reign(attempts_dir: str, token: str) -> None:
    """Revoke all orders of earlier daemons that no supervisor has claimed yet.

    Without this an order that lies unread in a socket could run after the next daemon has
    declared the attempt not started, and has forgotten it. Spare records of the past go, too:
    those that are an attempt's stay under its name.
    """
    aside = f"{attempts_dir}/{_REIGN}.tmp"
    if os.path.lexists(aside):
        os.unlink(aside)
    os.symlink(token, aside)
    os.rename(aside, f"{attempts_dir}/{_REIGN}")
    spares = f"{attempts_dir}/{_SPARE}"
    os.makedirs(spares, 0o700, exist_ok=True)
    for name in os.listdir(spares):
        os.unlink(f"{spares}/{name}")


def is_reigning(attempts_dir: str, token: str) -> bool:
    """Return whether orders with this token are still to be carried out."""
    return os.readlink(f"{attempts_dir}/{_REIGN}") == token


# --- reading and writing records --------------------------------------------------------------


class Found:
    """What a record says: JSON, None where that part is not written, or torn."""

    __slots__ = ("claim", "exit", "start")

    def __init__(self, block: bytes) -> None:
        self.claim = checked(block[:_START_AT])
        self.start = checked(block[_START_AT:_EXIT_AT])
        self.exit = checked(block[_EXIT_AT:])


def read(place: str) -> Found | None:
    """Return what is known of an attempt; None where nobody has claimed it."""
    try:
        fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return Found(os.read(fd, RECORD_BYTES))
    finally:
        os.close(fd)


def forget(place: str) -> None:
    """Take the name away; a record that is missing is no error.

    Durable: nothing; a name that comes back after a power loss is forgotten again.
    """
    if os.path.lexists(place):
        os.unlink(place)


def sealed(line: bytes) -> bytes:
    """Return a line with its CRC; `checked` is the way back."""
    return b"%s\n%08x\n" % (line, zlib.crc32(line))


def escaped(text: str) -> bytes:
    """Return the inside of a JSON string; `json` itself would cost each fork its memory."""
    return "".join(_escaped(char) for char in text[:_TEXT_CHARS_MAX]).encode()


def _escaped(char: str) -> str:
    if " " <= char <= "~" and char not in '"\\':
        return char
    code = ord(char)
    is_one_unit = code <= 0xFFFF and not 0xD800 <= code <= 0xDFFF
    return f"\\u{code if is_one_unit else 0xFFFD:04x}"


def checked(data: bytes) -> bytes | None:
    """Return the line of what `sealed` made, None where it is torn or none at all."""
    line, newline, rest = data.partition(b"\n")
    is_whole = newline and rest[:9] == b"%08x\n" % zlib.crc32(line)
    return line if is_whole else None
