"""Verbs that look closer: show, explain, stats. Read next: `status.py`, `words.py`."""

import argparse
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from ckptctl import saving, selectors, units, words
from ckptctl.call import Call
from ckptctl.picture import Picture, labels_text, task_listing
from ckptctl.render import Column, facts_lines, json_line, json_text, plain, table_lines
from ckptctl.units import SECOND_NS, duration_text
from ckptd.protocol.errors import CkptdError, NotFound
from ckptd.protocol.messages import (
    PHASES,
    AttemptRow,
    CheckpointList,
    Checkpoints,
    Empty,
    Selector,
    Show,
    Stats,
    TaskDetail,
    TaskDetails,
    TaskRow,
)

DETAILS_MAX: Final = 100  # of one request

# --- show, explain ------------------------------------------------------------------------------


def show_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `show`."""
    selectors.add_options(parser)
    parser.add_argument("--env", action="store_true", help="show the environment too")


def show(call: Call) -> int:
    """Show all about tasks."""
    details = _details(call)
    is_data = not call.is_for_people
    if is_data and call.style.form not in ("json", "jsonl"):
        call.show(task_listing(Picture([d.row for d in details], {}), time.time_ns()))
        return 0
    saved = [_saved(call, detail) for detail in details]
    if is_data:
        rows = [
            {**plain(detail), "saving": dict(one.numbers), "result": one.result_value()}
            for detail, one in zip(details, saved, strict=True)
        ]
        call.out(
            [json_text({"tasks": rows})] if call.style.form == "json" else map(json_line, rows)
        )
        return 0
    for place, (detail, one) in enumerate(zip(details, saved, strict=True)):
        call.out([*([""] if place else []), *_detail_lines(call, detail, one)])
    return 0


class Saved(msgspec.Struct, frozen=True):
    """What a task's own files add to what the daemon knows of it."""

    numbers: Mapping[str, float | str] = {}
    result: str = ""  # JSON, "" for none

    def result_value(self) -> Any:
        """Return the result, None for none or null."""
        try:
            return msgspec.json.decode(self.result) if self.result else None
        except msgspec.DecodeError:  # such as half a pair of surrogates: still worth showing
            return self.result


def _saved(call: Call, detail: TaskDetail) -> Saved:
    """Ask for what saving cost and what a task came to, where there can be any of it."""
    row = detail.row
    is_over = row.phase == "succeeded"
    if not (row.checkpoint or is_over):
        return Saved()
    try:
        found = call.ask("checkpoints", Checkpoints(row.id, result=is_over), CheckpointList)
    except CkptdError as refused:  # all else is worth telling
        call.note(f"the files of task {row.id} cannot be looked at: {refused.message}")
        return Saved()
    numbers = next((one.numbers for one in found.checkpoints if one.valid), {})
    return Saved(numbers, found.result)


def _details(call: Call) -> tuple[TaskDetail, ...]:
    select = call.select(default_last=True)
    env = bool(getattr(call.args, "env", False))
    if select.all or select.names or len(select.ids) > DETAILS_MAX:
        ids = [row.id for row in call.rows(select)]
        selects = [
            Selector(ids=tuple(ids[place : place + DETAILS_MAX]))
            for place in range(0, len(ids), DETAILS_MAX)
        ]
    else:
        selects = [select]
    details: tuple[TaskDetail, ...] = ()
    for part in selects:
        details += call.ask("show", Show(part, env), TaskDetails).tasks
    if not details:
        raise NotFound("no task fits the selection", "see them all: ckptctl status --all")
    return details


def _detail_lines(call: Call, detail: TaskDetail, saved: Saved) -> list[str]:
    row = detail.row
    facts = _facts(call, detail, time.time_ns())
    if saved.result:
        facts.append(("result", saving.bounded(saved.result, saving.RESULT_CHARS_MAX)))
    lines = facts_lines(facts, call.style)
    if detail.attempts:
        lines += ["", *_titled(call, "attempts", _attempt_lines(call, detail.attempts))]
    how = facts_lines(saving.number_facts(saved.numbers, detail.attempts), call.style)
    if how:
        lines += ["", *_titled(call, "saving", how)]
    if detail.env is not None:
        pairs = [f"{name}={words.clean(value)}" for name, value in sorted(detail.env.items())]
        lines += ["", *_titled(call, "environment", pairs)]
    if row.phase != "succeeded":
        lines += ["", *_titled(call, "why", _wrapped(call, detail.explanation, 2))]
    return lines


def _titled(call: Call, title: str, lines: Sequence[str]) -> list[str]:
    bold = ("\x1b[1m", "\x1b[0m") if call.style.has_color else ("", "")
    return [f"{bold[0]}{title}{bold[1]}", *(f"  {line}" for line in lines)]


def _wrapped(call: Call, text: str, indent: int) -> list[str]:
    width = max(40, (call.style.width or 100) - indent)
    return textwrap.wrap(words.clean(text), width, break_long_words=False)


def _value_text(value: Any) -> str:
    return words.clean(value) if isinstance(value, str) else words.clean(str(value))


def _facts(call: Call, detail: TaskDetail, now_ns: int) -> list[tuple[str, str]]:
    row = detail.row
    paint = words.PAINT.get(row.phase, "") if call.style.has_color else ""
    state = words.state_text(row, now_ns)
    saved = ""
    if row.checkpoint:
        age = duration_text((now_ns - row.checkpoint_ns) / SECOND_NS) if row.checkpoint_ns else ""
        saved = f"{row.checkpoint}" + (f", {age} ago" if age else "")
    counts = f"{row.attempt} (failures {row.failures}, interruptions {row.interruptions})"
    return [
        ("task", str(row.id)),
        ("name", words.clean(row.name)),
        ("state", f"\x1b[{paint}m{state}\x1b[0m" if paint else state),
        ("progress", " ".join(filter(None, (words.progress_text(row), _said(row))))),
        ("command", words.command_text(row)),
        ("directory", words.clean(str(detail.spec.get("cwd", "")))),
        ("group", f"{row.group}, priority {row.priority}"),
        ("key", words.clean(row.key)),
        ("labels", labels_text(row)),
        ("user", words.user_text(row.uid)),
        ("submitted", units.clock_text(row.submitted_ns, utc=call.clock_utc)),
        ("started", units.clock_text(row.started_ns, utc=call.clock_utc)),
        (
            "last end" if row.phase in selectors.ACTIVE else "ended",
            units.clock_text(row.ended_ns, utc=call.clock_utc),
        ),
        ("runtime", words.runtime_text(row, now_ns)),
        ("attempts", counts if row.attempt else ""),
        ("pid", str(row.pid or "")),
        ("unit", detail.unit),
        ("invocation", detail.invocation),
        ("warning", words.clean(detail.warning)),
        *words.settings(detail.spec),
        ("checkpoint", saved),
        ("files", words.clean(detail.directory)),
        ("output", words.clean(detail.output)),
        ("... and in", f"journalctl CKPTD_TASK_ID={row.id}" if detail.spec.get("journal") else ""),
    ]


def _said(row: TaskRow) -> str:
    if row.progress is None:
        return ""
    eta = words.eta_text(row)
    text = words.clean(row.progress.text)
    return ", ".join(filter(None, (f"{eta} left" if eta else "", text)))


def _attempt_lines(call: Call, attempts: Sequence[AttemptRow]) -> list[str]:
    def end(row: AttemptRow) -> str:
        match row.cause:
            case "exit":
                return words.exit_text(row.blame, row.code)
            case "oom":
                return words.oom_text(row.blame, row.code)
            case "signal" if row.signal:
                return units.signal_name(row.signal)
        return row.cause or "running"

    def runtime(row: AttemptRow) -> str:
        took_ns = (row.ended_ns or time.time_ns()) - row.started_ns
        took = words.at_most(duration_text(took_ns / SECOND_NS), row.cause)
        return took if row.started_ns else ""

    def lost(row: AttemptRow) -> str:
        return words.at_most(saving.short_text(row.lost_s), row.cause) if row.lost_s else ""

    utc = call.clock_utc
    columns = (
        Column("try", lambda row: str(row.attempt), is_right=True),
        Column("started", lambda row: units.clock_text(row.started_ns, utc=utc)),
        Column("time", runtime, is_right=True),
        Column("end", end),
        Column("from", lambda row: f"checkpoint {row.checkpoint}" if row.checkpoint else ""),
        Column("lost", lost),
        Column("cpu", lambda row: duration_text(row.cpu_s) if row.cpu_s else "", is_right=True),
        Column("memory", lambda row: units.size_text(row.rss_bytes) if row.rss_bytes else ""),
        Column("seen", lambda row: words.clean(row.text), shrink=12),
    )
    style = msgspec.structs.replace(call.style, width=max(0, call.style.width - 2))
    return table_lines(columns, attempts, style)


def explain_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `explain`."""
    selectors.add_options(parser)


def explain(call: Call) -> int:
    """Say why tasks are where they are."""
    details = _details(call)
    if not call.is_for_people:
        rows = [
            {"id": d.row.id, "phase": d.row.phase, "explanation": d.explanation} for d in details
        ]
        lines = [json_text({"tasks": rows})] if call.style.form == "json" else map(json_line, rows)
        call.out(lines)
        return 0
    for place, detail in enumerate(details):
        head = f"task {detail.row.id} ({words.clean(detail.row.name)})"
        state = words.state_text(detail.row, time.time_ns())
        lines = [f"  {line}" for line in _wrapped(call, detail.explanation, 2)]
        hints = [f"  → {hint}" for hint in words.next_steps(detail.row)]
        call.out([*([""] if place else []), f"{head}: {state}", *lines, *hints])
    return 0


# --- stats -----------------------------------------------------------------------------------


def stats(call: Call) -> int:
    """Print totals and counters."""
    found = call.ask("stats", Empty(), Stats)
    if not call.is_for_people:
        call.out([json_text(plain(found))])
        return 0
    rows = [(phase, str(found.totals[phase])) for phase in PHASES if found.totals.get(phase)]
    call.out([*_titled(call, "tasks", facts_lines(rows or [("none", "0")], call.style))])
    for name, phases in sorted(found.groups.items()):
        counts = ", ".join(f"{count} {phase}" for phase, count in phases.items() if count)
        call.out([f"  group {name}: {counts or 'empty'}"])
    counters = [(name, units.number_text(value)) for name, value in sorted(found.counters.items())]
    call.out(["", *_titled(call, "since the daemon's start", facts_lines(counters, call.style))])
    return 0
