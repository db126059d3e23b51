"""Damage that a hostile review found in the SDK, one test each; the name says what was lost."""

import asyncio
import contextlib
import enum
import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from ckptd.sdk import (
    CorruptCheckpointError,
    Manual,
    ResumableContext,
    StepInterrupted,
    StopRequested,
    SyncResumableContext,
    TransientError,
    run_local,
    task,
)
from ckptd.sdk.group import Recorder
from ckptd.sdk.save import Saved, Saving
from ckptd.sdk.strategy import Pace
from ckptd.sdk.work import Ports
from ckptd.storage.blobs import generations
from ckptd.storage.facts import read_facts
from ckptd.storage.journal import Fact
from tests.waiting import let_pass

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


# --- what is remembered --------------------------------------------------------------------------


def synced_while(call: Callable[[], object]) -> set[str]:
    """Return the names of the files that were synced in this thread meanwhile."""
    synced = set()

    def look(frame: FrameType, event: str, found: object) -> None:
        if event == "c_call" and found is os.fdatasync:
            synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{frame.f_locals['fd']}")))

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return synced


def test_what_is_told_as_done_is_synced_though_its_writer_may_not_have_come_to_it(
    tmp_path: Path,
) -> None:
    def function(ctx: SyncResumableContext) -> None:
        ctx.step("a", os.getpid)
        raise ZeroDivisionError

    def attempt() -> None:
        with pytest.raises(ZeroDivisionError):
            run_local(function, tmp_path / "t")

    attempt()
    assert "000001.j" in synced_while(attempt)


def test_a_full_disk_after_the_effect_of_a_step_that_must_not_run_twice_is_no_leave_to_run_it(
    tmp_path: Path,
) -> None:
    held = Held()
    held.is_let_go.set()
    effects: list[int] = []

    def pay(ctx: SyncResumableContext) -> None:
        effects.append(ctx.attempt)
        ctx.checkpoint("bad")

    def function(ctx: SyncResumableContext) -> None:
        ctx.step("pay", pay, ctx, semantics="at_most_once")

    with pytest.raises(TransientError):
        run_local(function, tmp_path / "t", ports=held.ports)
    with pytest.raises(StepInterrupted):
        run_local(function, tmp_path / "t")
    assert effects == [1]


def test_a_value_that_threads_set_at_once_is_in_memory_what_it_is_on_disk(tmp_path: Path) -> None:
    keys = [f"k{number}" for number in range(200)]

    def function(ctx: SyncResumableContext) -> dict[str, Any]:
        def record(value: int) -> None:
            for key in keys:
                ctx.set_intermediate_result(key, value)

        threads = [threading.Thread(target=record, args=(value,)) for value in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(30)
        return {key: ctx.get_intermediate_result(key) for key in keys}

    assert run_local(function, tmp_path / "t") == values_on_disk(tmp_path / "t")


class Color(str, enum.Enum):  # noqa: UP042 - f"{Color.RED}" is no "red"
    RED = "red"


def test_a_text_that_is_more_than_a_text_comes_back_the_first_time_as_it_will_later(
    tmp_path: Path,
) -> None:
    def function(ctx: SyncResumableContext) -> str:
        told = f"{ctx.step('color', lambda: Color.RED)}"
        if ctx.attempt == 1:
            (tmp_path / "told").write_text(told)
            raise ZeroDivisionError
        return told

    with pytest.raises(ZeroDivisionError):
        run_local(function, tmp_path / "t")
    assert run_local(function, tmp_path / "t") == (tmp_path / "told").read_text()


def test_a_cursor_that_is_changed_in_place_spoils_no_checkpoint(tmp_path: Path) -> None:
    held = Held()

    def function(ctx: SyncResumableContext) -> Any:
        position = ctx.cursor("place", [0, b"x"])
        pending = ctx.checkpoint_behind("held")
        position.value.append(1)
        held.is_let_go.set()
        pending.wait()
        return position.value

    assert run_local(function, tmp_path / "t", ports=held.ports) == [0, b"x"]
    assert generations(str(tmp_path / "t"), os.getuid(), verify=True)[0].fault == ""


# --- the end -------------------------------------------------------------------------------------


class Busy:
    """A journal that tells whether it was closed while somebody was in it."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.told: list[str] = []

    def append(self, facts: list[Fact]) -> int:
        self.has_begun.set()
        let_pass(0.05)
        self.told.append("appended")
        return len(facts)

    def close(self) -> None:
        self.told.append("closed")


def test_a_journal_is_not_closed_under_an_append_whose_caller_is_gone() -> None:
    journal = Busy()
    recorder = Recorder(journal)
    writer = threading.Thread(target=recorder.record, args=([{"op": "delete", "key": "a"}],))
    writer.start()
    assert journal.has_begun.wait(20)
    recorder.close()
    writer.join(20)
    assert journal.told == ["appended", "closed"]


class Struck(Exception):
    """What a signal's handler raised."""


def strike_at(serial: int) -> list[int]:
    """Raise at the call of that many functions of the SDK from now on, as a signal may."""
    left = [serial]

    def look(frame: FrameType, event: str, found: object) -> None:
        del found
        code = frame.f_code
        is_ours = code.co_filename.endswith(("sdk/save.py", "sdk/work.py"))
        if event == "call" and is_ours and code.co_name != "__del__":  # there it is swallowed
            left[0] -= 1
            if not left[0]:
                raise Struck

    sys.setprofile(look)
    return left


def test_a_save_that_is_struck_anywhere_loses_no_file_and_no_later_save(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> list[str]:
        torn = []
        for serial in range(1, 100):  # Bound: the calls of one save
            ctx.state["n"] = serial
            write(ctx.file("n"), str(serial))
            left = strike_at(serial)
            with contextlib.suppress(Struck):
                ctx.checkpoint()
            sys.setprofile(None)
            ctx.checkpoint()
            if read(ctx.saved_file("n")) != str(serial):
                torn.append(f"{serial}: {read(ctx.saved_file('n'))}")
            if left[0] > 0:
                return torn
        raise AssertionError

    assert run_local(function, tmp_path / "t") == []
