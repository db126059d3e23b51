"""A small user of the store, and what must be true of it after any crash.

Records are the numbers 1, 2, 3, ... as text, so that LSN n must hold n; the state is their list.
`acked` is what sync has promised, `submitted` what was ever given to append.
"""

import random

from ckptd.storage.frame import Frame
from ckptd.storage.recovery import Recovery
from ckptd.storage.snapshot import SnapshotDone, SnapshotWriter
from ckptd.storage.store import Store
from ckptd.storage.wal import Wal
from tests.fakes.memory_disk import MemoryDisk

ROOT = "/state"
SMALL = 4096 + 2048  # bytes of a segment: header block and room for a dozen frames


def open_store(disk: MemoryDisk, segment_bytes: int = SMALL) -> Store:
    return Store.open(ROOT, disk, segment_bytes=segment_bytes, has_threads=False)


def payload_of(first: int, count: int) -> bytes:
    """Return `count` records; their length varies, so that frames end at every alignment."""
    words = [f"{n}{'x' * (n * 7 % 23)}" for n in range(first, first + count)]
    return "\n".join(words).encode()


def numbers_in(frame: Frame) -> list[int]:
    assert frame.payload == payload_of(frame.first_lsn, frame.count), frame
    return list(range(frame.first_lsn, frame.first_lsn + frame.count))


def replay(recovery: Recovery) -> int:
    """Check snapshot and frames against the only right content; return the last number."""
    chunks = list(recovery.chunks())
    last = 0
    if recovery.snapshot_lsn:
        assert chunks[0] == b"begin"
        last = int(chunks[-1])
        assert last >= recovery.snapshot_lsn
    at = recovery.snapshot_lsn
    for frame in recovery.frames():
        numbers = numbers_in(frame)
        assert numbers[0] <= at + 1 <= numbers[-1], (at, numbers)
        at = numbers[-1]
    assert at == recovery.last_lsn
    assert last <= at, "the snapshot shows more than the log holds"
    return at


class Writer:
    """One reign: opens, recovers, arms, and writes as told."""

    def __init__(self, disk: MemoryDisk, acked: int = 0, submitted: int = 0, **options: int):
        self.disk = disk
        self.acked = acked
        self.submitted = submitted
        self.store = open_store(disk, **options)
        self.recovery = self.store.recover()
        self.recovered = replay(self.recovery)
        assert acked <= self.recovered <= submitted, (acked, self.recovered, submitted)
        self.acked = self.submitted = self.recovered  # what was shown must stay
        self.wal: Wal = self.store.arm(self.recovery,
            epoch=self.recovery.epoch + 1, boot_id="b" * 36, at_ns=1_700_000_000_000_000_000
        )

    def append(self, count: int) -> None:
        first = self.wal.next_lsn
        self.submitted = max(self.submitted, first + count - 1)
        assert self.wal.append(payload_of(first, count), count) == first

    def sync(self) -> None:
        self.acked = max(self.acked, self.wal.sync())

    def snapshot(self) -> None:
        self.sync()
        writer = SnapshotWriter(self.store, self.wal.durable_lsn)
        writer.add(b"begin")
        writer.add(str(self.wal.durable_lsn).encode())
        writer.finish()
        assert isinstance(writer.poll(), SnapshotDone), writer.poll()

    def work(self, rng: random.Random, steps: int) -> None:
        """Do what a daemon does, in any order."""
        for _ in range(steps):
            what = rng.random()
            if what < 0.62:
                self.append(rng.randint(1, 6))
            elif what < 0.85:
                self.sync()
            elif what < 0.94:
                self.sync()
                self.wal.mark_idle()
            else:
                self.snapshot()

    def close(self) -> None:
        self.sync()
        self.wal.mark_idle(closed=True)
        self.store.close()
