"""Verbs that make batches run: batch submit, run, retry, wait.

A batch is a directory of its user. `submit` makes it ready and submits one ordinary task that
works it off; `run` works it off right here, without a daemon. Either way nothing that has a
result runs again. Read next: `batch_spec.py` (words to spec), `ckptd/batch/runner.py` (the work).
"""

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from ckptctl import batch_spec, batch_words, spec, units, words
from ckptctl.batch_files import Batch, ask_json, become, report, runner
from ckptctl.batch_look import LOOK_S, active_task, check_code
from ckptctl.call import Call
from ckptctl.follow import Markers, follow
from ckptctl.render import json_text
from ckptctl.run import resolve_last
from ckptctl.selectors import STUCK
from ckptd.protocol import limits
from ckptd.protocol.errors import Conflict, Rejected, TimedOut, Unreachable
from ckptd.protocol.messages import (
    FINISHED,
    Cancel,
    Changed,
    Selector,
    Submit,
    Submitted,
    TaskRow,
    Wait,
    Waited,
)

Ready = dict[str, Any]
"""What `prepare` answers."""
SAY_S: Final = 30.0  # between two lines about it, where there is no terminal


# --- submit, run, retry ---------------------------------------------------------------------------


def batch_submit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `batch submit`."""
    batch_spec.add_options(parser)
    batch_spec.add_task_options(parser)
    _add_staying(parser)


def _add_staying(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("and then")
    group.add_argument("--wait", action="store_true", help="return with its exit code once done")
    group.add_argument("--follow", action="store_true", help="follow its output to the end")


def batch_submit(call: Call) -> int:
    """Make a batch ready and submit the task that works it off."""
    name, made = batch_spec.batch_of(call.args, has_stdin=_has_stdin())
    return _submit(call, name, lambda more: _prepared(call, name, made, more), made["cwd"])


def batch_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `batch run`."""
    batch_spec.add_options(parser)


def batch_run(call: Call) -> int:
    """Make a batch ready and work it off here, with the exit code that it comes to."""
    if not call.args.dry_run:
        call.takes()
    name, made = batch_spec.batch_of(call.args, has_stdin=_has_stdin())
    return _run_here(call, _prepared(call, name, made, []))


def batch_retry_options(parser: argparse.ArgumentParser) -> None:
    """Add the batch, which of its items, and what `batch submit` has beside."""
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--here", action="store_true", help="run it here, as `batch run` does")
    batch_spec.add_selection(parser)
    batch_spec.add_pace(parser)
    batch_spec.add_task_options(parser)
    _add_staying(parser)


def batch_retry(call: Call) -> int:
    """Go on with a batch as it was last submitted, the same items and the same command."""
    args = call.args
    found = report(args.name)
    pace = {"limit": 0, **batch_spec.pace_of(args)}  # the rest is as it was
    args.allow_empty = True

    def prepared(more: list[str]) -> Ready:
        return _prepared(call, found.name, pace, more)

    if args.here:
        return _run_here(call, prepared([]))
    return _submit(call, found.name, prepared, found.cwd)


def _has_stdin() -> bool:
    """Tell whether items may come from stdin unasked: it is a pipe or a file."""
    try:
        return not sys.stdin.isatty() and os.fstat(0).st_rdev != os.stat(os.devnull).st_rdev
    except (OSError, ValueError, AttributeError):  # closed
        return False


def _prepared(call: Call, name: str, made: dict[str, Any], more: list[str]) -> Ready:
    """Make the directory of a batch ready, and tell what there is about it."""
    import json  # noqa: PLC0415 (most verbs have none)

    words_ = ["prepare", name, *batch_spec.selection_words(call.args), *more]
    text = json.dumps(made)
    if made.get("items", {}).get("from") == "stdin":
        ready = ask_json([*words_, "--spec", text])
    else:
        ready = ask_json([*words_, "--spec", "-"], text.encode())
    if "--dry-run" not in more:
        for warning in ready["warnings"]:
            call.note(words.clean(warning))
    return ready


def _run_here(call: Call, ready: Ready) -> int:
    if call.args.dry_run:
        return _told_dry(call, ready)
    _check_idle(ready)
    call.note(ready_text(ready))
    return become(["run", ready["dir"]])


def _check_idle(ready: Ready) -> None:
    """Raise Conflict where a runner works on the batch right now."""
    if ready["running_pid"]:
        task, pid = ready["running_task"], ready["running_pid"]
        by = f"task {task}" if task else f"process {pid}"
        raise Conflict(
            f"batch {ready['name']} is being worked off already, by {by}",
            f"wait: ckptctl batch wait {ready['name']};"
            f" or stop it: {f'ckptctl cancel {task}' if task else f'kill {pid}'}",
        )


def _submit(call: Call, name: str, prepared: Callable[[list[str]], Ready], cwd: str) -> int:
    if call.args.dry_run:
        return _told_dry(call, prepared([]))
    for option in ("after", "after_fail", "after_any"):
        resolve_last(call, getattr(call.args, option) or [])
    task = active_task(call, name)  # where no daemon is, this says so before anything is changed
    if task is not None:
        return _already(call, name, task, prepared(["--dry-run"]))
    ready = prepared([])
    _check_idle(ready)
    if not ready["todo"]:
        call.note(ready_text(ready))
        call.note(f"nothing is left to do: ckptctl batch status {name}")
        return check_code(report(name)) if call.args.wait or call.args.follow else 0
    try:
        number, is_new = _submitted(call, ready, cwd)
    except Rejected:  # the batch was made ready before
        call.note(f"{ready_text(ready)}; it stays, but no task was made to run it")
        raise
    call.note(f"{ready_text(ready)}{'' if is_new else ' (submitted before)'}")
    return _stay(call, name, number, ready, is_new=is_new)


def _already(call: Call, name: str, task: TaskRow, ready: Ready) -> int:
    """A task of this batch is not over: the same again is that task, anything else must wait."""
    args = call.args
    state = words.state_text(task, time.time_ns())
    is_same = not (ready["new"] or ready["vanished"] or args.fresh or args.only
                   or args.errors or args.failed or args.status)  # fmt: skip
    if task.phase in STUCK:
        raise Conflict(
            f"batch {name} has task {task.id}, which is {state}",
            f"why: ckptctl explain {task.id}; again: ckptctl release {task.id};"
            f" or give it up: ckptctl quarantine drop {task.id}",
        )
    if not is_same:
        raise Conflict(
            f"batch {name} is not over yet: task {task.id} is {state}",
            f"wait: ckptctl batch wait {name}; or stop it: ckptctl cancel {task.id}",
        )
    call.note(f"batch {name}: task {task.id} is {state} with the same items already")
    return _stay(call, name, task.id, ready, is_new=False)


def _submitted(call: Call, ready: Ready, cwd: str) -> tuple[int, bool]:
    """Submit the task; two who do it at once get the same one, by its key."""
    args, name = call.args, ready["name"]
    own = Selector(all=True, labels={"batch": name})
    last = max((row.id for page in call.pages(own) for row in page.tasks), default=0)
    place = hashlib.sha256(ready["dir"].encode(errors="surrogateescape")).hexdigest()[:8]
    key = f"batch:{name}:{place}:{last}"
    task = batch_spec.task_of(args, name, key, runner(ready["dir"]), cwd)
    env, lost = spec.environment(args, [task])
    if lost:
        call.note(f"left out of the environment, not UTF-8: {', '.join(lost)}")
    env["PWD"] = cwd
    answer = call.ask("submit", Submit((task,), env), Submitted)
    return answer.ids[0], answer.created[0]


def ready_text(ready: Ready) -> str:
    """Return `batch ping-3f9a1c: 120 items, 20 of them new, 100 done, 20 to do`."""
    parts = [f"{ready['items']} item{'' if ready['items'] == 1 else 's'}"]
    if ready["known"] and ready["new"]:
        parts.append(f"{ready['new']} of them new")
    if ready["done"]:
        parts.append(f"{ready['done']} done")
    if ready["again"]:
        parts.append(f"{ready['again']} of them again")
    if ready["todo"] > ready["again"] or not ready["again"]:
        parts.append(f"{ready['todo'] - ready['again']} to do")
    return f"batch {ready['name']}: {', '.join(parts)}"


def _told_dry(call: Call, ready: Ready) -> int:
    """Tell what would run: the keys on stdout, the rest beside."""
    call.takes("json")
    if call.style.form == "json":
        call.out([json_text({"batch": ready})])
        return 0
    call.out(words.clean(key) for key in ready["would_run"])
    more = ready["todo"] - len(ready["would_run"])
    if more > 0:
        call.note(f"... and {more} more")
    call.note(f"{ready_text(ready)}; nothing was changed")
    return 0


# --- staying with it ------------------------------------------------------------------------------


def _stay(call: Call, name: str, task: int, ready: Ready, *, is_new: bool) -> int:
    args = call.args
    if call.is_for_people and sys.stdout.isatty():
        call.out([f"task {task}: batch {name}"])
    elif call.is_for_people or call.style.is_quiet or call.style.form == "name":
        call.out([str(task)])
    else:
        call.takes("json", "jsonl")
        call.out([json_text({"batch": ready, "task": task, "created": is_new})])
    sys.stdout.flush()
    if args.follow:
        return _followed(call, name, task)
    if args.wait:
        return _stayed(call, name, task, float("inf"))
    if is_new and sys.stderr.isatty():
        call.note(f"how it is: ckptctl batch status {name}")
    return 0


def _followed(call: Call, name: str, task: int) -> int:
    """Copy the output to its end; Ctrl-C leaves the batch running."""
    try:
        follow(call, task, 0, markers=Markers(call.note))
        return _waited(call, name, task, float("inf"))
    except KeyboardInterrupt:
        call.note(f"batch {name} goes on; to see it again: ckptctl logs -f {task}")
        return 130


def batch_wait_options(parser: argparse.ArgumentParser) -> None:
    """Add the batch."""
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "--timeout", metavar="TIME", type=units.parse_duration,
        help="give up after this long, exit 124",
    )  # fmt: skip
    parser.add_argument("--cancel-on-interrupt", action="store_true", help="Ctrl-C cancels it")


def batch_wait(call: Call) -> int:
    """Return once a batch is at rest, with the exit code it came to."""
    call.takes()
    args = call.args
    until = float("inf") if args.timeout is None else time.monotonic() + args.timeout
    call.until_mono_s = until + 1.0 if args.timeout else float("inf")
    batch = report(args.name)
    task = None
    if not batch.is_locked or (batch.runs and batch.runs[-1].task):
        task = _task_of(call, batch) if batch.todo or batch.is_locked else None
    return _stayed(call, batch.name, None if task is None else task.id, until)


def _task_of(call: Call, batch: Batch) -> TaskRow | None:
    """Return its task; None without a daemon, too, where it never was but worked off here."""
    try:
        return active_task(call, batch.name)
    except Unreachable:
        if not batch.runs or any(run.task for run in batch.runs):
            raise
        call.note(f"no daemon answers, and none ever ran batch {batch.name}")
        return None


def _stayed(call: Call, name: str, task: int | None, until: float) -> int:
    """Wait for the task, or for a runner of no daemon; tell at Ctrl-C what goes on."""
    try:
        if task is None:
            return _settled(call, name, until)
        return _waited(call, name, task, until)
    except KeyboardInterrupt:
        is_to_end = getattr(call.args, "cancel_on_interrupt", False)
        if is_to_end and task is not None:
            call.ask("cancel", Cancel(Selector(ids=(task,)), reason="Ctrl-C"), Changed)
            call.note(f"batch {name}: task {task} is being cancelled")
        else:
            nobody_s = " (no task of the daemon's runs it)" if is_to_end else ""
            call.note(f"batch {name} goes on{nobody_s}; {_again(name)}")
        return 130


def _again(name: str) -> str:
    return f"how it is: ckptctl batch status {name}; to wait again: ckptctl batch wait {name}"


def _waited(call: Call, name: str, task: int, until: float) -> int:
    """Wait for the task; return the exit code of the batch."""
    line = _Line(call, name)
    try:
        row = _ended(call, name, task, until, line)
    finally:
        line.clear()
    return _verdict(call, name, row)


def _ended(call: Call, name: str, task: int, until: float, line: "_Line") -> TaskRow:
    """Return the task once it has ended. Raises TimedOut."""
    while True:  # Bound: `until`, or the task's end
        hold_s = min(LOOK_S, max(0.0, until - time.monotonic()), limits.HOLD_S_MAX)
        asked = Wait(Selector(ids=(task,)), "done", False, hold_s)
        answer = call.wait_for("wait", asked, Waited, until + 1.0)
        row = answer.tasks[0]
        line.show(row)
        if answer.met and row.phase in FINISHED:
            return row
        if time.monotonic() >= until:
            state = words.state_text(row, time.time_ns())
            text = f"batch {name} is not done in time: task {task} is {state}"
            raise TimedOut(text, f"it goes on; {_again(name)}")


def _verdict(call: Call, name: str, row: TaskRow) -> int:
    """Say how it ended; return what whoever asks later gets, from the batch alone."""
    batch = report(name)
    call.note(f"batch {name}: {batch_words.done_text(batch)} done, {_results(batch)}")
    is_its_own = row.phase == "failed" and row.cause == "exit" and not batch.todo
    if row.phase != "succeeded" and not is_its_own:
        call.note(words.outcome_text(row))
        for step in batch_words.next_steps(batch, row if row.phase in STUCK else None):
            call.aside(f"→ {step}")
    return check_code(batch)


def _results(batch: Batch) -> str:
    return batch_words.counts_text(batch) or "no results"


def _settled(call: Call, name: str, until: float) -> int:
    """Wait for a runner that no daemon knows; at rest, say how the batch stands."""
    line = _Line(call, name)
    try:
        batch = _at_rest(name, until, line)
    finally:
        line.clear()
    call.note(f"batch {name}: {batch_words.done_text(batch)} done, {_results(batch)}")
    return check_code(batch)


def _at_rest(name: str, until: float, line: "_Line") -> Batch:
    while True:  # Bound: `until`, or the runner's end
        batch = report(name)
        if not batch.is_locked:
            return batch
        line.show_batch(batch)
        if time.monotonic() >= until:
            raise TimedOut(f"batch {name} is not done in time", f"it goes on; {_again(name)}")
        time.sleep(max(0.0, min(LOOK_S, until - time.monotonic())))


class _Line:
    """One line about progress: redrawn on a terminal, else said again now and then."""

    def __init__(self, call: Call, name: str) -> None:
        self._call = call
        self._name = name
        self._is_live = sys.stderr.isatty() and not call.style.is_quiet
        self._said = ""
        self._next_s = time.monotonic() + SAY_S

    def show(self, row: TaskRow) -> None:
        """Show the task's own word on its progress."""
        eta = words.eta_text(row)
        bar = words.bar_text(row, 24) if row.progress else ""
        state = words.state_text(row, time.time_ns()) if row.phase != "running" else ""
        self._tell(" ".join(filter(None, (state, bar, eta and f"{eta} left"))) or row.phase)

    def show_batch(self, batch: Batch) -> None:
        """Show what the ledger says."""
        eta = batch_words.eta_text(batch)
        self._tell(f"{batch_words.done_text(batch)} done{eta and f', {eta} left'}")

    def _tell(self, text: str) -> None:
        if self._is_live:
            sys.stderr.write(f"\r\x1b[K{self._name}: {text}")
            sys.stderr.flush()
        elif time.monotonic() >= self._next_s and text != self._said:
            self._next_s, self._said = time.monotonic() + SAY_S, text
            self._call.note(f"batch {self._name}: {text}")

    def clear(self) -> None:
        """Leave no trace on a terminal."""
        if self._is_live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
