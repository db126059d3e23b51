"""A small user of the store, and what must be true of it after any crash.

Records are the numbers 1, 2, 3, ... as text, so that LSN n must hold n; the state is their list.
`acked` is what sync has promised, `submitted` what was ever given to append.
"""

import random

from ckptd.storage.disk import Disk
from ckptd.storage.frame import Frame
from ckptd.storage.recovery import Recovery
from ckptd.storage.snapshot import SnapshotDone, SnapshotWriter
from ckptd.storage.store import Store
from ckptd.storage.wal import Wal
from tests.fakes.memory_disk import MemoryDisk

ROOT = "/state"
SMALL = 4096 + 2048  # bytes of a segment: header block and room for a dozen frames


def open_store(disk: Disk, segment_bytes: int = SMALL) -> Store:
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

    def __init__(self, disk: Disk, acked: int = 0, submitted: int = 0, **options: int) -> None:
        self.disk = disk
        self.acked = acked
        self.submitted = submitted
        self.store = open_store(disk, **options)
        self.recovery = self.store.recover()
        self.recovered = replay(self.recovery)
        assert acked <= self.recovered <= submitted, (acked, self.recovered, submitted)
        self.acked = self.submitted = self.recovered  # what was shown must stay
        self.wal: Wal = self.store.arm(
            self.recovery,
            epoch=self.recovery.epoch + 1,
            boot_id="b" * 36,
            at_ns=1_700_000_000_000_000_000,
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


class CrashAtEveryStep:
    """Cuts the power before every operation of a disk and checks each state it may leave.

    Each state is recovered, written to, cut off once more (now and then inside its recovery) and
    recovered again: nothing acknowledged may ever be missing.
    """

    def __init__(self, disk: MemoryDisk, rng: random.Random, depth: int = 2) -> None:
        self.states = 0
        self.writer: Writer | None = None
        self.acked = self.submitted = 0
        self._disk = disk
        self._rng = rng
        self._depth = depth
        self._is_busy = False
        disk.watch = self._before

    def live(self, reigns: int, steps: int, segment_bytes: int = SMALL) -> None:
        for _ in range(reigns):
            self.writer = None
            writer = self.writer = Writer(
                self._disk, self.acked, self.submitted, segment_bytes=segment_bytes
            )
            writer.work(self._rng, steps)
            if self._rng.random() < 0.5:
                writer.close()
            self.acked, self.submitted = writer.acked, writer.submitted
            self._disk.locked.clear()

    def _before(self, kind: str, path: str) -> None:
        acked = self.writer.acked if self.writer else self.acked
        submitted = self.writer.submitted if self.writer else self.submitted
        for keep in (0.0, 1.0, self._rng.random(), self._rng.random(), None):
            after = self._disk.clone() if keep is None else self._disk.crash(self._rng, keep)
            self._survive(after, acked, submitted)

    def _survive(self, disk: MemoryDisk, acked: int, submitted: int) -> None:
        self.states += 1
        if self._depth > 1 and self._rng.random() < 0.04:
            inner = CrashAtEveryStep(disk, self._rng, self._depth - 1)
            inner.acked, inner.submitted = acked, submitted
            inner.live(1, 2)
            self.states += inner.states
            return
        writer = Writer(disk, acked, submitted)
        writer.append(3)
        writer.sync()
        Writer(disk.crash(self._rng, self._rng.random()), writer.acked, writer.submitted)
