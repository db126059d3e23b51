"""A log read by FORMAT.md alone: nothing of ckptd is used, so it can judge what ckptd reads.

It takes whole files as bytes and tells which records they hold. It does not tell a torn tail from
damage: who asks knows what was acknowledged. Records are plain values: an array with its tag first.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple
from zlib import crc32

import msgspec

BLOCK_BYTES = 4096
PAYLOAD_BYTES_MAX = 5 << 20
RECORDS, IDLE, LOST, NOTE, CHUNK, END = 1, 2, 3, 4, 8, 9
IN_A_SEGMENT, IN_A_SNAPSHOT = frozenset((RECORDS, IDLE, LOST, NOTE)), frozenset((CHUNK, END))
_FRAME = struct.Struct("<IIQQIHBBII")
_BLOCK = struct.Struct("<8sII16sQQQQQQII")
_U32 = struct.Struct("<I")


class Unreadable(Exception):
    """The files hold no log."""


class Piece(NamedTuple):
    """What one append put into the log: records `first` to `last`."""

    first: int
    last: int
    payload: bytes


class Segment(NamedTuple):
    """One segment, as far as its frames check and follow on one another."""

    first: int
    epoch: int
    prev_crc: int
    last: int
    end_crc: int
    pieces: tuple[Piece, ...]


class Snapshot(NamedTuple):
    """One snapshot that checks: it is true once the log has reached `until`."""

    lsn: int
    until: int
    chunks: tuple[bytes, ...]


class Log(NamedTuple):
    """What the files of a store hold."""

    last: int
    snapshot: Snapshot | None
    segments: tuple[Segment, ...]

    def pieces(self) -> list[Piece]:
        """Return all records that are there, also those that the snapshot stands for."""
        return [one for segment in self.segments for one in segment.pieces]


class _Frame(NamedTuple):
    crc: int
    length: int
    first: int
    durable: int
    epoch: int
    count: int
    kind: int
    flags: int
    prev_crc: int
    reserved: int


def read_store(data: bytes) -> bytes:
    """Return the id of the store that FORMAT names."""
    at = data.find(b',"crc32"')
    told = json.loads(data)
    if not data.endswith(b"}\n") or int(told["crc32"], 16) != crc32(data[:at]):
        raise Unreadable("FORMAT does not check")
    return bytes.fromhex(told["store"])


def _frames(
    data: bytes, store: bytes, crc: int, kinds: frozenset[int]
) -> Iterator[tuple[_Frame, bytes]]:
    """Yield frames that check and carry the CRC of the one before, with their payloads."""
    at, seed = BLOCK_BYTES, crc32(store)
    while at + _FRAME.size <= len(data):  # Bound: a step of a header at least
        one = _Frame(*_FRAME.unpack_from(data, at))
        body = at + _FRAME.size
        end = body + -(-one.length // 8) * 8
        if one.kind not in kinds or one.length > PAYLOAD_BYTES_MAX or end > len(data):
            return
        if crc32(data[at + 4 : end], seed) != one.crc or one.prev_crc != crc or one.reserved:
            return
        yield one, data[body : body + one.length]
        at, crc = end, one.crc


def _block(data: bytes, magic: bytes, store: bytes) -> tuple[Any, ...]:
    """Return the fields of a header block up to the epoch."""
    if len(data) < BLOCK_BYTES:
        raise Unreadable("no header")
    fields = _BLOCK.unpack_from(data)
    if crc32(data[: BLOCK_BYTES - 4]) != _U32.unpack_from(data, BLOCK_BYTES - 4)[0]:
        raise Unreadable("a header that does not check")
    if fields[0] != magic or fields[2] > 1 or fields[3] != store:
        raise Unreadable("the header of something else")
    return fields


def read_segment(name: str, data: bytes, store: bytes) -> Segment:
    """Return what a segment holds. Raises Unreadable."""
    fields = _block(data, b"CKPTDWAL", store)
    first, prev_last, file_bytes, prev_crc, epoch = (fields[at] for at in (4, 6, 9, 10, 11))
    if name != f"{first:020}-{epoch:010}.wal" or prev_last != first - 1 or file_bytes != len(data):
        raise Unreadable(f"{name} has the header of another")
    crc, last, pieces = prev_crc, first - 1, []
    for one, payload in _frames(data, store, prev_crc, IN_A_SEGMENT):
        if one.first != last + 1:
            break
        if one.kind == RECORDS:
            pieces.append(Piece(one.first, one.first + one.count - 1, payload))
        last, crc = last + one.count, one.crc
    return Segment(first, epoch, prev_crc, last, crc, tuple(pieces))


def read_snapshot(name: str, data: bytes, store: bytes) -> Snapshot | None:
    """Return what a snapshot holds, or None where it does not check to its end."""
    try:
        lsn = _block(data, b"CKPTSNAP", store)[4]
    except Unreadable:
        return None
    chunks: list[bytes] = []
    at = BLOCK_BYTES
    for one, payload in _frames(data, store, 0, IN_A_SNAPSHOT):
        if one.first != len(chunks) or name != f"{lsn:020}.snap":
            return None
        at += _FRAME.size + -(-one.length // 8) * 8
        if one.kind == END:
            return Snapshot(lsn, one.durable, tuple(chunks)) if at == len(data) else None
        chunks.append(payload)
    return None


def read_log(segments: Iterable[Segment], snapshots: Iterable[Snapshot]) -> Log:
    """Return the log that starts at the newest snapshot's segment. Raises Unreadable."""
    newest = max(snapshots, default=None)
    start = newest.lsn + 1 if newest else 1
    by_first: dict[int, Segment] = {}
    for one in sorted(segments):  # of two with the same first LSN the later epoch counts
        by_first[one.first] = one
    begin = max((first for first in by_first if first <= start), default=0)
    if not begin:
        raise Unreadable(f"no segment holds LSN {start}")
    chain = tuple(one for first, one in by_first.items() if first >= begin)
    for before, after in pairwise(chain):
        if (after.first, after.prev_crc) != (before.last + 1, before.end_crc):
            raise Unreadable(f"a hole between LSN {before.last} and {after.first}")
    last = chain[-1].last
    if newest and newest.until > last:
        raise Unreadable(f"the log ends at {last}, a snapshot takes it up to {newest.until}")
    return Log(last, newest, chain)


def records(payload: bytes) -> list[list[Any]]:
    """Return the records of an append as plain arrays, each with its tag first."""
    found: list[list[Any]] = msgspec.msgpack.decode(payload)
    return found
