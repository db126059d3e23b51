"""systemd: the service manager, the units of ckptd, and what they promise at a crash or a shutdown.

Read next: `journald.py`.
"""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from ckptd.daemon.inhibitor import ASK_AGAIN_NS
from ckptd.daemon.runners import missing_manager
from ckptd.doctor import tools
from ckptd.doctor.contact import bus_answers, bus_path, journalctl, start_by, user_name
from ckptd.doctor.finding import Check, Finding, bad, ok, warn
from ckptd.doctor.place import SERVICE, Place
from ckptd.host import clock

TRIED_FROM = 252  # and 257: the versions of the tests
DEGRADED = (
    (248, "requests are refused while the daemon restarts: use ckptd.socket"),
    (TRIED_FROM, "not tried with ckptd"),
)
"""(systemd before this, what is missing then)."""
SCORE_MAX = 1.5
OOM_PROTECTED = -500
_EXITS = {
    "64": "the unit gives it options that it does not know: systemctl cat ckptd",
    "65": "its stored data is damaged: ckptctl wal verify",
    "70": "the disk failed to store the log: dmesg",
    "78": "mend the configuration: ckptctl config check",
}


class Setting(NamedTuple):
    """A property of ckptd.service, what it must not be, and what is lost then."""

    name: str
    wrong: tuple[str, ...]
    right: str
    loss: str


SETTINGS = (
    Setting("Type", ("simple", "exec", "forking"), "notify", "a start is over before it is"),
    Setting("NotifyAccess", ("none",), "main", "neither READY nor the watchdog are heard"),
    Setting("FileDescriptorStoreMax", ("0",), "512", "requests are refused during a restart"),
    Setting("Restart", ("no",), "always", "a daemon that dies stays dead"),
    Setting("OOMPolicy", ("stop", "kill"), "continue", "one killed child ends the daemon"),
)


def manager(place: Place) -> Iterator[Finding]:
    """Look at the service manager and its bus."""
    version = place.systemd.version
    if not version:
        yield ok("service manager", f"none: {missing_manager(is_system=True)}")
        return
    lacks = [text for below, text in DEGRADED if version < below]
    if lacks:
        yield warn("systemd", f"{version}: {'; '.join(lacks)}", f"{TRIED_FROM} or newer is better")
    else:
        yield ok("systemd", f"{version}; nothing is missing from {TRIED_FROM} on")
    missing = missing_manager(is_system=place.is_system)
    if missing:
        yield warn("service manager", missing, _user_manager())
    elif not place.systemd.service:
        advice = "as root: systemctl daemon-reexec" if place.is_system else _user_manager()
        yield bad("service manager", "does not answer systemctl", advice)
    yield from _bus(place)


def _user_manager() -> str:
    return (
        "log in by ssh or on a console (not su), or: loginctl enable-linger; needs libpam-systemd"
    )


def _bus(place: Place) -> Iterator[Finding]:
    path = bus_path(place)
    if bus_answers(place) is not False:
        yield ok("bus", f"answers at {path}" if path else "given by an address of its own kind")
    elif place.is_system:
        yield bad(
            "bus", f"nobody answers at {path}", "apt install dbus; systemctl start dbus.socket"
        )
    else:
        text = f"nobody answers at {path}: tasks of yours cannot be units"
        yield warn("bus", text, "apt install dbus-user-session, then log in anew")


def linger(place: Place) -> Iterator[Finding]:
    """A user's services end at logout unless that user lingers."""
    if place.is_system or not place.systemd.version:
        return
    name = user_name()
    if os.path.exists(f"/var/lib/systemd/linger/{name}"):
        yield ok("logout", f"{name} lingers: daemon and tasks outlive the login, start at boot")
    else:
        text = "ends your daemon and tasks; they resume at the next start"
        yield warn("logout", text, "loginctl enable-linger")


def service(place: Place) -> Iterator[Finding]:
    """Look at ckptd.service as systemd sees it."""
    unit = place.systemd.service
    if not unit:
        return
    if unit.get("LoadState") != "loaded":
        text = "is not installed: nothing starts the daemon at boot"
        where = "" if place.is_system else " PREFIX=$HOME/.local"
        yield warn(SERVICE, text, f"in the sources of ckptd: make install{where}")
        return
    yield _state(place)
    if unit.get("UnitFileState") not in {"enabled", "enabled-runtime", "static", "generated"}:
        text = f"{unit.get('UnitFileState') or 'not enabled'}: does not start at boot"
        yield warn("boot", text, f"{place.systemd.command} enable ckptd")
    yield from _unit_file(place)
    if (count := unit.get("NRestarts", "0")) != "0":
        text = f"systemd had to start the daemon again: {count} x since it was started by hand"
        yield warn("restarts", text, f"find out why: {journalctl(place)} -x -p 4")


def _state(place: Place) -> Finding:
    unit = place.systemd.service
    state = f"{unit.get('ActiveState')} ({unit.get('SubState')})"
    if place.heard.pong is not None and not place.is_of_unit:
        text = f"{state}: the daemon that answers (pid {place.pid}) was started by other means"
        return warn(SERVICE, text, f"end that one, then: {start_by(place)}")
    match unit.get("ActiveState"):
        case "active":
            at_boot = unit.get("UnitFileState", "")
            return ok(SERVICE, f"{state}, {at_boot}, main process {unit.get('MainPID')}")
        case "failed":
            exit_code = unit.get("ExecMainStatus", "")
            text = f"{state}: {unit.get('Result')}, exit {exit_code}"
            by_code = _EXITS.get(exit_code, f"{journalctl(place)} -x -n 20")
            return bad(SERVICE, text, by_code if place.would_start else start_by(place))
        case "activating" | "reloading":
            return warn(SERVICE, state, f"how far is it? {place.systemd.command} status ckptd")
        case _ if place.systemd.is_asleep:
            return ok(SERVICE, f"{state}; ckptd.socket starts it at the next request")
        case _:
            return warn(SERVICE, state, start_by(place))


def _unit_file(place: Place) -> Iterator[Finding]:
    """Look whether the unit in force is the one on disk, and made for this daemon."""
    unit, command = place.systemd.service, place.systemd.command
    drop_ins = unit.get("DropInPaths", "").split()
    changes = f"changed by {', '.join(drop_ins)}" if drop_ins else "no drop-ins"
    if "yes" in (unit.get("NeedDaemonReload"), place.systemd.socket.get("NeedDaemonReload")):
        text = "changed on disk since systemd read it"
        yield warn("unit file", text, f"{command} daemon-reload; {command} restart ckptd")
    else:
        yield ok("unit file", f"{unit.get('FragmentPath')}, {changes}")
    installed = _installed_version(unit.get("ExecStart", ""))
    pong = place.heard.pong
    if pong is not None and place.is_of_unit and installed not in {"", pong.version}:
        text = f"the unit starts ckptd {installed}, but {pong.version} runs"
        yield warn("unit version", text, f"{command} restart ckptd; tasks live on")
    for each in SETTINGS:
        if unit.get(each.name) in each.wrong:
            text = f"{each.name}={unit[each.name]}: {each.loss}"
            advice = f"make it {each.name}={each.right}; who says so? {command} cat ckptd"
            yield warn("unit settings", text, advice)
    if place.heard.status is not None and place.heard.status.runner == "fork":
        yield from _fork_below_systemd(place)


def _installed_version(exec_start: str) -> str:
    """Return the version of what the unit starts: `{ path=/usr/bin/ckptd ; argv[]=... }`."""
    found = re.search(r"path=(\S+)", exec_start)
    words = tools.output_of([found[1], "--version"]).split() if found else []
    return words[1] if len(words) == 2 and words[0] == "ckptd" else ""


def _fork_below_systemd(place: Place) -> Iterator[Finding]:
    if place.is_of_unit and place.systemd.service.get("KillMode") != "process":
        text = "the runner is fork, and KillMode= not process: tasks end with the daemon"
        advice = "better: what `runner` above advises; else: fork-runner.conf beside the documents"
        yield bad("unit settings", text, advice)


def others(place: Place) -> Iterator[Finding]:
    """Look at the units around the service."""
    if place.systemd.service.get("LoadState") != "loaded":
        return
    yield from _socket_unit(place)
    is_up = place.systemd.service.get("ActiveState") == "active"
    drain = place.systemd.show("ckptd-drain.service", "LoadState,ActiveState")
    if drain.get("ActiveState") == "active":
        yield ok("shutdown", "ckptd-drain.service asks every task to save before it goes on")
    elif is_up:
        text = "ckptd-drain.service is not active: tasks are not asked to save at shutdown"
        yield warn("shutdown", text, f"{place.systemd.command} start ckptd-drain")
    units = place.systemd.show(
        "ckptd.slice", "LoadState,ActiveState,MemoryMax,TasksMax,CPUQuotaPerSecUSec"
    )
    if units.get("ActiveState") == "active":
        yield ok("ckptd.slice", f"active; all tasks together: {_slice_limits(units)}")
    elif is_up:
        text = "is not active: every start of a task makes it anew, which is slow"
        yield warn("ckptd.slice", text, f"{place.systemd.command} start ckptd.slice")


def _slice_limits(unit: dict[str, str]) -> str:
    names = {"MemoryMax": "memory", "TasksMax": "processes", "CPUQuotaPerSecUSec": "cpu a second"}
    held = [
        f"{names[name]} {value}"
        for name, value in unit.items()
        if name in names and value not in {"infinity", "", "[not set]"}
    ]
    return ", ".join(held) or "no limits"


def _socket_unit(place: Place) -> Iterator[Finding]:
    unit = place.systemd.socket
    if unit.get("ActiveState") != "active":
        if unit.get("UnitFileState") == "enabled":
            text = "enabled, but not active: it is not used until both are started again"
            command = place.systemd.command
            advice = f"{command} stop ckptd; {command} start ckptd.socket ckptd"
            yield warn("ckptd.socket", text, advice)
        else:
            yield ok("ckptd.socket", "not used: the daemon makes its socket, systemd keeps it")
        return
    listens = unit.get("Listen", "").rpartition(" (")[0]
    if listens == place.paths.socket:
        yield ok("ckptd.socket", "active: requests start the daemon; stop both to keep it down")
    else:
        text = f"listens at {listens}, the daemon at {place.paths.socket}"
        yield bad("ckptd.socket", text, "let ListenStream= and daemon.run_dir name the same place")


def watchdog(place: Place) -> Iterator[Finding]:
    """Look whether systemd would notice a daemon that hangs."""
    if place.systemd.service.get("LoadState") != "loaded":
        return
    value = place.systemd.service.get("WatchdogUSec", "")
    if value in {"", "0", "infinity"}:
        text = "none: a daemon that hangs stays"
        yield warn("watchdog", text, f"{place.systemd.command} edit ckptd: WatchdogSec=30s")
    else:
        yield ok("watchdog", f"a daemon that hangs for {value} is started again")


def inhibitor(place: Place) -> Iterator[Finding]:
    """Look whether logind tells of a shutdown early. A bonus: the drain is what counts."""
    if not place.is_system or not place.systemd.version:
        return
    name, path = "org.freedesktop.login1", "/org/freedesktop/login1"
    words = ["busctl", "get-property", name, path, f"{name}.Manager", "InhibitDelayMaxUSec"]
    answer = tools.output_of(words).split()
    if len(answer) != 2 or not answer[1].isdigit():
        yield ok("early warning", "none: no logind; ckptd-drain.service does without")
        return
    delay_s = int(answer[1]) / 1e6
    held = tools.output_of(["systemd-inhibit", "--list", "--no-pager", "--no-legend"])
    holds = any(line.split()[:1] == ["ckptd"] for line in held.splitlines())
    if holds or _is_young(place):
        when = "waits" if holds else "will wait"
        yield ok("early warning", f"logind {when} up to {delay_s:g} s with a shutdown for ckptd")
    else:
        text = "ckptd holds no lock of logind: tasks begin to save a moment later"
        yield warn("early warning", text, "systemctl restart systemd-logind; it asks again in 10 s")


def _is_young(place: Place) -> bool:
    """Tell whether the daemon may not have asked logind yet, or none runs."""
    status = place.heard.status
    if not place.is_of_unit or status is None:
        return True
    return clock.Clock().now().at_ns - status.started_ns < 2 * ASK_AGAIN_NS


def security(place: Place) -> Iterator[Finding]:
    """Look at the sandbox as systemd-analyze(1) scores it: 0 is best, 10 is none."""
    if not place.is_system or place.systemd.service.get("LoadState") != "loaded":
        return
    text = tools.output_of(["systemd-analyze", "security", "--no-pager", SERVICE])
    found = re.search(r"exposure level for \S+: ([0-9.]+)", text)
    if not found:
        yield ok("sandbox", "not scored: systemd-analyze says nothing here")
    elif float(found[1]) <= SCORE_MAX:
        yield ok("sandbox", f"{found[1]} of 10 by systemd-analyze security; lower is tighter")
    else:
        text = f"{found[1]} by systemd-analyze security, over {SCORE_MAX}"
        yield warn("sandbox", text, "which drop-in loosens it? systemctl cat ckptd")


def out_of_memory(place: Place) -> Iterator[Finding]:
    """Look whether the daemon is the last to go when memory is short."""
    if not place.pid or not place.is_system:
        return
    text = tools.read_text(f"/proc/{place.pid}/oom_score_adj")
    if not text.lstrip("-").isdigit():
        return
    if int(text) <= OOM_PROTECTED:
        yield ok("out of memory", f"the daemon goes last (oom_score_adj {text})")
        return
    text = f"the daemon may go as early as anybody (oom_score_adj {text})"
    asked = place.systemd.service.get("OOMScoreAdjust", "")
    if place.is_of_unit and asked.startswith("-"):
        advice = f"OOMScoreAdjust={asked} did not take: a container without CAP_SYS_RESOURCE?"
    else:
        advice = "run it as ckptd.service, with OOMScoreAdjust=-900; tasks survive it anyway"
    yield warn("out of memory", text, advice)


CHECKS: tuple[Check, ...] = (
    manager,
    linger,
    service,
    others,
    inhibitor,
    watchdog,
    out_of_memory,
    security,
)
