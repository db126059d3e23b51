"""The daemon itself: does it answer, may you use it, by which runner, with which configuration.

Read next: `services.py`.
"""

import grp
import os
import platform
import pwd
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

import zmq

from ckptd.daemon.policy import policy_of
from ckptd.daemon.runners import BOOTED, missing_manager
from ckptd.doctor import tools
from ckptd.doctor.finding import Check, Finding, bad, ok, warn
from ckptd.doctor.place import ANSWER_S, Place
from ckptd.door.access import missing_groups
from ckptd.door.zap import groups_of
from ckptd.protocol.version import VERSION
from ckptd.units.bus import system_bus, user_bus

KERNEL_MIN = (5, 3)  # pidfd_open(2)
LOG_FIRST = "it would end at once: mend the log first, see `log` below"
MUTE_FIRST = "one that answers nobody holds the store: see `lock` below"
_UNIX = "unix:path="


def versions(place: Place) -> Iterator[Finding]:
    """Look at what is installed, and whether it is what runs."""
    parts = [
        f"ckptd {VERSION}",
        f"Python {platform.python_version()}",
        f"pyzmq {zmq.pyzmq_version()} (libzmq {zmq.zmq_version()})",
        *(f"{name} {_version(name)}" for name in ("msgspec", "jeepney")),
        f"Linux {platform.release()}",
    ]
    text = ", ".join(parts)
    if _kernel() < KERNEL_MIN:
        yield bad("versions", text, "Linux 5.3 or newer is needed: processes are held by pidfd")
    else:
        yield ok("versions", text)
    pong = place.heard.pong
    if pong is not None and pong.version != VERSION:
        text = f"the daemon that runs is {pong.version}, this is {VERSION}"
        yield warn("running version", text, f"{_restart(place)}; tasks live on")


def _version(name: str) -> str:
    try:
        return version_of(name)
    except PackageNotFoundError:
        return "(unknown version)"


def _kernel() -> tuple[int, ...]:
    words = platform.release().split("-")[0].split(".")[:2]
    return tuple(int(word) for word in words if word.isdigit())


def _restart(place: Place) -> str:
    return f"{place.systemd.command} restart ckptd" if place.is_of_unit else "start it again"


def configuration(place: Place) -> Iterator[Finding]:
    """Look at the file that the next start would read."""
    wrong = place.config_error
    if wrong is None:
        yield ok("configuration", place.config_path or "built in: there is no file, none is needed")
    elif not os.access(place.config_path, os.R_OK) and os.path.exists(place.config_path):
        text = f"you may not read {place.config_path}: what follows takes the defaults"
        yield warn("configuration", text, "root may: sudo ckptctl doctor")
    else:
        yield bad("configuration", wrong.message, wrong.hint or "mend the file")


def daemon(place: Place) -> Iterator[Finding]:
    """Look whether somebody answers at the socket."""
    path, pong = place.paths.socket, place.heard.pong
    if pong is not None:
        whose = "root's" if pong.uid == 0 else f"uid {pong.uid}'s"
        yield ok("daemon", f"{whose}, {pong.version} (pid {pong.pid}) answers at {path}")
    elif place.systemd.is_asleep:
        yield ok("daemon", f"sleeps: systemd listens at {path} and starts it at the next request")
    elif not os.path.exists(path):
        none = "none answers" if place.mute else "there is none"
        yield warn("daemon", f"{none}: nothing at {path}", start_by(place))
    elif not os.access(path, os.W_OK):
        yield bad("daemon", f"you may not use {path}", _way_in(place))
    elif tools.connects(path) is False:
        text = f"there is none: {path} is left over from one that ended"
        clears = "; it clears the path" if place.would_start else ""
        yield warn("daemon", text, f"{start_by(place)}{clears}")
    elif place.heard.refusal is not None:
        yield bad("daemon", place.heard.refusal.message, _way_in(place))
    else:
        text = f"somebody listens at {path}, but does not answer within {ANSWER_S:.0f} s"
        yield bad("daemon", text, f"what does it do? {journalctl(place)}")


def start_by(place: Place) -> str:
    """Return how this daemon is started, and what is to be done before."""
    if place.mute:
        return MUTE_FIRST
    if not place.would_start:
        return LOG_FIRST
    if place.systemd.service.get("LoadState") == "loaded":
        become = "" if place.is_ours else "as root: "
        is_enabled = place.systemd.service.get("UnitFileState") == "enabled"
        return f"{become}{place.systemd.command} {'start' if is_enabled else 'enable --now'} ckptd"
    return "start it: ckptd"


def journalctl(place: Place) -> str:
    """Return how its story is read."""
    return f"journalctl {'' if place.is_system else '--user '}-u ckptd"


def _way_in(place: Place) -> str:
    """Return what lets who asks in. A login keeps the groups that it began with."""
    name = place.config.ipc.group
    try:
        gid = grp.getgrnam(name).gr_gid
    except KeyError:
        return f"as root: groupadd --system {name or 'ckptd'}, then restart ckptd"
    if not place.is_system:
        return "that is another user's; start one of your own: ckptd"
    if gid in groups_of(os.geteuid()) and gid not in {os.getegid(), *os.getgroups()}:
        return f"you are in group {name} since this login began: log in anew (or: newgrp {name})"
    return f"as root: usermod -aG {name} {user_name()}; then log in anew"


def user_name() -> str:
    """Return the name of who asks; one that the user database does not know has a number."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def health(place: Place) -> Iterator[Finding]:
    """Look at what the daemon says of itself."""
    status = place.heard.status
    if status is None:
        return
    if status.health == "ok":
        yield ok("health", "ok")
    else:
        yield bad("health", status.health, f"more about it: {journalctl(place)} -x -p 4")


def access(place: Place) -> Iterator[Finding]:
    """Look at who may do what, and which of it is you."""
    pong = place.heard.pong
    if pong is not None:
        held = ", ".join(pong.roles)
        if held:
            yield ok("your roles", f"uid {pong.caller_uid}: {held}")
        else:
            text = f"uid {pong.caller_uid} may connect, and nothing more"
            yield warn("your roles", text, "table [access] of the configuration names the groups")
    if not place.is_system:
        yield ok("who may connect", "you and root")
        return
    yield from _door(place)
    missing = ", ".join(missing_groups(policy_of(place.config).rules))
    if missing:
        text = f"[access] names groups that are not there: {missing}"
        yield warn(
            "roles", text, f"groupadd --system {missing.replace(', ', '; groupadd --system ')}"
        )


def _door(place: Place) -> Iterator[Finding]:
    """Look at the group, and at the rights of the path."""
    ipc, path = place.config.ipc, place.paths.socket
    if not ipc.group:
        yield ok("who may connect", "root: no group is configured")
        return
    try:
        group = grp.getgrnam(ipc.group)
    except KeyError:
        text = f"root alone: there is no group {ipc.group}"
        yield warn("who may connect", text, f"groupadd --system {ipc.group}; restart ckptd")
        return
    members = ", ".join(group.gr_mem[:5]) + (", ..." if len(group.gr_mem) > 5 else "")
    text = f"root and group {ipc.group} ({members or 'it has no members'})"
    try:
        seen = os.stat(path)
    except OSError:
        yield ok("who may connect", text)
        return
    mode, wanted = seen.st_mode & 0o777, int(ipc.mode, 8)
    if (seen.st_gid, mode) == (group.gr_gid, wanted):
        yield ok("who may connect", f"{text}; the socket is {mode:04o}")
    else:
        text = (
            f"the socket has group {seen.st_gid}, mode {mode:04o}; wanted: {ipc.group}, {ipc.mode}"
        )
        by = "SocketGroup= and SocketMode= of ckptd.socket" if _is_given(place) else "restart ckptd"
        yield warn("who may connect", text, by)


def _is_given(place: Place) -> bool:
    return place.systemd.socket.get("ActiveState") == "active"


def runner(place: Place) -> Iterator[Finding]:
    """Look at what runs the tasks, what would after a restart, and why."""
    wanted = place.config.daemon.runner
    missing, will_be = _missing(place), runner_to_be(place)
    status = place.heard.status
    why = _why(wanted, missing)
    if wanted == "unit" and missing:
        advice = f'mend that, or set daemon.runner = "auto" in {place.config_path}'
        yield bad("runner", f"none: {why}", advice)
    elif status is not None and not status.runner.startswith(will_be):
        text = f"{status.runner} in force, but {will_be} after a restart: {why}"
        yield warn("runner", text, f"{_restart(place)}; what runs is followed to its end")
    elif will_be == "fork" and os.path.isdir(BOOTED):
        advice = "see `service manager` and `bus` below"
        if wanted == "fork":
            advice = 'tasks are safer as units: set daemon.runner = "auto"'
        yield warn("runner", f"fork: {why}", advice)
    else:
        yield ok("runner", f"{will_be}{' in force' if status is not None else ''}: {why}")


def runner_to_be(place: Place) -> str:
    """Return which runner a daemon that starts now would have, as `daemon/runners.py` chooses."""
    wanted = place.config.daemon.runner
    return "fork" if wanted == "fork" or (wanted == "auto" and _missing(place)) else "unit"


def _why(wanted: str, missing: str) -> str:
    if wanted == "fork":
        return "the configuration says so"
    if missing:
        return missing
    chosen = "the configuration says so, " if wanted == "unit" else ""
    return f"{chosen}systemd and its bus are there"


def _missing(place: Place) -> str:
    missing = missing_manager(is_system=place.is_system)
    if missing or bus_answers(place) is not False:
        return missing
    return f"nobody answers at {bus_path(place)}"


def bus_path(place: Place) -> str:
    """Return the path of the bus, "" where its address is of another kind."""
    address = system_bus() if place.is_system else user_bus()
    path = address.removeprefix(_UNIX).partition(",")[0]
    return "" if path == address else path


def bus_answers(place: Place) -> bool | None:
    """Tell whether the bus takes connections; None where that cannot be told."""
    path = bus_path(place)
    return tools.connects(path) if path else None


CHECKS: tuple[Check, ...] = (versions, configuration, daemon, health, access, runner)
