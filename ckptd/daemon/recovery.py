"""From snapshot and log to State: the only way State comes to be.

A log that was salvaged has holes. Behind a hole a record may speak of what nobody knows; then it
is passed over, and the tasks that the hole could concern are held for a person to look at.
Read next: `engine.py`, `ckptd/core/apply.py`.
"""

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from ckptd.core import image
from ckptd.core.apply import apply
from ckptd.core.records import PENDING, AnyRecord, Moved, Phase
from ckptd.core.state import State
from ckptd.daemon.engine import decode
from ckptd.protocol.codec import UNREADABLE
from ckptd.protocol.errors import Corrupt
from ckptd.storage.frame import Frame

_SENSELESS: Final = (AssertionError, LookupError, TypeError, ValueError)
"""What bytes lead to that check, and speak of what nobody knows or was never so."""


class Replayed(msgspec.Struct):
    """A State, indexed, and what a salvage has left in doubt."""

    state: State
    tail_bytes: int = 0  # of records that are in the log alone, not in the snapshot
    lost: int = 0  # records
    passed_over: int = 0
    doubtful: set[int] = msgspec.field(default_factory=set)

    def holds(self, at_ns: int) -> list[AnyRecord]:
        """Return the records that hold what is in doubt; they settle it for later replays."""
        return [
            Moved(number, at_ns, Phase.HELD, "unknown since a salvage of the log")
            for number in sorted(self.doubtful)
        ]


def replay(chunks: Iterable[bytes], frames: Iterable[Frame]) -> Replayed:
    """Return the State of a snapshot and the frames after it.

    Raises Corrupt for what checks, and is not whole, or not to be understood by this version.
    """
    state = _of_snapshot(list(chunks))
    frames = iter(frames)
    tail_bytes = 0
    for frame in frames:
        if not frame.payload:
            return _behind_a_hole(Replayed(state, tail_bytes), frame, frames)
        first_lsn = frame.first_lsn
        tail_bytes += len(frame.payload) if first_lsn + frame.count - 1 > state.lsn else 0
        for offset, record in enumerate(decode(frame.payload)):
            if first_lsn + offset > state.lsn:
                _apply(state, first_lsn + offset, record)
    state.index()
    return Replayed(state, tail_bytes)


def _of_snapshot(chunks: list[bytes]) -> State:
    try:
        return image.load(chunks) if chunks else State(indexed=False)
    except (*UNREADABLE, *_SENSELESS) as bad:
        raise Corrupt(
            f"the newest snapshot checks but cannot be read: {bad!r}",
            "nothing was changed; if a newer ckptd wrote it: upgrade, or see FORMAT.md",
        ) from bad


def _apply(state: State, lsn: int, record: AnyRecord) -> None:
    try:
        apply(state, lsn, record)
    except _SENSELESS as bad:
        raise Corrupt(
            f"the record at LSN {lsn} checks but makes no sense: {type(record).__name__}, {bad!r}",
            "nothing was changed; `ckptctl wal dump` shows it, `wal repair --truncate-after"
            f" {lsn - 1}` drops it and what follows",
        ) from bad


def _behind_a_hole(found: Replayed, hole: Frame, frames: Iterator[Frame]) -> Replayed:
    """Go on behind the first hole, more carefully than an undamaged log needs."""
    state = found.state
    known: set[int] = set()
    _skip(found, hole)
    bound = state.next_id
    for frame in frames:
        if not frame.payload:
            _skip(found, frame)
            bound = state.next_id
            known.clear()
            continue
        found.tail_bytes += len(frame.payload)
        for offset, record in enumerate(decode(frame.payload)):
            if frame.first_lsn + offset > state.lsn:
                known.add(_try(found, frame.first_lsn + offset, record))
    # Each lost record may have given an id, the last ones too: none of them is given again.
    state.next_id += found.lost
    state.index()
    found.doubtful = {
        task.id
        for task in state.tasks.ascending(0)
        if task.id < bound and task.id not in known and task.phase in PENDING
    }
    return found


def _skip(found: Replayed, hole: Frame) -> None:
    state = found.state
    gone = max(0, hole.first_lsn + hole.count - 1 - state.lsn)
    found.lost += gone
    state.lsn += gone


def _try(found: Replayed, lsn: int, record: AnyRecord) -> int:
    """Apply a record behind a hole; return the task that it speaks of, 0 for none."""
    try:
        apply(found.state, lsn, record)
    except (AssertionError, KeyError):  # it builds on what was lost
        found.state.lsn = lsn
        found.passed_over += 1
    task: int = getattr(record, "task", 0)
    return task
