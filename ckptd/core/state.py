"""State: every live task, the groups, the environments, and the indexes that keep a turn cheap.

Only `apply.py` changes a State. Task values are frozen; `put` replaces one value and keeps all
indexes true. Tasks stand in buckets of 1,024 that are copied on the first write after `freeze`,
so a snapshot is State at exactly one LSN, taken in slices while the loop goes on.
Invariant: every index here can be rebuilt from the tasks alone; a replay leaves them out and
builds them once at its end (`index`), which makes it several times as fast. Read next: `apply.py`.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from typing import TypeVar

import msgspec
from msgspec.structs import force_setattr

from ckptd.core.port import Identity
from ckptd.core.records import ACTIVE, ENDED, PENDING, Need, Phase, Spec
from ckptd.protocol.limits import ANSWERS_BYTES_MAX, PRIORITY_MAX, REQUESTS_REMEMBERED

BUCKET_BITS = 10
ID_BITS = 48
PAST_KEPT = 10
STALE_MAX = 1_024  # stale entries that a heap may hold beside twice its live ones

_specs = msgspec.msgpack.Decoder(Spec)


class Stop(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A stop under way: why, the rung that is being climbed, when the next is due."""

    why: str
    rung: int
    since_ns: int
    next_ns: int
    grace_s: float


class Past(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How one attempt went."""

    attempt: int
    started_ns: int
    ended_ns: int
    cause: str
    code: int
    signal: int
    checkpoint: int
    lost_s: float
    cpu_s: float
    rss_bytes: int
    text: str
    blame: str = ""  # of an oom: limit, host; of an exit: disk
    invocation: str = ""  # of its unit


class Run(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a task has once it was started: the current or last attempt, counters, progress."""

    attempt: int
    intent_ns: int
    failures: int = 0
    interruptions: int = 0
    stalls: int = 0
    crashes: int = 0
    host_deaths: int = 0
    started_ns: int = 0
    timeup_ns: int = 0  # when the attempt's timeout is over; 0: none
    shim: Identity | None = None
    pid: int = 0
    resumed_from: int = 0
    warning: str = ""
    base: str = ""  # cursor when the attempt started
    cursor: str = ""  # newest known
    checkpoint: int = 0
    checkpoint_ns: int = 0
    stop: Stop | None = None
    frozen: bool = False
    asked: int = 0  # "save now" requests of this attempt
    fresh: bool = False  # the next attempt archives the checkpoints
    past: tuple[Past, ...] = ()
    patience_from: int = 0  # attempt at which a person said "again": limits count from there
    invocation: str = ""  # of the attempt's unit
    dropped_ns: int = 0  # when the checkpoints were given up after its success; 0: they were not
    has_journal: bool = False  # what ran has recorded something; only from nothing it has not again

    @property
    def noted_ns(self) -> int:
        """Return when the rung of its stop, or else its timeout, is over; 0 for never."""
        return self.stop.next_ns if self.stop is not None else self.timeup_ns


class Task(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One task; the cold part stays packed in `spec`.

    `until_ns`: when waiting is over; of an ended task, when it ended.
    """

    id: int
    phase: Phase
    reason: str
    until_ns: int
    uid: int
    group: str
    priority: int
    submitted_ns: int
    deadline_ns: int
    env: bytes
    key: str
    needs: tuple[Need, ...]
    spec: bytes
    run: Run | None = None

    def unpacked(self) -> Spec:
        """Return the cold part."""
        return _specs.decode(self.spec)


class Group(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A queue with a limit; `parallel` 0 stands for the number of processors."""

    name: str
    parallel: int = 0
    paused: bool = False
    by_person: bool = False  # set by a command: the configuration does not change it any more


class TaskTable:
    """Tasks by id, in buckets that are copied on the first write after a freeze."""

    def __init__(self) -> None:
        self._buckets: dict[int, dict[int, Task]] = {}
        self._shared: set[int] = set()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def get(self, task: int) -> Task | None:
        """Return the task, or None."""
        bucket = self._buckets.get(task >> BUCKET_BITS)
        return None if bucket is None else bucket.get(task)

    def put(self, task: Task) -> None:
        """Insert or replace."""
        number = task.id >> BUCKET_BITS
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = {}
        elif number in self._shared:
            bucket = self._own(number)
        if task.id not in bucket:
            self._count += 1
        bucket[task.id] = task

    def drop(self, task: int) -> None:
        """Remove a task that is there."""
        number = task >> BUCKET_BITS
        bucket = self._own(number) if number in self._shared else self._buckets[number]
        del bucket[task]
        self._count -= 1
        if not bucket:
            del self._buckets[number]

    def _own(self, number: int) -> dict[int, Task]:
        self._shared.discard(number)
        bucket = self._buckets[number] = self._buckets[number].copy()
        return bucket

    def freeze(self) -> list[dict[int, Task]]:
        """Return the buckets of this moment; nobody changes them any more."""
        self._shared = set(self._buckets)
        return list(self._buckets.values())

    def thaw(self) -> None:
        """The frozen buckets are no longer needed; stop copying."""
        self._shared = set()

    def ascending(self, after: int) -> Iterator[Task]:
        """Yield tasks with an id above `after`, by id."""
        first = (after + 1) >> BUCKET_BITS
        for number in sorted(n for n in self._buckets if n >= first):
            bucket = self._buckets[number]
            for task in sorted(bucket):
                if task > after:
                    yield bucket[task]

    def descending(self, before: int) -> Iterator[Task]:
        """Yield tasks with an id below `before` (0: from the newest), by falling id."""
        last = (before - 1) >> BUCKET_BITS if before else None
        numbers = (n for n in self._buckets if last is None or n <= last)
        for number in sorted(numbers, reverse=True):
            bucket = self._buckets[number]
            for task in sorted(bucket, reverse=True):
                if not before or task < before:
                    yield bucket[task]


class State:
    """All that the log says, and nothing else."""

    def __init__(self, *, indexed: bool = True) -> None:
        self.indexed = indexed
        self.lsn = 0
        self.next_id = 1
        self.epoch = 0
        self.boot_id = ""
        self.clean = True  # the reign before this one ended in order
        self.stopped = True  # the last daemon record is DaemonStopped
        self.tasks = TaskTable()
        self.groups: dict[str, Group] = {"default": Group("default")}
        self.envs: dict[bytes, bytes] = {}
        self.answers: OrderedDict[str, bytes] = OrderedDict()
        self.answers_bytes = 0
        # Indexes, all derived from the tasks:
        self.keys: dict[tuple[int, str], int] = {}
        self.dependents: dict[int, set[int]] = {}
        self.active: dict[int, None] = {}
        self.ready: dict[str, list[int]] = {}
        self.timers: list[tuple[int, int]] = []
        self.ended: list[tuple[int, int]] = []
        self.needed: set[int] = set()  # left out of `ended`: others wait for these
        self.spent: list[tuple[int, int]] = []  # of `ended`: succeeded, with checkpoints
        self.env_uses: dict[bytes, int] = {}
        self.env_names: dict[bytes, bytes] = {}  # one object for a million tasks
        self.by_group: dict[str, list[int]] = {}
        self.by_uid: dict[int, list[int]] = {}
        self.touched: set[int] = set()
        self.removed: set[int] = set()

    def put(self, task: Task) -> None:
        """Insert or replace a task and keep the indexes true."""
        if not self.indexed:
            self.tasks.put(task)
            return
        old = self.tasks.get(task.id)
        if old is not None:
            self._leave(old)
        self.tasks.put(task)
        self.enter(task, old)
        self.touched.add(task.id)
        if old is not None and self.needed:
            self._free(old)

    def drop(self, task: Task) -> None:
        """Remove a task."""
        self.tasks.drop(task.id)
        if not self.indexed:
            return
        self._leave(task)
        self._free(task)
        self.removed.add(task.id)
        if task.env not in self.env_uses:
            self.envs.pop(task.env, None)
            self.env_names.pop(task.env, None)
        if task.key and self.keys.get((task.uid, task.key)) == task.id:
            del self.keys[task.uid, task.key]

    def load(self, task: Task) -> None:
        """Take a task over from a snapshot."""
        force_setattr(task, "group", self.groups[task.group].name)
        force_setattr(task, "env", self.env_names.setdefault(task.env, task.env))
        self.tasks.put(task)

    def index(self) -> None:
        """Build the indexes after a replay, and touch what is active: it must be looked at."""
        assert not self.indexed, "indexes are built once"
        self.indexed = True
        for task in self.tasks.ascending(0):
            self.enter(task)
        self.touched.update(self.active)
        self.touched.update(self.dependents)  # a crash may lie between an end and what follows
        for table in (self.envs, self.env_names):
            for digest in [digest for digest in table if digest not in self.env_uses]:
                del table[digest]

    def drop_group(self, name: str) -> None:
        """Remove a group that no task is in."""
        del self.groups[name]
        self.by_group.pop(name, None)
        self.ready.pop(name, None)

    def enter(self, task: Task, old: Task | None = None) -> None:
        """Enter a task that stands in `tasks` into every index; `old` is what it was before."""
        phase = task.phase
        _counts(self.by_group, task.group)[phase] += 1
        _counts(self.by_uid, task.uid)[phase] += 1
        if phase is Phase.QUEUED:
            heap = self.ready.get(task.group)
            if heap is None:
                heap = self.ready[task.group] = []
            heapq.heappush(heap, ready_key(task))
            if len(heap) > 2 * self.by_group[task.group][Phase.QUEUED] + STALE_MAX:
                self._compact_ready(task.group, heap)
        elif phase in ACTIVE:
            self.active[task.id] = None
        elif phase in ENDED and (old is None or old.phase not in ENDED):
            heapq.heappush(self.ended, (task.until_ns, task.id))
            if has_spent(task):
                self._enter_spent(task)
        if phase not in ENDED:
            self.needed.discard(task.id)  # it enters `ended` again once it ends
        if task.key:
            self.keys[task.uid, task.key] = task.id
        if task.env:
            self.env_uses[task.env] = self.env_uses.get(task.env, 0) + 1
        if phase in PENDING or phase is Phase.BLOCKED:
            for need in task.needs:
                self.dependents.setdefault(need.task, set()).add(task.id)
        due = due_ns(task)
        if due and (old is None or due != due_ns(old)):
            heapq.heappush(self.timers, (due, task.id))
            if len(self.timers) > 2 * self._timed() + STALE_MAX:
                self._compact_timers()

    def _enter_spent(self, task: Task) -> None:
        heapq.heappush(self.spent, (task.until_ns, task.id))
        most = sum(counts[Phase.SUCCEEDED] for counts in self.by_group.values())
        if len(self.spent) > 2 * most + STALE_MAX:
            self.spent[:] = sorted({entry for entry in self.spent if self.is_spent(*entry)})

    def is_spent(self, at_ns: int, number: int) -> bool:
        """Tell whether an entry of `spent` still stands for a task that succeeded then."""
        task = self.tasks.get(number)
        return task is not None and has_spent(task) and task.until_ns == at_ns

    def _timed(self) -> int:
        """Return how many tasks can have a timer at most."""
        pending = (sum(counts[p] for p in PENDING) for counts in self.by_group.values())
        return len(self.active) + sum(pending)

    def _compact_timers(self) -> None:
        """Drop timers of what has changed since."""
        live = {entry for entry in self.timers if self._is_due_at(*entry)}
        self.timers[:] = sorted(live)  # a sorted list is a heap

    def _is_due_at(self, at_ns: int, number: int) -> bool:
        task = self.tasks.get(number)
        return task is not None and (task.phase in ACTIVE or due_ns(task) == at_ns)

    def _compact_ready(self, group: str, heap: list[int]) -> None:
        """Drop entries of tasks that are not queued there any more."""
        live = {key for key in heap if self.is_ready(group, key)}
        heap[:] = sorted(live)

    def is_ready(self, group: str, key: int) -> bool:
        """Tell whether an entry of the group's queue still stands for a queued task."""
        task = self.tasks.get(key & ((1 << ID_BITS) - 1))
        if task is None or task.phase is not Phase.QUEUED or task.group != group:
            return False
        return ready_key(task) == key

    def _leave(self, task: Task) -> None:
        self.by_group[task.group][task.phase] -= 1
        self.by_uid[task.uid][task.phase] -= 1
        self.active.pop(task.id, None)
        if task.env:
            uses = self.env_uses[task.env] - 1
            if uses:
                self.env_uses[task.env] = uses
            else:
                del self.env_uses[task.env]
        for need in task.needs:
            waiting = self.dependents.get(need.task)
            if waiting is not None:
                waiting.discard(task.id)
                if not waiting:
                    del self.dependents[need.task]

    def _free(self, task: Task) -> None:
        """Put back into `ended` what the task was the last to wait for."""
        for need in task.needs:
            if need.task not in self.needed or need.task in self.dependents:
                continue
            self.needed.discard(need.task)
            ended = self.tasks.get(need.task)
            if ended is not None and ended.phase in ENDED:
                heapq.heappush(self.ended, (ended.until_ns, ended.id))

    def remember(self, request: str, answer: bytes) -> None:
        """Keep the answer of a mutating request for a resend; the oldest one makes room."""
        self.answers[request] = answer
        self.answers_bytes += len(answer)
        while len(self.answers) > REQUESTS_REMEMBERED or self.answers_bytes > ANSWERS_BYTES_MAX:
            _, oldest = self.answers.popitem(last=False)  # Bound: one answer is far smaller
            self.answers_bytes -= len(oldest)

    def slots_used(self, group: str) -> int:
        """Return how many tasks of the group are active."""
        counts = self.by_group.get(group)
        return 0 if counts is None else sum(counts[phase] for phase in ACTIVE)

    def totals(self, uid: int | None = None) -> dict[str, int]:
        """Return how many tasks are in each phase, of one uid or (None) of all; zeros left out."""
        tables = self.by_uid.values() if uid is None else [self.by_uid.get(uid, [0] * len(Phase))]
        sums = [sum(column) for column in zip(*tables, strict=True)] or [0] * len(Phase)
        return {phase.word: sums[phase] for phase in Phase if sums[phase]}


K = TypeVar("K")


def _counts(table: dict[K, list[int]], key: K) -> list[int]:
    counts = table.get(key)
    if counts is None:
        counts = table[key] = [0] * len(Phase)
    return counts


def has_spent(task: Task) -> bool:
    """Return whether a task has succeeded and still has its checkpoints."""
    return task.phase is Phase.SUCCEEDED and task.run is not None and task.run.checkpoint > 0


def ready_key(task: Task) -> int:
    """Return the place in the queue: high priority first, then the older id."""
    return (PRIORITY_MAX - task.priority) << ID_BITS | task.id


def due_ns(task: Task) -> int:
    """Return when the next timer of a task is due, 0 for none. Timeouts of attempts included."""
    run = task.run
    if task.phase in ACTIVE and run is not None:
        return earliest(run.noted_ns, task.deadline_ns if run.stop is None else 0)
    if task.phase is Phase.WAITING:
        return earliest(task.until_ns if task.reason != "after" else 0, task.deadline_ns)
    return task.deadline_ns if task.phase in PENDING else 0


def earliest(one: int, other: int) -> int:
    """Return the earlier of two times, where 0 stands for never."""
    return min(one, other) if one and other else one or other
