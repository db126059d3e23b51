"""One daemon's life without a daemon: engine and log over any disk, driven turn by turn."""

import random

from ckptd.core.decide import Case, decide
from ckptd.core.plan import adoption
from ckptd.core.policy import Caller, Now, Policy
from ckptd.core.port import EndSeen, Identity, Start, StartSeen
from ckptd.core.records import DaemonStarted
from ckptd.daemon.engine import Engine
from ckptd.daemon.recovery import replay
from ckptd.protocol import messages as m
from ckptd.storage.disk import Disk
from ckptd.storage.store import Store
from tests.fakes.log_model import ROOT, SMALL

ADMIN = Caller(0, 0, admin=True)
POLICY = Policy(slots=2)


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
        for task, attempt in [key for key in self.ordered if dice.random() < 0.5]:
            self.engine.see(StartSeen(task, attempt, Identity("b", 1, 1), 2, self.at_ns), now)
            self.engine.see(EndSeen(task, attempt, "exit", ended_ns=self.at_ns), now)
            self.ordered.remove((task, attempt))
        self.engine.plan(now)
        self.engine.commit()
        self.acked |= set(ids)
        orders = self.engine.orders()
        self.ordered += [(o.task, o.attempt) for o in orders if isinstance(o, Start)]

    def snapshot(self) -> None:
        """Write State out."""
        writer = self.store.begin_snapshot(self.engine.state.lsn)
        for chunk in self.engine.image():
            writer.add(chunk)
        writer.finish()
        assert writer.poll() is not None
