"""Signals to a task, to its whole tree, and the proof that nothing of it is left.

With a control group the tree is what is in it. Without one it is all that descends from the main
process, shares its session, or carries the task's directory and attempt in its environment: that
finds daemonized processes too, but not one that also wiped its environment.
Invariant: nothing is signalled by a bare pid: a pidfd is opened, then the identity is compared,
and the signal goes through the pidfd. Read next: `cgroup.py`.
"""

import contextlib
import os
import signal

from ckptd.runner import identity
from ckptd.runner.cgroup import Group
from ckptd.runner.identity import Stat

_ENVIRON_BYTES_MAX = 4 << 20


class Tree:
    """All processes of one attempt."""

    __slots__ = ("_marks", "_shim", "group", "main", "ticks")

    def __init__(
        self,
        group: Group,
        main: tuple[int, int],
        shim: tuple[int, int],
        marks: tuple[bytes, ...],
    ) -> None:
        self.group = group
        self.main, self.ticks = main  # 0: it never came to be, or nobody knows
        self._shim = shim  # its other children are orphans of the tree
        self._marks = marks

    def signal_main(self, number: int) -> None:
        """Signal the main process, if it still is the one we mean."""
        send(self.main, self.ticks, number)

    def signal_all(self, number: int) -> None:
        """Signal every process of the tree; SIGKILL also reaches frozen ones."""
        if number == signal.SIGKILL:
            self.group.kill()
        for pid, ticks in self.members():
            send(pid, ticks, number)

    def freeze(self, *, frozen: bool) -> None:
        """Stop or continue the tree where it is."""
        if not self.group.freeze(frozen=frozen):
            self.signal_all(signal.SIGSTOP if frozen else signal.SIGCONT)

    def is_empty(self) -> bool:
        """Return whether nothing of the tree can run any more."""
        return not self.members()

    def members(self) -> list[tuple[int, int]]:
        """Return (pid, ticks) of what is alive."""
        if not self.group:
            return self._searched()
        pids = {*self.group.pids(), self.main}
        stats = ((pid, identity.look(pid)) for pid in pids if pid)
        alive = [(pid, stat.ticks) for pid, stat in stats if stat and stat.is_alive]
        return [(pid, ticks) for pid, ticks in alive if pid != self.main or ticks == self.ticks]

    def _searched(self) -> list[tuple[int, int]]:
        alive: dict[int, Stat] = {}
        for pid in identity.every_pid():
            stat = identity.look(pid)
            if stat and stat.is_alive and pid != os.getpid():
                alive[pid] = stat
        ours = {pid for pid, stat in alive.items() if self._is_ours(pid, stat)}
        shim, ticks = self._shim
        if shim in alive and alive[shim].ticks == ticks:
            ours |= {pid for pid, stat in alive.items() if stat.parent == shim}
        grown = True
        while grown:  # Bound: every turn but the last adds a process
            born = {pid for pid, stat in alive.items() if stat.parent in ours} - ours
            ours |= born
            grown = bool(born)
        return [(pid, alive[pid].ticks) for pid in ours]

    def _is_ours(self, pid: int, stat: Stat) -> bool:
        if self.main and stat.ticks >= self.ticks and self.main in {pid, stat.session, stat.group}:
            return pid != self.main or stat.ticks == self.ticks
        return self._carries_marks(pid)

    def _carries_marks(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                variables = file.read(_ENVIRON_BYTES_MAX).split(b"\0")
        except OSError:
            return False
        return all(mark in variables for mark in self._marks)


def send(pid: int, ticks: int, number: int) -> None:
    """Signal exactly this process; one that is gone, or whose pid was reused, is left alone."""
    if pid <= 0:
        return
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if identity.ticks_of(pid) == ticks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(fd, number)
    finally:
        os.close(fd)
