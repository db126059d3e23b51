"""`ckptctl bench overhead` as a process: pairs that take turns, what is told, what goes wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptd.offline.overhead import Run, bootstrap, report
from tests.unit.ctl.conftest import ROOT, ctl
from tests.waiting import until

WORK = """
import os
from ckptd.sdk import Manual, Time, task

def log(ctx, text=""):
    with open("runs.log", "a") as file:
        place = os.path.dirname(ctx._work.around.dir)
        file.write(f"{ctx._work.task.strategy.name} {place} {text}\\n")

@task(strategy=Time(0))
def fold(ctx, n):
    print("noise")
    os.system("echo more noise")
    log(ctx, ctx.resumed)
    ctx.step("first", lambda: 1)
    for part in ctx.track(range(n)):
        ctx.state["part"] = part
        with open(ctx.file("data"), "w") as file:
            file.write("x" * 100)

@task(strategy=Manual())
def by_hand(ctx):
    ctx.state["x"] = 1
    ctx.checkpoint()

@task
async def later(ctx):
    log(ctx)

@task(version=2)
def asks(ctx):
    ctx.state["x"] = 1
    ctx.checkpoint()

@task
def fails(ctx):
    log(ctx)
    if len(open("runs.log").readlines()) == 3:
        raise ValueError("no luck")

@task
def leaves(ctx):
    raise SystemExit("enough")

@task
def dies(ctx):
    os._exit(7)
"""


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work.py").write_text(WORK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bench(function: str, *words: str) -> tuple[int, str, str]:
    options = ("--python", f"work:{function}", "--interpreter", sys.executable)
    return ctl("ipc:///nowhere", "bench", "overhead", *options, *words)


def measured(function: str, *words: str) -> dict[str, Any]:
    code, out, err = bench(function, *words, "-o", "json")
    assert code == 0, err
    document = json.loads(out)
    assert document["schema"] == "ckptd/v1"
    found: dict[str, Any] = document["overhead"]
    return found


def left(work: Path) -> list[str]:
    return [path.name for path in work.iterdir() if path.name.startswith(".ckptd-bench")]


def test_runs_take_turns_as_declared_and_without_saving(work: Path) -> None:
    found = measured("fold", "--input", '{"n": 5}', "--pairs", "3")
    took = ["time", "manual", "manual", "time", "time", "manual"]
    assert [run["strategy"] for run in found["runs"]] == took
    assert [run["is_declared"] for run in found["runs"]] == [name == "time" for name in took]
    lines = [line.split() for line in (work / "runs.log").read_text().splitlines()]
    assert [line[0] for line in lines] == took
    assert {line[2] for line in lines} == {"False"}, "each begins from nothing"
    assert {Path(line[1]).parent for line in lines} == {work}, "on the disk of this directory"
    assert left(work) == []


def test_the_report_tells_what_was_measured_counted_and_expected() -> None:
    found = measured("fold", "--input", '{"n": 5}', "--pairs", "2")
    assert (found["function"], found["strategy"], found["pairs"]) == ("work:fold", "time", 2)
    assert found["saves"] >= 5
    assert found["saves_manual"] == 0
    assert found["bytes"] == 100
    assert found["cost_s"] > 0
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    assert {"declared_s", "manual_s", "interval_s", "counted", "expected"} <= set(found)


def test_people_get_it_in_words() -> None:
    code, out, err = bench("fold", "--input", '{"n": 5}', "--pairs", "2")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert names == ["function", "runs", "measured", "saves", "counted"]
    assert "work:fold, strategy time" in out
    assert "2 pairs say little, take 10 or more" in err
    assert "noise" not in out + err


def test_saves_that_the_function_asks_for_are_told_as_such() -> None:
    found = measured("asks", "--pairs", "1")
    assert (found["saves"], found["saves_manual"]) == (1, 1)
    assert "1 saves a run are asked for by the function itself" in bench("asks", "--pairs=1")[2]
    assert "it is declared Manual" in bench("by_hand", "--pairs=1")[2]


def test_a_coroutine_is_measured_too_and_one_that_never_saves_is_told() -> None:
    code, out, err = bench("later", "--pairs", "1")
    assert (code, "saves     none" in out) == (0, True)
    assert "it made no save" in err


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("fails", r"run 3 of 20 (strategy manual) failed: ValueError: no luck at"),
        ("leaves", "run 1 of 20 (strategy automatic) failed: SystemExit: enough at"),
        ("dies", "work:dies ended the interpreter (exit 7)"),
    ],
)
def test_a_function_that_fails_is_told_and_nothing_is_left(
    work: Path, function: str, complaint: str
) -> None:
    code, out, err = bench(function)
    assert (code, out) == (1, "")
    assert complaint in err
    assert "nothing was measured" in err
    assert left(work) == []


@pytest.mark.parametrize(
    ("function", "words", "complaint"),
    [
        ("fold", (), "missing a required argument: 'n'"),
        ("fold", ("--input", "[1]"), "--input is a list, an object is expected"),
        ("fodl", (), "has no 'fodl'; it has: "),
        ("fold", ("--pairs", "0"), "--pairs: 0 is out of range"),
        ("fold", ("-o", "csv"), "has no output as csv"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(
    work: Path, function: str, words: tuple[str, ...], complaint: str
) -> None:
    code, _, err = bench(function, *words)
    assert code == 64
    assert complaint in err
    assert not (work / "runs.log").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_behind(work: Path, number: signal.Signals) -> None:
    options = ("--python", "work:fold", "--interpreter", sys.executable, "--input", '{"n": 99999}')
    command = [sys.executable, "-m", "ckptctl", "bench", "overhead", *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, process_group=0) as process:
        until((work / "runs.log").exists)
        os.killpg(process.pid, number)
        assert process.stderr is not None
        said = process.stderr.read().decode()  # to its end: both are gone
    assert "Traceback" not in said
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGTERM)
    assert left(work) == []


def test_without_a_function_there_is_an_example() -> None:
    code, _, err = ctl("ipc:///nowhere", "bench")
    assert (code, "example: ckptctl bench overhead" in err) == (64, True)


def run(wall_s: float, saves: int = 0, block_s: float = 0.0, interval_s: float = 0.0) -> Run:
    return Run(saves > 0, "time" if saves else "manual", wall_s, saves, block_s, 0, interval_s)


def test_the_arithmetic_pairs_neighbours_and_counts_what_the_task_counted() -> None:
    runs = [run(11, 2, 1, 50), run(10), run(20), run(24, 2, 1, 50), run(12, 2, 1, 50), run(10)]
    found = report(runs)
    assert found["ratio"] == 1.2
    assert (found["ratio_low"], found["ratio_high"]) == (1.1, 1.2)
    assert (found["saves"], found["cost_s"], found["expected"]) == (2, 0.5, 0.01)
    assert found["counted"] == 3 / (47 - 3)


def test_the_interval_holds_the_median_and_is_the_same_for_the_same_runs() -> None:
    ratios = [1 + n / 1000 for n in (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)]
    low, high = bootstrap(ratios)
    assert 1.001 <= low < 1.0035 < high <= 1.009
    assert bootstrap(ratios) == (low, high)
    assert bootstrap([1.5]) == (1.5, 1.5)
