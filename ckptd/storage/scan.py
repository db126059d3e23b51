"""One pass over the frames of a journal: where it ends, and whether that end is torn or damaged.

    frame frame frame | 0 0 0 0        room that its writer made; the end, like the end of the file
    frame frame frame | half a frame   torn: an append that nobody was told of; not done
    frame ??????????? | frame          damaged, where the later frame promises what is missing

It reads only and knows no fact. Who cuts, fills and syncs is the writer in `journal.py`.
Invariant: torn is what no later frame promises; all else refuses (FORMAT.md, "Task journals").
Stdlib only. Read next: `frame.py`, `journal.py`.
"""

import os
from collections.abc import Iterator
from typing import Final, NamedTuple

from ckptd.storage import frame
from ckptd.storage.untrusted import Damaged

_CHUNK_BYTES: Final = 1 << 20
_PEEK_BYTES: Final = 8  # CRC and length: never all zero in a frame, and never cut by a page
TORN_BYTES_MAX: Final = 2 * frame.PAYLOAD_BYTES_MAX  # what an interrupted append can leave, doubled
_PROMISE_BYTES_MAX: Final = 4 * TORN_BYTES_MAX  # checked behind the end; frames do not overlap


class JournalDamaged(Damaged):
    """A fact that was promised durable does not check, or a bound is passed."""


class Bounds(NamedTuple):
    """How large a journal may grow: one attempt's file, and all files together."""

    file_bytes: int
    all_bytes: int


class Place(NamedTuple):
    """Where a pass begins: behind a frame that is known to check, or at the beginning."""

    end_bytes: int = 0
    next_lsn: int = 1
    crc: int = 0


BEGIN: Final = Place()


class Behind(NamedTuple):
    """What lies behind the last frame, as far as its first bytes tell.

    Enough only while the machine is up: a process that is killed leaves the beginning of a frame,
    a power cut any part of it. So a file is looked at by `Scan` first.
    """

    is_written: bool
    is_end: bool  # of the file


def behind(fd: int, end_bytes: int) -> Behind:
    """Return what lies behind the last frame; one system call."""
    found = os.pread(fd, _PEEK_BYTES, end_bytes)
    return Behind(bool(found.strip(b"\0")), len(found) < _PEEK_BYTES)


class Scan:
    """One pass over the frames of a file, from a known place in the chain to the last good one."""

    def __init__(self, fd: int, seed: int, bytes_max: int, start: Place = BEGIN) -> None:
        self.end_bytes, self.next_lsn, self.crc = start  # behind the last frame that checks
        self.promised_lsn = 0  # of the last frame: the facts that its writer knew to be synced
        self.is_torn = False  # there is something else than zeros behind it
        self._fd = fd
        self._seed = seed
        self._bytes_max = bytes_max
        self._data = b""
        self._data_at = self.end_bytes

    def payloads(self) -> Iterator[bytes]:
        """Yield the payload of every frame in the chain; what follows must be torn, or nothing.

        Raises:
            JournalDamaged: a later frame promises what does not check, or the file is too large.
        """
        while True:  # Bound: every turn passes a frame; `bytes_max`
            head = self._head()
            if head is None:
                break
            offset = self.end_bytes - self._data_at
            payload = frame.payload_of(memoryview(self._data), offset, head)
            self.end_bytes += head.size
            self.next_lsn += head.records
            self.crc = head.crc
            self.promised_lsn = head.durable_lsn
            if self.end_bytes > self._bytes_max:
                raise JournalDamaged(f"the journal is larger than {self._bytes_max} bytes")
            yield payload
        self._check_tail()

    def _head(self) -> frame.Head | None:
        for needed in (frame.HEADER_BYTES, TORN_BYTES_MAX):
            if len(self._data) - (self.end_bytes - self._data_at) < needed:
                self._fill(needed)
            at = self.end_bytes - self._data_at
            if not self._data[at : at + _PEEK_BYTES].strip(b"\0"):
                return None
            head = frame.decode(memoryview(self._data), at, self._seed)
            if head is not None:
                break
        else:
            return None
        is_ours = head.kind == frame.NOTE and head.records > 0
        return head if is_ours and frame.is_next(head, self.next_lsn, self.crc) else None

    def _fill(self, needed: int) -> None:
        kept = self._data[self.end_bytes - self._data_at :]
        more = os.pread(self._fd, max(needed, _CHUNK_BYTES), self.end_bytes + len(kept))
        self._data, self._data_at = kept + more, self.end_bytes

    def _check_tail(self) -> None:
        """Tell torn from damaged: had a later frame promised what is missing here?"""
        rest = memoryview(os.pread(self._fd, TORN_BYTES_MAX, self.end_bytes))
        written = frame.written_end(rest, 0)
        self.is_torn = written > 0
        head = frame.decode(rest, 0, self._seed)
        if head is not None and frame.is_next(head, self.next_lsn, self.crc):
            return  # appended while we read: a later look will see it
        left_bytes = _PROMISE_BYTES_MAX
        for at in range(0, written, 8):  # Bound: TORN_BYTES_MAX
            size = self._promising_bytes(rest, at)
            left_bytes -= size
            if left_bytes < 0:
                raise JournalDamaged(f"what follows byte {self.end_bytes} is no torn append")
            if size and frame.decode(rest, at, self._seed) is not None:
                raise JournalDamaged(
                    f"fact {self.next_lsn} at byte {self.end_bytes} does not check, though byte "
                    f"{self.end_bytes + at} says that it was durable"
                )

    def _promising_bytes(self, rest: memoryview, at: int) -> int:
        """Return the size of what may be a frame that promises what is missing here, else 0."""
        if at + frame.HEADER_BYTES > len(rest) or rest[at + 30] != frame.NOTE or rest[at + 31]:
            return 0
        head = frame.peek(rest, at)
        if head is None or head.durable_lsn < self.next_lsn or head.reserved:
            return 0
        return head.size if head.length <= frame.PAYLOAD_BYTES_MAX else 0
