"""Notify lines: what a running task says about itself, in the form of sd_notify.

    PROGRESS=340/1000  STATUS=copying  EXTEND_TIMEOUT_USEC=60000000  WATCHDOG=1  CHECKPOINT=1

One datagram socket per running task, which only its user can write to. What comes in is hostile,
lossy telemetry: bounded, never trusted with more than a number to show.
"""

import contextlib
import math
import os
import socket
import stat
import time
from collections.abc import Callable
from functools import partial

from ckptd.core.port import TelemetrySeen
from ckptd.runner import linux
from ckptd.runner.watch import Watch

DATAGRAM_BYTES_MAX = 4_096
DATAGRAMS_PER_TURN_MAX = 32  # of one task; the rest waits its turn in the socket
TEXT_CHARS_MAX = 200
_SO_PASSRIGHTS = 83  # Source: asm-generic/socket.h, Linux 6.16
_DIRECTORY_MODE = 0o711  # tasks of all users pass through
_PATH_BYTES_MAX = 107  # Source: unix(7), sun_path
_NUMBER_MAX = 1e15


class Said:
    """What one task has said so far; a line replaces what it names and keeps the rest."""

    __slots__ = ("done", "extend_s", "is_hint", "is_news", "text", "total")

    def __init__(self) -> None:
        self.done = 0.0
        self.total = 0.0
        self.text = ""
        self.extend_s = 0.0
        self.is_news = False
        self.is_hint = False  # look at my files now

    def hear(self, datagram: bytes) -> None:
        """Take in one datagram of `NAME=value` lines; what cannot be understood is passed over."""
        for line in datagram.decode("utf-8", "replace").splitlines():
            name, _, value = line.partition("=")
            if name == "PROGRESS":
                self._progress(value)
            elif name == "STATUS":
                self.text = "".join(c for c in value if c.isprintable())[:TEXT_CHARS_MAX]
                self.is_news = True
            elif name == "EXTEND_TIMEOUT_USEC":
                self.extend_s = _number(value) / 1e6
                self.is_news = True
            elif name == "WATCHDOG":
                self.is_news = True
            elif name == "CHECKPOINT":
                self.is_hint = True

    def _progress(self, value: str) -> None:
        done, slash, total = value.partition("/")
        percent = not slash and done.endswith("%")
        self.done = _number(done.rstrip("%"))
        self.total = 100.0 if percent else _number(total)
        self.is_news = True

    def told(self, task: int, attempt: int, at_ns: int) -> TelemetrySeen:
        """Return the sighting, once; an extension is asked for once too."""
        extend_s, self.extend_s, self.is_news = self.extend_s, 0.0, False
        return TelemetrySeen(task, attempt, self.done, self.total, self.text, at_ns, extend_s)


def _number(text: str) -> float:
    try:
        number = float(text[:32])
    except ValueError:
        return 0.0
    return min(number, _NUMBER_MAX) if math.isfinite(number) and number > 0 else 0.0


class Listener:
    """The ears for one running attempt."""

    __slots__ = ("attempt", "directory", "hinted", "path", "said", "socket", "task")

    def __init__(self, task: int, attempt: int, hinted: Callable[[], None]) -> None:
        self.task = task
        self.attempt = attempt
        self.hinted = hinted
        self.said = Said()
        self.socket: socket.socket | None = None
        self.path = ""  # NOTIFY_SOCKET; "": there is none
        self.directory = -1  # number of the inotify watch on `ckpt/`


class Hints:
    """All listeners. A hint (CHECKPOINT=1, a new name in `ckpt/`) only makes somebody look."""

    def __init__(self, directory: str, watch: Watch) -> None:
        os.makedirs(directory, exist_ok=True)
        os.chmod(directory, _DIRECTORY_MODE)
        self._directory = directory
        self._watch = watch
        self._all: set[Listener] = set()
        self._news: dict[int, Listener] = {}
        self._by_number: dict[int, Listener] = {}
        self._inotify = linux.inotify()
        watch.add(self._inotify, self._arrived)

    def listen(self, task: int, attempt: int, uid: int, hinted: Callable[[], None]) -> Listener:
        """Open the task's socket; without one there is less to see, nothing else."""
        one = Listener(task, attempt, hinted)
        self._all.add(one)
        path = f"{self._directory}/{task}.sock"
        if len(os.fsencode(path)) <= _PATH_BYTES_MAX:
            with contextlib.suppress(OSError):  # it is there, but where all of RUN was removed
                os.mkdir(self._directory)
                os.chmod(self._directory, _DIRECTORY_MODE)
            one.socket = _bound(path, uid)
        if one.socket is not None:
            one.path = path
            self._watch.add(one.socket.fileno(), partial(self._heard, one))
        return one

    def look_at(self, one: Listener, ckpt_dir: str) -> None:
        """Watch the task's checkpoints, too."""
        if one in self._all and one.directory < 0:
            with contextlib.suppress(OSError):  # no watches left: hints by line remain
                one.directory = linux.watch_arrivals(self._inotify, ckpt_dir)
                self._by_number[one.directory] = one

    def unlisten(self, one: Listener) -> TelemetrySeen | None:
        """Close and remove the task's socket; return its last words, if they are news."""
        if one.socket is not None:
            self._heard(one)
            self._watch.remove(one.socket.fileno())
            one.socket.close()
            one.socket = None
            with contextlib.suppress(OSError):  # gone, or the task put something else there
                os.unlink(one.path)
        self._all.discard(one)
        if one.directory >= 0:
            linux.unwatch(self._inotify, one.directory)
            self._by_number.pop(one.directory, None)
            one.directory = -1
        is_news = self._news.pop(one.task, None) is not None
        return one.said.told(one.task, one.attempt, time.time_ns()) if is_news else None

    def clear(self, task: int) -> None:
        """Remove the socket that an earlier daemon left behind, of a task that ended since."""
        with contextlib.suppress(OSError):
            os.unlink(f"{self._directory}/{task}.sock")

    def told(self) -> list[TelemetrySeen]:
        """Return the news, at most one per task and turn."""
        if not self._news:
            return []
        at_ns = time.time_ns()
        news = [one.said.told(one.task, one.attempt, at_ns) for one in self._news.values()]
        self._news.clear()
        return news

    def close(self) -> None:
        """Stop listening; the sockets' names stay, deaf, for the next daemon to replace."""
        for one in self._all:
            if one.socket is not None:
                one.socket.close()
        self._all.clear()
        os.close(self._inotify)

    def _heard(self, one: Listener) -> None:
        assert one.socket is not None
        for _ in range(DATAGRAMS_PER_TURN_MAX):
            try:
                one.said.hear(one.socket.recv(DATAGRAM_BYTES_MAX))
            except OSError:
                break
        if one.said.is_news:
            self._news[one.task] = one
        if one.said.is_hint:
            one.said.is_hint = False
            one.hinted()

    def _arrived(self) -> None:
        for number in {number for number, _ in linux.arrivals(self._inotify)}:
            one = self._by_number.get(number)
            if one is not None:  # None: told off already, or the queue overflowed
                one.hinted()


def _bound(path: str, uid: int) -> socket.socket | None:
    """Return a socket that its user alone can send to; None where that cannot be."""
    try:
        ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    except OSError:  # no descriptors left
        return None
    # A descriptor that is sent along would be closed by our `recv`, and that can wait for a peer
    # as long as SO_LINGER says. Before Linux 6.16 nothing keeps descriptors out.
    with contextlib.suppress(OSError):
        ear.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    try:
        try:
            ear.bind(path)
        except OSError:  # left by an earlier daemon
            os.unlink(path)
            ear.bind(path)
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)
        if uid != os.geteuid():
            os.chown(path, uid, -1)
    except OSError:
        ear.close()
        return None
    return ear
