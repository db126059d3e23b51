"""Control groups, as far as this machine lets us: v2, else v1, a mix of both, or none.

Every supervisor has one group for the tasks that it runs one after the other, named after its
identity; the supervisor itself stays outside, so that no kill, freeze or memory limit hits it.
(One per attempt would be prettier to look at, and costs 150 us per task on v1.)

    v2   cgroup.kill, cgroup.freeze; memory.max and memory.events where that controller is ours,
         and likewise what `quota.py` has of cpu, pids and io
    v1   memory: limit and OOM counter; freezer: freeze, and kill by freezing first

Loaded by the supervisors: stdlib only. Read next: `stop.py` (what happens without any of it).
"""

import os
import time
import zlib

from ckptd.runner import linux
from ckptd.runner.quota import Quota, usable, wrote

_PREFIX = "ckptd-"  # of the parent of one store's groups
_STALE_S = 60.0
_READ_BYTES_MAX = 65_536
_CONTROLLERS = ("memory", "cpu", "pids", "io")  # of v2, as far as they are handed to us


class Roots:
    """Where our groups are made; "" where a hierarchy is not there for us."""

    __slots__ = ("controllers", "freezer", "memory", "unified", "unified_has_memory")

    def __init__(self, unified: str = "", memory: str = "", freezer: str = "") -> None:
        self.unified = unified
        self.memory = memory  # v1
        self.freezer = freezer  # v1
        own = _words(f"{unified}/cgroup.subtree_control") if unified else []
        self.controllers = usable(unified, own)
        self.unified_has_memory = "memory" in self.controllers

    @property
    def has_memory(self) -> bool:
        """Return whether memory can be limited."""
        return self.unified_has_memory or bool(self.memory)

    def __str__(self) -> str:
        parts = []
        if self.unified:
            does = ["kill", "freeze", *(name for name in _CONTROLLERS if name in self.controllers)]
            parts.append(f"v2 {self.unified} ({', '.join(does)})")
        if self.memory and not self.unified_has_memory:
            parts.append(f"v1 {self.memory} (memory)")
        if self.freezer and not self.unified:
            parts.append(f"v1 {self.freezer} (freezer)")
        return "; ".join(parts) or "none"


class Group:
    """The group of one supervisor. No method raises for a hierarchy that is missing or gone."""

    __slots__ = (
        "_directory", "_door", "_fork", "_ooms", "_paths", "freezer", "is_guarded",
        "limit_bytes", "memory", "memory_v2", "quota", "unified",
    )  # fmt: skip

    def __init__(self, roots: Roots, name: str) -> None:
        self.unified = f"{roots.unified}/{name}" if roots.unified else ""
        self.memory_v2 = self.unified if roots.unified_has_memory else ""
        self.memory = f"{roots.memory}/{name}" if roots.memory and not self.memory_v2 else ""
        self.freezer = f"{roots.freezer}/{name}" if roots.freezer and not self.unified else ""
        self.limit_bytes = 0
        self.quota = Quota(self.unified, roots.controllers)
        self._paths = [path for path in (self.unified, self.memory, self.freezer) if path]
        self._door = -1
        self._ooms = -1
        self._directory = -1
        self._fork: linux.CgroupFork | None = None
        self.is_guarded = False  # the supervisor has set itself a lower OOM score than tasks have

    def __bool__(self) -> bool:
        return bool(self.unified or self.freezer)

    @property
    def has_memory(self) -> bool:
        """Return whether there is a memory controller; without one nothing is limited."""
        return bool(self.memory_v2 or self.memory)

    # --- the supervisor's side --------------------------------------------------------------

    def make(self) -> None:
        """Make the group and keep its doors open.

        The supervisor enters the v1 memory group itself, for its children to be born there: no
        limit is on it unless a task's is, and then the OOM killer is told to spare the supervisor.
        """
        for path in self._paths:
            if not _mkdir(path):
                parent = os.path.dirname(path)  # another store's daemon swept it away as unused
                if _mkdir(parent) and path == self.unified:
                    _hand_down(parent)
                _mkdir(path)
        if self.memory:
            wrote(f"{self.memory}/cgroup.procs", str(os.getpid()))
        self._door = _open(f"{self.unified or self.freezer}/cgroup.procs", os.O_WRONLY)
        events = f"{self.memory_v2}/memory.events" if self.memory_v2 else ""
        self._ooms = _open(events or f"{self.memory}/memory.oom_control", os.O_RDONLY)
        self._directory = _open(self.unified or "", os.O_RDONLY | os.O_DIRECTORY)
        if self._directory >= 0:
            self._fork = linux.CgroupFork(self._directory)

    def fork(self) -> int:
        """Fork a child that is, and whose children will be, inside the group."""
        if self._fork is not None:
            pid = self._fork()
            if pid >= 0:
                return pid
            self._fork = None  # an old kernel, or one that a container's filter makes look old
        pid = os.fork()
        if pid > 0 and self._door >= 0:
            try:
                os.write(self._door, b"%d" % pid)
            except OSError:  # the group was removed, or the process is gone
                return pid
        return pid

    def renew(self) -> bool:
        """Make the group anew after a `kill`: a group that was killed once takes no more births.

        Linux 6.18 SIGKILLs what is born into it by clone3, as if it had been forked by one of the
        processes killed (it compares the kill count with that of the parent's group). A daemon
        that kills a group has its supervisor replaced. False where the old group is still there,
        or there is no new one: nothing more must be born here.
        """
        return self._fork is None or self._remake([self.unified])

    def _remake(self, paths: list[str]) -> bool:
        """Remove these of our groups and make them again; limits and counts begin anew."""
        self.close()
        if self.memory in paths:
            self._step_out()
        is_removed = all(_rmdir_tree(path) for path in paths)
        if (self.memory or self.memory_v2) in paths:
            self.limit_bytes = 0
        self.make()
        return is_removed and all(map(os.path.isdir, paths))

    def close(self) -> None:
        """Close the doors."""
        self._fork = None
        for fd in (self._door, self._ooms, self._directory):
            if fd >= 0:
                os.close(fd)
        self._door = self._ooms = self._directory = -1

    def leave(self) -> None:
        """Step out of the group, so that it can be removed."""
        self._step_out()
        self.remove()

    def _step_out(self) -> None:
        if self.memory:
            wrote(f"{os.path.dirname(self.memory)}/cgroup.procs", str(os.getpid()))

    def limit(self, memory_bytes: int) -> bool:
        """Set the memory limit, 0 for none; False where it is not set.

        v1 takes no limit below what is charged already, and what an earlier task left in a tmpfs
        stays charged to its group: the limit is then set on a group made anew.
        """
        if memory_bytes == self.limit_bytes or self._set_limit(memory_bytes):
            return True
        path = self.memory_v2 or self.memory
        return bool(path) and self._remake([path]) and self._set_limit(memory_bytes)

    def _set_limit(self, memory_bytes: int) -> bool:
        if self.memory_v2:
            text = str(memory_bytes) if memory_bytes else "max"
            is_set = wrote(f"{self.memory_v2}/memory.max", text)
            wrote(f"{self.memory_v2}/memory.swap.max", "0" if memory_bytes else "max")
        elif self.memory:
            self.is_guarded = wrote("/proc/self/oom_score_adj", "-1000")
            is_set = wrote(f"{self.memory}/memory.limit_in_bytes", str(memory_bytes or -1))
        else:
            return False
        if is_set:
            self.limit_bytes = memory_bytes
        return is_set

    def ooms(self) -> tuple[int, int]:
        """Return how many processes the OOM killer ended, and how often our own limit was hit.

        A kill without a hit was the host's doing, or that of a group above ours. v1 counts the
        hits only together with those that reclaiming memory could mend.
        """
        try:
            said = os.pread(self._ooms, _READ_BYTES_MAX, 0) if self._ooms >= 0 else b""
        except OSError:  # the group was removed
            return 0, 0
        counts = dict(line.split(b" ", 1) for line in said.splitlines() if b" " in line)
        hits = counts.get(b"oom", b"0")
        if self.memory and self.limit_bytes:
            hits = _read(f"{self.memory}/memory.failcnt") or b"0"
        return int(counts.get(b"oom_kill", b"0")), int(hits)

    # --- both sides -------------------------------------------------------------------------

    def kill(self) -> bool:
        """SIGKILL everything inside; False where there is no group to do it with."""
        if self.unified and wrote(f"{self.unified}/cgroup.kill", "1"):
            return True
        if not self:
            return False
        self.freeze(frozen=True)  # so that nothing forks away between listing and killing
        for pid in self.pids():
            try:
                os.kill(pid, 9)
            except OSError:  # it went, or it is a set-uid program and we are not root
                continue
        self.freeze(frozen=False)
        return True

    def freeze(self, *, frozen: bool) -> bool:
        """Stop or continue everything inside; False where there is no freezer."""
        if self.unified:
            return wrote(f"{self.unified}/cgroup.freeze", "1" if frozen else "0")
        if self.freezer:
            return wrote(f"{self.freezer}/freezer.state", "FROZEN" if frozen else "THAWED")
        return False

    def pids(self) -> list[int]:
        """Return the processes inside, also in groups that a task made below ours.

        Raises:
            OSError: for want of descriptors nothing can be said.
        """
        path = self.unified or self.freezer
        groups = _with_those_below(path) if path else []
        return [pid for one in groups for pid in _pids_in(one)]

    def remove(self) -> None:
        """Remove the group, unless something is inside."""
        for path in self._paths:
            _rmdir_tree(path)


# --- finding out what this machine has --------------------------------------------------------


def discover(state_dir: str) -> Roots:
    """Return where this process can make groups for a store, having made their parent there."""
    name = f"{_PREFIX}{zlib.crc32(os.fsencode(os.path.realpath(state_dir))):08x}"
    mounts = _mounts()
    own = _own_paths()
    unified = _unified(mounts.get("", ""), own.get("", "/"), name)
    if unified and "memory" in _words(f"{unified}/cgroup.subtree_control"):
        return Roots(unified)
    memory = _made(mounts.get("memory", ""), own.get("memory", "/"), name)
    freezer = _made(mounts.get("freezer", ""), own.get("freezer", "/"), name)
    return Roots(unified, memory, "" if unified else freezer)


def sweep(roots: Roots, is_gone: "IsGone") -> None:
    """Remove what killed supervisors left, and empty parents of stores that are not in use."""
    for root in (roots.unified, roots.memory, roots.freezer):
        for name in _names_in(root):
            pid, dot, ticks = name.partition(".")
            if dot and pid.isdigit() and ticks.isdigit() and is_gone(int(pid), int(ticks)):
                Group(roots, name).remove()
        host, _, own = root.rpartition("/")
        for name in _names_in(host):
            if name.startswith(_PREFIX) and name != own and _age_s(f"{host}/{name}") > _STALE_S:
                _rmdir(f"{host}/{name}")  # fails where a supervisor's group is inside


def _mounts() -> dict[str, str]:
    """Return controller -> mount point; "" is v2. Source: proc_pid_mountinfo(5)."""
    found: dict[str, str] = {}
    for line in _lines("/proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        point = left.split(" ")[4]
        if kind == "cgroup2":
            found[""] = point
        elif kind == "cgroup":
            found.update(dict.fromkeys(options.split(","), point))
    return found


def _own_paths() -> dict[str, str]:
    """Return controller -> our own group's path below the mount; "" is v2."""
    found: dict[str, str] = {}
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        found.update(dict.fromkeys(controllers.split(","), path))
    return found


def _unified(mount: str, own: str, name: str) -> str:
    """Return the v2 directory to work in, preferring one that can limit memory.

    No group may hold processes and hand controllers down at once, the root excepted: a group that
    systemd delegated above ours (DelegateSubgroup=) can, our own mostly cannot.
    """
    if not mount:
        return ""
    hosts = [os.path.dirname(own.rstrip("/")) or "/", own, "/"]
    possible = ""
    for host in dict.fromkeys(hosts):
        if host not in {own, "/"} and not _is_delegated(mount + host):
            continue
        path = _made(mount, host, name)
        if host == "/" or not _words(f"{mount}{host}/cgroup.procs"):
            _hand_down(f"{mount}{host}")
        if path and _hand_down(path):
            if possible:
                _rmdir(possible)
            return path
        possible = possible or path
    return possible


def _hand_down(path: str) -> bool:
    """Let the groups below have every controller that is there; False without that of memory."""
    taken = [wrote(f"{path}/cgroup.subtree_control", f"+{name}") for name in _CONTROLLERS]
    return taken[0]


def _is_delegated(path: str) -> bool:
    """Return whether systemd left this subtree to us. Source: systemd CGROUP_DELEGATION."""
    for attribute in ("user.delegate", "trusted.delegate"):
        try:
            return os.getxattr(path, attribute) == b"1"
        except OSError:
            continue
    return False


def _made(mount: str, own: str, name: str) -> str:
    if not mount:
        return ""
    path = f"{mount.rstrip('/')}{own.rstrip('/')}/{name}"
    if not _touched(path) and not _mkdir(path):
        return ""
    return path if os.access(f"{path}/cgroup.procs", os.W_OK) else ""


# --- small files ------------------------------------------------------------------------------


def _mkdir(path: str) -> bool:
    try:
        os.mkdir(path, 0o755)
    except OSError:
        return False
    return True


def _touched(path: str) -> bool:
    """Make a group young, so that nobody sweeps it away just now; False where there is none."""
    try:
        os.utime(path)
    except OSError:
        return os.path.isdir(path)
    return True


def _rmdir(path: str) -> bool:
    try:
        os.rmdir(path)
    except OSError:
        return False
    return True


def _with_those_below(path: str) -> list[str]:
    """Return a group and all groups below it, each after the one that it is in."""
    found = [path]
    for one in found:  # grows meanwhile. Bound: the groups that there are
        try:
            found += [entry.path for entry in os.scandir(one) if entry.is_dir()]
        except OSError as error:
            if linux.is_shortage(error):
                raise
            continue  # removed
    return found


def _names_in(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:  # "", or another store's daemon swept it away: `make` makes it anew
        return []


def _pids_in(path: str) -> list[int]:
    try:
        with open(f"{path}/cgroup.procs", "rb") as file:
            return [int(word) for word in file.read().split()]
    except OSError as error:
        if linux.is_shortage(error):  # of ours: it does not say that nothing is inside
            raise
        return []


def _rmdir_tree(path: str) -> bool:
    """Remove a group with what a task made below it; True where it is gone."""
    for one in reversed(_with_those_below(path)):
        _rmdir(one)
    return not os.path.isdir(path)


def _age_s(path: str) -> float:
    try:
        return time.time() - os.stat(path).st_mtime
    except OSError:
        return 0.0


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError:
        return -1


def _read(path: str) -> bytes:
    fd = _open(path, os.O_RDONLY)
    if fd < 0:
        return b""
    try:
        return b"".join(iter(lambda: os.read(fd, _READ_BYTES_MAX), b""))
    except OSError:
        return b""
    finally:
        os.close(fd)


def _lines(path: str) -> list[str]:
    return _read(path).decode(errors="replace").splitlines()


def _words(path: str) -> list[str]:
    return _read(path).decode(errors="replace").split()


TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` is not loaded by supervisors
    from collections.abc import Callable

    IsGone = Callable[[int, int], bool]
