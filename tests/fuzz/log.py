"""Targets of the log: one frame, a whole damaged store, the records of a frame.

Oracle of the damaged store: what is recovered is what was written, up to some LSN, and that LSN
is not before what any frame that still stands had promised. Else the damage is refused.
"""

import contextlib
import functools
import random
import zlib

import msgspec

from ckptd.daemon.engine import decode
from ckptd.protocol.errors import CkptdError, Corrupt
from ckptd.storage import frame, segment
from ckptd.storage.segment import BLOCK_BYTES
from tests.fakes.log_model import ROOT, Writer, open_store, replay
from tests.fakes.memory_disk import MemoryDisk
from tests.fuzz.target import DEEP, LIGHT, Script, Target, damaged
from tests.unit.core.world import World

SEED = 0x5EED
_encoder = msgspec.msgpack.Encoder()


def run_frame(data: bytes) -> None:
    """Decode one frame whose CRC was made good, so that what lies behind it is reached."""
    length = int.from_bytes(data[:4], "little")
    body = data[: 36 + (length + 7 & ~7)]
    whole = zlib.crc32(body, SEED).to_bytes(4, "little") + body
    head = frame.decode(memoryview(whole), 0, SEED)
    if head is None:
        return
    payload = frame.payload_of(memoryview(whole), 0, head)
    assert len(payload) == head.length, "the length of a frame that checks"
    assert frame.frame_bytes(head.length) == head.size == len(whole), "its size"
    assert head.kind in frame.KINDS, "its kind"


def run_damage(data: bytes) -> None:
    """Change one byte of a frame or of a header block: a CRC-32 misses none of those."""
    script = Script(data)
    is_block, at, flip = script.byte() % 2, script.number(1 << 20), script.byte() % 255 + 1
    whole = bytearray(_block() if is_block else frame.Chain(SEED, 7).encode(script.rest(), 1, 0, 1))
    whole[at % len(whole)] ^= flip
    if not is_block:
        assert frame.decode(memoryview(whole), 0, SEED) is None, "a frame that was changed"
        return
    try:
        segment.decode_block(whole, segment.WAL_MAGIC, bytes(16), "it")
    except Corrupt:
        return
    raise AssertionError("a header that was changed")


def _block() -> bytes:
    block = segment.Block(
        segment.WAL_MAGIC, 1, 1, bytes(16), 1, 0, 0, 0, 1, 1 << 24, 0, 7, b"boot"
    )  # fmt: skip
    return segment.encode_block(block)


def damage_seeds() -> list[bytes]:
    """Return changes of either, at some places."""
    return [bytes([kind, 0, 0, at, at]) + b"payload" for kind in (0, 1) for at in (0, 9, 60)]


def frame_seeds() -> list[bytes]:
    """Return frames of three kinds, without their CRC."""
    chain = frame.Chain(SEED, 7)
    return [
        chain.encode(payload, lsn, lsn - 1, count, kind)[4:]
        for payload, lsn, count, kind in (
            (b"abc", 1, 1, frame.RECORDS),
            (b"", 2, 0, frame.IDLE),
            (bytes(100), 1 << 40, 3, frame.NOTE),
        )
    ]


@functools.cache
def _log() -> tuple[MemoryDisk, int]:
    """Return a disk with a log of some segments, closed in order, and its last LSN."""
    rng = random.Random(5)
    disk = MemoryDisk(seed=5)
    writer = Writer(disk)
    for turn in range(40):
        writer.append(rng.randint(1, 5))
        if turn % 2:
            writer.sync()
        if turn == 20:
            writer.snapshot()
    writer.close()
    disk.locked.clear()
    return disk, writer.acked


def run_store(data: bytes) -> None:
    """Damage a log anywhere; recover it."""
    original, acked = _log()
    disk = original.clone()
    script = Script(data)
    segments, _ = segment.newest_names(disk.names(f"{ROOT}/wal"))
    paths = [f"{ROOT}/wal/{name}" for name in segments]
    snapshots = [f"{ROOT}/snap/{name}" for name in disk.names(f"{ROOT}/snap")]
    inode = disk.inode([*paths, *snapshots][script.byte() % (len(paths) + len(snapshots))])
    inode.data = bytearray(damaged(bytes(inode.data), script))
    promised = max(_promised(disk, original, path) for path in paths)
    with contextlib.suppress(CkptdError):  # refused: that is an answer
        recovered = replay(open_store(disk).recover())
        assert recovered <= acked, f"{recovered} recovered, {acked} were written"
        assert recovered >= promised, f"{recovered} recovered, {promised} were promised"


def _promised(disk: MemoryDisk, original: MemoryDisk, path: str) -> int:
    """Return the highest LSN promised by the frames of a segment that still stand."""
    was = memoryview(bytes(original.inode(path).data))
    now = bytes(disk.inode(path).data)
    found = 0
    for offset, head in frame.find_later(was, BLOCK_BYTES, _store_seed()):
        if now[offset : offset + head.size] == was[offset : offset + head.size]:
            found = max(found, head.durable_lsn)
    return found


@functools.cache
def _store_seed() -> int:
    """Return what the CRCs of this store begin with."""
    return open_store(_log()[0].clone()).place.seed


def store_seeds() -> list[bytes]:
    """Return scripts: each kind of edit, at some places of each file."""
    return [bytes([at, kind, 0, at * 16, kind * 40, 9]) for at in range(4) for kind in range(6)]


def run_records(data: bytes) -> None:
    """Decode the payload of a frame that checks; what can be read is written the same again."""
    with contextlib.suppress(Corrupt):
        records = decode(data)
        assert decode(_encoder.encode(records)) == records, "records survive a round trip"


def record_seeds() -> list[bytes]:
    """Return the records of a short life."""
    world = World()
    world.submit("true", name="a", key="k", labels={"a": "b"})
    world.submit("sleep", "9", hold=True, timeout_s=1.5)
    return [_encoder.encode([record]) for record in world.log]


TARGETS = (
    Target("frame", run_frame, frame_seeds, weight=LIGHT),
    Target("damage", run_damage, damage_seeds, 128, LIGHT),
    Target("store", run_store, store_seeds, 256, DEEP),
    Target("records", run_records, record_seeds, weight=LIGHT),
)
