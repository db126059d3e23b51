"""Where things are: root's directories under /etc, /var/lib and /run, everybody else's under XDG.

Knows names only; creating and locking belong to `ckptd/storage/store.py`. What systemd hands
over (STATE_DIRECTORY and its kin) wins over our own defaults, the configuration wins over both.
Read next: `config.py`.
"""

import os
from collections.abc import Mapping

import msgspec

from ckptd.home import home
from ckptd.protocol.errors import BadConfig

SOCKET_NAME = "ctl.sock"
SOCKET_PATH_BYTES_MAX = 107  # sun_path of unix(7), less the closing zero byte
RUN_BYTES_MAX = SOCKET_PATH_BYTES_MAX - len("/notify/9999999.sock")  # of ten million tasks


class Paths(msgspec.Struct, frozen=True):
    """The three directories of one daemon."""

    state: str
    run: str
    socket: str


def default_config(uid: int, env: Mapping[str, str]) -> str:
    """Return the file that is read where `--config` names none; it need not exist."""
    if given := _handed_over(env, "CONFIGURATION_DIRECTORY"):
        return os.path.join(given, "ckptd.toml")
    if uid == 0:
        return "/etc/ckptd/ckptd.toml"
    base = env.get("XDG_CONFIG_HOME") or os.path.join(home(env), ".config")
    return os.path.join(base, "ckptd", "ckptd.toml")


def resolve(uid: int, env: Mapping[str, str], *, state_dir: str = "", run_dir: str = "") -> Paths:
    """Return the directories in force; "" leaves the choice to the mode."""
    state = state_dir or _handed_over(env, "STATE_DIRECTORY") or _default_state(uid, env)
    run = run_dir or _handed_over(env, "RUNTIME_DIRECTORY") or _default_run(uid, env, state)
    return Paths(state=state, run=run, socket=os.path.join(run, SOCKET_NAME))


def make_run(path: str) -> None:
    """Make the runtime directory, whatever the umask; one that is there stays as it is.

    Tasks and clients of all users pass through root's. Raises OSError.
    """
    mode = 0o755 if os.geteuid() == 0 else 0o700
    try:
        os.makedirs(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
    else:
        os.chmod(path, mode)


def check_run(run: str, where: str = "") -> None:
    """Raise BadConfig for a directory in which no socket of a task could be bound.

    Its tasks would be without NOTIFY_SOCKET, and say nothing about it.
    """
    size = len(os.fsencode(run))
    if size > RUN_BYTES_MAX:
        raise BadConfig(
            f"{where}daemon.run_dir has {size} bytes, over {RUN_BYTES_MAX}: the sockets of tasks"
            f" have no room in {run}",
            "choose a shorter daemon.run_dir, such as one below /run",
        )


def _default_state(uid: int, env: Mapping[str, str]) -> str:
    if uid == 0:
        return "/var/lib/ckptd"
    base = env.get("XDG_STATE_HOME") or os.path.join(home(env), ".local", "state")
    return os.path.join(base, "ckptd")


def _default_run(uid: int, env: Mapping[str, str], state: str) -> str:
    if uid == 0:
        return "/run/ckptd"
    if runtime := env.get("XDG_RUNTIME_DIR"):
        return os.path.join(runtime, "ckptd")
    return os.path.join(state, "run")


def _handed_over(env: Mapping[str, str], name: str) -> str:
    """Return the first directory of a systemd list such as `/var/lib/ckptd:/var/lib/other`."""
    return env.get(name, "").partition(":")[0]
