"""What saving costs a function: `ckptctl bench overhead` runs this in the author's interpreter.

    python .../ckptd/offline/overhead.py PLACE PAIRS work:ingest --input '{"path": "data.csv"}'

    pair 1   as declared | Manual            pair 2   Manual | as declared            ...

Every run starts from nothing in a directory of its own below PLACE, in this one process. Under
Manual no save is made but those that the function asks for by name; steps, items and values are
durable in both, so their cost is in neither difference. They take turns, so that a machine that
gets slower or faster meanwhile is no overhead. The last line of stdout is the report, as JSON; what
the function prints is not shown, its stderr is.
Exit codes: 0 measured, 1 the function failed: {"error": ...}, 65 it cannot be run.
Read next: `ckptd/sdk/drive.py` (one run), `ckptd/sdk/strategy.py` (what is expected).
"""

from __future__ import annotations  # run by its path, as `run.py` is

import contextlib
import copy
import json
import os
import random
import shutil
import statistics
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptd.sdk.declare import Task

_RESAMPLES: Final = 4_000
_SURE: Final = 0.95
_FAILED: Final = 1
_BAD_DATA: Final = 65
_INTERRUPTED: Final = 130


class Run(NamedTuple):
    """One run from nothing to its result; `interval_s` is what its strategy aims at, or 0."""

    is_declared: bool
    strategy: str
    wall_s: float
    saves: int
    block_s: float
    bytes: int
    interval_s: float


class Failed(Exception):
    """The function did not come to a result."""


def measure(task: Task, given: dict[str, Any], place: str, pairs: int) -> list[Run]:
    """Run a task in pairs, as declared and under Manual; return the runs in the order they took.

    Raises:
        Failed: a run did not come to a result; its directory is gone.

    Durable: nothing that stays; each run as it would be.
    """
    from ckptd.sdk.outcomes import StopRequested  # noqa: PLC0415  (after make_importable)
    from ckptd.sdk.strategy import Manual  # noqa: PLC0415

    plain = copy.copy(task)
    plain.strategy = Manual()
    runs: list[Run] = []
    for pair in range(pairs):
        order = [(True, task), (False, plain)]
        for is_declared, one in order if pair % 2 == 0 else reversed(order):
            what = f"run {len(runs) + 1} of {2 * pairs} (strategy {one.strategy.name})"
            path = os.path.join(place, f"run-{len(runs) + 1}")
            try:
                runs.append(_run(one, given, path, is_declared=is_declared))
            except (Exception, SystemExit, StopRequested) as error:
                raise Failed(f"{what} failed: {_told(error)}") from error
            finally:
                shutil.rmtree(path, ignore_errors=True)
    return runs


def _run(task: Task, given: dict[str, Any], path: str, *, is_declared: bool) -> Run:
    """Do what `run_local` does, and read off what the attempt counted."""
    from ckptd.sdk.drive import drive, opened  # noqa: PLC0415
    from ckptd.sdk.local import begin  # noqa: PLC0415

    began_s = time.perf_counter()
    work = opened(begin(path), task, given, None)
    try:
        work.attention.listen()
        drive(work, park_after_s=float("inf"))
    finally:
        work.close()
    wall_s = time.perf_counter() - began_s
    pace = work.pace
    aim_s = task.strategy.interval_s(pace, work.ports.now_s()) if pace.saves else 0.0
    return Run(is_declared, task.strategy.name, wall_s, pace.saves, pace.block_s, pace.bytes, aim_s)


def _told(error: BaseException) -> str:
    """Return what it is and where: the last line that is not ours."""
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(own)]
    where = f" at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
    return f"{type(error).__name__}: {error}{where}"


# --- what they say -------------------------------------------------------------------------------


def report(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the runs say: measured, counted by the task itself, and expected by the model.

    Expected in the long run, that is: the cost of a save over the interval that the strategy aims
    at; 0 where it has no such aim. A short run has its early save, and is counted higher.
    """
    declared = [run for run in runs if run.is_declared]
    plain = [run for run in runs if not run.is_declared]
    ratios = [one.wall_s / other.wall_s for one, other in zip(declared, plain, strict=True)]
    low, high = bootstrap(ratios)
    saves, block_s = sum(run.saves for run in declared), sum(run.block_s for run in declared)
    wall_s = sum(run.wall_s for run in declared)
    cost_s = block_s / saves if saves else 0.0
    aims = [run.interval_s for run in declared if run.interval_s > 0]
    interval_s = statistics.median(aims) if aims else 0.0
    return {
        "strategy": declared[0].strategy,
        "pairs": len(ratios),
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
        "declared_s": statistics.median(run.wall_s for run in declared),
        "manual_s": statistics.median(run.wall_s for run in plain),
        "saves": saves / len(declared),
        "saves_manual": sum(run.saves for run in plain) / len(plain),
        "cost_s": cost_s,
        "bytes": max(run.bytes for run in declared),
        "interval_s": interval_s,
        "counted": block_s / (wall_s - block_s) if wall_s > block_s else 0.0,
        "expected": cost_s / interval_s if interval_s else 0.0,
        "runs": [run._asdict() for run in runs],
    }


def bootstrap(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the interval in which the median lies with 95 %, by drawing again from what is there.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", Ann. Statist. 7 (1979);
    the percentile interval. The seed is fixed: the same runs say the same.
    """
    draw = random.Random(1)  # noqa: S311 - no secret
    medians = sorted(
        statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES)
    )
    tail = int(len(medians) * (1 - _SURE) / 2)
    return medians[tail], medians[-1 - tail]


# --- run by its path -----------------------------------------------------------------------------


def _make_importable() -> None:
    """Let `ckptd` be the package that this file is in, by the way that `run.py` has."""
    import importlib.util  # noqa: PLC0415  (only this way of starting needs it)

    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "sdk/run.py")
    spec = importlib.util.spec_from_file_location("_ckptd_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_importable()


def main(argv: list[str]) -> int:
    """Measure, and print the report as the last line."""
    if sys.path and sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # its names would hide others
    sys.path.insert(0, os.getcwd())
    _make_importable()
    from ckptd.sdk.run import NoSuchFunction, resolve  # noqa: PLC0415

    place, pairs, target, _, text = argv
    said = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # also what the function's own processes print
    told: dict[str, Any]
    try:
        told, code = report(measure(resolve(target), json.loads(text), place, int(pairs))), 0
    except NoSuchFunction as error:
        told, code = {"error": str(error)}, _BAD_DATA
    except Failed as error:
        told, code = {"error": str(error)}, _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED  # whoever waits for us got the same Ctrl-C
    finally:
        shutil.rmtree(place, ignore_errors=True)  # whose maker may be killed before us
    with contextlib.suppress(BrokenPipeError):  # a stop took who asked along
        os.write(said, f"{json.dumps(told)}\n".encode())
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
