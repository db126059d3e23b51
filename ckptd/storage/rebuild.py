"""The ways out of Corrupt, each chosen by a person: cut the log off, or go on around the damage.

Both give every file a second name in quarantine/ first, write new segments of a new epoch beside
the old ones, and end with a NOTE in the log that says what was done.

    repair   keep what is whole up to an LSN, drop all after it, and the snapshots that know more
    salvage  keep every frame that checks; LOST frames stand for the records in between, so that
             every LSN keeps its place and the reader knows that something was there

Crash: dying half-way leaves a log whose parts do not chain, so it is refused until the same tool
has run again. Read next: `ckptd/daemon/offline_wal.py`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from ckptd.protocol.errors import Corrupt, NotFound
from ckptd.storage import frame, segment, snapshot
from ckptd.storage.segment import BLOCK_BYTES, TAIL_BYTES, Link, Name, Place
from ckptd.storage.snapshot import Snapshot
from ckptd.storage.wal import Reign, new_block


@dataclass
class Rebuilt:
    """What was done: records up to `last_lsn`, and the ranges (first, last) that are lost."""

    last_lsn: int
    kept_in: str
    lost: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class _Part:
    """The content of one segment to be: (first LSN, count, kind, payload) in order."""

    first_lsn: int
    frames: list[tuple[int, int, int, bytes]] = field(default_factory=list)
    next_lsn: int = 0
    promised: int = 0  # greatest LSN that a frame or the header says was synced

    def __post_init__(self) -> None:
        self.next_lsn = self.first_lsn

    def add(self, head: frame.Head, payload: bytes) -> None:
        """Take a frame over."""
        self.frames.append((head.first_lsn, head.records, head.kind, payload))
        self.next_lsn = head.first_lsn + head.records

    def lose(self, last_lsn: int) -> tuple[int, int] | None:
        """Put LOST frames up to `last_lsn`; return the range, None where nothing is missing."""
        first = self.next_lsn
        while self.next_lsn <= last_lsn:  # Bound: `next_lsn` grows
            count = min(frame.COUNT_MAX, last_lsn - self.next_lsn + 1)
            self.frames.append((self.next_lsn, count, frame.LOST, b""))
            self.next_lsn += count
        return (first, last_lsn) if first <= last_lsn else None


def repair(place: Place, truncate_after: int, reign_at_ns: int) -> Rebuilt:
    """Drop every record after LSN `truncate_after`; a frame that straddles it goes as a whole.

    Raises NotFound where the log is not whole so far. Durable: the shorter log, on return.
    """
    names, _ = segment.newest_names(place.disk.names(place.wal_dir))
    base = _newest_snapshot(place, truncate_after)
    start = base.lsn + 1 if base else 1
    part, link, whole = _cut(place, names, start, truncate_after)
    if not part or (part.next_lsn <= truncate_after and whole < truncate_after):
        raise NotFound(
            f"the log is whole from LSN {start} to {whole}, it cannot be cut after "
            f"{truncate_after}",
            f"cut after {whole}, or salvage",
        )
    reign = _new_reign(place, names, reign_at_ns)
    kept_in = _keep_all(place, f"repair-{reign.epoch:010d}")
    note: dict[str, object] = {
        "repaired": f"cut after LSN {part.next_lsn - 1}",
        "asked": truncate_after,
    }
    _write(place, reign, part, link, _before(names, part), note)
    for name in reversed([name for name in names if name.first_lsn >= part.first_lsn]):
        place.disk.unlink(f"{place.wal_dir}/{name}")  # newest first
    for lsn in snapshot.listed(place.disk, place.snap_dir):
        if not base or lsn > base.lsn:
            place.disk.unlink(f"{place.snap_dir}/{snapshot.name_of(lsn)}")
    place.disk.sync_dir(place.wal_dir)
    place.disk.sync_dir(place.snap_dir)
    return Rebuilt(part.next_lsn - 1, kept_in)


def salvage(place: Place, reign_at_ns: int) -> Rebuilt:
    """Write the log anew from all frames that check, with LOST frames in between.

    Durable: the new log, on return. Raises Corrupt where there is neither log nor snapshot.
    """
    names, _ = segment.newest_names(place.disk.names(place.wal_dir))
    base = _newest_snapshot(place, None)
    start = base.lsn + 1 if base else 1
    at = max((i for i, name in enumerate(names) if name.first_lsn <= start), default=-1)
    if not names and not base:
        raise Corrupt(f"there is neither a log nor a snapshot in {place.root}, nothing to salvage")
    rest = names[max(0, at) :]
    parts = [_all_that_checks(place, name) for name in rest]
    if at < 0:
        parts.insert(0, _Part(start))
    rebuilt = Rebuilt(0, "")
    ends = [part.first_lsn - 1 for part in parts[1:]]
    ends.append(max(parts[-1].promised, base.end_lsn if base else 0))
    rebuilt.lost = [gap for part, end in zip(parts, ends, strict=True) for gap in _fill(part, end)]
    rebuilt.last_lsn = parts[-1].next_lsn - 1
    reign = _new_reign(place, names, reign_at_ns)
    rebuilt.kept_in = _keep_all(place, f"salvage-{reign.epoch:010d}")
    link, prev_first = _link_before(place, names[: max(0, at)], parts[0])
    for part in parts:
        note: dict[str, object] = {"salvaged": rebuilt.lost} if part is parts[-1] else {}
        link = _write(place, reign, part, link, prev_first, note)
        prev_first = part.first_lsn
    for name in rest:
        place.disk.unlink(f"{place.wal_dir}/{name}")
    place.disk.sync_dir(place.wal_dir)
    return rebuilt


def store_id_from_headers(place: Place) -> bytes:
    """Return the store id that the segments' headers agree on. Raises Corrupt.

    For a FORMAT that is lost or damaged.
    """
    found = set()
    for name in segment.newest_names(place.disk.names(place.wal_dir))[0]:
        data = segment.read_whole(place.disk, f"{place.wal_dir}/{name}")[:BLOCK_BYTES]
        try:
            found.add(segment.decode_block(data, segment.WAL_MAGIC, data[16:32], "").store)
        except Corrupt:
            continue
    if len(found) != 1:
        raise Corrupt(f"the segments in {place.wal_dir} name {len(found)} stores")
    return found.pop()


def _newest_snapshot(place: Place, lsn_max: int | None) -> Snapshot | None:
    """Return the newest snapshot that checks and shows nothing after `lsn_max`."""
    for lsn in reversed(snapshot.listed(place.disk, place.snap_dir)):
        try:
            found = snapshot.verify(place, f"{place.snap_dir}/{snapshot.name_of(lsn)}", lsn)
        except Corrupt:
            continue
        if lsn_max is None or found.end_lsn <= lsn_max:
            return found
    return None


def _cut(
    place: Place, names: list[Name], start: int, last_lsn: int
) -> tuple[_Part | None, Link, int]:
    """Return (the segment that the cut goes through, what it follows on, last whole LSN)."""
    part, begin = None, Link(start, 0)
    link: Link | None = None
    at = max((i for i, n in enumerate(names) if n.first_lsn <= start), default=len(names))
    for name in names[at:]:
        data = memoryview(segment.read_whole(place.disk, f"{place.wal_dir}/{name}"))
        try:
            block = segment.decode_block(data, segment.WAL_MAGIC, place.store, str(name))
        except Corrupt:
            break
        here = Link(block.first_lsn, block.prev_crc)
        if (link and link != here) or here.next_lsn > max(start, last_lsn + 1):
            break
        part, begin, link = _Part(name.first_lsn), here, here
        for offset, head in segment.frames(data, here, place.seed):
            link = Link(head.first_lsn + head.records, head.crc)
            if head.kind != frame.IDLE and head.last_lsn <= last_lsn:
                part.add(head, frame.payload_of(data, offset, head))
    return part, begin, link.next_lsn - 1 if link else 0


def _all_that_checks(place: Place, name: Name) -> _Part:
    """Return the frames of a segment that check, whatever lies between them."""
    data = memoryview(segment.read_whole(place.disk, f"{place.wal_dir}/{name}"))
    part = _Part(name.first_lsn)
    try:
        block = segment.decode_block(data[:BLOCK_BYTES], segment.WAL_MAGIC, place.store, "")
        part.promised = block.synced_lsn
    except Corrupt:
        pass  # its frames can still be read
    for offset, head in frame.find_later(data, BLOCK_BYTES, place.seed):
        part.promised = max(part.promised, head.durable_lsn)
        if head.kind != frame.IDLE and head.first_lsn >= part.next_lsn:
            part.lose(head.first_lsn - 1)
            part.add(head, frame.payload_of(data, offset, head))
    return part


def _fill(part: _Part, last_lsn: int) -> Iterator[tuple[int, int]]:
    """Complete a part up to `last_lsn`; yield every range that is lost in it."""
    part.lose(last_lsn)
    first = end = 0
    for lsn, count, kind, _ in part.frames:
        if kind == frame.LOST and end != lsn:
            if first:
                yield first, end - 1
            first = lsn
        if kind == frame.LOST:
            end = lsn + count
    if first:
        yield first, end - 1


def _new_reign(place: Place, names: list[Name], at_ns: int) -> Reign:
    """Return a reign later than every one that left its epoch in a name or a frame."""
    epochs = [name.epoch for name in names]
    for lsn in snapshot.listed(place.disk, place.snap_dir):
        try:
            path = f"{place.snap_dir}/{snapshot.name_of(lsn)}"
            epochs.append(snapshot.verify(place, path, lsn).epoch)
        except Corrupt:
            continue
    return Reign(max(epochs, default=0) + 1, "", at_ns)


def _keep_all(place: Place, label: str) -> str:
    """Give every file of log and snapshots a second name; no file is ever written in place.

    Durable: the names in quarantine/.
    """
    disk, target = place.disk, f"{place.quarantine_dir}/{label}"
    disk.make_dir(target, 0o700)
    have = disk.names(target)
    disk.make_dir(place.snap_dir, 0o700)
    for directory in (place.wal_dir, place.snap_dir):
        for name in disk.names(directory):
            if name not in have and not name.startswith("spare"):
                disk.link(f"{directory}/{name}", f"{target}/{name}")
    disk.sync_dir(target)
    disk.sync_dir(place.quarantine_dir)
    return target


def _before(names: list[Name], part: _Part) -> int:
    """Return the first LSN of the segment before, 0 where there is none."""
    return max((n.first_lsn for n in names if n.first_lsn < part.first_lsn), default=0)


def _link_before(place: Place, older: list[Name], part: _Part) -> tuple[Link, int]:
    """Return what the first part follows on, and whether the log goes on before it."""
    if older:
        data = memoryview(segment.read_whole(place.disk, f"{place.wal_dir}/{older[-1]}"))
        try:
            block = segment.decode_block(data, segment.WAL_MAGIC, place.store, "")
        except Corrupt:
            return Link(part.first_lsn, 0), 0
        link = Link(block.first_lsn, block.prev_crc)
        for _, head in segment.frames(data, link, place.seed):
            link = Link(head.first_lsn + head.records, head.crc)
        if link.next_lsn == part.first_lsn:
            return link, older[-1].first_lsn
    return Link(part.first_lsn, 0), 0


def _write(
    place: Place,
    reign: Reign,
    part: _Part,
    link: Link,
    prev_first: int,
    note: dict[str, object],
) -> Link:
    """Write one segment; return what the next one follows on.

    Durable: the segment and its name.
    """
    chain = frame.Chain(place.seed, reign.epoch, link.crc)
    last = part.next_lsn - 1
    body = [chain.encode(data, lsn, last, count, kind) for lsn, count, kind, data in part.frames]
    if note:
        text = json.dumps(note).encode()
        body.append(chain.encode(text, part.next_lsn, last, 0, frame.NOTE))
    data = b"".join(body)
    need = BLOCK_BYTES + len(data) + TAIL_BYTES
    size = max(place.segment_bytes, -(-need // BLOCK_BYTES) * BLOCK_BYTES)
    name = Name(part.first_lsn, reign.epoch)
    block = new_block(place, reign, name, link, prev_first)
    block = block._replace(synced_lsn=last, file_bytes=size)
    new = f"{place.wal_dir}/{segment.SPARE_UNFINISHED}"
    file = place.disk.create(new)
    try:
        segment.zero_fill(file, size)
        file.write(segment.encode_block(block) + data, 0)
        file.sync()
    finally:
        file.close()
    place.disk.rename(new, f"{place.wal_dir}/{name}")
    place.disk.sync_dir(place.wal_dir)
    return Link(part.next_lsn, chain.crc)
