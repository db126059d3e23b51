"""(State, Query) -> answer: what is asked, of what the caller may see, within bounds.

Invariant: a query changes nothing and looks at a bounded number of tasks. Words for people are in
`explain.py`.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from ckptd.core.explain import explain
from ckptd.core.plan import Instance, Observed
from ckptd.core.policy import Caller, Now, Policy
from ckptd.core.records import ACTIVE, ENDED, STUCK, Phase
from ckptd.core.rights import may_open, may_see
from ckptd.core.select import check, fits, selected
from ckptd.core.state import Past, State, Task
from ckptd.protocol import limits
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadRequest, Denied
from ckptd.protocol.ids import unit_name

SHOWN_MAX = 100
ARGV_CHARS_SHOWN = 500
_env = msgspec.msgpack.Decoder(dict[str, str])


class View(msgspec.Struct, frozen=True):
    """What every query may look at."""

    state: State
    observed: Observed
    caller: Caller
    now: Now
    policy: Policy


def status(view: View, query: m.Status) -> m.TaskPage:
    """Return one page. Bound: SCAN_PER_PAGE_MAX tasks are looked at, then `next` goes on."""
    select = query.select
    totals = totals_of(view)
    if select.ids or select.last or select.keys or select.names:
        found = selected(view.state, select, view.caller)
        rows = [row(view, task) for task in found if task.id > query.cursor][: query.limit]
        more = rows[-1].id if rows and rows[-1].id != found[-1].id else 0
        return m.TaskPage(tuple(rows), totals, more)
    check(select)
    rows, last, scanned = [], 0, 0
    for task in _in_order(view.state, query):
        if len(rows) == query.limit or scanned == limits.SCAN_PER_PAGE_MAX:
            return m.TaskPage(tuple(rows), totals, last)
        last, scanned = task.id, scanned + 1
        if may_see(task, view.caller) and fits(task, select):
            rows.append(row(view, task))
    return m.TaskPage(tuple(rows), totals, 0)


def totals_of(view: View) -> dict[str, int]:
    """Return how many tasks are in each phase, of those that the caller may see."""
    sees_all = view.caller.admin or view.caller.reads
    return view.state.totals(None if sees_all else view.caller.uid)


def _in_order(state: State, query: m.Status) -> Iterator[Task]:
    """Yield the tasks to look at; the active ones have an index, so asking for them is cheap."""
    phases = query.select.phases
    if phases and all(word in _ACTIVE_WORDS for word in phases):
        after = query.cursor
        numbers = sorted(state.active, reverse=query.newest)
        kept = [n for n in numbers if not after or (n < after if query.newest else n > after)]
        return (task for n in kept if (task := state.tasks.get(n)) is not None)
    if query.newest:
        return state.tasks.descending(query.cursor)
    return state.tasks.ascending(query.cursor)


_ACTIVE_WORDS = frozenset(phase.word for phase in ACTIVE)


def row(view: View, task: Task) -> m.TaskRow:
    """Return one line of status."""
    spec, run = task.unpacked(), task.run
    last = run.past[-1] if run is not None and run.past else None
    ended = task.phase in ENDED
    return m.TaskRow(
        id=task.id,
        name=spec.name,
        argv=_shortened(spec.argv),
        group=task.group,
        priority=task.priority,
        phase=task.phase.word,
        reason=task.reason,
        until_ns=0 if ended else task.until_ns,
        uid=task.uid,
        key=task.key,
        labels=spec.labels,
        attempt=run.attempt if run else 0,
        failures=run.failures if run else 0,
        failures_max=spec.max_failures,
        interruptions=run.interruptions if run else 0,
        submitted_ns=task.submitted_ns,
        started_ns=_started_ns(task),
        ended_ns=task.until_ns if ended else (last.ended_ns if last else 0),
        cause=last.cause if last else "",
        code=_code(last) if last else None,
        signal=last.signal or None if last else None,
        pid=run.pid if run is not None and task.phase in ACTIVE else 0,
        checkpoint=run.checkpoint if run else 0,
        checkpoint_ns=run.checkpoint_ns if run else 0,
        progress=_progress(view, task),
        blame=last.blame if last else "",
        text=last.text[:ARGV_CHARS_SHOWN] if last and last.cause == "spawn_error" else "",
    )


def _shortened(argv: tuple[str, ...]) -> tuple[str, ...]:
    """Return as much of a command as a line of status can use, so that pages stay small."""
    left, kept = ARGV_CHARS_SHOWN, []
    for word in argv:
        if len(word) > left:
            kept.append(word[:left] + "…")
            break
        left -= len(word) + 1
        kept.append(word)
        if left <= 0:
            break
    return argv if len(kept) == len(argv) and kept[-1] == argv[-1] else tuple(kept)


_WITH_CODE = frozenset(
    {"exit", "spawn_error", "cancel", "timeout", "deadline", "shutdown", "kill", "stopped", "drill"}
)


def _code(past: Past) -> int | None:
    """Return the exit code where there is one: of an oom, where only a child was killed."""
    if past.cause == "oom":
        return past.code or None
    return past.code if past.signal == 0 and past.cause in _WITH_CODE else None


def _started_ns(task: Task) -> int:
    run = task.run
    if run is None:
        return 0
    if task.phase in ACTIVE:
        return run.started_ns
    return run.past[-1].started_ns if run.past else 0


def _progress(view: View, task: Task) -> m.Progress | None:
    instance: Instance | None = view.observed.instances.get(task.id)
    if instance is None or not instance.said_ns:
        return None
    run_s = (instance.said_ns - instance.first_ns) / 1e9
    gained = instance.done - instance.first
    rate = gained / run_s if run_s > 0 else 0.0
    return m.Progress(instance.done, instance.total, instance.text, instance.said_ns, rate)


def show(view: View, query: m.Show, directory: str) -> m.TaskDetails:
    """Return all about some tasks. `directory` is the daemon's state directory."""
    tasks = selected(view.state, query.select, view.caller)
    if len(tasks) > SHOWN_MAX:
        raise BadRequest(f"{len(tasks)} tasks selected, `show` takes {SHOWN_MAX}", "use status")
    return m.TaskDetails(tuple(_detail(view, task, directory, env=query.env) for task in tasks))


def _detail(view: View, task: Task, directory: str, *, env: bool) -> m.TaskDetail:
    is_open = may_open(task, view.caller)
    if env and not is_open:
        uid = view.caller.uid
        raise Denied(f"the environment of task {task.id} is not for uid {uid}: it is not theirs")
    stored = view.state.envs.get(task.env)
    whole = {**(_env.decode(stored) if stored else {}), **task.unpacked().env}
    run = task.run
    invocation = run.invocation if run is not None else ""
    return m.TaskDetail(
        row=row(view, task),
        spec=_spec(task, is_open=is_open),
        attempts=tuple(_attempt(past) for past in run.past) if run is not None else (),
        explanation=explain(view.state, task, view.now, view.policy),
        directory=f"{directory}/tasks/{task.id}",
        output=f"{directory}/output/{task.id}.log",
        env=whole if env else None,
        invocation=invocation,
        unit=unit_name(task.id, run.attempt) if run is not None and invocation else "",
        warning=run.warning if run is not None else "",
    )


def _spec(task: Task, *, is_open: bool) -> dict[str, Any]:
    asked: dict[str, Any] = msgspec.to_builtins(task.unpacked())
    asked.pop("digest", None)
    if not is_open:
        asked.pop("env")
    asked["group"], asked["priority"], asked["key"] = task.group, task.priority, task.key
    asked["deadline_ns"] = task.deadline_ns
    asked["after"] = [{"task": need.task, "when": need.when} for need in task.needs]
    return asked


def _attempt(past: Past) -> m.AttemptRow:
    return m.AttemptRow(
        attempt=past.attempt,
        started_ns=past.started_ns,
        ended_ns=past.ended_ns,
        cause=past.cause,
        code=_code(past),
        signal=past.signal or None,
        checkpoint=past.checkpoint,
        lost_s=past.lost_s,
        cpu_s=past.cpu_s,
        rss_bytes=past.rss_bytes,
        text=past.text,
        blame=past.blame,
        invocation=past.invocation,
    )


def waited(view: View, query: m.Wait) -> m.Waited:
    """Return whether the condition holds now."""
    tasks = selected(view.state, query.select, view.caller)
    met = [_reached(task, query.goal) for task in tasks]
    held = any(met) if query.any else all(met)
    return m.Waited(held, tuple(row(view, task) for task in tasks))


def _reached(task: Task, goal: str) -> bool:
    over = task.phase in ENDED or task.phase in STUCK
    if goal == "done" or over:
        return over
    if goal == "running":
        return task.phase in (Phase.RUNNING, Phase.PAUSED, Phase.STOPPING)
    return task.run is not None and task.run.checkpoint > 0


def groups(view: View) -> m.Groups:
    """Return every group, by name."""
    state = view.state
    rows = []
    for name in sorted(state.groups):
        group = state.groups[name]
        counts = state.by_group.get(name, [0] * len(Phase))
        rows.append(
            m.GroupRow(
                name=name,
                parallel=group.parallel,
                slots=group.parallel or view.policy.slots,
                paused=group.paused,
                active=state.slots_used(name),
                phases={phase.word: counts[phase] for phase in Phase if counts[phase]},
            )
        )
    return m.Groups(tuple(rows))
