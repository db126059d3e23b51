"""The runner's port: the effects it is ordered to bring about, and the sightings it reports.

Effects are idempotent and derived from State on every turn (`plan.py`), never stored. Sightings
are what a runner saw happen; `outcome.py` turns them into records. Real runners:
`ckptd/runner/fork.py`; in tests `tests/fakes/sim_runner.py`. Both pass one conformance suite.
Invariant: an instance is named by (task, attempt) and identified by (boot id, pid, start ticks).
"""

from typing import Protocol

import msgspec


class Identity(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A process that cannot be mistaken for another one. `ticks`: field 22 of /proc/PID/stat."""

    boot_id: str
    pid: int
    ticks: int


class Start(msgspec.Struct, frozen=True, gc=False):
    """Effect: run one attempt. Fenced: a second Start of the same (task, attempt) runs nothing."""

    task: int
    attempt: int
    argv: tuple[str, ...]  # with {resume:...} placeholders still in it
    env: dict[str, str]
    cwd: str
    uid: int
    gid: int
    stdin: str
    umask: int
    memory_bytes: int
    epoch: int
    deadline_ns: int
    fresh: bool  # archive the checkpoints of earlier attempts first
    name: str = ""  # of the task, for people
    cpus: float = 0.0  # processors' worth of time; 0: no limit, here and below
    tasks_max: int = 0  # processes and threads
    io_weight: int = 0  # 1 to 10,000; 0: the default of 100
    nice: int = 0
    stop_signal: int = 15
    stop_s: float = 0.0  # from the stop signal to SIGKILL, where the machine itself stops the task
    checkpoint: int = 0  # what must be found again; 0: nothing was saved, or it was given up
    has_journal: bool = False  # so must this


class Deliver(msgspec.Struct, frozen=True, gc=False):
    """Effect: send a signal to the main process, or to every process of the attempt (tree)."""

    task: int
    attempt: int
    signal: int
    tree: bool


class Starve(msgspec.Struct, frozen=True, gc=False):
    """Effect: leave a unit no more memory than its end takes: the kernel's OOM killer ends it."""

    task: int
    attempt: int


class Freeze(msgspec.Struct, frozen=True, gc=False):
    """Effect: stop (frozen) or continue every process of the attempt where it is."""

    task: int
    attempt: int
    frozen: bool


class Control(msgspec.Struct, frozen=True, gc=False):
    """Effect: replace the task's control file; what is empty is not asked for."""

    task: int
    attempt: int
    stop: str  # reason: cancel, timeout, deadline, shutdown; "": do not stop
    deadline_ns: int  # when force follows; 0: none
    checkpoint: int  # number of the latest "save now" request; 0: none


class Forget(msgspec.Struct, frozen=True, gc=False):
    """Effect: an end is durable in the log; drop the attempt's record and watch."""

    task: int
    attempt: int


class Delete(msgspec.Struct, frozen=True, gc=False):
    """Effect: the task is removed from State; delete its directory and output."""

    task: int


class DropCheckpoints(msgspec.Struct, frozen=True, gc=False):
    """Effect: the task's checkpoints are given up; delete them, its journal and output stay.

    `attempt` is its last one: what a later attempt was given is left alone.
    """

    task: int
    attempt: int


Effect = Start | Deliver | Starve | Freeze | Control | Forget | Delete | DropCheckpoints


UNLIMITED = "not limited here: "
"""How a warning begins that names limits which nothing holds, as `cpus, io-weight`."""


DISK = "disk"
"""What an exit code is blamed on where the disk of the task's output took not one byte more."""


class StartSeen(msgspec.Struct, frozen=True, gc=False):
    """The attempt's main process runs (or ran) under this supervisor."""

    task: int
    attempt: int
    shim: Identity
    pid: int
    at_ns: int
    resumed_from: int = 0  # sequence of the checkpoint handed to it; 0: none
    warning: str = ""  # "checkpoint 7 is corrupt (x.bin: digest differs), resumed from 6"
    invocation: str = ""  # of its unit, 32 hexadecimal digits; "": it has no unit


class EndSeen(msgspec.Struct, frozen=True, gc=False):
    """The attempt is over and none of its processes is left: the exit record's content.

    `cause`: exit, signal, oom, spawn_error (errno in `code`), lost (supervisor killed, tree
    killed after it), reboot (boot id changed), not_started (fence taken before any process),
    shutdown (the machine or the slice was stopped), stopped (somebody stopped its unit by hand).
    """

    task: int
    attempt: int
    cause: str
    code: int = 0  # exit code for exit, errno for spawn_error
    signal: int = 0  # for signal and oom
    core: bool = False
    started_ns: int = 0
    ended_ns: int = 0
    cpu_s: float = 0.0
    rss_bytes: int = 0
    text: str = ""  # evidence for people
    # Of an oom: "limit" (its own was hit), "host" (memory ran out around it); of an exit: DISK.
    blame: str = ""


class MarkSeen(msgspec.Struct, frozen=True, gc=False):
    """How far the task has provably come: read from its checkpoints and journal."""

    task: int
    attempt: int
    checkpoint: int  # newest valid sequence; 0: none
    checkpoint_ns: int
    cursor: str  # changes exactly when durable progress was made; "": none
    retry_after_s: float = 0.0  # the task asked to wait (rate limit); 0: it did not
    problem: str = ""  # "state version 3 cannot be migrated": blocks the task
    why: str = ""  # for short: checkpoint, version, corrupt; the reason of `blocked`
    gained_ns: int = 0  # when a step, an item or a value was last recorded; 0: never
    has_journal: bool = False  # durably; only a start from nothing takes it away


class TelemetrySeen(msgspec.Struct, frozen=True, gc=False):
    """A notify line; kept in memory only, lossy by nature."""

    task: int
    attempt: int
    done: float
    total: float
    text: str
    at_ns: int
    extend_s: float = 0.0  # EXTEND_TIMEOUT_USEC


Sighting = StartSeen | EndSeen | MarkSeen | TelemetrySeen


class Runner(Protocol):
    """What the daemon needs of a runner. No method blocks longer than a few system calls."""

    name: str
    cgroup: str

    @property
    def is_adopting(self) -> bool:
        """Tell whether the fate of an adopted attempt is still to be told."""
        ...

    def fileno(self) -> int:
        """Return one pollable descriptor (an epoll) that is readable when `poll` has news."""
        ...

    def adopt(self, task: int, attempt: int) -> None:
        """Find out what became of an attempt of an earlier daemon; sightings follow."""
        ...

    def carry_out(self, effect: Effect) -> None:
        """Bring one effect about. Idempotent. Never raises for what the task did wrong."""
        ...

    def poll(self) -> list[Sighting]:
        """Return what was seen since the last call, at most 1,000 at a time."""
        ...

    def close(self) -> None:
        """Let go of everything; attempts live on."""
        ...
