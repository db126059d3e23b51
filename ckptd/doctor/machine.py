"""The machine: what holds limits, what is bounded, what the clock says.

Read next: `disk.py`, docs/LIMITS.md.
"""

import contextlib
import ctypes
import os
import re
import resource
from collections.abc import Iterator

import psutil

from ckptd.doctor import tools
from ckptd.doctor.contact import runner_to_be
from ckptd.doctor.finding import Check, Finding, bad, ok, warn
from ckptd.doctor.place import Place
from ckptd.door.guard import DESCRIPTORS_MIN
from ckptd.host import clock
from ckptd.runner import cgroup
from ckptd.runner.quota import managed, usable

CLOCK_MIN_NS = 1_735_689_600 * 10**9  # 2025: before it, the clock was never set
OPTIONS = {"memory": "--memory", "cpu": "--cpus", "pids": "--tasks-max", "io": "--io-weight"}
_GROUPS = "/sys/fs/cgroup"
_TIME_ERROR = 5  # Source: adjtimex(2), TIME_ERROR
_TIMEX_BYTES = 512  # more than struct timex on any machine


def limits(place: Place) -> Iterator[Finding]:
    """Look which limits of tasks are held, for the runner in force or the one that would be."""
    status = place.heard.status
    is_unit = (status.runner if status else runner_to_be(place)) == "unit"
    held = managed(0 if place.is_system else os.geteuid()) if is_unit else _delegated()
    missing = [option for name, option in OPTIONS.items() if name not in held]
    where = f"control groups {_version()}, tasks are {'units' if is_unit else 'processes'}"
    if not missing:
        yield ok("limits", f"{where}: {', '.join(OPTIONS.values())} are held")
        return
    text = f"{where}: not held are {', '.join(missing)}"
    if is_unit and not place.is_system:
        advice = "as root: systemctl edit user@.service: Delegate=cpu cpuset io memory pids"
    elif is_unit:
        advice = (
            "let the kernel have them (cgroup_enable=memory at boot); a container may hide them"
        )
    else:
        advice = "run it under systemd, which holds all of them"
    yield warn("limits", text, advice)


def _version() -> str:
    if os.path.exists(f"{_GROUPS}/cgroup.controllers"):
        return "v2"
    return "v1 with v2 beside" if os.path.isdir(f"{_GROUPS}/unified") else "v1"


def _delegated() -> frozenset[str]:
    """Return the controllers of a daemon that forks, started from here; leaves nothing behind."""
    roots = cgroup.discover(f"/ckptd-doctor-{os.getpid()}")
    words: frozenset[str] = frozenset()
    if roots.unified:
        handed = tools.read_text(f"{roots.unified}/cgroup.controllers").split()
        words = usable(roots.unified, handed)
    for path in (roots.unified, roots.memory, roots.freezer):
        with contextlib.suppress(FileNotFoundError):  # "", or a daemon swept it away
            os.rmdir(path)
    return words | {"memory"} if roots.memory else words


def groups(place: Place) -> Iterator[Finding]:
    """Look what the fork runner uses, where it is the one."""
    status = place.heard.status
    if status is None or status.runner != "fork":
        return
    if status.cgroup and status.cgroup != "none":
        yield ok("cgroup", re.sub(r" /\S+", "", status.cgroup))
    else:
        text = "none is writable: tasks are ended by process group"
        yield warn("cgroup", text, "under systemd set Delegate=yes")


def pressure(_: Place) -> Iterator[Finding]:
    """Look whether the kernel tells how short of memory it is (PSI)."""
    first = tools.read_text("/proc/pressure/memory").partition("\n")[0]
    if first:
        share = first.partition("avg300=")[2].partition(" ")[0]
        yield ok("pressure", f"the kernel tells it: {share} % of 5 minutes waited for memory")
    else:
        text = "the kernel does not tell it (PSI): systemd-oomd cannot work"
        yield warn("pressure", text, "boot with psi=1 on the kernel's command line")


def memory(_: Place) -> Iterator[Finding]:
    """Look at memory and swap."""
    room, swap = psutil.virtual_memory(), psutil.swap_memory()
    text = (
        f"{room.available >> 20} MiB of {room.total >> 20} available, swap {swap.total >> 20} MiB"
    )
    if room.available < room.total // 20:
        advice = "tasks may be killed for the host: --memory bounds each of them"
        yield warn("memory", text, advice)
    else:
        yield ok("memory", text)


def descriptors(place: Place) -> Iterator[Finding]:
    """Look how many files the daemon may open: a flood of connections must not exhaust them."""
    found = _limit_of(place)
    if found < 0 or found >= DESCRIPTORS_MIN:
        yield ok("open files", f"limit {'none' if found < 0 else found}")
    else:
        text = f"limit {found}: too low to stand a flood of connections"
        yield warn("open files", text, f"LimitNOFILE={DESCRIPTORS_MIN} or more, or: ulimit -Hn")


def _limit_of(place: Place) -> int:
    """Return the hard limit: of the daemon that runs, of its unit, else of who asks."""
    for line in tools.read_text(f"/proc/{place.pid}/limits").splitlines() if place.pid else []:
        if line.startswith("Max open files"):
            word = line.split()[4]
            return int(word) if word.isdigit() else -1
    asked = place.systemd.service.get("LimitNOFILE", "")
    if asked.isdigit() and place.systemd.service.get("LoadState") == "loaded":
        return int(asked)
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def time(place: Place) -> Iterator[Finding]:
    """Look whether the wall clock is set, and kept right by somebody."""
    if clock.Clock().now().at_ns < CLOCK_MIN_NS:
        yield bad(
            "clock", "the wall clock was never set", "set it: due times go by it: date -s ..."
        )
    elif _is_synchronised():
        yield ok("clock", f"set and synchronised; boot {clock.boot_id()}")
    else:
        text = "set, but nobody keeps it right: due times and timeouts go by it"
        yield warn("clock", text, clock_advice(has_systemd=place.systemd.version > 0))


def clock_advice(*, has_systemd: bool) -> str:
    """Return what keeps the clock right here; that of a container is its host's."""
    if has_systemd:
        return "timedatectl set-ntp true; if it refuses: apt install systemd-timesyncd"
    return "a container has its host's clock: look there; else: apt install chrony"


def _is_synchronised() -> bool:
    if os.path.exists("/run/systemd/timesync/synchronized"):
        return True
    asked = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes 0: reads only
    state = ctypes.CDLL(None, use_errno=True).adjtimex(asked)
    return 0 <= int(state) < _TIME_ERROR


CHECKS: tuple[Check, ...] = (limits, groups, memory, pressure, descriptors, time)
