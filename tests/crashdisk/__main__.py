"""`make crashdisk`: power cuts and faults below real file systems, by the thousands.

    python -m tests.crashdisk --states 20000 --fs ext4,xfs,btrfs --seed 1
    python -m tests.crashdisk --fs ext4 --life log --only log-17          one life again

ext4 gets all the states, the slower ones a twentieth each. Exit code 1: a promise is broken; the
state is told, and written to build/crashdisk with the line that plays it again.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests import figures
from tests.crashdisk.filesystem import KINDS, missing, move_apart
from tests.crashdisk.jobs import LIVES_BY_NAME, STATES_PER_LIFE, Done, Job, run

SLOW_SHARE = 20
BUILD = figures.ROOT / "build" / "crashdisk"


def main() -> int:
    """Run it all; return 1 where a promise was broken."""
    asked = _asked()
    wanted = [fs for fs in asked.fs.split(",") if _is_there(fs)]
    jobs = list(_jobs(asked, wanted))
    began = time.monotonic()
    with ProcessPoolExecutor(
        len(os.sched_getaffinity(0)), get_context("spawn"), initializer=move_apart
    ) as pool:
        done = list(pool.map(run, jobs))
    broken = [one for one in done if one.broken]
    for one in broken:
        _tell(one)
    rows = {fs: _summed([one for one in done if one.job.fs == fs]) for fs in wanted}
    for fs, row in rows.items():
        print(f"{fs}: {row['states']:,} states, {row['violations']} violations, {row}")
    figures.write(
        "crashdisk",
        {
            "seed": asked.seed,
            "states": sum(row["states"] for row in rows.values()),
            "violations": len(broken),
            "took_s": round(time.monotonic() - began, 1),
            "file_systems": rows,
        },
        command=f"make crashdisk CRASHDISK_ARGS='--states {asked.states} --seed {asked.seed}'",
    )
    return 1 if broken or not wanted else 0


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.crashdisk", description=__doc__)
    parser.add_argument("--states", type=int, default=20_000, help="on ext4, at least")
    parser.add_argument("--fs", default="ext4,xfs,btrfs")
    parser.add_argument("--life", choices=sorted(LIVES_BY_NAME), help="this one alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="this seed of a life alone")
    return parser.parse_args()


def _is_there(fs: str) -> bool:
    why = missing(KINDS[fs])
    if why:
        print(f"{fs}: skipped: {why}")
    return not why


def _jobs(asked: argparse.Namespace, wanted: list[str]) -> Iterator[Job]:
    lives = [asked.life] if asked.life else list(LIVES_BY_NAME)
    for fs in wanted:
        if asked.only:
            yield Job(fs, asked.life or "log", asked.only, STATES_PER_LIFE)
            continue
        states = asked.states if fs == "ext4" else asked.states // SLOW_SHARE
        count = -(-states // STATES_PER_LIFE)
        for number in range(count):
            life = lives[number % len(lives)]
            yield Job(fs, life, f"{life}-{asked.seed}-{number}", STATES_PER_LIFE)
        if not asked.life:
            yield Job(fs, "", "matrix", 0)


def _summed(done: list[Done]) -> dict[str, object]:
    states = sum((one.states for one in done if one.job.life), Counter[str]())
    cells = sum((one.states for one in done if not one.job.life), Counter[str]())
    took_s = sum(one.took_s for one in done if one.job.life)
    count = states.total()
    return {
        "states": count,
        "violations": sum(bool(one.broken) for one in done),
        "lives": sum(bool(one.job.life) for one in done),
        "a_second_of_one_core": round(count / took_s, 1) if took_s else 0,
        "by_what_survived": dict(states),
        "fault_matrix": sorted(cells),
    }


def _tell(one: Done) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    again = (
        f"python -m tests.crashdisk --fs {one.job.fs} --life {one.job.life} --only {one.job.seed}"
    )
    path = BUILD / f"{one.job.fs}-{one.job.seed}.txt"
    path.write_text(f"{one.broken}\nagain: {again}\n")
    print(f"BROKEN: {one.broken}\nagain: {again}\nkept in {path}")


if __name__ == "__main__":
    sys.exit(main())
