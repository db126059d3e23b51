"""Verbs that change tasks: cancel, kill, signal, pause, resume, hold, release, drop, retry, ...

Each answers per task; one refused target of many makes it exit 1, the only target its own code.
A wide selection (--all, a filter, a glob) means the tasks that fit the verb: others are counted.
Read next: `selectors.py`.
"""

import argparse
from collections.abc import Sequence
from typing import Final

import msgspec

from ckptctl import selectors, units
from ckptctl.call import Call
from ckptctl.render import Column, Listing, json_text, plain
from ckptd.protocol.errors import BadRequest, Conflict, ErrorReply
from ckptd.protocol.messages import (
    Cancel,
    Changed,
    Clean,
    Drop,
    Edit,
    Hold,
    Kill,
    Message,
    Pause,
    Release,
    Resume,
    Retry,
    Selector,
    Signal,
    TaskChange,
)

_PAST: Final = {
    "cancel": "cancelled", "kill": "killed", "signal": "signalled", "pause": "paused",
    "resume": "resumed", "hold": "held", "release": "released", "drop": "dropped",
    "retry": "queued again", "edit": "changed", "clean": "cleaned",
    "clean_dry_run": "would be cleaned",
    "checkpoint_now": "asked to save",
}  # fmt: skip


_UNFIT: Final = {
    "cancel": "over already", "kill": "over already", "signal": "not running",
    "pause": "not running", "resume": "not paused", "hold": "started or over already",
    "release": "not held, quarantined or blocked", "drop": "not quarantined or blocked",
    "retry": "not over yet", "edit": "running", "checkpoint_now": "not running",
}  # fmt: skip
"""What tasks were that a wide selection named and a verb does not fit."""


def change(call: Call, verb: str, args: Message, said: str = "") -> int:
    """Send one change and tell what became of each task."""
    answer = call.ask(verb, args, Changed)
    return tell(call, verb, answer.tasks, getattr(args, "select", None), said)


def tell(
    call: Call,
    verb: str,
    tasks: Sequence[TaskChange],
    select: Selector | None = None,
    said: str = "",
) -> int:
    """Print the results, `said` of what was done; return 0, or what stands for the refusals."""
    unfit = [task for task in tasks if select is not None and _is_passed_over(task, select)]
    if not call.style.form.startswith("json"):
        tasks = [task for task in tasks if task not in unfit] if unfit else tasks
    refused = [task for task in tasks if task.error is not None and task not in unfit]
    done = [task for task in tasks if task.error is None]
    if call.is_for_people:
        call.out(
            f"task {task.id}: {said or _outcome(verb, task)}{_later(verb, task)}"
            for task in done[:20]
        )
        if len(done) > 20:
            call.out([f"... and {len(done) - 20} more {_PAST[verb]}"])
    elif call.style.form == "json":
        call.out([json_text({"tasks": [plain(task) for task in tasks]})])
    else:
        call.show(_listing(done if call.style.form != "jsonl" else tasks))
    for place, task in enumerate(refused):
        after = refused[place + 1].error if place + 1 < len(refused) else None
        _report(call, task, after, is_only=len(tasks) == 1)
    if unfit:
        verb_text = "was" if len(unfit) == 1 else "were"
        call.note(f"{len(unfit)} {verb_text} {_UNFIT.get(verb, 'not fit for it')}")
    if not tasks and not unfit:
        call.note("no task fits the selection")
        return 4
    if refused and len(tasks) == 1 and refused[0].error is not None:
        return refused[0].error.exit_code
    return 1 if refused else 0


def _is_passed_over(task: TaskChange, select: Selector) -> bool:
    """Tell whether a task is in the wrong phase and only a wide selection named it."""
    is_wide = select.all or bool(select.names)
    is_unfit = task.error is not None and task.error.code == Conflict.code
    return is_wide and is_unfit and task.id not in select.ids


def _outcome(verb: str, task: TaskChange) -> str:
    if verb in ("cancel", "kill") and task.phase == "stopping":
        return "is being stopped"
    if verb == "kill":  # of what did not run: nobody was killed, now or before
        return task.phase
    if verb == "retry" and task.phase != "queued":
        return f"put back, now {task.phase}"
    return f"{_PAST[verb]}, now {task.phase}" if verb == "release" else _PAST[verb]


def _later(verb: str, task: TaskChange) -> str:
    is_over = verb == "edit" and task.phase in selectors.ENDED
    return " (it has ended: this is for when it is retried)" if is_over else ""


def _report(call: Call, task: TaskChange, after: ErrorReply | None, *, is_only: bool) -> None:
    """Report one refusal; a hint that the one after it repeats is told there."""
    error = task.error or ErrorReply("error", "")
    if after is not None and after.hint == error.hint:
        error = msgspec.structs.replace(error, hint="")
    about = "" if is_only or f"task {task.id}" in error.message else f"task {task.id}: "
    call.problem(error, about)


def _listing(tasks: Sequence[TaskChange]) -> Listing:
    columns = (
        Column("id", lambda task: str(task.id), is_right=True),
        Column("phase", lambda task: task.phase),
    )
    return Listing("tasks", tasks, columns, lambda task: str(task.id))


def _chosen(call: Call, deed: str, *, ask: bool = False) -> Selector:
    """Return the selection; where it is --all, a person is asked first."""
    select = call.select()
    if ask and call.args.all and call.asks:
        phases = select.phases or _FIT.get(deed, ())
        wide = msgspec.structs.replace(select, phases=phases)
        count = sum(len(page.tasks) for page in call.pages(wide))
        if count and not call.confirm(f"{deed} {_tasks_text(count)}?"):
            raise BadRequest(f"nothing was done: {deed} was not confirmed")
    return select


_FIT: Final = {
    "cancel": selectors.ACTIVE + selectors.PENDING + selectors.STUCK,
    "kill": selectors.ACTIVE + selectors.PENDING + selectors.STUCK,
    "drop": selectors.STUCK,
    "retry": selectors.ENDED + selectors.STUCK,
}


def _tasks_text(count: int) -> str:
    return f"{count} task{'' if count == 1 else 's'}"


# --- stopping -----------------------------------------------------------------------------------


def cancel_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cancel`."""
    selectors.add_options(parser)
    parser.add_argument(
        "--grace", metavar="TIME", type=units.parse_duration,
        help="from the stop signal to SIGKILL",
    )  # fmt: skip
    parser.add_argument("--no-checkpoint", action="store_true", help="do not ask to save first")
    parser.add_argument("--reason", metavar="TEXT", default="", help="kept in the log")


def cancel(call: Call) -> int:
    """Stop tasks in order."""
    args = call.args
    select = _chosen(call, "cancel", ask=True)
    return change(call, "cancel", Cancel(select, args.grace, not args.no_checkpoint, args.reason))


def kill_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `kill`."""
    selectors.add_options(parser)
    parser.add_argument(
        "-s", "--signal", metavar="SIG", type=units.parse_signal,
        help="send this instead; task goes on",
    )  # fmt: skip
    parser.add_argument("--reason", metavar="TEXT", default="", help="kept in the log")


def kill(call: Call) -> int:
    """SIGKILL tasks, or send another signal."""
    select = _chosen(call, "kill", ask=True)
    if call.args.signal is not None:
        return change(call, "signal", Signal(select, call.args.signal, tree=True))
    return change(call, "kill", Kill(select, call.args.reason))


def signal_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `signal`."""
    parser.add_argument("--tree", action="store_true", help="to all of a task's processes")
    parser.add_argument(
        "signal", metavar="SIGNAL", type=units.parse_signal, help="USR1, SIGHUP, 10"
    )
    selectors.add_options(parser)


def signal(call: Call) -> int:
    """Send a signal."""
    select = _chosen(call, "signal")
    return change(call, "signal", Signal(select, call.args.signal, call.args.tree))


# --- plain changes ------------------------------------------------------------------------------


def pause_options(parser: argparse.ArgumentParser) -> None:
    """Add the selection."""
    selectors.add_options(parser)


resume_options = hold_options = release_options = drop_options = pause_options


def pause(call: Call) -> int:
    """Freeze tasks."""
    return change(call, "pause", Pause(_chosen(call, "pause")))


def resume(call: Call) -> int:
    """Thaw tasks."""
    return change(call, "resume", Resume(_chosen(call, "resume")))


def hold(call: Call) -> int:
    """Keep tasks from starting."""
    return change(call, "hold", Hold(_chosen(call, "hold")))


def release(call: Call) -> int:
    """Let tasks go on."""
    return change(call, "release", Release(_chosen(call, "release")))


def drop(call: Call) -> int:
    """Give tasks up."""
    return change(call, "drop", Drop(_chosen(call, "drop", ask=True)))


def retry_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `retry`."""
    selectors.add_options(parser)
    parser.add_argument("--fresh", action="store_true", help="from nothing, not the checkpoint")
    parser.add_argument(
        "--from-step", metavar="NAME", help="of one task: run this step and those after it again"
    )


def retry(call: Call) -> int:
    """Start ended tasks again."""
    if call.args.from_step is not None:
        from ckptctl.rewind import rewound  # noqa: PLC0415 (a plain retry does not pay for it)

        return change(call, "retry", Retry(rewound(call, call.args.from_step), False))
    return change(call, "retry", Retry(_chosen(call, "retry", ask=True), call.args.fresh))


def priority_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `priority`."""
    parser.add_argument("priority", metavar="N", type=units.whole(), help="higher starts first")
    selectors.add_options(parser)


def priority(call: Call) -> int:
    """Change priorities."""
    wanted = Edit(_chosen(call, "change"), priority=call.args.priority)
    return change(call, "edit", wanted, f"priority {wanted.priority}")


def clean_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `clean`."""
    selectors.add_options(parser)
    parser.add_argument(
        "--older", metavar="TIME", type=units.parse_duration, default=0.0,
        help="ended at least so long ago",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only tell which")


def clean(call: Call) -> int:
    """Forget ended tasks."""
    args = call.args
    select = call.select()
    if select.all and not select.phases:
        select = msgspec.structs.replace(select, phases=selectors.ENDED)
    older_s = args.older
    if select.all and not args.dry_run and call.asks:
        count = len(call.ask("clean", Clean(select, older_s, dry_run=True), Changed).tasks)
        question = f"forget {_tasks_text(count)}, and delete the files?"
        if count and not call.confirm(question):
            raise BadRequest("nothing was done: clean was not confirmed")
    answer = call.ask("clean", Clean(select, older_s, args.dry_run), Changed)
    if not answer.tasks:
        call.note("nothing to clean")
        return 0
    return tell(call, "clean_dry_run" if args.dry_run else "clean", answer.tasks)
