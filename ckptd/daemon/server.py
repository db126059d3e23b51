"""The control socket: bounded, checked requests in, replies out, never a wait.

ROUTER over ipc. What is malformed is answered here and never reaches the loop; who asks is the
kernel's word (see `zap.py`); what they may do is decided by the core.
Invariant: no call blocks; the socket belongs to the loop's thread.
Source: zmq_socket(3) on ROUTER, zmq_getsockopt(3) on ZMQ_FD. Read next: PROTOCOL.md, `loop.py`.
"""

import contextlib
import grp
import os
import socket
import stat
import threading
from collections import Counter
from collections.abc import MutableMapping
from typing import Final

import msgspec
import zmq

from ckptd.daemon import paths
from ckptd.daemon.config import Ipc
from ckptd.daemon.guard import DESCRIPTORS_MIN, Doorkeeper, Guard, raise_descriptor_limit
from ckptd.daemon.journal import ERROR, WARNING, Journal, Kind
from ckptd.daemon.zap import Access, Peer, parse_peer
from ckptd.protocol import codec, limits
from ckptd.protocol.errors import BadRequest, Busy, CkptdError, Internal
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
LISTEN_FD: Final = 3  # SD_LISTEN_FDS_START


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
    """The bound socket. Construct it after the store is locked: the lock owns the path."""

    def __init__(self, path: str, ipc: Ipc, journal: Journal, listen_fd: int | None = None) -> None:
        """Bind and start to listen.

        Raises Busy where another process answers at `path`, Internal where it cannot be bound.
        """
        self._journal = journal
        self._made = ""  # the path, once bound by us: what systemd made is not ours to remove
        self._peers: dict[str, Peer] = {}
        self._unread = Unread()
        self.counters: Counter[str] = Counter()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        _set_bounds(self._socket)
        group = ipc.group if os.geteuid() == 0 else ""  # a user's daemon serves that user alone
        descriptors = raise_descriptor_limit()
        if descriptors < DESCRIPTORS_MIN:
            text = f"{descriptors} open files are too few to stand a flood of connections"
            journal.note(f"{text}; set LimitNOFILE to {DESCRIPTORS_MIN} or more", WARNING)
        total = max(16, (descriptors - DESCRIPTORS_MIN // 2) // 2)
        guard = Guard(path, per_uid=ipc.connections_per_uid, total=total, journal=journal)
        self._guard = guard
        self._door = Doorkeeper(self._socket, guard, Access(os.geteuid(), group), journal)
        self._door.start()
        try:
            self._bind(path, ipc, group, listen_fd)
        except BaseException:
            self.close()
            raise
        self._fd = int(self._socket.getsockopt(zmq.FD))

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
        """Send what is queued, within LINGER_MS, then let go of the path.

        Bound: END_S. Where a peer left in the middle of its handshake, libzmq 4.3.5 may wait for
        ever for the end of that session; the process is about to end anyway.
        """
        self._socket.close(linger=LINGER_MS)
        ending = threading.Thread(target=self._context.term, name="ckptd-end", daemon=True)
        ending.start()
        ending.join(END_S)
        if not ending.is_alive():
            self._door.join()
        if self._made:
            with contextlib.suppress(OSError):  # libzmq may have done so; a next start would, too
                os.unlink(self._made)

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

    def _bind(self, path: str, ipc: Ipc, group: str, listen_fd: int | None) -> None:
        if listen_fd is not None:
            _check_listening(listen_fd, path)
            self._socket.setsockopt(zmq.USE_FD, listen_fd)
        else:
            clear_path(path)
        before = os.umask(0o177)
        try:
            self._socket.bind(f"ipc://{path}")
        except zmq.ZMQError as error:
            raise Internal(f"cannot bind {path}: {error.strerror}") from error
        finally:
            os.umask(before)
        if listen_fd is None:
            self._made = path
            self._open_to(path, int(ipc.mode, 8), group)

    def _open_to(self, path: str, mode: int, group: str) -> None:
        """Let the group in; until here only the daemon's own uid could connect."""
        if os.geteuid() != 0:
            os.chmod(path, mode & 0o700)
            return
        if group:
            try:
                os.chown(path, -1, grp.getgrnam(group).gr_gid)
            except KeyError:
                text = f"there is no group {group!r}: only root may use {path}"
                self._journal.event(Kind.NOTE, text, WARNING)
        os.chmod(path, mode)


def _set_bounds(router: "zmq.Socket[bytes]") -> None:
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # tell us of lost replies, so that they are counted
    router.setsockopt(zmq.SNDHWM, SEND_QUEUE)
    router.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE)
    router.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
    router.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    router.setsockopt(zmq.BACKLOG, 1_024)
    router.copy_threshold = BIG_REPLY_BYTES  # what is sent uncopied can be tracked


def _request_id(body: bytes | memoryview) -> str:
    """Return the id that a refused request carried, as far as it can be read."""
    try:
        name = _named.decode(body).id
    except codec.UNREADABLE:
        return ""
    return name if len(name) <= 64 else ""


def clear_path(path: str) -> None:
    """Make room for the socket: create its directory, remove what a dead daemon left behind.

    Raises Busy where somebody answers, Internal where the path cannot be used. The caller holds
    the store's lock, so that nobody else clears the same path.
    """
    size = len(os.fsencode(path))
    if size > paths.SOCKET_PATH_BYTES_MAX:
        raise Internal(
            f"socket path of {size} bytes is over {paths.SOCKET_PATH_BYTES_MAX}: {path}",
            "set a shorter daemon.run_dir",
        )
    # 0711: tasks reach their notify sockets below without seeing each other's names.
    os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Internal(f"{path} is in the way and no socket; it was left alone", "move it")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        os.unlink(path)
        return
    except OSError as error:
        raise Internal(f"cannot use {path}: {error.strerror}", "remove it") from error
    raise Busy(f"another process answers at {path}", "stop it, or set another daemon.run_dir")


def _check_listening(fd: int, path: str) -> None:
    with socket.socket(fileno=os.dup(fd)) as handed_over:
        where = handed_over.getsockname()
        listens = handed_over.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if where != path or not listens:
        raise Internal(
            f"systemd handed over a socket at {where!r}, but this daemon's is {path}",
            "let ListenStream= and daemon.run_dir name the same place",
        )


def take_listen_fd(env: MutableMapping[str, str]) -> int | None:
    """Return a copy of the socket that systemd listens on for us, None without activation.

    Removes the variables, so that no child believes they are meant for it. The original stays
    open: libzmq closes the copy. Source: sd_listen_fds(3).
    """
    pid, count = env.pop("LISTEN_PID", ""), env.pop("LISTEN_FDS", "")
    env.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or count in ("", "0"):
        return None
    if count != "1":
        raise Internal(f"systemd handed {count} sockets over, one is expected")
    os.set_inheritable(LISTEN_FD, False)
    copy = os.dup(LISTEN_FD)
    os.set_blocking(copy, False)
    return copy
