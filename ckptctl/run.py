"""Verbs that start work and stay with it: submit, run, wait, logs.

All of them outlive restarts of the daemon. Task output goes to stdout byte for byte.
Read next: `follow.py` (output), `spec.py` (options to TaskSpec).
"""

import argparse
import errno
import sys
import time
from collections.abc import Sequence
from typing import Final, Literal

from ckptctl import python, selectors, spec, startable, units, words
from ckptctl.call import Call
from ckptctl.follow import Markers, follow, tail
from ckptctl.picture import Picture, check_code, task_listing
from ckptctl.render import Listing
from ckptd.protocol import limits
from ckptd.protocol.errors import BadRequest, NotFound, TimedOut
from ckptd.protocol.messages import (
    FINISHED,
    Cancel,
    Changed,
    Selector,
    Submit,
    Submitted,
    TaskRow,
    TaskSpec,
    Wait,
    Waited,
)
from ckptd.streams import Lost

GOALS: Final = ("success", "done", "running", "checkpoint")
GRACE_S: Final = 1.0  # past a time limit: for the answer that says how far the tasks are
SECOND_INTERRUPT_S: Final = 3.0


# --- submit -----------------------------------------------------------------------------------


def submit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `submit`."""
    spec.add_options(parser)
    python.add_options(parser)
    parser.add_argument("--wait", action="store_true", help="return once it is done, as `wait`")
    parser.add_argument("--follow", action="store_true", help="follow its output, as `run`")


def submit(call: Call) -> int:
    """Accept tasks and print their ids."""
    if call.args.follow:
        call.takes()
    answer, tasks = _submitted(call)
    is_data = not (call.is_for_people or call.style.is_quiet or call.style.form == "name")
    try:
        _show_ids(call, answer, tasks, is_data=is_data)
        sys.stdout.flush()  # whoever reads has the ids before we wait
    except Lost as lost:
        raise Lost(f"{lost}; accepted: {_named(answer.ids)}", lost.code) from lost
    if call.args.follow:
        return _stay(call, answer.ids[-1])
    if call.args.wait:
        return _wait_until(call, list(answer.ids), "success", float("inf"), is_told=not is_data)
    return 0


def _show_ids(call: Call, answer: Submitted, tasks: Sequence[TaskSpec], *, is_data: bool) -> None:
    if is_data and call.args.wait:
        return  # one document: how they ended
    if is_data:
        rows = [
            {"id": number, "created": created}
            for number, created in zip(answer.ids, answer.created, strict=True)
        ]
        call.show(Listing("tasks", rows, (), lambda row: str(row["id"])))
    elif not call.is_for_people or not sys.stdout.isatty() or call.style.form != "table":
        call.out(map(str, answer.ids))
    else:
        for number, created, task in zip(answer.ids, answer.created, tasks, strict=True):
            known = "" if created else " (already known by its key)"
            starts = words.starts_text(task, time.time_ns()) if created else ""
            call.out([f"task {number}: {words.clean(_name_of(task))}{starts}{known}"])
        if not call.args.follow:
            call.aside(f"follow it: ckptctl logs -f {answer.ids[-1]}")


def _named(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:8])) + (" ..." if len(ids) > 8 else "")
    return f"task{'s' if len(ids) > 1 else ''} {shown}"


def _name_of(task: TaskSpec) -> str:
    return task.name or task.argv[0].rpartition("/")[2]


def _submitted(call: Call) -> tuple[Submitted, list[TaskSpec]]:
    for name in ("after", "after_fail", "after_any"):
        resolve_last(call, getattr(call.args, name) or [])
    tasks = spec.from_args(call.args)
    env, lost = spec.environment(call.args, tasks)
    if lost:
        call.note(f"left out of the environment, not UTF-8: {', '.join(lost)}")
    env["PWD"] = tasks[0].cwd
    for task in tasks:
        startable.check_line(task, env)
    answer = call.ask("submit", Submit(tuple(tasks), env), Submitted)
    for why in startable.doubts(tasks, env):
        call.note(f"note: {why}: it fails when it starts, unless that has come by then")
    return answer, tasks


def resolve_last(call: Call, depends: list[str]) -> None:
    """Replace @last and @~N in place by ids: the wire knows ids and keys only."""
    for place, word in enumerate(depends):
        parts = word.split(",")
        for number, part in enumerate(parts):
            if part.startswith("@"):
                last = tuple(selectors.words_of([part]).last)
                parts[number] = str(call.one_id(Selector(last=last)))
        depends[place] = ",".join(parts)


# --- run --------------------------------------------------------------------------------------


def run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    spec.add_options(parser)
    python.add_options(parser)


def run(call: Call) -> int:
    """Submit one task, follow its output and return its exit code."""
    call.takes()
    answer, _ = _submitted(call)
    if len(answer.ids) != 1:
        raise BadRequest(f"run takes one task, the file has {len(answer.ids)}", "use submit --wait")
    return _stay(call, answer.ids[0], is_known=not answer.created[0])


def _stay(call: Call, task: int, *, is_known: bool = False) -> int:
    """Follow a task to its end. Ctrl-C detaches; a second one cancels."""
    call.note(f"task {task} is {'already known by its key' if is_known else 'submitted'}")
    try:
        follow(call, task, 0, markers=Markers(call.note))
        row = _ended_row(call, task)
    except KeyboardInterrupt:
        return _detached(call, task)
    if row.phase != "succeeded":
        call.note(words.outcome_text(row))
        if row.phase in ("quarantined", "blocked"):
            call.note(f"why: ckptctl explain {task}")
    return exit_code(row)


def _ended_row(call: Call, task: int) -> TaskRow:
    while True:  # Bound: ends with the task
        answer = call.wait_for("wait", Wait(Selector(ids=(task,))), Waited)
        if answer.met:
            return answer.tasks[0]


def _detached(call: Call, task: int) -> int:
    call.note(f"detached, task {task} goes on; Ctrl-C again now cancels it")
    call.note(f"to follow it later: ckptctl logs -f {task}")
    try:
        time.sleep(SECOND_INTERRUPT_S)
    except KeyboardInterrupt:
        call.ask("cancel", Cancel(Selector(ids=(task,)), reason="Ctrl-C"), Changed)
        call.note(f"task {task} is being cancelled")
    return 130


def exit_code(row: TaskRow) -> int:
    """Return the exit code that stands for a task's end, as a shell would give it."""
    if row.phase == "succeeded":
        return 0
    if row.cause == "spawn_error":
        return 126 if row.code in (errno.EACCES, errno.ENOEXEC) else 127
    if row.cause in ("timeout", "deadline"):
        return 124
    if row.signal:
        return min(255, 128 + row.signal)
    return row.code if row.cause == "exit" and row.code else 1


# --- wait -------------------------------------------------------------------------------------


def wait_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `wait`."""
    selectors.add_options(parser)
    parser.add_argument(
        "--for", dest="goal", choices=GOALS, default="success", metavar="GOAL",
        help="success (default: 1 if any failed), done, running or checkpoint",
    )  # fmt: skip
    parser.add_argument("--any", action="store_true", help="one of the tasks is enough")
    parser.add_argument(
        "--timeout", metavar="TIME", type=units.parse_duration,
        help="give up after this long, exit 124",
    )  # fmt: skip
    parser.add_argument(
        "--exit-code", choices=("result", "task"), default="result", metavar="KIND",
        help="task: exit with the task's own code",
    )  # fmt: skip


def wait(call: Call) -> int:
    """Return once tasks got somewhere."""
    args = call.args
    until = float("inf") if args.timeout is None else time.monotonic() + args.timeout
    call.until_mono_s = until + GRACE_S if args.timeout else float("inf")
    ids = [row.id for row in call.rows(call.select(default_last=True))]
    if args.exit_code == "task" and len(ids) != 1:
        raise BadRequest(f"--exit-code task takes one task, not {len(ids)}")
    if args.timeout == 0:
        answer = call.ask("wait", Wait(_ids(ids), _goal(args.goal), args.any, 0.0), Waited)
        return _verdict(call, answer.tasks, args.goal) if answer.met else 3
    return _wait_until(call, ids, args.goal, until)


def _ids(ids: Sequence[int]) -> Selector:
    return Selector(ids=tuple(ids))


def _goal(goal: str) -> Literal["done", "running", "checkpoint"]:
    match goal:
        case "running" | "checkpoint":
            return goal
        case _:
            return "done"


def _wait_until(
    call: Call, ids: list[int], goal: str, until: float, *, is_told: bool = False
) -> int:
    """Wait, and tell at Ctrl-C that nothing else ends with us."""
    try:
        return _met(call, ids, goal, until, is_told=is_told)
    except KeyboardInterrupt:
        call.note(f"task {ids[0]} goes on" if len(ids) == 1 else f"{len(ids)} tasks go on")
        return 130


def _met(call: Call, ids: list[int], goal: str, until: float, *, is_told: bool) -> int:
    is_any = bool(getattr(call.args, "any", False))
    seen: dict[int, TaskRow] = {}  # as last told: who ended may be forgotten while others go on
    while True:  # Bound: `until`, or the ends of the tasks
        left_s = until - time.monotonic()
        hold_s = min(limits.HOLD_S_MAX, max(0.0, left_s))
        asked = Wait(_ids(ids), _goal(goal), is_any, hold_s)
        over = {number for number, row in seen.items() if row.phase in FINISHED}
        try:
            answer = call.wait_for("wait", asked, Waited, until + GRACE_S)
        except NotFound as gone:
            if seen and over.isdisjoint(ids):
                raise _forgotten(gone) from gone
            if not seen:
                raise
            ids = [number for number in ids if number not in over]
            continue
        seen |= {row.id: row for row in answer.tasks}
        if not answer.met:
            if time.monotonic() >= until:
                raise TimedOut(_unmet_text(answer.tasks, goal), "the tasks go on")
            continue
        is_settled = not is_any or goal != "success" or check_code(_over(answer.tasks)) == 0
        ids = [row.id for row in answer.tasks if row.phase not in FINISHED]
        if is_settled or not ids:
            return _verdict(call, list(seen.values()), goal, is_told=is_told)


def _forgotten(gone: NotFound) -> NotFound:
    """Return what to say of a task that ended and was cleaned while no daemon answered us."""
    return NotFound(
        f"{gone.message} any more: it ended and was forgotten meanwhile",
        "how it ended: ckptctl events --task N, as far back as the log is kept",
    )


def _over(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """Return the best end there is: a success if any, else all ends."""
    over = [row for row in rows if row.phase in FINISHED]
    return [row for row in over if row.phase == "succeeded"] or over


def _unmet_text(rows: Sequence[TaskRow], goal: str) -> str:
    now_ns = time.time_ns()
    unmet = [row for row in rows if row.phase not in FINISHED]
    names = ", ".join(f"task {row.id} is {words.state_text(row, now_ns)}" for row in unmet[:3])
    more = f" and {len(unmet) - 3} more" if len(unmet) > 3 else ""
    return f"not {'done' if goal == 'success' else goal} in time: {names}{more}"


def _verdict(call: Call, rows: Sequence[TaskRow], goal: str, *, is_told: bool = False) -> int:
    """Tell how the tasks stand and return the exit code. Ids are told once only."""
    shown = Picture(list(rows), {})
    if not call.is_for_people:
        if is_told:
            return check_code(rows)
        call.show(task_listing(shown, time.time_ns()))
    else:
        for row in rows:
            if row.phase in FINISHED and (row.phase != "succeeded" or sys.stderr.isatty()):
                call.note(words.outcome_text(row))
    if getattr(call.args, "exit_code", "") == "task":
        return exit_code(rows[0]) if rows[0].phase in FINISHED else 0
    if getattr(call.args, "any", False):
        rows = _over(rows) or rows
    match goal:
        case "done":
            return 0
        case "success":
            return check_code(rows)
        case _:
            # Ended before it ever got there: it cannot be reached any more.
            missed = [r for r in rows if r.phase in FINISHED and not _was_there(r, goal)]
            never = "without a checkpoint" if goal == "checkpoint" else "and never ran"
            for row in missed[:3]:
                call.note(f"task {row.id} ended {never}")
            return 1 if missed else 0


def _was_there(row: TaskRow, goal: str) -> bool:
    return row.attempt > 0 if goal == "running" else row.checkpoint > 0


# --- logs -------------------------------------------------------------------------------------


def logs_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `logs`."""
    selectors.add_options(parser, many=False)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the task is done")
    parser.add_argument(
        "-n", "--lines", metavar="N", type=units.whole(0), help="only the last N lines"
    )
    parser.add_argument("--no-markers", action="store_true", help="without lines of the daemon's")


def logs(call: Call) -> int:
    """Print the output of tasks."""
    call.takes()
    select = call.select(default_last=True)
    lines = call.args.lines
    markers = Markers(call.note) if call.args.no_markers else None
    if call.args.follow:
        task = call.one_id(select)
        start = 0 if lines is None else tail(call, task, lines)
        follow(call, task, start, markers=markers)
        return 0
    ids = select.ids or tuple(row.id for row in call.rows(select))
    for place, task in enumerate(ids):
        if len(ids) > 1:
            call.out([*([""] if place else []), f"==> task {task} <=="])
        start = 0 if lines is None else tail(call, task, lines)
        if not follow(call, task, start, once=True, markers=markers) and not start:
            _say_silent(call, task)
    return 0


def _say_silent(call: Call, task: int) -> None:
    """Tell why there is no output, where the task never started."""
    rows = call.rows(_ids([task]))
    if rows[0].attempt == 0:
        state = words.state_text(rows[0], time.time_ns())
        call.note(f"task {task} has never started, so it has no output; it is {state}")
