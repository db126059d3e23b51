"""Which runner: units where a service manager of ours is there, processes of our own elsewhere.

"Of ours" is the system's for root and `systemd --user` for everybody else. With units, attempts
that an earlier daemon gave to processes of its own are still followed to their end (`either.py`).
Read next: `ckptd/units/runner.py`, `ckptd/runner/fork.py`.
"""

import os
import socket
from collections.abc import Callable
from typing import NamedTuple

from ckptd.core.port import Runner
from ckptd.host.paths import Paths
from ckptd.protocol.errors import BadConfig
from ckptd.runner.fork import ForkRunner
from ckptd.units.bus import system_bus, user_bus
from ckptd.units.either import Either, has_forked, has_units
from ckptd.units.runner import UnitRunner

BOOTED = "/run/systemd/system"  # Source: sd_booted(3)
ANSWER_S = 2.0
SYSTEM_BUS_UNITS = (
    "/usr/lib/systemd/system/dbus.socket",
    "/lib/systemd/system/dbus.socket",
    "/etc/systemd/system/dbus.socket",
)
_UNIX = "unix:path="


class Chosen(NamedTuple):
    """The runner, and that part of it that hears of the machine's shutdown, where there is one."""

    runner: Runner
    units: UnitRunner | None


def choose(wanted: str, paths: Paths, boot_id: str, on_shutdown: Callable[[bool], None]) -> Chosen:
    """Return the runner of `[daemon] runner`: auto, unit or fork.

    Raises BadConfig for "unit" where there is no service manager of ours.
    """
    is_system = os.geteuid() == 0
    missing = missing_manager(is_system=is_system)
    address = system_bus() if is_system else user_bus()
    if wanted == "unit" and missing:
        raise BadConfig(
            f'daemon.runner is "unit", but {missing}',
            'run ckptd under systemd, or set daemon.runner to "fork" or "auto"',
        )
    # "unit" waits for a bus that is away for a moment; so does "auto" where root's is installed.
    has_bus = (
        wanted == "auto"
        and not missing
        and (_is_installed(is_system=is_system) or _answers(address))
    )
    prefers_units = wanted == "unit" or has_bus
    units = forks = None
    if prefers_units or has_units(paths.state, paths.run, boot_id):
        units = UnitRunner(
            paths.state,
            paths.run,
            boot_id=boot_id,
            bus_address=address,
            is_system=is_system,
            on_shutdown=on_shutdown if is_system else None,  # logind is on the system's bus
        )
    if not prefers_units or has_forked(paths.state):
        forks = ForkRunner(paths.state, paths.run, boot_id=boot_id)
    return _joined(units, forks, prefers_units=prefers_units)


def _joined(units: UnitRunner | None, forks: ForkRunner | None, *, prefers_units: bool) -> Chosen:
    """Return the one there is, or both: attempts of the other kind may live on."""
    if units is not None and forks is not None:
        return Chosen(Either(units, forks, prefers_units=prefers_units), units)
    found = units or forks
    assert found is not None, "one of them is preferred"
    return Chosen(found, units)


def missing_manager(*, is_system: bool) -> str:
    """Return why there is no service manager of ours, "" where there is one."""
    if not os.path.isdir(BOOTED):
        return "this machine was not booted by systemd"
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    if not is_system and not os.path.isdir(f"{runtime}/systemd"):
        return f"user {os.geteuid()} has no `systemd --user`: there is no {runtime}/systemd"
    return ""


def _is_installed(*, is_system: bool) -> bool:
    """Tell whether the system has a bus, even if it does not answer now."""
    return is_system and any(os.path.exists(path) for path in SYSTEM_BUS_UNITS)


def _answers(address: str) -> bool:
    """Tell whether the bus takes a connection; one that is socket-activated starts by it."""
    path = address.removeprefix(_UNIX).partition(",")[0]
    if path == address:
        return True  # of a kind that cannot be looked at: the runner will see
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ANSWER_S)
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
