"""`edit`: change tasks that are not running, by --set KEY=VALUE or as TOML in an editor.

Only what differs is sent, so that two people editing different keys do not undo each other.
"""

import argparse
import os
import shlex
import subprocess
import tempfile
import tomllib
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ckptctl import selectors, spec, units
from ckptctl.call import Call
from ckptctl.change import tell
from ckptd.protocol.errors import BadRequest
from ckptd.protocol.messages import (
    Changed,
    Edit,
    Selector,
    Show,
    TaskChange,
    TaskDetail,
    TaskDetails,
)

EDITABLE: Final = (
    "command", "name", "group", "priority", "chdir", "timeout", "deadline", "retries", "grace",
    "labels",
)  # fmt: skip


def edit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `edit`."""
    selectors.add_options(parser)
    parser.add_argument(
        "--set", dest="pairs", metavar="KEY=VALUE", action="append", default=[],
        help=f"change one setting, repeatable: {', '.join(EDITABLE)}",
    )  # fmt: skip


def edit(call: Call) -> int:
    """Change tasks."""
    select = call.select()
    if call.args.pairs:
        settings = units.parse_pairs(call.args.pairs, "setting")
        answer = call.ask("edit", change_of(select, settings), Changed)
        return tell(call, "edit", answer.tasks)
    details = call.ask("show", Show(select), TaskDetails).tasks
    before = {str(detail.row.id): settings_of(detail) for detail in details}
    after = _edited(before)
    changes = differences(before, after)
    if not changes:
        call.note("nothing was changed")
        return 0
    return tell(call, "edit", _send(call, changes))


def _send(call: Call, changes: dict[str, dict[str, Any]]) -> list[TaskChange]:
    results: list[TaskChange] = []
    for number, settings in changes.items():
        change = change_of(Selector(ids=(int(number),)), settings)
        results += call.ask("edit", change, Changed).tasks
    return results


def change_of(select: Selector, settings: dict[str, Any]) -> Edit:
    """Return the Edit of some settings. Raises BadRequest for a key that cannot be edited."""
    fields: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in EDITABLE:
            hint = units.nearest(key, EDITABLE) or f"one of: {', '.join(EDITABLE)}"
            raise BadRequest(f"cannot edit {key!r}", hint)
        if key == "command":
            words = shlex.split(value) if isinstance(value, str) else value
            fields["argv"] = tuple(map(str, words))
        elif key == "deadline" and not value:
            fields["deadline_ns"] = 0
        else:
            spec.merge(fields, key, value)
    try:
        return msgspec.convert({**fields, "select": msgspec.to_builtins(select)}, Edit)
    except msgspec.ValidationError as bad:
        raise BadRequest(f"cannot edit: {bad}") from bad


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
        **({"retries": failures - 1} if failures else {}),
        "grace": float(known.get("grace_s", 10.0)),
        "labels": dict(row.labels),
    }


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


def _edited(before: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Let a person change the settings in their editor; returns them as parsed."""
    import tomli_w  # noqa: PLC0415 (for an editor only)

    head = "# Change, save and leave. Durations in seconds or as 90s 5m 2h; retries: failures\n"
    head += "# allowed beyond the first. What you leave as it is stays as it is.\n\n"
    editor = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
    with tempfile.NamedTemporaryFile("w", suffix=".toml", prefix="ckptctl-") as file:
        file.write(head + tomli_w.dumps({"task": before}))
        file.flush()
        _run_editor([*editor, file.name])
        text = spec.read_text(file.name)
    try:
        tasks = tomllib.loads(text).get("task", {})
    except tomllib.TOMLDecodeError as bad:
        raise BadRequest(f"not TOML, nothing was changed: {bad}") from bad
    return tasks if isinstance(tasks, dict) else {}


def _run_editor(argv: Sequence[str]) -> None:
    try:
        subprocess.run(argv, check=True)
    except (OSError, subprocess.CalledProcessError) as bad:
        raise BadRequest(f"the editor failed, nothing was changed: {bad}", "set EDITOR") from bad
