"""Damage that a hostile review found in the SDK, one test each; the name says what was lost."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ckptd.sdk import (
    Manual,
    ResumableContext,
    StopRequested,
    SyncResumableContext,
    run_local,
    task,
)
from ckptd.sdk.strategy import Pace
from ckptd.storage.blobs import generations
from ckptd.storage.facts import read_facts

FORK = multiprocessing.get_context("fork")


def values_on_disk(directory: Path) -> dict[str, Any]:
    return read_facts(str(directory), 0, os.getuid(), 99).values


def state_on_disk(directory: Path) -> Any:
    newest = generations(str(directory), os.getuid(), verify=True)[0]
    assert newest.valid, newest.fault
    return newest.manifest["state"]


# --- two processes of one attempt ----------------------------------------------------------------


def test_forked_children_that_record_beside_their_parent_damage_no_journal(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> list[int | None]:
        ctx.step("opens the journal", os.getpid)

        def record(of: int) -> None:
            for serial in range(60):
                ctx.set_intermediate_result(f"{of}-{serial}", serial)

        children = [FORK.Process(target=record, args=(of,)) for of in (1, 2)]
        for child in children:
            child.start()
        record(0)
        for child in children:
            child.join(20)
        return [child.exitcode for child in children]

    assert run_local(function, tmp_path / "t") == [0, 0]

    told = {f"{of}-{serial}" for of in range(3) for serial in range(60)}
    assert told - set(values_on_disk(tmp_path / "t")) == set()


def test_forked_children_agree_on_idempotency_keys_with_later_attempts(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> list[str]:
        ours, theirs = FORK.Pipe()

        def ask() -> None:
            theirs.send(ctx.idempotency_key("pay"))

        children = [FORK.Process(target=ask) for _ in range(3)]
        for child in children:
            child.start()
            child.join(20)
        keys = {ours.recv() for _ in children} | {ctx.idempotency_key("pay")}
        if ctx.attempt == 1:
            (tmp_path / "keys").write_text("\n".join(keys))
            raise ZeroDivisionError
        return sorted(keys)

    try:
        run_local(function, tmp_path / "t")
    except ZeroDivisionError:
        before = (tmp_path / "keys").read_text().splitlines()
    assert run_local(function, tmp_path / "t") == before


# --- items and stops -----------------------------------------------------------------------------


def test_items_with_long_keys_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> list[str]:
        done = [item.value[0] for item in ctx.items(["a" * 600, "b" * 600])]
        done += [item.value[0] for item in ctx.items(["c" * 600], name="n" * 100)]
        ctx.record_item("d" * 600, "pass")
        done += [item.value[0] for item in ctx.items(["d" * 600])]
        if ctx.attempt == 1:
            assert done == ["a", "b", "c"]
            raise ZeroDivisionError
        return done

    with pytest.raises(ZeroDivisionError):
        run_local(function, tmp_path / "t")
    assert run_local(function, tmp_path / "t") == []


def test_awaited_items_with_long_keys_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    async def function(ctx: ResumableContext) -> list[str]:
        done = [item.value[0] async for item in ctx.items(["a" * 600, "b" * 600])]
        if ctx.attempt == 1:
            raise ZeroDivisionError
        return done

    with pytest.raises(ZeroDivisionError):
        run_local(function, tmp_path / "t")
    assert run_local(function, tmp_path / "t") == []


class StopsWhenAsked(Manual):
    """A stop comes in the middle of a safe point, after it was looked for."""

    def is_due(self, pace: Pace, now_s: float) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().is_due(pace, now_s)


def test_a_stop_in_the_middle_of_a_safe_point_loses_no_state(tmp_path: Path) -> None:
    @task(strategy=StopsWhenAsked())
    def function(ctx: SyncResumableContext) -> None:
        ctx.state["n"] = 7
        while True:
            ctx.checkpoint_if_needed()

    with pytest.raises(StopRequested):
        run_local(function, tmp_path / "t")
    assert state_on_disk(tmp_path / "t") == {"n": 7}


def test_a_stop_in_the_middle_of_an_awaited_safe_point_loses_no_state(tmp_path: Path) -> None:
    @task(strategy=StopsWhenAsked())
    async def function(ctx: ResumableContext) -> None:
        ctx.state["n"] = 7
        while True:
            await ctx.checkpoint_if_needed()

    with pytest.raises(StopRequested):
        run_local(function, tmp_path / "t")
    assert state_on_disk(tmp_path / "t") == {"n": 7}
