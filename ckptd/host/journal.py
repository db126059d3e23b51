"""The daemon's story: one structured line per event, to journald where it listens, else to stderr.

The log is the truth and the journal only tells of it: nothing here may block or raise. A line that
journald does not take now is kept and goes out before the next one; what there is no room to keep
is counted, and the count is told with the next line that gets through.
Who wrote the line (CODE_FILE and its kin) is not told: each kind comes from one place, and its
MESSAGE_ID is found in a second. Not here: the tasks' output, see `echo.py`. Read next: `story.py`,
docs/JOURNAL.md.
Source: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/, systemd.exec(5), sd-daemon(3).
"""

import array
import fcntl
import os
import socket
import stat
import struct
import threading
from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from typing import Final, Literal, Protocol, TextIO

from ckptd.host import clock

JOURNAL_SOCKET: Final = "/run/systemd/journal/socket"
SEND_BUFFER_BYTES: Final = 1 << 20  # a burst while journald is busy; the kernel may grant less
KEPT_BYTES_MAX: Final = 1 << 20  # a queue of ten, the kernel's default, is full in no time

CRITICAL: Final = 2  # journald syncs its file at once from here on: use it for loss of data
ERROR: Final = 3
WARNING: Final = 4
INFO: Final = 6
DEBUG: Final = 7

LEVELS: Final = {"error": ERROR, "warning": WARNING, "info": INFO, "debug": DEBUG}
WORDS: Final = {2: "critical", 3: "error", 4: "warning", 5: "notice", 6: "info", 7: "debug"}

Field = str | int | float | tuple[int, ...]
"""A value; of a tuple each number becomes a field of its own, all under the same name."""

Level = Literal["error", "warning", "info", "debug"]


class Kind(StrEnum):
    """Every kind of event and its MESSAGE_ID: `journalctl MESSAGE_ID=...` finds all of a kind.

    An id is never changed and never reused.
    """

    DAEMON_STARTING = "94825a6dec3440ec9b9d3e6147288443"
    DAEMON_READY = "8a0f2fb32b3640cab827aa301d6f1171"
    DAEMON_RELOADED = "6cc27db3900649b99f366c0abdce5243"
    DAEMON_STOPPING = "6717a60413204df992891f70f6104ccc"
    DAEMON_STOPPED = "074399abf9174c219b8e1139347b0ee0"
    DAEMON_FAILED = "9bec7d590889461f8220d07e2e6f9c79"
    CONFIG_REFUSED = "65422211b7ad41da8b9f8c67263ffecc"
    RECOVERY_DONE = "9584481fafe54226b9b813c1a27c34b7"
    LOG_DAMAGED = "927f96a8f73f4b5a8d02fc27df69c1c0"
    LOG_FULL = "f757eef4d58049f3afda976473da33a0"
    LOG_ROOM = "058708e7daf247a19ff2e53a26aa54de"
    SYNC_FAILED = "4f0d8e4dfdbf45eea8c6c0dce8a9b0cf"
    SNAPSHOT_WRITTEN = "328b814cc8ab4d2aa3ff96fbd773211b"
    SNAPSHOT_FAILED = "db43f0472fe44daca9603f6cea10bd19"
    TASK_SUBMITTED = "290db7c3177243fa8e3073f28ced17b9"
    TASK_STARTED = "7d71aa1967af4fdd8acd9b34c70f99d6"
    TASK_ENDED = "d1d5ed8e0583438b863ab1644131c6da"
    TASK_RETRYING = "82ae9adafe2245248124bd1c1e29eec7"
    TASK_QUARANTINED = "ca72f46de66d40359ead259f93c750cd"
    TASK_BLOCKED = "94d2a629f5f84eb98a72e0f52e4f144e"
    TASK_REMOVED = "39cc434a49ab481dbb6dfc362cf19f92"
    TASK_CHANGED = "88b9f8469387419e9f094c5c0972e91a"
    TASK_OUTPUT = "8bf6d8dd0b1143f8a662104f38e5b4fa"
    OUTPUT_SKIPPED = "cfb41a741a06488e9801f9d74200dee1"
    ATTEMPT_ADOPTED = "837eed4b4be04479994192b3e58ea987"
    ATTEMPT_LOST = "cda1ccdd44ad4f2291a4b568a6383bb1"
    CHECKPOINT_FOUND = "d87e1f05589b4b4b954d7f69799d059c"
    CHECKPOINT_CORRUPT = "1578caea87dd4e93b1843d7ca9ca9075"
    GROUP_CHANGED = "858c3d96d9ad42978de7866d0a841072"
    CLIENT_REFUSED = "efbf5d63025e4aa4ba683d0252f161ba"
    CLIENT_FLOODING = "63dab0c9f3a54a8abfa869fa50cc0be1"
    CLIENT_MALFORMED = "673770035f904017a7ee953e3901a169"
    LINES_DROPPED = "a626f071e3844dd3a624587158e1b5fe"
    INTERNAL_ERROR = "9009599b677844009142d5b639ea5987"
    NOTE = "6566ce4f2d0b4536a3c731a0ea284964"


class Sink(Protocol):
    """Where lines go. Returns False where the line was not taken; never blocks, never raises."""

    def send(self, kind: Kind, message: str, priority: int, fields: Mapping[str, Field]) -> bool:
        """Hand one line over."""
        ...

    def flush(self) -> bool:
        """Try again what was kept; return whether nothing is left."""
        ...


class Journal:
    """What everybody in the daemon calls. Threads may share it: each line is one system call."""

    def __init__(self, sink: Sink, level: Level = "info") -> None:
        self._sink = sink
        self.level: int = LEVELS[level]
        self.dropped = 0  # and not yet told
        self.dropped_ever = 0

    def event(self, kind: Kind, message: str, priority: int = INFO, **fields: Field) -> None:
        """Tell one event. `task_id=7` becomes CKPTD_TASK_ID, `errno=28` ERRNO."""
        if priority > self.level:
            return
        if self.dropped:
            self.flush()
        if not self._sink.send(kind, message, priority, fields):
            self.dropped += 1
            self.dropped_ever += 1

    def note(self, message: str, priority: int = INFO, **fields: Field) -> None:
        """Tell something that has no kind of its own."""
        self.event(Kind.NOTE, message, priority, **fields)

    def flush(self) -> bool:
        """Try again what was not taken yet; return whether all of it is told."""
        if not self._sink.flush():
            return False
        if self.dropped and self._tell_dropped(self.dropped):
            self.dropped = 0
        return self._sink.flush()

    def _tell_dropped(self, count: int) -> bool:
        text = f"{count} lines were dropped because the journal did not take them"
        return self._sink.send(Kind.LINES_DROPPED, text, WARNING, {"count": count})


def open_journal(env: Mapping[str, str]) -> Journal:
    """Return the journal for where stderr leads: journald, a terminal, or whoever started us."""
    stream = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    if _leads_to_journald(env, stream.fileno()) and os.path.exists(JOURNAL_SOCKET):
        return Journal(JournaldSink(JOURNAL_SOCKET))
    under_systemd = "INVOCATION_ID" in env and not stream.isatty()
    return Journal(StreamSink(stream, prefixed=under_systemd, indented=stream.isatty()))


def _leads_to_journald(env: Mapping[str, str], fd: int) -> bool:
    """Return whether `fd` is the very stream that journald named, `device:inode`."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return (
        stat.S_ISSOCK(status.st_mode)
        and env.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    )


class StreamSink:
    """Lines on a stream: `12:30:01 warning message k=v`, or with `<4>` for systemd to read."""

    def __init__(self, stream: TextIO, *, prefixed: bool, indented: bool = False) -> None:
        self._stream = stream
        self._prefixed = prefixed
        self._indented = indented

    def send(self, kind: Kind, message: str, priority: int, fields: Mapping[str, Field]) -> bool:
        """Write one event as one line: a hint is joined, other newlines are escaped.

        On a terminal all of them are indented.
        """
        del kind  # for programs; the message says it to people
        # Many numbers are for programs to match; the message has the first and the last of them.
        shown = ((name, value) for name, value in fields.items() if not isinstance(value, tuple))
        extra = "".join(f" {name}={value}" for name, value in shown if value != "")
        if not self._indented:
            message = _hint_joined(message)
        text = f"{message}{extra}".replace("\n", "\n" + 17 * " " if self._indented else "\\n")
        if self._prefixed:
            line = f"<{priority}>{text}\n"
        else:
            line = f"{clock.time_of_day()} {WORDS[priority]:<7} {text}\n"
        try:
            self._stream.write(line)
            self._stream.flush()
        except (OSError, ValueError):
            return False
        return True

    def flush(self) -> bool:
        """Return True: nothing is kept."""
        return True


def _hint_joined(message: str) -> str:
    """Return our `what failed`, newline, two blanks, `what to do` as one line; else what came."""
    first, is_below, hint = message.partition("\n  ")
    return f"{first}; {hint}" if is_below and "\n" not in f"{first}{hint}" else message


class JournaldSink:
    """Datagrams to journald, never blocking: a stopped journald costs lines, not the daemon.

    Bound: KEPT_BYTES_MAX of lines wait for a journald that is busy.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def send(self, kind: Kind, message: str, priority: int, fields: Mapping[str, Field]) -> bool:
        """Hand one line over, or keep it."""
        payload = encode(kind, message, priority, fields)
        with self._lock:  # it covers no call that waits
            if self._flush() and self.hand_over(payload):
                return True
            if self._kept_bytes + len(payload) > KEPT_BYTES_MAX:
                return False
            self._kept.append(payload)
            self._kept_bytes += len(payload)
            return True

    def flush(self) -> bool:
        """Try again what was kept; return whether nothing is left."""
        if not self._kept:
            return True
        with self._lock:
            return self._flush()

    def _flush(self) -> bool:
        while self._kept:
            if not self.hand_over(self._kept[0]):
                return False
            self._kept_bytes -= len(self._kept.popleft())
        return True

    def hand_over(self, payload: bytes) -> bool:
        """Hand one entry over; one too big for a datagram travels as a sealed memory file."""
        try:
            # By address each time: a restarted journald is found again without a reconnect.
            self._socket.sendto(payload, self._path)
        except BlockingIOError:
            return False
        except OSError:  # EMSGSIZE, ENOBUFS; or journald is gone, which the second try tells
            return self._send_as_file(payload)
        return True

    def is_there(self) -> bool:
        """Tell whether there is a journald at all; one that is being restarted counts."""
        return os.path.exists(self._path)

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()

    def _send_as_file(self, payload: bytes) -> bool:
        try:
            fd = os.memfd_create("ckptd-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                with open(fd, "wb", closefd=False) as file:
                    file.write(payload)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
                self._socket.sendmsg([], [rights], 0, self._path)
            finally:
                os.close(fd)
        except OSError:
            return False
        return True


_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def encode(kind: Kind, message: str, priority: int, fields: Mapping[str, Field]) -> bytes:
    r"""Return one entry in journald's native form.

    A plain value is `NAME=value\n`; one with a newline inside is
    `NAME\n` + 8 bytes of little-endian length + value + `\n`:

        PRIORITY=6\nSYSLOG_IDENTIFIER=ckptd\nMESSAGE_ID=5d...\nCKPTD_EVENT=task_ended\n
        CKPTD_TASK_ID=7\nMESSAGE=task 7 ended\n
    """
    return head(kind, "ckptd", priority, fields) + field("MESSAGE", message)


def head(kind: Kind, identifier: str, priority: int, fields: Mapping[str, Field]) -> bytes:
    """Return everything of an entry but its MESSAGE. What is empty is left out."""
    lines = [
        b"PRIORITY=%d\n" % priority,
        field("SYSLOG_IDENTIFIER", identifier),
        f"MESSAGE_ID={kind.value}\nCKPTD_EVENT={kind.name.lower()}\n".encode(),
    ]
    for name, value in fields.items():
        upper = name.upper()
        full = upper if upper in _STANDARD else f"CKPTD_{upper}"
        if isinstance(value, tuple):
            lines += [f"{full}={number}\n".encode() for number in value]
        elif value != "":
            lines.append(field(full, str(value)))
    return b"".join(lines)


_STANDARD: Final = frozenset({"ERRNO"})


def field(name: str, value: str | bytes) -> bytes:
    """Return one field in the form that its value needs."""
    raw = value.encode(errors="backslashreplace") if isinstance(value, str) else value
    if b"\n" in raw:
        return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(raw)), raw)
    return b"%s=%s\n" % (name.encode(), raw)
