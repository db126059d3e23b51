"""Refusals in the words of the command line: the option, the value and what is allowed.

The daemon speaks of fields of the protocol; people typed options. Loaded for mistakes only.
Read next: `ckptd/protocol/messages.py` (the bounds), `call.py` (who asks).
"""

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ckptctl.units import clock_text, duration_text, size_text, told
from ckptd.protocol import limits
from ckptd.protocol.errors import BadRequest, NotFound

_AT: Final = re.compile(r" - at `\$((?:\.\w+|\[\d*\.*\])+)`$")
_GROUP: Final = (
    f"letters, digits, '.', '_' and '-', the first a letter or digit,"
    f" at most {limits.NAME_CHARS_MAX}"
)
_YEAR: Final = "from 0 to 366d"
_COUNT: Final = "a whole number from 0 to 1,000,000"
_FIELDS: Final[dict[str, tuple[str, str]]] = {
    "group": ("--group", _GROUP),
    "parallel": ("--parallel", f"a whole number from 0 to {limits.PARALLEL_MAX:,}"),
    "priority": (
        "priority",
        f"a whole number from -{limits.PRIORITY_MAX:,} to {limits.PRIORITY_MAX:,}",
    ),
    "in_s": ("--in", _YEAR),
    "timeout_s": ("--timeout", _YEAR),
    "grace_s": ("--grace", _YEAR),
    "older_s": ("--older", _YEAR),
    "retries": ("--retries", f"{_COUNT}, or: unlimited"),
    "backoff_s": ("--backoff", _YEAR),
    "backoff_max_s": ("--backoff", _YEAR),
    "name": ("--name", f"at most {limits.NAME_CHARS_MAX} characters"),
    "key": ("--key", f"at most {limits.KEY_CHARS_MAX} characters"),
    "keys": ("key:", f"at most {limits.KEY_CHARS_MAX} characters"),
    "reason": ("--reason", f"at most {limits.NAME_CHARS_MAX} characters"),
    "labels": ("--label", f"at most {limits.LABELS_MAX} of them"),
    "after": ("--after", f"at most {limits.DEPENDENCIES_MAX:,} tasks"),
    "memory_bytes": ("--memory", "from 4M to 4 EiB, 0 for no limit"),
    "cpus": ("--cpus", f"from {limits.CPUS_MIN} to {limits.CPUS_MAX:,}, 0 for no limit"),
    "tasks_max": ("--tasks-max", f"a whole number from 0 to {limits.PROCESSES_MAX:,}"),
    "io_weight": ("--io-weight", "a whole number from 1 to 10,000, 0 for the usual weight"),
    "nice": ("--nice", "a whole number from -20 to 19"),
    "on_oom": ("--on-oom", "at most 64 characters"),
    "at_ns": ("--at", "a time after 1970 and before 2100"),
    "deadline_ns": ("--deadline", "a time after 1970 and before 2100"),
    "ids": ("TASK", "a number from 1 on, at most 10,000 of them"),
    "last": ("@~N", "from @~0 to @~1000000, at most 100 of them"),
    "names": ("name:", f"at most {limits.NAME_CHARS_MAX} characters, at most 100 of them"),
    "task": ("--task", "a number from 0 on"),
    "since": ("--since", "an LSN, a time, or how long ago: 4711, 09:00, 2h"),
}
"""Field of the protocol -> (what people typed, what is allowed)."""
_GROUP_NAME: Final = ("the name of a group", _GROUP)


def out_of_range(bad: BadRequest, sent: Any) -> BadRequest:
    """Return the refusal of a value by its option; any other refusal as it is."""
    found = _AT.search(bad.message)
    if found is None:
        return bad
    path = re.findall(r"\w+", found[1])
    place = next((place for place in reversed(path) if place in _FIELDS), "")
    is_group = place == "name" and ("regex" in bad.message or hasattr(sent, "parallel"))
    option, allowed = _GROUP_NAME if is_group else _FIELDS.get(place, ("", ""))
    if not option:
        return bad
    value = _value_at(msgspec.to_builtins(sent), path[: path.index(place) + 1], place)
    return BadRequest(f"{option}: {value} is not allowed", f"allowed: {allowed}")


def _value_at(sent: Any, path: Sequence[str], place: str) -> str:
    """Return the value as people write it; the daemon does not say which element it was."""
    for name in path:
        if name.isdigit() and isinstance(sent, list | tuple) and int(name) < len(sent):
            sent = sent[int(name)]
        elif isinstance(sent, dict):
            sent = sent.get(name)
    if isinstance(sent, list | tuple) and len(sent) == 1:
        sent = sent[0]
    if isinstance(sent, list | tuple | dict):
        return f"what was given ({len(sent)})"
    if place.endswith("_s") and isinstance(sent, int | float):
        return duration_text(sent)
    if place.endswith("_ns") and isinstance(sent, int):
        return clock_text(sent)
    if place.endswith("_bytes") and isinstance(sent, int):
        return size_text(sent)
    return told(sent)


def no_such_last(bad: NotFound, words: Sequence[str]) -> NotFound:
    """Return "no task @last" for what the daemon calls @~0."""
    found = re.fullmatch(r"no task @~(\d+): you have submitted (\d+)", bad.message)
    if found is None:
        return bad
    typed = "@last" if found[1] == "0" else f"@~{found[1]}"
    if found[2] != "0":
        return NotFound(f"no task {typed}: you have {found[2]}", "see: ckptctl status --all")
    about = f"no task {typed}: " if words else ""
    return NotFound(f"{about}you have no tasks yet", "example: ckptctl run -- make test")
