"""Verbs of the daemon itself: daemon, config, and the offline tools wal and doctor.

Offline tools are programs of the daemon's side, run as such: this side never reads its files.
"""

import argparse
import os
import sys
import time
import tomllib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from ckptctl import files, selectors, words
from ckptctl.call import Call
from ckptctl.render import facts_lines, json_text, plain
from ckptctl.units import SECOND_NS, duration_text, number_text
from ckptd.home import home
from ckptd.protocol.errors import BadConfig, Busy, Unreachable
from ckptd.protocol.messages import (
    DaemonStatus,
    Done,
    EffectiveConfig,
    Empty,
    Pong,
    Reloaded,
    Shutdown,
)

if TYPE_CHECKING:
    import subprocess

# --- daemon -----------------------------------------------------------------------------------


def daemon_status(call: Call) -> int:
    """Show how the daemon is; 1 where it is not well."""
    found = call.ask("daemon", Empty(), DaemonStatus)
    if not call.is_for_people:
        call.out([json_text({"daemon": plain(found)})])
        return 0 if found.health == "ok" else 1
    asker = call.ask("ping", Empty(), Pong)
    up_s = (time.time_ns() - found.started_ns) / SECOND_NS
    totals = ", ".join(f"{count} {phase}" for phase, count in found.totals.items() if count)
    green, red, off = ("\x1b[32m", "\x1b[31m", "\x1b[0m") if call.style.has_color else ("",) * 3
    health = f"{green if found.health == 'ok' else red}{words.clean(found.health)}{off}"
    recovery = ", ".join(
        f"{name.removesuffix('_s')} {_short(name, value)}"
        for name, value in found.last_recovery.items()
        if value and value is not True and not isinstance(value, list)
    )
    facts = [
        ("health", health),
        ("version", found.version),
        ("running", f"pid {found.pid}, uid {found.uid}, for {duration_text(up_s)}"),
        ("endpoint", call.client.endpoint),
        ("state", words.clean(found.state_dir)),
        ("log", f"LSN {found.lsn}, snapshot at {found.snapshot_lsn}, epoch {found.epoch}"),
        ("runner", f"{found.runner}, cgroup {found.cgroup or 'none'}"),
        ("tasks", totals or "none"),
        ("you", f"uid {asker.caller_uid}, roles: {_roles_text(asker)}"),
        ("recovery", words.clean(recovery)),
        *_said(found.last_recovery),
    ]
    call.out(facts_lines(facts, call.style))
    if call.style.form == "wide":
        counters = [(name, number_text(value)) for name, value in sorted(found.counters.items())]
        call.out(["", *facts_lines(counters, call.style)])
    return 0 if found.health == "ok" else 1


def _said(recovery: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield warnings and notes of the recovery, each on a line of its own."""
    for name, texts in recovery.items():
        if isinstance(texts, list):
            yield from (
                ("" if place else name, words.clean(str(text))) for place, text in enumerate(texts)
            )


def _short(name: str, value: Any) -> str:
    return duration_text(value) if name.endswith("_s") else str(value)


def daemon_ping(call: Call) -> int:
    """Ask whether it answers."""
    call.ask("ping", Empty(), Pong)
    started = time.perf_counter()
    found = call.ask("ping", Empty(), Pong)
    took_s = time.perf_counter() - started
    if call.is_for_people:
        text = f"ckptd {found.version}, pid {found.pid}, answers in {took_s * 1e3:.1f} ms"
        call.out([text, f"you are uid {found.caller_uid}, roles: {_roles_text(found)}"])
    else:
        call.out([json_text({"ping": plain(found), "answered_s": took_s})])
    return 0


def _roles_text(found: Pong) -> str:
    return ", ".join(map(words.clean, found.roles)) or "none"


def daemon_reload(call: Call) -> int:
    """Read the configuration again and tell what took effect."""
    found = call.ask("reload", Empty(), Reloaded)
    if not call.is_for_people:
        call.out([json_text(plain(found))])
        return 0
    call.out(f"{key}: in force now" for key in found.applied)
    call.out(f"{key}: needs a restart of the daemon" for key in found.needs_restart)
    for key in found.kept:
        name = key.removeprefix("groups.")
        ways = f"`ckptctl group set {name}` or `ckptctl group rm {name}`"
        call.out([f"{key}: stays as it is, set by a person or no longer in the file: {ways}"])
    if not (found.applied or found.needs_restart or found.kept):
        call.note("nothing has changed")
    return 0


def daemon_shutdown_options(parser: argparse.ArgumentParser) -> None:
    """Add what becomes of the tasks."""
    parser.add_argument(
        "--tasks", choices=("keep", "checkpoint", "kill"), default="keep", metavar="WHAT",
        help="keep: they run on (default); checkpoint: save and stop; kill: SIGKILL. All of them"
        " start again when the daemon is back: `ckptctl cancel` first those that should not",
    )  # fmt: skip
    parser.add_argument(
        "--wait", action="store_true",
        help="return only when the daemon is gone, however long its tasks take to end",
    )  # fmt: skip


def daemon_shutdown(call: Call) -> int:
    """Stop the daemon and wait until it is gone: 0; 3 where that takes longer than one answer."""
    fate = call.args.tasks
    if fate == "kill" and not call.confirm(
        f"kill {_running_text(call)} and stop the daemon? (they start again when it is back)"
    ):
        return 1
    call.connect_once()
    call.ask("shutdown", Shutdown(fate), Done)
    if not call.client.until_gone(float("inf") if call.args.wait else None):
        call.note("the daemon drains; it is not gone yet (--wait waits for it)")
        return 3
    what = {
        "keep": "running tasks go on without it, and are adopted when it is back",
        "checkpoint": "tasks were asked to save and stop; they start again when it is back",
        "kill": "tasks were killed; they start again when it is back",
    }[fate]
    call.note(f"the daemon has stopped; {what}")
    return 0


def _running_text(call: Call) -> str:
    totals = call.ask("daemon", Empty(), DaemonStatus).totals
    count = sum(totals.get(phase, 0) for phase in selectors.ACTIVE)
    return f"{count} running task{'' if count == 1 else 's'}"


# --- config -----------------------------------------------------------------------------------


def config_show(call: Call) -> int:
    """Print the configuration in force, as TOML."""
    found = call.ask("config", Empty(), EffectiveConfig)
    if call.is_for_people:
        import tomli_w  # noqa: PLC0415 (used nowhere else)

        call.out([f"# from {found.path or 'the defaults; there is no file'}"])
        call.out([tomli_w.dumps(found.config).rstrip()])
    else:
        call.out([json_text(plain(found))])
    return 0


def config_check_options(parser: argparse.ArgumentParser) -> None:
    """Add the file."""
    parser.add_argument("file", metavar="FILE", nargs="?", help="default: the daemon's own file")


config_diff_options = config_check_options


def config_check(call: Call) -> int:
    """Check a file as the daemon would; 78 where it is wrong. Works without a daemon."""
    call.takes("json")
    path = call.args.file or _config_path(call)
    if call.style.form == "json":
        return _config_json(call, path)
    if not path:
        call.note("there is no file, the daemon runs on its defaults")
        return 0
    return _become("ckptd.host.config", ["check", path])


def _config_json(call: Call, path: str) -> int:
    code, said = 0, ""
    if path:
        done = _host_config("check", path)
        code, said = done.returncode, done.stderr
    found = {"path": path or None, "ok": code == 0, "problems": said.splitlines() if code else []}
    call.out([json_text({"config": found})])
    return code


def _config_path(call: Call) -> str:
    """Return what a running daemon reports, else the usual file where it is there."""
    try:
        return call.ask("config", Empty(), EffectiveConfig).path
    except Unreachable:
        base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(home(), ".config")
        usual = "/etc" if os.geteuid() == 0 else base
        path = os.path.join(usual, "ckptd", "ckptd.toml")
        return path if os.path.exists(path) else ""


def config_diff(call: Call) -> int:
    """Tell what a file would change against the configuration in force; 1 if anything."""
    call.takes("json")
    found = call.ask("config", Empty(), EffectiveConfig)
    path = call.args.file or found.path
    if not path:
        call.note("the daemon runs on its defaults, there is no file to compare")
        if not call.is_for_people:
            call.out([json_text({"path": None, "changes": []})])
        return 0
    now, wanted = flat(found.config), flat(_meaning(path))
    pairs = [(key, now.get(key), wanted.get(key)) for key in wanted | now]
    changes = [(key, old, new) for key, old, new in pairs if old != new]
    if not call.is_for_people:
        items = [{"key": key, "in_force": old, "in_file": new} for key, old, new in changes]
        call.out([json_text({"path": path, "changes": items})])
    else:
        for key, *values in changes:
            old, new = ("nothing" if value is None else repr(value) for value in values)
            call.out([f"{key}: {old} in force, {new} in {path}"])
    return 1 if changes else 0


def _meaning(path: str) -> dict[str, Any]:
    """Return what the daemon would make of a file: checked, with defaults for what is not in it."""
    done = _host_config("show", path)
    if done.returncode:
        text, _, hint = done.stderr.rstrip().partition("\n  hint: ")
        raise BadConfig(text, hint or f"ckptctl config check {path}")
    return tomllib.loads(done.stdout)


def _host_config(verb: str, path: str) -> "subprocess.CompletedProcess[str]":
    import subprocess  # noqa: PLC0415 (for this alone)

    command = [sys.executable, "-P", "-m", "ckptd.host.config", verb, path]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def _toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(files.read_text(path))
    except tomllib.TOMLDecodeError as bad:
        raise BadConfig(f"{path}: not TOML: {bad}", f"ckptctl config check {path}") from bad


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


# --- offline tools ------------------------------------------------------------------------------


def wal_options(parser: argparse.ArgumentParser) -> None:
    """Add what is passed on."""
    parser.add_argument("--state", metavar="DIR", help="the state directory (default: the usual)")
    if parser.prog.endswith("dump"):
        parser.add_argument("--since", metavar="LSN", help="after this LSN")
        parser.add_argument("--limit", metavar="N", help="at most so many records")
    if parser.prog.endswith("repair"):
        parser.add_argument(
            "--truncate-after", metavar="LSN",
            help="the last record to keep: one less than the LSN that `ckptctl wal verify` names",
        )  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="OPTION", help="further options of the tool")


def wal(call: Call) -> int:
    """Run the offline tool on the log's files."""
    words = [*call.args.words]
    state = [] if "--state" in words else ["--state", _state_dir(call)]
    output = ["-o", call.style.form] if call.style.form in ("json", "jsonl") else []
    _become("ckptd.daemon.offline_wal", [call.args.verb.split()[1], *state, *output, *words])


def _state_dir(call: Call) -> str:
    """Return where a daemon of this user would keep its state. Raises Busy where one runs."""
    try:
        found = call.ask("daemon", Empty(), DaemonStatus)
    except Unreachable:
        if configured := configured_state_dir(_config_path(call)):
            return configured
        if os.geteuid() == 0:
            return "/var/lib/ckptd"
        base = os.environ.get("XDG_STATE_HOME") or os.path.join(home(), ".local", "state")
        return os.path.join(base, "ckptd")
    stop = stop_command(_cgroup(found.pid))
    raise Busy(
        f"a daemon (pid {found.pid}) holds the log in {found.state_dir}",
        f"first `{stop}` (tasks live on); for another log say --state DIR;"
        " what there is: ckptctl wal -h",
    )


def configured_state_dir(path: str) -> str:
    """Return the state directory that a configuration names; "" for the usual one, or no file."""
    daemon = _toml(path).get("daemon") if path else None
    return str(daemon.get("state_dir") or "") if isinstance(daemon, dict) else ""


def _cgroup(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


def stop_command(cgroup: str) -> str:
    """Return what keeps a daemon down: a service that was shut down is started again at once."""
    if "/ckptd.service" not in cgroup:
        return "ckptctl daemon shutdown"
    scope = " --user" if "/user@" in cgroup else ""
    return f"systemctl{scope} stop ckptd.socket ckptd"


def doctor_options(parser: argparse.ArgumentParser) -> None:
    """Add what is passed on."""
    parser.add_argument("--system", action="store_true", help="look at the daemon of the machine")
    parser.add_argument("--user", action="store_true", help="look at a daemon of your own")
    parser.add_argument("--config", metavar="FILE", help="its configuration, where not the usual")
    parser.add_argument("words", nargs="*", metavar="OPTION", help="passed to the tool")


def doctor(call: Call) -> int:
    """Look whether this machine is fit."""
    output = ["-o", call.style.form] if call.style.form == "json" else []
    given = call.args.endpoint or os.environ.get("CKPTD_ENDPOINT", "")
    endpoint = ["--endpoint", given] if given else []
    _become("ckptd.doctor", [*output, *endpoint, *call.args.words])


def _become(module: str, words: list[str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *words])  # noqa: S606 (no shell)
