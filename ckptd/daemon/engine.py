"""State and log as one: what is staged is applied at once and told only after `commit`.

Read path and write path meet here and nowhere else. Invariant: State is always what a replay of
the log would give; nothing leaves the process for a record that is not durable (`loop.py`).
Read next: `loop.py`, `ckptd/core/plan.py`.
"""

import contextlib
from collections.abc import Iterable, Iterator
from itertools import chain

import msgspec

from ckptd.core import image, outcome
from ckptd.core.apply import apply
from ckptd.core.plan import Adopt, Observed, effects, intents
from ckptd.core.policy import Now, Policy
from ckptd.core.port import (
    Effect,
    EndSeen,
    MarkSeen,
    Sighting,
    StartSeen,
    TelemetrySeen,
)
from ckptd.core.records import AnyRecord, StartIntent
from ckptd.core.state import State
from ckptd.core.stepped import stepped
from ckptd.protocol.codec import UNREADABLE
from ckptd.protocol.errors import BadRequest, Busy, Corrupt, DiskFull, Internal
from ckptd.storage.frame import COUNT_MAX
from ckptd.storage.wal import Wal

FRAME_BYTES_GOAL = 1 << 20
PASSES_MAX = 10_000  # of planning in one turn; each pass that continues has made progress
RESERVE_BYTES_MAX = 2 << 20  # kept for ends and stops when the disk is full
RESERVE_PER_ACTIVE_BYTES = 2 << 10
# Three rungs, a mark, and an end with a text of 240 characters: with less no more are started.
RESERVE_PER_ACTIVE_BYTES_MIN = 600

RECORD_MARGIN_BYTES = 64 << 10  # below a frame: what a task has beside its spec, in a snapshot
TURN_BYTES_GOAL = 1 << 20

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[list[AnyRecord]] = msgspec.msgpack.Decoder(list[AnyRecord])


def decode(payload: bytes | memoryview) -> list[AnyRecord]:
    """Return the records of one frame. Raises Corrupt for what this version cannot read."""
    try:
        return _decoder.decode(payload)
    except UNREADABLE as bad:
        raise Corrupt(
            f"a log frame checks but cannot be read: {bad}",
            "it was written by a newer ckptd: upgrade, or see FORMAT.md",
        ) from bad


def _array_head(count: int) -> bytes:
    """Return the head of a msgpack array. Source: the msgpack specification, array format."""
    if count < 16:
        return bytes([0x90 | count])
    return b"\xdc" + count.to_bytes(2, "big")  # Invariant: a frame has at most COUNT_MAX


def _groups(staged: list[bytes]) -> Iterator[list[bytes]]:
    """Cut what is staged into frames of about FRAME_BYTES_GOAL; one record is never cut."""
    group: list[bytes] = []
    size = 0
    for data in staged:
        if group and (size + len(data) > FRAME_BYTES_GOAL or len(group) == COUNT_MAX):
            yield group
            group, size = [], 0
        group.append(data)
        size += len(data)
    yield group


class Engine:
    """State, the log that it comes from, and what this daemon has ordered."""

    def __init__(self, state: State, wal: Wal, policy: Policy) -> None:
        self.state, self.wal, self.policy = state, wal, policy
        self.observed = Observed()
        self.marks: dict[int, MarkSeen] = {}
        self._staged: list[bytes] = []
        self._staged_bytes = 0
        self.turn_records: list[tuple[int, AnyRecord]] = []
        self.turn_touched: set[int] = set()
        self.draining = False
        self.has_more = False
        self.appended_bytes = 0

    # --- changing -----------------------------------------------------------------------------

    def stage(self, records: Iterable[AnyRecord]) -> None:
        """Apply records and queue them for the next commit."""
        self._take((record, _encoder.encode(record)) for record in records)

    def admit(self, records: list[AnyRecord], *, is_small: bool) -> None:
        """Stage what a client asked for, all or nothing.

        Raises DiskFull or Busy where the log has no room for it, BadRequest where it never would
        have: then nothing was changed. `is_small` marks what must stay possible on a full disk
        and may use a part of the reserve.
        """
        encoded = [(record, _encoder.encode(record)) for record in records]
        size = sum(len(data) for _, data in encoded)
        kept = self._reserve_bytes() // 4 if is_small else self._reserve_bytes()
        self._check_size(max((len(data) for _, data in encoded), default=0), size)
        if not self._fits(size, kept):
            if self.wal.has_spare and not self.wal.is_tight:
                raise Busy(
                    f"the log takes no {size} bytes more at this moment: nothing was accepted",
                    "try again in a moment, or ask for less at once",
                )
            raise DiskFull(
                f"no room in the log for {size} bytes more: nothing was accepted, tasks go on",
                "free space on the file system of the state directory, then run this again",
            )
        self._take(encoded)

    def _check_size(self, largest: int, size: int) -> None:
        """Refuse what no log would take. Raises BadRequest."""
        most = self.wal.payload_bytes_max
        most -= min(RECORD_MARGIN_BYTES, most // 8)  # small segments keep less
        if largest > most:
            raise BadRequest(
                f"one record of {largest} bytes is over {most}, the most that the log takes:"
                " nothing was changed",
                "pass big input by a file",
            )
        most = self.wal.spare_bytes - self._base_bytes
        if size > most:
            raise BadRequest(
                f"{size} bytes at once are over {most}, the most that the log takes at once:"
                " nothing was changed",
                "narrow the selection, or ask in several steps",
            )

    def _take(self, encoded: Iterable[tuple[AnyRecord, bytes]]) -> None:
        for record, data in encoded:
            apply(self.state, self.state.lsn + 1, record)
            self._staged.append(data)
            self._staged_bytes += len(data)
            self.turn_records.append((self.state.lsn, record))

    @property
    def is_turn_full(self) -> bool:
        """Tell whether this turn has enough to commit, so that others get their answers."""
        return self._staged_bytes > TURN_BYTES_GOAL

    def see(self, seen: Sighting, now: Now) -> None:
        """Take one sighting of the runner in."""
        match seen:
            case StartSeen():
                self.stage(outcome.started(self.state, seen))
            case MarkSeen():
                self.marks[seen.task] = seen
                self.stage(outcome.marked(self.state, seen, now))
            case EndSeen():
                mark = self.marks.pop(seen.task, None)
                if mark is not None and mark.attempt != seen.attempt:
                    mark = None
                self.stage(outcome.ended(self.state, seen, mark, now, self.policy))
            case TelemetrySeen():
                self._hear(seen)

    def _hear(self, seen: TelemetrySeen) -> None:
        instance = self.observed.of(seen.task, seen.attempt)
        if instance is None:
            return
        if seen.total or seen.done:
            if not instance.said_ns:
                instance.first, instance.first_ns = seen.done, seen.at_ns
            instance.done, instance.total = seen.done, seen.total
            instance.said_ns = seen.at_ns
        instance.text = seen.text or instance.text
        if seen.extend_s:
            instance.extended_ns = seen.at_ns + int(seen.extend_s * 1e9)

    def step_clock(self, step_ns: int, now: Now) -> None:
        """Take in that the wall clock was set by `step_ns`; without room, delays stay late."""
        with contextlib.suppress(DiskFull, Busy, BadRequest):
            self.admit(stepped(self.state, self.observed, step_ns, now), is_small=False)

    def plan(self, now: Now) -> None:
        """Stage what is to be done now, until there is nothing more to do."""
        touched = self._take_touched()
        most = min(self.policy.active_max, self._ends_bytes // RESERVE_PER_ACTIVE_BYTES_MIN)
        room = most - len(self.state.active)
        starts_left = max(0, min(self.policy.starts_per_turn_max, room))
        self.has_more = False
        for _ in range(PASSES_MAX):
            records = intents(
                self.state,
                self.observed,
                touched,
                now,
                self.policy,
                starts=0 if self.draining or not self.has_room() else starts_left,
            )
            if not records:
                return
            self.stage(records)
            starts_left -= sum(isinstance(record, StartIntent) for record in records)
            if self.is_turn_full or (room > 0 >= starts_left and not self.draining):
                self.has_more = True  # the next turn goes on at once
                return
            touched = self._take_touched()
        raise AssertionError("planning does not come to rest")

    def _take_touched(self) -> set[int]:
        touched = self.state.touched | self.state.removed
        self.state.touched, self.state.removed = set(), set()
        self.turn_touched |= touched
        return touched

    def commit(self) -> bool:
        """Make everything staged durable. Returns whether there was anything.

        Durable: every record staged so far. Raises Internal (WalFailed is one): the process must
        end.
        """
        if not self._staged:
            return False
        staged, self._staged, self._staged_bytes = self._staged, [], 0
        try:
            for group in _groups(staged):
                payload = _array_head(len(group)) + b"".join(group)
                self.wal.append(payload, len(group))
                self.appended_bytes += len(payload)
        except DiskFull as full:  # State is ahead of the log for good: only a replay mends that
            raise Internal(f"the log's reserve is used up: {full.message}", full.hint) from full
        self.wal.sync()
        return True

    def orders(self) -> list[Effect | Adopt]:
        """Return the effects of this turn, and end the turn. Call after `commit`."""
        news = [record for _, record in self.turn_records]
        found = effects(self.state, self.observed, self.turn_touched, news)
        self.turn_records, self.turn_touched = [], set()
        return found

    # --- room ---------------------------------------------------------------------------------

    def has_room(self) -> bool:
        """Tell whether new work may be taken; ends and stops have a reserve of their own."""
        return self._fits(1, self._reserve_bytes())

    def _fits(self, size: int, kept: int) -> bool:
        """Tell whether `size` bytes leave `kept` bytes over.

        Before the spare is counted on, the disk is looked at afresh: new work must not take the
        spare where no other could be made, because the next start needs one.
        """
        need = self._staged_bytes + size + kept
        if need > self.wal.segment_room_bytes:
            self.wal.look_at_disk()
            self.wal.await_spare()  # a burst may be faster than the filling: that is no full disk
        return self.wal.room_bytes >= need

    @property
    def _base_bytes(self) -> int:
        return min(RESERVE_BYTES_MAX, self.wal.payload_bytes_max // 2)  # small segments keep less

    @property
    def _ends_bytes(self) -> int:
        """Return what is kept for the ends of active attempts at most: new work has its part."""
        return self.wal.spare_bytes * 3 // 8

    def _reserve_bytes(self) -> int:
        ends = RESERVE_PER_ACTIVE_BYTES * len(self.state.active)
        return self._base_bytes + min(ends, self._ends_bytes)

    # --- snapshots ----------------------------------------------------------------------------

    def image(self) -> Iterator[bytes]:
        """Return the chunks of a snapshot of State as it is now, whenever they are read."""
        assert not self._staged, "a snapshot may only hold what is durable"
        chunks = image.chunks(self.state)
        return chain((next(chunks),), chunks)
