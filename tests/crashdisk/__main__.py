"""`make crashdisk`: power cuts and faults below real file systems, by the thousands.

    python -m tests.crashdisk --states 20000 --fs ext4,xfs,btrfs --seed 1
    python -m tests.crashdisk --fs ext4 --life log --only log-1-17        one life again
    python -m tests.crashdisk --fs btrfs --matrix                         the faults alone

ext4 gets all the states, the slower ones a twentieth each. Exit code 1: a file system that was
asked for cannot be had here (`skipped` in the figures), or a promise is broken; the state is told,
and kept in build/crashdisk: as a disk to be mounted, with its tape, and with the line that plays it
again. Only a whole run, of all lives and the faults, writes figures.
"""

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from tests import figures
from tests.crashdisk.filesystem import KINDS, missing, move_apart
from tests.crashdisk.jobs import KEPT, LIVES_BY_NAME, MOMENTS_MAX, Done, Job, again, run

SLOW_SHARE = 20
STALL_S = 5.0
LIVES_MAX = 100_000
JOBS_AT_ONCE = 6
MOMENTS_MIN = 10


def main() -> int:
    """Run it all; return 1 where a promise was broken, or where something was left out."""
    asked = asked_for(sys.argv[1:])
    if not (asked.only or asked.matrix or asked.life):
        figures.begin("crashdisk")
    skipped = {fs: why for fs in asked.fs.split(",") if (why := missing(KINDS[fs]))}
    wanted = [fs for fs in asked.fs.split(",") if fs not in skipped]
    began = time.monotonic()
    with ProcessPoolExecutor(
        len(os.sched_getaffinity(0)), get_context("spawn"), initializer=move_apart
    ) as pool:
        done = [one for fs in wanted for one in _played(pool, asked, fs)]
    rows = {fs: _summed([one for one in done if one.job.fs == fs]) for fs in wanted}
    broken = [one for one in done if one.broken]
    _tell(rows, broken, skipped)
    if not (asked.only or asked.matrix or asked.life):
        found = _figures(rows, broken, skipped)
        took_s = round(time.monotonic() - began, 1)
        figures.write(
            "crashdisk", {"seed": asked.seed, **found, "took_s": took_s}, command=command_of(asked)
        )
    return 1 if broken or skipped else 0


def _figures(
    rows: dict[str, dict[str, Any]], broken: list[Done], skipped: dict[str, str]
) -> dict[str, Any]:
    return {
        **{f"{fs}_states": row["states"] for fs, row in rows.items()},
        "fault_cells": sum(len(row["fault_matrix"]) for row in rows.values()),
        "violations": len(broken),
        "skipped": skipped,
        "file_systems": rows,
    }


def command_of(asked: argparse.Namespace) -> str:
    """Return the line that does the same again."""
    start = f"python -m tests.crashdisk --states {asked.states} --fs {asked.fs} --seed {asked.seed}"
    moments = f" --moments {asked.moments}" if asked.moments != MOMENTS_MAX else ""
    stall = f" --stall {asked.stall:g}" if asked.stall != STALL_S else ""
    return start + moments + stall


def _tell(rows: dict[str, dict[str, Any]], broken: list[Done], skipped: dict[str, str]) -> None:
    for fs, why in skipped.items():
        print(f"{fs}: SKIPPED: {why}")
    for one in broken:
        print(f"BROKEN: {one.broken}\nagain: {again(one.job)}\nkept in {KEPT}")
    for fs, row in rows.items():
        what = ", ".join(f"{count:,} {name}" for name, count in row["by_what_survived"].items())
        rate = f"{row['a_second_of_one_core']} a second of one core"
        print(f"{fs}: {row['states']:,} states ({what}), {rate}; {row['violations']} violations")
        for cell, outcome in row["fault_matrix"].items():
            print(f"    {cell}: {outcome}")


def asked_for(words: list[str]) -> argparse.Namespace:
    """Return what the words of a command line ask for."""
    parser = argparse.ArgumentParser("python -m tests.crashdisk", description=__doc__)
    parser.add_argument("--states", type=int, default=20_000, help="on ext4, at least")
    parser.add_argument("--fs", default="ext4,xfs,btrfs")
    parser.add_argument("--life", choices=sorted(LIVES_BY_NAME), help="this one alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="this seed of a life alone")
    parser.add_argument("--moments", type=int, default=MOMENTS_MAX, help="of a life, at most")
    parser.add_argument("--matrix", action="store_true", help="the fault matrix alone")
    parser.add_argument("--stall", type=float, default=STALL_S, help="seconds of a stalled disk")
    return parser.parse_args(words)


def _played(pool: ProcessPoolExecutor, asked: argparse.Namespace, fs: str) -> list[Done]:
    """Have the faults and then lives played, until there are as many states as were asked for."""
    if asked.only:
        return list(pool.map(run, [Job(fs, asked.life or "log", asked.only, asked.moments)]))
    jobs = [] if asked.life else [Job(fs, "", "matrix", stall_s=asked.stall)]
    wanted = 0 if asked.matrix else asked.states if fs == "ext4" else asked.states // SLOW_SHARE
    lives = [asked.life] if asked.life else list(LIVES_BY_NAME)
    moments = min(asked.moments, max(MOMENTS_MIN, wanted // len(lives)))
    done: list[Done] = []
    for number in range(LIVES_MAX if wanted else 1):
        jobs += [
            Job(fs, life, f"{life}-{asked.seed}-{number}", moments) for life in lives if wanted
        ]
        if len(jobs) >= JOBS_AT_ONCE or not wanted:
            done += pool.map(run, jobs)
            jobs = []
            if _states_of(done).total() >= wanted:
                break
    return done


def _states_of(done: list[Done]) -> Counter[str]:
    return sum((one.states for one in done if one.job.life), Counter[str]())


def _summed(done: list[Done]) -> dict[str, Any]:
    states = _states_of(done)
    cells = sum((one.states for one in done if not one.job.life), Counter[str]())
    took_s = sum(one.took_s for one in done if one.job.life)
    count = states.total()
    return {
        "states": count,
        "violations": sum(bool(one.broken) for one in done),
        "lives": sum(bool(one.job.life) for one in done),
        "a_second_of_one_core": round(count / took_s, 1) if took_s else 0,
        "by_what_survived": dict(states),
        "fault_matrix": dict(cell.split(": ") for cell in sorted(cells)),
    }


if __name__ == "__main__":
    sys.exit(main())
