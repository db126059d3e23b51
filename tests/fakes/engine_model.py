"""One daemon's life without a daemon: engine and log over any disk, driven turn by turn."""

import random
from collections.abc import Iterable
from typing import Any

from ckptd.core.decide import Case, decide
from ckptd.core.plan import adoption
from ckptd.core.policy import Caller, Now, Policy
from ckptd.core.port import EndSeen, Identity, Start, StartSeen
from ckptd.core.records import DaemonStarted
from ckptd.core.state import State
from ckptd.daemon.engine import Engine
from ckptd.daemon.recovery import replay
from ckptd.protocol import messages as m
from ckptd.storage.disk import Disk
from ckptd.storage.snapshot import SnapshotDone
from ckptd.storage.store import Store
from tests.fakes.log_model import ROOT, SMALL

ADMIN = Caller(0, 0, admin=True)
POLICY = Policy(slots=2)

_WAYS = {
    "queued": ("queued", "", 0), "starting": ("starting", "", 0), "running": ("running", "", 0),
}  # fmt: skip
"""Phase, reason and time of a task that has not ended: nobody here holds, stops or delays one."""


def picture(state: State) -> dict[int, Any]:
    """Return of each task all that a client is told of where it is and how its attempts went."""
    return {
        task.id: (task.phase.word, task.reason, task.until_ns, task.run and task.run.past)
        for task in state.tasks.ascending(0)
    }


def judge(state: State, ended: Iterable[tuple[int, int, int]]) -> None:
    """Every task is in a phase that these lives lead to; what `ended` is told with its outcome.

    `ended`: task, attempt, when in ns, all of them by exit with 0. Raises AssertionError.
    """
    told = {task: (attempt, at_ns) for task, attempt, at_ns in ended}
    for task, (phase, reason, until_ns, past) in picture(state).items():
        if phase in _WAYS and task not in told:
            assert (phase, reason, until_ns) == _WAYS[phase], f"task {task}: {reason} {until_ns}"
            assert not past, f"task {task} is {phase} and has ended: {past}"
            continue
        assert phase == "succeeded", f"task {task} is {phase}, its end was by exit with 0"
        assert len(past) == 1, f"task {task} has succeeded: {past}"
        one = past[0]
        assert (one.cause, one.code, one.signal) == ("exit", 0, 0), f"task {task}: {one}"
        assert one.ended_ns == until_ns, f"task {task} ended at {one.ended_ns}, says {until_ns}"
        if task in told:
            assert (one.attempt, one.ended_ns) == told[task], f"task {task}: {one}, {told[task]}"
    missing = told.keys() - picture(state).keys()
    assert not missing, f"ended, acknowledged and lost: {missing}"


class Reign:
    """From one recovery to the next crash."""

    def __init__(self, disk: Disk, at_ns: int) -> None:
        self.disk, self.at_ns = disk, at_ns
        store = Store.open(ROOT, disk, segment_bytes=SMALL, has_threads=False)
        found = store.recover()
        state = replay(found.chunks(), found.frames()).state
        epoch = max(found.epoch, state.epoch) + 1
        wal = store.arm(found, epoch=epoch, boot_id="b", at_ns=at_ns)
        self.store, self.engine = store, Engine(state, wal, POLICY)
        self.engine.stage([DaemonStarted(at_ns, epoch, "b", "0", 1, clean=True)])
        self.engine.commit()
        adoption(state, self.engine.observed, Now(at_ns))
        self.engine.orders()
        self.acked: set[int] = set()
        self.ordered: list[tuple[int, int]] = []
        self.ended: dict[tuple[int, int], int] = {}  # acknowledged: task, attempt -> when, in ns

    def turn(self, dice: random.Random) -> None:
        """Do some commands and sightings; remember as acknowledged what was committed."""
        self.at_ns += 1_000_000_000
        now = Now(self.at_ns, 1)
        ids: list[int] = []
        for _ in range(dice.randint(1, 4)):
            records, answer = decide(
                Case(self.engine.state, ADMIN, now, POLICY), m.Submit((m.TaskSpec(("x" * 50,)),))
            )
            assert isinstance(answer, m.Submitted)
            self.engine.stage(records)
            ids += answer.ids
        over = [key for key in self.ordered if dice.random() < 0.5]
        for task, attempt in over:
            self.engine.see(StartSeen(task, attempt, Identity("b", 1, 1), 2, self.at_ns), now)
            self.engine.see(EndSeen(task, attempt, "exit", ended_ns=self.at_ns), now)
            self.ordered.remove((task, attempt))
        self.engine.plan(now)
        self.engine.commit()
        self.acked |= set(ids)
        self.ended |= dict.fromkeys(over, self.at_ns)
        orders = self.engine.orders()
        self.ordered += [(o.task, o.attempt) for o in orders if isinstance(o, Start)]

    def snapshot(self) -> None:
        """Write State out."""
        writer = self.store.begin_snapshot(self.engine.state.lsn)
        for chunk in self.engine.image():
            writer.add(chunk)
        writer.finish()
        done = writer.poll()
        assert isinstance(done, SnapshotDone), done
