"""Blocking client: one DEALER socket, one request at a time, resent under the same id.

A daemon that restarts in the middle of a request costs the caller nothing but time: libzmq
reconnects, the socket's monitor says so, and the request goes out again at once; a timer resends
where a reply was lost without a disconnect. It knows no verbs and prints nothing.
Invariant: a request keeps its id over all resends, so a change is made once (PROTOCOL.md).
Read next: `ckptd/protocol/messages.py`, `ckptctl/call.py`.
"""

import errno
import os
import socket
import struct
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TypeVar

import zmq

from ckptd.home import home
from ckptd.protocol import codec, limits
from ckptd.protocol.errors import (
    BadRequest,
    CkptdError,
    Denied,
    ErrorReply,
    ProtocolMismatch,
    TimedOut,
    Unreachable,
    all_errors,
)
from ckptd.protocol.messages import Answer, Message, Reply

A = TypeVar("A", bound=Answer)

TIMEOUT_S: Final = 10.0
RESEND_S: Final = 2.0  # fallback only; a restart is noticed by the monitor
RECONNECT_MS: Final = 20
RECONNECT_MS_MAX: Final = 500
# Not libzmq's -1: with that an answer that was received is dropped as the connection ends.
RECONNECT_NEVER_MS: Final = 86_400_000
SYSTEM_SOCKET: Final = "/run/ckptd/ctl.sock"
NEVER_RESENT: Final = frozenset({"shutdown"})  # a resend would stop the next daemon as well
BOOTED: Final = "/run/systemd/system"  # Source: sd_booted(3)

_EVENTS: Final = int(
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_ERRORS: Final = {error.code: error for error in all_errors()}


def start_hint(booted: str = BOOTED) -> str:
    """Return how a daemon is started on this machine."""
    system = ", or the system's with `systemctl start ckptd`" if os.path.isdir(booted) else ""
    return (
        f"start one of your own with `ckptd`{system};"
        " for another socket use --endpoint or CKPTD_ENDPOINT"
    )


def user_socket() -> str:
    """Return the path of the control socket of a daemon that this user runs for themselves."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime:
        return os.path.join(runtime, "ckptd", "ctl.sock")
    state = os.environ.get("XDG_STATE_HOME") or os.path.join(home(), ".local", "state")
    return os.path.join(state, "ckptd", "run", "ctl.sock")


def find_endpoint(given: str = "") -> str:
    """Return the endpoint to talk to: the given one, CKPTD_ENDPOINT, or the socket that exists.

    The user's own daemon comes before the system's; root asks the system's first.
    """
    chosen = given or os.environ.get("CKPTD_ENDPOINT", "")
    if not chosen:
        paths = [user_socket(), SYSTEM_SOCKET]
        if os.geteuid() == 0:
            paths.reverse()
        chosen = next((path for path in paths if os.path.exists(path)), paths[0])
    return chosen if "://" in chosen else f"ipc://{os.path.abspath(chosen)}"


def as_error(reply: ErrorReply) -> CkptdError:
    """Return the exception of the wire form; an unknown code keeps its own exit code."""
    error = _ERRORS.get(reply.code, CkptdError)(reply.message, reply.hint)
    if error.code != reply.code:
        error.code = reply.code  # type: ignore[misc]
        error.exit_code = reply.exit_code  # type: ignore[misc]
        error.retryable = reply.retryable  # type: ignore[misc]
    return error


class Client:
    """A conversation with one daemon. Not for use by several threads at once.

    `notice` hears when the daemon is lost and found again during a patient call. One that does
    not reconnect cannot start the next daemon by its socket (ckptd.socket); it waits out
    `timeout_s` where nobody is there.
    """

    def __init__(
        self,
        endpoint: str,
        timeout_s: float = TIMEOUT_S,
        notice: Callable[[str], None] | None = None,
        resend_s: float = RESEND_S,
        *,
        reconnects: bool = True,
    ) -> None:
        self.endpoint = endpoint
        self.timeout_s = timeout_s
        self.resend_s = resend_s
        self._notice = notice or (lambda _text: None)
        self._met = False  # a handshake succeeded once
        self._connected = False
        self._lost = False  # told so, not yet told that it is back
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.set(zmq.RECONNECT_IVL, RECONNECT_MS if reconnects else RECONNECT_NEVER_MS)
        self._socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX if reconnects else 0)
        self._socket.set(zmq.MAXMSGSIZE, 2 * limits.REPLY_BYTES_MAX)
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            self._socket.connect(endpoint)
        except (zmq.ZMQError, UnicodeEncodeError) as bad:  # zmq takes UTF-8 alone
            self.close()
            raise _unusable(endpoint, bad) from bad

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection; what was not sent yet is forgotten."""
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        self._context.term()

    def call(
        self,
        verb: str,
        args: Message,
        kind: type[A],
        *,
        patient: bool = False,
        until_mono_s: float = float("inf"),
    ) -> A:
        """Ask and return the typed answer.

        A patient call outlives the daemon for as long as it takes, once it was met. Past
        `until_mono_s` (time.monotonic) it raises TimedOut; where nobody answers, Unreachable; and
        whatever the daemon says no with.
        """
        request_id = os.urandom(12).hex()
        frame = codec.encode_request(request_id, verb, args)
        hold_s = float(getattr(args, "hold_s", 0.0))
        give_up = time.monotonic() + hold_s + self.timeout_s
        self._send(frame)
        may_resend = verb not in NEVER_RESENT
        resend = time.monotonic() + hold_s + self.resend_s
        while True:  # Bound: ends at give_up or until_mono_s; a patient call ends with an answer
            limit = until_mono_s if patient and self._met else min(give_up, until_mono_s)
            reply, is_back = self._hear(request_id, min(limit, resend), patient=patient)
            if reply is not None:
                return self._open(reply, kind)
            now = time.monotonic()
            if now >= limit:
                raise self._silence(verb, timed_out=limit == until_mono_s)
            if not may_resend and self._met and (is_back or not self._connected):
                raise Unreachable(f"the daemon went away before it answered `{verb}`")
            if may_resend and (is_back or (now >= resend and self._connected)):
                self._send(frame)
                resend = now + hold_s + self.resend_s
            elif now >= resend:
                resend = now + self.resend_s

    def until_gone(self, timeout_s: float | None = None) -> bool:
        """Wait until the daemon closed the connection. Returns False after the timeout."""
        limit = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        while self._connected and time.monotonic() < limit:
            self._hear("", limit, patient=False)
        return not self._connected

    def _send(self, frame: bytes) -> None:
        try:
            self._socket.send(frame, zmq.DONTWAIT)
        except zmq.Again:
            return  # queue full of resends while nobody listens; the next reconnect sends again

    def _hear(self, request_id: str, limit: float, *, patient: bool) -> tuple[Reply | None, bool]:
        """Wait for news until `limit`; return the reply if any, and whether the peer is back."""
        left_s = max(0.0, min(limit - time.monotonic(), 3600.0))
        ready = dict(self._poller.poll(int(left_s * 1000) + 1))
        is_back = self._watch(patient=patient) if self._monitor in ready else False
        while _is_readable(self._socket):  # also what came since that look: the last before an end
            frames = self._socket.recv_multipart(zmq.DONTWAIT)
            reply = codec.decode_reply(frames[-1])
            if reply.id == request_id:
                return reply, is_back
        return None, is_back  # answers to earlier requests, resent and answered twice, fall here

    def _watch(self, *, patient: bool) -> bool:
        """Take in the connection's news; return whether it was made anew after a loss."""
        is_back = False
        while _is_readable(self._monitor):
            event, _value = struct.unpack("=hi", self._monitor.recv_multipart(copy=True)[0])
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                is_back = is_back or self._met
                self._met = self._connected = True
                if self._lost:
                    self._lost = False
                    self._notice("the daemon is back")
            elif event == zmq.EVENT_DISCONNECTED:
                self._connected = False
                if patient and self._met and not self._lost:
                    self._lost = True
                    self._notice("the daemon went away; waiting for it to come back")
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise Denied(f"the daemon at {self.endpoint} refuses this user")
            elif not self._met and not self._has_listener():  # else a daemon dies or starts there
                raise self._refused()
        return is_back

    def _has_listener(self) -> bool:
        path = self.endpoint.removeprefix("ipc://")
        return path != self.endpoint and _is_listened_to(path)

    def _refused(self) -> CkptdError:
        path = self.endpoint.removeprefix("ipc://")
        if path != self.endpoint and os.path.exists(path) and not os.access(path, os.W_OK):
            return Denied(
                f"no permission to talk to {path}",
                "ask to be added to the group that owns it, or run your own `ckptd`",
            )
        if self._has_listener():
            return Unreachable(
                f"a daemon is at {path}, but it does not take the connection up: busy, or hung",
                "nothing was sent; look at the daemon, or wait longer with --answer-within",
            )
        return Unreachable(f"no daemon answers at {path}", start_hint())

    def _silence(self, verb: str, *, timed_out: bool) -> CkptdError:
        if timed_out:
            how = f"did not answer `{verb}`" if self._connected else "was away"
            return TimedOut(f"the time limit ran out while the daemon {how}", "the tasks go on")
        if not self._connected:
            return self._refused()
        return Unreachable(
            f"the daemon at {self.endpoint} did not answer `{verb}` within {self.timeout_s:g} s",
            "the request may still be carried out: look with `ckptctl status`;"
            " a longer --answer-within waits more",
        )

    @staticmethod
    def _open(reply: Reply, kind: type[A]) -> A:
        if reply.ok:
            return codec.decode_result(reply, kind)
        if reply.error is None:
            raise ProtocolMismatch("the daemon's answer is neither a result nor an error")
        raise as_error(reply.error)


def _unusable(endpoint: str, bad: zmq.ZMQError | UnicodeEncodeError) -> CkptdError:
    """Return what to say of an endpoint: one that is none stays so, however often it is tried."""
    number = bad.errno if isinstance(bad, zmq.ZMQError) else errno.EINVAL
    shown = endpoint if endpoint.isprintable() else repr(endpoint)
    text = f"cannot use the endpoint {shown}: {zmq.strerror(number or 0).lower()}"
    if number in (errno.EINVAL, errno.EPROTONOSUPPORT, errno.ENAMETOOLONG):
        return BadRequest(text, "--endpoint or CKPTD_ENDPOINT: the path of a daemon's socket")
    return Unreachable(text, start_hint())


def _is_listened_to(path: str) -> bool:
    """Tell whether a process holds the listening socket, whether or not it is well."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True  # its queue of connections is full
        except OSError:
            return False
    return True


def _is_readable(peer: zmq.SyncSocket) -> bool:
    return bool(int(peer.get(zmq.EVENTS)) & zmq.POLLIN)
