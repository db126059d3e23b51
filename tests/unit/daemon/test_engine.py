"""State and log as one: what a turn takes in, and when the log has room for it."""

from pathlib import Path

import pytest

from ckptd.core.decide import Case, decide
from ckptd.core.image import load
from ckptd.core.policy import Caller, Now, Policy
from ckptd.core.port import EndSeen, MarkSeen
from ckptd.core.records import Moved, Phase
from ckptd.core.state import State
from ckptd.daemon.engine import Engine
from ckptd.protocol import messages as m
from ckptd.protocol.errors import DiskFull
from ckptd.storage.disk import File, RealDisk
from ckptd.storage.store import Store
from tests.fakes.memory_disk import MemoryDisk
from tests.waiting import let_pass


class SlowDisk(RealDisk):
    """A disk that takes its time over every new file, as a busy one does."""

    def create(self, path: str) -> File:
        let_pass(0.03)
        return super().create(path)


ROOT = Caller(0, 0, admin=True)
SEGMENT_BYTES = 8 << 20


def test_a_burst_that_outruns_the_filling_of_segments_is_no_full_disk(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "state"), SlowDisk(), segment_bytes=SEGMENT_BYTES)
    found = store.recover()
    wal = store.arm(found, epoch=1, boot_id="b", at_ns=1)
    engine = Engine(State(), wal, Policy())
    big = m.Submit((m.TaskSpec(("x" * 100_000,), hold=True),) * 10)
    for _ in range(40):  # five segments, each filled as fast as the disk takes it
        records, _ = decide(Case(engine.state, ROOT, Now(1), Policy()), big)
        engine.admit(records, is_small=False)
        engine.commit()
        engine.orders()
    assert len(engine.state.tasks) == 400
    store.close()


def full_disk() -> Engine:
    """Return an engine with held tasks on a disk that takes no more of them."""
    disk = MemoryDisk()
    store = Store.open("/state", disk, segment_bytes=SEGMENT_BYTES, has_threads=False)
    engine = Engine(State(), store.arm(store.recover(), epoch=1, boot_id="b", at_ns=1), Policy())
    disk.capacity -= disk.free_bytes("/state")
    fill(engine)
    return engine


def fill(engine: Engine) -> None:
    """Submit large tasks and small ones, until the disk is full for each."""
    for length in (100_000, 20_000, 500):
        more = m.Submit((m.TaskSpec(("x" * length,), hold=True),))
        with pytest.raises(DiskFull):
            use_up(engine, more)


def use_up(engine: Engine, more: m.Submit) -> None:
    for _ in range(1_000):  # Bound: two segments, then what is left of the last one
        records, _ = decide(Case(engine.state, ROOT, Now(1), Policy()), more)
        engine.admit(records, is_small=False)
        engine.commit()


def use_up_reserve(engine: Engine) -> None:
    for _ in range(1_000):  # Bound: the reserve
        engine.admit([Moved(1, 2, Phase.HELD, "x" * 60_000)], is_small=True)
        engine.commit()


def test_a_full_disk_keeps_room_for_the_ends_of_what_was_accepted() -> None:
    engine = full_disk()
    for _ in range(3):  # the spare is there for the ends, and then it is not
        fill(engine)
        for _ in range(20):
            engine.stage([Moved(1, 2, Phase.CANCELLED, "x" * 60_000)])
            engine.commit()


def test_a_snapshot_holds_no_record_behind_its_lsn_though_the_log_grew_before_it_was_read() -> None:
    store = Store.open("/state", MemoryDisk(), segment_bytes=SEGMENT_BYTES, has_threads=False)
    wal = store.arm(store.recover(), epoch=1, boot_id="b", at_ns=1)
    engine = Engine(State(), wal, Policy())
    one = m.Submit((m.TaskSpec(("true",)),))
    engine.admit(decide(Case(engine.state, ROOT, Now(1), Policy()), one)[0], is_small=False)
    engine.commit()
    lsn, chunks = engine.state.lsn, engine.image()
    engine.admit(decide(Case(engine.state, ROOT, Now(1), Policy()), one)[0], is_small=False)
    engine.commit()
    taken = load(chunks)
    assert (taken.lsn, len(taken.tasks)) == (lsn, 1)


def test_requests_that_stay_possible_on_a_full_disk_leave_the_ends_most_of_the_room() -> None:
    engine = full_disk()
    for _ in range(3):  # the spare is there for the ends, and then it is not
        with pytest.raises(DiskFull):
            use_up_reserve(engine)
        for _ in range(7):
            engine.stage([Moved(1, 2, Phase.CANCELLED, "x" * 60_000)])
            engine.commit()


def test_nothing_new_is_started_while_the_disk_is_full() -> None:
    engine = full_disk()
    engine.admit([Moved(1, 2, Phase.QUEUED, "x" * 60_000)], is_small=True)
    engine.plan(Now(2))
    engine.commit()
    assert not engine.state.active
    assert engine.orders() == []


def test_what_an_attempt_before_said_last_is_not_held_against_this_one() -> None:
    store = Store.open("/state", MemoryDisk(), segment_bytes=SEGMENT_BYTES, has_threads=False)
    engine = Engine(State(), store.arm(store.recover(), epoch=1, boot_id="b", at_ns=1), Policy())
    one = m.Submit((m.TaskSpec(("true",), on_exit={"1": "again"}),))
    engine.admit(decide(Case(engine.state, ROOT, Now(1), Policy()), one)[0], is_small=False)
    engine.plan(Now(1))
    engine.see(EndSeen(1, 1, "exit", 1, ended_ns=2), Now(2))
    engine.see(MarkSeen(1, 1, 0, 0, "", problem="a checkpoint that nobody can read"), Now(2))
    engine.plan(Now(2))
    engine.see(EndSeen(1, 2, "exit", 1, ended_ns=3), Now(3))
    task = engine.state.tasks.get(1)
    assert task is not None
    assert task.phase is Phase.QUEUED


def test_a_full_disk_keeps_the_segment_that_the_next_start_copies_its_tail_to() -> None:
    disk = MemoryDisk()
    store = Store.open("/state", disk, segment_bytes=SEGMENT_BYTES, has_threads=False)
    engine = Engine(State(), store.arm(store.recover(), epoch=1, boot_id="b", at_ns=1), Policy())
    disk.capacity -= disk.free_bytes("/state")
    fill(engine)
    killed = disk.clone()
    assert killed.free_bytes("/state") < SEGMENT_BYTES
    store = Store.open("/state", killed, segment_bytes=SEGMENT_BYTES, has_threads=False)
    wal = store.arm(store.recover(), epoch=2, boot_id="b", at_ns=2)
    assert wal.durable_lsn == engine.wal.durable_lsn
