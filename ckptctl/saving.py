"""Checkpoints in words: how saving goes in numbers, what a manifest says, JSON cut to fit.

All of it comes from the task: `clean` takes control characters out. Read next: `checkpoint.py`.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ckptctl import units
from ckptctl.units import SECOND_NS, duration_text, size_text
from ckptctl.words import at_most, clean
from ckptd.protocol.messages import AttemptRow, CheckpointRow

RESULT_CHARS_MAX: Final = 1_024
JSON_LINES_MAX: Final = 40
VALUE_CHARS_MAX: Final = 100
SHOWN_MAX: Final = 12  # members of what does not fit on a line
RUN_MAX: Final = 3  # neighbouring elements told one by one
CHANGES_SHOWN_MAX: Final = 100
_KNOWN: Final = frozenset(
    ("strategy", "saves", "cost_s", "bytes", "interval_s", "budget", "mtbf_s", "overhead",
     "block_s", "wall_s", "resume_s", "interruptions")
)  # fmt: skip

Numbers = Mapping[str, float | str]


def unsealed(rows: Iterable[CheckpointRow]) -> frozenset[int]:
    """Return the newest, of rows newest first, that wait for the daemon to seal them.

    It does when the task tells of them, or its attempt ends. Below a valid one it never does.
    """
    above = itertools.takewhile(lambda row: not row.valid, rows)
    return frozenset(row.seq for row in above if row.seq and not row.sealed)


def number_facts(numbers: Numbers, attempts: Sequence[AttemptRow] = ()) -> list[tuple[str, str]]:
    """Return how saving goes as (name, text); what a saver of our own does not know is last."""
    other = [
        (clean(name), clean(_plain(value)))
        for name, value in numbers.items()
        if name not in _KNOWN
    ]  # fmt: skip
    return [
        ("strategy", clean(str(numbers.get("strategy", "")))),
        ("saves", _saves(numbers)),
        ("cost", _cost(numbers)),
        ("interval", _interval(numbers)),
        ("overhead", _overhead(numbers)),
        ("resume", _seconds(numbers, "resume_s") and f"{_seconds(numbers, 'resume_s')} to resume"),
        ("lost", lost_text(attempts)),
        *other,
    ]


def _number(numbers: Numbers, name: str) -> float | None:
    value = numbers.get(name)
    return None if value is None or isinstance(value, str) else value


def _plain(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def _seconds(numbers: Numbers, name: str) -> str:
    value = _number(numbers, name)
    return "" if value is None or value < 0 else short_text(value)


def short_text(seconds: float) -> str:
    """Return a short time exactly: 480us, 50ms, 1.5s, 2m05s."""
    if seconds >= 10:
        return duration_text(seconds)
    if seconds >= 1:
        return f"{seconds:.1f}s"
    if seconds >= 0.001 or seconds == 0:
        return f"{seconds * 1_000:.3g}ms"
    return f"{seconds * 1_000_000:.3g}us"


def _saves(numbers: Numbers) -> str:
    saves, size = _number(numbers, "saves"), _number(numbers, "bytes")
    if saves is None:
        return ""
    files = f", the last one with {size_text(size)} in files" if size and size > 0 else ""
    return f"{saves:.0f}{files}"


def _cost(numbers: Numbers) -> str:
    if not _number(numbers, "cost_s"):
        return ""  # not measured yet
    each, block = _seconds(numbers, "cost_s"), _seconds(numbers, "block_s")
    return ", ".join(filter(None, (each and f"{each} a save", block and f"{block} in all")))


def _interval(numbers: Numbers) -> str:
    interval, mtbf_s = _seconds(numbers, "interval_s"), _number(numbers, "mtbf_s")
    if not interval or not _number(numbers, "interval_s"):
        return ""
    is_computed = _number(numbers, "budget") is not None  # else somebody chose it
    expected = f"an interruption every {duration_text(mtbf_s)}" if mtbf_s and is_computed else ""
    return f"{interval}" + (f" (for {expected})" if expected else "")


def _overhead(numbers: Numbers) -> str:
    overhead, wall = _number(numbers, "overhead"), _seconds(numbers, "wall_s")
    budget = _number(numbers, "budget")
    if overhead is None:
        return ""
    most = f", at most {budget:.3%} is wanted".replace(".000%", "%") if budget else ""
    return f"{overhead:.2%} of {wall or 'the work'} so far{most}"


def lost_text(attempts: Sequence[AttemptRow]) -> str:
    """Return the work that interruptions threw away: `12.3s at 2 interruptions, ...`."""
    lost = [row for row in attempts if row.lost_s > 0]
    if not lost:
        return ""
    unseen = next((row.cause for row in lost if at_most("", row.cause)), "")
    total = at_most(short_text(sum(row.lost_s for row in lost)), unseen)
    texts = [(row.attempt, at_most(short_text(row.lost_s), row.cause)) for row in lost[-5:]]
    each = ", ".join(f"attempt {attempt}: {text}" for attempt, text in texts)
    return f"{total} of work was repeated ({each})" if len(lost) > 1 else (
        f"{total} of work was repeated, of attempt {lost[0].attempt}"
    )  # fmt: skip


# --- manifests -----------------------------------------------------------------------------------


def manifest_facts(manifest: Mapping[str, Any], *, utc: bool) -> list[tuple[str, str]]:
    """Return what a manifest says beside state, results and files, as (name, text)."""
    steps = manifest.get("steps") or ()
    return [
        ("of task", _of_task(manifest)),
        ("saved", units.clock_text(manifest["at_ns"], utc=utc)),
        ("attempt", f"{manifest['attempt']}, epoch {manifest['epoch']}"),
        ("parent", _text(manifest.get("parent") or "")),
        ("progress", progress_text(manifest.get("progress"))),
        ("steps", ", ".join(_text(step) for step in steps[:50])
                  + (f" and {len(steps) - 50} more" if len(steps) > 50 else "")),
        ("now at", _text(manifest.get("current_step") or "")),
        ("resumed", _times(manifest)),
        ("state version", _text(manifest.get("state_version") or "")),
        ("schema", _text(manifest.get("schema") or "")),
        ("code", _text(manifest.get("code_digest") or "")),
        ("input", _text(manifest.get("config_digest") or "")),
        ("made by", f"ckptd {_text(manifest['sdk_version'])}"
                    if manifest.get("sdk_version") else ""),
        ("origin", provenance_text(manifest.get("provenance"), utc=utc)),
        ("format", _text(manifest.get("format"))),
    ]  # fmt: skip


def _text(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    return clean(value if isinstance(value, str) else json.dumps(value))[:VALUE_CHARS_MAX]


def _of_task(manifest: Mapping[str, Any]) -> str:
    name, version = manifest.get("task_name"), manifest.get("task_version")
    known = ", version ".join(_text(value) for value in (name, version) if value)
    return f"{manifest['task']}" + (f" ({known})" if known else "")


def _times(manifest: Mapping[str, Any]) -> str:
    pauses, resumes = manifest.get("pause_count", 0), manifest.get("resume_count", 0)
    wait_s = manifest.get("wait_s", 0.0)
    told = [
        _count(resumes),
        f"paused {_count(pauses)}" if pauses else "",
        f"waited {duration_text(wait_s)}" if wait_s else "",
    ]
    return ", ".join(filter(None, told))


def _count(times: int) -> str:
    return f"{times} time{'s' if times > 1 else ''}" if times else ""


def progress_text(progress: object) -> str:
    """Return `700/1000` of what a manifest calls its progress."""
    if not isinstance(progress, dict):
        return ""
    done, total = (progress.get(name) for name in ("done", "total"))
    return f"{_text(done)}/{_text(total)}" if total else _text(done)


def provenance_text(origin: object, *, utc: bool) -> str:
    """Return where a checkpoint comes from that no attempt saved as it is."""
    if not isinstance(origin, dict):
        return ""
    at_ns, uid = origin.get("at_ns"), origin.get("uid")
    when = f" at {units.clock_text(at_ns, utc=utc)}" if isinstance(at_ns, int) else ""
    who = f", by uid {_text(uid)}" if uid is not None else ""
    source = origin.get("imported_from")
    if isinstance(source, dict):
        task, seq = _text(source.get("task")), _text(source.get("seq"))
        return f"imported: checkpoint {seq} of task {task}{who}{when}"
    if "edited" in origin:
        changes = origin.get("changes")
        paths = [_text(one.get("path")) for one in changes or () if isinstance(one, dict)]
        return f"edited from {_text(origin['edited'])}: {', '.join(paths[:10])}{who}{when}"
    return _text(origin)


# --- values --------------------------------------------------------------------------------------


def json_lines(value: Any, lines_max: int = JSON_LINES_MAX) -> list[str]:
    """Return indented JSON, what is short on one line, what is long cut to a page."""
    lines = _json_lines(value, "")
    shown = lines[:lines_max]
    more = len(lines) - len(shown)
    return [*shown, f"... {more:,} more lines: -o json"] if more > 0 else shown


def _json_lines(value: Any, before: str) -> list[str]:
    """Return the lines of a value behind `before`: its indent and name.

    Bound: as deep as manifests may be; of what is long, the first SHOWN_MAX members.
    """
    flat = clean(json.dumps(value, ensure_ascii=False))
    if len(flat) <= VALUE_CHARS_MAX or not isinstance(value, dict | list):
        return [f"{before}{bounded(flat, 4 * VALUE_CHARS_MAX)}"]
    indent = " " * (len(before) - len(before.lstrip()) + 2)
    signs = "{}" if isinstance(value, dict) else "[]"
    members: list[tuple[str, Any]] = (
        [(f"{clean(json.dumps(name, ensure_ascii=False))}: ", one) for name, one in value.items()]
        if isinstance(value, dict)
        else [("", one) for one in value]
    )
    shown, rest = members[:SHOWN_MAX], len(members) - SHOWN_MAX
    more = [f"... {rest:,} more: -o json"] if rest > 0 else []
    flat = ", ".join([json.dumps(one, ensure_ascii=False) for _, one in shown] + more)
    if isinstance(value, list) and len(flat) <= VALUE_CHARS_MAX:
        return [f"{before}[{clean(flat)}]"]
    lines = [f"{before}{signs[0]}"]
    for name, one in shown:
        lines += _json_lines(one, indent + name[: 2 * VALUE_CHARS_MAX])
        lines[-1] += ","
    lines += [f"{indent}{text}" for text in more]
    if not more:
        lines[-1] = lines[-1].removesuffix(",")
    return [*lines, f"{' ' * (len(indent) - 2)}{signs[1]}"]


def bounded(text: str, chars_max: int) -> str:
    """Return a text of a task on one line, cut where it is long."""
    kept = clean(text)
    if len(kept) <= chars_max:
        return kept
    return f"{kept[:chars_max]}... ({len(text):,} characters: -o json)"


def change_lines(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what differs, a line each; a list that grew or shrank is one line."""
    lines: list[str] = []
    for _, run in itertools.groupby(changes, _run_of):
        one = list(run)
        if len(one) > RUN_MAX:
            first, last = (clean(str(change["path"])) for change in (one[0], one[-1]))
            lines.append(f"{first} to {last.rpartition('.')[2]}: {one[0]['kind']} {len(one):,}")
        else:
            lines += map(change_text, one)
    more = len(lines) - CHANGES_SHOWN_MAX
    return [*lines[:CHANGES_SHOWN_MAX], f"... {more:,} more: -o json"] if more > 0 else lines


def _run_of(change: Mapping[str, Any]) -> tuple[str, str]:
    """Return what neighbours have in common that can be told as one."""
    parent, _, name = str(change["path"]).rpartition(".")
    is_element = name.isascii() and name.isdigit() and change["kind"] != "changed"
    return (parent if is_element else str(change["path"])), str(change["kind"])


def change_text(change: Mapping[str, Any]) -> str:
    """Return `state.part: 6 -> 7` of one member that differs."""
    path, kind = clean(str(change["path"])), change["kind"]
    before, after = (_value(change, name) for name in ("before", "after"))
    match kind:
        case "added":
            return f"{path}: added {after}"
        case "removed":
            return f"{path}: removed, was {before}"
        case _:
            return f"{path}: {before} -> {after}"


def _value(change: Mapping[str, Any], name: str) -> str:
    if name not in change:
        return ""
    value = change[name]
    is_digest = str(change["path"]).startswith("files.") and isinstance(value, str)
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    text = value if is_digest else json.dumps(value, ensure_ascii=False)
    if is_digest and len(text) > 64:
        text = f"{text[:12]}...{text[64:]}"
    return bounded(text, VALUE_CHARS_MAX)


def age_text(at_ns: int, now_ns: int) -> str:
    """Return how long ago, "" for never."""
    return units.age_text((now_ns - at_ns) / SECOND_NS) if at_ns else ""
