"""One connection to a message bus, from its greeting to its end: bytes and descriptors, messages.

It reads and writes what the socket takes without waiting. Who calls whom, and what happens after
the end, is `bus.py`. Source: the D-Bus specification, "Authentication Protocol" and "Message
Protocol"; jeepney has both without any I/O.
"""

import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable
from urllib.parse import unquote_to_bytes

from jeepney import AuthenticationError, FileDescriptor, Message, NoFDError, Parser
from jeepney.auth import BEGIN, Authenticator
from jeepney.fds import fds_buf_size

from ckptd.runner.watch import Watch

READ_BYTES_MAX = WRITE_BYTES_MAX = 65_536  # per turn
FDS_MAX = 256  # unclaimed; the kernel passes 253 with one message
MESSAGE_BYTES_MAX = 32 << 20  # of the system bus; more is not from a bus


class Wire:
    """A connected socket. `on_ready` once it may be used; `on_end` at most once, when it broke."""

    def __init__(
        self,
        connected: socket.socket,
        watch: Watch,
        on_ready: Callable[[], None],
        on_message: Callable[[Message], None],
        on_end: Callable[[], None],
    ) -> None:
        self._socket, self._watch = connected, watch
        self._on_ready, self._on_message, self._on_end = on_ready, on_message, on_end
        self._greeting = Authenticator(enable_fds=True)
        self._parser = Parser()
        self._out: deque[tuple[bytes, list[int]]] = deque()
        self._is_open = True
        watch.add(connected.fileno(), self._readable)
        self.send(self._greeting.data_to_send(), [])

    def send(self, data: bytes, fds: list[int]) -> None:
        """Queue bytes with their descriptors, which are closed once sent or when the wire ends."""
        if not self._out:
            self._watch.when_writable(self._socket.fileno(), self._writable)
        self._out.append((data, fds))

    def close(self) -> None:
        """Close the socket and every descriptor under way."""
        if not self._is_open:
            return
        self._is_open = False
        self._watch.remove(self._socket.fileno())
        self._socket.close()
        for _, fds in self._out:
            _close_all(fds)
        self._out.clear()
        _drop_all(self._parser.fds)

    def _end(self) -> None:
        if self._is_open:
            self.close()
            self._on_end()

    def _writable(self) -> None:
        if not self._out:
            return
        data, fds = self._out.popleft()
        while not fds and self._out and len(data) < WRITE_BYTES_MAX and not self._out[0][1]:
            data += self._out.popleft()[0]  # Bound: WRITE_BYTES_MAX
        try:
            sent = socket.send_fds(self._socket, [data], fds) if fds else self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            _close_all(fds)
            self._end()
            return
        if sent:
            _close_all(fds)
            fds = []
        if sent < len(data):
            self._out.appendleft((data[sent:], fds))
        elif not self._out:
            self._watch.when_writable(self._socket.fileno(), None)

    def _readable(self) -> None:
        # Not socket.recv_fds: Python 3.11's drops its flags, and children would inherit the lock.
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                READ_BYTES_MAX, fds_buf_size(), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            self._end()
            return
        fds: list[FileDescriptor] = FileDescriptor.from_ancdata(ancillary)
        is_early = bool(fds) and not self._greeting.authenticated
        if not data or flags & socket.MSG_CTRUNC or is_early:  # truncated: descriptors were lost
            _drop_all(fds)
            self._end()
        elif self._greeting.authenticated:
            self._parser.add_data(data, fds=fds)
            self._deliver()
        else:
            self._greet(data)

    def _greet(self, data: bytes) -> None:
        try:
            self._greeting.feed(data)
        except AuthenticationError:
            self._end()
            return
        if self._greeting.authenticated:
            self.send(BEGIN, [])
            self._on_ready()
        elif answer := self._greeting.data_to_send():
            self.send(answer, [])

    def _deliver(self) -> None:
        while self._is_open:  # Bound: what one read holds
            before: list[FileDescriptor] = self._parser.fds
            try:
                message = self._parser.get_next_message()
                is_absurd = message is None and self._parser.bytes_desired() > MESSAGE_BYTES_MAX
            except Exception:  # noqa: BLE001  (jeepney asserts, unpacks and indexes what it reads)
                self._end()
                return
            if is_absurd or len(self._parser.fds) > FDS_MAX:
                self._end()
                return
            if message is None:
                return
            self._on_message(message)
            _drop_all(before[: len(before) - len(self._parser.fds)])


def connect(address: str) -> socket.socket | None:
    """Return a socket connected to the first bus of an address list that can be reached."""
    for name in socket_names(address):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            made.connect(name)
        except (OSError, ValueError):
            made.close()
        else:
            return made
    return None


def socket_names(address: str) -> list[bytes]:
    """Return the unix sockets of "unix:path=/run/x,guid=..;unix:abstract=..", escapes undone."""
    names: list[bytes] = []
    for one in address.split(";"):
        transport, _, words = one.partition(":")
        keys = dict(word.partition("=")[::2] for word in words.split(","))
        if transport == "unix" and keys.get("path"):
            names.append(unquote_to_bytes(keys["path"]))
        elif transport == "unix" and keys.get("abstract"):
            names.append(b"\0" + unquote_to_bytes(keys["abstract"]))
    return names


def dup_all(fds: Iterable[int]) -> list[int]:
    """Return duplicates of all.

    Raises:
        OSError: one is not open, or there is no room; then none was duplicated.
    """
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))  # noqa: PERF401  (what was made so far is closed below)
    except OSError:
        _close_all(copies)
        raise
    return copies


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _drop_all(fds: Iterable[FileDescriptor]) -> None:
    """Close what nobody has taken."""
    for fd in fds:
        with contextlib.suppress(NoFDError):
            fd.close()
