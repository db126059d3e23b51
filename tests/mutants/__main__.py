"""`python -m tests.mutants [ID ...]`: make each mistake of the catalog, see who notices.

An ID may be a pattern (`wal-*`). Exit 0 only if every one was killed; writes
build/figures/mutants.json where all of them ran.
"""

import argparse
import os
import sys
import time
from fnmatch import fnmatchcase

from tests import figures
from tests.mutants.mutant import catalog
from tests.mutants.run import Unsound, figures_of, run
from tests.mutants.trial import Verdict


def _say(line: str) -> None:
    """Write a whole line at once: two threads tell."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.mutants", description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID", help="all, without any")
    parser.add_argument("-j", "--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("-l", "--list", action="store_true", help="only say what there is")
    asked = parser.parse_args()
    chosen = [
        one for one in catalog() if not asked.ids or any(fnmatchcase(one.id, i) for i in asked.ids)
    ]
    if not chosen:
        parser.error(f"no mutant is called {' '.join(asked.ids)}")
    if asked.list:
        print("\n".join(f"{one.id:45} {one.breaks}" for one in chosen))
        return 0
    began_s = time.monotonic()
    try:
        tried = run(chosen, jobs=asked.jobs, say=_say)
    except Unsound as unsound:
        print(unsound, file=sys.stderr)
        return 1
    found = figures_of(tried, began_s)
    if not asked.ids:
        figures.write("mutants", found, command="python -m tests.mutants")
    left = [one for one in tried if one.outcome.verdict is not Verdict.KILLED]
    print(f"{found['killed']} of {found['mutants']} killed in {found['seconds']} s")
    for mutant, outcome in left:
        print(f"\n{outcome.verdict}: {mutant.id}, which breaks: {mutant.breaks}\n  {outcome.by}")
        print(f"  again: python -m tests.mutants {mutant.id}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
