"""`python -m tests.sim.states`: lives of the log, looked at before every operation of their disk.

A life is a few reigns over one store: groups of one to four frames between two syncs, markers,
snapshots, rotations, removals; it ends in order, by kill -9 or by a power cut. Each seed is one
life, told by it alone. Options: --states, --seconds (a bound), --seed (the first), --lives.
"""

import argparse
import random
import sys
import time
from collections import Counter

import msgspec

from ckptd.core import image
from ckptd.core.apply import apply
from ckptd.core.decide import Case, decide
from ckptd.core.policy import Caller, Now, Policy
from ckptd.core.records import AnyRecord, DaemonStarted
from ckptd.core.state import State
from ckptd.daemon.recovery import replay
from ckptd.protocol import messages as m
from ckptd.storage.snapshot import SnapshotDone
from ckptd.storage.store import Store
from ckptd.storage.wal import Wal
from tests import figures
from tests.fakes.memory_disk import MemoryDisk
from tests.sim.crash_states import STATES_MAX, Broken, CrashStates

ROOT = "/state"
ADMIN = Caller(0, 0, admin=True)
POLICY = Policy(slots=2)
SEGMENT_BYTES = (8 << 10, 12 << 10, 16 << 10)
TASKS_MAX = 6  # more are cancelled and cleaned away
AT_NS = 1_700_000_000_000_000_000


class LogLife:
    """A store, its log and the State in it, without a daemon around."""

    def __init__(self, seed: int, states_max: int = STATES_MAX) -> None:
        self.dice = random.Random(seed)
        self.disk = MemoryDisk(seed=seed)
        self.segment_bytes = self.dice.choice(SEGMENT_BYTES)
        self.states = CrashStates(ROOT, self.segment_bytes, random.Random(seed), states_max)
        self.acked = self.appended = 0
        self._wal: Wal | None = None
        self._state = State()
        self._taken: tuple[int, list[bytes]] = 0, []  # State at an LSN that is durable
        self.disk.watch = self._before

    def run(self, reigns: int = 4, steps: int = 14) -> None:
        """Live to the end. Raises Broken."""
        for _ in range(reigns):
            store, wal = self._begin()
            for _ in range(self.dice.randint(1, steps)):
                self._work(store, wal)
            self._end(store, wal)

    def _before(self, _kind: str, _path: str) -> None:
        if self._wal is not None:
            self.acked = max(self.acked, self._wal.durable_lsn)
            self.appended = max(self.appended, self._wal.next_lsn - 1)
        self.states.look(self.disk, self.acked, self.appended)

    def _begin(self) -> tuple[Store, Wal]:
        store = Store.open(ROOT, self.disk, segment_bytes=self.segment_bytes, has_threads=False)
        recovery = store.recover()
        self._taken = 0, []
        self._state = replay(recovery.chunks(), recovery.frames()).state
        self.acked = self.appended = recovery.last_lsn  # what was shown stays
        epoch = recovery.epoch + 1
        wal = self._wal = store.arm(recovery, epoch=epoch, boot_id="b" * 36, at_ns=AT_NS)
        self._append(wal, [DaemonStarted(AT_NS, epoch, "b", "0", 1, clean=True)])
        wal.sync()
        return store, wal

    def _work(self, store: Store, wal: Wal) -> None:
        """One group of frames, or a marker; now and then a snapshot in the middle of a group."""
        if self.dice.random() < 0.1:
            wal.mark_idle()
            return
        is_snapshot_due = self.dice.random() < 0.5
        for _ in range(self.dice.randint(1, 3)):
            self._append(wal, self._decided())
        if is_snapshot_due:
            self._snapshot(store)
        wal.sync()
        if self.dice.random() < 0.5:
            self._taken = self._state.lsn, self._chunks()

    def _decided(self) -> list[AnyRecord]:
        """Return what a client's wish leads to: short and long records."""
        everything = m.Selector(all=True)
        if len(self._state.tasks) >= TASKS_MAX:
            return self._decide(m.Cancel(everything)) or self._decide(m.Clean(everything))
        if self.dice.random() < 0.2:
            return self._decide(m.Hold(everything))
        words = "x" * self.dice.choice((5, 100, 600, 1_700))
        return self._decide(m.Submit((m.TaskSpec((words,)),) * self.dice.randint(1, 2)))

    def _decide(self, wish: m.Message) -> list[AnyRecord]:
        return decide(Case(self._state, ADMIN, Now(AT_NS, 1), POLICY), wish)[0]

    def _append(self, wal: Wal, records: list[AnyRecord]) -> None:
        if not records:
            return
        payload = msgspec.msgpack.encode(records)
        first = wal.append(payload, len(records))
        self.appended = wal.next_lsn - 1
        for lsn, record in enumerate(records, first):
            apply(self._state, lsn, record)

    def _snapshot(self, store: Store) -> None:
        """Write a snapshot of a durable LSN while the log has gone on, as its thread does."""
        lsn, chunks = self._taken
        if not chunks:
            return
        self._taken = 0, []
        writer = store.begin_snapshot(lsn)
        for chunk in chunks:
            writer.add(chunk)
        writer.finish()
        done = writer.poll()
        assert isinstance(done, SnapshotDone), done

    def _chunks(self) -> list[bytes]:
        return list(image.chunks(self._state))

    def _end(self, store: Store, wal: Wal) -> None:
        """End in order, by kill -9 (the page cache stays) or by a power cut."""
        how = self.dice.choice(("closed", "killed", "power"))
        if how == "closed":
            wal.mark_idle(closed=True)
            store.close()
        elif how == "power":
            self.disk.watch = None
            self.disk = self.disk.crash(self.dice, self.dice.random())
            self.disk.watch = self._before
        self.acked, self.appended = wal.durable_lsn, wal.next_lsn - 1
        self.disk.locked.clear()
        self._wal = None


def run(states: int, seconds: float, seed: int, lives: int) -> dict[str, object]:
    """Look at lives from `seed` on until one of the bounds is met; return the figures."""
    counts: Counter[str] = Counter()
    begun = time.process_time()
    for number in range(seed, seed + lives):
        if counts["examined"] >= states or time.process_time() - begun >= seconds:
            break
        life = LogLife(number)
        try:
            life.run()
        except Broken as broken:
            print(f"seed {number}: {broken}")
            print(f"again: python -m tests.sim.states --lives 1 --seed {number}")
            return {"violations": 1, "seed": number, **counts}
        counts.update(life.states.counts)
        counts["lives"] += 1
    cpu_s = time.process_time() - begun
    each_us = cpu_s / max(1, counts["examined"]) * 1e6
    return {
        "violations": 0, "seed": seed, **counts,
        "cpu_s": round(cpu_s, 1), "us_per_state": round(each_us, 1),
    }  # fmt: skip


def main() -> int:
    """Run as told on the command line."""
    options = argparse.ArgumentParser(prog="python -m tests.sim.states", description=__doc__)
    options.add_argument("--states", type=int, default=1_000_000)
    options.add_argument("--seconds", type=float, default=float("inf"), help="of processor time")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--lives", type=int, default=1_000_000)
    chosen = options.parse_args()
    found = run(chosen.states, chosen.seconds, chosen.seed, chosen.lives)
    print(" ".join(f"{name}={value}" for name, value in found.items()))
    figures.write("states", found, command=f"python -m tests.sim.states --seed {chosen.seed}")
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
