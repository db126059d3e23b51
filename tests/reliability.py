"""The figures of docs/reliability.md: `make figures` takes over what the last runs wrote.

    build/figures/NAME.json -> docs/figures/NAME.json -> the table between the markers

The table is made of docs/figures alone, so page and figures always agree; a test sees to it.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, Final

from tests.figures import FRESH, ROOT

PAGE: Final = ROOT / "docs" / "reliability.md"
_PATH: Final = re.compile(r"(?<![\w.])(?:/[\w.+-]+)+(/[\w.+-]+)")
"""A path of the machine that ran it, of which only the last name says anything."""
KEPT: Final = ROOT / "docs" / "figures"
BEGIN: Final = "<!-- generated: figures -->\n"
END: Final = "<!-- end -->\n"
BROKEN: Final = ("violations", "finds", "not_killed")
"""What must be 0, or empty, in a run that is published."""
PARTIAL: Final = ("skipped", "part")
"""What tells of a run that left something out: told in its file, and not published either."""
_SHOWN: Final[dict[str, dict[str, str]]] = {
    "sim": {
        "lives": "lives", "power": "power cuts", "recoveries": "recoveries",
        "in_recovery": "of them cut by the next fault", "jump": "clock jumps",
        "messages_lost": "messages lost", "attempts": "attempts", "cpu_s": "s of one core",
    },
    "states": {
        "examined": "crash states", "distinct": "distinct contents recovered",
        "inside": "crashes inside a recovery", "cpu_s": "s of one core",
    },
    "crashdisk": {
        "ext4_states": "states on ext4", "xfs_states": "xfs", "btrfs_states": "btrfs",
        "fault_cells": "cells of faults",
    },
    "torture": {
        "seconds": "s", "struck": "strikes", "boots": "power-ons", "tasks": "tasks",
        "attempts": "attempts", "batches": "batches", "facts": "side effects audited",
        "marks_missed": "marks never met",
    },
    "soak": {
        "seconds": "s", "struck": "strikes", "tasks": "tasks", "attempts": "attempts",
        "struck_attempts": "of them struck", "batches": "batches",
        "facts": "side effects audited", "marks_missed": "marks never met",
        "rss_kb.plateau": "kB resident",
        "rss_kb.slope_per_1000_tasks": "kB more per 1,000 tasks",
        "rss_kb.grown_in_a_life_max": "kB more in any life's last third than in its second",
        "descriptors.plateau": "descriptors", "files.plateau": "files",
        "files.slope_per_1000_tasks": "files more per 1,000 tasks",
    },
    "calm": {
        "seconds": "s", "tasks": "tasks", "snapshots_seen": "snapshots",
        "rss_kb.plateau": "kB resident", "rss_kb.max": "at most",
        "rss_kb.grown_in_a_life_max": "kB more in its last third than in its second",
    },
    "fuzz": {
        "executions": "inputs", "targets": "targets", "inputs_min": "inputs of the one with fewest",
        "kept_inputs": "inputs kept",
    },
    "mutants": {"mutants": "mistakes", "killed": "noticed", "canaries": "canaries"},
    "golden": {
        "files_kept": "files kept", "tests": "tests of them",
        "records": "records among them",
    },
}  # fmt: skip
"""What the table tells of each rig, by the name in its file; the file has all."""
CHANGED: Final = frozenset(("inputs_min",))
"""What files of before have not, or not any more."""
RIGS: Final = tuple(_SHOWN)
_LEAST: Final[dict[str, dict[str, int]]] = {
    "sim": {"lives": 200},
    "states": {"examined": 1_000_000},
    "crashdisk": {"ext4_states": 20_000, "xfs_states": 1_000, "btrfs_states": 1_000,
                  "fault_cells": 60},
    "torture": {"seconds": 240},
    "soak": {"seconds": 3600, "lives_judged": 3},
    "calm": {"seconds": 1800, "lives_judged": 1},
    "fuzz": {"executions": 1_000_000, "targets": 20},
    "mutants": {"mutants": 25},
    "golden": {"files_kept": 45},
}  # fmt: skip
"""How much a run must have done to be published."""


def broke(path: Path) -> list[str]:
    """Return which figures that must be 0 are not, and which show that too little was done.

    `commit` where no commit holds that code.
    """
    found = json.loads(path.read_text())
    told = [name for name in (*BROKEN, *PARTIAL) if found.get(name)]
    told += [name for name, least in _LEAST[path.stem].items() if _at(found, name) < least]
    return [*told, "commit"] if found["commit"].endswith("+") else told


def take_over() -> tuple[list[str], list[str]]:
    """Copy the figures of runs that held; return the names of these, and of those that did not."""
    KEPT.mkdir(exist_ok=True)
    fresh = sorted(path for path in FRESH.glob("*.json") if path.stem in RIGS)
    bad = [path for path in fresh if broke(path)]
    for path in fresh:
        if path not in bad:
            (KEPT / path.name).write_text(_PATH.sub(r"...\1", path.read_text()))
    return [path.stem for path in fresh if path not in bad], [path.stem for path in bad]


def table() -> str:
    """Return the table as the kept figures make it."""
    lines = ["| rig | when, at which commit | figures |", "|---|---|---|"]
    for name in RIGS:
        path = KEPT / f"{name}.json"
        if path.exists():
            lines.append(_row(name, json.loads(path.read_text())))
    return "\n".join(lines) + "\n"


def _row(name: str, found: dict[str, Any]) -> str:
    zeros = [f"**0 {key.replace('_', ' ')}**" for key in BROKEN if key in found]
    told = {key: words for key, words in _SHOWN[name].items() if key in found or key not in CHANGED}
    shown = [f"{_text(_at(found, key))} {words}" for key, words in told.items()]
    when = f"{found['finished'][:10]}, {found['commit']}"
    figures = ", ".join(zeros + shown)
    return f"| [{name}](figures/{name}.json) `{found['command']}` | {when} | {figures} |"


def _at(found: dict[str, Any], key: str) -> float:
    """Return that figure, `outer.inner` where it lies deeper; of a collection its size."""
    outer, _, inner = key.partition(".")
    value = found[outer][inner] if inner else found.get(outer, 0)
    return value if isinstance(value, int | float) else len(value)


def _text(value: float) -> str:
    return f"{value:,}"


def with_table(page: str) -> str:
    """Return the page with the table between its markers made anew."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert begin, "the page has no place for the figures"
    assert end, "the place for the figures has no end"
    return head + begin + table() + end + tail


def main() -> int:
    """Take the figures over and write the table."""
    taken, bad = take_over()
    PAGE.write_text(with_table(PAGE.read_text()))
    print(f"taken over: {', '.join(taken) or 'nothing'}; {PAGE.relative_to(ROOT)} is up to date")
    if bad:
        why = "what they promise did not hold, they did too little, or no commit holds their tree"
        print(f"left, because {why}: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
