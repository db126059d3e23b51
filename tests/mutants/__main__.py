"""`python -m tests.mutants [ID ...]`: make each mistake of the catalog, see who notices.

    python -m tests.mutants                  all; writes build/figures/mutants.json
    python -m tests.mutants 'wal-*'          some
    python -m tests.mutants --part 3/8       the third eighth of all; beside --promises, those too
    python -m tests.mutants --within 300     those of the promises, and a part that fits in the time

Exit 0 only if every one was killed. A part has figures of its own, build/figures/mutants-part.json.
"""

import argparse
import os
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from typing import Any

from tests import figures
from tests.mutants.mutant import Mutant, catalog
from tests.mutants.part import PAGE, Part, count_within, promised
from tests.mutants.run import Unsound, figures_of, run
from tests.mutants.trial import Verdict


def _say(line: str) -> None:
    """Write a whole line at once: two threads tell."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _asked() -> argparse.Namespace:
    """Return what is asked for, `--within` as the part that it comes to."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m tests.mutants", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="all, without any; or a pattern")
    parser.add_argument("-j", "--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("-l", "--list", action="store_true", help="only say what there is")
    parser.add_argument("--part", type=Part.parsed, metavar="K/N", help="every mutant is in one")
    parser.add_argument("--promises", action="store_true", help="those of docs/reliability.md")
    parser.add_argument("--within", type=float, metavar="SECONDS", help="a part by the commit")
    asked = parser.parse_args()
    if asked.within is not None:
        asked.promises = True
        count = count_within(asked.within, len(catalog()), len(promised(PAGE.read_text())))
        asked.part = Part.drawn(_commit(), count) if count else None
    return asked


def _commit() -> str:
    """Return the commit in hex."""
    command = ("git", "rev-parse", "HEAD")
    done = subprocess.run(command, cwd=figures.ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _chosen(asked: argparse.Namespace, mutants: list[Mutant]) -> list[Mutant]:
    """Return what was asked for, the promises first; all where nothing is."""
    if not (asked.ids or asked.part or asked.promises):
        return mutants
    ids = promised(PAGE.read_text()) if asked.promises else []
    first = [one for one in mutants if one.id in ids]
    part = asked.part.of(mutants) if asked.part else []
    named = [one for one in mutants if any(fnmatchcase(one.id, name) for name in asked.ids)]
    return list(dict.fromkeys([*first, *part, *named]))


def _write(asked: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write the figures of a whole run, or those of a part beside them."""
    if asked.ids:
        return
    options = f" --part {asked.part}" if asked.part else ""
    options += " --promises" if asked.promises else ""
    command = f"python -m tests.mutants{options}"
    if options:
        part = {"part": str(asked.part or "promises")}
        figures.write("mutants-part", {**part, **found}, command=command)
        print(f"a part; again: {command}")
    else:
        figures.write("mutants", found, command=command)


def main() -> int:
    asked = _asked()
    chosen = _chosen(asked, catalog())
    if not chosen:
        print(f"no mutant is called {' '.join(asked.ids)}", file=sys.stderr)
        return 2
    if asked.list:
        print("\n".join(f"{one.id:45} {one.breaks}" for one in chosen))
        return 0
    began_s = time.monotonic()
    if not asked.ids:
        figures.begin("mutants-part" if asked.part or asked.promises else "mutants")
    try:
        tried = run(chosen, jobs=asked.jobs, say=_say)
    except Unsound as unsound:
        print(unsound, file=sys.stderr)
        return 1
    found = figures_of(tried, began_s)
    _write(asked, found)
    left = [one for one in tried if one.outcome.verdict is not Verdict.KILLED]
    print(f"{found['killed']} of {found['mutants']} killed in {found['seconds']} s")
    for mutant, outcome in left:
        print(f"\n{outcome.verdict}: {mutant.id}, which breaks: {mutant.breaks}\n  {outcome.by}")
        print(f"  again: python -m tests.mutants {mutant.id}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
