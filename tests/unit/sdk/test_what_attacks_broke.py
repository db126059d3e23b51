"""Damage that a hostile review found in the SDK, one test each; the name says what was lost."""

import asyncio
import errno
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from ckptd.sdk import (
    CorruptCheckpointError,
    Manual,
    ResumableContext,
    StopRequested,
    SyncResumableContext,
    TransientError,
    run_local,
    task,
)
from ckptd.sdk.save import Saved, Saving
from ckptd.sdk.strategy import Pace
from ckptd.sdk.work import Ports
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


# --- checkpoints ---------------------------------------------------------------------------------


def write(path: str, text: str) -> None:
    Path(path).write_text(text)


def read(path: str | None) -> str:
    assert path is not None
    return Path(path).read_text()


class Held:
    """Saves that wait in the middle until they are let go; one whose reason is `bad` fails."""

    def __init__(self) -> None:
        self.is_let_go = threading.Event()
        self.has_begun = threading.Event()
        self.ports = Ports(save=self.save)

    def save(self, saving: Saving, header: dict[str, Any]) -> Saved:
        if header["reason"] in {"held", "bad"}:
            self.has_begun.set()
            assert self.is_let_go.wait(20)
        if header["reason"] == "bad":
            saving.drop()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return saving.finish(header)


def test_a_save_whose_wait_was_cancelled_loses_no_file_of_the_next_one(tmp_path: Path) -> None:
    held = Held()

    async def function(ctx: ResumableContext) -> list[str]:
        write(ctx.file("a"), "1")
        saving = asyncio.create_task(ctx.checkpoint("held"))
        await asyncio.to_thread(held.has_begun.wait, 20)
        saving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saving
        asyncio.get_running_loop().call_later(0.05, held.is_let_go.set)
        await ctx.checkpoint()
        return ctx.files()

    assert run_local(function, tmp_path / "t", ports=held.ports) == ["a"]


def test_a_wait_for_a_save_that_is_struck_by_a_signal_forgets_no_file(tmp_path: Path) -> None:
    held = Held()

    def function(ctx: SyncResumableContext) -> list[str]:
        write(ctx.file("a"), "1")
        pending = ctx.checkpoint_behind("held")
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(InterruptedError):
            ctx.checkpoint()
        held.is_let_go.set()
        ctx.checkpoint()
        assert pending.wait().seq == 1
        return ctx.files()

    before = signal.signal(signal.SIGALRM, struck)
    try:
        assert run_local(function, tmp_path / "t", ports=held.ports) == ["a"]
    finally:
        signal.signal(signal.SIGALRM, before)


def struck(number: int, frame: Any) -> None:
    raise InterruptedError


def test_files_that_other_coroutines_write_are_of_the_same_moment_as_the_state(
    tmp_path: Path,
) -> None:
    async def function(ctx: ResumableContext) -> list[str]:
        is_over = asyncio.Event()

        async def work() -> None:
            while not is_over.is_set():
                ctx.state["n"] = ctx.state.get("n", 0) + 1
                write(ctx.file("n"), str(ctx.state["n"]))
                await asyncio.sleep(0)

        working = asyncio.create_task(work())
        torn = []
        for _ in range(20):
            await asyncio.sleep(0)
            await ctx.checkpoint()
            saved = generations(ctx.directory, os.getuid(), verify=True)[0]
            if str(saved.manifest["state"]["n"]) != read(ctx.saved_file("n")):
                torn.append(saved.path)
        is_over.set()
        await working
        return torn

    assert run_local(function, tmp_path / "t") == []


def test_what_a_failed_save_had_staged_is_in_the_next_one_beside_what_came_meanwhile(
    tmp_path: Path,
) -> None:
    held = Held()

    def function(ctx: SyncResumableContext) -> dict[str, str]:
        write(ctx.file("a"), "old")
        write(ctx.file("in/b"), "old")
        ctx.checkpoint()
        for name in ("a", "in/b", "in/c"):
            write(ctx.file(name), "new")
        failing = ctx.checkpoint_behind("bad")
        write(ctx.file("in/c"), "newest")
        write(ctx.file("d"), "newest")
        held.is_let_go.set()
        with pytest.raises(TransientError):
            failing.wait()
        ctx.checkpoint()
        return {name: read(ctx.saved_file(name)) for name in ctx.files()}

    wanted = {"a": "new", "in/b": "new", "in/c": "newest", "d": "newest"}
    assert run_local(function, tmp_path / "t", ports=held.ports) == wanted


def test_a_file_is_never_carried_on_from_an_older_checkpoint_than_the_state(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> None:
        for text in ("old", "newer"):
            write(ctx.file("a"), text)
            ctx.state["a"] = text
            ctx.checkpoint()
        os.truncate(str(ctx.saved_file("a")), 0)  # the disk lost it
        ctx.state["more"] = 1
        ctx.checkpoint()

    with pytest.raises(CorruptCheckpointError, match="a: the digest differs"):
        run_local(function, tmp_path / "t")


def test_a_child_that_was_forked_during_a_save_does_not_keep_the_next_one_waiting(
    tmp_path: Path,
) -> None:
    held = Held()

    def function(ctx: SyncResumableContext) -> int:
        ctx.state["n"] = 1
        pending = ctx.checkpoint_behind("held")
        ours, theirs = FORK.Pipe()
        child = FORK.Process(target=theirs.recv)
        child.start()
        held.is_let_go.set()
        pending.wait()
        seq = ctx.checkpoint().seq
        ours.send("end")
        child.join(20)
        return seq

    assert run_local(function, tmp_path / "t", ports=held.ports) == 2
