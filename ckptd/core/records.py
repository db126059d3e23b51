"""Every fact the log can hold: one frozen struct each, tagged by a small integer.

Intents say what we are about to do, events what the world did. Records carry values, never
policy: jitter, due times and verdicts are computed before (`decide.py`, `outcome.py`) and stored.
Ageing: fields are only appended, with defaults; a tag is never reused; a reader refuses a tag that
it does not know. Read next: `state.py`, FORMAT.md.
"""

from enum import IntEnum

import msgspec

from ckptd.core.port import Identity


class Phase(IntEnum):
    """Where one task is. The numbers are on disk for ever."""

    HELD = 0
    QUEUED = 1
    WAITING = 2
    STARTING = 3
    RUNNING = 4
    PAUSED = 5
    STOPPING = 6
    SUCCEEDED = 7
    FAILED = 8
    CANCELLED = 9
    QUARANTINED = 10
    BLOCKED = 11

    @property
    def word(self) -> str:
        """Return the lower-case name that people see."""
        return self.name.lower()


ACTIVE = frozenset({Phase.STARTING, Phase.RUNNING, Phase.PAUSED, Phase.STOPPING})
PENDING = frozenset({Phase.HELD, Phase.QUEUED, Phase.WAITING})
ENDED = frozenset({Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED})
STUCK = frozenset({Phase.QUARANTINED, Phase.BLOCKED})


class Need(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One dependency: `when` is ok, fail or any."""

    task: int
    when: str


class Spec(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The cold part of a task: a map without its defaults, kept packed (Raw) in log and State."""

    argv: tuple[str, ...]
    cwd: str = "/"
    name: str = ""
    gid: int = 0
    labels: dict[str, str] = {}
    env: dict[str, str] = {}  # on top of the stored environment
    timeout_s: float = 0.0
    max_failures: int = 0  # 0: go on for as long as each attempt makes durable progress
    backoff_s: float = 1.0
    backoff_max_s: float = 900.0
    on_exit: dict[str, str] = {}
    stop_signal: int = 15
    grace_s: float = 10.0
    checkpoint_signal: int = 0
    memory_bytes: int = 0
    stdin: str = ""
    umask: int = 0o022
    digest: bytes = b""  # of the request as asked, where it has a key
    cpus: float = 0.0  # 0: no limit, here and below
    tasks_max: int = 0
    io_weight: int = 0
    nice: int = 0
    on_oom: str = ""  # see ckptd/protocol/on_oom.py
    journal: bool = False  # the output goes to journald, too


DRILL = "drill"
DRILL_OOM = "drill_oom"
"""Why an attempt is stopped that is to go on: somebody tries out whether it does."""


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all records."""


# --- the daemon -----------------------------------------------------------------------------


class DaemonStarted(Record, frozen=True, tag=1):
    """A reign begins. `clean` tells whether the one before ended with DaemonStopped."""

    at_ns: int
    epoch: int
    boot_id: str
    version: str
    pid: int
    clean: bool


class DaemonStopped(Record, frozen=True, tag=2):
    """The daemon ends by request; tasks may live on."""

    at_ns: int


class Answered(Record, frozen=True, tag=3):
    """A mutating request was answered with this; a resend gets the same bytes."""

    request: str
    uid: int
    answer: bytes


# --- submitting and editing -----------------------------------------------------------------


class EnvStored(Record, frozen=True, tag=10):
    """An environment, packed, named by its digest."""

    digest: bytes
    data: bytes


class Submitted(Record, frozen=True, tag=11):
    """A task is accepted. `phase` is HELD, QUEUED, WAITING or BLOCKED."""

    task: int
    at_ns: int
    uid: int
    group: str
    priority: int
    env: bytes
    phase: Phase
    reason: str
    until_ns: int
    deadline_ns: int
    key: str
    needs: tuple[Need, ...]
    spec: msgspec.Raw  # a packed Spec, never decoded by a replay
    by: int = -1  # uid of who submitted it for this user; -1: the user


class Edited(Record, frozen=True, tag=12):
    """The task has these values from now on."""

    task: int
    at_ns: int
    group: str
    priority: int
    deadline_ns: int
    spec: msgspec.Raw


class Moved(Record, frozen=True, tag=13):
    """A task that is not active changes its phase: queued, held, waiting, cancelled, blocked."""

    task: int
    at_ns: int
    phase: Phase
    reason: str
    until_ns: int = 0


class Reset(Record, frozen=True, tag=14):
    """A person wants the task again: counters to nothing, queued; `fresh` drops checkpoints."""

    task: int
    at_ns: int
    fresh: bool


class Removed(Record, frozen=True, tag=15):
    """The task is forgotten; its files may be deleted once this is durable."""

    task: int
    at_ns: int


class CheckpointsDropped(Record, frozen=True, tag=16):
    """The task has succeeded and its checkpoints are given up; they may be deleted once durable.

    Its journal, its output and what the log knows stay. A retry starts from nothing.
    """

    task: int
    at_ns: int


# --- running --------------------------------------------------------------------------------


class StartIntent(Record, frozen=True, tag=20):
    """This attempt is about to be started."""

    task: int
    attempt: int
    at_ns: int


class Started(Record, frozen=True, tag=21):
    """The attempt runs under this supervisor."""

    task: int
    attempt: int
    at_ns: int
    shim: Identity
    pid: int
    resumed_from: int
    warning: str
    invocation: str = ""  # of its unit, for the journal; "": it has none


class StopIntent(Record, frozen=True, tag=22):
    """A rung of the ladder: 0 ask for a checkpoint, 1 stop signal, 2 SIGKILL of the whole tree.

    `next_ns` is when the next rung is due, 0 after the last. A drill_oom has another rung 1: the
    memory is taken away.
    """

    task: int
    attempt: int
    at_ns: int
    why: str  # cancel, kill, timeout, deadline, shutdown, drill, drill_oom
    rung: int
    next_ns: int
    grace_s: float
    by: int  # uid, -1 for the daemon itself


class SignalIntent(Record, frozen=True, tag=23):
    """A person's signal is about to be delivered, once."""

    task: int
    attempt: int
    at_ns: int
    signal: int
    tree: bool
    by: int


class FreezeIntent(Record, frozen=True, tag=24):
    """The attempt is to be frozen or thawed."""

    task: int
    attempt: int
    at_ns: int
    frozen: bool


class CheckpointAsked(Record, frozen=True, tag=25):
    """A person asks the running task to save; `number` counts the requests of the attempt."""

    task: int
    attempt: int
    at_ns: int
    number: int


class Marked(Record, frozen=True, tag=26):
    """Durable progress was seen: newest valid checkpoint, cursor, and that there is a journal."""

    task: int
    attempt: int
    at_ns: int
    checkpoint: int
    checkpoint_ns: int
    cursor: str
    has_journal: bool = False


class Verdict(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What an end means: the next phase and all counters as they are from now on."""

    phase: Phase
    reason: str
    until_ns: int
    failures: int
    interruptions: int
    stalls: int  # failures in a row without progress
    crashes: int  # oom or crash signals at the same cursor
    host_deaths: int  # lost with the daemon or host at the same cursor


class Ended(Record, frozen=True, tag=27):
    """The attempt is over; `ended_ns` is when it really happened.

    `cause`: exit, signal, oom, spawn_error, lost, reboot, not_started, shutdown (of the machine or
    the slice), stopped (its unit was stopped by hand); or cancel, kill, timeout, deadline,
    shutdown, drill, drill_oom where our stop ended it. `blame`: of an oom, limit (its own was hit)
    or host; of an exit, disk (that of its output was full).
    """

    task: int
    attempt: int
    at_ns: int
    cause: str
    code: int
    signal: int
    core: bool
    started_ns: int
    ended_ns: int
    cpu_s: float
    rss_bytes: int
    lost_s: float
    cursor: str
    text: str
    verdict: Verdict
    blame: str = ""
    memory_bytes: int = 0  # the task's limit from now on; 0: as it was


# --- groups ---------------------------------------------------------------------------------


class GroupChanged(Record, frozen=True, tag=30):
    """A group has these values from now on; it is created where it did not exist."""

    name: str
    parallel: int
    paused: bool
    by_person: bool = False


class GroupRemoved(Record, frozen=True, tag=31):
    """An empty group is forgotten."""

    name: str


AnyRecord = (
    DaemonStarted | DaemonStopped | Answered | EnvStored | Submitted | Edited | Moved | Reset
    | Removed | CheckpointsDropped | StartIntent | Started | StopIntent | SignalIntent
    | FreezeIntent | CheckpointAsked | Marked | Ended | GroupChanged | GroupRemoved
)  # fmt: skip
