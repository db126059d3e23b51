"""The only writer of State: one record in, one change made.

Total over all record types; no policy, no clock, no randomness, so that a replay of the log gives
the State that was there. Replay and live use are this one call. Read next: `decide.py`.
"""

from typing import assert_never

import msgspec
from msgspec.structs import replace

from ckptd.core.records import (
    ACTIVE,
    ENDED,
    Answered,
    AnyRecord,
    CheckpointAsked,
    CheckpointsDropped,
    DaemonStarted,
    DaemonStopped,
    Edited,
    Ended,
    EnvStored,
    FreezeIntent,
    GroupChanged,
    GroupRemoved,
    Marked,
    Moved,
    Phase,
    Removed,
    Reset,
    SignalIntent,
    Started,
    StartIntent,
    StopIntent,
    Submitted,
)
from ckptd.core.state import PAST_KEPT, Group, Past, Run, State, Stop, Task

_pack = msgspec.msgpack.Encoder(order="sorted")
_NEVER_BEGAN = ("not_started", "spawn_error")  # perhaps not even what `fresh` asks for was done


def apply(state: State, lsn: int, record: AnyRecord) -> None:
    """Change State as the record says. Invariant: LSNs come in order, without a gap."""
    assert lsn == state.lsn + 1, f"record {lsn} after {state.lsn}"
    state.lsn = lsn
    match record:
        case Submitted():
            _submitted(state, record)
        case Answered():
            state.remember(f"{record.uid}:{record.request}", record.answer)
        case StartIntent():
            _start_intent(state, record)
        case Started():
            _started(state, record)
        case Ended():
            _ended(state, record)
        case Marked():
            _marked(state, record)
        case Moved():
            _moved(state, record)
        case StopIntent():
            _stop_intent(state, record)
        case FreezeIntent():
            task, run = _running(state, record.task, record.attempt)
            phase = Phase.PAUSED if record.frozen else Phase.RUNNING
            state.put(replace(task, phase=phase, run=replace(run, frozen=record.frozen)))
        case CheckpointAsked():
            task, run = _running(state, record.task, record.attempt)
            state.put(replace(task, run=replace(run, asked=record.number)))
        case SignalIntent():
            state.touched.add(record.task)
        case Edited():
            _edited(state, record)
        case Reset():
            _reset(state, record)
        case Removed():
            state.drop(_task(state, record.task))
        case CheckpointsDropped():
            _dropped(state, record)
        case EnvStored():
            state.envs[record.digest] = record.data
        case GroupChanged():
            state.groups[record.name] = Group(
                record.name, record.parallel, record.paused, record.by_person
            )
        case GroupRemoved():
            state.drop_group(record.name)
        case DaemonStarted():
            state.clean, state.stopped = record.clean, False
            state.epoch, state.boot_id = record.epoch, record.boot_id
        case DaemonStopped():
            state.stopped = True
        case _:
            assert_never(record)


def _task(state: State, number: int) -> Task:
    task = state.tasks.get(number)
    assert task is not None, f"record about task {number}, which does not exist"
    return task


def _running(state: State, number: int, attempt: int) -> tuple[Task, Run]:
    task = _task(state, number)
    run = task.run
    assert run is not None, f"task {number} was never started"
    assert task.phase in ACTIVE, f"task {number} is {task.phase.word}, not active"
    assert run.attempt == attempt, f"record about attempt {attempt} of task {number}"
    return task, run


def _edited(state: State, record: Edited) -> None:
    state.put(
        replace(
            _task(state, record.task),
            group=state.groups[record.group].name,
            priority=record.priority,
            deadline_ns=record.deadline_ns,
            spec=bytes(record.spec),
        )
    )


def _moved(state: State, record: Moved) -> None:
    task = _task(state, record.task)
    assert task.phase not in ACTIVE, f"task {task.id} is {task.phase.word}: only an end moves it"
    until_ns = record.at_ns if record.phase in ENDED else record.until_ns
    state.put(replace(task, phase=record.phase, reason=record.reason, until_ns=until_ns))


def _marked(state: State, record: Marked) -> None:
    task, run = _running(state, record.task, record.attempt)
    run = replace(
        run,
        checkpoint=record.checkpoint,
        checkpoint_ns=record.checkpoint_ns,
        cursor=record.cursor,
        has_journal=run.has_journal or record.has_journal,
    )
    state.put(replace(task, run=run))


def _submitted(state: State, record: Submitted) -> None:
    assert record.task >= state.next_id, f"id {record.task} was given before"
    state.next_id = record.task + 1
    state.put(
        Task(
            record.task,
            record.phase,
            record.reason,
            record.until_ns,
            record.uid,
            state.groups[record.group].name,  # one string object for all tasks of a group
            record.priority,
            record.at_ns,
            record.deadline_ns,
            state.env_names.setdefault(record.env, record.env),
            record.key,
            record.needs,
            bytes(record.spec),
        )
    )


def _start_intent(state: State, record: StartIntent) -> None:
    task = _task(state, record.task)
    assert task.phase is Phase.QUEUED, f"task {task.id} is {task.phase.word}, not queued"
    old = task.run
    if old is None:
        run = Run(record.attempt, record.at_ns)
    else:
        assert record.attempt == old.attempt + 1, "attempts count up by one"
        run = replace(
            old,
            attempt=record.attempt,
            intent_ns=record.at_ns,
            started_ns=0,
            timeup_ns=0,
            shim=None,
            pid=0,
            resumed_from=0,
            warning="",
            invocation="",
            base=old.cursor,
            stop=None,
            frozen=False,
            asked=0,
            dropped_ns=0,
        )
        if old.fresh:  # also what an attempt that never began has seen of the files meanwhile
            run = replace(_with_nothing(run), base="")
    state.put(replace(task, phase=Phase.STARTING, reason="", until_ns=0, run=run))


def _started(state: State, record: Started) -> None:
    task, run = _running(state, record.task, record.attempt)
    timeout_s = task.unpacked().timeout_s
    run = replace(
        run,
        started_ns=record.at_ns,
        timeup_ns=record.at_ns + int(timeout_s * 1e9) if timeout_s else 0,
        shim=record.shim,
        pid=record.pid,
        resumed_from=record.resumed_from,
        warning=record.warning,
        invocation=record.invocation,
        fresh=False,
    )
    if 0 < record.resumed_from < run.checkpoint and run.checkpoint_ns < record.at_ns:
        run = replace(run, checkpoint=record.resumed_from)  # what is missing was told: its warning
    # A stop that came while the attempt was starting stays a stop.
    phase = Phase.RUNNING if task.phase is Phase.STARTING else task.phase
    state.put(replace(task, phase=phase, run=run))


def _stop_intent(state: State, record: StopIntent) -> None:
    task, run = _running(state, record.task, record.attempt)
    since_ns = run.stop.since_ns if run.stop is not None else record.at_ns
    stop = Stop(record.why, record.rung, since_ns, record.next_ns, record.grace_s)
    run = replace(run, stop=stop, frozen=False)  # a frozen task could not answer
    state.put(replace(task, phase=Phase.STOPPING, reason=record.why, run=run))


def _ended(state: State, record: Ended) -> None:
    task, run = _running(state, record.task, record.attempt)
    verdict = record.verdict
    past = Past(
        record.attempt,
        record.started_ns,
        record.ended_ns,
        record.cause,
        record.code,
        record.signal,
        run.resumed_from,
        record.lost_s,
        record.cpu_s,
        record.rss_bytes,
        record.text,
        record.blame,
        run.invocation,
    )
    run = replace(
        run,
        failures=verdict.failures,
        interruptions=verdict.interruptions,
        stalls=verdict.stalls,
        crashes=verdict.crashes,
        host_deaths=verdict.host_deaths,
        cursor=record.cursor,
        stop=None,
        frozen=False,
        # Whatever else ended has begun, seen or not: what it saved is its own, not to be put away.
        fresh=run.fresh and record.cause in _NEVER_BEGAN,
        past=(*run.past[1 - PAST_KEPT :], past),
    )
    until_ns = record.ended_ns if verdict.phase in ENDED else verdict.until_ns
    if record.memory_bytes:
        spec = replace(task.unpacked(), memory_bytes=record.memory_bytes)
        task = replace(task, spec=_pack.encode(spec))
    state.put(replace(task, phase=verdict.phase, reason=verdict.reason, until_ns=until_ns, run=run))


def _reset(state: State, record: Reset) -> None:
    task = _task(state, record.task)
    run = task.run
    if run is not None:
        run = replace(
            run,
            failures=0,
            interruptions=0,
            stalls=0,
            crashes=0,
            host_deaths=0,
            fresh=record.fresh or run.fresh,
            patience_from=run.attempt,
            # What it needs may end by a clock that was set back, and is later all the same.
            intent_ns=min(run.intent_ns, record.at_ns),
        )
        if record.fresh:
            run = _with_nothing(run)
    state.put(replace(task, phase=Phase.QUEUED, reason="", until_ns=0, run=run))


def _dropped(state: State, record: CheckpointsDropped) -> None:
    """Invariant: what is left of its files, deleted yet or not, is no start for a later attempt."""
    task = _task(state, record.task)
    run = task.run
    assert task.phase is Phase.SUCCEEDED, f"task {task.id} is {task.phase.word}: it may go on"
    assert run is not None, f"task {task.id} was never started"
    run = replace(_with_nothing(run), fresh=True, dropped_ns=record.at_ns)
    state.put(replace(task, run=run))


def _with_nothing(run: Run) -> Run:
    """Return it without anything that its next attempt must find."""
    return replace(run, cursor="", checkpoint=0, checkpoint_ns=0, has_journal=False)
