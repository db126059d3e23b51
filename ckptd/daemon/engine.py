"""State and log as one: what is staged is applied at once and told only after `commit`.

Read path and write path meet here and nowhere else. Invariant: State is always what a replay of
the log would give; nothing leaves the process for a record that is not durable (`loop.py`).
Read next: `loop.py`, `ckptd/core/plan.py`.
"""

from collections.abc import Iterable, Iterator

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
from ckptd.core.records import AnyRecord
from ckptd.core.state import State
from ckptd.protocol.codec import UNREADABLE
from ckptd.protocol.errors import Corrupt
from ckptd.storage.frame import COUNT_MAX
from ckptd.storage.wal import Wal

FRAME_BYTES_GOAL = 1 << 20
PASSES_MAX = 10_000  # of planning in one turn; each pass that continues has made progress
RESERVE_BYTES = 1 << 20  # kept for ends and stops when the disk is full
RESERVE_PER_ACTIVE_BYTES = 2 << 10

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


def replay(chunks: Iterable[bytes], frames: Iterable[tuple[int, bytes | memoryview]]) -> State:
    """Return the State of a snapshot and the frames after it. The only way State comes to be."""
    state = image.load(chunks) if (chunks := list(chunks)) else State(indexed=False)
    for first_lsn, payload in frames:
        for offset, record in enumerate(decode(payload)):
            if first_lsn + offset > state.lsn:
                apply(state, first_lsn + offset, record)
    state.index()
    return state


class Engine:
    """State, the log that it comes from, and what this daemon has ordered."""

    def __init__(self, state: State, wal: Wal, policy: Policy) -> None:
        self.state, self.wal, self.policy = state, wal, policy
        self.observed = Observed()
        self.marks: dict[int, MarkSeen] = {}
        self._staged: list[AnyRecord] = []
        self.turn_records: list[tuple[int, AnyRecord]] = []
        self.turn_touched: set[int] = set()
        self.draining = False
        self.appended_bytes = 0

    # --- changing -----------------------------------------------------------------------------

    def stage(self, records: Iterable[AnyRecord]) -> None:
        """Apply records and queue them for the next commit."""
        for record in records:
            apply(self.state, self.state.lsn + 1, record)
            self._staged.append(record)
            self.turn_records.append((self.state.lsn, record))

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

    def plan(self, now: Now) -> None:
        """Stage what is to be done now, until there is nothing more to do."""
        touched = self._take_touched()
        for _ in range(PASSES_MAX):
            records = intents(
                self.state,
                self.observed,
                touched,
                now,
                self.policy,
                starts=not self.draining and self.has_room(),
            )
            if not records:
                return
            self.stage(records)
            touched = self._take_touched()
        raise AssertionError("planning does not come to rest")

    def _take_touched(self) -> set[int]:
        touched = self.state.touched | self.state.removed
        self.state.touched, self.state.removed = set(), set()
        self.turn_touched |= touched
        return touched

    def commit(self) -> bool:
        """Make everything staged durable. Returns whether there was anything.

        Durable: every record staged so far. Raises WalFailed: then the process must end.
        """
        if not self._staged:
            return False
        for first in range(0, len(self._staged), COUNT_MAX):
            self._append(self._staged[first : first + COUNT_MAX])
        self._staged = []
        self.wal.sync()
        return True

    def _append(self, records: list[AnyRecord]) -> None:
        payload = _encoder.encode(records)
        if len(payload) > FRAME_BYTES_GOAL and len(records) > 1:
            half = len(records) // 2  # Bound: halves every time, down to one record
            self._append(records[:half])
            self._append(records[half:])
            return
        self.wal.append(payload, len(records))
        self.appended_bytes += len(payload)

    def orders(self) -> list[Effect | Adopt]:
        """Return the effects of this turn, and end the turn. Call after `commit`."""
        news = [record for _, record in self.turn_records]
        found = effects(self.state, self.observed, self.turn_touched, news)
        self.turn_records, self.turn_touched = [], set()
        return found

    # --- room ---------------------------------------------------------------------------------

    def has_room(self, more_bytes: int = 0) -> bool:
        """Tell whether new work may be taken; ends and stops have a reserve of their own."""
        reserve = RESERVE_BYTES + RESERVE_PER_ACTIVE_BYTES * len(self.state.active)
        room: int = self.wal.room_bytes
        return room - 2 * more_bytes > reserve

    # --- snapshots ----------------------------------------------------------------------------

    def image(self) -> Iterator[bytes]:
        """Return the chunks of a snapshot of State as it is now."""
        assert not self._staged, "a snapshot may only hold what is durable"
        return image.chunks(self.state)
