"""The daemon's end of the supervisors: the warm parent, a socket per supervisor, who is idle.

It does not know what the messages mean (`fork.py` does) nor what happens at the other end
(`shim.py`). A parent that was killed is started again when the next supervisor is needed; the
supervisors it made do not notice.
"""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Container
from functools import partial

from ckptd.runner import identity, shim, stop
from ckptd.runner.cgroup import Roots
from ckptd.runner.watch import Watch

IDLE_MAX = 8  # supervisors kept between attempts, about half a MiB each
RUNS_MAX = 10_000  # attempts after which a supervisor is replaced by a fresh one
MESSAGE_BYTES_MAX = 8_192  # an exit record and its letter fit twice
_PARENT_ENDS_S = 10.0
_PARENT_HEARS_S = 2.0  # longer than any queue of forks takes: it is stopped

STARTED, ENDED, FENCED, DIED = b"S", b"E", b"F", b""  # kinds of message; the last is none: silence

Key = tuple[int, int]  # (task, attempt)
Said = Callable[[Key, bytes, bytes], None]  # which attempt, kind, body


class Link:
    """The socket to one supervisor. Its end of file is the supervisor's death."""

    __slots__ = ("is_worn", "key", "runs", "socket")

    def __init__(self, near: socket.socket) -> None:
        self.socket = near
        self.key: Key | None = None  # the attempt that it was given
        self.runs = 0
        self.is_worn = False  # not to be used for another attempt

    def send(self, order: bytes) -> bool:
        """Hand over an order; False where nobody is there to take it."""
        try:
            if len(order) <= shim.ORDER_BYTES_MAX:
                self.socket.send(order)
            else:
                self._send_long(order)
        except OSError:
            return False
        self.runs += 1
        return True

    def _send_long(self, order: bytes) -> None:
        fd = os.memfd_create("ckptd-order")
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(order)
            os.lseek(fd, 0, os.SEEK_SET)
            socket.send_fds(self.socket, [b"L"], [fd])
        finally:
            os.close(fd)

    def receive(self) -> bytes | None:
        """Return the next message, b"" once the supervisor is dead, None where there is none."""
        try:
            return self.socket.recv(MESSAGE_BYTES_MAX, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return b""


class Pool:
    """The warm parent, the links to its supervisors, and which of them have nothing to do."""

    def __init__(
        self, state_dir: str, boot_id: str, roots: Roots, watch: Watch, said: Said
    ) -> None:
        self._arguments = [state_dir, boot_id, roots.unified, roots.memory, roots.freezer]
        self._watch = watch
        self._said = said
        self._parent: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._idle: list[Link] = []

    def warm(self, count: int) -> None:
        """Make supervisors before they are needed; they come up by themselves."""
        with contextlib.suppress(OSError):  # they are made when they are needed
            for _ in range(count):
                self._idle.append(self._make())

    def hand_over(self, key: Key, order: bytes) -> Link:
        """Give an order to a supervisor with nothing to do.

        One that is just being made reads it once it is up.

        Raises:
            OSError: none can be had now, and none has the order: no descriptors or no processes
                are left.
        """
        for _ in range(IDLE_MAX + 1):  # Bound: all idle ones may have died
            link = self._idle.pop() if self._idle else self._make()
            link.key = key
            if link.send(order):
                return link
            self._drop(link)
        raise shortage()

    def signal_stopped(self, number: int, spared: Container[int]) -> None:
        """Signal the parent and its supervisors that stand still, but none of the `spared`.

        An order can lie with one of them, unread, and nobody knows with which.
        """
        parent = self._parent.pid if self._parent is not None else 0
        for pid in identity.every_pid() if parent else []:
            stat = identity.look(pid)
            if stat and stat.is_stopped and parent in {pid, stat.parent} and pid not in spared:
                stop.send(pid, stat.ticks, number)

    def _hear(self, link: Link) -> None:
        message = link.receive()
        if message is None:
            return
        key, kind = link.key, message[:1]
        if kind == DIED:
            self._drop(link)
        elif kind in {ENDED, FENCED}:
            self._free(link)
        if key is not None:
            self._said(key, kind, message[1:])

    def _free(self, link: Link) -> None:
        link.key = None
        if len(self._idle) < IDLE_MAX and link.runs < RUNS_MAX and not link.is_worn:
            self._idle.append(link)
        else:
            self._drop(link)  # it exits

    def _drop(self, link: Link) -> None:
        if link in self._idle:
            self._idle.remove(link)
        self._watch.remove(link.socket.fileno())
        link.socket.close()

    def _make(self) -> Link:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            for _ in range(2):  # Bound: a parent that was killed is replaced once
                control = self._control or self._start_parent()
                try:
                    socket.send_fds(control, [b"fork"], [far.fileno()])
                    break
                except OSError:
                    self._drop_parent()
        # What the parent did not get has no other end: the first message finds that out.
        link = Link(near)
        self._watch.add(near.fileno(), partial(self._hear, link))
        return link

    def close(self) -> None:
        """Hang up on the parent and all idle supervisors."""
        for link in self._idle:
            link.socket.close()
        self._idle.clear()
        self._drop_parent()

    def _start_parent(self) -> socket.socket:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-I", "-S", "-X", "utf8", shim.__file__, str(far.fileno())]
        with far:
            self._parent = subprocess.Popen(
                [*command, *self._arguments],
                cwd="/",
                env={"LD_BIND_NOW": "1"},  # else every child looks up the same symbols again
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # nothing of the daemon's is held open by supervisors
                stderr=subprocess.DEVNULL,
                pass_fds=(far.fileno(),),
                start_new_session=True,
            )
        near.settimeout(_PARENT_HEARS_S)
        self._control = near
        return near

    def _drop_parent(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._parent is not None:
            self._parent.send_signal(signal.SIGCONT)  # stopped, it would not see us hang up
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._parent.wait(_PARENT_ENDS_S)
            self._parent = None


def shortage() -> OSError:
    """Return what fork(2) says where no process is left; it is worth another try later."""
    return OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
