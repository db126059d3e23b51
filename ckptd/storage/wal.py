"""The log while it is written: append, sync, rotate, read back, retire.

One thread appends and syncs; the spare is made and old segments are removed by a background
thread. What was on disk before is the matter of `recovery.py`, which is the only one to construct
a Wal. Invariants:

    1 A segment gets its name only when the one before is synced to its end, and its own header
      block is synced: so a later segment proves that every earlier one had been complete.
    2 Appends never overwrite: a frame goes where only zeros were, in a file of this reign.
    3 After a failed write or sync nothing is written or told any more: the process must end.
Read next: `recovery.py`.
"""

import errno
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ckptd.protocol.errors import Busy, Corrupt, DiskFull, Internal, NotFound
from ckptd.storage import frame, segment
from ckptd.storage.disk import Bytes, File
from ckptd.storage.frame import Chain, Frame
from ckptd.storage.segment import BLOCK_BYTES, TAIL_BYTES, Block, Link, Name, Place, Segment

NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT))
NO_MEANS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))


class WalFailed(Internal):
    """The disk failed a write or a sync of the log: end the process, never try again."""

    code = "wal_failed"


class Background:
    """Work off the loop, one job at a time; without threads a job runs where it is started."""

    def __init__(self, *, has_threads: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "ckptd-storage") if has_threads else None

    def start(self, job: Callable[[], None]) -> Future[None]:
        """Run `job` soon; the future tells when it is over."""
        if self._pool:
            return self._pool.submit(job)
        done: Future[None] = Future()
        try:
            job()
            done.set_result(None)
        except OSError as bad:
            done.set_exception(bad)
        return done

    def close(self) -> None:
        """Wait for what was started."""
        if self._pool:
            self._pool.shutdown()


@dataclass
class Reign:
    """What every file written under one epoch says about its writer."""

    epoch: int
    boot_id: str
    at_ns: int


def new_block(place: Place, reign: Reign, name: Name, prev: Link, prev_first: int) -> Block:
    """Return the header block of a segment that follows on `prev` and holds nothing yet."""
    return Block(
        magic=segment.WAL_MAGIC,
        format=segment.FORMAT,
        min_reader=segment.FORMAT,
        store=place.store,
        first_lsn=name.first_lsn,
        prev_first=prev_first,
        prev_last=prev.next_lsn - 1,
        synced_lsn=prev.next_lsn - 1,
        at_ns=reign.at_ns,
        file_bytes=place.segment_bytes,
        prev_crc=prev.crc,
        epoch=reign.epoch,
        boot_id=reign.boot_id.encode()[:40],
    )


class Wal:
    """The log in append mode."""

    def __init__(
        self,
        place: Place,
        reign: Reign,
        background: Background,
        segments: list[Segment],
        file: File,
        link: Link,
    ) -> None:
        self.last_error = ""
        self.has_spare = False
        self.is_tight = False
        self.next_lsn = link.next_lsn
        self.durable_lsn = link.next_lsn - 1
        self._place = place
        self._reign = reign
        self._background = background
        self._segments = segments
        self._file = file
        self._file_bytes = file.size()
        self._offset = self._durable_end = segments[-1].end
        self._chain = Chain(place.seed, reign.epoch, link.crc)
        self._is_dirty = False
        self._is_idle = False
        self._has_failed = False
        self._filling: Future[None] | None = None

    @property
    def payload_bytes_max(self) -> int:
        """Return the longest payload that one frame can carry here."""
        room = self._place.segment_bytes - BLOCK_BYTES - TAIL_BYTES - frame.HEADER_BYTES
        return min(frame.PAYLOAD_BYTES_MAX, room & ~7)

    @property
    def spare_bytes(self) -> int:
        """Return the bytes of frames that a whole segment takes."""
        return self._place.segment_bytes - BLOCK_BYTES - TAIL_BYTES

    @property
    def segment_room_bytes(self) -> int:
        """Return the bytes of frames that fit into this segment."""
        return max(0, self._file_bytes - TAIL_BYTES - self._offset)

    @property
    def room_bytes(self) -> int:
        """Return the bytes of frames that fit whatever happens: this segment and the spare.

        On a full disk the spare does not count: the next start needs one to copy its tail to.
        """
        room = self.segment_room_bytes
        return room + self.spare_bytes if self.has_spare and not self.is_tight else room

    def look_at_disk(self) -> None:
        """Find out whether the file system could hold one more segment; a spare is made if so."""
        free = self._place.disk.free_bytes(self._place.wal_dir)
        self.is_tight = free < self._place.segment_bytes
        if self.is_tight:
            self.last_error = f"only {free} bytes are free in {self._place.wal_dir}"
        else:
            self.prepare_spare()

    @property
    def earliest_lsn(self) -> int:
        """Return the first LSN that `read` can still give."""
        at = len(self._segments) - 1
        while at and self._segments[at].prev_first == self._segments[at - 1].name.first_lsn:
            at -= 1  # Bound: `at` falls to 0
        return self._segments[at].name.first_lsn

    def append(self, payload: Bytes, count: int) -> int:
        """Write a frame of `count` records and return the LSN of its first; not yet durable.

        Raises:
            DiskFull: neither this segment nor a spare has room; nothing was written.
            WalFailed: the disk failed; end the process.
        """
        assert 0 < count <= frame.COUNT_MAX, f"a frame of {count} records"
        assert 0 < len(payload) <= self.payload_bytes_max, f"a payload of {len(payload)} bytes"
        if self._offset + frame.frame_bytes(len(payload)) + TAIL_BYTES > self._file_bytes:
            self._rotate()
        first = self.next_lsn
        self._segments[-1].note(first, self._offset)
        self._write(self._chain.encode(payload, first, self.durable_lsn, count))
        self.next_lsn = first + count
        self._is_idle = False
        return first

    def sync(self) -> int:
        """Make all that was appended durable with one fdatasync; return the durable LSN.

        Durable: every record below `next_lsn`. Raises WalFailed; a sync is never tried again.
        """
        self._check()
        if self._is_dirty:
            try:
                self._file.sync_data()
            except OSError as bad:
                raise self._fail("sync", bad) from bad
            self._is_dirty = False
            self.durable_lsn = self.next_lsn - 1
            self._durable_end = self._offset
        return self.durable_lsn

    def mark_idle(self, *, closed: bool = False) -> None:
        """Write the marker that promises the last group, so that damage to it is seen.

        Nothing depends on the marker itself being durable, so it waits for the next sync, but
        for `closed`, the flag of an orderly end.

        Durable: with `closed` the whole log and the marker.
        """
        self.sync()
        if (self._is_idle and not closed) or self._offset + frame.HEADER_BYTES > self._file_bytes:
            return
        # Invariant: all before a marker is synced, an earlier marker too, or a torn marker
        # followed by a whole one would look like corruption.
        flags = frame.CLOSED if closed else 0
        self._write(self._chain.encode(b"", self.next_lsn, self.durable_lsn, 0, frame.IDLE, flags))
        self._is_idle = True
        if closed:
            self.sync()

    def prepare_spare(self) -> None:
        """Have the next segment made in the background, where there is none."""
        if self.has_spare or (self._filling and not self._filling.done()):
            return
        self._filling = self._background.start(self._fill_spare)

    def await_spare(self) -> None:
        """Wait for the spare that is being made. Bound: one fill of a segment, milliseconds."""
        if not self.has_spare and self._filling:
            self._filling.exception()

    def read(self, since_lsn: int, bytes_max: int) -> list[Frame]:
        """Return durable frames with records after `since_lsn`, about `bytes_max` of payload.

        One frame at least where there is one; its first records may be at or below `since_lsn`.
        What lies before damage is given first.

        Raises:
            NotFound: that part of the log is retired.
            Corrupt: the very next frame does not check, or the disk does not give it; what comes
                after it is not affected.
            Busy: there are no descriptors, or there is no memory, to read it.
        """
        found: list[Frame] = []
        if since_lsn >= self.durable_lsn:
            return found
        want = since_lsn + 1
        if want < (earliest := self.earliest_lsn):
            raise NotFound(
                f"the log before LSN {earliest} is retired, {want} was asked for",
                f"start again from LSN {earliest - 1}",
            )
        first = bisect_right(self._segments, want, key=lambda known: known.name.first_lsn) - 1
        for at in range(first, len(self._segments)):
            try:
                want, bytes_max = self._read_segment(self._segments[at], want, bytes_max, found)
            except OSError as bad:
                if found:
                    break
                raise self._unreadable(at, want, bad) from bad
            if bytes_max <= 0 or want > self.durable_lsn:
                break
            # Invariant: a segment ends where the next one begins. Replay has seen only its tail.
            if want <= self._last_lsn(at):
                if found:
                    break
                raise self._damaged(at, "does not check any more", want)
        return found

    def _last_lsn(self, at: int) -> int:
        """Return the last durable LSN of the segment at this place in the list."""
        is_current = at == len(self._segments) - 1
        return self.durable_lsn if is_current else self._segments[at + 1].name.first_lsn - 1

    def _unreadable(self, at: int, want: int, bad: OSError) -> Corrupt | Busy:
        if bad.errno in NO_MEANS:
            return Busy(f"the log cannot be read just now: {bad.strerror}", "try again later")
        return self._damaged(at, f"cannot be read ({bad.strerror})", want)

    def _damaged(self, at: int, how: str, want: int) -> Corrupt:
        last_lsn = self._last_lsn(at)
        go_on = f"tasks are not affected, and `ckptctl events --since {last_lsn}` goes on behind it"
        if at == len(self._segments) - 1:
            go_on = "but a restart needs this segment: look at the disk before"
        return Corrupt(
            f"{self._segments[at].name} {how} at LSN {want}; it held {last_lsn}",
            f"nothing was changed; {go_on}",
        )

    def retire(self, keep_lsn: int) -> int:
        """Remove the segments wholly at or below `keep_lsn`, oldest first; return how many.

        Crash: any subset of the removals may have happened; recovery starts at the segment that
        its snapshot needs and ignores what is older.
        """
        count = 0
        while len(self._segments) - count > 1:  # Bound: `count` grows
            if self._segments[count + 1].name.first_lsn > keep_lsn + 1:
                break
            count += 1
        gone = [self._path(known.name) for known in self._segments[:count]]
        del self._segments[:count]
        if gone:
            self._background.start(lambda: self._remove(gone))
        return count

    def close(self) -> None:
        """Close the files; what is not synced stays in the page cache."""
        self._background.close()
        self._file.close()

    def _path(self, name: Name) -> str:
        return f"{self._place.wal_dir}/{name}"

    def _check(self) -> None:
        if self._has_failed:
            raise WalFailed(f"the log has failed before: {self.last_error}")

    def _fail(self, what: str, bad: OSError) -> WalFailed:
        self._has_failed = True
        self.last_error = f"{what}: {bad.strerror}"
        return WalFailed(
            f"the log cannot be written, {what} of {self._segments[-1].name} failed: "
            f"{bad.strerror}; nothing since LSN {self.durable_lsn} was acknowledged",
            "look at the disk; the next start replays what it really holds",
        )

    def _write(self, data: bytes) -> None:
        self._check()
        try:
            self._file.write(data, self._offset)
        except OSError as bad:
            raise self._fail("write", bad) from bad
        self._offset += len(data)
        self._is_dirty = True

    def _rotate(self) -> None:
        """Go on in a new segment.

        Durable: the old segment to its end, then header and name of the new one.
        """
        self._check()
        self._need_spare()
        self.sync()
        last = self._segments[-1]
        name = Name(self.next_lsn, self._reign.epoch)
        assert name > last.name, "a segment without records is never rotated"
        link = Link(self.next_lsn, self._chain.crc)
        block = new_block(self._place, self._reign, name, link, last.name.first_lsn)
        try:
            file = self._begun(name, block)
        except OSError as bad:
            raise self._fail("rotation", bad) from bad
        self._file.close()
        self._file = file
        self._file_bytes = self._place.segment_bytes
        last.end = self._offset
        self._offset = self._durable_end = BLOCK_BYTES
        self._segments.append(Segment(name, last.name.first_lsn, BLOCK_BYTES))
        self.has_spare = False
        self.prepare_spare()

    def _begun(self, name: Name, block: Block) -> File:
        """Return the spare as a segment. Durable: its header and its name."""
        disk, spare = self._place.disk, f"{self._place.wal_dir}/{segment.SPARE}"
        file = disk.open(spare, write=True)
        try:
            file.write(segment.encode_block(block), 0)
            file.sync_data()  # Crash: a spare with a header; the next claim makes it zero again
            disk.rename(spare, self._path(name))
            disk.sync_dir(self._place.wal_dir)
        except OSError:
            file.close()
            raise
        return file

    def _need_spare(self) -> None:
        """Wait for the spare, or make one here. Raises DiskFull, WalFailed."""
        self.await_spare()
        if self.has_spare:
            return
        try:
            segment.make_spare(self._place.disk, self._place.wal_dir, self._place.segment_bytes)
        except OSError as bad:
            if bad.errno not in NO_ROOM:
                raise self._fail("filling a new segment", bad) from bad
            self.last_error = f"no room for a segment: {bad.strerror}"
            raise DiskFull(
                f"the log is full and there is no room for {self._place.segment_bytes} bytes "
                f"more in {self._place.wal_dir}; nothing was written",
                "free space on that file system",
            ) from bad
        self.has_spare = True

    def _fill_spare(self) -> None:
        """Make the spare, where the file system has room for it; runs in the background.

        Durable: the spare.
        """
        place = self._place
        try:
            if place.disk.free_bytes(place.wal_dir) < place.segment_bytes:
                raise OSError(errno.ENOSPC, "no space left for a spare segment")  # noqa: TRY301
            segment.make_spare(place.disk, place.wal_dir, place.segment_bytes)
        except OSError as bad:
            self.last_error = f"no spare segment: {bad.strerror}"
        else:
            self.has_spare = True

    def _remove(self, paths: list[str]) -> None:
        try:
            for path in paths:
                self._place.disk.unlink(path)
            self._place.disk.sync_dir(self._place.wal_dir)
        except OSError as bad:
            self.last_error = f"an old segment stays: {bad.strerror}"

    def _read_segment(
        self, known: Segment, want: int, budget: int, found: list[Frame]
    ) -> tuple[int, int]:
        """Add the frames of one segment from LSN `want` on; return what is wanted and left."""
        is_current = known is self._segments[-1]
        file = self._file if is_current else self._place.disk.open(self._path(known.name))
        try:
            if not known.end:
                segment.walk(self._place, known, file)
            end = self._durable_end if is_current else known.end
            offset = known.offset_of(want)
            while offset < end and budget > 0:  # Bound: `offset` grows by a frame
                size = min(end - offset, max(budget, 0) + segment.INDEX_BYTES)
                data = memoryview(file.read(size, offset))
                head = frame.peek(data, 0)
                if head and size < head.size <= end - offset:
                    data = memoryview(file.read(head.size, offset))
                used, want, budget = self._take(data, want, budget, found)
                if not used:
                    break  # it does not check: `read` finds that it ends too soon
                offset += used
        finally:
            if not is_current:
                file.close()
        return want, budget

    def _take(
        self, data: memoryview, want: int, budget: int, found: list[Frame]
    ) -> tuple[int, int, int]:
        """Add the whole frames in `data`; return (bytes used, next LSN wanted, budget left)."""
        used = 0
        while budget > 0 and (head := frame.decode(data, used, self._place.seed)):
            if head.records and head.last_lsn >= want:
                payload = frame.payload_of(data, used, head)
                found.append(Frame(head.first_lsn, head.records, payload))
                want = head.last_lsn + 1
                budget -= frame.HEADER_BYTES + head.length
            used += head.size
        return used, want, budget
