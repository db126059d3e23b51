"""Snapshots: the daemon's State at an LSN, in chunks it alone understands, each with its CRC.

    snap/00000000000000004711.snap
    block of 4096 bytes (CKPTSNAP, first_lsn 4711) | CHUNK | CHUNK | ... | END

CHUNK frames carry their number as first_lsn, from 0; END carries the number of chunks, and in
durable_lsn the LSN that the log must reach for this snapshot to be true (records that were
applied while it was taken). Written under `.tmp` by its own thread, synced in steps, read back
from the disk, and only then named; the two newest are kept.
Invariant: a file called `.snap` was whole and verified when it got that name.
Read next: `store.py`.
"""

import queue
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ckptd.protocol.errors import CkptdError, Corrupt
from ckptd.storage import frame, segment
from ckptd.storage.disk import Bytes, Disk, File
from ckptd.storage.segment import BLOCK_BYTES, Block, Place
from ckptd.storage.wal import Reign

SYNC_STEP_BYTES = 8 << 20  # dirty pages at most, so that the log's own syncs stay short
READ_BYTES = 1 << 20
KEPT = 2
_NAME = re.compile(r"([0-9]{20})\.snap")


@dataclass(frozen=True)
class SnapshotDone:
    """The snapshot stands; the log up to `keep_lsn` is not needed any more."""

    lsn: int
    bytes: int
    keep_lsn: int


@dataclass(frozen=True)
class SnapshotFailed:
    """It was given up; the older ones and the whole log stand as before."""

    lsn: int
    why: str


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that checks. `end_lsn`: the log must reach so far."""

    lsn: int
    end_lsn: int
    epoch: int
    chunks: int
    bytes: int


def parse_name(text: str) -> int | None:
    """Return the LSN that the name of a snapshot tells, or None where it is none."""
    match = _NAME.fullmatch(text)
    return int(match[1]) if match else None


def name_of(lsn: int) -> str:
    """Return the file name of the snapshot at `lsn`."""
    return f"{lsn:020d}.snap"


def listed(disk: Disk, snap_dir: str) -> list[int]:
    """Return the LSNs of the snapshots in the directory, oldest first; none where it is missing."""
    try:
        names = disk.names(snap_dir)
    except FileNotFoundError:  # `Recovery` judges whether that can be
        return []
    return [lsn for text in names if (lsn := parse_name(text)) is not None]


def verify(place: Place, path: str, lsn: int) -> Snapshot:
    """Read a snapshot through and return what it is. Raises Corrupt where it does not check."""
    last = None
    size = BLOCK_BYTES
    block = None
    for item in _walk(place, path, lsn):
        if isinstance(item, Block):
            block = item
        else:
            last = item[0]
            size += last.size
    assert last, "a walk that raised nothing has seen the END frame"
    assert block, "and the header"
    return Snapshot(lsn, last.durable_lsn, block.epoch, last.first_lsn, size)


def chunks(place: Place, path: str, lsn: int) -> Iterator[bytes]:
    """Yield the chunks of a snapshot, checked once more. Raises Corrupt."""
    for item in _walk(place, path, lsn):
        if not isinstance(item, Block) and item[0].kind == frame.CHUNK:
            yield item[1]


def _walk(place: Place, path: str, lsn: int) -> Iterator[Block | tuple[frame.Head, bytes]]:
    """Yield the header, every CHUNK and at last END. Raises Corrupt for everything else."""
    file = place.disk.open(path)
    try:
        block = segment.decode_block(
            file.read(BLOCK_BYTES, 0), segment.SNAP_MAGIC, place.store, path
        )
        if block.first_lsn != lsn:
            raise Corrupt(f"{path} is a snapshot of LSN {block.first_lsn}")
        yield block
        number, crc = 0, 0
        for head, payload in _frames(file, place.seed):
            if head.first_lsn != number or head.prev_crc != crc or head.epoch != block.epoch:
                break
            yield head, payload
            if head.kind == frame.END:
                return
            number, crc = number + 1, head.crc
        raise Corrupt(f"{path} does not check after {number} chunks")
    except OSError as bad:
        raise Corrupt(f"{path} cannot be read: {bad.strerror}", "look at the disk") from bad
    finally:
        file.close()


def _frames(file: File, seed: int) -> Iterator[tuple[frame.Head, bytes]]:
    """Yield the frames that check, in order, READ_BYTES at a time or one frame where longer."""
    offset = BLOCK_BYTES
    size = READ_BYTES
    while True:  # Bound: each read holds a whole frame, or the next is as long as that frame
        data = memoryview(file.read(size, offset))
        used = 0
        while head := frame.decode(data, used, seed):
            yield head, frame.payload_of(data, used, head)
            used += head.size
        torn = frame.peek(data, used)
        if not used and (not torn or torn.size <= size or torn.length > frame.CHUNK_BYTES_MAX):
            return
        offset += used
        size = max(READ_BYTES, min(torn.size if torn else 0, frame.CHUNK_BYTES_MAX << 1))


class Owner(Protocol):
    """What a writer needs from the store that it writes for."""

    place: Place
    reign: Reign
    has_threads: bool

    def assert_durable(self, lsn: int) -> None:
        """Fail where the log is not durable up to `lsn`."""
        ...

    def keep_newest(self) -> int:
        """Remove all snapshots but the two newest; return the LSN of the older kept one, or 0."""
        ...

    def retire(self, keep_lsn: int) -> None:
        """Remove the segments wholly at or below `keep_lsn`."""
        ...


class SnapshotWriter:
    """One snapshot on its way to the disk; `add` never waits for it.

    Chunks are written and synced by a thread of their own (in `finish` where the store has no
    threads). `lsn` must be durable: a snapshot never shows what the log could still lose.
    """

    def __init__(self, store: Owner, lsn: int, at_ns: int = 0) -> None:
        store.assert_durable(lsn)
        self.lsn = lsn
        self._store = store
        self._place = store.place
        self._reign = Reign(store.reign.epoch, store.reign.boot_id, at_ns or store.reign.at_ns)
        self._queue: queue.SimpleQueue[bytes | int | None] = queue.SimpleQueue()
        self._result: SnapshotDone | SnapshotFailed | None = None
        self._thread = threading.Thread(target=self._run, name="ckptd-snapshot", daemon=True)
        self._is_told = False
        self._has_thread = store.has_threads
        if self._has_thread:
            self._thread.start()

    def add(self, chunk: Bytes) -> None:
        """Hand over the next chunk, of `frame.CHUNK_BYTES_MAX` at most; returns at once.

        Bound: on a slow disk all chunks wait in memory, packed: less than the State they are of.
        """
        assert len(chunk) <= frame.CHUNK_BYTES_MAX, f"a chunk of {len(chunk)} bytes"
        self._queue.put(bytes(chunk))

    def finish(self, end_lsn: int = 0) -> None:
        """Say that the last chunk was added.

        `end_lsn` is the last LSN applied to what was added, where that is later than `lsn`; it
        must be durable. Durable: nothing yet; `poll` tells when.
        """
        self._store.assert_durable(end_lsn)
        self._queue.put(max(end_lsn, self.lsn))
        if not self._has_thread:
            self._run()

    def abort(self) -> None:
        """Give it up; `poll` will say SnapshotFailed."""
        self._queue.put(None)
        if not self._has_thread:
            self._run()

    def poll(self) -> SnapshotDone | SnapshotFailed | None:
        """Return how it ended, None while it is being written; once done, retire the log below.

        Durable: after SnapshotDone the snapshot, read back and verified.
        """
        if isinstance(self._result, SnapshotDone) and not self._is_told:
            self._is_told = True
            self._store.retire(self._result.keep_lsn)
        return self._result

    def wait(self, timeout_s: float) -> SnapshotDone | SnapshotFailed | None:
        """Wait for the end, as `poll`; for tools and an orderly shutdown."""
        if self._has_thread:
            self._thread.join(timeout_s)
        return self.poll()

    def _run(self) -> None:
        try:
            self._result = self._write()
        except (OSError, CkptdError, MemoryError) as bad:
            self._result = SnapshotFailed(self.lsn, str(bad))

    @property
    def _path(self) -> str:
        return f"{self._place.snap_dir}/{name_of(self.lsn)}"

    def _write(self) -> SnapshotDone | SnapshotFailed:
        """Write, sync, read back, name.

        Durable: the snapshot and its name.
        """
        disk = self._place.disk
        part = f"{self._path}.tmp"
        file = disk.create(part)
        is_whole = False
        try:
            size = self._fill(file)
            if size:
                file.sync()
                file.drop_cache()
            is_whole = size > 0
        finally:
            file.close()
            if not is_whole:
                disk.unlink(part)
        if not is_whole:
            return SnapshotFailed(self.lsn, "given up")
        try:
            verify(self._place, part, self.lsn)
        except (OSError, CkptdError, MemoryError):
            disk.unlink(part)
            raise
        disk.rename(part, self._path)  # Crash: a .tmp is removed by the next `arm`
        disk.sync_dir(self._place.snap_dir)
        return SnapshotDone(self.lsn, size, self._store.keep_newest())

    def _fill(self, file: File) -> int:
        """Write header, chunks and END as they come; return the size, 0 where given up."""
        file.write(segment.encode_block(self._block()), 0)
        chain = frame.Chain(self._place.seed, self._reign.epoch)
        offset = synced = BLOCK_BYTES
        number = 0
        while isinstance(chunk := self._queue.get(), bytes):  # Bound: `finish` or `abort`
            data = chain.encode(chunk, number, self.lsn, 0, frame.CHUNK)
            file.write(data, offset)
            offset += len(data)
            number += 1
            if offset - synced >= SYNC_STEP_BYTES:
                file.sync_data()
                synced = offset
        if chunk is None:
            return 0
        data = chain.encode(b"", number, chunk, 0, frame.END)
        file.write(data, offset)
        return offset + len(data)

    def _block(self) -> Block:
        return Block(
            magic=segment.SNAP_MAGIC,
            format=segment.FORMAT,
            min_reader=segment.FORMAT,
            store=self._place.store,
            first_lsn=self.lsn,
            prev_first=0,
            prev_last=0,
            synced_lsn=self.lsn,
            at_ns=self._reign.at_ns,
            file_bytes=0,
            prev_crc=0,
            epoch=self._reign.epoch,
            boot_id=self._reign.boot_id.encode()[:40],
        )
