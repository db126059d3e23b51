"""The control socket: bounded, checked requests in, replies out, never a wait.

ROUTER over ipc. What is malformed is answered here and never reaches the loop; who asks is the
kernel's word (see `zap.py`); what they may do is decided by the core.
Invariant: no call blocks; the socket belongs to the loop's thread.
Source: zmq_socket(3) on ROUTER, zmq_getsockopt(3) on ZMQ_FD. Read next: PROTOCOL.md, `loop.py`.
"""

import os
import threading
from collections import Counter
from typing import Final

import msgspec
import zmq

from ckptd.door.guard import DESCRIPTORS_MIN, Doorkeeper, Guard, raise_descriptor_limit
from ckptd.door.listen import Listening, group_of
from ckptd.door.zap import Access, Peer, parse_peer
from ckptd.host.config import Ipc
from ckptd.host.journal import ERROR, WARNING, Journal, Kind
from ckptd.protocol import codec, limits
from ckptd.protocol.errors import BadRequest, CkptdError, Internal
from ckptd.protocol.messages import Message

FRAME_BYTES_MAX: Final = 2 * limits.REQUEST_BYTES_MAX
"""A frame up to here is answered with an error where it is over the bound; beyond it, libzmq
closes the connection before it allocates anything."""
RECEIVE_QUEUE: Final = 128  # messages read ahead per connection; more stay with the sender
SEND_QUEUE: Final = 1_024  # replies kept per connection: more than one turn takes from one peer
BIG_REPLY_BYTES: Final = 4_096  # from here on replies are counted by bytes
UNREAD_BYTES_MAX: Final = 32 << 20  # of big replies over all connections of one uid
HANDSHAKE_MS: Final = 3_000  # a silent connection is closed then
LINGER_MS: Final = 250  # for the last replies at the end
END_S: Final = 2.0  # for libzmq to let go of everything


class Incoming(msgspec.Struct, gc=False):
    """One well-formed request, and the way back to who asked."""

    peer: Peer
    identity: bytes
    delimiter: bool
    request_id: str
    verb: str
    args: Message
    size_bytes: int
    until_mono_ns: int = 0  # where it is parked: when "not yet" must be said

    def again(self, args: Message) -> "Incoming":
        """Return the same request with other arguments, for when it goes on waiting."""
        return msgspec.structs.replace(self, args=args)


class Unread:
    """Bounds the big replies that wait for one uid's clients to read them.

    libzmq bounds a connection's queue by messages, not bytes; a client that asks for pages and
    never reads would otherwise cost SEND_QUEUE times REPLY_BYTES_MAX.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[tuple[zmq.MessageTracker, int]]] = {}

    def has_room(self, uid: int, size_bytes: int) -> bool:
        """Tell whether one more reply may be queued."""
        left = [item for item in self._waiting.pop(uid, []) if not item[0].done]
        if left:
            self._waiting[uid] = left
        return sum(size for _, size in left) + size_bytes <= UNREAD_BYTES_MAX

    def add(self, uid: int, tracker: zmq.MessageTracker, size_bytes: int) -> None:
        """Count a reply until libzmq has let go of it."""
        self._waiting.setdefault(uid, []).append((tracker, size_bytes))


class _Named(msgspec.Struct):
    """As much of a request as is needed to name it in an error."""

    id: str = ""


_named = msgspec.json.Decoder(_Named)


class Server:
    """The served socket. It owns what `listen.py` found or made, and closes it."""

    def __init__(self, listening: Listening, ipc: Ipc, journal: Journal) -> None:
        """Start to serve. Raises Internal where libzmq does not take the socket."""
        self._journal = journal
        self._ipc = ipc
        self._listening = listening
        self._is_unheard = False  # the path was lost, and is not served again yet
        self._peers: dict[str, Peer] = {}
        self._unread = Unread()
        self.counters: Counter[str] = Counter()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        _set_bounds(self._socket)
        descriptors = raise_descriptor_limit()
        if descriptors < DESCRIPTORS_MIN:
            text = f"{descriptors} open files are too few to stand a flood of connections"
            journal.note(f"{text}; set LimitNOFILE to {DESCRIPTORS_MIN} or more", WARNING)
        total = max(16, (descriptors - DESCRIPTORS_MIN // 2) // 2)
        guard = Guard(listening.path, per_uid=ipc.connections_per_uid, total=total, journal=journal)
        self._guard = guard
        self.access = Access(os.geteuid(), group_of(ipc))
        self._door = Doorkeeper(self._socket, guard, self.access, journal)
        self._door.start()
        try:
            self._serve()
        except Internal:
            self.close()
            raise
        self._fd = int(self._socket.getsockopt(zmq.FD))

    def _serve(self) -> None:
        """Have libzmq take connections from the listening socket. Raises Internal."""
        path = self._listening.path
        self._socket.setsockopt(zmq.USE_FD, self._listening.copy())
        try:
            self._socket.bind(f"ipc://{path}")
        except zmq.ZMQError as error:
            raise Internal(f"cannot serve {path}: {error.strerror}") from error

    def look_at_path(self) -> None:
        """Bind again where a cleaner of /tmp or a logout took the path away.

        libzmq keeps the old socket: without it, those who are connected would be cut off.
        """
        if not (self._listening.is_lost or self._is_unheard):
            return
        path = self._listening.path
        try:
            if self._listening.is_lost:
                self._listening.renew(self._ipc, self._journal)
            self._serve()
        except (OSError, CkptdError) as wrong:
            if not self._is_unheard:
                self._journal.note(f"{path} is gone, nobody can reach us: {wrong}", ERROR)
            self._is_unheard = True
            return
        self._is_unheard = False
        text = f"{path} had been removed: made again; what else lay there comes with a restart"
        self._journal.note(text, WARNING)

    def fileno(self) -> int:
        """Return the descriptor to poll. It is edge-triggered: ask `pending` before you sleep."""
        return self._fd

    def pending(self) -> bool:
        """Tell whether a request waits. Call it after the last receive *and* the last send."""
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def receive(self, limit: int) -> list[Incoming]:
        """Return up to `limit` requests; malformed ones are answered here and count, too."""
        found: list[Incoming] = []
        for _ in range(limit):
            try:
                identity = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            if (incoming := self._read(identity)) is not None:
                found.append(incoming)
        self.counters["requests"] += len(found)
        return found

    def send(self, incoming: Incoming, frame: bytes) -> None:
        """Queue a reply. A peer that is gone or does not read loses it, and asks again."""
        if len(frame) < BIG_REPLY_BYTES:
            self._reply(incoming.identity, frame, delimiter=incoming.delimiter)
        elif self._unread.has_room(incoming.peer.uid, len(frame)):
            tracker = self._reply(
                incoming.identity, frame, delimiter=incoming.delimiter, track=True
            )
            if tracker is not None:
                self._unread.add(incoming.peer.uid, tracker, len(frame))
        else:
            self.counters["replies_dropped_slow"] += 1

    def stats(self) -> dict[str, int]:
        """Return the counters, those of the door included."""
        return {
            **self.counters,
            "connections": self._guard.open,
            "connections_refused": self._guard.refused,
            "handshakes_refused": self._door.refused,
        }

    def close(self) -> None:
        """Send what is queued, within LINGER_MS, then let go of the socket.

        Bound: END_S. Where a peer left in the middle of its handshake, libzmq 4.3.5 may wait for
        ever for the end of that session; the process is about to end anyway.
        """
        self._socket.close(linger=LINGER_MS)
        ending = threading.Thread(target=self._context.term, name="ckptd-end", daemon=True)
        ending.start()
        ending.join(END_S)
        if not ending.is_alive():
            self._door.join()
        self._listening.close()

    def _read(self, identity: bytes) -> Incoming | None:
        """Read the rest of one message; it is all there once its first frame is."""
        frame = self._socket.recv(zmq.NOBLOCK, copy=False)
        delimiter = frame.more and len(frame) == 0
        if delimiter:
            frame = self._socket.recv(zmq.NOBLOCK, copy=False)
        if frame.more:
            self._drop_rest()
            bad = BadRequest("a request is one frame, not several", "see PROTOCOL.md")
            self._refuse(identity, b"", bad, delimiter=delimiter)
            return None
        body = frame.buffer
        try:
            request = codec.decode_request(body)
            args = codec.decode_args(request)
        except CkptdError as error:
            self._refuse(identity, body, error, delimiter=delimiter)
            return None
        except Exception as bug:  # noqa: BLE001  # no frame may end the daemon, whatever we forgot
            self._journal.event(Kind.CLIENT_MALFORMED, f"cannot read a request: {bug!r}", ERROR)
            bad = BadRequest(f"not a request: {bug!r}", "see PROTOCOL.md")
            self._refuse(identity, b"", bad, delimiter=delimiter)
            return None
        peer = self._peer(frame)
        size = len(frame)
        return Incoming(peer, identity, delimiter, request.id, request.verb, args, size)

    def _peer(self, frame: zmq.Frame) -> Peer:
        address = str(frame.get("Peer-Address"))
        peer = self._peers.get(address)
        if peer is None:
            peer = parse_peer(address)
            assert peer is not None, "ZAP admits ipc peers only"
            if len(self._peers) >= 4_096:  # Bound: pids come and go
                self._peers.clear()
            self._peers[address] = peer
        return peer

    def _drop_rest(self) -> None:
        """Read a message's further frames away. Bound: libzmq hands over whole messages only."""
        while self._socket.recv(zmq.NOBLOCK, copy=False).more:
            self.counters["frames_dropped"] += 1

    def _refuse(
        self, identity: bytes, body: bytes | memoryview, error: CkptdError, *, delimiter: bool
    ) -> None:
        self.counters["malformed"] += 1
        frame = codec.encode_error(_request_id(body), error)
        self._reply(identity, frame, delimiter=delimiter)

    def _reply(
        self, identity: bytes, frame: bytes, *, delimiter: bool, track: bool = False
    ) -> zmq.MessageTracker | None:
        try:
            # Only the first frame can be refused: the others belong to it.
            self._socket.send(identity, zmq.SNDMORE | zmq.NOBLOCK)
            if delimiter:
                self._socket.send(b"", zmq.SNDMORE | zmq.NOBLOCK)
            tracker = self._socket.send(frame, zmq.NOBLOCK, copy=not track, track=track)
        except zmq.Again:
            self.counters["replies_dropped_slow"] += 1
            return None
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.counters["replies_dropped_gone"] += 1
            return None
        self.counters["replies"] += 1
        return tracker


def _set_bounds(router: "zmq.Socket[bytes]") -> None:
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # tell us of lost replies, so that they are counted
    router.setsockopt(zmq.SNDHWM, SEND_QUEUE)
    router.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE)
    router.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
    router.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    router.copy_threshold = BIG_REPLY_BYTES  # what is sent uncopied can be tracked


def _request_id(body: bytes | memoryview) -> str:
    """Return the id that a refused request carried, as far as it can be read."""
    try:
        name = _named.decode(body).id
    except codec.UNREADABLE:
        return ""
    return name if len(name) <= 64 else ""
