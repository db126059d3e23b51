"""One item in play, the line it waits in, and the port that both kinds of workers fill.

Commands are processes, one for each item; functions run in host processes, one or many at once.
The runner knows neither: it starts jobs, waits for descriptors, takes ends.
Read next: `command.py`, `functions.py` (the two), `runner.py` (who uses them).
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple, Protocol

from ckptd.batch.place import Item


class How(Enum):
    """How a run of an item came out."""

    RESULT = auto()  # a status, for the ledger
    TRANSIENT = auto()  # not now: everybody backs off, it runs again
    LATER = auto()  # it waits for something of its own; the others go on
    AGAIN = auto()  # checkpointed, wants to be started at once
    DIED = auto()  # it killed its worker: nobody else can have done it
    SUSPECT = auto()  # its worker died while others were in it: one of them did it
    INNOCENT = auto()  # stopped for a reason that is none of its own
    TROUBLE = auto()  # the disk takes nothing more: what it says is not known, the run ends


@dataclass(slots=True)
class Job:
    """An item that has no result yet."""

    item: Item
    number: int  # of its private directory
    lane: int = -1  # where it runs, or ran before
    tries: int = 0  # runs begun, this one included
    failures: int = 0  # errors that retries forgave
    run_deaths: int = 0  # runners that were killed while it was in flight among others
    alone_deaths: int = 0  # workers and runners that died while it was alone in them
    is_suspect: bool = False  # shares no worker any more
    is_alone: bool = False  # shares nothing: runs while nothing else does
    has_dir: bool = False  # a private directory was made for it
    transients: int = 0
    agains: int = 0
    cursor: str = ""  # how far it came by its own checkpoints
    began_s: float = 0.0  # monotonic, as are the next two
    not_before_s: float = 0.0
    ends_s: float = 0.0  # when it is timed out; 0: never
    is_timed_out: bool = False
    is_signalled: bool = False  # we asked it to stop: a bad end says nothing of the item


class Ended(NamedTuple):
    """The end of one run of one item."""

    job: Job
    how: How
    status: str = ""
    result: Any = None
    text: str = ""
    is_final: bool = False  # trying again will not help
    retry_after_s: float = 0.0
    scope: str = ""
    out: bytes = b""
    err: bytes = b""
    trouble: OSError | None = None

    @property
    def is_bad(self) -> bool:
        """Return whether a stop that we do not know of yet would explain it."""
        died = self.how in (How.DIED, How.SUSPECT)
        return died or (self.how is How.RESULT and self.status in ("fail", "error"))


@dataclass(slots=True)
class Setting:
    """What all workers of a run share."""

    path: str  # of the batch
    name: str
    batch_id: int
    cwd: str
    env: dict[str, str] = field(default_factory=dict)
    spares: list[int] = field(default_factory=list)  # directories of items to be used anew


class Workers(Protocol):
    """Where items run. Single-threaded; every descriptor is in the runner's epoll."""

    def can_start(self, job: Job) -> bool:
        """Return whether there is a worker for this job at this moment."""
        ...

    def start(self, job: Job) -> Ended | None:
        """Start a job; return its end where it cannot even be started."""
        ...

    def send(self) -> None:
        """Let what was started in this turn go out."""
        ...

    def take(self, fd: int, events: int) -> Sequence[Ended] | None:
        """Return the ends that a descriptor tells of; None where it is not one of ours."""
        ...

    def expire(self, job: Job) -> None:
        """End a job whose time is over; its end comes by `take`."""
        ...

    def stop(self, number: int) -> None:
        """Send a signal to everything that runs."""
        ...

    def close(self) -> None:
        """Leave nothing behind that runs."""
        ...


class Line:
    """The items that wait: who comes next, and who may not share.

    Those that must be alone come last, the one with the fewest deaths first: the batch gets on,
    and kills that strike at random do not strike the same one again and again.
    """

    def __init__(self, jobs: list[Job], lanes: int) -> None:
        self._ready = deque(job for job in jobs if not job.is_alone)
        self._alone: list[tuple[int, int, Job]] = []
        self._delayed: list[tuple[float, int, Job]] = []
        self._serial = itertools.count()
        for job in jobs:
            if job.is_alone:
                self.again(job)
        self._lanes = set(range(lanes))
        self.flying: dict[int, Job] = {}

    def __bool__(self) -> bool:
        return bool(self._ready or self._alone or self._delayed)

    def again(self, job: Job, not_before_s: float = 0.0, *, is_last: bool = False) -> None:
        """Put a job back in front, or last, or away for a while."""
        if not_before_s:
            job.not_before_s = not_before_s
            heapq.heappush(self._delayed, (not_before_s, next(self._serial), job))
        elif job.is_alone:
            heapq.heappush(self._alone, (job.alone_deaths, next(self._serial), job))
        elif is_last:
            self._ready.append(job)
        else:
            self._ready.appendleft(job)

    def next(self, now_s: float, can_start: Callable[[Job], bool]) -> Job | None:
        """Return who may start now, taken out of the line; in the end with `flies` or `again`."""
        while self._delayed and self._delayed[0][0] <= now_s:
            self.again(heapq.heappop(self._delayed)[2])
        if any(job.is_alone for job in self.flying.values()):
            return None
        if self._ready:
            return self._ready.popleft() if can_start(self._ready[0]) else None
        if self._alone and not self.flying and can_start(self._alone[0][2]):
            return heapq.heappop(self._alone)[2]
        return None

    def due_s(self) -> float:
        """Return when the first of those put away comes back; 0 where one could start now."""
        if self._ready or self._alone or not self._delayed:
            return 0.0
        return self._delayed[0][0]

    def flies(self, job: Job) -> None:
        """Give a job a lane: its own of before, where that is free."""
        job.lane = job.lane if job.lane in self._lanes else min(self._lanes)
        self._lanes.discard(job.lane)
        self.flying[job.number] = job

    def landed(self, job: Job) -> None:
        """Take the lane back."""
        self._lanes.add(job.lane)
        del self.flying[job.number]
