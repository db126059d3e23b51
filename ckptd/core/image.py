"""State <-> the chunks of a snapshot.

A snapshot is State at exactly one LSN: `chunks` freezes the task table and encodes a slice at
a time, so that the loop can go on between chunks. Ageing: as with records, fields are appended;
an unknown chunk tag refuses the load. Read next: `ckptd/storage/snapshot.py`, FORMAT.md.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from ckptd.core.state import Group, State, Task

CHUNK_BYTES_GOAL = 256 << 10  # encoded between two turns of the loop in a fraction of 1 ms
SLICE = 256  # tasks or answers that are encoded together at first


class _Chunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    pass


class Head(_Chunk, frozen=True, tag=1):
    """All of State that is not per task."""

    lsn: int
    next_id: int
    epoch: int
    boot_id: str
    clean: bool
    stopped: bool
    groups: list[Group]


class Answers(_Chunk, frozen=True, tag=2):
    """Remembered answers, oldest first."""

    answers: list[tuple[str, bytes]]


class Tasks(_Chunk, frozen=True, tag=3):
    """One bucket of tasks."""

    tasks: list[Task]


class Envs(_Chunk, frozen=True, tag=5):
    """Environments by digest."""

    envs: list[tuple[bytes, bytes]]


class Tail(_Chunk, frozen=True, tag=4):
    """The end: without it the snapshot is not whole."""

    lsn: int
    tasks: int


_encoder = msgspec.msgpack.Encoder()
AnyChunk = Head | Answers | Tasks | Envs | Tail
_decoder: msgspec.msgpack.Decoder[AnyChunk] = msgspec.msgpack.Decoder(AnyChunk)


def chunks(state: State) -> Iterator[bytes]:
    """Yield the chunks of State as it is at the first `next`; changes made later are not in it."""
    buckets = state.tasks.freeze()
    answers, envs = list(state.answers.items()), list(state.envs.items())
    lsn, count = state.lsn, len(state.tasks)
    head = Head(
        lsn=lsn,
        next_id=state.next_id,
        epoch=state.epoch,
        boot_id=state.boot_id,
        clean=state.clean,
        stopped=state.stopped,
        groups=list(state.groups.values()),
    )
    try:
        yield _encoder.encode(head)
        yield from _sliced(Envs, envs)
        yield from _sliced(Answers, answers)
        for bucket in buckets:
            yield from _sliced(Tasks, list(bucket.values()))
    finally:
        state.tasks.thaw()
    yield _encoder.encode(Tail(lsn, count))


def _sliced(kind: type[Envs | Answers | Tasks], items: list[Any]) -> Iterator[bytes]:
    """Yield chunks of about the goal's size; a single item may be larger, up to a record's."""
    for first in range(0, len(items), SLICE):
        part = items[first : first + SLICE]
        chunk = _encoder.encode(kind(part))
        if len(chunk) <= CHUNK_BYTES_GOAL or len(part) == 1:
            yield chunk
            continue
        for item in part:
            yield _encoder.encode(kind([item]))


def load(encoded: Iterable[bytes]) -> State:
    """Return the State of a snapshot, not indexed yet: the log behind it comes first.

    Raises ValueError where the chunks are not whole.
    """
    state = State(indexed=False)
    tail: Tail | None = None
    for chunk in encoded:
        part = _decoder.decode(chunk)
        match part:
            case Head():
                _load_head(state, part)
            case Envs():
                state.envs.update(part.envs)
            case Answers():
                for request, answer in part.answers:
                    state.remember(request, answer)
            case Tasks():
                for task in part.tasks:
                    state.load(task)
            case Tail():
                tail = part
    if tail is None or tail.lsn != state.lsn or tail.tasks != len(state.tasks):
        raise ValueError(f"snapshot at {state.lsn} is not whole: its tail says {tail}")
    return state


def _load_head(state: State, head: Head) -> None:
    state.lsn, state.next_id = head.lsn, head.next_id
    state.epoch, state.boot_id = head.epoch, head.boot_id
    state.clean, state.stopped = head.clean, head.stopped
    state.groups = {group.name: group for group in head.groups}
