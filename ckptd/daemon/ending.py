"""How the daemon comes to its end, and what becomes of the tasks that run then.

| who says so                 | tasks                               | and then                |
| --------------------------- | ----------------------------------- | ----------------------- |
| SIGTERM, SIGINT             | live on                             | the daemon exits        |
| SIGTERM, RUN_DIR/stopping   | save, end: the ladder up to SIGKILL | it exits when all ended |
| `shutdown` keep             | live on                             | it exits                |
| `shutdown` checkpoint, kill | the ladder; SIGKILL at once         | it exits when all ended |
| a shutdown is announced     | save, end                           | it stays for SIGTERM    |
| ... and called off          | start again                         | it goes on              |

Attempts that end by this are interruptions: they start again with the next daemon by themselves.
Time is asked for when a task ended or a rung was climbed, and only for as long as the next rung
takes: what not even SIGKILL ends (or a dead bus keeps us from killing) is given up, so that it
cannot hold up the machine: its units are then stopped by the service manager. Nothing here waits
for adoption: a stop is a record first, and its effect reaches the attempt as soon as the runner
has it.
Invariant: `drive` runs before the turn's commit and may stage records. Read next: `plan.py`.
"""

import contextlib
import os
from collections.abc import Callable

from ckptd.core.decide import Case, stop
from ckptd.core.policy import Caller, Now
from ckptd.core.records import ACTIVE, DaemonStopped, StopIntent
from ckptd.daemon.engine import Engine
from ckptd.host.journal import INFO, WARNING, Journal, Kind
from ckptd.host.notify import Notify

STOPPING_FLAG = "stopping"  # in RUN_DIR: the machine, or all of ckptd, is going down
MARGIN_S = 30.0  # for what follows a rung: the end to be seen, read and written
_ITSELF = Caller(-1, -1, admin=True)
_KILL = 2  # the last rung
_FATES = {"keep": "live on", "checkpoint": "are to save and end", "kill": "are killed"}


class Ending:
    """One end, from the first word of it to the last task."""

    def __init__(self, engine: Engine, notify: Notify, journal: Journal, run_dir: str) -> None:
        self._engine, self._notify, self._journal = engine, notify, journal
        self._flag = os.path.join(run_dir, STOPPING_FLAG)
        self._tasks = ""  # keep, checkpoint or kill once an end is near
        self._exits = False
        self._seen = (0, 0)  # active attempts, rungs climbed by them
        self._give_up_ns = 0  # wall clock
        self.is_over = False
        self.on_drained: Callable[[], None] = lambda: None

    def forget(self) -> None:
        """Drop the flag of an earlier shutdown: that we start means that it is over."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._flag)

    @property
    def has_begun(self) -> bool:
        """Tell whether no new work is taken."""
        return self._tasks != ""

    @property
    def wake_ns(self) -> int:
        """Return when the tasks that are left are given up; 0 for never."""
        return self._give_up_ns if self._exits else 0

    def step_clock(self, step_ns: int) -> None:
        """Take in that the wall clock was set: tasks that are left keep their time."""
        if self._give_up_ns:
            self._give_up_ns += step_ns

    def signalled(self) -> None:
        """Take SIGTERM. A second one ends a wait for tasks, unless the machine goes down."""
        was_announced = self.has_begun and not self._exits
        if not was_announced and not os.path.exists(self._flag):
            self.begin("keep")
        elif not self._exits:
            self.begin("checkpoint")

    def begin(self, tasks: str) -> None:
        """Begin to stop; what happens to running tasks is `tasks`."""
        if self._exits and tasks == self._tasks:
            return
        self._tasks, self._exits = tasks, True
        self._engine.draining = True
        count, fate = len(self._engine.state.active), _FATES[tasks]
        text = f"stopping; {count} running tasks {fate}" if count else "stopping; no task runs"
        self._notify.stopping(text)
        self._journal.event(Kind.DAEMON_STOPPING, text, INFO)

    def announced(self, *, is_coming: bool) -> None:
        """Take news of the machine's shutdown: tasks save before anything is stopped.

        Not yet STOPPING=1: the manager would not believe us any more if it were called off.
        """
        if self._exits or is_coming == self.has_begun:
            return
        self._tasks = "checkpoint" if is_coming else ""
        self._engine.draining = is_coming
        if is_coming:
            text = f"the machine is going down: {len(self._engine.state.active)} tasks save and end"
        else:
            text = "the shutdown of the machine was called off: tasks start again"
        self._journal.event(Kind.DAEMON_STOPPING, text, INFO)
        self._notify.status(text)

    def drive(self, now: Now) -> None:
        """Go on with the end, if there is one."""
        if not self.has_begun:
            return
        if self._tasks != "keep":
            self._stop_tasks(now)
        if self._tasks != "keep" and self._engine.state.active:
            if not self._exits or now.at_ns < self._give_up_ns:
                return
            count = len(self._engine.state.active)
            text = f"{count} tasks do not end, not even by SIGKILL: left to the service manager"
            self._journal.event(Kind.DAEMON_STOPPING, text, WARNING)
        self.on_drained()
        if self._exits:
            self._engine.stage([DaemonStopped(now.at_ns)])
            self.is_over = True

    def _stop_tasks(self, now: Now) -> None:
        """Give every active attempt its first rung; the next ones come by themselves."""
        state, policy = self._engine.state, self._engine.policy
        case = Case(state, _ITSELF, now, policy)
        orders: list[StopIntent] = []
        for number in state.active:
            task = state.tasks.get(number)
            if task is None or task.run is None or task.phase not in ACTIVE:
                continue
            run = task.run
            if run.stop is None and self._tasks == "checkpoint":
                grace_s = task.unpacked().grace_s
                orders.append(stop(task, run, case, "shutdown", grace_s=grace_s, ask=True))
            elif run.stop is None or (self._tasks == "kill" and run.stop.rung < _KILL):
                why = run.stop.why if run.stop is not None else "shutdown"
                orders.append(StopIntent(task.id, run.attempt, now.at_ns, why, _KILL, 0, 0.0, -1))
        self._engine.stage(orders)
        self._ask_for_time(now)

    def _ask_for_time(self, now: Now) -> None:
        """Ask for more time where there was progress: an end, or a rung."""
        state = self._engine.state
        rungs, until_ns = 0, now.at_ns
        for number in state.active:
            task = state.tasks.get(number)
            run = task.run if task is not None else None
            if run is not None and run.stop is not None:
                rungs += 1 + run.stop.rung
                until_ns = max(until_ns, run.stop.next_ns)
        seen = (len(state.active), rungs)
        if seen != self._seen:
            self._seen = seen
            self._give_up_ns = until_ns + int(MARGIN_S * 1e9)
            self._notify.extend_timeout((self._give_up_ns - now.at_ns) / 1e9)
