"""The figures of docs/reliability.md: `make figures` takes over what the last runs wrote.

    build/figures/NAME.json -> docs/figures/NAME.json -> the table between the markers

The table is made of docs/figures alone, so page and figures always agree; a test sees to it.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Final

from tests.figures import FRESH, ROOT

PAGE: Final = ROOT / "docs" / "reliability.md"
KEPT: Final = ROOT / "docs" / "figures"
BEGIN: Final = "<!-- generated: figures -->\n"
END: Final = "<!-- end -->\n"
RIGS: Final = ("sim", "states", "crashdisk", "torture", "soak", "fuzz", "mutants", "golden")
BROKEN: Final = ("violations", "finds", "not_killed")
"""What must be 0, or empty, in a run that is published."""
_ABOUT: Final = frozenset({"command", "commit", "finished", "cores", "kernel", "python"})
_SHOWN_MAX: Final = 9  # figures of one rig in the table; the file has all


def broke(path: Path) -> list[str]:
    """Return which of the figures that must be 0 is not."""
    found = json.loads(path.read_text())
    return [name for name in BROKEN if found.get(name)]


def take_over() -> tuple[list[str], list[str]]:
    """Copy the figures of runs that held; return the names of these, and of those that did not."""
    KEPT.mkdir(exist_ok=True)
    fresh = sorted(path for path in FRESH.glob("*.json") if path.stem in RIGS)
    bad = [path for path in fresh if broke(path)]
    for path in fresh:
        if path not in bad:
            shutil.copyfile(path, KEPT / path.name)
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
    plain = [
        f"{key} {_text(value)}"
        for key, value in found.items()
        if key not in _ABOUT and isinstance(value, int | float | str)
    ]
    when = f"{found['finished'][:10]}, {found['commit']}"
    return f"| [{name}](figures/{name}.json) `{found['command']}` | {when} | {_shown(plain)} |"


def _shown(plain: list[str]) -> str:
    """Return the first figures, and always those that must be 0."""
    zeros = [one for one in plain if one.split()[0] in BROKEN]
    others = [one for one in plain if one not in zeros]
    return ", ".join(zeros + others[:_SHOWN_MAX])


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value.replace("|", "/")
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
        print(f"left, because what they promise did not hold: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
