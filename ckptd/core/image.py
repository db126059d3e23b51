"""State <-> the chunks of a snapshot.

A snapshot is State at exactly one LSN: `chunks` freezes the task table and encodes one bucket at
a time, so that the loop can go on between chunks. Ageing: as with records, fields are appended;
an unknown chunk tag refuses the load. Read next: `ckptd/storage/snapshot.py`, FORMAT.md.
"""

from collections.abc import Iterable, Iterator

import msgspec

from ckptd.core.state import Group, State, Task

ANSWERS_PER_CHUNK = 1_024


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
    envs: dict[bytes, bytes]


class Answers(_Chunk, frozen=True, tag=2):
    """Remembered answers, oldest first."""

    answers: list[tuple[str, bytes]]


class Tasks(_Chunk, frozen=True, tag=3):
    """One bucket of tasks."""

    tasks: list[Task]


class Tail(_Chunk, frozen=True, tag=4):
    """The end: without it the snapshot is not whole."""

    lsn: int
    tasks: int


_encoder = msgspec.msgpack.Encoder()
AnyChunk = Head | Answers | Tasks | Tail
_decoder: msgspec.msgpack.Decoder[AnyChunk] = msgspec.msgpack.Decoder(AnyChunk)


def chunks(state: State) -> Iterator[bytes]:
    """Yield the chunks of State as it is at the first `next`; changes made later are not in it."""
    buckets = state.tasks.freeze()
    answers = list(state.answers.items())
    lsn, count = state.lsn, len(state.tasks)
    head = Head(
        lsn=lsn,
        next_id=state.next_id,
        epoch=state.epoch,
        boot_id=state.boot_id,
        clean=state.clean,
        stopped=state.stopped,
        groups=list(state.groups.values()),
        envs=dict(state.envs),
    )
    try:
        yield _encoder.encode(head)
        for first in range(0, len(answers), ANSWERS_PER_CHUNK):
            yield _encoder.encode(Answers(answers[first : first + ANSWERS_PER_CHUNK]))
        for bucket in buckets:
            yield _encoder.encode(Tasks(list(bucket.values())))
    finally:
        state.tasks.thaw()
    yield _encoder.encode(Tail(lsn, count))


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
            case Answers():
                state.answers.update(part.answers)
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
    state.envs = dict(head.envs)
