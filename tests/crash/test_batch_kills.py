"""A batch killed at random: each item has one result, and few run more often than once."""

import random
import subprocess
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from tests.batch_world import BatchWorld, kill_with_children
from tests.waiting import let_pass, until

COUNTED = """
import os
import time

def count(item):
    fd = os.open("runs", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{item}\\n".encode())
    os.close(fd)
    time.sleep(0.02)
    return int(item) * 2
"""


def has_begun(log: Path, before: int, runner: subprocess.Popen[str]) -> bool:
    return runner.poll() is not None or (log.exists() and log.stat().st_size > before)


def kill_often(world: BatchWorld, items: int, kills: int, seed: int, *, children: bool) -> None:
    """Run with random kills until it is done; check what stands in the ledger, and the runs."""
    rng = random.Random(seed)
    workers = 8
    world.module(COUNTED)
    names = [str(number) for number in range(items)]
    world.prepare(python="items:count", jobs=workers, items=names)
    log = world.work / "runs"
    for round_number in range(kills):
        before = log.stat().st_size if log.exists() else 0
        runner = world.start()
        if round_number % 5 == 4:
            let_pass(rng.uniform(0.0, 0.3))  # while it begins
        else:
            until(partial(has_begun, log, before, runner))
            let_pass(rng.uniform(0.0, 0.2))
        if children:
            kill_with_children(runner)
        else:
            runner.kill()
            runner.communicate(timeout=20)
    world.run()
    runs = Counter(log.read_text().split())

    results = world.results()
    assert results.keys() == set(names)
    assert all(results[name]["result"] == int(name) * 2 for name in names)
    assert set(world.statuses().values()) == {"pass"}
    assert runs.keys() == set(names)
    assert sum(runs.values()) <= items + kills * workers
    interrupted = world.events().count("begin") - world.events().count("end")
    assert interrupted > kills / 2  # most kills struck while it ran
    assert world.run().stdout == ""  # done is done


@pytest.mark.parametrize("children", [True, False], ids=["with children", "runner alone"])
def test_items_killed_at_random_have_one_result_each(tmp_path: Path, children: bool) -> None:  # noqa: FBT001
    kill_often(BatchWorld(tmp_path), items=1_500, kills=15, seed=1, children=children)


def test_commands_of_a_killed_runner_never_run_beside_their_next_run(tmp_path: Path) -> None:
    world, rng, kills, workers = BatchWorld(tmp_path), random.Random(3), 8, 4
    work = "echo $1 >>runs; sleep 0.03; echo $1"
    script = f"exec 9>lock-$1; flock -n 9 || {{ echo $1 >>overlaps; exit 1; }}; {work}"
    names = [f"i{number}" for number in range(120)]
    world.prepare(argv=["sh", "-c", script, "sh"], jobs=workers, items=names)
    log = world.work / "runs"
    for _ in range(kills):
        before = log.stat().st_size if log.exists() else 0
        runner = world.start()
        until(partial(has_begun, log, before, runner))
        let_pass(rng.uniform(0.0, 0.1))
        runner.kill()  # its items live on
        runner.communicate(timeout=20)
    world.run()
    runs = Counter(log.read_text().split())

    assert not (world.work / "overlaps").exists()
    assert world.results().keys() == runs.keys() == set(names)
    assert all(fact["result"] == key for key, fact in world.results().items())
    assert sum(runs.values()) <= len(names) + kills * workers


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_items_killed_fifty_times(tmp_path: Path) -> None:
    kill_often(BatchWorld(tmp_path), items=10_000, kills=50, seed=2, children=True)
