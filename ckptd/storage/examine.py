"""Look at every file of a store, needed or not, and name what is wrong with it; change nothing.

Whether the damage matters is for `recovery.py` to say. Where one flipped bit explains what is
seen, it is named: it tells memory or cable from a lost write. Read next: `rebuild.py`.
"""

import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from ckptd.protocol.errors import Corrupt
from ckptd.storage import frame, segment, snapshot
from ckptd.storage.segment import BLOCK_BYTES, SNAP_MAGIC, WAL_MAGIC, Link, Name, Place

_CRC_BYTES = 4
_LENGTH_OFFSET = 4  # of the field `length` in a frame, the only one that moves the CRC's end


@dataclass(frozen=True)
class Finding:
    """One thing that does not check. `flipped`: (byte of the file, bit) that explains it."""

    file: str
    offset: int
    lsn: int
    text: str
    flipped: tuple[int, int] | None = None


def examine(place: Place) -> Iterator[Finding]:
    """Yield what does not check, file by file; a torn tail is among it."""
    link: Link | None
    names, replaced = segment.newest_names(place.disk.names(place.wal_dir))
    link = None
    for name in names:
        if link and link.next_lsn != name.first_lsn:
            text = f"records {link.next_lsn} to {name.first_lsn - 1} are missing"
            yield Finding(str(name), 0, link.next_lsn, text)
        link = yield from _segment(place, name)
    for name in replaced:
        yield Finding(str(name), 0, name.first_lsn, "left over: a later epoch replaced it")
    for lsn in snapshot.listed(place.disk, place.snap_dir):
        path = f"{place.snap_dir}/{snapshot.name_of(lsn)}"
        try:
            snapshot.verify(place, path, lsn)
        except Corrupt as bad:
            flipped = _flip_of_block(segment.read_whole(place.disk, path)[:BLOCK_BYTES], place)
            yield Finding(snapshot.name_of(lsn), 0, lsn, bad.message, flipped)


def _segment(place: Place, name: Name) -> Generator[Finding, None, Link]:
    """Yield what is wrong in one segment; return where its chain ends."""
    path = f"{place.wal_dir}/{name}"
    data = memoryview(segment.read_whole(place.disk, path))
    link = Link(name.first_lsn, 0)
    try:
        block = segment.decode_block(data[:BLOCK_BYTES], WAL_MAGIC, place.store, path)
        link = Link(block.first_lsn, block.prev_crc)
        if block.file_bytes != len(data):
            text = f"it was made with {block.file_bytes} bytes and has {len(data)}"
            yield Finding(str(name), 0, link.next_lsn, text)
    except Corrupt as bad:
        flipped = _flip_of_block(bytes(data[:BLOCK_BYTES]), place)
        yield Finding(str(name), 0, name.first_lsn, bad.message, flipped)
    end = BLOCK_BYTES
    while True:  # Bound: `end` grows
        for offset, head in segment.frames(data, link, place.seed, end):
            link = Link(head.first_lsn + head.records, head.crc)
            end = offset + head.size
        written = frame.written_end(data, end)
        if written == end:
            return link
        later = next(frame.find_later(data, end, place.seed), None)
        stop = later[0] if later else written
        text = f"{stop - end} bytes do not check"
        flipped = flipped_in_frame(data, end, place.seed, link)
        yield Finding(str(name), end, link.next_lsn, text, flipped)
        if not later:
            return link
        end = later[0]
        link = Link(later[1].first_lsn, later[1].prev_crc)


def flipped_in_frame(
    data: memoryview, offset: int, seed: int, link: Link
) -> tuple[int, int] | None:
    """Return (byte of `data`, bit) whose flip makes the frame at `offset` check and fit."""
    head = frame.peek(data, offset)
    if not head:
        return None
    tries = [(offset + _LENGTH_OFFSET + bit // 8, bit % 8) for bit in range(32)]
    if head.length <= frame.PAYLOAD_BYTES_MAX and offset + head.size <= len(data):
        body = data[offset + _CRC_BYTES : offset + head.size]
        if found := frame.flipped_bit(body, head.crc, seed):
            tries.insert(0, (offset + _CRC_BYTES + found[0], found[1]))
    end = min(len(data), offset + frame.frame_bytes(frame.PAYLOAD_BYTES_MAX))
    for byte, bit in tries:
        copy = bytearray(data[offset:end])
        copy[byte - offset] ^= 1 << bit
        mended = frame.decode(memoryview(copy), 0, seed)
        if mended and frame.is_next(mended, *link):
            return byte, bit
    return None


def _flip_of_block(data: bytes, place: Place) -> tuple[int, int] | None:
    """Return (byte, bit) of the flip that explains a header block which does not check."""
    if len(data) < BLOCK_BYTES:
        return None
    (stored,) = struct.unpack_from("<I", data, BLOCK_BYTES - 4)
    found = frame.flipped_bit(data[: BLOCK_BYTES - 4], stored, 0)
    if not found:
        return None
    byte, bit = found[0] % BLOCK_BYTES, found[1]  # here the CRC comes last, not first
    copy = bytearray(data)
    copy[byte] ^= 1 << bit
    for magic in (WAL_MAGIC, SNAP_MAGIC):
        try:
            segment.decode_block(bytes(copy), magic, place.store, "")
        except Corrupt:
            continue
        return byte, bit
    return None


def all_frames(place: Place) -> Iterator[tuple[str, int, frame.Head, bytes]]:
    """Yield (segment, offset, header, payload) of every frame that checks, damage or not."""
    for name in segment.newest_names(place.disk.names(place.wal_dir))[0]:
        data = memoryview(segment.read_whole(place.disk, f"{place.wal_dir}/{name}"))
        for offset, head in frame.find_later(data, BLOCK_BYTES, place.seed):
            yield str(name), offset, head, frame.payload_of(data, offset, head)
