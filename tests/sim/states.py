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
from tests.sim.broken import ENDS, words
from tests.sim.crash_states import STATES_MAX, Broken, CrashStates
from tests.sim.log_reader import Piece

ROOT = "/state"
ADMIN = Caller(0, 0, admin=True)
POLICY = Policy(slots=2)
SEGMENT_BYTES = (8 << 10, 12 << 10, 16 << 10)
TASKS_MAX = 6  # more are cancelled and cleaned away
AT_NS = 1_700_000_000_000_000_000
STATES, LIVES, FOR_EVER_S = 1_000_000, 1_000_000, float("inf")  # where nothing else is asked for
BROKEN_MAX = 20  # lives; more of them tell nothing new


class LogLife:
    """A store, its log and the State in it, without a daemon around."""

    def __init__(self, seed: int, states_max: int = STATES_MAX) -> None:
        self.dice = random.Random(seed)
        self.disk = MemoryDisk(seed=seed)
        self.segment_bytes = self.dice.choice(SEGMENT_BYTES)
        self.submitted: dict[int, Piece] = {}  # by first LSN; counted here, not by the log
        self.states = CrashStates(
            ROOT, self.segment_bytes, random.Random(seed), states_max, self.submitted
        )
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
        self.states.look(self.disk, self.acked, self.appended)

    def _begin(self) -> tuple[Store, Wal]:
        store = Store.open(ROOT, self.disk, segment_bytes=self.segment_bytes, has_threads=False)
        recovery = store.recover()
        self._taken = 0, []
        self._state = replay(recovery.chunks(), recovery.frames()).state
        self._judge(recovery.last_lsn)
        self.acked = self.appended = recovery.last_lsn  # what was shown stays
        epoch = recovery.epoch + 1
        wal = self._wal = store.arm(recovery, epoch=epoch, boot_id="b" * 36, at_ns=AT_NS)
        self._append(wal, [DaemonStarted(AT_NS, epoch, "b", "0", 1, clean=True)])
        self._sync(wal)
        return store, wal

    def _judge(self, last_lsn: int) -> None:
        """What a start found lies between what was acknowledged and what was submitted."""
        if not self.acked <= last_lsn <= self.appended:
            raise Broken(
                f"recovered up to LSN {last_lsn}: acknowledged were {self.acked}, "
                f"submitted {self.appended}"
            )
        for first in [first for first in self.submitted if first > last_lsn]:
            del self.submitted[first]

    def _sync(self, wal: Wal) -> None:
        """Have acknowledged what was submitted: by the return of sync, whatever the log says."""
        wal.sync()
        self.acked = self.appended

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
        self._sync(wal)
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
        first = self.appended + 1
        self.appended += len(records)
        self.submitted[first] = Piece(first, self.appended, payload)
        given = wal.append(payload, len(records))
        if given != first:
            raise Broken(f"record {first} was given LSN {given}")
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
        self.acked = max(self.acked, wal.durable_lsn)
        self.disk.locked.clear()
        self._wal = None


def run(states: int, seconds: float, seed: int, lives: int) -> dict[str, object]:
    """Look at lives from `seed` on until one of the bounds is met; return the figures."""
    counts: Counter[str] = Counter()
    broken: list[int] = []
    begun = time.process_time()
    for number in range(seed, seed + lives):
        if counts["examined"] >= states or time.process_time() - begun >= seconds:
            break
        life: LogLife | None = None
        try:
            life = LogLife(number)
            life.run()
        except ENDS as bad:
            broken.append(number)
            print(f"seed {number}: VIOLATION: {words(bad)}")
            print(f"again: python -m tests.sim.states --lives 1 --seed {number}")
        counts.update(life.states.counts if life else {})
        counts["lives"] += 1
        if len(broken) >= BROKEN_MAX:
            break
    cpu_s = time.process_time() - begun
    each_us = cpu_s / max(1, counts["examined"]) * 1e6
    if not counts["folded"]:
        print("VIOLATION: no record was looked at: the run proves nothing")
    return {
        "violations": len(broken) + (not counts["folded"]), "seed": seed, "broken_seeds": broken,
        **counts, "cpu_s": round(cpu_s, 1), "us_per_state": round(each_us, 1),
    }  # fmt: skip


def command(chosen: argparse.Namespace, lives: int) -> str:
    """Return the line that does the same again: a time is told as the lives that it came to."""
    parts = ["python -m tests.sim.states", f"--seed {chosen.seed}"]
    if chosen.states != STATES:
        parts.append(f"--states {chosen.states}")
    if chosen.lives != LIVES or chosen.seconds != FOR_EVER_S:
        parts.append(f"--lives {lives}")
    return " ".join(parts)


def main(argv: list[str]) -> int:
    """Run as told on the command line."""
    options = argparse.ArgumentParser(prog="python -m tests.sim.states", description=__doc__)
    options.add_argument("--states", type=int, default=STATES)
    options.add_argument("--seconds", type=float, default=FOR_EVER_S, help="of processor time")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--lives", type=int, default=LIVES)
    chosen = options.parse_args(argv)
    figures.begin("states")
    found = run(chosen.states, chosen.seconds, chosen.seed, chosen.lives)
    print(" ".join(f"{name}={value}" for name, value in found.items()))
    lives = found.get("lives", 0)
    assert isinstance(lives, int)
    figures.write("states", found, command=command(chosen, lives))
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
