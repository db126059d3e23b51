"""The daemon's own death, for a drill: who starts it again, and SIGKILL to exactly that process.

Read next: `drill.py`.
"""

import os
import select
import shlex
import signal
import subprocess
from typing import Final

import msgspec

from ckptctl.call import Call
from ckptd.protocol.errors import BadRequest, Conflict, Denied
from ckptd.protocol.messages import Empty, Pong

_RESTARTS: Final = frozenset({"always", "on-failure", "on-abnormal", "on-abort"})
_MANAGER_S: Final = 10.0
_DEAD_S: Final = 10.0  # it may hang in a disk


class Target(msgspec.Struct, frozen=True):
    """The daemon that is to die, and what brings the next one."""

    pid: int
    epoch: int
    service: str  # of the service manager that starts it again; "": `command` does
    command: str


def find(call: Call, command: str) -> Target:
    """Return the daemon that answers. Raises Conflict where nobody would start it again."""
    pong = call.ask("ping", Empty(), Pong)
    if os.geteuid() not in (0, pong.uid):
        raise Denied(
            f"the daemon runs as uid {pong.uid}: uid {os.geteuid()} may not kill it",
            "as root: sudo ckptctl drill ... --daemon",
        )
    if b"ckptd" not in _command_line(pong.pid):
        raise Conflict(
            f"the daemon (pid {pong.pid}) cannot be seen from here: in another container?",
            "run the drill where the daemon runs",
        )
    _check_command(command)
    service = _service_of(pong.pid)
    if service and command:
        raise Conflict(
            f"{service} is started again by its service manager: two would be started",
            "leave out --restart",
        )
    if not service and not command:
        raise Conflict(
            f"nobody starts this daemon (pid {pong.pid}) again: after the drill it would stay dead",
            "say how it is started: --restart 'ckptd --config FILE'",
        )
    return Target(pong.pid, pong.epoch, service, command)


def kill(call: Call, target: Target) -> subprocess.Popen[bytes] | None:
    """SIGKILL this very daemon; return what starts the next one, where that is for us to do."""
    try:
        _strike(call, target)
    except ProcessLookupError as gone:
        raise Conflict(
            f"the daemon (pid {target.pid}) ended before the blow", "try again once one runs"
        ) from gone
    if not target.command:
        return None
    return subprocess.Popen(
        ("/bin/sh", "-c", target.command), start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _strike(call: Call, target: Target) -> None:
    fd = os.pidfd_open(target.pid)
    try:
        # What answers now under that pid is what the descriptor stands for.
        if call.ask("ping", Empty(), Pong).epoch != target.epoch:
            raise Conflict("the daemon was just restarted by somebody else", "try again")
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        select.select((fd,), (), (), _DEAD_S)  # until then its last answer may still come
    finally:
        os.close(fd)


def _check_command(command: str) -> None:
    """Raise BadRequest for one that the shell cannot run: after the blow would be too late."""
    try:
        first = next(iter(shlex.split(command)), "")
    except ValueError as bad:
        raise BadRequest(f"--restart is no command: {bad}") from bad
    if not first.replace("/", "").replace("-", "").replace(".", "").isalnum():
        return  # nothing given, or more of a shell than can be judged from here
    found = subprocess.run(
        ("/bin/sh", "-c", 'command -v -- "$1"', "sh", first), capture_output=True, check=False
    )
    if found.returncode != 0:
        raise BadRequest(f"--restart: there is no command {first}", "give its whole path")


def _command_line(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(65_536)
    except OSError:
        return b""


def _service_of(pid: int) -> str:
    """Return the service whose main process this is and that is started again when it dies."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
            paths = [line.rstrip("\n").split(":", 2)[2] for line in file if _is_manager(line)]
    except OSError:
        return ""
    for path in paths:
        unit = os.path.basename(path)
        if unit.endswith(".service") and _is_restarted(unit, pid, is_user="/user@" in path):
            return unit
    return ""


def _is_manager(line: str) -> bool:
    return line.split(":", 2)[1] in ("", "name=systemd")


def _is_restarted(unit: str, pid: int, *, is_user: bool) -> bool:
    asked = ("show", "-p", "Restart", "-p", "MainPID", unit)
    try:
        command = ("systemctl", *(_users_manager(pid) if is_user else ()), *asked)
        said = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_MANAGER_S
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    values = dict(line.partition("=")[::2] for line in said.splitlines())
    return values.get("MainPID") == str(pid) and values.get("Restart") in _RESTARTS


def _users_manager(pid: int) -> tuple[str, ...]:
    """Return how to reach the manager of the daemon's user, which is not that of root who asks."""
    uid = os.stat(f"/proc/{pid}").st_uid
    return ("--user",) if uid == os.geteuid() else ("--user", f"--machine={uid}@.host")
