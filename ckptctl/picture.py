"""What a list of tasks shows: which tasks, in what order, in what columns, with which totals.

Without a selection a person at a terminal gets a digest (what is active, stuck and pending, and
the latest ends) however many tasks there are; a pipe gets every task, whatever the format.
Read next: `words.py`.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ckptctl import selectors, units, words
from ckptctl.call import Call
from ckptctl.render import Column, Listing, plain, plain_name
from ckptd.protocol.errors import BadRequest
from ckptd.protocol.messages import FINISHED, PHASES, Selector, Status, TaskPage, TaskRow

ENDED_SHOWN: Final = 10
PENDING_SHOWN: Final = 40
HELD_SHOWN: Final = 10
LIVE_SHOWN: Final = 100
FIRST_PAGE: Final = 200
PAGES_MAX: Final = 20  # of 5,000 tasks each, looked through for one class of the digest
_RANK: Final = {
    phase: rank
    for rank, phases in enumerate(
        (selectors.ACTIVE, selectors.STUCK, ("waiting", "queued"), ("held",), selectors.ENDED)
    )
    for phase in phases
}


_TIMES: Final = tuple(name for name in TaskRow.__struct_fields__ if name.endswith("_ns"))


class Picture(msgspec.Struct, frozen=True):
    """The tasks to show, in order, and the totals of all that the caller may see."""

    rows: list[TaskRow]
    totals: dict[str, int]


def check_code(rows: Sequence[TaskRow]) -> int:
    """Return 0 where all succeeded, 3 where some are not finished, 1 otherwise."""
    phases = {row.phase for row in rows}
    return 0 if phases <= {"succeeded"} else 1 if phases <= set(FINISHED) else 3


def is_narrowed(args: argparse.Namespace) -> bool:
    """Tell whether any option selects tasks."""
    return bool(args.tasks or args.group or args.label or args.state or args.all)


def picture(call: Call) -> Picture:
    """Ask for the tasks to show."""
    args = call.args
    order = _order(args.sort) if args.sort else None
    if args.limit is not None and not order:
        select = call.select() if is_narrowed(args) else Selector(all=True)
        rows, totals = _newest(call, select, args.limit)
    elif is_narrowed(args):
        rows, totals = _every(call, call.select())
    elif call.is_for_people and sys.stdout.isatty() and not order:
        rows, totals = _digest(call)
    else:
        rows, totals = _every(call, Selector(all=True))
    if order:
        rows = _sorted(rows, order[0], is_reverse=order[1])[: args.limit]
    return Picture(rows, totals)


def _every(call: Call, select: Selector) -> tuple[list[TaskRow], dict[str, int]]:
    rows: list[TaskRow] = []
    totals: dict[str, int] = {}
    for page in call.pages(select):
        rows.extend(page.tasks)
        totals = page.totals
    return rows, totals


def _newest(call: Call, select: Selector, limit: int) -> tuple[list[TaskRow], dict[str, int]]:
    """Return the last `limit` tasks, oldest first."""
    rows: list[TaskRow] = []
    totals: dict[str, int] = {}
    is_scan = not (select.ids or select.last or select.keys or select.names)
    for page in call.pages(select, newest=True):
        rows.extend(page.tasks)
        totals = page.totals
        if is_scan and len(rows) >= limit:
            break  # named tasks come by id, whatever was asked
    return sorted(rows, key=lambda row: -row.id)[:limit][::-1], totals


def _digest(call: Call) -> tuple[list[TaskRow], dict[str, int]]:
    """Return the tasks that matter now; one request where there are few."""
    asked = Status(Selector(all=True), FIRST_PAGE, newest=True)
    page = call.ask("status", asked, TaskPage)
    if page.next:
        totals = page.totals
        found = [
            *_some(call, selectors.ACTIVE, totals, LIVE_SHOWN),
            *_some(call, selectors.STUCK, totals, PENDING_SHOWN),
            *_some(call, ("waiting", "queued"), totals, PENDING_SHOWN),
            *_some(call, ("held",), totals, HELD_SHOWN),
            *_some(call, selectors.ENDED, totals, 5 * ENDED_SHOWN, newest=True),
        ]
    else:
        found = list(page.tasks)
    rows = sorted(found, key=_digest_key)
    ended = [row for row in rows if row.phase in selectors.ENDED][:ENDED_SHOWN]
    return [row for row in rows if row.phase not in selectors.ENDED] + ended, page.totals


def _some(
    call: Call,
    phases: tuple[str, ...],
    totals: dict[str, int],
    limit: int,
    *,
    newest: bool = False,
) -> list[TaskRow]:
    wanted = min(limit, sum(totals.get(phase, 0) for phase in phases))
    rows: list[TaskRow] = []
    cursor = 0
    for _ in range(PAGES_MAX):
        if len(rows) >= wanted:
            break
        asked = Status(Selector(all=True, phases=phases), limit, cursor, newest)
        page = call.ask("status", asked, TaskPage)
        rows.extend(page.tasks)
        cursor = page.next
        if not cursor:
            break
    return rows[:limit]


def _digest_key(row: TaskRow) -> tuple[int, int]:
    rank = _RANK.get(row.phase, 9)
    return rank, -row.ended_ns if row.phase in selectors.ENDED else row.id


def _order(text: str) -> tuple[str, bool]:
    """Return the field of `--sort FIELD`, `--sort FIELD-`, and whether it is turned round."""
    is_reverse, field = "-" in (text[:1], text[-1:]), text.strip("-")
    known = {"runtime", "age", *TaskRow.__struct_fields__, *map(plain_name, _TIMES)}
    if field not in known:
        hint = units.nearest(field, known) or f"known: {', '.join(sorted(known))}"
        raise BadRequest(f"--sort: no field {text!r}", hint)
    return field, is_reverse


def _sorted(rows: list[TaskRow], field: str, *, is_reverse: bool) -> list[TaskRow]:
    now_ns = time.time_ns()

    def key(row: TaskRow) -> tuple[bool, Any]:
        match field:
            case "runtime":
                return False, words.runtime_s(row, now_ns)
            case "age":
                return False, now_ns - row.submitted_ns
            case _:
                pass
        value = plain(row)[field] if field not in row.__struct_fields__ else getattr(row, field)
        if isinstance(value, int | float | str):
            return False, value
        return value is None, 0 if value is None else str(value)

    return sorted(rows, key=key, reverse=is_reverse)


def task_columns(now_ns: int, *, utc: bool = False) -> tuple[Column, ...]:
    """Return the columns of tasks at this moment."""

    def paint(row: TaskRow) -> str:
        return words.PAINT.get(row.phase, "")

    def when(field: str) -> Any:
        return lambda row: units.clock_text(getattr(row, field), utc=utc)

    return (
        Column("id", lambda row: str(row.id), is_right=True),
        Column("name", lambda row: words.clean(row.name), shrink=10),
        Column("group", lambda row: row.group, shrink=7, drop=4, usual="default"),
        Column("state", lambda row: words.state_text(row, now_ns), shrink=26, paint=paint),
        Column("progress", words.progress_text, shrink=8, drop=1),
        Column("eta", words.eta_text, is_right=True, is_wide=True),
        Column("attempt", lambda row: str(row.attempt or ""), "try", is_right=True, drop=5),
        Column(
            "runtime", lambda row: words.runtime_text(row, now_ns), "time", is_right=True, drop=2
        ),
        Column("age", lambda row: words.row_age_text(row, now_ns), is_right=True, drop=6),
        Column("prio", lambda row: str(row.priority or ""), is_right=True, is_wide=True),
        Column("checkpoint", lambda row: str(row.checkpoint or ""), "ckpt", True, is_wide=True),
        Column("pid", lambda row: str(row.pid or ""), is_right=True, is_wide=True),
        Column("uid", lambda row: str(row.uid), is_right=True, is_wide=True),
        Column("key", lambda row: words.clean(row.key), is_wide=True),
        Column("labels", labels_text, is_wide=True),
        Column("submitted", when("submitted_ns"), is_wide=True),
        Column("command", words.brief_command_text, shrink=14, drop=3),
    )


def labels_text(row: TaskRow) -> str:
    """Return `k=v,k=v`."""
    return words.clean(",".join(f"{name}={value}" for name, value in row.labels.items()))


def task_listing(shown: Picture, now_ns: int, *, utc: bool = False) -> Listing:
    """Return tasks as a listing."""
    totals = {"totals": shown.totals}
    columns = task_columns(now_ns, utc=utc)
    return Listing("tasks", shown.rows, columns, lambda row: str(row.id), totals)


def totals_text(shown: Picture) -> str:
    """Return `3 running, 214 queued; 60 of 217 shown: ...`, "" where there is nothing."""
    counts = {phase: shown.totals[phase] for phase in PHASES if shown.totals.get(phase)}
    text = ", ".join(f"{count} {phase}" for phase, count in counts.items())
    hidden = sum(counts.values()) - len(shown.rows)
    return f"{text} · {len(shown.rows)} shown, all: ckptctl status --all" if hidden > 0 else text


def empty_text(shown: Picture) -> str:
    """Return what to say where no task is shown."""
    if any(shown.totals.values()):
        return "no task fits the selection"
    return "no tasks yet; try: ckptctl run -- sh -c 'echo hello from task $CKPTD_TASK_ID'"
