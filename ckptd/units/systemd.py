"""The service manager (PID 1, or systemd --user) as seen over a bus: our units and their news.

It orders and asks; it decides nothing: what a unit's state means is `runner.py`. Only units named
ckptd-task-* exist for it. Nothing blocks or raises; every `then` is called once, never from inside
the call that takes it. Read next: `bus.py`.

Source: org.freedesktop.systemd1(5), org.freedesktop.login1(5).
"""

import errno
import string
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from jeepney import DBusAddress, Message, new_method_call

from ckptd.runner.watch import Watch
from ckptd.units.bus import DISCONNECTED, NO_REPLY, Bus, Reply, Rule, owner_rule

OUR_UNITS = "ckptd-task-"
NO_SUCH_UNIT = "org.freedesktop.systemd1.NoSuchUnit"
UNIT_EXISTS = "org.freedesktop.systemd1.UnitExists"
SUBSCRIBE_AGAIN_S = 1.0
SYSTEMD, LOGIND = "org.freedesktop.systemd1", "org.freedesktop.login1"
SYSTEMD_PATH, LOGIND_PATH = "/org/freedesktop/systemd1", "/org/freedesktop/login1"
MANAGER, LOGIN_MANAGER = f"{SYSTEMD}.Manager", f"{LOGIND}.Manager"
OF_EVERY_UNIT = frozenset(
    {
        "LoadState",
        "ActiveState",
        "SubState",
        "FreezerState",
        "InvocationID",
        "Conditions",
        "ConditionResult",
        "AssertResult",
        "Description",
        "Job",
        "StateChangeTimestamp",
        "StateChangeTimestampMonotonic",
        "ActiveEnterTimestamp",
        "ActiveEnterTimestampMonotonic",
        "ActiveExitTimestamp",
        "ActiveExitTimestampMonotonic",
        "InactiveEnterTimestamp",
        "InactiveEnterTimestampMonotonic",
        "InactiveExitTimestamp",
        "InactiveExitTimestampMonotonic",
    }
)  # of a service otherwise
_MANAGER = DBusAddress(SYSTEMD_PATH, SYSTEMD, MANAGER)
_LOGIN_MANAGER = DBusAddress(LOGIND_PATH, LOGIND, LOGIN_MANAGER)
_PLAIN = frozenset(string.ascii_letters + string.digits)

Properties = Sequence[tuple[str, tuple[str, Any]]]
"""(name, (D-Bus type, value)): ("MemoryMax", ("t", 1 << 30)); type h takes a descriptor."""


class Found(NamedTuple):
    """Properties of a unit; those that this systemd does not have are absent."""

    values: dict[str, Any]
    error: str = ""  # then no values: NO_SUCH_UNIT, or the D-Bus error (bus.DISCONNECTED, ...)


class Row(NamedTuple):
    """A loaded unit: as in `systemctl list-units`."""

    unit: str
    load: str
    active: str
    sub: str


class Listing(NamedTuple):
    """Every unit of ours that is loaded, at one moment."""

    rows: list[Row]
    error: str = ""  # then no rows, and nothing is known


Then = Callable[[Reply], None]


class Manager:
    """Orders to one service manager, and what it tells of our units.

    `on_up`: connected and subscribed, also again after a loss; what happened between is to be
    found out by `listing`. `on_reloaded`: it reloaded or executed itself anew, and news may have
    been missed; may come twice for one. `on_job(unit, result)`: done, failed, canceled, timeout,
    dependency, skipped, ..; `on_new_job(unit)`: somebody ordered something for the unit.
    """

    def __init__(  # noqa: PLR0913  (one callback per kind of news)
        self,
        bus_address: str,
        watch: Watch,
        *,
        on_up: Callable[[], None],
        on_down: Callable[[], None],
        on_job: Callable[[str, str], None],
        on_new_job: Callable[[str], None],
        on_reloaded: Callable[[], None],
        on_shutdown: Callable[[bool], None] | None = None,
    ) -> None:
        self.is_up = False
        self._is_subscribed = False
        self._watch = watch
        self._on_up, self._on_down = on_up, on_down
        self._on_job, self._on_new_job = on_job, on_new_job
        self._on_reloaded, self._on_shutdown = on_reloaded, on_shutdown
        self._bus = Bus(bus_address, watch, self._connected, self._disconnected)
        self._listen()

    def close(self) -> None:
        """Let go of the bus; no callback comes any more."""
        self._bus.close()

    # -- orders --

    def start(self, unit: str, properties: Properties, then: Then) -> None:
        """Make and start a transient unit; the reply comes when the job is queued.

        UNIT_EXISTS: one of that name is loaded, running or failed. With NO_REPLY, DISCONNECTED
        and what a reexec leaves behind (org.freedesktop.DBus.Error.NoReply) the outcome is
        unknown. Descriptors stay the caller's.
        """
        body: tuple[Any, ...] = (unit, "fail", list(properties), [])
        self._bus.call(self._to_manager("StartTransientUnit", "ssa(sv)a(sa(sv))", body), then)

    def stop(self, unit: str, then: Then | None = None) -> None:
        """Order a stop; the reply comes when the job is queued, `on_job` when it is over."""
        self._do(self._to_manager("StopUnit", "ss", (unit, "replace")), then)

    def kill(self, unit: str, whom: str, signal: int, then: Then | None = None) -> None:
        """Send a signal to the "main" process of a unit or to "all" of them."""
        self._do(self._to_manager("KillUnit", "ssi", (unit, whom, signal)), then)

    def limit_memory(self, unit: str, memory_bytes: int) -> None:
        """Set the memory limit of a running unit, until it ends, without swap to flee to."""
        limits = [("MemorySwapMax", ("t", 0)), ("MemoryMax", ("t", memory_bytes))]
        self._bus.tell(self._to_manager("SetUnitProperties", "sba(sv)", (unit, True, limits)))

    def freeze(self, unit: str, *, is_frozen: bool, then: Then | None = None) -> None:
        """Stop or continue every process of a unit; the reply comes when it is so."""
        name = "FreezeUnit" if is_frozen else "ThawUnit"
        self._do(self._to_manager(name, "s", (unit,)), then)

    def forget(self, unit: str, *, has_failed: bool = True) -> None:
        """Let an ended unit go, so that its name is free; harmless for any other."""
        if has_failed:
            self._bus.tell(self._to_manager("ResetFailedUnit", "s", (unit,)))
        self._bus.tell(self._to_manager("UnrefUnit", "s", (unit,)))

    def clear(self, listing: Listing, is_known: Callable[[str], bool]) -> None:
        """Let failed units go that nobody waits for: what a daemon forgot while it was cut off."""
        for row in listing.rows:
            if row.active == "failed" and not is_known(row.unit):
                self.forget(row.unit)

    # -- questions --

    def get(self, unit: str, names: Sequence[str], then: Callable[[Found], None]) -> None:
        """Ask for properties of a unit, one by one: not all from one moment.

        Whoever asks for LoadState, too, is told where there is no such unit.

        Asking for all at once would be one call, but 300 values, 4 ms of decoding.
        """
        collection = _Collection(names, then)
        address = DBusAddress(unit_path(unit), SYSTEMD, "org.freedesktop.DBus.Properties")
        for name in names:
            interface = f"{SYSTEMD}.{'Unit' if name in OF_EVERY_UNIT else 'Service'}"
            message = new_method_call(address, "Get", "ss", (interface, name))
            self._bus.call(message, partial(collection.add, name))

    def listing(self, then: Callable[[Listing], None]) -> None:
        """Ask for our units that are loaded: those that run, and those that failed."""
        body: tuple[list[str], list[str]] = ([], [f"{OUR_UNITS}*"])
        message = self._to_manager("ListUnitsByPatterns", "asas", body)
        self._bus.call(message, lambda reply: then(_listing(reply)))

    def inhibit(self, then: Callable[[int], None]) -> None:
        """Ask logind to wait with a shutdown; `then` gets the lock's descriptor, or -1.

        It is the caller's to close. `on_shutdown(True)` comes when a shutdown begins.
        """
        body = ("shutdown", "ckptd", "tasks save their checkpoints", "delay")
        message = new_method_call(_LOGIN_MANAGER, "Inhibit", "ssss", body)
        self._bus.call(message, lambda reply: then(_taken_fd(reply)))

    # -- inner --

    def _to_manager(self, name: str, signature: str, body: tuple[Any, ...]) -> Message:
        return new_method_call(_MANAGER, name, signature, body)

    def _do(self, message: Message, then: Then | None) -> None:
        if then is None:
            self._bus.tell(message)
        else:
            self._bus.call(message, then)

    def _listen(self) -> None:
        def rule(member: str) -> Rule:
            return Rule(SYSTEMD, SYSTEMD_PATH, MANAGER, member)

        self._bus.listen(rule("JobRemoved"), self._job_removed)
        self._bus.listen(rule("JobNew"), self._job_new)
        self._bus.listen(rule("Reloading"), self._reloading)
        self._bus.listen(owner_rule(SYSTEMD), self._owner_changed)
        if self._on_shutdown is not None:
            shutdown = Rule(LOGIND, LOGIND_PATH, LOGIN_MANAGER, "PrepareForShutdown")
            self._bus.listen(shutdown, self._prepare_for_shutdown)

    def _connected(self) -> None:
        self._subscribe()

    def _disconnected(self) -> None:
        self._is_subscribed = False
        was_up, self.is_up = self.is_up, False
        if was_up:
            self._on_down()

    def _subscribe(self) -> None:
        """Ask for signals. They are for the subscribed only, except to root's own clients."""
        self._bus.call(new_method_call(_MANAGER, "Subscribe"), self._subscribed)

    def _subscribed(self, reply: Reply) -> None:
        if reply.error and not reply.error.endswith(".AlreadySubscribed"):
            if reply.error != DISCONNECTED:
                self._watch.after(SUBSCRIBE_AGAIN_S, self._subscribe_again)
            return
        self._is_subscribed = True
        if self.is_up:
            self._on_reloaded()
        else:
            self.is_up = True
            self._on_up()

    def _subscribe_again(self) -> None:
        if self._bus.is_up and not self._is_subscribed:
            self._subscribe()

    def _owner_changed(self, body: tuple[Any, ...]) -> None:
        self._is_subscribed = False
        if body[-1]:  # the new owner: it is back
            self._subscribe()

    def _job_removed(self, body: tuple[Any, ...]) -> None:
        match body:
            case (_, _, str(unit), str(result)) if unit.startswith(OUR_UNITS):
                self._on_job(unit, result)

    def _job_new(self, body: tuple[Any, ...]) -> None:
        match body:
            case (_, _, str(unit)) if unit.startswith(OUR_UNITS):
                self._on_new_job(unit)

    def _reloading(self, body: tuple[Any, ...]) -> None:
        if body == (False,):
            self._on_reloaded()

    def _prepare_for_shutdown(self, body: tuple[Any, ...]) -> None:
        match body:
            case (bool(is_begun),) if self._on_shutdown is not None:
                self._on_shutdown(is_begun)


class _Collection:
    """Replies to the questions for one unit, until the last is there."""

    def __init__(self, names: Sequence[str], then: Callable[[Found], None]) -> None:
        self._missing = len(names)
        self._then = then
        self._values: dict[str, Any] = {}
        self._error = ""

    def add(self, name: str, reply: Reply) -> None:
        self._missing -= 1
        match reply:
            case Reply(((str(), value),), ""):
                is_bytes = name == "InvocationID" and isinstance(value, bytes)
                self._values[name] = value.hex() if is_bytes else value
            case Reply(_, "org.freedesktop.DBus.Error.UnknownProperty"):
                pass
            case Reply(_, error):
                self._error = self._error or error or "ckptd.Unexpected"
        if self._missing == 0:
            if not self._error and self._values.get("LoadState") == "not-found":
                self._error = NO_SUCH_UNIT
            self._then(Found({}, self._error) if self._error else Found(self._values))


def _listing(reply: Reply) -> Listing:
    match reply:
        case Reply((list(rows),), ""):
            return Listing([Row(row[0], row[2], row[3], row[4]) for row in rows])
        case _:
            return Listing([], reply.error or "ckptd.Unexpected")


def _taken_fd(reply: Reply) -> int:
    if reply.error or not reply.body or not hasattr(reply.body[0], "to_raw_fd"):
        return -1
    return int(reply.body[0].to_raw_fd())


_ERRNO = {
    "org.freedesktop.DBus.Error.LimitsExceeded": errno.EAGAIN,
    "org.freedesktop.DBus.Error.NoMemory": errno.ENOMEM,
    "org.freedesktop.DBus.Error.NameHasNoOwner": errno.EAGAIN,  # it is just executed anew
    "org.freedesktop.DBus.Error.ServiceUnknown": errno.EAGAIN,
    "org.freedesktop.systemd1.TransactionIsDestructive": errno.EAGAIN,  # a shutdown has begun
    "org.freedesktop.systemd1.ShuttingDown": errno.EAGAIN,
    "org.freedesktop.DBus.Error.AccessDenied": errno.EPERM,
    "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired": errno.EPERM,
}

_BUS_ERROR = "org.freedesktop.DBus.Error"
_UNSENT = frozenset(
    {
        f"{_BUS_ERROR}.NameHasNoOwner",
        f"{_BUS_ERROR}.ServiceUnknown",
        f"{_BUS_ERROR}.Spawn.ChildExited",  # the bus tried to start it: it can be asked to
        f"{_BUS_ERROR}.LimitsExceeded",
        f"{_BUS_ERROR}.NoMemory",
    }
)
_LOST = _UNSENT | {
    DISCONNECTED,
    NO_REPLY,
    f"{_BUS_ERROR}.NoReply",  # executed anew before it answered
    f"{_BUS_ERROR}.Disconnected",
    f"{_BUS_ERROR}.Timeout",
    f"{_BUS_ERROR}.TimedOut",
}


def errno_of(error: str) -> int:
    """Return what a refusal of the manager's means in errors of the system."""
    return _ERRNO.get(error, errno.EINVAL)


def is_lost(reply: Reply) -> bool:
    """Tell whether the manager may never have got the order; else it is carried out, or refused."""
    return reply.error in _LOST


def is_unsent(reply: Reply) -> bool:
    """Tell whether the manager certainly never got the order: the bus says so, or never had it."""
    return reply.is_unsent or reply.error in _UNSENT


def unit_path(unit: str) -> str:
    """Return the object path of a unit. Source: bus_label_escape in systemd's bus-label.c."""
    escaped = "".join(
        char if char in _PLAIN and (place or not char.isdigit()) else _hex(char)
        for place, char in enumerate(unit)
    )
    return f"{SYSTEMD_PATH}/unit/{escaped or '_'}"


def _hex(char: str) -> str:
    return "".join(f"_{byte:02x}" for byte in char.encode())
