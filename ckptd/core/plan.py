"""What is wanted against what is there: intents first, effects once the intents are durable.

`intents` looks only at tasks that were touched or whose timer is due, so a turn costs the same
with ten tasks or a million. `effects` compares State with Observed (what this daemon has already
ordered) and is the same after a replay as on every turn. Invariant: planning twice is planning
once; no effect without a record that says so. Read next: `ckptd/daemon/loop.py`.
"""

import heapq
from collections.abc import Iterable, Sequence

import msgspec

from ckptd.core.decide import SIGKILL, Case, stop
from ckptd.core.policy import Caller, Now, Policy
from ckptd.core.port import (
    Control,
    Delete,
    Deliver,
    DropCheckpoints,
    Effect,
    Forget,
    Freeze,
    Start,
    Starve,
)
from ckptd.core.records import (
    ACTIVE,
    DRILL_OOM,
    ENDED,
    PENDING,
    AnyRecord,
    CheckpointsDropped,
    Moved,
    Phase,
    Removed,
    SignalIntent,
    StartIntent,
    StopIntent,
)
from ckptd.core.state import ID_BITS, Run, State, Stop, Task, due_ns, earliest
from ckptd.core.submit import entry, needs_fate

_env = msgspec.msgpack.Decoder(dict[str, str])
_NOBODY = Caller(-1, -1, admin=True)
REMOVED_PER_TURN_MAX = 500
LAST_RUNG = 2  # SIGKILL to all of it
KEPT_PER_TURN_MAX = 10_000  # ended tasks that others wait for, taken out in one pass
ADOPTED_GRACE_S = 30.0  # before an adopted attempt can time out: it may have asked for more
SAVE_S = 5.0  # beyond the grace: the machine's stop signal is the first that a task hears of it


class Adopt(msgspec.Struct, frozen=True, gc=False):
    """Effect: find out what became of an attempt that this daemon did not order."""

    task: int
    attempt: int


class Instance(msgspec.Struct, gc=False):
    """What this daemon has ordered for one active attempt, and what it heard of it."""

    attempt: int
    rung: int = -1
    is_starved: bool = False  # no rung: whoever stops the task then still asks first
    frozen: bool | None = False  # None: not known, as with what was adopted
    asked: int = 0
    first: float = 0.0  # `done` as it was said first: the rate counts from there
    first_ns: int = 0
    done: float = 0.0
    total: float = 0.0
    text: str = ""
    said_ns: int = 0
    extended_ns: int = 0  # no timeout before that
    moved: tuple[int, int] = (0, 0)  # an end that State notes, and where the clock now has it
    timer_ns: int = 0  # the last one that was set for an end that State does not note

    def end_ns(self, noted_ns: int) -> int:
        """Return when a length is over, by the clock as it is now."""
        return self.moved[1] if self.moved[0] == noted_ns else noted_ns


class Observed:
    """Instances by task. In memory only: a new daemon starts with none and adopts."""

    def __init__(self) -> None:
        self.instances: dict[int, Instance] = {}
        self.doubted_until_ns = 0  # the clock: it was set far ahead, and may be set back

    def of(self, task: int, attempt: int) -> Instance | None:
        """Return what is known of this very attempt."""
        instance = self.instances.get(task)
        return instance if instance is not None and instance.attempt == attempt else None


# --- intents --------------------------------------------------------------------------------


def intents(
    state: State,
    observed: Observed,
    touched: Iterable[int],
    now: Now,
    policy: Policy,
    *,
    starts: int,
) -> list[AnyRecord]:
    """Return what is to be done now as records. Call again after applying them, until empty.

    `starts` is how many attempts may be started; none while draining or while the disk is full.
    """
    candidates = dict.fromkeys(touched)
    while state.timers and state.timers[0][0] <= now.at_ns:  # Bound: each entry is popped once
        candidates[heapq.heappop(state.timers)[1]] = None
    case = Case(state, _NOBODY, now, policy)
    records: list[AnyRecord] = []
    concerned: dict[int, None] = {}
    for number in candidates:
        task = state.tasks.get(number)
        if task is not None:
            records += _due(case, observed, task)
        if task is None or task.phase not in ACTIVE:
            concerned.update(dict.fromkeys(state.dependents.get(number, ())))
    if not records:  # an end of this very pass is judged in the next one
        for number in sorted(concerned):
            records += _judge(case, number)
    elif concerned:
        state.touched.update(candidates)
    if starts and not records:
        records += _starts(state, now, policy, starts)
    if not records:
        records += _retention(state, observed, now, policy)
    if not records:
        records += _drops(state, observed, now, policy)
    return records


def _due(case: Case, observed: Observed, task: Task) -> list[AnyRecord]:
    at_ns = case.now.at_ns
    run = task.run
    if task.phase in PENDING and task.deadline_ns and task.deadline_ns <= at_ns:
        return [Moved(task.id, at_ns, Phase.FAILED, "deadline")]
    if task.phase is Phase.WAITING:
        if task.reason != "after" and task.until_ns <= at_ns:
            return [Moved(task.id, at_ns, Phase.QUEUED, "")]
        return []
    if task.phase not in ACTIVE or run is None:
        return []
    if run.stop is None and task.deadline_ns and task.deadline_ns <= at_ns:
        return [_stop(task, run, case, "deadline")]
    if not run.noted_ns or not _is_over(case, observed.of(task.id, run.attempt), task, run):
        return []
    if run.stop is not None:
        return [_next_rung(task, run, run.stop, at_ns)]
    return [_stop(task, run, case, "timeout")]


def _is_over(case: Case, instance: Instance | None, task: Task, run: Run) -> bool:
    """Tell whether the rung or the timeout is over; else a timer is set for when it will be."""
    if instance is None:
        return run.noted_ns <= case.now.at_ns
    end_ns = instance.end_ns(run.noted_ns)
    if run.stop is None:
        end_ns = max(end_ns, instance.extended_ns)
    if end_ns <= case.now.at_ns:
        return True
    is_elsewhere = end_ns != run.noted_ns or instance.moved[0] == run.noted_ns
    if is_elsewhere and end_ns != instance.timer_ns:
        instance.timer_ns = end_ns
        deadline_ns = task.deadline_ns if run.stop is None else 0
        heapq.heappush(case.state.timers, (earliest(end_ns, deadline_ns), task.id))
    return False


def _stop(task: Task, run: Run, case: Case, why: str) -> StopIntent:
    return stop(task, run, case, why, grace_s=task.unpacked().grace_s, ask=True, by=-1)


def _next_rung(task: Task, run: Run, rung: Stop, at_ns: int) -> StopIntent:
    next_ns = at_ns + int(rung.grace_s * 1e9) if rung.rung == 0 else 0
    return StopIntent(
        task.id, run.attempt, at_ns, rung.why, rung.rung + 1, next_ns, rung.grace_s, -1
    )


def _judge(case: Case, number: int) -> list[AnyRecord]:
    """Return the move of a task that waits for others, or is blocked by them, where it can go."""
    task = case.state.tasks.get(number)
    if task is None:
        return []
    waits = task.phase is Phase.WAITING and task.reason == "after"
    blocked = task.phase is Phase.BLOCKED and task.reason == "dependency"
    if not (waits or blocked):
        return []
    ran_ns = task.run.intent_ns if waits and task.run else 0
    fate = needs_fate(case.state, task.needs, ran_ns)
    if (fate == "wait" and waits) or (fate == "never" and blocked):
        return []
    phase, reason, until_ns = entry(case.state, task.needs, task.until_ns, case.now, ran_ns)
    return [Moved(task.id, case.now.at_ns, phase, reason, until_ns)]


def _starts(state: State, now: Now, policy: Policy, most: int) -> list[AnyRecord]:
    records: list[AnyRecord] = []
    chosen: set[int] = set()  # a heap may hold a task twice: what is stale is dropped when popped
    for name, heap in state.ready.items():
        group = state.groups.get(name)
        if not heap or group is None or group.paused:
            continue
        free = (group.parallel or policy.slots) - state.slots_used(name)
        while free > 0 and heap and len(records) < most:
            task = _pop_ready(state, name, heap)
            if task is None:
                break
            if task.id in chosen:
                continue
            chosen.add(task.id)
            attempt = task.run.attempt + 1 if task.run is not None else 1
            records.append(StartIntent(task.id, attempt, now.at_ns))
            free -= 1
    return records


def _pop_ready(state: State, group: str, heap: list[int]) -> Task | None:
    while heap:  # Bound: every pass pops one entry
        key = heapq.heappop(heap)
        if state.is_ready(group, key):
            return state.tasks.get(key & ((1 << ID_BITS) - 1))
    return None


def _oldest_ns(observed: Observed, now: Now, age_s: float) -> int:
    """Return when that was; nothing is too old by a clock that is in doubt."""
    return now.at_ns - int(age_s * 1e9) if now.at_ns >= observed.doubted_until_ns else 0


def _retention(state: State, observed: Observed, now: Now, policy: Policy) -> list[AnyRecord]:
    """Return the removal of what is too old or too much; what others wait for stays, uncounted.

    It leaves the heap until nobody waits for it any more (`State.put`): left in, it would be met
    again in every pass, and enough of it would hide all that is behind it.
    """
    oldest_ns = _oldest_ns(observed, now, policy.finished_age_s)
    ended = sum(counts[phase] for counts in state.by_group.values() for phase in ENDED)
    surplus = ended - len(state.needed) - policy.finished_max
    chosen: dict[int, AnyRecord] = {}
    kept = 0
    while state.ended and len(chosen) < REMOVED_PER_TURN_MAX and kept < KEPT_PER_TURN_MAX:
        at_ns, number = state.ended[0]
        if surplus <= len(chosen) + kept and at_ns > oldest_ns:
            break
        heapq.heappop(state.ended)
        task = state.tasks.get(number)
        if task is None or task.phase not in ENDED or task.until_ns != at_ns:
            continue  # stale
        if number in state.dependents:
            state.needed.add(number)
            kept += 1
        else:
            chosen[number] = Removed(number, now.at_ns)
    return list(chosen.values())


def _drops(state: State, observed: Observed, now: Now, policy: Policy) -> list[AnyRecord]:
    """Return the giving up of checkpoints whose task succeeded long enough ago."""
    oldest_ns = _oldest_ns(observed, now, policy.checkpoints_age_s)
    chosen: dict[int, AnyRecord] = {}
    while state.spent and len(chosen) < REMOVED_PER_TURN_MAX:  # Bound: each turn pops an entry
        at_ns, number = state.spent[0]
        if at_ns > oldest_ns:
            break
        heapq.heappop(state.spent)
        if state.is_spent(at_ns, number):
            chosen[number] = CheckpointsDropped(number, now.at_ns)
    return list(chosen.values())


def wake_ns(state: State) -> int:
    """Return when the next timer is due, 0 for none."""
    while state.timers:  # Bound: stale entries are popped once
        at_ns, number = state.timers[0]
        task = state.tasks.get(number)
        if task is not None and due_ns(task) == at_ns:
            return at_ns
        if task is not None and task.phase in ACTIVE:
            return at_ns  # an end that was moved or extended is not in State
        heapq.heappop(state.timers)
    return 0


# --- effects --------------------------------------------------------------------------------


def effects(
    state: State, observed: Observed, touched: Iterable[int], news: Sequence[AnyRecord]
) -> list[Effect | Adopt]:
    """Return the orders that State wants and Observed has not had; Observed then has them."""
    orders: list[Effect | Adopt] = []
    for record in news:
        if isinstance(record, StopIntent) and record.by >= 0:
            _insist(observed, record)
    for number in touched:
        task = state.tasks.get(number)
        if task is not None and task.phase in ACTIVE and task.run is not None:
            orders += _active(state, observed, task, task.run)
            continue
        instance = observed.instances.pop(number, None)
        if instance is not None:
            orders.append(Forget(number, instance.attempt))
    for record in news:
        if isinstance(record, SignalIntent):
            orders.append(Deliver(record.task, record.attempt, record.signal, record.tree))
        elif isinstance(record, Removed):
            orders.append(Delete(record.task))
        elif isinstance(record, CheckpointsDropped):
            orders += _drop(state.tasks.get(record.task))
    return orders


def _insist(observed: Observed, record: StopIntent) -> None:
    """Have the last rung climbed once more for a person who asks again: nothing follows it."""
    instance = observed.of(record.task, record.attempt)
    if instance is not None and instance.rung == record.rung == LAST_RUNG:
        instance.rung -= 1


def _drop(task: Task | None) -> list[Effect | Adopt]:
    """Return the order to delete, unless the task was retried in the same turn: it is fresh."""
    if task is None or task.run is None or not task.run.dropped_ns:
        return []
    return [DropCheckpoints(task.id, task.run.attempt)]


def adoption(state: State, observed: Observed, now: Now) -> list[Adopt]:
    """Return an order to find out about every attempt that an earlier daemon may have started.

    Invariant: Observed then holds them all, so that `effects` starts none of them again.
    """
    found = []
    for number in state.active:
        task = state.tasks.get(number)
        assert task is not None, "the index of active tasks is true"
        run = task.run
        assert run is not None, "an active task has an attempt"
        observed.instances[number] = Instance(
            run.attempt,
            frozen=None,
            asked=run.asked,
            extended_ns=now.at_ns + int(ADOPTED_GRACE_S * 1e9),
        )
        found.append(Adopt(number, run.attempt))
    return found


def _active(state: State, observed: Observed, task: Task, run: Run) -> list[Effect | Adopt]:
    instance = observed.of(task.id, run.attempt)
    orders: list[Effect | Adopt] = []
    if instance is None:
        old = observed.instances.get(task.id)
        if old is not None:
            orders.append(Forget(task.id, old.attempt))
        instance = observed.instances[task.id] = Instance(run.attempt)
        if task.phase is Phase.STARTING:
            orders.append(_start(state, task, run))
        else:
            orders.append(Adopt(task.id, run.attempt))
    if run.asked > instance.asked:
        instance.asked = run.asked
        orders.append(_control(task, run))
        signal = task.unpacked().checkpoint_signal
        if signal:
            orders.append(Deliver(task.id, run.attempt, signal, tree=False))
    if run.frozen != instance.frozen:
        instance.frozen = run.frozen
        orders.append(Freeze(task.id, run.attempt, run.frozen))
    if run.stop is not None and run.stop.why == DRILL_OOM and run.stop.rung == 1:
        if not instance.is_starved:
            instance.is_starved = True
            orders.append(Starve(task.id, run.attempt))
    elif run.stop is not None and run.stop.rung > instance.rung:
        instance.rung = run.stop.rung
        orders += _climb(task, run)
    return orders


def _climb(task: Task, run: Run) -> list[Effect | Adopt]:
    rung = run.stop
    assert rung is not None, "only a stop has rungs"
    if rung.rung == 0:
        return [_control(task, run)]
    if rung.rung == 1:
        return [
            _control(task, run),
            Deliver(task.id, run.attempt, task.unpacked().stop_signal, tree=False),
        ]
    return [Deliver(task.id, run.attempt, SIGKILL, tree=True)]


def _control(task: Task, run: Run) -> Control:
    """Return what the task's control file is to say: a stop, a wish for a checkpoint, or both."""
    rung = run.stop
    if rung is None:
        return Control(task.id, run.attempt, "", 0, run.asked)
    force_ns = rung.next_ns + (int(rung.grace_s * 1e9) if rung.rung == 0 else 0)
    return Control(task.id, run.attempt, rung.why, force_ns, run.asked + 1)


def _start(state: State, task: Task, run: Run) -> Start:
    spec = task.unpacked()
    env = _env.decode(state.envs[task.env]) if task.env else {}
    return Start(
        task=task.id,
        attempt=run.attempt,
        argv=spec.argv,
        env={**env, **spec.env},
        cwd=spec.cwd,
        uid=task.uid,
        gid=spec.gid,
        stdin=spec.stdin,
        umask=spec.umask,
        memory_bytes=spec.memory_bytes,
        epoch=state.epoch,
        deadline_ns=task.deadline_ns,
        fresh=run.fresh,
        name=spec.name,
        cpus=spec.cpus,
        tasks_max=spec.tasks_max,
        io_weight=spec.io_weight,
        nice=spec.nice,
        stop_signal=spec.stop_signal,
        stop_s=spec.grace_s + SAVE_S,
        checkpoint=run.checkpoint,
        has_journal=run.has_journal,
    )
