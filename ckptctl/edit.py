"""`edit`: change tasks that are not running, by --set KEY=VALUE or as TOML in an editor.

Only what differs is sent, so that two people editing different keys do not undo each other.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from ckptctl import files, selectors, spec, units, words
from ckptctl.call import Call
from ckptctl.change import change, tell
from ckptctl.refusals import out_of_range
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
    "labels", *spec.LIMITS,
)  # fmt: skip


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
    details = call.ask("show", Show(select), TaskDetails).tasks
    before = {str(detail.row.id): settings_of(detail) for detail in details}
    after = _edited(before)
    changes = differences(before, after)
    if not changes:
        call.note("nothing was changed")
        return 0
    return tell(call, "edit", _send(call, changes))


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the options."""
    pairs = units.named("--set", lambda words: units.parse_pairs(words, "setting"), args.pairs)
    for key, value in pairs.items():
        if not value and key in EDITABLE:
            raise units.empty(f"--{key}")
    return pairs | spec.limits_of(args)


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
            fields["argv"] = units.named("--command", _argv, value)
        elif key == "deadline" and str(value) in ("", "0"):
            fields["deadline_ns"] = 0
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


def _edited(before: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Let a person change the settings in their editor; returns them as parsed."""
    import tomli_w  # noqa: PLC0415 (for an editor only)

    head = "# Change, save and leave. Durations in seconds or as 90s 5m 2h; retries: failures\n"
    head += "# allowed beyond the first; memory in bytes or as 512M 2G; 0: no limit.\n"
    head += "# What you leave as it is stays as it is.\n\n"
    text = head + tomli_w.dumps({"task": before})
    tasks = edited_text(text, "TOML", tomllib.loads).get("task", {})
    return tasks if isinstance(tasks, dict) else {}


def edited_text(text: str, language: str, parse: Callable[[str], Any]) -> Any:
    """Let a person change a text in their editor until it can be parsed; returns it parsed.

    Raises:
        BadRequest: they gave up, or the editor failed.
    """
    editor = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
    fd, path = tempfile.mkstemp(f".{language.lower()}", "ckptctl-")
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)
    while True:  # Bound: a person says when to give up
        _run_editor(editor, path)
        try:
            parsed = parse(files.read_text(path))
        except ValueError as bad:
            if not _wants_again(f"not {language}: {bad}"):
                refusal = f"not {language}, nothing was changed: {bad}"
                raise BadRequest(refusal, f"what you wrote is kept in {path}") from bad
        else:
            os.unlink(path)
            return parsed


def _wants_again(problem: str) -> bool:
    sys.stderr.write(f"ckptctl: {problem}\nopen it again? [Y/n] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    return answer != "" and answer.strip().lower() in ("", "y", "yes")


def _run_editor(editor: Sequence[str], path: str) -> None:
    shown = shlex.join(editor)
    kept = f"the settings are in {path}; set EDITOR or VISUAL to another editor"
    try:
        code = subprocess.run([*editor, path], check=False).returncode
    except OSError as bad:
        os.unlink(path)
        text = f"the editor {shown} cannot be started, nothing was changed: {bad.strerror}"
        raise BadRequest(text, "set EDITOR or VISUAL to another editor") from bad
    if code:
        how = f"exit {code}" if code > 0 else units.signal_name(-code)
        raise BadRequest(f"the editor {shown} failed ({how}), nothing was changed", kept)
