"""One item in play, what became of it, and the port that both kinds of workers fill.

Commands are processes, one for each item; functions run in host processes, one or many at once.
The runner knows neither: it starts jobs, waits for descriptors, takes ends.
Read next: `command.py`, `functions.py` (the two), `runner.py` (who uses them).
"""

from collections.abc import Sequence
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


@dataclass(slots=True)
class Setting:
    """What all workers of a run share."""

    path: str  # of the batch
    name: str
    batch_id: int
    cwd: str
    env: dict[str, str] = field(default_factory=dict)


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
