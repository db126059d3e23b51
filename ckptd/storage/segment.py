"""One segment: its name, its header block, a walk over its frames, and the zeros it is made of.

A segment is made whole (`make_spare`: zero-filled, synced) before it is needed, so that an append
changes neither size nor block map and one fdatasync is one flush. Its name is

    wal/00000000000000000101-0000000007.wal        first LSN 101, written under epoch 7

The epoch is there for the copy forward: a new reign never writes into an old file but copies the
good frames into a new one of the same first LSN, and the highest epoch counts. Header block of
4096 bytes, little-endian, synced before the file has its name, so it can never be torn:

     0 magic         8s  CKPTDWAL; snapshots use the same block with CKPTSNAP
     8 format        u32 version of what follows
    12 min_reader    u32 oldest reader that understands it
    16 store         16s id of the store
    32 first_lsn     u64 first record of this file; of a snapshot the LSN it stands for
    40 prev_first    u64 first LSN of the segment before, 0: none
    48 prev_last     u64 last LSN of the segment before
    56 synced_lsn    u64 records that were in this file, synced, when it got its name
    64 at_ns         u64 wall clock
    72 file_bytes    u64 length of the file; 0: not fixed (snapshots)
    80 prev_crc      u32 crc32 of the last frame of the segment before
    84 epoch         u32 reign that made the file
    88 boot_id       40s ASCII, zero-padded
    4092 crc32       u32 over bytes 0 to 4091

It does not decide what damage means; that is `recovery.py`. Read next: `wal.py`, FORMAT.md.
"""

import contextlib
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from zlib import crc32

from ckptd.protocol.errors import BadConfig, Corrupt
from ckptd.storage import frame
from ckptd.storage.disk import ZEROS, Disk, File

FORMAT = 1
BLOCK_BYTES = 4096
SEGMENT_BYTES = 16 << 20
INDEX_BYTES = 64 << 10  # one entry of the sparse index for so many bytes
TAIL_BYTES = 2 * frame.HEADER_BYTES  # kept free for an idle and a closing marker
SPARE = "spare.tmp"
SPARE_UNFINISHED = "spare.new"
WAL_MAGIC = b"CKPTDWAL"
SNAP_MAGIC = b"CKPTSNAP"

_BLOCK = struct.Struct("<8sII16sQQQQQQII40s")
_CRC = struct.Struct("<I")
_NAME = re.compile(r"([0-9]{20})-([0-9]{10})\.wal")


class Block(NamedTuple):
    """The header block of a segment or a snapshot, field by field."""

    magic: bytes
    format: int
    min_reader: int
    store: bytes
    first_lsn: int
    prev_first: int
    prev_last: int
    synced_lsn: int
    at_ns: int
    file_bytes: int
    prev_crc: int
    epoch: int
    boot_id: bytes


class Name(NamedTuple):
    """What a segment's name tells."""

    first_lsn: int
    epoch: int

    def __str__(self) -> str:
        return f"{self.first_lsn:020d}-{self.epoch:010d}.wal"


@dataclass(frozen=True)
class Place:
    """Where a store is, and what all its files have in common."""

    disk: Disk
    root: str
    store: bytes
    segment_bytes: int = SEGMENT_BYTES

    @property
    def wal_dir(self) -> str:
        """Return the directory of the segments and the spare."""
        return f"{self.root}/wal"

    @property
    def snap_dir(self) -> str:
        """Return the directory of the snapshots."""
        return f"{self.root}/snap"

    @property
    def quarantine_dir(self) -> str:
        """Return the directory of what was cut off, replaced or found bad."""
        return f"{self.root}/quarantine"

    @property
    def seed(self) -> int:
        """Return what the CRC of every frame of this store starts from."""
        return crc32(self.store)


@dataclass
class Segment:
    """What is known of one segment: its end and a sparse index, once it has been walked."""

    name: Name
    prev_first: int = 0
    end: int = 0  # offset after the last frame; 0: not walked yet
    index: list[tuple[int, int]] = field(default_factory=list)  # (first LSN, offset), ascending

    def note(self, lsn: int, offset: int) -> None:
        """Remember where a frame is, where the last one remembered is far enough away."""
        if not self.index or offset - self.index[-1][1] >= INDEX_BYTES:
            self.index.append((lsn, offset))

    def offset_of(self, lsn: int) -> int:
        """Return the offset of a frame at or before the one that holds `lsn`."""
        at = bisect_right(self.index, lsn, key=lambda entry: entry[0])
        return self.index[at - 1][1] if at else BLOCK_BYTES


class Link(NamedTuple):
    """Where the chain stands: the record that must come next and the CRC it must carry."""

    next_lsn: int
    crc: int


def parse_name(text: str) -> Name | None:
    """Return what the name of a segment tells, or None where it is no segment."""
    match = _NAME.fullmatch(text)
    return Name(int(match[1]), int(match[2])) if match else None


def encode_block(block: Block) -> bytes:
    """Return the 4096 bytes of a header block."""
    body = _BLOCK.pack(*block).ljust(BLOCK_BYTES - _CRC.size, b"\0")
    return body + _CRC.pack(crc32(body))


def decode_block(data: bytes | memoryview, magic: bytes, store: bytes, what: str) -> Block:
    """Return the header block of file `what`. Raises Corrupt, or BadConfig for a later format."""
    if len(data) < BLOCK_BYTES:
        raise Corrupt(f"{what} is cut short: {len(data)} bytes, its header alone has {BLOCK_BYTES}")
    body = data[: BLOCK_BYTES - _CRC.size]
    if _CRC.unpack_from(data, len(body))[0] != crc32(body):
        raise Corrupt(f"the header of {what} does not check")
    block = Block(*_BLOCK.unpack_from(data))
    check_version(block.format, block.min_reader, what)
    if block.magic != magic:
        raise Corrupt(f"{what} is something else: its header says {block.magic!r}")
    if block.store != store:
        raise Corrupt(f"{what} belongs to another store, {block.store.hex()}")
    return block


def check_version(version: int, min_reader: int, what: str) -> None:
    """Raise BadConfig where a later ckptd wrote `what` and says that this one cannot read it."""
    if min_reader > FORMAT:
        raise BadConfig(
            f"{what} was written by a newer ckptd: format {version}, which takes a reader of"
            f" {min_reader}; this one is {FORMAT}",
            "nothing was changed; run the version that wrote it, or a later one",
        )


def newest_names(names: list[str]) -> tuple[list[Name], list[Name]]:
    """Return (the segments that count, those that a later epoch replaced), by first LSN."""
    best: dict[int, Name] = {}
    replaced = []
    for name in sorted(found for text in names if (found := parse_name(text))):
        if name.first_lsn in best:
            replaced.append(best[name.first_lsn])
        best[name.first_lsn] = name
    return list(best.values()), replaced


def read_whole(disk: Disk, path: str) -> bytes:
    """Return a file's bytes. Raises Corrupt where the disk cannot give them."""
    file = disk.open(path)
    try:
        return file.read(file.size(), 0)
    except OSError as bad:
        raise Corrupt(f"{path} cannot be read: {bad.strerror}", "look at the disk") from bad
    finally:
        file.close()


def frames(
    data: memoryview, link: Link, seed: int, offset: int = BLOCK_BYTES
) -> Iterator[tuple[int, frame.Head]]:
    """Yield (offset, header) of every frame that checks and follows on the one before.

    Bound: a step of 40 bytes at least. It ends at the first frame that does not belong.
    """
    next_lsn, crc = link
    decode = frame.decode
    while (head := decode(data, offset, seed)) is not None:
        if head.first_lsn != next_lsn or head.prev_crc != crc:  # `is_next`, without the call
            return
        yield offset, head
        next_lsn += head.records
        crc = head.crc
        offset += head.size


def walk(place: Place, known: Segment, file: File) -> None:
    """Index a segment that was not walked at the start; what does not check ends it early.

    Raises:
        OSError: the disk does not give it; nothing is noted.
    """
    data = memoryview(file.read(file.size(), 0))
    known.end = BLOCK_BYTES
    try:
        block = decode_block(data[:BLOCK_BYTES], WAL_MAGIC, place.store, str(known.name))
    except Corrupt:
        return
    for offset, head in frames(data, Link(block.first_lsn, block.prev_crc), place.seed):
        known.note(head.first_lsn, offset)
        known.end = offset + head.size


def make_spare(disk: Disk, wal_dir: str, size: int) -> None:
    """Make `spare.tmp`, a whole segment of zeros. Raises OSError with nothing left behind.

    Durable: the file, its zeros and its name.
    """
    new = f"{wal_dir}/{SPARE_UNFINISHED}"
    file = disk.create(new)
    try:
        zero_fill(file, size)
        file.sync()
    except OSError:
        with contextlib.suppress(OSError):
            disk.unlink(new)  # its blocks may be the last free ones
        raise
    finally:
        file.close()
    disk.rename(new, f"{wal_dir}/{SPARE}")  # Crash: spare.new is removed by the next `arm`
    disk.sync_dir(wal_dir)


def zero_fill(file: File, size: int) -> None:
    """Write `size` zero bytes; fallocate would leave a metadata commit to every first write."""
    for offset in range(0, size, len(ZEROS)):
        file.write(memoryview(ZEROS)[: size - offset], offset)


def claim_spare(disk: Disk, wal_dir: str, size: int) -> File | None:
    """Return the spare, open and all zero, or None where there is none of this size.

    Crash: a reign that died while it made its first segment left frames in the spare. They must
    not show up behind the frames of the next one, so what is not zero is made zero again.
    """
    if SPARE not in disk.names(wal_dir):
        return None
    file = disk.open(f"{wal_dir}/{SPARE}", write=True)
    if file.size() != size:
        file.close()
        return None
    try:
        file.sync()
        file.drop_cache()
        if frame.written_end(memoryview(file.read(size, 0)), 0):
            zero_fill(file, size)
    except OSError:
        file.close()
        raise
    return file
