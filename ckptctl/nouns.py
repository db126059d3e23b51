"""Verbs of groups and the quarantine. Read next: `checkpoint.py`."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from ckptctl import selectors, units, words
from ckptctl.call import Call
from ckptctl.render import Column, Listing, json_text, plain
from ckptd.protocol.errors import BadRequest, Conflict, NotFound
from ckptd.protocol.messages import (
    Done,
    Empty,
    GroupRemove,
    GroupRow,
    Groups,
    GroupSet,
    Selector,
)

# --- groups -----------------------------------------------------------------------------------


def group_ls(call: Call) -> int:
    """List groups."""
    found = call.ask("groups", Empty(), Groups).groups
    columns = (
        Column("name", lambda row: row.name),
        Column("state", lambda row: "paused" if row.paused else "on",
               paint=lambda row: "36" if row.paused else "32"),
        Column("slots", lambda row: f"{row.active}/{row.slots}", "busy", is_right=True),
        Column("parallel", lambda row: str(row.parallel) if row.parallel else "auto"),
        Column("pending", lambda row: _count(row, selectors.PENDING), is_right=True),
        Column("stuck", lambda row: _count(row, selectors.STUCK), is_right=True),
        Column("ended", lambda row: _count(row, selectors.ENDED), is_right=True, is_wide=True),
    )  # fmt: skip
    call.show(Listing("groups", found, columns, lambda row: str(row.name)))
    return 0


def _count(row: GroupRow, phases: Sequence[str]) -> str:
    return str(sum(row.phases.get(phase, 0) for phase in phases) or "")


def group_add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `group add`."""
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "-j", "--parallel", metavar="N", type=units.whole(0), default=1,
        help="how many tasks run at once (default 1; 0: as many as there are processors)",
    )  # fmt: skip
    parser.add_argument("--paused", action="store_true", help="start nothing yet")


def group_add(call: Call) -> int:
    """Make a group."""
    args = call.args
    call.takes("json")
    if any(row.name == args.name for row in call.ask("groups", Empty(), Groups).groups):
        raise Conflict(
            f"the group {args.name!r} exists already", f"change it: ckptctl group set {args.name}"
        )
    return _group_set(call, f"group {args.name} added", parallel=args.parallel, paused=args.paused)


def group_set_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `group set`."""
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "-j", "--parallel", metavar="N", type=units.whole(0),
        help="how many tasks run at once (0: as many as there are processors)",
    )  # fmt: skip


def group_set(call: Call) -> int:
    """Change a group, at once."""
    if call.args.parallel is None:
        raise BadRequest("what is to change?", "example: ckptctl group set gpu --parallel 4")
    return _known_group(call, f"group {call.args.name} changed", parallel=call.args.parallel)


def group_pause_options(parser: argparse.ArgumentParser) -> None:
    """Add the name."""
    parser.add_argument("name", metavar="NAME")


group_resume_options = group_rm_options = group_pause_options


def group_pause(call: Call) -> int:
    """Start nothing more in a group."""
    return _known_group(call, f"group {call.args.name}: nothing more starts", paused=True)


def group_resume(call: Call) -> int:
    """Start tasks of a group again."""
    return _known_group(call, f"group {call.args.name}: tasks start again", paused=False)


def _known_group(call: Call, said: str, **values: Any) -> int:
    """Change a group that exists: a typing error must not make a new one."""
    names = [row.name for row in call.ask("groups", Empty(), Groups).groups]
    name = call.args.name
    if name not in names:
        hint = units.nearest(name, names) or f"make it: ckptctl group add {name}"
        raise NotFound(f"no group {name!r}", hint)
    return _group_set(call, said, **values)


def _group_set(call: Call, said: str, **values: Any) -> int:
    call.takes("json")
    call.ask("group_set", GroupSet(call.args.name, **values), Done)
    call.note(said)
    if call.style.form == "json":
        rows = call.ask("groups", Empty(), Groups).groups
        found = next((plain(row) for row in rows if row.name == call.args.name), None)
        call.out([json_text({"group": found})])
    return 0


def group_rm(call: Call) -> int:
    """Remove an empty group."""
    call.takes("json")
    call.ask("group_remove", GroupRemove(call.args.name), Done)
    call.note(f"group {call.args.name} removed")
    if call.style.form == "json":
        call.out([json_text({"group": {"name": call.args.name, "removed": True}})])
    return 0


# --- quarantine -------------------------------------------------------------------------------


def quarantine_ls(call: Call) -> int:
    """List what is stuck."""
    select = Selector(all=True, phases=selectors.STUCK)
    rows = [row for page in call.pages(select) for row in page.tasks]
    now_ns = time.time_ns()
    columns = (
        Column("id", lambda row: str(row.id), is_right=True),
        Column("name", lambda row: words.clean(row.name), shrink=10),
        Column("state", lambda row: words.state_text(row, now_ns), shrink=20,
               paint=lambda row: words.PAINT[row.phase]),
        Column("attempt", lambda row: str(row.attempt or ""), "try", is_right=True),
        Column("age", lambda row: words.row_age_text(row, now_ns), is_right=True),
        Column("command", words.brief_command_text, shrink=10),
    )  # fmt: skip
    call.show(Listing("tasks", rows, columns, lambda row: str(row.id)))
    if rows:
        call.aside(
            f"why: ckptctl explain {rows[0].id} · again: ckptctl quarantine release"
            f" {rows[0].id} · give up: ckptctl quarantine drop {rows[0].id}"
        )
    else:
        call.aside("nothing is in quarantine")
    return 0
