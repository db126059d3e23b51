"""Signals to units, and stopping them where they are. What has nobody to go to yet waits.

A unit is paused by SIGSTOP, not by its cgroup's freezer: with systemd 257 the death of a frozen
unit's main process hangs PID 1 for ever. It starts the recorder by a vfork straight into the frozen
group and waits for an exec that cannot come. Any user could do that to the machine, with
`ckptctl pause` and `kill -9`. Besides, `systemctl stop` sends SIGCONT by itself.
Read next: `runner.py`.
"""

import signal

from ckptd.protocol.limits import STARVED_BYTES
from ckptd.runner.instance import Stage, Unit
from ckptd.units.systemd import Manager


class Steering:
    """What is asked of running units, in the order it was asked."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def catch_up(self, one: Unit) -> None:
        """Do what waits for a start or for the connection."""
        if not self._can_reach(one):
            return
        if one.is_frozen:
            self.freeze(one, frozen=True)
        while one.pending:  # Bound: PENDING_SIGNALS_MAX
            number, tree = one.pending.pop(0)
            self._manager.kill(one.name, "all" if tree else "main", number)

    def starve(self, one: Unit) -> None:
        """Have the kernel's OOM killer end a unit, and leave its recorder what it needs to run.

        Where the manager is not reached, or the unit lives on so little, SIGKILL follows.
        """
        if self._can_reach(one):
            self._manager.limit_memory(one.name, STARVED_BYTES)

    def freeze(self, one: Unit, *, frozen: bool) -> None:
        """Stop every process of a unit where it is, or let them go on."""
        one.is_frozen = frozen
        if self._can_reach(one):
            one.has_left_frozen = False
            self._manager.kill(one.name, "all", signal.SIGSTOP if frozen else signal.SIGCONT)

    def _can_reach(self, one: Unit) -> bool:
        return one.stage == Stage.RUNNING and self._manager.is_up
