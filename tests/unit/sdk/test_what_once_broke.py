"""Each of these was broken once: found by reading, by attacking, or by chance."""

import asyncio
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ckptd.sdk import (
    CorruptCheckpointError,
    DuplicateStepError,
    NotJson,
    RetryPolicy,
    StateVersionError,
    StepTimeout,
    StopRequested,
    SyncResumableContext,
    TransientError,
    ckpt,
    run_local,
    task,
)
from ckptd.sdk.group import Appends
from ckptd.sdk.items import key_of
from ckptd.sdk.pipe import Pipe
from ckptd.sdk.surroundings import Surroundings
from ckptd.sdk.work import Ports
from ckptd.storage.blobs import generations, newest_sealed
from ckptd.storage.facts import read_facts
from ckptd.storage.journal import Fact
from ckptd.storage.manifest import load
from ckptd.storage.untrusted import open_directory
from tests.waiting import let_pass, until


def saved_state(directory: Path) -> Any:
    fd = open_directory(newest_sealed(str(directory), os.getuid())[1], os.getuid())
    try:
        return load(fd, os.getuid())["state"]
    finally:
        os.close(fd)


def test_a_checkpoint_is_valid_though_threads_record_values_while_it_is_written(
    tmp_path: Path,
) -> None:
    def function(ctx: SyncResumableContext) -> list[str]:
        is_over = threading.Event()
        faults: list[str] = []

        def hammer(thread: int) -> None:
            serial = 0
            while not is_over.is_set():
                ctx.set_intermediate_result(f"{thread}-{serial}", serial)
                serial += 1

        threads = [threading.Thread(target=hammer, args=(n,)) for n in range(3)]
        for one in threads:
            one.start()
        try:
            for number in range(40):
                ctx.state["n"] = number
                ctx.checkpoint()
                newest = generations(ctx.directory, os.getuid(), verify=True)[0]
                faults += [newest.fault] if newest.fault else []
        finally:
            is_over.set()
            for one in threads:
                one.join(10)
        return faults

    assert run_local(function, tmp_path / "t") == []


class Slow:
    """A journal whose appends take a while."""

    def __init__(self, real: Appends) -> None:
        self._real = real

    def append(self, facts: list[Fact]) -> int:
        let_pass(0.02)
        return self._real.append(facts)

    def close(self) -> None:
        self._real.close()


def test_threads_that_ask_first_for_an_idempotency_key_get_the_same_one(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> list[str]:
        keys: list[str] = []
        threads = [
            threading.Thread(target=lambda: keys.append(ctx.idempotency_key("pay")))
            for _ in range(4)
        ]
        for one in threads:
            one.start()
        for one in threads:
            one.join(10)
        return sorted({*keys, ctx.idempotency_key("pay")})

    ports = Ports(journal=lambda around: Slow(Ports().journal(around)))
    assert len(run_local(function, tmp_path / "t", ports=ports)) == 1


def test_a_second_loop_of_the_same_name_is_refused_not_skipped(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> list[list[int]]:
        first = list(ctx.track([1, 2, 3]))
        with pytest.raises(DuplicateStepError, match="a track loop named 'track'"):
            list(ctx.track([4, 5, 6]))
        return [first, list(ctx.track([4, 5, 6], name="other"))]

    assert run_local(function, tmp_path / "t") == [[1, 2, 3], [4, 5, 6]]


def test_a_second_loop_of_the_same_name_is_refused_in_a_coroutine_too(tmp_path: Path) -> None:
    async def function(ctx: Any) -> list[int]:
        found = [one async for one in ctx.track([1, 2, 3])]
        with pytest.raises(DuplicateStepError):
            [one async for one in ctx.track([4, 5, 6])]
        return found

    assert run_local(function, tmp_path / "t") == [1, 2, 3]


def test_an_item_with_no_pause_between_tries_is_tried_again_all_the_same(tmp_path: Path) -> None:
    tries: list[int] = []

    def fetch(value: int) -> int:
        tries.append(value)
        if len(tries) < 3:
            raise TransientError
        return value

    def function(ctx: SyncResumableContext) -> Any:
        return ctx.items([1]).run(fetch, RetryPolicy(max_failures=5, backoff=0)).counts

    assert run_local(function, tmp_path / "t") == {"pass": 1}


def print_nothing() -> None: ...


@pytest.mark.parametrize("value", [object(), {"f": object()}, print_nothing])
def test_an_item_without_a_text_of_its_own_needs_a_key(value: Any) -> None:
    with pytest.raises(ValueError, match="say what its key is"):
        key_of(value)


def test_an_item_that_is_a_set_needs_a_key_for_its_order_is_another_in_each_process() -> None:
    with pytest.raises(ValueError, match="say what its key is"):
        key_of({"a", "b"})


class Wide(msgspec.Struct):
    by_id: dict[int, str] = {}
    raw: bytes = b""
    tags: set[str] = msgspec.field(default_factory=set)
    pair: tuple[int, int] = (0, 0)


def test_a_state_schema_with_numbers_as_keys_comes_back(tmp_path: Path) -> None:
    @task(state_schema=Wide)
    def function(ctx: SyncResumableContext, *, is_crashed: bool) -> bool:
        wanted = Wide({3: "x"}, b"\xff", {"z"}, (1, 2))
        if is_crashed:
            ctx.state = wanted
            ctx.checkpoint()
            raise ZeroDivisionError
        return bool(ctx.state == wanted)

    with pytest.raises(ZeroDivisionError):
        run_local(function, tmp_path / "t", is_crashed=True)
    assert run_local(function, tmp_path / "t", is_crashed=False) is True


def test_a_number_that_could_not_be_read_again_is_refused_with_its_name(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> None:
        ctx.set_intermediate_result("big", 1 << 20_000)

    with pytest.raises(NotJson, match=r"'big' holds a number of 20001 bits"):
        run_local(function, tmp_path / "t")


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_stop_while_an_item_waits_saves_the_state_first(tmp_path: Path, concurrency: int) -> None:
    def fetch(value: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise TransientError("later", retry_after=30)

    @task
    def function(ctx: SyncResumableContext) -> None:
        ctx.state["seen"] = 7
        ctx.items([1], concurrency=concurrency).run(fetch)

    with pytest.raises(StopRequested, match="terminated"):
        run_local(function, tmp_path / "t")
    assert saved_state(tmp_path / "t") == {"seen": 7}


def test_a_stop_while_an_awaited_item_waits_saves_the_state_first(tmp_path: Path) -> None:
    async def fetch(value: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise TransientError("later", retry_after=30)

    async def function(ctx: Any) -> None:
        ctx.state["seen"] = 7
        await ctx.items([1], concurrency=2).run(fetch)

    with pytest.raises(StopRequested, match="terminated"):
        run_local(function, tmp_path / "t")
    assert saved_state(tmp_path / "t") == {"seen": 7}


def test_a_request_to_save_that_came_before_the_function_began_is_honoured(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> list[bool]:
        ctx.state["n"] = 1
        return [ctx.checkpoint_if_needed(), ctx.checkpoint_if_needed()]

    def journal(around: Any) -> Appends:
        Path(around.control_path).write_text(json.dumps({"stop": None, "checkpoint": 1}))
        return Ports().journal(around)

    assert run_local(task(function), tmp_path / "t", ports=Ports(journal=journal)) == [True, False]


def test_a_time_limit_inside_of_another_leaves_the_outer_one_in_force(tmp_path: Path) -> None:
    def outer(ctx: SyncResumableContext) -> None:
        ctx.step("inner", lambda: None, timeout=20)
        until(lambda: False, 20)

    def function(ctx: SyncResumableContext) -> None:
        ctx.step("outer", outer, ctx, timeout=0.2)

    with pytest.raises(StepTimeout, match=r"'outer' took longer than 0\.2 s"):
        run_local(function, tmp_path / "t")


def test_a_time_limit_that_strikes_while_facts_are_recorded_damages_nothing(tmp_path: Path) -> None:
    def busy(ctx: SyncResumableContext, told: list[str]) -> None:
        while True:
            ctx.set_intermediate_result(f"{len(told)}", len(told))
            told.append(f"{len(told)}")

    def function(ctx: SyncResumableContext) -> int:
        told: list[str] = []
        for number in range(5):
            with pytest.raises(StepTimeout):
                ctx.step(f"s{number}", busy, ctx, told, timeout=0.01)
        return len(told)

    count = run_local(function, tmp_path / "t")

    values = read_facts(str(tmp_path / "t"), 0, os.getuid(), 9).values
    assert [n for n in range(count) if f"{n}" not in values] == []


def test_items_in_many_threads_are_all_counted(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> dict[str, int]:
        return ctx.items(range(400), concurrency=8).run(lambda value: value).counts

    assert run_local(function, tmp_path / "t") == {"pass": 400}


def test_values_recorded_by_coroutines_while_a_checkpoint_is_written_do_not_spoil_it(
    tmp_path: Path,
) -> None:
    async def function(ctx: Any) -> list[str]:
        faults: list[str] = []

        async def hammer(thread: int) -> None:
            for serial in range(150):
                await ctx.set_intermediate_result(f"{thread}-{serial}", serial)

        async def save() -> None:
            for number in range(5):
                ctx.state["n"] = number
                await ctx.checkpoint()
                newest = generations(ctx.directory, os.getuid(), verify=True)[0]
                faults.extend([newest.fault] if newest.fault else [])

        await asyncio.gather(save(), *(hammer(n) for n in range(4)))
        return faults

    assert run_local(function, tmp_path / "t") == []


def test_resumed_is_about_earlier_attempts_whatever_this_one_saves(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> list[Any]:
        before = [ctx.resumed, ctx.resume_point]
        restored: list[int] = []
        ctx.step("a", lambda: 1)
        ctx.state["n"] = ctx.attempt
        ctx.checkpoint()
        ctx.on_restore(lambda: restored.append(1))
        assert [ctx.resumed, ctx.resume_point] == before
        if ctx.attempt == 1:
            assert before == [False, None]
            assert not restored
            raise ZeroDivisionError
        assert restored
        point = ctx.resume_point
        assert point is not None
        return [ctx.resumed, point.checkpoint]

    with pytest.raises(ZeroDivisionError):
        run_local(function, tmp_path / "t")
    assert run_local(function, tmp_path / "t") == [True, 1]


def test_an_attempt_that_cannot_begin_leaves_no_file_open(tmp_path: Path) -> None:
    def saves(ctx: SyncResumableContext) -> None:
        ctx.state["n"] = 1
        ctx.checkpoint()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_local(task(version=2)(saves), tmp_path / "t")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(StateVersionError):
            run_local(task(version=1)(saves), tmp_path / "t")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_save_from_a_shell_beside_the_sdk_is_refused_and_costs_it_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It took the place of what the SDK had saved: the next attempt began with empty state."""

    def function(ctx: SyncResumableContext) -> Any:
        if ctx.attempt == 1:
            ctx.state["n"] = 41
            Path(ctx.directory, "stage", "model").write_text("grown for a week")
            ctx.checkpoint("mine")
            around = {"DIR": ctx.directory, "TASK_ID": "0", "ATTEMPT": "1", "EPOCH": "1"}
            for name, value in around.items():
                monkeypatch.setenv(f"CKPTD_{name}", value)
            assert [ckpt.run(["save", *words]) for words in ((), ("/etc/hostname",))] == [64, 64]
            pipe = Pipe(Surroundings())
            pipe.take(b'{"op":"checkpoint","state":{}}')
            assert pipe.answers[0]["error"]["code"] == "bad_request"
            ctx.state["n"] = 42
            ctx.checkpoint("mine, with the model carried on")
            raise RuntimeError("and died")
        return f"{ctx.state['n']} {Path(ctx.saved_file('model') or '').read_text()}"

    with pytest.raises(RuntimeError, match="and died"):
        run_local(function, tmp_path / "t")
    assert run_local(function, tmp_path / "t") == "42 grown for a week"
    assert "are the SDK's" in capsys.readouterr().err


def test_files_to_carry_on_that_somebody_took_away_are_told_for_what_they_are(
    tmp_path: Path,
) -> None:
    def function(ctx: SyncResumableContext) -> None:
        Path(ctx.directory, "stage", "model").write_text("m")
        ctx.checkpoint("mine")
        shutil.rmtree(Path(ctx.directory, "ckpt", "00000001"))
        ctx.state["n"] = 1
        ctx.checkpoint("mine")

    with pytest.raises(CorruptCheckpointError, match=r"00000001, .* is gone"):
        run_local(function, tmp_path / "t")
