"""`ckptd.testing`: it finds what does not resume, says where, and lets pass what does."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptd.sdk import StepInterrupted, SyncResumableContext, task
from ckptd.sdk.strategy import Manual, Time
from ckptd.testing import Crash, check_resumable, crash_points, lines_of
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[3]


def effect(out: str, text: str) -> str:
    fd = os.open(out, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{text}\n".encode())
    os.close(fd)
    return text


def place_out(place: str) -> dict[str, Any]:
    return {"out": f"{place}/out"}


def effects(place: str) -> list[str]:
    return lines_of(f"{place}/out")


def three_steps(ctx: Any, out: str) -> list[Any]:
    return [ctx.step(name, effect, out, name) for name in ("a", "b", "c")]


async def three_steps_awaited(ctx: Any, out: str) -> list[Any]:
    return [await ctx.step(name, effect, out, name) for name in ("a", "b", "c")]


@pytest.mark.parametrize("function", [three_steps, three_steps_awaited, task(three_steps)])
def test_what_resumes_passes_and_the_report_says_what_was_repeated(
    tmp_path: Path, function: Any
) -> None:
    report = check_resumable(function, tmp_path, given=place_out, side_effects=effects)

    assert report.result == ["a", "b", "c"]
    assert [point.what for point in report.points] == [
        "step_done a",
        "step_done b",
        "step_done c",
        "result",
    ]
    assert len(report.runs) == 8
    assert report.repeated_max == 1
    assert [run.repeated for run in report.runs[:3]] == [["a"], [], ["b"]]
    assert {str(run.result) for run in report.runs} == {"['a', 'b', 'c']"}
    assert not list(tmp_path.rglob("task")), "what went well is cleaned up"


def test_a_second_crash_during_the_resume_is_tried_on_demand(tmp_path: Path) -> None:
    report = check_resumable(
        three_steps, tmp_path, given=place_out, side_effects=effects, twice=True
    )

    pairs = [run.crashes for run in report.runs if len(run.crashes) == 2]
    assert len(pairs) == 6
    assert report.repeated_max <= 2
    again = check_resumable(three_steps, tmp_path, given=place_out, twice=True)
    assert [run.crashes for run in again.runs if len(run.crashes) == 2] == pairs, "seeded"


def test_a_result_that_a_resume_changes_is_told_with_the_point_and_both_results(
    tmp_path: Path,
) -> None:
    def forgets(ctx: SyncResumableContext) -> int:
        total = 0
        for name in ("a", "b"):
            if not ctx.was_step_completed(name):
                total += 1
                ctx.complete_step(name)
        return total

    with pytest.raises(AssertionError) as caught:
        check_resumable(forgets, tmp_path)

    told = str(caught.value)
    assert "after a crash after point 1 (step_done a)" in told
    assert re.search(r"undisturbed: 2\n +resumed: +1\n", told)
    left = re.search(r"left in: +(\S+)", told)
    assert left is not None
    assert (Path(left[1]) / "task" / "journal").is_dir()


def test_an_effect_that_is_left_out_is_told_though_the_result_is_right(tmp_path: Path) -> None:
    def too_early(ctx: SyncResumableContext, out: str) -> str:
        if not ctx.was_step_completed("send"):
            ctx.complete_step("send")
            effect(out, "sent")
        return "ok"

    with pytest.raises(AssertionError, match=r"left out \[\"sent\"\] after a crash after point 1"):
        check_resumable(too_early, tmp_path, given=place_out, side_effects=effects)


def test_a_resume_that_raises_is_told_with_its_traceback(tmp_path: Path) -> None:
    def once(ctx: SyncResumableContext) -> str:
        return str(ctx.step("pay", lambda: "paid", semantics="at_most_once"))

    with pytest.raises(AssertionError, match=r"(?s)after point 1 \(step_start pay\).*Traceback.*"):
        check_resumable(once, tmp_path)

    report = check_resumable(once, tmp_path, may_raise=(StepInterrupted,))
    assert {run.raised for run in report.runs} == {"", "StepInterrupted"}


def test_a_function_that_fails_by_itself_is_told_before_anything_is_crashed(tmp_path: Path) -> None:
    def broken(ctx: SyncResumableContext) -> None:
        raise ZeroDivisionError("no luck")

    with pytest.raises(AssertionError, match=r"(?s)failed without any crash.*no luck"):
        check_resumable(broken, tmp_path)


def test_a_resume_that_hangs_is_killed_and_told(tmp_path: Path) -> None:
    def hangs(ctx: SyncResumableContext) -> None:
        if ctx.resumed:
            signal.pause()
        ctx.complete_step("a")

    with pytest.raises(AssertionError, match=r"did not end within 0\.5 s"):
        check_resumable(hangs, tmp_path, timeout=0.5)


def test_an_interrupt_while_a_child_is_waited_for_ends_it_and_is_told_as_what_it_is(
    tmp_path: Path,
) -> None:
    def interrupts(_: SyncResumableContext) -> None:
        until(lambda: is_asleep(os.getppid()))
        os.kill(os.getppid(), signal.SIGINT)
        signal.pause()

    others, before = children(), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            check_resumable(interrupts, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert children() <= others


def is_asleep(pid: int) -> bool:
    """Tell whether a process waits, as it does for its child and nowhere else."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_a_child_that_dies_of_something_else_is_no_crash_of_ours(tmp_path: Path) -> None:
    def exits(ctx: SyncResumableContext) -> None:
        os._exit(3)

    with pytest.raises(AssertionError, match=r"wait status 0x300"):
        check_resumable(exits, tmp_path)


def test_durable_points_of_a_function_are_listed_by_what_they_make_durable(tmp_path: Path) -> None:
    @task(strategy=Time(0))
    def mixed(ctx: SyncResumableContext, count: int) -> int:
        ctx.state["n"] = 0
        ctx.set_intermediate_result("key", 1)
        for item in ctx.items(range(count)):
            ctx.state["n"] += item.value
        return int(ctx.state["n"])

    points = crash_points(mixed, tmp_path, given={"count": 2})

    assert [(number, what) for number, what in points] == [
        (1, "set key"),
        (2, "item 0"),
        (3, "checkpoint (strategy)"),
        (4, "item 1"),
        (5, "checkpoint (strategy)"),
        (6, "result"),
    ]


def test_more_points_than_asked_for_are_thinned_out_evenly(tmp_path: Path) -> None:
    def many(ctx: SyncResumableContext) -> None:
        for number in range(99):
            ctx.set_intermediate_result(f"{number}", number)

    report = check_resumable(many, tmp_path, at_most=4)

    assert len(report.points) == 100
    starts = [run.crashes[0].split(" (")[0] for run in report.runs[::2]]
    assert starts == ["before point 1", "before point 26", "before point 51", "before point 76"]


@pytest.mark.parametrize(("at", "when"), [(0, "before"), (1, "during")])
def test_a_crash_nowhere_is_refused(at: int, when: str) -> None:
    with pytest.raises(ValueError, match="expected before or after"):
        Crash(at, when)


def test_a_crash_by_itself_kills_the_process_that_runs_the_task(tmp_path: Path) -> None:
    code = f"""
from ckptd.sdk import run_local
from ckptd.testing import Crash
from tests.unit.sdk.test_testing import three_steps
run_local(three_steps, {str(tmp_path / "task")!r}, ports=Crash(2, "after").ports,
          out={str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)

    assert done.returncode == -signal.SIGKILL
    assert lines_of(tmp_path / "out") == ["a", "b"]


def test_nothing_of_the_parent_is_touched_by_its_children(tmp_path: Path) -> None:
    def before() -> tuple[int, Any]:
        return len(os.listdir("/proc/self/fd")), signal.getsignal(signal.SIGTERM)

    seen, others = before(), children()  # of other tests in this process
    check_resumable(task(strategy=Manual())(three_steps), tmp_path, given=place_out)

    assert before() == seen
    until(lambda: children() <= others)


def children() -> set[str]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return set(file.read().split())
