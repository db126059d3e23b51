"""What clients and the daemon say to each other: an argument and a result struct per verb.

These types are the wire and age by adding fields with defaults; log records are other types
(`ckptd/core/records.py`). Times are `_ns` since the Unix epoch (wall clock), durations `_s`.
0 means "never" for a time. Invariant: nothing here does I/O. Read next: `codec.py`, PROTOCOL.md.
"""

from typing import Annotated, Any, Literal

import msgspec

from ckptd.protocol import limits
from ckptd.protocol.errors import ErrorReply

Name = Annotated[str, msgspec.Meta(max_length=limits.NAME_CHARS_MAX)]
GroupName = Annotated[
    str, msgspec.Meta(max_length=limits.NAME_CHARS_MAX, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*\Z")
]
Key = Annotated[str, msgspec.Meta(max_length=limits.KEY_CHARS_MAX)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=366 * 86_400)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Priority = Annotated[int, msgspec.Meta(ge=-limits.PRIORITY_MAX, le=limits.PRIORITY_MAX)]
SignalNumber = Annotated[int, msgspec.Meta(ge=1, le=64)]
WallNs = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]  # fits the log's 64 bits
Id = Annotated[int, msgspec.Meta(ge=1, lt=1 << 47)]
Bytes = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Cpus = Annotated[float, msgspec.Meta(ge=0, le=limits.CPUS_MAX)]
TasksMax = Annotated[int, msgspec.Meta(ge=0, le=limits.PROCESSES_MAX)]
IoWeight = Annotated[int, msgspec.Meta(ge=0, le=10_000)]
Nice = Annotated[int, msgspec.Meta(ge=-20, le=19)]
OnOom = Annotated[str, msgspec.Meta(max_length=64)]
Uid = Annotated[int, msgspec.Meta(ge=0, lt=(1 << 32) - 1)]

PHASES = (
    "held", "queued", "waiting", "starting", "running", "paused", "stopping",
    "succeeded", "failed", "cancelled", "quarantined", "blocked",
)  # fmt: skip
FINISHED = ("succeeded", "failed", "cancelled", "quarantined", "blocked")
"""Phases that end a `wait`: nothing happens any more without a person."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of arguments: an unknown field is refused, so that a typo never passes in silence."""


class Answer(msgspec.Struct, frozen=True):
    """Base of results: readers ignore fields that they do not know yet."""


class Request(msgspec.Struct, frozen=True):
    """The envelope. `id` is the client's (1 to 64 characters); a resend uses the same id."""

    v: int
    id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    verb: Annotated[str, msgspec.Meta(max_length=64)]
    args: msgspec.Raw = msgspec.Raw(b"{}")


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The envelope back: either `result` or `error`."""

    v: int
    id: str
    ok: bool
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: ErrorReply | None = None


# --- selecting tasks ------------------------------------------------------------------------


class Selector(Message, frozen=True):
    """Which tasks: the union of ids, last, keys and names; else all; narrowed by the filters."""

    ids: Annotated[tuple[Id, ...], msgspec.Meta(max_length=limits.SELECTED_MAX)] = ()
    last: Annotated[tuple[Count, ...], msgspec.Meta(max_length=100)] = ()  # 0 newest of the caller
    keys: Annotated[tuple[Key, ...], msgspec.Meta(max_length=limits.SELECTED_MAX)] = ()
    names: Annotated[tuple[Name, ...], msgspec.Meta(max_length=100)] = ()  # shell globs
    all: bool = False
    group: str = ""
    labels: dict[str, str] = {}
    phases: tuple[str, ...] = ()


# --- submit ---------------------------------------------------------------------------------


class Dependency(Message, frozen=True):
    """Start only after another task ended in a certain way. Either `task` or `key` is given."""

    task: Annotated[int, msgspec.Meta(ge=0)] = 0
    key: Key = ""
    when: Literal["ok", "fail", "any"] = "ok"


OnExit = Literal["ok", "fail", "retry", "transient", "again"]
"""What an exit code means: success, final failure, failure to retry, not a failure (wait and
try again), or "checkpointed, start me again at once"."""


class TaskSpec(Message, frozen=True):
    """One task as a person asks for it; every default is what most people want."""

    argv: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=32_768)]
    cwd: str = "/"
    env: dict[str, str] = {}  # on top of the request's env
    name: Name = ""  # "": the base name of argv[0]
    group: GroupName = "default"
    key: Key = ""  # idempotency: same key and spec, same id
    priority: Priority = 0
    labels: Annotated[dict[str, str], msgspec.Meta(max_length=limits.LABELS_MAX)] = {}
    after: Annotated[tuple[Dependency, ...], msgspec.Meta(max_length=limits.DEPENDENCIES_MAX)] = ()
    hold: bool = False
    at_ns: WallNs = 0  # not before; wins over in_s; over a day ago is refused
    in_s: Seconds = 0.0
    timeout_s: Seconds = 0.0  # of one attempt; 0: none
    deadline_ns: WallNs = 0  # of the whole task, must lie ahead; 0: none
    retries: Count | None = None  # failures beyond the first; 1,000,000: any number; None: default
    backoff_s: Seconds | None = None  # first delay after a failure
    backoff_max_s: Seconds | None = None
    on_exit: Annotated[dict[str, OnExit], msgspec.Meta(max_length=256)] = {}  # "3": "retry"
    stop_signal: SignalNumber = 15
    grace_s: Seconds | None = None  # between stop signal and SIGKILL
    checkpoint_signal: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0  # opt-in: "save and go on"
    memory_bytes: Bytes = 0  # limit, where a cgroup has it, from 4 MiB; 0: none, here and below
    stdin: str = ""  # a file; "": /dev/null
    umask: Annotated[int, msgspec.Meta(ge=0, le=0o777)] = 0o022
    journal: bool | None = None  # output to journald, too; None: the daemon's default
    uid: Uid | None = None  # run as, and belong to, this user: for root only; None: who submits
    cpus: Cpus = 0.0  # processors' worth of time, from 0.01
    tasks_max: TasksMax = 0  # processes and threads
    io_weight: IoWeight = 0  # share of the disk; without a weight it is 100
    nice: Nice = 0  # below 0: for tasks that run as root
    on_oom: OnOom = ""  # count, fail, hold, retry:xF,max=SIZE; "": the daemon's default


class Submit(Message, frozen=True):
    """`submit`: accept tasks, all or none."""

    tasks: Annotated[
        tuple[TaskSpec, ...], msgspec.Meta(min_length=1, max_length=limits.TASKS_PER_SUBMIT_MAX)
    ]
    env: dict[str, str] = {}  # shared by all tasks of the request, stored once


class Submitted(Answer, frozen=True):
    """Ids in the order of the request; `created` is False where a key already named the task."""

    ids: tuple[int, ...]
    created: tuple[bool, ...]


# --- changing tasks -------------------------------------------------------------------------


class Cancel(Message, frozen=True):
    """`cancel`: ask for a checkpoint, stop signal, grace, SIGKILL. Waiting tasks end at once."""

    select: Selector
    grace_s: Seconds | None = None
    checkpoint: bool = True
    reason: Name = ""


class Kill(Message, frozen=True):
    """`kill`: SIGKILL the whole task now; it ends as cancelled."""

    select: Selector
    reason: Name = ""


class Signal(Message, frozen=True):
    """`signal`: deliver one signal to the task's main process, or to all of its processes."""

    select: Selector
    signal: SignalNumber
    tree: bool = False


class Drill(Message, frozen=True):
    """`drill`: do real damage to running tasks; it counts as an interruption, never as a failure.

    kill9: SIGKILL of the whole task; sigterm: stopped as by a shutdown; oom: its unit is
    left 8 MiB of memory, so that the kernel's OOM killer ends it.
    """

    select: Selector
    how: Literal["kill9", "sigterm", "oom"]


class Pause(Message, frozen=True):
    """`pause`: freeze running tasks where they are."""

    select: Selector


class Resume(Message, frozen=True):
    """`resume`: thaw paused tasks."""

    select: Selector


class Hold(Message, frozen=True):
    """`hold`: keep tasks that have not started from starting."""

    select: Selector


class Release(Message, frozen=True):
    """`release`: let held, quarantined or blocked tasks go on from their last checkpoint."""

    select: Selector


class Drop(Message, frozen=True):
    """`drop`: give a quarantined or blocked task up; it ends as failed."""

    select: Selector


class Retry(Message, frozen=True):
    """`retry`: run ended tasks again, from the last checkpoint or (fresh) from nothing.

    Each waits for what it needs, where that is not over or is retried by the same request.
    """

    select: Selector
    fresh: bool = False


class Edit(Message, frozen=True):
    """`edit`: change tasks that are not running. None leaves a field as it is."""

    select: Selector
    name: Name | None = None
    group: GroupName | None = None
    priority: Priority | None = None
    argv: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] | None = None
    cwd: str | None = None
    timeout_s: Seconds | None = None
    deadline_ns: WallNs | None = None  # 0: none; must lie ahead
    retries: Count | None = None
    grace_s: Seconds | None = None
    labels: Annotated[dict[str, str], msgspec.Meta(max_length=limits.LABELS_MAX)] | None = None
    memory_bytes: Bytes | None = None  # 0: no limit, here and below
    cpus: Cpus | None = None
    tasks_max: TasksMax | None = None
    io_weight: IoWeight | None = None
    nice: Nice | None = None
    on_oom: OnOom | None = None


class CheckpointNow(Message, frozen=True):
    """`checkpoint_now`: ask running tasks to save a checkpoint and go on."""

    select: Selector


class Clean(Message, frozen=True):
    """`clean`: forget ended tasks (never quarantined ones) and delete their files."""

    select: Selector
    older_s: Seconds = 0.0
    dry_run: bool = False


class TaskChange(Answer, frozen=True):
    """What became of one selected task."""

    id: int
    phase: str
    error: ErrorReply | None = None


class Changed(Answer, frozen=True):
    """One entry per selected task, in the order of ids."""

    tasks: tuple[TaskChange, ...]


class GroupSet(Message, frozen=True):
    """`group_set`: create or change a group, live. None leaves a value as it is."""

    name: GroupName
    parallel: Annotated[int, msgspec.Meta(ge=0, le=limits.PARALLEL_MAX)] | None = None
    paused: bool | None = None


class GroupRemove(Message, frozen=True):
    """`group_remove`: forget an empty group."""

    name: str


class GroupRow(Answer, frozen=True):
    """One group; `parallel` 0 stands for the number of processors and is resolved in `slots`."""

    name: str
    parallel: int
    slots: int
    paused: bool
    active: int
    phases: dict[str, int]


class Groups(Answer, frozen=True):
    """Every group, by name."""

    groups: tuple[GroupRow, ...]


# --- asking ---------------------------------------------------------------------------------


class Empty(Message, frozen=True):
    """No arguments."""


class Status(Message, frozen=True):
    """`status`: a page of tasks. Sorted by id; `newest` turns the order round."""

    select: Selector = Selector(all=True)
    limit: Annotated[int, msgspec.Meta(ge=1, le=limits.ROWS_PER_PAGE_MAX)] = 200
    cursor: Annotated[int, msgspec.Meta(ge=0)] = 0  # from the previous page's `next`; 0 starts
    newest: bool = False


class Progress(Answer, frozen=True):
    """What a task last said about itself; telemetry, lossy by nature."""

    done: float = 0.0
    total: float = 0.0  # 0: unknown
    text: str = ""
    at_ns: int = 0
    rate: float = 0.0  # done per second, as far as this daemon has heard


class TaskRow(Answer, frozen=True):
    """One line of `status`."""

    id: int
    name: str
    argv: tuple[str, ...]  # shortened where it is long; `show` has it whole
    group: str
    priority: int
    phase: str
    reason: str
    until_ns: int
    uid: int
    key: str
    labels: dict[str, str]
    attempt: int
    failures: int
    failures_max: int  # retries + 1; over 1,000,000: unlimited; 0: while each makes progress
    interruptions: int
    submitted_ns: int
    started_ns: int  # of the last attempt
    ended_ns: int
    cause: str  # of the last end: exit, signal, oom, timeout, lost, reboot, shutdown, stopped, ...
    code: int | None
    signal: int | None
    pid: int  # of the task's main process while active
    checkpoint: int  # newest valid checkpoint known; 0: none
    checkpoint_ns: int
    progress: Progress | None = None
    blame: str = ""  # of an oom: limit (the task's own), host (ran out around it); of an exit: disk
    text: str = ""  # of a spawn_error: what was not there or not allowed


class TaskPage(Answer, frozen=True):
    """Rows, totals by phase over all visible tasks, and where to go on (0: the end)."""

    tasks: tuple[TaskRow, ...]
    totals: dict[str, int]
    next: int


class Show(Message, frozen=True):
    """`show`: all about the selected tasks (at most 100)."""

    select: Selector
    env: bool = False


class AttemptRow(Answer, frozen=True):
    """How one attempt went."""

    attempt: int
    started_ns: int
    ended_ns: int
    cause: str
    code: int | None
    signal: int | None
    checkpoint: int  # it resumed from
    lost_s: float  # work since the last checkpoint, step, item or value that the end threw away
    cpu_s: float
    rss_bytes: int
    text: str  # evidence: what the runner saw
    blame: str = ""  # of an oom: limit (the task's own), host (ran out around it); of an exit: disk
    invocation: str = ""  # for journalctl _SYSTEMD_INVOCATION_ID=; "": it had no unit of its own


class TaskDetail(Answer, frozen=True):
    """All about one task."""

    row: TaskRow
    spec: dict[str, Any]
    attempts: tuple[AttemptRow, ...]  # the last ones, oldest first
    explanation: str
    directory: str  # CKPTD_DIR
    output: str
    env: dict[str, str] | None = None
    invocation: str = ""  # of the current or last attempt's unit; "": it has none
    unit: str = ""  # its name, for systemctl status
    warning: str = ""  # of the current or last attempt's start


class TaskDetails(Answer, frozen=True):
    """In the order of ids."""

    tasks: tuple[TaskDetail, ...]


class Wait(Message, frozen=True):
    """`wait`: answer once the condition holds for all (any: for one), or after `hold_s`."""

    select: Selector
    goal: Literal["done", "running", "checkpoint"] = "done"
    any: bool = False
    hold_s: Annotated[float, msgspec.Meta(ge=0, le=limits.HOLD_S_MAX)] = limits.HOLD_S_MAX


class Waited(Answer, frozen=True):
    """`met` tells whether the condition holds; rows are those of the selected tasks."""

    met: bool
    tasks: tuple[TaskRow, ...]


class Events(Message, frozen=True):
    """`events`: records of the log after `since`, in order; parked until there is one."""

    since: Annotated[int, msgspec.Meta(ge=-1, lt=1 << 62)] = 0  # -1: from now on
    limit: Annotated[int, msgspec.Meta(ge=1, le=limits.EVENTS_PER_PAGE_MAX)] = 200
    task: Annotated[int, msgspec.Meta(ge=0)] = 0
    hold_s: Annotated[float, msgspec.Meta(ge=0, le=limits.HOLD_S_MAX)] = 0.0


class Event(Answer, frozen=True):
    """One fact of the log; `lsn` is the consumer's offset."""

    lsn: int
    type: str
    at_ns: int
    task: int
    attempt: int
    fields: dict[str, Any]


class EventPage(Answer, frozen=True):
    """Events and where to go on: pass `next` as `since`."""

    events: tuple[Event, ...]
    next: int


class Output(Message, frozen=True):
    """`output`: a piece of a task's output file. A negative offset counts from the end."""

    task: Id
    offset: int = 0
    limit: Annotated[int, msgspec.Meta(ge=1, le=limits.OUTPUT_CHUNK_BYTES_MAX)] = (
        limits.OUTPUT_CHUNK_BYTES_MAX
    )


class OutputChunk(Answer, frozen=True):
    """Base64 on the wire. `more` tells that an end of the task has not been reached yet."""

    data: bytes
    offset: int
    size: int
    done: bool  # the task ended and this chunk reaches the end


class Checkpoints(Message, frozen=True):
    """`checkpoints`: generations of one task; `verify` reads every byte again."""

    task: Id
    verify: bool = False
    result: bool = False  # read the journals, too, for what the whole task came to


class CheckpointRow(Answer, frozen=True):
    """One generation, newest first."""

    seq: int
    valid: bool
    sealed: bool
    at_ns: int
    attempt: int
    bytes: int
    files: tuple[str, ...]
    digest: str
    problem: str
    path: str
    numbers: dict[str, float | str] = {}  # how saving went, as the saver counts: saves, cost_s, ...
    progress: Progress | None = None  # how far it says it is; null: it does not, or is bad


class CheckpointList(Answer, frozen=True):
    """Newest first. A result is JSON as text, for that is what it is to us; "": none recorded."""

    checkpoints: tuple[CheckpointRow, ...]
    result: str = ""


class Stats(Answer, frozen=True):
    """Counters since the daemon's start and totals of the State."""

    totals: dict[str, int]
    groups: dict[str, dict[str, int]]
    counters: dict[str, float]


class Pong(Answer, frozen=True):
    """Who answers."""

    version: str
    protocol: int
    pid: int
    uid: int
    epoch: int
    caller_uid: int = -1  # who asks, by the kernel's word
    roles: tuple[str, ...] = ()  # of who asks: read, submit, admin


class DaemonStatus(Answer, frozen=True):
    """How the daemon itself is."""

    version: str
    pid: int
    uid: int
    epoch: int
    boot_id: str
    started_ns: int
    state_dir: str
    lsn: int
    snapshot_lsn: int
    health: str  # ok, or what is wrong
    runner: str
    cgroup: str
    totals: dict[str, int]
    counters: dict[str, float]
    last_recovery: dict[str, Any]


class Shutdown(Message, frozen=True):
    """`shutdown`: stop the daemon; tasks live on (keep), save and stop, or are killed."""

    tasks: Literal["keep", "checkpoint", "kill"] = "keep"


class Reloaded(Answer, frozen=True):
    """Which keys took effect, which wait for a restart, and which groups stay as they are."""

    applied: tuple[str, ...]
    needs_restart: tuple[str, ...]
    kept: tuple[str, ...] = ()


class EffectiveConfig(Answer, frozen=True):
    """The configuration in force, as nested tables, and the file it came from ("" for none)."""

    path: str
    config: dict[str, Any]


class Done(Answer, frozen=True):
    """Nothing more to say."""


TASK_CHANGES: dict[str, type[Message]] = {
    "cancel": Cancel, "kill": Kill, "signal": Signal, "drill": Drill, "pause": Pause,
    "resume": Resume, "hold": Hold, "release": Release, "drop": Drop, "retry": Retry, "edit": Edit,
    "checkpoint_now": CheckpointNow, "clean": Clean,
}  # fmt: skip

VERBS: dict[str, tuple[type[Message], type[Answer], bool]] = {
    "submit": (Submit, Submitted, True),
    **{verb: (args, Changed, True) for verb, args in TASK_CHANGES.items()},
    "group_set": (GroupSet, Done, True),
    "group_remove": (GroupRemove, Done, True),
    "groups": (Empty, Groups, False),
    "status": (Status, TaskPage, False),
    "show": (Show, TaskDetails, False),
    "wait": (Wait, Waited, False),
    "events": (Events, EventPage, False),
    "output": (Output, OutputChunk, False),
    "checkpoints": (Checkpoints, CheckpointList, False),
    "stats": (Empty, Stats, False),
    "ping": (Empty, Pong, False),
    "daemon": (Empty, DaemonStatus, False),
    "config": (Empty, EffectiveConfig, False),
    "reload": (Empty, Reloaded, False),
    "shutdown": (Shutdown, Done, False),
}
"""verb -> (arguments, result, whether it writes the log and so may be resent by its id)."""
