"""Signals to units, and stopping them where they are. What has nobody to go to yet waits.

Invariant: what the manager has not answered is sent again. One that is just executed anew has no
name on the bus, and a call to it comes back as an error; one that it had read may arrive twice.

A unit is paused by SIGSTOP, not by its cgroup's freezer: with systemd 257 the death of a frozen
unit's main process hangs PID 1 for ever. It starts the recorder by a vfork straight into the frozen
group and waits for an exec that cannot come. Any user could do that to the machine, with
`ckptctl pause` and `kill -9`. Besides, `systemctl stop` sends SIGCONT by itself.
Read next: `runner.py`.
"""

import signal
from functools import partial

from ckptd.protocol.limits import STARVED_BYTES
from ckptd.runner.instance import Stage, Unit
from ckptd.runner.watch import Watch
from ckptd.units.bus import Reply
from ckptd.units.systemd import Manager, is_lost

SEND_AGAIN_S = 1.0


class Steering:
    """What is asked of running units, in the order it was asked."""

    def __init__(self, manager: Manager, watch: Watch) -> None:
        self._manager, self._watch = manager, watch

    def signal(self, one: Unit, number: int, *, tree: bool) -> None:
        """Signal the main process or every process of a unit, now or as soon as it is there."""
        if number == signal.SIGKILL:
            one.is_dying = True
            one.is_dying_whole = one.is_dying_whole or tree
        one.keep_for_start(number, tree=tree)
        self.catch_up(one)

    def catch_up(self, one: Unit) -> None:
        """Do what waits for a start or for the connection."""
        if not self._can_reach(one):
            return
        if one.wish is not None:
            self._send_wish(one, frozen=one.wish)
        while one.pending:  # Bound: PENDING_SIGNALS_MAX
            number, tree = one.pending.pop(0)
            answered = partial(self._answered, one, number, tree)
            self._manager.kill(one.name, "all" if tree else "main", number, answered)

    def renew(self, one: Unit) -> None:
        """The manager is there again: nothing follows a SIGKILL, so that it is sent once more.

        Not where the main process is gone: the manager ends the rest, and the recorder runs.
        """
        is_alive = one.pidfd >= 0
        if one.is_dying_whole and is_alive and (signal.SIGKILL, True) not in one.pending:
            one.keep_for_start(signal.SIGKILL, tree=True)
        self.catch_up(one)

    def starve(self, one: Unit) -> None:
        """Have the kernel's OOM killer end a unit, and leave its recorder what it needs to run.

        Where the manager is not reached, or the unit lives on so little, SIGKILL follows.
        """
        if self._can_reach(one):
            self._manager.limit_memory(one.name, STARVED_BYTES)

    def freeze(self, one: Unit, *, frozen: bool) -> None:
        """Stop every process of a unit where it is, or let them go on."""
        one.is_frozen = one.wish = frozen
        self.catch_up(one)

    def _can_reach(self, one: Unit) -> bool:
        return one.stage == Stage.RUNNING and self._manager.is_up

    def _send_wish(self, one: Unit, *, frozen: bool) -> None:
        one.wish = None
        number = signal.SIGSTOP if frozen else signal.SIGCONT
        self._manager.kill(one.name, "all", number, partial(self._wish_answered, one, frozen))

    def _wish_answered(self, one: Unit, frozen: bool, reply: Reply) -> None:  # noqa: FBT001
        if not is_lost(reply):
            one.has_left_frozen = False
        elif one.is_frozen == frozen:  # else it is another one by now
            one.wish = frozen
            self._later(one)

    def _answered(self, one: Unit, number: int, tree: bool, reply: Reply) -> None:  # noqa: FBT001
        if is_lost(reply):
            one.keep_for_start(number, tree=tree)
            self._later(one)

    def _later(self, one: Unit) -> None:
        self._watch.after(SEND_AGAIN_S, partial(self.catch_up, one))
