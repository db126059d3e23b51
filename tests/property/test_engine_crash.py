"""State and log together on a disk that forgets: what was acknowledged is there, once, for ever."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.decide import Case, decide
from ckptd.core.plan import adoption
from ckptd.core.policy import Caller, Now, Policy
from ckptd.core.port import EndSeen, Identity, Start, StartSeen
from ckptd.core.records import DaemonStarted
from ckptd.daemon.engine import Engine
from ckptd.daemon.recovery import replay
from ckptd.protocol import messages as m
from ckptd.storage.store import Store
from tests.fakes.log_model import ROOT, SMALL
from tests.fakes.memory_disk import MemoryDisk

ADMIN = Caller(0, 0, admin=True)
POLICY = Policy(slots=2)


class Reign:
    """One daemon's life without a daemon: engine, log and a disk, driven turn by turn."""

    def __init__(self, disk: MemoryDisk, at_ns: int) -> None:
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

    def turn(self, dice: random.Random) -> None:
        """Do some commands and sightings; remember as acknowledged what was committed."""
        self.at_ns += 1_000_000_000
        now, ids = Now(self.at_ns, 1), []
        for _ in range(dice.randint(1, 4)):
            records, answer = decide(
                Case(self.engine.state, ADMIN, now, POLICY), m.Submit((m.TaskSpec(("x" * 50,)),))
            )
            assert isinstance(answer, m.Submitted)
            self.engine.stage(records)
            ids += answer.ids
        for task, attempt in [key for key in self.ordered if dice.random() < 0.5]:
            self.engine.see(StartSeen(task, attempt, Identity("b", 1, 1), 2, self.at_ns), now)
            self.engine.see(EndSeen(task, attempt, "exit", ended_ns=self.at_ns), now)
            self.ordered.remove((task, attempt))
        self.engine.plan(now)
        self.engine.commit()
        self.acked |= set(ids)
        orders = self.engine.orders()
        self.ordered += [(o.task, o.attempt) for o in orders if isinstance(o, Start)]


@given(st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_whatever_the_disk_forgets_nothing_acknowledged_is_lost_and_no_id_comes_twice(
    seed: int,
) -> None:
    dice = random.Random(seed)
    disk, acked, at_ns = MemoryDisk(seed=seed), set[int](), 10**18
    started: set[tuple[int, int]] = set()
    for _ in range(4):
        reign = Reign(disk, at_ns)
        known = {task.id for task in reign.engine.state.tasks.ascending(0)}
        assert acked <= known, f"lost: {acked - known}"
        for _ in range(dice.randint(1, 12)):
            reign.turn(dice)
            if dice.random() < 0.1:
                _snapshot(reign)
        assert not acked & reign.acked, "an id was given twice"
        acked |= reign.acked
        new = set(reign.ordered)
        assert not started & new, "an attempt was ordered twice"
        started |= new
        at_ns = reign.at_ns
        disk = disk.crash(dice, keep=dice.random())


def _snapshot(reign: Reign) -> None:
    writer = reign.store.begin_snapshot(reign.engine.state.lsn)
    for chunk in reign.engine.image():
        writer.add(chunk)
    writer.finish()
    assert writer.poll() is not None


@given(st.integers(0, 1 << 32))
@settings(max_examples=20, deadline=None)
def test_an_effect_is_ordered_only_after_its_intent_survived(seed: int) -> None:
    dice = random.Random(seed)
    disk = MemoryDisk(seed=seed)
    reign = Reign(disk, 10**18)
    for _ in range(6):
        reign.turn(dice)
    later = Reign(disk.crash(dice, keep=0.0), 10**18)
    attempts = {
        task.id: task.run.attempt
        for task in later.engine.state.tasks.ascending(0)
        if task.run is not None
    }
    for task, attempt in reign.ordered:
        assert attempts[task] >= attempt
