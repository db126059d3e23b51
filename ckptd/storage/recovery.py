"""What is on the disk, read and judged; nothing is changed here.

In this order (Source: research on peers, ARCHITECTURE.md "why the log is like this"):

    1 sync the directories and the last segment, drop its cached pages, and only then read: a
      daemon that died of a failed sync must not act on pages that never reached the disk
    2 the newest snapshot that checks; an older one is used with a loud warning
    3 start at the segment with the greatest first LSN <= snapshot LSN + 1; older ones are ignored
    4 every later segment must chain on (LSN and CRC), else there is a hole: Corrupt
    5 at the first bad frame of the last segment look on: where a later frame proves that this
      one had been synced, the disk lies: Corrupt. Otherwise it is a torn tail

Step 6, `Store.arm`, is in `forward.py`. Read next: `rebuild.py` for the ways out of Corrupt.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ckptd.protocol.errors import Corrupt
from ckptd.storage import frame, segment, snapshot
from ckptd.storage.frame import Frame
from ckptd.storage.segment import BLOCK_BYTES, Block, Link, Name, Place, Segment
from ckptd.storage.snapshot import Snapshot

OnProgress = Callable[[int, int], None]
"""Called with (segments judged, segments to judge) after each."""

LOOK = "nothing was changed; `ckptctl wal verify` tells what is damaged, repair and salvage follow"


@dataclass
class RecoveryReport:
    """What a recovery found, for the journal and for people."""

    snapshot_lsn: int = 0
    first_lsn: int = 0  # of the segment that reading started at
    last_lsn: int = 0
    segments: int = 0
    frames: int = 0
    records: int = 0
    bytes_read: int = 0
    torn_bytes: int = 0  # unacknowledged bytes that were cut off
    torn_file: str = ""
    is_clean: bool = False  # the log ends with the marker of an orderly shutdown
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what repairs have left in the log


@dataclass
class Tail:
    """The end of the last segment: `keep` covers all frames but trailing markers."""

    block: Block
    link: Link  # after the last frame
    keep_end: int
    keep_crc: int
    epoch: int
    torn_bytes: int
    is_closed: bool


class Recovery:
    """A log that was read and judged. Made by `Store.recover`, made writable by `Store.arm`."""

    def __init__(self, place: Place, on_progress: OnProgress) -> None:
        self.report = RecoveryReport()
        self._place = place
        self._on_progress = on_progress
        self.bad_snapshots: list[str] = []
        place.disk.sync_dir(place.wal_dir)
        names, self.replaced = segment.newest_names(place.disk.names(place.wal_dir))
        if not names:
            raise Corrupt(f"there is no segment in {place.wal_dir}, the log is gone", LOOK)
        self._look_for_snapshots(names[0].first_lsn)
        self._distrust_cache(names[-1])
        self._snapshot = self._find_snapshot()
        self.segments, self.tail = self._judge(names)
        self._finish_report()

    @property
    def snapshot_lsn(self) -> int:
        """Return the LSN of the snapshot that `chunks` gives; 0: none."""
        return self._snapshot.lsn if self._snapshot else 0

    @property
    def last_lsn(self) -> int:
        """Return the LSN of the last record of the log."""
        return self.tail.link.next_lsn - 1

    @property
    def epoch(self) -> int:
        """Return the greatest epoch seen; the next reign takes a greater one."""
        return max(self.tail.epoch, self._snapshot.epoch if self._snapshot else 0)

    @property
    def clean(self) -> bool:
        """Tell whether the log ends with the marker of an orderly shutdown."""
        return self.report.is_clean

    def chunks(self) -> Iterator[bytes]:
        """Yield the chunks of the snapshot."""
        if self._snapshot:
            path = f"{self._place.snap_dir}/{snapshot.name_of(self._snapshot.lsn)}"
            yield from snapshot.chunks(self._place, path, self._snapshot.lsn)

    def frames(self) -> Iterator[Frame]:
        """Yield the frames with records after the snapshot, in order.

        An empty payload stands for records that a salvage could not save. Raises Corrupt where
        the bytes are not what they were a moment ago.
        """
        first = self.snapshot_lsn + 1
        next_lsn = self.report.first_lsn
        for known in self.segments:
            if known.name.first_lsn < self.report.first_lsn:
                continue
            data, block = self._load(known.name)
            link = Link(block.first_lsn, block.prev_crc)
            for offset, head in segment.frames(data[: known.end], link, self._place.seed):
                next_lsn = head.first_lsn + head.records
                if head.records and next_lsn > first:
                    payload = frame.payload_of(data, offset, head)
                    yield Frame(head.first_lsn, head.records, payload)
        if next_lsn != self.last_lsn + 1:
            raise Corrupt(f"the log changed under our eyes at LSN {next_lsn}", LOOK)

    @property
    def kept(self) -> Link:
        """Return where the chain stands once trailing markers are left out."""
        return Link(self.tail.link.next_lsn, self.tail.keep_crc)

    def last_frames(self) -> bytes:
        """Return the bytes of all frames of the last segment but trailing markers."""
        file = self._place.disk.open(self._path(self.segments[-1].name))
        try:
            return file.read(self.tail.keep_end - BLOCK_BYTES, BLOCK_BYTES)
        finally:
            file.close()

    def _path(self, name: Name) -> str:
        return f"{self._place.wal_dir}/{name}"

    def _distrust_cache(self, name: Name) -> None:
        """Write out and forget the cached pages of the last segment.

        Durable: what the last reign wrote and did not live to sync.
        """
        file = self._place.disk.open(self._path(name), write=True)
        try:
            file.sync()
            file.drop_cache()
        finally:
            file.close()

    def _look_for_snapshots(self, first_lsn: int) -> None:
        """Bear that `snap/` is missing where nothing was in it that the log has not.

        Copies by rsync, git or zip may leave empty directories out. Raises Corrupt.
        """
        place = self._place
        if "snap" in place.disk.names(place.root):
            place.disk.sync_dir(place.snap_dir)
        elif first_lsn > 1:
            text = f"{place.snap_dir} is missing, and the log begins only at LSN {first_lsn}"
            raise Corrupt(text, LOOK)

    def _find_snapshot(self) -> Snapshot | None:
        """Return the newest snapshot that checks; say so loudly where a newer one does not."""
        for lsn in reversed(snapshot.listed(self._place.disk, self._place.snap_dir)):
            path = f"{self._place.snap_dir}/{snapshot.name_of(lsn)}"
            try:
                found = snapshot.verify(self._place, path, lsn)
            except Corrupt as bad:
                self.bad_snapshots.append(snapshot.name_of(lsn))
                self.report.warnings.append(f"snapshot {lsn} is damaged: {bad.message}")
            else:
                self.report.bytes_read += found.bytes
                return found
        return None

    def _load(self, name: Name) -> tuple[memoryview, Block]:
        """Return a segment's bytes and header block. Raises Corrupt."""
        what = self._path(name)
        data = memoryview(segment.read_whole(self._place.disk, what))
        block = segment.decode_block(data[:BLOCK_BYTES], segment.WAL_MAGIC, self._place.store, what)
        if Name(block.first_lsn, block.epoch) != name or block.prev_last != name.first_lsn - 1:
            raise Corrupt(f"{what} has the header of another segment", LOOK)
        if block.file_bytes != len(data):
            raise Corrupt(f"{what} was made with {block.file_bytes} bytes, has {len(data)}", LOOK)
        return data, block

    def _judge(self, names: list[Name]) -> tuple[list[Segment], Tail]:
        """Walk the chain from where the snapshot ends. Raises Corrupt."""
        start = self.snapshot_lsn + 1
        at = max((i for i, name in enumerate(names) if name.first_lsn <= start), default=-1)
        if at < 0:
            raise Corrupt(
                f"the log begins at LSN {names[0].first_lsn}, but LSN {start} is needed", LOOK
            )
        segments = [Segment(name, self._prev_first(name)) for name in names[:at]]
        link: Link | None = None
        tail: Tail | None = None
        for done, name in enumerate(names[at:], 1):
            known, tail = self._judge_one(name, link, is_last=done == len(names) - at)
            segments.append(known)
            link = tail.link
            self._on_progress(done, len(names) - at)
        assert tail, "there is one segment at least"
        self.report.first_lsn = names[at].first_lsn
        self.report.segments = len(names) - at
        return segments, tail

    def _prev_first(self, name: Name) -> int:
        """Return the predecessor that the header of a segment names, which is not replayed."""
        file = self._place.disk.open(self._path(name))
        try:
            data = file.read(BLOCK_BYTES, 0)
            return segment.decode_block(
                data, segment.WAL_MAGIC, self._place.store, str(name)
            ).prev_first
        except (OSError, Corrupt):
            self.report.warnings.append(f"{name}, which is not needed, has a damaged header")
            return 0
        finally:
            file.close()

    def _judge_one(self, name: Name, link: Link | None, *, is_last: bool) -> tuple[Segment, Tail]:
        """Walk one segment, which must follow on `link`. Raises Corrupt."""
        data, block = self._load(name)
        begin = Link(block.first_lsn, block.prev_crc)
        if link and link != begin:
            raise Corrupt(
                f"there is a hole in the log: {self._path(name)} follows on LSN "
                f"{begin.next_lsn - 1}, but the segment before ends at {link.next_lsn - 1} or "
                "is damaged there",
                LOOK,
            )
        known = Segment(name, block.prev_first, BLOCK_BYTES)
        tail = Tail(block, begin, BLOCK_BYTES, block.prev_crc, block.epoch, 0, is_closed=False)
        self._walk(data, known, tail)
        self.report.bytes_read += len(data)
        if is_last:
            self._judge_tail(data, known, tail)
        return known, tail

    def _walk(self, data: memoryview, known: Segment, tail: Tail) -> None:
        """Go over the frames that check; leave in `known` and `tail` where they end."""
        head = None
        link = tail.link
        frames = records = 0
        for offset, head in segment.frames(data, link, self._place.seed):
            known.note(head.first_lsn, offset)
            known.end = offset + head.size
            if head.kind != frame.IDLE:
                tail.keep_end, tail.keep_crc = known.end, head.crc
                frames += 1
                records += head.records
            if head.kind in (frame.NOTE, frame.LOST):
                self._report_note(data, offset, head)
        if head:
            tail.link = Link(head.first_lsn + head.records, head.crc)
            tail.epoch = max(tail.epoch, head.epoch)
            tail.is_closed = bool(head.flags & frame.CLOSED)
        self.report.frames += frames
        self.report.records += records

    def _report_note(self, data: memoryview, offset: int, head: frame.Head) -> None:
        if head.kind == frame.NOTE:
            text = frame.payload_of(data, offset, head).decode(errors="replace")
        else:
            text = f"records {head.first_lsn} to {head.last_lsn} were lost to a salvage"
        self.report.notes.append(text)

    def _judge_tail(self, data: memoryview, known: Segment, tail: Tail) -> None:
        """Tell a torn tail from corruption behind the last good frame. Raises Corrupt."""
        bad_lsn = tail.link.next_lsn
        where = f"{self._path(known.name)} at offset {known.end} (LSN {bad_lsn})"
        if tail.block.synced_lsn >= bad_lsn:
            raise Corrupt(f"{where} does not check, but was synced when the file was made", LOOK)
        tail.torn_bytes = frame.written_end(data, known.end) - known.end
        if not tail.torn_bytes:
            return
        for offset, head in frame.find_later(data, known.end, self._place.seed):
            if head.durable_lsn >= bad_lsn or head.flags & frame.CLOSED:
                raise Corrupt(
                    f"{where} does not check, but the frame at offset {offset} proves that it "
                    f"had been synced (up to LSN {head.durable_lsn})",
                    LOOK,
                )

    def _finish_report(self) -> None:
        """Fill in the rest. Raises Corrupt where the log does not reach the snapshot's end."""
        report, tail = self.report, self.tail
        report.snapshot_lsn = self.snapshot_lsn
        report.last_lsn = self.last_lsn
        report.is_clean = tail.is_closed and not tail.torn_bytes
        if self._snapshot and self._snapshot.end_lsn > self.last_lsn:
            raise Corrupt(
                f"the log ends at LSN {self.last_lsn}, but snapshot {self.snapshot_lsn} was made "
                f"when it had reached {self._snapshot.end_lsn}",
                LOOK,
            )
        if tail.torn_bytes:
            report.torn_bytes = tail.torn_bytes
            report.torn_file = str(self.segments[-1].name)
            report.warnings.append(
                f"{tail.torn_bytes} bytes after LSN {self.last_lsn} were never acknowledged and "
                f"are cut off; the original goes to {self._place.quarantine_dir}"
            )
