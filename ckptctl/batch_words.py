"""A batch in words: its state, its counts, what is left, and what a person may do about it.

The state comes from the daemon where a task of the batch is at hand, else from the runner's lock,
else from the ledger: a batch is a directory, and goes on without any of the others.
Read next: `batch_look.py`.
"""

import shlex
from typing import Final

from ckptctl import words
from ckptctl.batch_files import Batch, Run
from ckptctl.batch_spec import STATUSES
from ckptctl.units import SECOND_NS, clock_text, duration_text
from ckptd.protocol.messages import TaskRow

PAINT: Final = {
    "pass": "32", "fail": "31", "error": "31", "skipped": "2", "quarantined": "35", "todo": "",
    "finished": "2", "running": "32", "unfinished": "33", "new": "", "unreadable": "31",
}  # fmt: skip
"""ANSI colour of a status or state."""
BAD: Final = ("fail", "error", "quarantined")
_AGAIN: Final = {"fail": "--failed", "error": "--errors"}
_GO_ON: Final = {
    "held": "to let it go on: ckptctl release {}", "paused": "to let it go on: ckptctl resume {}",
}  # fmt: skip
_ENDS: Final = {
    "finished": "did what was asked for",
    "max_errors": "stopped at --max-errors",
    "interrupt": "interrupted",
    "terminated": "was told to stop",
    "parked": "parked until it may go on",
    "no_wait": "would have had to wait",
    "refused": "could not go on",
    "cancel": "cancelled",
    "shutdown": "stopped by a shutdown",
    "drill": "stopped by a drill",
}


def state_word(batch: Batch, task: TaskRow | None) -> str:
    """Return the state as one word."""
    if batch.problem:
        return "unreadable"
    if task is not None:
        return task.phase
    if batch.is_locked:
        return "running"
    if not batch.todo:  # nor of an empty list, which somebody allowed
        return "finished"
    return "unfinished" if batch.runs else "new"


def state_text(batch: Batch, task: TaskRow | None, now_ns: int) -> str:
    """Return the state with its reason, as in `waiting: rate limit, in 5m`."""
    if task is not None and not batch.problem:
        return words.state_text(task, now_ns)
    match state_word(batch, task):
        case "running":
            return "running" if batch.lock_pid < 0 else f"running here, pid {batch.lock_pid}"
        case "finished" if batch.errors:
            return "finished with errors"
        case "unfinished":
            end = end_text(batch.runs[-1])
            return f"unfinished: {end}" if end else "unfinished"
        case word:
            return word


def end_text(run: Run) -> str:
    """Return how a run of the runner ended; without an orderly end it was killed."""
    if not run.ended_ns:
        return "killed"
    return words.clean(_ENDS.get(run.end) or f"stopped ({run.end})")


def paint_of(batch: Batch, task: TaskRow | None) -> str:
    """Return the colour of a batch's state."""
    word = state_word(batch, task)
    return words.PAINT[word] if task is not None and word in words.PAINT else PAINT.get(word, "")


def done_text(batch: Batch) -> str:
    """Return `340/1000`."""
    return "" if batch.problem else f"{batch.done}/{batch.total}"


def counts_text(batch: Batch) -> str:
    """Return `pass 320, fail 15`."""
    counts = ((status, batch.counts.get(status, 0)) for status in STATUSES)
    return ", ".join(f"{status} {count}" for status, count in counts if count)


def rate_text(batch: Batch) -> str:
    """Return results a second, a minute or an hour, whichever reads best; "" at rest."""
    rate = batch.rate_per_s if batch.is_locked else 0.0
    for each_s, unit in ((1, "s"), (60, "m"), (3600, "h")):
        if rate * each_s >= 1:
            value = rate * each_s
            return f"{value:.0f}/{unit}" if value >= 10 else f"{value:.1f}/{unit}"
    return ""


def eta_text(batch: Batch) -> str:
    """Return the time that is left at the rate of late, "" where nobody works."""
    if not batch.todo or not batch.is_locked or batch.rate_per_s <= 0:
        return ""
    return duration_text(batch.todo / batch.rate_per_s)


def command_text(batch: Batch) -> str:
    """Return what is done with each item."""
    text = batch.command[0] if batch.is_function else shlex.join(batch.command)
    return words.clean(f"--python {text}" if batch.is_function else text)


def runs_text(batch: Batch, *, utc: bool) -> str:
    """Return how often the runner ran, and how it ended last."""
    if not batch.runs:
        return ""
    last = batch.runs[-1]
    began = f"the last began {clock_text(last.began_ns, utc=utc)}"
    if batch.is_locked:
        return f"{len(batch.runs)}, {began}"
    took = ""
    if last.ended_ns:
        took = f" after {duration_text((last.ended_ns - last.began_ns) / SECOND_NS)}"
    return f"{len(batch.runs)}, {began}, ended{took}: {end_text(last)}"


def pauses_text(batch: Batch, *, utc: bool) -> str:
    """Return how often and how long it waited for permission to go on."""
    if not batch.pause_count:
        return ""
    until = clock_text(batch.paused_until_ns, utc=utc)
    now = f", this one until {until}" if until else ""
    return f"{batch.pause_count}{now}; {duration_text(batch.wait_s)} waited in all"


def rests_text(row: TaskRow, now_ns: int) -> str:
    """Return how the task of a batch is that is not at work, and what to do about it."""
    step = _GO_ON.get(row.phase, "why: ckptctl explain {}").format(row.id)
    return f"task {row.id} is {words.state_text(row, now_ns)}; {step}"


def next_steps(batch: Batch, task: TaskRow | None) -> list[str]:
    """Return what a person may want to do now."""
    name = batch.name
    if batch.problem:
        return [f"look at its files: {batch.dir}"]
    if task is not None and task.phase in ("quarantined", "blocked"):
        return [f"why: ckptctl explain {task.id}", f"again: ckptctl release {task.id}"]
    if task is not None or batch.is_locked:
        return []
    steps = []
    if batch.todo:
        steps.append(f"to go on: ckptctl batch retry {name}")
    if bad := [status for status in BAD if batch.counts.get(status)]:
        steps.append(f"which went wrong: ckptctl batch items {name} --status {','.join(bad)}")
        again = _AGAIN.get(bad[0], "") if len(bad) == 1 else ""
        again = again or f"--status {','.join(bad)}"
        steps.append(f"those again: ckptctl batch retry {name} {again}")
    if not batch.todo and not batch.errors:
        steps.append(f"its results: ckptctl batch export {name}")
    return steps
