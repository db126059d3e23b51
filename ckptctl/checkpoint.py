"""Verbs of checkpoints: look at what a task saved, compare, carry away, bring in, change.

The daemon tells what there is; manifests and files are read, and new checkpoints made, by
`python -m ckptd.offline.checkpoint` as whoever calls: files belong to their task's user.
Read next: `saving.py` (the words), `ckptd/offline/checkpoint.py`.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final, TypeVar

import msgspec

from ckptctl import offline, saving, selectors, units, words
from ckptctl.call import Call
from ckptctl.change import change
from ckptctl.editor import Draft, edited
from ckptctl.render import (
    Column,
    Listing,
    facts_lines,
    json_line,
    json_text,
    plain,
    table_lines,
)
from ckptd.protocol.errors import BadRequest, Conflict, Corrupt, Denied, NotFound
from ckptd.protocol.messages import (
    FINISHED,
    CheckpointList,
    CheckpointNow,
    CheckpointRow,
    Checkpoints,
    Selector,
    Show,
    TaskDetails,
    TaskRow,
)

Found = TypeVar("Found")
Rows = tuple[CheckpointRow, ...]
EDITED: Final = ("state", "cursors", "progress", "results")
_PACKERS: Final = {".tgz": "gzip", ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}


# --- now, ls, verify -------------------------------------------------------------------------


def now_options(parser: argparse.ArgumentParser) -> None:
    """Add the selection."""
    selectors.add_options(parser)


def now(call: Call) -> int:
    """Ask running tasks to save and go on."""
    return change(call, "checkpoint_now", CheckpointNow(call.select()))


def ls_options(parser: argparse.ArgumentParser) -> None:
    """Add the one task."""
    selectors.add_options(parser, many=False)


verify_options = ls_options


def ls(call: Call) -> int:
    """List the generations of a task."""
    task = call.one_id(call.select(default_last=True))
    return _list(call, task, verify=False)


def verify(call: Call) -> int:
    """Read every byte of every generation; 1 if one is bad."""
    task = call.one_id(call.select(default_last=True))
    return _list(call, task, verify=True)


def _list(call: Call, task: int, *, verify: bool) -> int:
    rows = call.ask("checkpoints", Checkpoints(task, verify), CheckpointList).checkpoints
    unsealed = saving.unsealed(rows)
    now_ns = time.time_ns()
    columns = (
        Column("seq", lambda row: str(row.seq), is_right=True),
        Column(
            "state", lambda row: _validity(row, unsealed),
            paint=lambda row: "32" if row.valid else "33" if row.seq in unsealed else "31",
        ),
        Column("attempt", lambda row: str(row.attempt or ""), "try", is_right=True),
        Column("age", lambda row: saving.age_text(row.at_ns, now_ns), is_right=True),
        Column("bytes", lambda row: units.size_text(row.bytes), "size", is_right=True),
        Column("files", lambda row: words.clean(" ".join(row.files)), shrink=10),
        Column("problem", lambda row: words.clean(row.problem), shrink=12),
        Column("path", lambda row: words.clean(row.path), is_wide=True),
        Column("digest", lambda row: row.digest, is_wide=True),
    )  # fmt: skip
    call.show(Listing("checkpoints", rows, columns, lambda row: str(row.seq), {"task": task}))
    if not rows:
        (call.note if verify else call.aside)(f"task {task} has no checkpoint yet")
    if verify and unsealed:
        call.note("unsealed: not verified before the task sends CHECKPOINT=1, or its attempt ends")
    return 1 if verify and any(not row.valid for row in rows) else 0


def _validity(row: CheckpointRow, unsealed: Collection[int]) -> str:
    return "valid" if row.valid else "unsealed" if row.seq in unsealed else "bad"


# --- show, diff ------------------------------------------------------------------------------


def _add_task(parser: argparse.ArgumentParser, *, has_seq: bool = True) -> None:
    parser.add_argument("task", metavar="TASK", help="7, @last, key:K")
    if has_seq:
        parser.add_argument(
            "seq", metavar="SEQ", nargs="?", type=units.whole(1), help="default: newest valid"
        )


def show_options(parser: argparse.ArgumentParser) -> None:
    """Add task and generation."""
    _add_task(parser)


def show(call: Call) -> int:
    """Show all that one generation says."""
    call.takes("json")
    row, manifest = _at_last(lambda: _with_manifest(call))
    if not call.is_for_people:
        call.out([json_text({"checkpoint": {**plain(row), "manifest": manifest or None}})])
        return 0
    call.out(facts_lines(_facts(call, row, manifest), call.style))
    numbers = [fact for fact in saving.number_facts(row.numbers) if fact[1]]
    _section(call, "saving", facts_lines(numbers, call.style))
    for name in ("state", "cursors", "results"):
        if manifest.get(name) not in (None, {}):
            _section(call, name, saving.json_lines(manifest[name]))
    _section(call, "files", _file_lines(call, row, manifest))
    return 0


def _with_manifest(call: Call) -> tuple[CheckpointRow, dict[str, Any]]:
    """Return a generation and its manifest, empty where it cannot be read."""
    row = _chosen(_rows(call), call.args.seq, _task(call))
    try:
        return row, offline.ask("show", _task_dir(row), str(row.seq))
    except (Denied, Corrupt) as refused:
        call.note(f"the manifest cannot be read: {refused.message}")
        return row, {}


def _section(call: Call, title: str, lines: Sequence[str]) -> None:
    bold = ("\x1b[1m", "\x1b[0m") if call.style.has_color else ("", "")
    if lines:
        call.out(["", f"{bold[0]}{title}{bold[1]}", *(f"  {line}" for line in lines)])


def _facts(call: Call, row: CheckpointRow, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    utc = call.clock_utc
    told = saving.manifest_facts(manifest, utc=utc) if manifest else [
        ("saved", units.clock_text(row.at_ns, utc=utc)), ("attempt", str(row.attempt or "")),
    ]  # fmt: skip
    return [
        ("checkpoint", str(row.seq)),
        ("validity", _validity(row, saving.unsealed([row]))),
        ("problem", words.clean(row.problem)),
        *told,
        ("size", f"{units.size_text(row.bytes)}, files: {len(row.files)}"),
        ("digest", row.digest),
        ("path", words.clean(row.path)),
    ]


def _file_lines(call: Call, row: CheckpointRow, manifest: dict[str, Any]) -> list[str]:
    files = manifest.get("files") or [{"name": name} for name in row.files]
    columns = (
        Column("name", lambda entry: words.clean(str(entry["name"]))),
        Column("bytes", lambda entry: units.size_text(entry.get("bytes") or 0), "size", True),
        Column("sha256", lambda entry: words.clean(str(entry.get("sha256", "")))),
    )
    return table_lines(columns, files, msgspec.structs.replace(call.style, width=0))


def diff_options(parser: argparse.ArgumentParser) -> None:
    """Add task and the two generations."""
    _add_task(parser, has_seq=False)
    parser.add_argument(
        "first", metavar="A", nargs="?", type=units.whole(1), help="default: before the newest"
    )
    parser.add_argument(
        "second", metavar="B", nargs="?", type=units.whole(1), help="default: the newest"
    )


def diff(call: Call) -> int:
    """Tell what differs between two generations; 0 if nothing, 1 otherwise."""
    call.takes("json", "jsonl")
    first, second, found = _at_last(lambda: _compared(call))
    if call.style.form == "json":
        told = {"task": _task(call), "a": first.seq, "b": second.seq, "same": not found}
        call.out([json_text({"diff": {**told, "changes": found}})])
    elif call.style.form == "jsonl":
        call.out(map(json_line, found))
    else:
        call.out(saving.change_lines(found))
        if not found:
            call.note(f"checkpoints {first.seq} and {second.seq} hold the same")
    return 1 if found else 0


def _compared(call: Call) -> tuple[CheckpointRow, CheckpointRow, list[Any]]:
    task, rows = _task(call), _rows(call)
    valid = [row for row in rows if row.valid]
    if call.args.first is None and len(valid) < 2:
        raise NotFound(f"task {task} has {len(valid)} valid checkpoints: nothing to compare",
                       f"ckptctl checkpoint ls {task}")  # fmt: skip
    second = _chosen(rows, call.args.second, task)
    first = valid[1] if call.args.first is None else _chosen(rows, call.args.first, task)
    found = offline.ask("diff", _task_dir(first), str(first.seq), str(second.seq))
    return first, second, found


# --- export, import, edit --------------------------------------------------------------------


def export_options(parser: argparse.ArgumentParser) -> None:
    """Add task, generation and the place to copy to."""
    _add_task(parser)
    parser.add_argument("target", metavar="DIR|FILE.tar|-", help="must not exist; -: a tar, stdout")


def export(call: Call) -> int:
    """Copy one generation to a new directory or tar file, all or nothing."""
    target = call.args.target
    call.takes(*(() if target == "-" else ("json",)))
    what = call.args.task if call.args.seq is None else f"{call.args.task} {call.args.seq}"
    _check_target(target, what)
    if target == "-" and sys.stdout.isatty():
        raise BadRequest(
            "a tar is nothing for a terminal", "example: ... export 7 - | gzip > 7.tgz"
        )
    row = _at_last(lambda: _exported(call, target))
    if target == "-":
        return 0
    call.note(f"checkpoint {row.seq}, {units.size_text(row.bytes)}, is in {target}")
    if call.style.form == "json":
        call.out([json_text({"checkpoint": plain(row), "directory": os.path.abspath(target)})])
    elif not call.is_for_people:
        call.out([target])
    return 0


def _check_target(target: str, what: str) -> None:
    """Refuse what is there, and what whoever wrote it means something else by."""
    if target == "-":
        return
    if os.path.lexists(target):
        raise Conflict(f"{target} exists already", "name one that does not exist yet")
    if not os.path.isdir(folder := os.path.dirname(os.path.abspath(target))):
        raise BadRequest(f"there is no directory {folder}", "make it first")
    if pack := _PACKERS.get(os.path.splitext(target)[1].lower()):
        hint = f"ckptctl checkpoint export {what} - | {pack} > {shlex.quote(target)}"
        raise BadRequest(
            f"{target}: what is exported is a directory or a tar, not compressed", hint
        )


def _exported(call: Call, target: str) -> CheckpointRow:
    row = _chosen(_rows(call), call.args.seq, _task(call))
    is_stream = target == "-"
    into = target if is_stream else os.path.abspath(target)
    run = offline.stream if is_stream else offline.ask
    run("export", _task_dir(row), str(row.seq), into)
    return row


def bring_in_options(parser: argparse.ArgumentParser) -> None:
    """Add the task and what to bring in."""
    _add_task(parser, has_seq=False)
    parser.add_argument("source", metavar="DIR|FILE.tar|-", help="what `export` made; -: stdin")


def bring_in(call: Call) -> int:
    """Make a new checkpoint of an exported one."""
    call.takes("json")
    source = call.args.source
    if source == "-" and sys.stdin.isatty():
        raise BadRequest("stdin is a terminal, a tar is expected", "example: ... import 7 - <7.tar")
    row, task_dir = _resting(call)
    given = source if source == "-" else os.path.abspath(source)
    made = offline.ask("import", task_dir, str(row.id), str(row.attempt), given, stdin=sys.stdin)
    return _told(call, row, made, f"is made of {source}")


def edit_options(parser: argparse.ArgumentParser) -> None:
    """Add task, generation and the changes."""
    _add_task(parser)
    parser.add_argument(
        "--set", dest="pairs", metavar="PATH=JSON", action="append", default=[],
        help=f"change a member of {', '.join(EDITED)}; repeatable: --set state.part=7",
    )  # fmt: skip
    parser.add_argument(
        "--unset", metavar="PATH", action="append", default=[], help="remove one; repeatable"
    )
    parser.add_argument("--force", action="store_true", help="add a name that looks mistyped")


def edit(call: Call) -> int:
    """Make a new checkpoint of one with some members changed; files are carried over."""
    call.takes("json")
    wish: dict[str, Any] = {
        "set": _assignments(call.args.pairs),
        "unset": call.args.unset,
        "force": call.args.force,
    }
    row, task_dir = _resting(call)
    old = _chosen(_rows(call), call.args.seq, row.id)
    words_ = (task_dir, str(row.id), str(row.attempt), str(old.seq))
    if wish["set"] or wish["unset"]:
        made = offline.ask("edit", *words_, sent=json.dumps(wish))
    else:
        with _edited(offline.ask("show", task_dir, str(old.seq))) as draft:
            made = offline.ask("edit", *words_, sent=json.dumps({"whole": draft.value}))
    if not made["changes"]:
        call.note("nothing was changed")
        return 0
    return _told(call, row, made, f"is made of {old.seq}")


def _assignments(pairs: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        path, equals, text = pair.partition("=")
        if not equals or not path:
            raise BadRequest(f"--set: {pair!r} is no PATH=JSON", "example: --set state.part=7")
        try:
            found[path.strip()] = units.parse_json(text)
        except ValueError as bad:
            hint = f"a text needs quotes: --set '{path}=\"{words.clean(text)[:40]}\"'"
            raise BadRequest(f"--set {path}: not JSON: {bad}", hint) from bad
    return found


def _edited(manifest: dict[str, Any]) -> AbstractContextManager[Draft]:
    """Let a person change the members in their editor; gives those that differ."""
    if not sys.stdin.isatty():
        raise BadRequest(
            "an editor needs a terminal", "in a script: ckptctl checkpoint edit 7 --set state.k=1"
        )
    before = {name: manifest.get(name) for name in EDITED}
    text = json.dumps(before, indent=2, ensure_ascii=False) + "\n"
    return edited(text, "JSON", partial(_members_in, before))


def _members_in(before: dict[str, Any], text: str) -> dict[str, Any]:
    after = units.parse_json(text)
    if not isinstance(after, dict):
        raise BadRequest("not an object any more", "keep the outer braces")
    gone = {name: None for name in EDITED if name not in after}
    return {name: value for name, value in {**after, **gone}.items() if value != before.get(name)}


def _told(call: Call, row: TaskRow, made: dict[str, Any], how: str) -> int:
    """Tell what was made, and what brings it into use."""
    call.note(f"checkpoint {made['seq']} of task {row.id} {how}")
    changes = made.get("changes", ())
    if call.style.form == "json":
        call.out([json_text({"checkpoint": {"task": row.id, **made}})])
    elif call.is_for_people:
        call.out(saving.change_lines(changes))
    else:
        call.out([str(made["seq"])])
    if again := made.get("steps_to_run_again"):
        names = words.clean(", ".join(again[:5])) + (" ..." if len(again) > 5 else "")
        call.note(f"results of steps stay in the journal of their task, these run again: {names}")
    saved_by = made.get("saved_by", {})
    if (name := words.clean(saved_by.get("name", ""))) not in ("", row.name):
        call.note(
            f"{name} (task {saved_by['task']}) saved it, and task {row.id} is"
            f" {words.clean(row.name)}: is its state meant for that?"
        )
    if row.phase in ("blocked", "quarantined", "held"):
        call.aside(f"to go on from it: ckptctl release {row.id}")
    elif row.phase in FINISHED:
        call.aside(f"to go on from it: ckptctl retry {row.id}")
    return 0


# --- what they share -------------------------------------------------------------------------


def _task(call: Call) -> int:
    call.args.tasks = [call.args.task]
    return call.one_id(call.select())


def _rows(call: Call) -> Rows:
    return call.ask("checkpoints", Checkpoints(_task(call)), CheckpointList).checkpoints


def _chosen(rows: Sequence[CheckpointRow], wanted: int | None, task: int) -> CheckpointRow:
    """Return one generation, the newest valid one by default."""
    for row in rows:
        if row.seq == wanted or (wanted is None and row.valid):
            return row
    known = ", ".join(str(row.seq) for row in rows) or "none"
    what = "valid checkpoint" if wanted is None else f"checkpoint {wanted}"
    raise NotFound(
        f"task {task} has no {what} (there are: {known})", f"ckptctl checkpoint ls {task}"
    )


def _at_last(look: Callable[[], Found]) -> Found:
    """Look, and once more where the task saved twice meanwhile: what was listed is cleared away."""
    try:
        return look()
    except NotFound:
        return look()


def _task_dir(row: CheckpointRow) -> str:
    return offline.task_dir(row.path)


def _resting(call: Call) -> tuple[TaskRow, str]:
    """Return the task and its directory. Raises Conflict where an attempt is under way."""
    asked = Show(Selector(ids=(_task(call),)))
    (detail,) = call.ask("show", asked, TaskDetails).tasks
    row = detail.row
    if row.phase in selectors.ACTIVE:
        raise Conflict(
            f"task {row.id} is {row.phase}: its checkpoints are its own while an attempt lives",
            f"pausing does not help: ckptctl cancel {row.id}, and ckptctl retry {row.id} later",
        )
    return row, detail.directory
