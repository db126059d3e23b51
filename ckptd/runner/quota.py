"""Limits beside memory, where the v2 controllers are ours: processors, processes, share of disk.

    cpus 1.5        cpu.max     150000 100000
    tasks_max 100   pids.max    100
    io_weight 50    io.weight   default 50

A group serves one attempt after the other, so what one had is taken back before the next begins.
Loaded by the supervisors: stdlib only. Read next: `cgroup.py`.
"""

import os

_PERIOD_US = 100_000
_SHORTEST_US = 1_000  # the kernel takes no quota below this
_FILES = (("cpu", "cpu.max"), ("pids", "pids.max"), ("io", "io.weight"))
_NAMES = {"cpu": "cpus", "pids": "tasks-max", "io": "io-weight"}
_NONE = (0.0, 0, 0)


class Quota:
    """What the group of one supervisor is limited to at the moment."""

    __slots__ = ("_controllers", "_directory", "_is_clean")

    def __init__(self, directory: str, controllers: frozenset[str]) -> None:
        self._directory = directory
        self._controllers = controllers
        self._is_clean = True  # nothing was set, or all of it was taken back

    def set(self, cpus: float, tasks_max: int, io_weight: int) -> str:
        """Set all limits, 0 for none; return the file that does not take its own, "" for none.

        What no controller is there for is left out: see `not_held`.
        """
        is_none = (cpus, tasks_max, io_weight) == _NONE
        if is_none and self._is_clean:
            return ""
        self._is_clean = is_none
        texts = (_cpu_max(cpus), str(tasks_max or "max"), f"default {io_weight or 100}")
        for (controller, name), text in zip(_FILES, texts, strict=True):
            if controller in self._controllers and not wrote(f"{self._directory}/{name}", text):
                return name
        return ""


def usable(directory: str, handed_down: list[str]) -> frozenset[str]:
    """Return which controllers limit the groups below: a kernel may have one without its file."""
    files = dict(_FILES)
    return frozenset(
        name
        for name in handed_down
        if name not in files or os.path.exists(f"{directory}/{files[name]}")
    )


def managed(uid: int) -> frozenset[str]:
    """Return the controllers that the service manager has: the system's for uid 0, else a user's.

    On a machine with v1 groups the system's manager has all that there are.
    """
    root = "/sys/fs/cgroup"
    if uid and os.path.exists(f"{root}/cgroup.controllers"):
        root += f"/user.slice/user-{uid}.slice/user@{uid}.service"
    try:
        with open(f"{root}/cgroup.controllers", encoding="ascii") as file:
            return frozenset(file.read().split())
    except OSError:
        return frozenset() if uid else frozenset(os.listdir(root))


def not_held(
    controllers: frozenset[str], *, has_memory: bool, limits: tuple[int, float, int, int]
) -> str:
    """Return the options whose limits nothing holds, "" for none.

    `limits`: memory_bytes, cpus, tasks_max, io_weight as they are asked for.
    """
    memory_bytes, *others = limits
    missing = ["memory"] if memory_bytes and not has_memory else []
    for (controller, _), wanted in zip(_FILES, others, strict=True):
        if wanted and controller not in controllers:
            missing.append(_NAMES[controller])
    return ", ".join(missing)


def _cpu_max(cpus: float) -> str:
    quota = str(max(_SHORTEST_US, int(cpus * _PERIOD_US))) if cpus else "max"
    return f"{quota} {_PERIOD_US}"


def wrote(path: str, text: str) -> bool:
    """Write to a file of a control group; tell whether it was there and took the text."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, text.encode())
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
