"""A message bus on the runner's own epoll: calls with replies, signals, descriptors both ways.

jeepney knows the bytes of D-Bus, this file knows the connection: when it is up, what waits for a
reply, and what is asked again after it was lost. It knows nothing of systemd.

Invariant: whatever the bus sends, nothing is raised into the loop; a connection that sends what
cannot be read is dropped and made again. `then` is never called from inside `call`.
Read next: `wire.py`, `systemd.py`.
"""

import os
import struct
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from jeepney import DBus, HeaderFields, Message, MessageFlag, MessageType

from ckptd.runner.watch import Watch
from ckptd.units.wire import Wire, connect, dup_all

CALL_S = 25.0  # what libdbus and sd-bus allow a call; also for a connection to be made
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.1, 5.0
# Source: dbus-daemon(1) gives a client of the system bus 128 replies to wait for, and a receiver
# 64 descriptors in its queue; more is refused with LimitsExceeded, so the rest waits here.
CALLS_IN_FLIGHT_MAX = 100
FDS_IN_FLIGHT_MAX = 32
DISCONNECTED = "ckptd.Disconnected"  # not sent, or sent and the outcome is unknown
NO_REPLY = "ckptd.NoReply"  # sent, nothing came within CALL_S; the outcome is unknown
UNSENDABLE = "ckptd.Unsendable"  # D-Bus cannot carry it: NUL, lone surrogate, number out of range
BUS_NAME, BUS_PATH = "org.freedesktop.DBus", "/org/freedesktop/DBus"
_SOON_S = 0.0001


class Reply(NamedTuple):
    """What became of a call; descriptors in `body` live until `then` returns, unless taken."""

    body: tuple[Any, ...] = ()
    error: str = ""  # "": it succeeded; else the D-Bus name of what went wrong, or one of the above
    text: str = ""  # the same for people
    number: int = 0  # errno of what this side had not enough of, to send it
    is_unsent: bool = False  # DISCONNECTED before it left this process


class Rule(NamedTuple):
    """Which signals: of whom (a well-known name), of which interface and member."""

    sender: str
    path: str
    interface: str
    member: str
    arg0: str = ""

    @property
    def text(self) -> str:
        """The rule as AddMatch takes it."""
        words = zip(self._fields, self, strict=True)
        return "type='signal'," + ",".join(f"{key}='{value}'" for key, value in words if value)


Then = Callable[[Reply], None]
Handler = Callable[[tuple[Any, ...]], None]


class _Call(NamedTuple):
    serial: int
    data: bytes
    fds: list[int]  # ours, until the wire has them
    then: Then | None


class Bus:
    """One connection that makes itself again until `close`. Nothing here blocks or raises."""

    def __init__(
        self,
        address: str,
        watch: Watch,
        on_up: Callable[[], None],
        on_down: Callable[[], None],
        *,
        call_s: float = CALL_S,
    ) -> None:
        self.is_up = False
        self._address, self._watch, self._call_s = address, watch, call_s
        self._on_up, self._on_down = on_up, on_down
        self._wire: Wire | None = None
        self._serial = 0
        self._backoff_s = BACKOFF_MIN_S
        self._waiting: deque[_Call] = deque()  # for room in flight
        self._in_flight: dict[int, tuple[float, int, Then]] = {}  # due, descriptors; oldest first
        self._fds_in_flight = 0
        self._is_timing = False  # the one timer of `_in_flight` is set
        self._soon: list[tuple[Then, Reply]] = []
        self._rules: list[tuple[Rule, Handler]] = []
        self._by_member: dict[tuple[str, str], list[tuple[Rule, Handler]]] = {}
        self._owners: dict[str, str] = {BUS_NAME: BUS_NAME}  # well-known name: who has it now
        self._is_closed = False
        self._connect()

    def call(self, message: Message, then: Then) -> None:
        """Send a method call; `then` hears of its end exactly once, whatever happens to the bus.

        Descriptors in it (type h, plain ints) are duplicated: the caller's stay the caller's.
        """
        if not self.is_up:
            text = "the message bus is not connected"
            self._answer_soon(then, Reply((), DISCONNECTED, text, is_unsent=True))
        else:
            self._order(message, then)

    def tell(self, message: Message) -> None:
        """Send a method call whose reply nobody wants; dropped while the bus is down."""
        message.header.flags |= MessageFlag.no_reply_expected
        if self.is_up:
            self._order(message, None)

    def listen(self, rule: Rule, handler: Handler) -> None:
        """Call `handler` with the body of such signals, over all connections to come.

        Only those of the name's owner: a bus delivers what any user sends straight to us.
        """
        if rule.sender not in self._owners:
            self._owners[rule.sender] = ""
            self.listen(owner_rule(rule.sender), self._owner_changed)
        is_new = all(rule != other for other, _ in self._rules)
        self._rules.append((rule, handler))
        key = (rule.interface, rule.member)
        self._by_member.setdefault(key, []).append((rule, handler))
        if self.is_up and is_new:
            self._apply(rule)

    def close(self) -> None:
        """Let go of the connection; what waits for a reply hears nothing any more."""
        self._is_closed, self.is_up = True, False
        self._soon.clear()
        self._drop()

    # -- the connection --

    def _connect(self) -> None:
        if self._is_closed:
            return
        made = connect(self._address)
        if made is None:
            self._retry()
            return
        wire = Wire(made, self._watch, self._greet, self._received, self._lost)
        self._wire = wire
        self._watch.after(self._call_s, partial(self._give_up, wire))

    def _retry(self) -> None:
        self._watch.after(self._backoff_s, self._connect)
        self._backoff_s = min(self._backoff_s * 2, BACKOFF_MAX_S)

    def _give_up(self, wire: Wire) -> None:
        if self._wire is wire and not self.is_up:
            self._lost()

    def _greet(self) -> None:
        self._order(DBus().Hello(), self._greeted)

    def _greeted(self, reply: Reply) -> None:
        if reply.error:
            self._lost()
            return
        self.is_up = True
        self._backoff_s = BACKOFF_MIN_S
        for rule in dict.fromkeys(rule for rule, _ in self._rules):
            self._apply(rule)
        self._on_up()

    def _apply(self, rule: Rule) -> None:
        """Ask for signals. The bus keeps our order, so the owner is known before they come."""
        self.tell(DBus().AddMatch(rule.text))
        if rule.member == "NameOwnerChanged" and rule.arg0 in self._owners:
            self.call(DBus().GetNameOwner(rule.arg0), partial(self._owner_told, rule.arg0))

    def _owner_told(self, name: str, reply: Reply) -> None:
        self._owners[name] = str(reply.body[0]) if reply.body and not reply.error else ""

    def _owner_changed(self, body: tuple[Any, ...]) -> None:
        match body:
            case (str(name), str(), str(owner)) if name in self._owners:
                self._owners[name] = owner

    def _lost(self) -> None:
        """Tell all who wait, then the owner, and try again later; harmless when repeated."""
        if self._wire is None or self._is_closed:
            return
        was_up, self.is_up = self.is_up, False
        text = "the connection to the message bus was lost"
        for then, is_unsent in self._drop():
            then(Reply((), DISCONNECTED, text, is_unsent=is_unsent))
        if was_up and not self._is_closed:
            self._on_down()
        if not self._is_closed:
            self._retry()

    def _drop(self) -> list[tuple[Then, bool]]:
        """Return who waited, and whether their call certainly was not sent."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()
        thens = [(then, False) for _, _, then in self._in_flight.values()]
        for call in self._waiting:
            for fd in call.fds:
                os.close(fd)
            if call.then is not None:
                thens.append((call.then, True))
        self._waiting.clear()
        self._in_flight.clear()
        self._fds_in_flight = 0
        self._owners = {name: name if name == BUS_NAME else "" for name in self._owners}
        return thens

    # -- calls --

    def _order(self, message: Message, then: Then | None) -> None:
        self._serial = self._serial % 0xFFFF_FFFF + 1
        try:
            data, fds = serialised(message, self._serial)
        except (ValueError, struct.error, OSError) as error:
            if then is not None:
                number = getattr(error, "errno", None) or 0
                self._answer_soon(then, Reply((), UNSENDABLE, str(error), number))
            return
        self._waiting.append(_Call(self._serial, data, fds, then))
        self._pump()

    def _pump(self) -> None:
        """Send in the order of the calls, as much as the bus lets one client have in flight."""
        while self._waiting and self._wire is not None:  # Bound: one less each time
            call = self._waiting[0]
            is_full = len(self._in_flight) >= CALLS_IN_FLIGHT_MAX or self._fds_in_flight + len(
                call.fds
            ) > max(FDS_IN_FLIGHT_MAX, len(call.fds))
            if is_full:
                return
            self._waiting.popleft()
            if call.then is not None:
                due = time.monotonic() + self._call_s
                self._in_flight[call.serial] = (due, len(call.fds), call.then)
                self._fds_in_flight += len(call.fds)
                self._set_timer()
            self._wire.send(call.data, call.fds)

    def _set_timer(self) -> None:
        if not self._is_timing and self._in_flight:
            due, _, _ = next(iter(self._in_flight.values()))
            self._is_timing = True
            self._watch.after(max(due - time.monotonic(), _SOON_S), self._expire)

    def _expire(self) -> None:
        self._is_timing = False
        now = time.monotonic()
        late = Reply((), NO_REPLY, f"no reply within {self._call_s:g} s")
        for serial in [s for s, (due, _, _) in self._in_flight.items() if due <= now]:
            self._answer(serial, late)
        self._set_timer()

    def _answer(self, serial: int, reply: Reply) -> None:
        found = self._in_flight.pop(serial, None)
        if found is None:  # it came too late, or nobody asked
            return
        _, fds, then = found
        self._fds_in_flight -= fds
        then(reply)
        self._pump()

    def _answer_soon(self, then: Then, reply: Reply) -> None:
        if not self._soon:
            self._watch.after(_SOON_S, self._answer_now)
        self._soon.append((then, reply))

    def _answer_now(self) -> None:
        soon, self._soon = self._soon, []
        for then, reply in soon:
            then(reply)

    # -- what comes in --

    def _received(self, message: Message) -> None:
        fields, body = message.header.fields, message.body
        kind, serial = message.header.message_type, fields.get(HeaderFields.reply_serial)
        if kind is MessageType.signal:
            self._signal(fields, body)
        elif not isinstance(serial, int):
            return  # a call: we serve nothing
        elif kind is MessageType.method_return:
            self._answer(serial, Reply(body))
        elif kind is MessageType.error:
            name = str(fields.get(HeaderFields.error_name) or "ckptd.Unnamed")
            self._answer(serial, Reply(body, name, str(body[0]) if body else ""))

    def _signal(self, fields: dict[HeaderFields, Any], body: tuple[Any, ...]) -> None:
        key = (str(fields.get(HeaderFields.interface)), str(fields.get(HeaderFields.member)))
        sender = fields.get(HeaderFields.sender)
        for rule, handler in tuple(self._by_member.get(key, ())):
            is_ours = (
                sender
                and sender == self._owners.get(rule.sender)
                and fields.get(HeaderFields.path) == rule.path
                and (not rule.arg0 or (bool(body) and body[0] == rule.arg0))
            )
            if is_ours:
                handler(body)


def owner_rule(name: str) -> Rule:
    """Return the rule for who has a well-known name: body (name, old owner, new owner)."""
    return Rule(BUS_NAME, BUS_PATH, BUS_NAME, "NameOwnerChanged", name)


def serialised(message: Message, serial: int) -> tuple[bytes, list[int]]:
    """Return a message's bytes and duplicates of its descriptors.

    Raises:
        ValueError, struct.error: it holds what D-Bus cannot carry (the bus would hang up on us).
        OSError: no descriptor is left to duplicate one.
    """
    if any("\0" in text for text in _texts(message.body)):
        raise ValueError("a text for the message bus holds a NUL")
    fds = array("i")
    data: bytes = message.serialise(serial=serial, fds=fds)
    return data, dup_all(fds)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, dict):
        yield from _texts(list(value.items()))


def system_bus() -> str:
    """Return the address of the system's bus."""
    return os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or "unix:path=/run/dbus/system_bus_socket"


def user_bus() -> str:
    """Return the address of the bus of this user's service manager."""
    directory = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    return os.environ.get("DBUS_SESSION_BUS_ADDRESS") or f"unix:path={directory}/bus"
