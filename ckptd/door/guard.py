"""The door: bounds connections per uid and answers handshakes, in one small thread.

libzmq calls abort(3) when accept(2) on an ipc socket meets the limit of descriptors, so anybody
who may connect could end the daemon by connecting often enough. The guard hears of each accepted
descriptor, asks the kernel whose it is, and shuts down what is over the bound.
Invariant: this thread owns the monitor and ZAP sockets and touches nothing of the loop's.
Source: libzmq 4.3.5 src/ipc_listener.cpp; zmq_socket_monitor(3). Read next: `server.py`.
"""

import os
import resource
import socket
import struct
import threading
from collections import Counter
from typing import Final

import zmq

from ckptd.door import zap
from ckptd.door.listen import another
from ckptd.host.journal import WARNING, Journal, Kind

EVENTS: Final = int(zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED)
DESCRIPTORS_MIN: Final = 4_096
RECOUNT_EVERY: Final = 64  # refusals; a flood must not make us look at every connection each time
_EVENT: Final = struct.Struct("=HI")  # event, value: a descriptor
_PEERCRED: Final = struct.Struct("3i")  # pid, uid, gid


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one; return it.

    The guard lags behind the accepts by at most the monitor's queue: libzmq's thread stops
    accepting while about 1,000 events are unread. So DESCRIPTORS_MIN is what makes us safe.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class Guard:
    """Counts the connections of each uid by descriptor, and refuses those over the bound."""

    def __init__(self, path: str, *, per_uid: int, total: int, journal: Journal) -> None:
        self._path = path
        self._per_uid = per_uid
        self._total = total
        self._journal = journal
        self._uid_of: dict[int, int] = {}
        self._count: Counter[int] = Counter()
        self._flooding: set[int] = set()
        self.refused = 0

    def on_event(self, event: int, fd: int) -> None:
        """Take one event of the monitor."""
        self._forget(fd)  # its number may have been used before
        if event == zmq.Event.ACCEPTED:
            self._accepted(fd)

    @property
    def open(self) -> int:
        """Return how many connections are open."""
        return len(self._uid_of)

    def _accepted(self, fd: int) -> None:
        """Count a connection, or shut it down. The events lag behind: it may be gone already."""
        with_uid = self._dup(fd)
        if with_uid is None:
            return
        connection, uid = with_uid
        with connection:
            if not self._has_room(uid) and self.refused % RECOUNT_EVERY == 0:
                self._recount(uid)
            if self._has_room(uid):
                self._uid_of[fd] = uid
                self._count[uid] += 1
                return
            self.refused += 1
            self._shut_down(connection)
        if uid not in self._flooding:
            self._flooding.add(uid)
            text = f"uid {uid} has {self._count[uid]} connections open; more are refused"
            self._journal.event(Kind.CLIENT_FLOODING, text, WARNING, uid=uid)

    def _has_room(self, uid: int) -> bool:
        privileged = uid in (0, os.geteuid())
        return self._count[uid] < self._per_uid and (privileged or self.open < self._total)

    def _forget(self, fd: int) -> None:
        uid = self._uid_of.pop(fd, None)
        if uid is not None:
            self._count[uid] -= 1
            if self._count[uid] < self._per_uid // 2:
                self._flooding.discard(uid)

    def _recount(self, uid: int) -> None:
        """Drop what is no longer a connection of `uid`, so that a lost event locks nobody out."""
        for fd in [fd for fd, owner in self._uid_of.items() if owner == uid]:
            with_uid = self._dup(fd)
            if with_uid is None or with_uid[1] != uid:
                self._forget(fd)
            if with_uid is not None:
                with_uid[0].close()

    def _dup(self, fd: int) -> tuple[socket.socket, int] | None:
        """Return a duplicate of one of our connections and its uid; None if it is none of ours.

        The descriptor may have been closed and given to another file meanwhile, a locked one too:
        what is not a connection to our own path is left alone, and nothing of it is kept.
        """
        try:
            connection = another(fd)
        except OSError:
            return None
        try:
            raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
            ours = connection.getsockname() == self._path
        except OSError:
            ours, raw = False, bytes(_PEERCRED.size)
        if not ours:
            connection.close()
            return None
        return connection, int(_PEERCRED.unpack(raw)[1])

    @staticmethod
    def _shut_down(connection: socket.socket) -> None:
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the peer was faster


class Doorkeeper:
    """The thread that serves monitor events and handshakes until the context ends."""

    def __init__(
        self, router: "zmq.Socket[bytes]", guard: Guard, access: zap.Access, journal: Journal
    ) -> None:
        context = router.context
        self._guard = guard
        self._access = access
        self._journal = journal
        self._refused_uids: set[int] = set()
        self.refused = 0
        self._zap = context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind(zap.ENDPOINT)
        router.zap_domain = zap.DOMAIN
        router.monitor("inproc://ckptd-door", EVENTS)
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.linger = 0
        self._monitor.connect("inproc://ckptd-door")
        self._thread = threading.Thread(target=self._serve, name="ckptd-door", daemon=True)

    def start(self) -> None:
        """Start the thread; the sockets are its own from now on."""
        self._thread.start()

    def join(self) -> None:
        """Wait until the thread has seen the end of the context."""
        self._thread.join()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._zap, zmq.POLLIN)
        try:
            while True:  # Bound: the end of the context raises
                for ready, _ in poller.poll():
                    if ready is self._monitor:
                        self._watch()
                    else:
                        self._admit()
        except zmq.ContextTerminated:
            self._monitor.close()
            self._zap.close()

    def _watch(self) -> None:
        event, fd = _EVENT.unpack(self._monitor.recv())
        self._monitor.recv()  # the endpoint, always the same
        self._guard.on_event(event, fd)

    def _admit(self) -> None:
        reply, refused = zap.answer(self._zap.recv_multipart(), self._access)
        self._zap.send_multipart(reply)
        if refused is None:
            return
        self.refused += 1
        if refused.uid not in self._refused_uids and len(self._refused_uids) < 1_000:
            self._refused_uids.add(refused.uid)  # told once: a client tries for ever
            text = f"uid {refused.uid} (pid {refused.pid}) may not connect"
            self._journal.event(Kind.CLIENT_REFUSED, text, WARNING, uid=refused.uid)
