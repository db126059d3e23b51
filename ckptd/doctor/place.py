"""What is looked at: one daemon, root's or a user's own, with what it says and systemd says of it.

The own daemon of who asks comes before the system's, as for every verb of ckptctl; root means the
system's. Read next: `tools.py`, `log.py`.
"""

import os
from functools import cached_property
from typing import NamedTuple

import msgspec

from ckptd.client import SYSTEM_SOCKET, Client, user_socket
from ckptd.daemon.runners import BOOTED
from ckptd.doctor import tools
from ckptd.doctor.log import Log
from ckptd.host import config, paths
from ckptd.protocol.errors import CkptdError, Denied
from ckptd.protocol.messages import DaemonStatus, Empty, Pong
from ckptd.storage.store import holder_of

ANSWER_S = 3.0
SERVICE, SOCKET = "ckptd.service", "ckptd.socket"
_SERVICE_NAMES = (
    "LoadState,ActiveState,SubState,UnitFileState,Result,NRestarts,ExecMainStatus,MainPID,Type,"
    "DropInPaths,FragmentPath,NeedDaemonReload,ExecStart,NotifyAccess,KillMode,Restart,OOMPolicy,"
    "FileDescriptorStoreMax,WatchdogUSec,OOMScoreAdjust,StandardOutput,StandardError,LimitNOFILE,"
    "LogRateLimitIntervalUSec,LogRateLimitBurst"
)


class Systemd:
    """What a service manager says of units, by systemctl(1)."""

    def __init__(self, *, is_system: bool, booted: str = BOOTED) -> None:
        self.is_system = is_system
        self._is_there = os.path.isdir(booted)
        self._is_silent = False  # Bound: one that does not answer is waited for once
        self.scope = [] if is_system else ["--user"]
        self.command = " ".join(["systemctl", *self.scope])  # as advice says it

    @cached_property
    def version(self) -> int:
        """Return its version, 0 where this machine was not booted by systemd."""
        if not self._is_there:
            return 0
        word = tools.output_of(["systemctl", "--version"]).partition("\n")[0].split()[1:2]
        return int(word[0]) if word and word[0].isdigit() else 0

    @cached_property
    def service(self) -> dict[str, str]:
        """Return the properties of ckptd.service, empty where nobody answers."""
        return self.show(SERVICE, _SERVICE_NAMES)

    @cached_property
    def socket(self) -> dict[str, str]:
        """Return the properties of ckptd.socket."""
        return self.show(SOCKET, "LoadState,ActiveState,UnitFileState,Listen,NeedDaemonReload")

    def show(self, unit: str, names: str) -> dict[str, str]:
        """Return properties of a unit by name, empty where nobody answers."""
        if not self._is_there or self._is_silent:
            return {}
        text = tools.output_of(["systemctl", *self.scope, "show", "-p", names, unit], self.env)
        self._is_silent = not text
        pairs = (line.partition("=") for line in text.splitlines())
        return {name: value for name, equals, value in pairs if equals}

    @property
    def env(self) -> dict[str, str]:
        """Return what a shell without a login lacks."""
        runtime = f"/run/user/{os.geteuid()}"
        has_none = not self.is_system and "XDG_RUNTIME_DIR" not in os.environ
        return {"XDG_RUNTIME_DIR": runtime} if has_none and os.path.isdir(runtime) else {}

    @property
    def is_asleep(self) -> bool:
        """Tell whether ckptd.socket listens for a daemon that does not run: asking starts it."""
        return (
            self.socket.get("ActiveState") == "active"
            and self.service.get("ActiveState") == "inactive"
        )


class Heard(NamedTuple):
    """What the daemon answers. `pong` without `status`: who asks has no role."""

    pong: Pong | None = None
    status: DaemonStatus | None = None
    refusal: CkptdError | None = None


class Place(msgspec.Struct, frozen=True):
    """One daemon, and the machine around it."""

    is_system: bool  # root's daemon, that serves all users
    config: config.Config
    config_path: str  # "" for none
    config_error: CkptdError | None
    paths: paths.Paths
    systemd: Systemd
    heard: Heard
    log: Log

    @property
    def is_ours(self) -> bool:
        """Tell whether the daemon runs as who asks: its files can be looked at then."""
        return self.is_system == (os.geteuid() == 0)

    @property
    def would_start(self) -> bool:
        """Tell whether nothing in the log keeps a daemon from starting, as far as can be seen."""
        return self.heard.pong is not None or not self.is_ours or not self.log.is_refused

    @property
    def pid(self) -> int:
        """Return the daemon's pid, 0 where none is known to run."""
        if self.heard.pong is not None:
            return self.heard.pong.pid
        return int(self.systemd.service.get("MainPID", "0") or 0)

    @property
    def mute(self) -> int:
        """Return the pid of what holds the store and answers nobody, 0 where none is known."""
        is_mute = self.is_ours and self.heard.pong is None
        return holder_of(self.paths.state) if is_mute else 0

    @property
    def is_of_unit(self) -> bool:
        """Tell whether it is ckptd.service that runs here."""
        return self.pid > 0 and self.systemd.service.get("MainPID") == str(self.pid)


def find(config_path: str | None, endpoint: str, scope: str = "") -> Place:
    """Return what is to be looked at. `scope`: system, user, or "" to choose as ckptctl does."""
    path = os.path.abspath(endpoint.removeprefix("ipc://")) if endpoint else ""
    is_system = scope == "system" if scope else _is_system(config_path, path)
    uid = 0 if is_system else os.geteuid()
    env = os.environ if is_system == (os.geteuid() == 0) else {}
    systemd = Systemd(is_system=is_system)
    loaded, found, error = _load(config_path or paths.default_config(uid, env), config_path)
    at = paths.resolve(uid, env, state_dir=loaded.daemon.state_dir, run_dir=loaded.daemon.run_dir)
    if path:
        at = msgspec.structs.replace(at, socket=path)
    heard = ask(at.socket, systemd)
    if heard.status is not None:
        at = msgspec.structs.replace(at, state=heard.status.state_dir)
    return Place(is_system, loaded, found, error, at, systemd, heard, Log(at.state))


def _is_system(config_path: str | None, socket_path: str) -> bool:
    if os.geteuid() == 0:
        return True
    if socket_path:
        return _owner(socket_path) == 0
    if config_path or os.path.exists(user_socket()):
        return False
    if os.path.exists(SYSTEM_SOCKET):
        return True
    # None runs: the one that would, by its unit.
    system, own = (Systemd(is_system=each).service.get("LoadState") for each in (True, False))
    return system == "loaded" and own != "loaded"


def _owner(path: str) -> int:
    try:
        return os.stat(path).st_uid
    except OSError:
        return os.geteuid()


def _load(path: str, given: str | None) -> tuple[config.Config, str, CkptdError | None]:
    """Return the configuration, its file, and what is wrong with it."""
    if given is None and not os.path.exists(path):
        return config.Config(), "", None
    try:
        return config.load(path), path, None
    except CkptdError as wrong:
        return config.Config(), path, wrong


def ask(path: str, systemd: Systemd) -> Heard:
    """Return what the daemon at `path` answers; a daemon that sleeps is not woken."""
    is_there = os.path.exists(path) and os.access(path, os.W_OK)
    if not is_there or systemd.is_asleep or tools.connects(path) is False:
        return Heard()
    pong = None
    try:
        with Client(f"ipc://{path}", ANSWER_S, reconnects=False) as client:
            pong = client.call("ping", Empty(), Pong)
            return Heard(pong, client.call("daemon", Empty(), DaemonStatus))
    except Denied as refused:
        return Heard(pong, None, refused)
    except CkptdError:
        return Heard(pong)
