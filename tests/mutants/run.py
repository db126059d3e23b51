"""All mutants, two at a time: first the project as it is, then each mistake on its own."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.mutants.mutant import Mutant, Stale
from tests.mutants.trial import Outcome, Verdict, ask, copy_project, try_out

Say = Callable[[str], None]


class Tried(NamedTuple):
    """A mutant and what became of it."""

    mutant: Mutant
    outcome: Outcome


class Unsound(Exception):
    """The killers do not pass without any mistake: nothing they say of one means anything."""


def run(mutants: Sequence[Mutant], *, jobs: int, say: Say) -> list[Tried]:
    """Return what became of each mutant.

    Raises:
        Unsound: a killer fails, or is skipped, on the project as it is.
    """
    room = Path(tempfile.mkdtemp(prefix="mut-", dir="/tmp"))  # a unix socket's path has a bound
    room.chmod(0o755)  # some killers run tasks as another user
    try:
        pristine = room / "p"
        copy_project(pristine)
        _check_sound(mutants, pristine, room, jobs, say)
        one = partial(_tried, pristine, room, say)
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, range(len(mutants)), mutants))
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _check_sound(
    mutants: Sequence[Mutant], pristine: Path, room: Path, jobs: int, say: Say
) -> None:
    killers = sorted({killer for mutant in mutants for killer in mutant.killers})
    outcome = ask(killers, pristine, room / "s", jobs=jobs)
    if outcome.verdict is not Verdict.SURVIVED:
        raise Unsound(
            f"the killers do not pass on the project as it is: {outcome.verdict} "
            f"{outcome.by}\n{outcome.said[-4_000:]}"
        )
    say(f"{len(killers)} killers pass without a mistake, in {outcome.seconds:.1f} s")


def _tried(pristine: Path, room: Path, say: Say, number: int, mutant: Mutant) -> Tried:
    try:
        outcome = try_out(mutant, pristine, room / str(number))
    except Stale as stale:
        outcome = Outcome(Verdict.STALE, str(stale))
    say(f"{outcome.verdict:9}{mutant.id} ({outcome.seconds:.1f} s) {outcome.by}")
    return Tried(mutant, outcome)


def figures_of(tried: Sequence[Tried], began_s: float) -> dict[str, Any]:
    """Return what is written down of a run; `began_s` is monotonic."""
    rows = [
        {
            "id": mutant.id,
            "file": mutant.file,
            "breaks": mutant.breaks,
            "verdict": str(outcome.verdict),
            "by": outcome.by,
            "seconds": outcome.seconds,
        }
        for mutant, outcome in tried
    ]
    ours = [row for row in rows if not str(row["id"]).startswith("canary-")]
    return {
        "mutants": len(ours),
        "killed": sum(row["verdict"] == Verdict.KILLED for row in ours),
        "canaries": len(rows) - len(ours),
        "not_killed": [row["id"] for row in rows if row["verdict"] != Verdict.KILLED],
        "seconds": round(time.monotonic() - began_s, 1),
        "each": rows,
    }
