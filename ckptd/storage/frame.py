"""One frame: the bytes that carry a group of records. Pure; it knows no file and no meaning.

The log, snapshots and the tasks' journals are made of the same frames. Little-endian, a header
of 40 bytes, the payload, zero bytes up to a multiple of 8:

     0 crc32       u32  over everything from byte 4 to the end of the padding; see `seed`
     4 length      u32  bytes of payload, without padding
     8 first_lsn   u64  number of the first record in the payload
    16 durable_lsn u64  every record up to this one was synced when this frame was made
    24 epoch       u32  reign of the writer
    28 count       u16  records in the payload; 0: a marker
    30 kind        u8   RECORDS, IDLE, LOST, NOTE, CHUNK, END
    31 flags       u8   CLOSED = 1: an orderly end
    32 prev_crc    u32  crc32 of the frame before (the chain)
    36 reserved    u32  0

The CRC starts from a `seed` (CRC-32 of the store's id), so a frame of another store never checks.
Invariant: the promise in `durable_lsn` is what tells a torn tail from corruption: where a later
frame checks and promises a record that does not, that record had been synced, so the disk lies.
Standard library only. Read next: `segment.py`, FORMAT.md.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple
from zlib import crc32

Bytes = bytes | bytearray | memoryview

HEADER_BYTES = 40
PAYLOAD_BYTES_MAX = 5 << 20  # a request of 4 MiB and what its record adds
CHUNK_BYTES_MAX = 6 << 20  # of a snapshot: one task, so the largest record and what came after it
COUNT_MAX = 0xFFFF

RECORDS, IDLE, LOST, NOTE, CHUNK, END = 1, 2, 3, 4, 8, 9
KINDS = frozenset((RECORDS, IDLE, LOST, NOTE, CHUNK, END))
CLOSED = 1

_HEAD = struct.Struct("<IIQQIHBBII")
_REST = struct.Struct("<IQQIHBBII")
_CRC = struct.Struct("<I")
_KIND_AT = 30
_IS_KIND = bytes(value in KINDS for value in range(256))
_PAD = tuple(bytes(n) for n in range(8))
assert _HEAD.size == HEADER_BYTES == _REST.size + _CRC.size


class Head(NamedTuple):
    """The header of a frame, field by field."""

    crc: int
    length: int
    first_lsn: int
    durable_lsn: int
    epoch: int
    records: int
    kind: int
    flags: int
    prev_crc: int
    reserved: int

    @property
    def size(self) -> int:
        """Return the bytes of the whole frame, padding included."""
        return HEADER_BYTES + (self.length + 7 & ~7)

    @property
    def last_lsn(self) -> int:
        """Return the LSN of the last record in or before this frame."""
        return self.first_lsn + self.records - 1


class Frame:
    """A frame as readers get it. An empty payload stands for records lost to a salvage.

    No dataclass: importing that costs `ckpt` and every Python task 10 ms.
    """

    __slots__ = ("count", "first_lsn", "payload")

    def __init__(self, first_lsn: int, count: int, payload: bytes) -> None:
        self.first_lsn = first_lsn
        self.count = count
        self.payload = payload


def frame_bytes(length: int) -> int:
    """Return the bytes on disk of a frame with `length` bytes of payload."""
    return HEADER_BYTES + (length + 7 & ~7)


class Chain:
    """The running CRC over the frames of one writer: each frame carries its predecessor's."""

    __slots__ = ("crc", "epoch", "seed")

    def __init__(self, seed: int, epoch: int, crc: int = 0) -> None:
        self.seed = seed
        self.epoch = epoch
        self.crc = crc

    def encode(
        self,
        payload: Bytes,
        first_lsn: int,
        durable_lsn: int,
        count: int,
        kind: int = RECORDS,
        flags: int = 0,
    ) -> bytes:
        """Return the bytes of the next frame and carry the chain on to it."""
        length = len(payload)
        rest = _REST.pack(
            length, first_lsn, durable_lsn, self.epoch, count, kind, flags, self.crc, 0
        )
        body = b"".join((rest, payload, _PAD[-length & 7]))
        self.crc = crc = crc32(body, self.seed)
        return _CRC.pack(crc) + body


def decode(data: memoryview, offset: int, seed: int) -> Head | None:
    """Return the header of a frame that checks, payload and padding included, else None."""
    if offset + HEADER_BYTES > len(data):
        return None
    head = Head(*_HEAD.unpack_from(data, offset))
    if head.length > (CHUNK_BYTES_MAX if head.kind == CHUNK else PAYLOAD_BYTES_MAX):
        return None
    end = offset + HEADER_BYTES + (head.length + 7 & ~7)
    if end > len(data) or crc32(data[offset + 4 : end], seed) != head.crc:
        return None
    if head.kind not in KINDS or head.reserved:
        return None
    return head


def peek(data: memoryview, offset: int) -> Head | None:
    """Return the header as it stands, unchecked, or None where it does not fit into `data`."""
    if offset + HEADER_BYTES > len(data):
        return None
    return Head(*_HEAD.unpack_from(data, offset))


def payload_of(data: memoryview, offset: int, head: Head) -> bytes:
    """Return a copy of the payload of the frame at `offset`."""
    start = offset + HEADER_BYTES
    return bytes(data[start : start + head.length])


def is_next(head: Head, next_lsn: int, prev_crc: int) -> bool:
    """Tell whether a frame that checks is the one that belongs here."""
    return head.first_lsn == next_lsn and head.prev_crc == prev_crc


def find_later(data: memoryview, offset: int, seed: int) -> Iterator[tuple[int, Head]]:
    """Yield every frame that checks from `offset` on, whatever lies between them.

    Bound: one step of 8 bytes at least, up to the last byte that is not zero.
    """
    end = min(written_end(data, offset), len(data) - HEADER_BYTES + 1)
    begin = (offset + 7) & ~7  # not offset + 40: the last bytes of a marker are zero
    kinds = bytes(data[begin + _KIND_AT : end + _KIND_AT : 8]).translate(_IS_KIND)
    at = kinds.find(1)
    while at >= 0:
        offset = begin + 8 * at
        head = _plausible(data, offset) and decode(data, offset, seed)
        if head:
            yield offset, head
        at = kinds.find(1, at + (head.size // 8 if head else 1))


def _plausible(data: memoryview, offset: int) -> bool:
    """Tell cheaply whether a frame of a known kind may start here: no flag but ours, reserved 0."""
    return data[offset + 31] <= CLOSED and data[offset + 36] == 0 == data[offset + 39]


def written_end(data: memoryview, start: int) -> int:
    """Return the offset after the last byte that is not zero, `start` where there is none."""
    step = 1 << 16
    end = len(data)
    zeros = bytes(step)
    while end > start:  # Bound: `end` falls by `step`
        begin = max(start, end - step)
        if bytes(data[begin:end]) != zeros[: end - begin]:  # a view would compare item by item
            return begin + len(bytes(data[begin:end]).rstrip(b"\0"))
        end = begin
    return start


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0xEDB88320 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def flipped_bit(data: Bytes, stored_crc: int, seed: int) -> tuple[int, int] | None:
    """Return (byte, bit) of the one flip in `data` that explains a wrong CRC, else None.

    A flip in the CRC field itself is in byte -4 to -1, as it precedes `data` in a frame.
    CRC-32 is linear: the difference of the two CRCs
    is that of a message with this single bit set, so it is walked back byte by byte from the end
    until it equals what one bit leaves. Source: the polynomial 0xEDB88320 of zlib.
    """
    delta = crc32(data, seed) ^ stored_crc
    if delta and delta & (delta - 1) == 0:
        return -4 + (delta.bit_length() - 1) // 8, (delta.bit_length() - 1) % 8
    table = _crc_table()
    by_top = {value >> 24: index for index, value in enumerate(table)}
    one_bit = {table[1 << bit]: bit for bit in range(8)}
    for position in range(len(data) - 1, -1, -1):
        if delta in one_bit:
            return position, one_bit[delta]
        index = by_top[delta >> 24]
        delta = ((delta ^ table[index]) << 8 & 0xFFFFFFFF) | index
    return None
