"""Steps, values and external jobs: remembered or run, the same the first time and every time."""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from ckptd.sdk import (
    CheckpointTooLarge,
    DuplicateStepError,
    NotJson,
    PermanentError,
    RetryPolicy,
    StepInterrupted,
    StepTimeout,
    StopRequested,
    SyncResumableContext,
    TransientError,
    run_local,
)
from ckptd.storage.facts import read_facts
from tests.waiting import until


def crashed(function: Any, path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run_local(function, path)


def known(path: Path) -> Any:
    return read_facts(str(path), 0, os.getuid(), 99)


def test_a_result_is_equal_the_first_time_and_when_it_is_remembered(tmp_path: Path) -> None:
    seen: list[Any] = []

    def function(ctx: SyncResumableContext) -> None:
        seen.append(ctx.step("a", lambda: {"raw": b"\x00", "pair": (1, (2, 3)), "none": None}))
        if not ctx.resumed:
            raise ZeroDivisionError

    crashed(function, tmp_path / "t")
    run_local(function, tmp_path / "t")

    assert seen == [{"raw": b"\x00", "pair": [1, [2, 3]], "none": None}] * 2


def test_a_name_is_used_once_in_an_attempt(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> None:
        ctx.step("a", lambda: 1)
        with pytest.raises(DuplicateStepError, match="'a' already ran"):
            ctx.step("a", lambda: 2)

    run_local(function, tmp_path / "t")


def test_another_version_of_a_step_runs_again_and_resets_what_built_upon_it(
    tmp_path: Path,
) -> None:
    ran: list[str] = []

    def made(version: int, *, is_last: bool) -> Any:
        def function(ctx: SyncResumableContext) -> Any:
            def do(name: str) -> str:
                ran.append(name)
                return f"{name}{version}"

            first = ctx.step("a", do, "a", version=version, invalidates=["b"])
            rest = [ctx.step(name, do, name) for name in ("b", "c")]
            if not is_last:
                raise ZeroDivisionError
            return [first, *rest]

        return function

    crashed(made(1, is_last=False), tmp_path / "t")
    assert run_local(made(2, is_last=True), tmp_path / "t") == ["a2", "b2", "c1"]
    assert ran == ["a", "b", "c", "a", "b"]


def test_an_interrupted_at_most_once_step_is_never_run_again_until_it_is_resolved(
    tmp_path: Path,
) -> None:
    def function(ctx: SyncResumableContext) -> Any:
        def pay() -> None:
            raise ZeroDivisionError

        return ctx.step("pay", pay, semantics="at_most_once")

    crashed(function, tmp_path / "t")
    for _ in range(2):
        with pytest.raises(StepInterrupted, match="must not run twice"):
            run_local(function, tmp_path / "t")

    def resolves(ctx: SyncResumableContext) -> Any:
        ctx.complete_step("pay", "looked it up")
        return ctx.was_step_completed("pay")

    assert run_local(resolves, tmp_path / "t") is True
    assert known(tmp_path / "t").steps["pay"]["result"] == "looked it up"


def test_unknown_semantics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at_least_once or at_most_once"):
        run_local(lambda ctx: ctx.step("a", lambda: 1, semantics="exactly_once"), tmp_path / "t")


def tried(errors: list[Exception], retry: RetryPolicy) -> Any:
    left = list(errors)

    def call() -> int:
        if left:
            raise left.pop(0)
        return 7

    return lambda ctx: [ctx.step("a", call, retry=retry), len(left)]


def test_a_step_is_tried_again_as_often_as_its_policy_says(tmp_path: Path) -> None:
    policy = RetryPolicy(max_failures=3, backoff=0)
    two: list[Exception] = [OSError("x"), OSError("y")]
    assert run_local(tried(two, policy), tmp_path / "a") == [7, 0]
    with pytest.raises(OSError, match="z"):
        run_local(tried([*two, OSError("z")], policy), tmp_path / "b")
    with pytest.raises(PermanentError):
        run_local(tried([PermanentError("no")], policy), tmp_path / "c")


def test_retry_after_is_the_floor_of_the_pause(tmp_path: Path) -> None:
    policy = RetryPolicy(max_failures=3, backoff=0)
    began_s = time.monotonic()
    run_local(tried([TransientError("x", retry_after=0.2)], policy), tmp_path / "t")
    assert time.monotonic() - began_s >= 0.2


def test_a_step_over_its_time_is_ended_inside_and_not_completed(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> bool:
        with pytest.raises(StepTimeout, match=r"'slow' took longer than 0\.05 s"):
            ctx.step("slow", until, lambda: False, timeout=0.05)
        return ctx.was_step_completed("slow")

    assert run_local(function, tmp_path / "t") is False


def test_an_awaited_step_over_its_time_is_cancelled(tmp_path: Path) -> None:
    async def function(ctx: Any) -> bool:
        with pytest.raises(StepTimeout, match=r"'slow' took longer than 0\.05 s"):
            await ctx.step("slow", asyncio.Event().wait, timeout=0.05)
        return bool(ctx.was_step_completed("slow"))

    assert run_local(function, tmp_path / "t") is False


def test_a_timeout_of_its_own_inside_an_awaited_step_is_not_taken_for_ours(tmp_path: Path) -> None:
    async def own() -> None:
        raise TimeoutError("mine")

    async def function(ctx: Any) -> None:
        await ctx.step("a", own, timeout=30)

    with pytest.raises(TimeoutError, match="mine"):
        run_local(function, tmp_path / "t")


def test_a_result_that_cannot_be_stored_leaves_the_step_undone(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> list[bool]:
        with pytest.raises(NotJson, match="the result of step 'a' holds a object"):
            ctx.step("a", object)
        with pytest.raises(CheckpointTooLarge, match="nothing of it was recorded"):
            ctx.step("b", lambda: "x" * (2 << 20))
        return [ctx.was_step_completed(name) for name in ("a", "b")]

    assert run_local(function, tmp_path / "t") == [False, False]


def test_values_are_set_read_and_forgotten_over_attempts(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> Any:
        if ctx.resumed:
            return [ctx.get_intermediate_result(key, "gone") for key in ("a", "b", "c")]
        ctx.set_intermediate_result("a", b"\xff")
        ctx.set_intermediate_result("b", 1)
        ctx.delete_intermediate_result("b")
        ctx.delete_intermediate_result("never there")
        raise ZeroDivisionError

    crashed(function, tmp_path / "t")
    assert run_local(function, tmp_path / "t") == [b"\xff", "gone", "gone"]


def test_a_state_over_its_bound_is_refused_and_the_last_checkpoint_stands(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> int:
        ctx.state["n"] = 1
        good = ctx.checkpoint()
        ctx.state["big"] = "x" * (2 << 20)
        with pytest.raises(CheckpointTooLarge, match="The last checkpoint stands"):
            ctx.checkpoint()
        del ctx.state["big"]
        return ctx.checkpoint().seq - good.seq

    assert run_local(function, tmp_path / "t") == 1


class Elsewhere:
    """Another system that runs jobs."""

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.polled: list[str] = []
        self.cancelled: list[str] = []
        self.answers: list[Any] = []

    def submit(self, key: str) -> str:
        self.submitted.append(key)
        return f"job-{len(self.submitted)}"

    def poll(self, job: str) -> Any:
        self.polled.append(job)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def test_an_external_job_is_submitted_once_and_polled_by_its_known_id(tmp_path: Path) -> None:
    other = Elsewhere()
    other.answers = [None, ZeroDivisionError(), None, {"ok": True}]

    def function(ctx: SyncResumableContext) -> Any:
        return ctx.external_job("train", other.submit, other.poll, every=0.01)

    crashed(function, tmp_path / "t")
    assert run_local(function, tmp_path / "t") == {"ok": True}
    assert len(other.submitted) == 1
    assert set(other.polled) == {"job-1"}


def test_a_lost_answer_of_a_submit_is_told_and_nothing_is_submitted_twice(tmp_path: Path) -> None:
    other = Elsewhere()

    def lost(key: str) -> str:
        other.submit(key)
        raise ZeroDivisionError

    def function(ctx: SyncResumableContext) -> Any:
        return ctx.external_job("train", lost, other.poll)

    crashed(function, tmp_path / "t")
    with pytest.raises(StepInterrupted):
        run_local(function, tmp_path / "t")
    assert len(other.submitted) == 1


def test_a_cancel_cancels_the_external_job_and_a_shutdown_does_not(tmp_path: Path) -> None:
    for reason, wanted in (("cancel", ["job-1"]), ("shutdown", [])):
        other = Elsewhere()
        other.answers = [None] * 1000

        def function(ctx: SyncResumableContext, reason: str = reason, o: Any = other) -> Any:
            def submit(key: str) -> str:
                Path(ctx.directory, "control.json").write_text(f'{{"stop": "{reason}"}}')
                return str(o.submit(key))

            return ctx.external_job("train", submit, o.poll, o.cancelled.append, every=0.01)

        with pytest.raises(StopRequested, match=reason):
            run_local(function, tmp_path / reason)
        assert other.cancelled == wanted


@pytest.mark.parametrize("is_async", [False, True])
def test_a_step_that_must_not_run_twice_may_say_that_nothing_was_done(
    tmp_path: Path, *, is_async: bool
) -> None:
    tries: list[int] = []

    def pay() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise TransientError("the bank does not answer the phone")
        return "paid"

    def plain(ctx: SyncResumableContext) -> str:
        return ctx.step("pay", pay, semantics="at_most_once")

    async def awaited(ctx: Any) -> Any:
        return await ctx.step("pay", pay, semantics="at_most_once")

    function = awaited if is_async else plain
    with pytest.raises(TransientError):
        run_local(function, tmp_path / "t")
    assert run_local(function, tmp_path / "t") == "paid"
    assert len(tries) == 2


def test_a_job_that_could_not_be_submitted_is_submitted_later(tmp_path: Path) -> None:
    keys: list[str] = []

    def submit(key: str) -> int:
        keys.append(key)
        if len(keys) == 1:
            raise TransientError("connection refused")
        return 7

    def function(ctx: SyncResumableContext) -> Any:
        return ctx.external_job("render", submit, lambda job: f"done {job}")

    with pytest.raises(TransientError):
        run_local(function, tmp_path / "t")
    assert run_local(function, tmp_path / "t") == "done 7"
    assert keys[0] == keys[1]


def test_a_file_dropped_while_a_save_is_under_way_is_left_out_of_the_next(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> list[list[str]]:
        Path(ctx.file("w")).write_text("weights")
        pending = ctx.checkpoint_behind()
        ctx.drop_file("w")
        pending.wait()
        first = ctx.files()
        ctx.checkpoint()
        return [first, ctx.files()]

    assert run_local(function, tmp_path / "t") == [["w"], []]
