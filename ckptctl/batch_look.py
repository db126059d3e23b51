"""Verbs that look at batches: batch status, items, export, logs; and gc, which clears them away.

They read the directories of batches, with or without a daemon; from it comes what it knows of the
tasks that run them. Read next: `batch_words.py`, `batch_files.py`.
"""

import argparse
import shlex
import subprocess
import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ckptctl import batch_words, units, words
from ckptctl.batch_files import (
    Batch,
    Trouble,
    ask,
    ask_json,
    attended,
    become,
    check_name,
    report,
    reports,
)
from ckptctl.batch_spec import statuses_of
from ckptctl.call import Call
from ckptctl.render import Column, Listing, facts_lines, json_text, table_lines
from ckptctl.selectors import ACTIVE, PENDING, STUCK
from ckptctl.units import duration_text
from ckptd.protocol.errors import BadRequest, CkptdError, Unavailable
from ckptd.protocol.messages import FINISHED, Selector, TaskRow, Wait, Waited

_NOT_OVER: Final = ACTIVE + PENDING + STUCK
_AT_WORK: Final = ("starting", "running", "stopping")
LOOK_S: Final = 1.0  # between two looks at a batch that somebody waits for
_ITEMS_SHOWN: Final = 1_000  # of a table for people; every other format has all


class Seen(msgspec.Struct, frozen=True):
    """A batch, and the task that is about to run it or does, where the daemon knows one."""

    batch: Batch
    task: TaskRow | None = None


# --- status -------------------------------------------------------------------------------------


def batch_status_options(parser: argparse.ArgumentParser) -> None:
    """Add the batch."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="one in detail; all without it")
    parser.add_argument(
        "--check", action="store_true",
        help="print nothing; exit 0 if all is done without error, 1 with errors, 3 if unfinished",
    )  # fmt: skip


def batch_status(call: Call) -> int:
    """List batches, or show one."""
    name = call.args.name
    if not (name or call.args.check) and (call.style.is_quiet or call.style.form == "name"):
        call.out(batch.name for batch in reports(how="brief"))
        return 0
    batches = [report(name)] if name else sorted(reports(), key=_rank)
    if call.args.check:
        codes = [check_code(batch) for batch in batches]
        return 3 if 3 in codes else max(codes, default=0)
    seen = _with_tasks(call, batches)
    if name and call.is_for_people:
        call.out(_detail(call, seen[0]))
        return 0
    call.show(_listing(seen, time.time_ns()))
    if not seen:
        call.aside("no batches yet; try: ckptctl batch run wc -c ::: /etc/*.conf")
    return 0


def _rank(batch: Batch) -> tuple[bool, int]:
    """What is not finished comes first, then what changed last."""
    return not (batch.todo or batch.is_locked or batch.problem), -batch.changed_ns


def check_code(batch: Batch) -> int:
    """Return 0 where every item is done without error, 1 with errors, 3 where some are not."""
    if batch.problem:
        return 1
    return 3 if batch.todo or batch.is_locked else 1 if batch.errors else 0


def active_task(call: Call, name: str) -> TaskRow | None:
    """Return the task that runs a batch or will; None where there is none. Asks the daemon."""
    select = Selector(all=True, labels={"batch": name}, phases=_NOT_OVER)
    rows = [row for page in call.pages(select) for row in page.tasks if row.name == f"batch:{name}"]
    return rows[-1] if rows else None


def _with_tasks(call: Call, batches: Sequence[Batch]) -> list[Seen]:
    """Add what the daemon knows; where none answers, or none is needed, the files alone speak."""
    seen: list[Seen] = []
    is_there = not (call.style.is_quiet or call.style.form == "name")
    for batch in batches:
        task = None
        if is_there and not batch.problem and (batch.todo or batch.is_locked or not batch.runs):
            try:
                task = active_task(call, batch.name)
            except CkptdError as error:
                is_there = False
                if error.code != "unreachable":
                    call.note(f"the daemon does not tell about its tasks: {error.message}")
        seen.append(Seen(batch, task))
    return seen


def _data(seen: Seen, now_ns: int) -> dict[str, Any]:
    batch = seen.batch
    ended = batch.runs[-1].task if batch.runs else 0
    return {
        **msgspec.structs.asdict(batch),
        "state": batch_words.state_word(batch, seen.task),
        "state_text": batch_words.state_text(batch, seen.task, now_ns),
        "eta_s": batch.todo / batch.rate_per_s if batch.rate_per_s and batch.is_locked else None,
        "task": (seen.task.id if seen.task else ended) or None,
        "phase": seen.task.phase if seen.task else None,
    }


def _listing(seen: Sequence[Seen], now_ns: int) -> Listing:
    rows = [_data(one, now_ns) for one in seen]
    of = dict(zip(map(id, rows), seen, strict=True))

    def text(function: Any) -> Any:
        return lambda row: function(of[id(row)].batch)

    def count(status: str) -> Any:
        return lambda row: str(row["counts"].get(status) or "")

    columns = (
        Column("name", lambda row: row["name"], shrink=12),
        Column("state", lambda row: row["state_text"], shrink=16,
               paint=lambda row: batch_words.paint_of(of[id(row)].batch, of[id(row)].task)),
        Column("done", text(batch_words.done_text), is_right=True),
        *(Column(status, count(status), title, is_right=True, drop=drop)
          for status, title, drop in (("pass", "", 3), ("fail", "", 0), ("error", "", 0),
                                      ("skipped", "", 4), ("quarantined", "quar", 0))),
        Column("rate", text(batch_words.rate_text), is_right=True, drop=2),
        Column("eta", text(batch_words.eta_text), is_right=True, drop=1),
        Column("waited", lambda row: duration_text(row["wait_s"]) if row["wait_s"] else "",
               is_right=True, drop=5),
        Column("task", lambda row: str(row["task"] or ""), is_right=True),
        Column("runs", lambda row: str(len(row["runs"]) or ""), is_right=True, is_wide=True),
        Column("size", lambda row: units.size_text(row["bytes"]), is_right=True, is_wide=True),
        Column("age", lambda row: units.age_text((now_ns - row["changed_ns"]) / units.SECOND_NS),
               is_right=True, is_wide=True),
        Column("command", text(batch_words.command_text), shrink=14, is_wide=True),
        Column("dir", lambda row: words.clean(row["dir"]), is_wide=True),
        Column("problem", lambda row: words.clean(row["problem"]), shrink=20),
    )  # fmt: skip
    return Listing("batches", rows, columns, lambda row: str(row["name"]))


def _detail(call: Call, seen: Seen) -> list[str]:
    batch, task, utc = seen.batch, seen.task, call.clock_utc
    now_ns = time.time_ns()
    paint = batch_words.paint_of(batch, task) if call.style.has_color else ""
    state = batch_words.state_text(batch, task, now_ns)
    share = f" ({batch.done * 100 // batch.total}%)" if batch.total else ""
    speed = ", ".join(filter(None, (batch_words.rate_text(batch), _left(batch))))
    ran_by = task.id if task else batch.runs[-1].task if batch.runs else 0
    lines = facts_lines(
        (
            ("batch", batch.name),
            ("state", f"\x1b[{paint}m{state}\x1b[0m" if paint else state),
            ("problem", words.clean(batch.problem)),
            ("items", "" if batch.problem else f"{batch.done} of {batch.total} done{share}"),
            ("results", batch_words.counts_text(batch)),
            ("speed", speed),
            ("command", batch_words.command_text(batch)),
            ("directory", words.clean(batch.cwd)),
            ("list", words.clean(batch.source)),
            ("made", units.clock_text(batch.made_ns, utc=utc)),
            ("runs", batch_words.runs_text(batch, utc=utc)),
            ("pauses", batch_words.pauses_text(batch, utc=utc)),
            ("task", str(ran_by or "")),
            ("archived", "by --fresh: " + str(batch.archived) if batch.archived else ""),
            ("files", f"{words.clean(batch.dir)} ({units.size_text(batch.bytes)})"),
        ),
        call.style,
    )
    if batch.troubles:
        style = msgspec.structs.replace(call.style, width=max(0, call.style.width - 2))
        bold = ("\x1b[1m", "\x1b[0m") if call.style.has_color else ("", "")
        lines += ["", f"{bold[0]}what went wrong{bold[1]}"]
        lines += [f"  {line}" for line in table_lines(_TROUBLES, batch.troubles, style)]
    steps = batch_words.next_steps(batch, task)
    return [*lines, *([""] if steps else []), *(f"→ {step}" for step in steps)]


def _left(batch: Batch) -> str:
    eta = batch_words.eta_text(batch)
    return f"{eta} left" if eta else ""


def _trouble_paint(row: Trouble) -> str:
    return batch_words.PAINT.get(row.status, "")


_TROUBLES: Final = (
    Column("count", lambda row: str(row.count), is_right=True),
    Column("status", lambda row: row.status, paint=_trouble_paint),
    Column("first", lambda row: words.clean(row.key), shrink=16),
    Column("text", lambda row: words.clean(row.text) or "(no text)", shrink=20),
)


# --- items --------------------------------------------------------------------------------------


def batch_items_options(parser: argparse.ArgumentParser) -> None:
    """Add the batch and which of its items."""
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "--status", metavar="S[,S]", action="append", default=[],
        help="items with these: pass, fail, error, skipped, quarantined, todo",
    )  # fmt: skip
    parser.add_argument("--todo", action="store_true", help="items without a result")
    parser.add_argument("--key", metavar="KEY", action="append", default=[], help="this item")


def batch_items(call: Call) -> int:
    """List items and what they came to; 4 where a named one is not there."""
    args = call.args
    check_name(args.name)
    chosen = [*args.status, *(["todo"] if args.todo else [])]
    options = [f"--status={word}" for word in statuses_of(chosen, ("todo",))]
    said = ask(["items", args.name, *options, *(f"--key={key}" for key in args.key)])
    rows = [msgspec.json.decode(line) for line in said.splitlines()]
    hidden = len(rows) - _ITEMS_SHOWN if call.is_for_people else 0
    call.show(Listing("items", rows[:_ITEMS_SHOWN] if hidden > 0 else rows, _ITEMS,
                      lambda row: str(row["key"]), {"batch": args.name}))  # fmt: skip
    if hidden > 0:
        call.note(f"{hidden} more are not shown; all: -o jsonl, or ckptctl batch export")
    if not rows:
        call.note(f"no item of {args.name} fits" if chosen or args.key else "there are no items")
    return 0


def _value_text(row: dict[str, Any]) -> str:
    value = row["text"] or row["result"]
    if value is None:
        return ""
    return words.clean(value if isinstance(value, str) else msgspec.json.encode(value).decode())


_ITEMS: Final = (
    Column("key", lambda row: words.clean(row["key"]), shrink=16),
    Column("status", lambda row: row["status"],
           paint=lambda row: batch_words.PAINT.get(row["status"], "")),
    Column("tries", lambda row: str(row["tries"] or ""), is_right=True, drop=3),
    Column("time", lambda row: "" if row["took_s"] is None else duration_text(row["took_s"]),
           is_right=True, drop=2),
    Column("lane", lambda row: "" if row["lane"] is None else str(row["lane"]),
           is_right=True, drop=4),
    Column("run", lambda row: str(row["run"] or ""), is_right=True, is_wide=True),
    Column("ended", lambda row: units.clock_text(row["at_ns"] or 0), is_wide=True),
    Column("result", _value_text, shrink=20),
)  # fmt: skip


# --- export, logs ---------------------------------------------------------------------------------


def batch_export_options(parser: argparse.ArgumentParser) -> None:
    """Add the batch and which results."""
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "--status", metavar="S[,S]", action="append", default=[], help="results with these alone"
    )


def batch_export(call: Call) -> int:
    """Print every result with its item, as JSON lines unless -o says csv or json."""
    call.takes("jsonl", "json", "csv")
    form = call.style.form if call.style.form in ("json", "csv") else "jsonl"
    check_name(call.args.name)
    options = [f"--status={word}" for word in statuses_of(call.args.status)]
    return become(["export", call.args.name, f"--format={form}", *options])


def batch_logs_options(parser: argparse.ArgumentParser) -> None:
    """Add the batch and which output."""
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("-f", "--follow", action="store_true", help="go on while the batch runs")
    parser.add_argument(
        "-n", "--lines", metavar="N", type=units.whole(0), help="only the last N lines"
    )
    parser.add_argument("--key", metavar="KEY", help="the output of this item alone")


def batch_logs(call: Call) -> int:
    """Print the output of items, oldest run first; follow it through whatever they wait for."""
    call.takes()
    args = call.args
    check_name(args.name)
    if args.key is not None and (args.follow or args.lines is not None):
        raise BadRequest(
            f"--key prints all that {args.key!r} has printed; -f and -n are for a whole batch",
            f"leave one out: ckptctl batch logs {args.name} --key {shlex.quote(args.key)}",
        )
    options = [*(["--follow"] if args.follow else []),
               *([f"--lines={args.lines}"] if args.lines is not None else []),
               *([f"--key={args.key}"] if args.key is not None else [])]  # fmt: skip
    command = ["logs", args.name, *options]
    if args.follow and args.key is None:
        (seen,) = _with_tasks(call, [report(args.name)])
        if seen.task is not None:
            return _followed(call, args.name, seen.task.id, command)
        if not seen.batch.is_locked:
            state = batch_words.state_text(seen.batch, None, time.time_ns())
            steps = batch_words.next_steps(seen.batch, None)
            call.note("; ".join([f"nobody runs batch {args.name} now, it is {state}", *steps[:1]]))
    return become(command)


def _followed(call: Call, name: str, task: int, command: Sequence[str]) -> int:
    """Copy what items print until the task is over, whatever that waits for in between."""
    with attended(command) as process:
        row = _until_over(call, name, task, process)
    if row is not None and row.phase != "succeeded":
        call.note(f"batch {name}: {batch_words.rests_text(row, time.time_ns())}")
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _until_over(
    call: Call, name: str, task: int, process: "subprocess.Popen[bytes]"
) -> TaskRow | None:
    """Tell what the task waits for; return how it ended.

    None where the reader went first, or the daemon: what a runner still prints, the reader copies.
    """
    asked = Wait(Selector(ids=(task,)), hold_s=LOOK_S)
    said = "", "", 0
    while process.poll() is None:  # Bound: the task's end
        try:
            (row,) = call.ask("wait", asked, Waited).tasks
        except Unavailable as away:
            call.note(f"{away.message}; what is printed until the runner ends comes all the same")
            return None
        if row.phase in FINISHED:
            return row
        state = row.phase, row.reason, row.until_ns
        if state != said and row.phase not in _AT_WORK:
            call.note(f"batch {name}: {batch_words.rests_text(row, time.time_ns())}")
        said = state
    return None


# --- gc -----------------------------------------------------------------------------------------


def batch_gc_options(parser: argparse.ArgumentParser) -> None:
    """Add which batches."""
    parser.add_argument("names", metavar="NAME", nargs="*", help="these; all without a name")
    parser.add_argument(
        "--older",
        metavar="TIME",
        type=units.parse_duration,
        help="unchanged for so long (default: 30d; 0 for named ones)",
    )
    parser.add_argument("--force", action="store_true", help="named ones that are unfinished, too")
    parser.add_argument("--archives", action="store_true", help="only what --fresh put away")
    parser.add_argument("--dry-run", action="store_true", help="only tell which")


def batch_gc(call: Call) -> int:
    """Remove finished batches that nobody has touched for a while."""
    call.takes("json", "jsonl")
    args = call.args
    if args.force and not args.names:
        raise BadRequest("--force is for batches that are named", "ckptctl batch gc NAME --force")
    for name in args.names:
        check_name(name)
    usual_s = 0.0 if args.names else 30 * 86_400.0
    older_s = usual_s if args.older is None else args.older
    options = [f"--older={older_s}", *(["--force"] if args.force else []),
               *(["--archives"] if args.archives else [])]  # fmt: skip
    found = ask_json(["gc", "--dry-run", *options, *args.names])
    if not args.dry_run:
        is_any = found["removed"] or found["archives"]
        if is_any and not call.confirm(f"remove {_what_goes(found)}?"):
            raise BadRequest("nothing was removed: it was not confirmed")
        found = ask_json(["gc", *options, *args.names])
    return _told(call, found)


def _what_goes(found: dict[str, Any]) -> str:
    """Return `2 batches and archives of 1 (12.0 MiB)`."""
    count, old = len(found["removed"]), len(found["archives"])
    parts = [f"{count} batch{'' if count == 1 else 'es'}"] if count else []
    parts += [f"what --fresh archived of {old}"] if old else []
    return f"{' and '.join(parts)} ({units.size_text(found['bytes'])})"


def _told(call: Call, found: dict[str, Any]) -> int:
    if call.style.form in ("json", "jsonl"):
        call.out([json_text(found)])
    elif call.style.is_quiet or call.style.form == "name":
        call.out(found["removed"])
    else:
        past = "would be removed" if call.args.dry_run else "removed"
        call.out(f"{name}: {past}" for name in found["removed"])
        call.out(f"{name}: archives {past}" for name in found["archives"])
    for name, why in found["kept"].items() if call.args.names else ():
        call.note(f"{name} is kept: {why}")
    if not (found["removed"] or found["archives"] or call.args.names):
        call.note("nothing to remove")
    return 1 if call.args.names and found["kept"] else 0
