"""(State, Command, Now) -> records and an answer, or a rejection that changes nothing.

One function per verb. A verb over many tasks answers for each: a task that cannot be changed is
said so and does not stop the others. Read next: `submit.py`, `plan.py`.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

import msgspec
from msgspec.structs import replace

from ckptd.core.policy import Caller, Now, Policy
from ckptd.core.records import (
    ACTIVE,
    DRILL,
    DRILL_OOM,
    ENDED,
    PENDING,
    STUCK,
    AnyRecord,
    CheckpointAsked,
    Edited,
    FreezeIntent,
    GroupChanged,
    GroupRemoved,
    Moved,
    Phase,
    Removed,
    Reset,
    SignalIntent,
    Spec,
    StopIntent,
)
from ckptd.core.rights import check_command, check_task, may_change, may_see
from ckptd.core.select import selected
from ckptd.core.state import Group, Run, State, Task
from ckptd.core.submit import check_deadline, check_limits, check_spec, entry, needs_fate, submit
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadRequest, Conflict, ErrorReply, NotFound, Rejected
from ckptd.protocol.limits import REPLY_BYTES_MAX, REQUEST_BYTES_MAX
from ckptd.protocol.on_oom import EXAMPLES, parse_on_oom

SIGKILL = 9
STARVES_S = 10.0  # without memory; who lives then is killed
EDIT_BYTES_MAX = 2 * REQUEST_BYTES_MAX  # of specs, which an edit writes anew: half a segment
WAITING_NAMED_MAX = 5  # of those that an ended task is kept for; there may be thousands
_REASONS_BYTES_MAX = 3 * REPLY_BYTES_MAX // 8  # in one answer; its other half are the rows
_LIMITS = ("memory_bytes", "cpus", "tasks_max", "io_weight", "nice", "on_oom")
_pack = msgspec.msgpack.Encoder(order="sorted")


class Case(msgspec.Struct, frozen=True):
    """What every decision may look at."""

    state: State
    caller: Caller
    now: Now
    policy: Policy
    changed: set[int] = msgspec.field(
        default_factory=set
    )  # by this command so far, in order of ids


def decide(case: Case, command: m.Message) -> tuple[list[AnyRecord], m.Answer]:
    """Return the records of a mutating command and its answer. Raises Rejected."""
    check_command(command, case.caller, case.policy.rules)
    match command:
        case m.Submit():
            return submit(case.state, command, case.caller, case.now, case.policy)
        case m.GroupSet():
            return _group_set(case, command)
        case m.GroupRemove():
            return _group_remove(case, command)
        case m.Edit():
            _check_edit(case, command)
            return _each(case, command)
        case m.Clean(dry_run=True):
            return [], _each(case, command)[1]
        case _:
            return _each(case, command)


def _each(case: Case, command: Any) -> tuple[list[AnyRecord], m.Changed]:
    change = _CHANGES[type(command)]
    records: list[AnyRecord] = []
    rows: list[m.TaskChange] = []
    chosen = selected(case.state, command.select, case.caller, may_change)
    reason_bytes = _REASONS_BYTES_MAX // max(1, len(chosen))
    for task in chosen:
        error = None
        try:
            check_task(task, command, case.caller, case.policy.rules)
            made = change(case, task, command)
        except Rejected as refused:
            if isinstance(command, m.Clean) and _is_wide(command.select):
                continue  # `clean --all` means: all that can be cleaned
            error, made = _short(refused.reply(), reason_bytes), []
        if made:
            case.changed.add(task.id)
        records += made
        rows.append(m.TaskChange(task.id, _phase_after(task, made).word, error))
    return records, m.Changed(tuple(rows))


def _short(error: ErrorReply, most: int) -> ErrorReply:
    """Return the error with a reason of at most about `most` bytes: every task may have one."""
    message = error.message.encode()
    if len(message) <= most:
        return error
    return replace(error, message=message[:most].decode(errors="ignore") + "...")


def _is_wide(select: m.Selector) -> bool:
    return not (select.ids or select.last or select.keys)


def _phase_after(task: Task, made: list[AnyRecord]) -> Phase:
    for record in reversed(made):
        match record:
            case Moved():
                return record.phase
            case StopIntent():
                return Phase.STOPPING
            case Reset():
                return Phase.QUEUED
            case FreezeIntent():
                return Phase.PAUSED if record.frozen else Phase.RUNNING
            case _:
                pass
    return task.phase


def _conflict(task: Task, verb: str, hint: str = "") -> Conflict:
    return Conflict(f"cannot {verb} task {task.id}: it is {task.phase.word}", hint)


# --- ending ---------------------------------------------------------------------------------


def _cancel(case: Case, task: Task, command: m.Cancel) -> list[AnyRecord]:
    if task.phase in PENDING or task.phase in STUCK:
        return [Moved(task.id, case.now.at_ns, Phase.CANCELLED, command.reason or "cancel")]
    run = task.run
    if task.phase not in ACTIVE or run is None:
        if task.phase is Phase.CANCELLED:
            return []  # twice is the same as once
        raise _conflict(task, "cancel", "it has ended; `ckptctl clean` forgets ended tasks")
    if run.stop is not None and run.stop.why == "cancel" and command.grace_s is None:
        return []
    spec = task.unpacked()
    grace_s = spec.grace_s if command.grace_s is None else command.grace_s
    return [stop(task, run, case, "cancel", grace_s=grace_s, ask=command.checkpoint)]


def _kill(case: Case, task: Task, command: m.Kill) -> list[AnyRecord]:
    if task.phase in ENDED and task.phase is not Phase.CANCELLED:
        raise _conflict(task, "kill", "it has ended already")
    if task.phase not in ACTIVE or task.run is None:
        return _cancel(case, task, m.Cancel(command.select, reason=command.reason or "kill"))
    run, now = task.run, case.now
    return [StopIntent(task.id, run.attempt, now.at_ns, "kill", 2, 0, 0.0, case.caller.uid)]


def stop(  # noqa: PLR0913 - a rung is made of this much
    task: Task, run: Run, case: Case, why: str, *, grace_s: float, ask: bool, by: int | None = None
) -> StopIntent:
    """Return the first rung of the ladder: ask where the task makes checkpoints, else signal."""
    by = case.caller.uid if by is None else by
    asks = ask and run.cursor != "" and case.policy.ask_s > 0
    wait_s = case.policy.ask_s if asks else grace_s
    next_ns = case.now.at_ns + int(wait_s * 1e9)
    return StopIntent(
        task.id, run.attempt, case.now.at_ns, why, 0 if asks else 1, next_ns, grace_s, by
    )


def _clean(case: Case, task: Task, command: m.Clean) -> list[AnyRecord]:
    if task.phase not in ENDED:
        hint = "see: ckptctl quarantine" if task.phase is Phase.QUARANTINED else "cancel it first"
        raise _conflict(task, "clean", hint)
    if task.id in case.state.dependents:
        raise _needed(case, task)
    if case.now.at_ns - task.until_ns < command.older_s * 1e9:
        raise Conflict(f"cannot clean task {task.id}: it ended less than {command.older_s} s ago")
    return [Removed(task.id, case.now.at_ns)]


def _needed(case: Case, task: Task) -> Conflict:
    """Return why an ended task stays: whom it is kept for, as far as the caller may see them."""
    waiting = case.state.dependents[task.id]
    some = [case.state.tasks.get(number) for number in islice(waiting, WAITING_NAMED_MAX)]
    named = sorted(one.id for one in some if one is not None and may_see(one, case.caller))
    left = len(waiting) - len(named)
    who = ", ".join(map(str, named)) + (" and " if named and left else "")
    who += (f"{left} more" if named else f"{left} of others") if left else ""
    return Conflict(
        f"cannot clean task {task.id}: it is {task.phase.word}, and other tasks still wait for how"
        f" it ended: {who}",
        f"let them end, or: ckptctl cancel {named[0]}" if named else "",
    )


# --- running --------------------------------------------------------------------------------


def _attempt(task: Task, verb: str) -> Run:
    if task.phase not in ACTIVE or task.run is None:
        raise _conflict(task, verb, "only a running task can do that")
    return task.run


def _signal(case: Case, task: Task, command: m.Signal) -> list[AnyRecord]:
    run = _attempt(task, "signal")
    if run.shim is None:
        raise _conflict(task, "signal", "it is just being started; try again")
    return [
        SignalIntent(
            task.id, run.attempt, case.now.at_ns, command.signal, command.tree, case.caller.uid
        )
    ]


def _drill(case: Case, task: Task, command: m.Drill) -> list[AnyRecord]:
    """Stop an attempt so that it goes on: what it dies of is ours, and nobody's failure."""
    run = task.run
    if task.phase is not Phase.RUNNING or run is None:
        raise _conflict(task, "drill", "only a running task can be drilled")
    if _is_patience_out(case.policy, run):
        raise Conflict(
            f"cannot drill task {task.id}: one more interruption would put it into quarantine",
            "drill it once it has made progress",
        )
    if case.state.groups[task.group].paused:
        raise Conflict(
            f"cannot drill task {task.id}: its group {task.group!r} is paused, nobody would start"
            " it again",
            "drill it once the group goes on",
        )
    at_ns, grace_s, by = case.now.at_ns, task.unpacked().grace_s, case.caller.uid
    match command.how:
        case "kill9":
            return [StopIntent(task.id, run.attempt, at_ns, DRILL, 2, 0, 0.0, by)]
        case "sigterm":
            return [stop(task, run, case, DRILL, grace_s=grace_s, ask=True)]
        case "oom" if not run.invocation:
            raise Conflict(
                f"cannot take memory from task {task.id}: it has no unit of its own",
                "the runner of systemd units can; here: --kill9",
            )
        case "oom":
            next_ns = at_ns + int(STARVES_S * 1e9)
            return [StopIntent(task.id, run.attempt, at_ns, DRILL_OOM, 1, next_ns, 0.0, by)]


def _is_patience_out(policy: Policy, run: Run) -> bool:
    tried = run.attempt - run.patience_from
    return run.interruptions >= policy.interruptions_max or tried >= policy.attempts_max


def _pause(case: Case, task: Task, _: m.Pause) -> list[AnyRecord]:
    if task.phase is Phase.PAUSED:
        return []
    if task.phase in PENDING:
        raise _conflict(task, "pause", f"it is not running; try: ckptctl hold {task.id}")
    run = _attempt(task, "pause")
    if task.phase is not Phase.RUNNING:
        raise _conflict(task, "pause")
    return [FreezeIntent(task.id, run.attempt, case.now.at_ns, True)]


def _resume(case: Case, task: Task, _: m.Resume) -> list[AnyRecord]:
    if task.phase is Phase.RUNNING:
        return []
    if task.phase is not Phase.PAUSED or task.run is None:
        hint = f"try: ckptctl release {task.id}" if task.phase is Phase.HELD else ""
        raise _conflict(task, "resume", hint or "only a paused task can be resumed")
    return [FreezeIntent(task.id, task.run.attempt, case.now.at_ns, False)]


def _checkpoint_now(case: Case, task: Task, _: m.CheckpointNow) -> list[AnyRecord]:
    run = _attempt(task, "checkpoint")
    return [CheckpointAsked(task.id, run.attempt, case.now.at_ns, run.asked + 1)]


# --- waiting --------------------------------------------------------------------------------


def _hold(case: Case, task: Task, _: m.Hold) -> list[AnyRecord]:
    if task.phase is Phase.HELD:
        return []
    if task.phase not in PENDING:
        hint = f"try: ckptctl pause {task.id}" if task.phase in ACTIVE else ""
        raise _conflict(task, "hold", hint)
    return [Moved(task.id, case.now.at_ns, Phase.HELD, "", task.until_ns)]


def _release(case: Case, task: Task, _: m.Release) -> list[AnyRecord]:
    if task.phase in STUCK:
        return [Reset(task.id, case.now.at_ns, fresh=False)]
    if task.phase is not Phase.HELD:
        raise _conflict(task, "release", "only held, quarantined or blocked tasks can be released")
    phase, reason, until_ns = entry(case.state, task.needs, task.until_ns, case.now)
    return [Moved(task.id, case.now.at_ns, phase, reason, until_ns)]


def _drop(case: Case, task: Task, _: m.Drop) -> list[AnyRecord]:
    if task.phase not in STUCK:
        raise _conflict(task, "drop", "only quarantined or blocked tasks can be dropped")
    return [Moved(task.id, case.now.at_ns, Phase.FAILED, f"dropped: {task.reason}")]


def _retry(case: Case, task: Task, command: m.Retry) -> list[AnyRecord]:
    if task.phase in ACTIVE:
        raise _conflict(task, "retry", "it is running; cancel it first")
    if task.phase in (Phase.QUEUED, Phase.HELD):
        raise _conflict(task, "retry", "it has not ended")
    if task.phase is Phase.WAITING and task.reason not in ("backoff", "transient", "rate_limit"):
        raise _conflict(task, "retry", f"it waits: {task.reason}")
    again: list[AnyRecord] = [Reset(task.id, case.now.at_ns, command.fresh)]
    phase, reason = _entered_again(case, task)
    if phase is Phase.QUEUED:
        return again
    return [*again, Moved(task.id, case.now.at_ns, phase, reason)]


def _entered_again(case: Case, task: Task) -> tuple[Phase, str]:
    """Return (phase, reason) of a task that is to run again: behind what it needs.

    It waits for those that are not over, or that this command puts back (they have lower ids).
    How others ended counts where nobody looked at it before: not once the task has run, or was
    blocked by it.
    """
    tasks = case.state.tasks
    for need in task.needs:
        needed = tasks.get(need.task)
        if needed is not None and (needed.phase not in ENDED or need.task in case.changed):
            return Phase.WAITING, "after"
    is_judged = task.run is not None or task.phase in STUCK
    if not is_judged and needs_fate(case.state, task.needs) == "never":
        return Phase.BLOCKED, "dependency"
    return Phase.QUEUED, ""


def _check_edit(case: Case, command: m.Edit) -> None:
    """Refuse once what would be wrong for every task. Raises BadRequest, NotFound."""
    if command.group is not None and command.group not in case.state.groups:
        raise NotFound(f"no group {command.group!r}", f"ckptctl group add {command.group}")
    check_spec(m.TaskSpec(argv=command.argv or ("x",), cwd=command.cwd or "/"))
    check_deadline(command.deadline_ns or 0, case.now)
    if command.cwd == "":
        raise BadRequest("cwd is empty; it must be an absolute path")
    try:
        parse_on_oom(command.on_oom or "")
    except ValueError as bad:
        raise BadRequest(f"on_oom: {bad}", EXAMPLES) from bad
    chosen = selected(case.state, command.select, case.caller, may_change)
    change = len(_pack.encode(replace(command, select=m.Selector())))
    size = sum(len(task.spec) + change for task in chosen)
    if size > EDIT_BYTES_MAX and len(chosen) > 1:
        raise BadRequest(
            f"{size} bytes of specs are too many to write anew at once, over {EDIT_BYTES_MAX}",
            "edit fewer tasks at a time: by ids, a group or a label",
        )


def _edit(case: Case, task: Task, command: m.Edit) -> list[AnyRecord]:
    only_priority = command == m.Edit(select=command.select, priority=command.priority)
    if task.phase in ACTIVE and not only_priority:
        raise _conflict(task, "edit", "only a task that is not running can be edited")
    group = command.group if command.group is not None else task.group
    spec = _edited_spec(task.unpacked(), command)
    packed = _pack.encode(spec)
    if len(packed) > max(REQUEST_BYTES_MAX, len(task.spec)):
        raise BadRequest(
            f"task {task.id} would have a spec of {len(packed)} bytes, over {REQUEST_BYTES_MAX}",
            "pass big input by a file",
        )
    if any(getattr(command, name) is not None for name in _LIMITS):
        # What the daemon's default says of an oom need not fit the limits of this task.
        check_limits(replace(spec, on_oom=command.on_oom or ""), task.uid)
    return [
        Edited(
            task.id,
            case.now.at_ns,
            group,
            task.priority if command.priority is None else command.priority,
            task.deadline_ns if command.deadline_ns is None else command.deadline_ns,
            msgspec.Raw(packed),
        )
    ]


def _edited_spec(spec: Spec, command: m.Edit) -> Spec:
    changes: dict[str, Any] = {
        name: value
        for name in ("name", "argv", "cwd", "timeout_s", "grace_s", "labels", *_LIMITS)
        if (value := getattr(command, name)) is not None
    }
    if command.retries is not None:
        changes["max_failures"] = command.retries + 1
    return replace(spec, **changes)


# --- groups ---------------------------------------------------------------------------------


def _group_set(case: Case, command: m.GroupSet) -> tuple[list[AnyRecord], m.Answer]:
    old = case.state.groups.get(command.name) or Group(command.name)
    parallel = old.parallel if command.parallel is None else command.parallel
    paused = old.paused if command.paused is None else command.paused
    return [GroupChanged(command.name, parallel, paused, by_person=True)], m.Done()


def _group_remove(case: Case, command: m.GroupRemove) -> tuple[list[AnyRecord], m.Answer]:
    if command.name == "default":
        raise Conflict("the group 'default' stays")
    if command.name not in case.state.groups:
        raise NotFound(f"no group {command.name!r}")
    left = sum(case.state.by_group.get(command.name, ()))
    if left:
        raise Conflict(
            f"group {command.name!r} still has {left} tasks",
            f"ckptctl cancel -g {command.name}; ckptctl clean -g {command.name}",
        )
    return [GroupRemoved(command.name)], m.Done()


_CHANGES: dict[type[m.Message], Callable[[Case, Task, Any], list[AnyRecord]]] = {
    m.Cancel: _cancel,
    m.Kill: _kill,
    m.Signal: _signal,
    m.Drill: _drill,
    m.Pause: _pause,
    m.Resume: _resume,
    m.Hold: _hold,
    m.Release: _release,
    m.Drop: _drop,
    m.Retry: _retry,
    m.Edit: _edit,
    m.CheckpointNow: _checkpoint_now,
    m.Clean: _clean,
}
