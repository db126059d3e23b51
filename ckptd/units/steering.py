"""Signals to units, and stopping them where they are. What has nobody to go to yet waits.

Invariant: one signal of a unit is under way at a time, so they arrive in the order they were asked
for. What certainly never reached the manager (one that is just executed anew has no name on the
bus) is sent again. Where that is not certain only SIGKILL is, and what lets a unit stand or go on:
twice is as good as once. A second SIGTERM may break off what the first one began.

Invariant: nothing goes to a whole unit once its main process is gone. The manager ends what is left
by itself (KillMode=mixed), and then runs the recorder in it.

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
from ckptd.units.systemd import Manager, is_lost, is_unsent

SEND_AGAIN_S = 1.0
LAST = (int(signal.SIGKILL), True)


class Steering:
    """What is asked of running units, in the order it was asked."""

    def __init__(self, manager: Manager, watch: Watch) -> None:
        self._manager, self._watch = manager, watch

    def signal(self, one: Unit, number: int, *, tree: bool) -> None:
        """Signal the main process or every process of a unit, now or as soon as it is there."""
        if number == signal.SIGKILL:
            one.is_dying = True
            if tree:
                one.is_dying_whole = True
                one.pending.clear()  # nothing that was asked before it matters
        one.keep_for_start(number, tree=tree)
        self.catch_up(one)

    def catch_up(self, one: Unit) -> None:
        """Do what waits for a start, for an answer, or for the connection."""
        if not self._can_reach(one):
            return
        if one.is_main_gone:
            one.wish = None
            one.pending = [(number, tree) for number, tree in one.pending if not tree]
        if one.wish is not None:
            self._send_wish(one, frozen=one.wish)
        if one.pending and one.under_way is None:
            one.under_way = number, tree = one.pending.pop(0)
            answered = partial(self._answered, one)
            self._manager.kill(one.name, "all" if tree else "main", number, answered)

    def renew(self, one: Unit) -> None:
        """The manager is there again: nothing follows a SIGKILL, so that it is sent once more."""
        if one.is_dying_whole and LAST not in {one.under_way, *one.pending}:
            one.pending = [LAST]
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

    def _answered(self, one: Unit, reply: Reply) -> None:
        sent, one.under_way = one.under_way, None
        assert sent is not None, "each is answered once"
        if _is_sent_again(one, sent, reply):
            if sent not in one.pending:
                one.pending.insert(0, sent)
            self._later(one)
        else:
            self.catch_up(one)

    def _later(self, one: Unit) -> None:
        self._watch.after(SEND_AGAIN_S, partial(self.catch_up, one))


def _is_sent_again(one: Unit, sent: tuple[int, bool], reply: Reply) -> bool:
    if one.is_dying_whole and sent != LAST:  # which waits behind it
        return False
    return is_lost(reply) if sent[0] == signal.SIGKILL else is_unsent(reply)
