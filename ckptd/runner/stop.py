"""Signals to a task, to its whole tree, and the proof that nothing of it is left.

With a control group the tree is what is in it. Without one it is searched for: all that descends
from the main process, shares its session, or carries the task's directory and attempt in its
environment. That finds daemonized processes too, but not one that also wiped its environment.
What left its group (`su` and `systemd-run` do) ends with its supervisor, whose child it becomes;
once the supervisor is dead, too, it is both: what is in the group, and what the search finds.
Invariant: nothing is signalled by a bare pid: a pidfd is opened, then the identity is compared,
and the signal goes through the pidfd. Read next: `cgroup.py`.
"""

import contextlib
import os
import signal

from ckptd.runner import identity, linux
from ckptd.runner.cgroup import Group
from ckptd.runner.identity import Stat

_ENVIRON_BYTES_MAX = 4 << 20


class Tree:
    """All processes of one attempt."""

    __slots__ = ("_marks", "_shim", "group", "is_orphaned", "main", "ticks")

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
        self.is_orphaned = False  # the supervisor is dead: nobody else ends what left the group

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
        """Return (pid, ticks) of what is alive.

        Raises:
            OSError: for want of descriptors nothing can be said.
        """
        grouped = self._grouped() if self.group else set()
        searched = self._searched() if self.is_orphaned or not self.group else set()
        return [*(grouped | searched)]

    def _grouped(self) -> set[tuple[int, int]]:
        pids = {*self.group.pids(), self.main}
        stats = ((pid, identity.look(pid)) for pid in pids if pid)
        alive = [(pid, stat.ticks) for pid, stat in stats if stat and stat.is_alive]
        return {(pid, ticks) for pid, ticks in alive if pid != self.main or ticks == self.ticks}

    def _searched(self) -> set[tuple[int, int]]:
        alive: dict[int, Stat] = {}
        for pid in identity.every_pid():
            stat = identity.look(pid)
            if stat and stat.is_alive and pid != os.getpid():
                alive[pid] = stat
        leader = identity.look(self.main) if self.main else None
        # 0: nobody knows its session, or another process has its pid by now
        session = self.main if leader is None or leader.ticks == self.ticks else 0
        ours = {pid for pid, stat in alive.items() if self._is_ours(pid, stat, session)}
        shim, ticks = self._shim
        if shim in alive and alive[shim].ticks == ticks:
            ours |= {pid for pid, stat in alive.items() if stat.parent == shim}
        grown = True
        while grown:  # Bound: every turn but the last adds a process
            born = {pid for pid, stat in alive.items() if stat.parent in ours} - ours
            ours |= born
            grown = bool(born)
        return {(pid, alive[pid].ticks) for pid in ours}

    def _is_ours(self, pid: int, stat: Stat, session: int) -> bool:
        _, shim_ticks = self._shim
        if stat.ticks < max(self.ticks, shim_ticks):  # older than all of the tree
            return False
        is_main = (pid, stat.ticks) == (self.main, self.ticks)
        is_beside = session != 0 and session in {stat.session, stat.group}
        return is_main or is_beside or self._carries_marks(pid, stat)

    def _carries_marks(self, pid: int, stat: Stat) -> bool:
        if stat.state != b"Z":
            return self._are_marks_in(f"/proc/{pid}/environ")
        try:  # its first thread has ended, and only the others have memory
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError as error:
            if linux.is_shortage(error):
                raise
            return False
        return any(self._are_marks_in(f"/proc/{pid}/task/{one}/environ") for one in threads)

    def _are_marks_in(self, path: str) -> bool:
        try:
            with open(path, "rb") as file:
                variables = file.read(_ENVIRON_BYTES_MAX).split(b"\0")
        except OSError as error:
            if linux.is_shortage(error):
                raise
            return False
        return all(mark in variables for mark in self._marks)


def send(pid: int, ticks: int, number: int) -> None:
    """Signal exactly this process; one that is gone, or whose pid was reused, is left alone.

    Raises:
        OSError: for want of descriptors it was not.
    """
    fd = identity.open_exactly(pid, ticks) if pid > 0 else -1
    if fd < 0:
        return
    try:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(fd, number)
    finally:
        os.close(fd)
