"""Two back ends at once: new attempts go to one, what the other still runs is seen to its end.

Needed once, after `[daemon] runner` was changed under running tasks. Who runs an attempt is found
on disk: a unit has its record in `units/` before it is ordered.
Invariant: an attempt is only ever asked of the back end that ordered it; nobody else may declare it
not started, and run it again.
"""

import os
import select

from ckptd.core.port import Delete, DropCheckpoints, Effect, Forget, Runner, Sighting, Start
from ckptd.protocol.ids import parse_attempt_name
from ckptd.runner.fork import ForkRunner
from ckptd.units.recorder import Records
from ckptd.units.runner import UnitRunner


def has_forked(state_dir: str) -> bool:
    """Tell whether a fork runner has left attempts behind that are not forgotten."""
    try:
        return any(parse_attempt_name(name) for name in os.listdir(f"{state_dir}/attempts"))
    except OSError:
        return False


def has_units(state_dir: str, run_dir: str, boot_id: str) -> bool:
    """Tell whether units of this boot may still run."""
    records = Records(state_dir, run_dir, boot_id)
    return any(records.is_of_this_boot(key) for key in records)


class Either:
    """A Runner made of two."""

    def __init__(self, units: UnitRunner, forks: ForkRunner, *, prefers_units: bool) -> None:
        self._units, self._forks = units, forks
        self._first: Runner = units if prefers_units else forks
        self.name = self._first.name
        self.cgroup = self._first.cgroup
        self._poll = select.epoll()
        for one in (units, forks):
            self._poll.register(one.fileno(), select.EPOLLIN)

    @property
    def is_adopting(self) -> bool:
        """Tell whether the fate of an adopted attempt is still to be told."""
        return self._units.is_adopting or self._forks.is_adopting

    def fileno(self) -> int:
        """Return one descriptor that is readable when either has news."""
        return self._poll.fileno()

    def adopt(self, task: int, attempt: int) -> None:
        """Have the attempt found out about by who ordered it."""
        self._of(task, attempt).adopt(task, attempt)

    def carry_out(self, effect: Effect) -> None:
        """Hand an effect to who runs its attempt; starts and deletions to the preferred one."""
        if isinstance(effect, Start | Delete | DropCheckpoints):
            self._first.carry_out(effect)
            return
        self._of(effect.task, effect.attempt).carry_out(effect)
        if isinstance(effect, Forget):  # what is swept up may be of both
            self._units.carry_out(effect)
            self._forks.carry_out(effect)

    def poll(self) -> list[Sighting]:
        """Return what either saw."""
        return self._units.poll() + self._forks.poll()

    def close(self) -> None:
        """Let go of both."""
        self._units.close()
        self._forks.close()
        self._poll.close()

    def _of(self, task: int, attempt: int) -> Runner:
        return self._units if self._units.knows(task, attempt) else self._forks
