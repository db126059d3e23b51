"""Verbs of groups, checkpoints and the quarantine. Read next: `change.py`."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from ckptctl import selectors, units, words
from ckptctl.call import Call
from ckptctl.change import change
from ckptctl.render import Column, Listing, facts_lines, json_text, plain
from ckptctl.units import SECOND_NS, age_text
from ckptd.protocol.errors import BadRequest, Conflict, Corrupt, Denied, NotFound
from ckptd.protocol.messages import (
    CheckpointList,
    CheckpointNow,
    CheckpointRow,
    Checkpoints,
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
        "-j", "--parallel", metavar="N", type=int, default=1,
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
        "-j", "--parallel", metavar="N", type=int,
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
        Column("command", words.command_text, shrink=10),
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


# --- checkpoints ------------------------------------------------------------------------------


def checkpoint_now_options(parser: argparse.ArgumentParser) -> None:
    """Add the selection."""
    selectors.add_options(parser)


def checkpoint_now(call: Call) -> int:
    """Ask running tasks to save and go on."""
    return change(call, "checkpoint_now", CheckpointNow(call.select()))


def checkpoint_ls_options(parser: argparse.ArgumentParser) -> None:
    """Add the one task."""
    selectors.add_options(parser, many=False)


checkpoint_verify_options = checkpoint_ls_options


def checkpoint_ls(call: Call) -> int:
    """List the generations of a task."""
    task = call.one_id(call.select(default_last=True))
    return _list(call, task, verify=False)


def checkpoint_verify(call: Call) -> int:
    """Read every byte of every generation; 1 if one is bad."""
    task = call.one_id(call.select(default_last=True))
    return _list(call, task, verify=True)


def _list(call: Call, task: int, *, verify: bool) -> int:
    rows = call.ask("checkpoints", Checkpoints(task, verify), CheckpointList).checkpoints
    now_ns = time.time_ns()
    columns = (
        Column("seq", lambda row: str(row.seq), is_right=True),
        Column("state", _validity, paint=lambda row: "32" if row.valid else "31"),
        Column("attempt", lambda row: str(row.attempt or ""), "try", is_right=True),
        Column("age", lambda row: age_text((now_ns - row.at_ns) / SECOND_NS) if row.at_ns else "",
               is_right=True),
        Column("bytes", lambda row: units.size_text(row.bytes), "size", is_right=True),
        Column("files", lambda row: words.clean(" ".join(row.files)), shrink=10),
        Column("problem", lambda row: words.clean(row.problem), shrink=12),
        Column("path", lambda row: words.clean(row.path), is_wide=True),
        Column("digest", lambda row: row.digest, is_wide=True),
    )  # fmt: skip
    call.show(Listing("checkpoints", rows, columns, lambda row: str(row.seq), {"task": task}))
    if not rows:
        call.aside(f"task {task} has no checkpoint yet")
    return 1 if verify and any(not row.valid for row in rows) else 0


def _validity(row: CheckpointRow) -> str:
    return ("valid" if row.sealed else "valid, not sealed yet") if row.valid else "bad"


def checkpoint_show_options(parser: argparse.ArgumentParser) -> None:
    """Add task and generation."""
    parser.add_argument("task", metavar="TASK", help="7, @last, key:K")
    parser.add_argument("seq", metavar="SEQ", nargs="?", type=int, help="default: newest valid")


def checkpoint_show(call: Call) -> int:
    """Show one generation."""
    row = _generation(call)
    if not call.is_for_people:
        call.out([json_text({"checkpoint": plain(row)})])
        return 0
    facts = [
        ("checkpoint", str(row.seq)),
        ("state", _validity(row)),
        ("problem", words.clean(row.problem)),
        ("saved", units.clock_text(row.at_ns, utc=call.clock_utc)),
        ("attempt", str(row.attempt or "")),
        ("size", f"{units.size_text(row.bytes)}, files: {len(row.files)}"),
        ("digest", row.digest),
        ("path", words.clean(row.path)),
    ]
    call.out(facts_lines(facts, call.style))
    call.out(f"  {words.clean(name)}" for name in row.files)
    return 0


def _generation(call: Call) -> CheckpointRow:
    call.args.tasks = [call.args.task]
    task = call.one_id(call.select())
    rows = call.ask("checkpoints", Checkpoints(task), CheckpointList).checkpoints
    wanted = call.args.seq
    for row in rows:
        if row.seq == wanted or (wanted is None and row.valid):
            return row
    known = ", ".join(str(row.seq) for row in rows) or "none"
    what = "valid checkpoint" if wanted is None else f"checkpoint {wanted}"
    raise NotFound(
        f"task {task} has no {what} (there are: {known})", f"ckptctl checkpoint ls {task}"
    )


def checkpoint_export_options(parser: argparse.ArgumentParser) -> None:
    """Add task, generation and the place to copy to."""
    parser.add_argument("task", metavar="TASK", help="7, @last, key:K")
    parser.add_argument("seq", metavar="SEQ", nargs="?", type=int, help="default: newest valid")
    parser.add_argument("directory", metavar="DIR", help="a directory that does not exist yet")


def checkpoint_export(call: Call) -> int:
    """Copy the files of one generation to a new directory."""
    call.takes("json")
    target = call.args.directory
    if os.path.lexists(target):
        raise Conflict(f"{target} exists already", "name a directory that does not exist yet")
    row = _generation(call)
    if not _copied(row, target):  # the task saved twice meanwhile: this one was cleared away
        row = _generation(call)
        if not _copied(row, target):
            raise NotFound(f"checkpoint {row.seq} is gone", "name one, or pause the task first")
    call.note(f"checkpoint {row.seq}, {units.size_text(row.bytes)}, is in {target}")
    if call.style.form == "json":
        call.out([json_text({"checkpoint": plain(row), "directory": os.path.abspath(target)})])
    elif not call.is_for_people:
        call.out([target])
    return 0


def _copied(row: CheckpointRow, target: str) -> bool:
    """Copy a generation, all or nothing. Returns False where it vanished."""
    task_dir = os.path.dirname(os.path.dirname(row.path))
    command = [sys.executable, "-P", "-m", "ckptd.sdk.export", task_dir, str(row.seq), target]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode in (0, NotFound.exit_code):
        return done.returncode == 0
    if done.returncode == Corrupt.exit_code:
        raise Corrupt(done.stderr.strip(), "see: ckptctl checkpoint verify")
    raise Denied(done.stderr.strip(), "the files belong to the task's user: copy as that user")
