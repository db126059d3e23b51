"""`edit`: change tasks that are not running, by --set KEY=VALUE or as TOML in an editor.

Only what differs is sent, so that two people editing different keys do not undo each other.
"""

import argparse
import re
import sys
import tomllib
from functools import partial
from typing import Any, Final

import msgspec

from ckptctl import selectors, spec, units, words
from ckptctl.call import Call
from ckptctl.change import change, tell
from ckptctl.editor import edited
from ckptctl.refusals import out_of_range
from ckptd.protocol.errors import BadRequest
from ckptd.protocol.messages import (
    Changed,
    Edit,
    Selector,
    Show,
    TaskDetail,
    TaskDetails,
)

EDITABLE: Final = (
    "command", "name", "group", "priority", "chdir", "timeout", "deadline", "retries", "grace",
    "labels", *spec.LIMITS,
)  # fmt: skip
_HEAD: Final = """\
# Change, save and leave. Durations in seconds or as 90s 5m 2h; retries: failures
# allowed beyond the first; memory in bytes or as 512M 2G; 0: no limit.
# What you leave as it is stays as it is.

"""


def edit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `edit`."""
    selectors.add_options(parser)
    parser.add_argument(
        "--set", dest="pairs", metavar="KEY=VALUE", action="append", default=[],
        help=f"change one setting, repeatable: {', '.join(EDITABLE)}",
    )  # fmt: skip
    spec.add_limits(parser)


def edit(call: Call) -> int:
    """Change tasks."""
    select = call.select()
    settings = _given(call.args)
    if settings:
        return change(call, "edit", change_of(select, settings))
    if not sys.stdin.isatty():
        raise BadRequest(
            "an editor needs a terminal", "in a script: ckptctl edit 7 --set timeout=2h"
        )
    import tomli_w  # noqa: PLC0415 (for an editor only)

    details = call.ask("show", Show(select), TaskDetails).tasks
    before = {str(detail.row.id): settings_of(detail) for detail in details}
    text = _HEAD + tomli_w.dumps({"task": before})
    with edited(text, "TOML", partial(_changes_in, before)) as draft:
        if not draft.value:
            call.note("nothing was changed")
            return 0
        results = [one for change in draft.value for one in call.ask("edit", change, Changed).tasks]
        draft.is_kept = any(one.error is not None for one in results)
        code = tell(call, "edit", results)
        if draft.is_kept:
            call.note(draft.where)
        return code


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the options."""
    pairs: dict[str, Any]
    pairs = units.named("--set", lambda words: units.parse_pairs(words, "setting"), args.pairs)
    for key, value in pairs.items():
        if not value and key in EDITABLE and key != "name":  # a name can be taken away
            raise units.empty(f"--{key}")
    if "labels" in pairs:
        pairs["labels"] = re.split(r",(?=[^,=]+=)", pairs["labels"])  # as `show` has them
    given = spec.limits_of(args)
    for key, value in given.items():
        if pairs.get(key, value) != value:
            raise units.twice(f"--{key}", pairs[key], value)
    return pairs | given


def change_of(select: Selector, settings: dict[str, Any]) -> Edit:
    """Return the Edit of some settings. Raises BadRequest for a key that cannot be edited."""
    fields: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in EDITABLE:
            hint = units.nearest(key, EDITABLE) or f"one of: {', '.join(EDITABLE)}"
            raise BadRequest(f"cannot edit {key!r}", hint)
        if key == "command":
            fields["argv"] = units.named("--command", _argv, value)
        elif key == "deadline" and str(value) in ("", "0"):
            fields["deadline_ns"] = 0
        elif key == "name" and not value:
            fields["name"] = ""
        else:
            spec.merge(fields, key, value)
    try:
        return msgspec.convert({**fields, "select": msgspec.to_builtins(select)}, Edit)
    except msgspec.ValidationError as bad:
        raise out_of_range(BadRequest(f"cannot edit: {bad}"), fields) from bad


def _argv(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return units.parse_command(value)
    if not isinstance(value, list) or not value:
        raise BadRequest(f"not a command: {value!r}", 'examples: "make all" ["make", "all"]')
    return tuple(map(str, value))


def settings_of(detail: TaskDetail) -> dict[str, Any]:
    """Return what can be edited of a task, as it stands in the editor."""
    row, known = detail.row, detail.spec
    failures = int(known.get("max_failures", 1))
    return {
        "command": list(row.argv),
        "name": row.name,
        "group": row.group,
        "priority": row.priority,
        "chdir": known.get("cwd", "/"),
        "timeout": float(known.get("timeout_s", 0.0)),
        "deadline": units.rfc3339(int(known.get("deadline_ns", 0))) or "",
        **({"retries": _retries(failures)} if failures else {}),
        "grace": float(known.get("grace_s", 10.0)),
        "labels": dict(row.labels),
        "memory": int(known.get("memory_bytes", 0)),
        "cpus": float(known.get("cpus", 0.0)),
        "tasks-max": int(known.get("tasks_max", 0)),
        "io-weight": int(known.get("io_weight", 0)),
        "nice": int(known.get("nice", 0)),
        "on-oom": str(known.get("on_oom", "") or "count"),
    }


def _retries(failures_max: int) -> int | str:
    text = words.retries_text(failures_max)
    return int(text) if text.isdecimal() else text


def differences(
    before: dict[str, dict[str, Any]], after: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return for each task the settings that differ. Raises BadRequest for an unknown task."""
    changes: dict[str, dict[str, Any]] = {}
    for number, settings in after.items():
        if number not in before or not isinstance(settings, dict):
            raise BadRequest(f"[task.{number}] was not among the tasks to edit")
        old = before[number]
        changed = {key: value for key, value in settings.items() if old.get(key) != value}
        if changed:
            changes[number] = changed
    return changes


def _changes_in(before: dict[str, dict[str, Any]], text: str) -> list[Edit]:
    """Return what a person changed in the text. Raises BadRequest, ValueError where not TOML."""
    parsed = tomllib.loads(text)
    tasks = parsed.pop("task", {})
    if parsed or not isinstance(tasks, dict):
        what = next(iter(parsed), "task")
        raise BadRequest(f"[{what}] is not a task to edit", "settings stand below [task.N]")
    changed = differences(before, tasks)
    return [change_of(Selector(ids=(int(number),)), one) for number, one in changed.items()]
