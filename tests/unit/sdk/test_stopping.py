"""Being asked to stop, to save, to wait: what is saved, when it ends, what the daemon is told."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from ckptd.sdk import (
    AlreadyRunning,
    Manual,
    Parked,
    ResumableContext,
    StopRequested,
    SyncResumableContext,
    TransientError,
    run_local,
    task,
)
from ckptd.storage.blobs import newest_sealed
from ckptd.storage.facts import read_facts
from ckptd.storage.manifest import load
from ckptd.storage.untrusted import open_directory
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[3]


def saved(directory: Path) -> Any:
    seq, path = newest_sealed(str(directory), os.getuid())
    if not seq:
        return None
    fd = open_directory(path, os.getuid())
    try:
        return load(fd, os.getuid())
    finally:
        os.close(fd)


def ask(ctx: Any, **control: Any) -> None:
    """Replace the control file, as the daemon does."""
    new = Path(ctx.directory, "control.tmp")
    new.write_text(json.dumps(control))
    new.rename(Path(ctx.directory, "control.json"))


@pytest.fixture(autouse=True)
def _scopes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_SCOPES_DIR", str(tmp_path / "scopes"))


def points_of(ctx: Any) -> list[Any]:
    return [
        ctx.checkpoint_if_needed,
        lambda: ctx.step("s", lambda: 1),
        lambda: ctx.record_item("k", "pass"),
        lambda: list(ctx.items(["a", "b"])),
        lambda: list(ctx.track([1, 2])),
        lambda: ctx.complete_step("done"),
        lambda: ctx.sleep_until(time.time() + 5),
    ]


@pytest.mark.parametrize("number", range(7))
def test_a_stop_raises_at_every_safe_point_after_the_state_is_saved(
    tmp_path: Path, number: int
) -> None:
    @task(strategy=Manual())
    def function(ctx: SyncResumableContext) -> None:
        ctx.state["n"] = number
        ask(ctx, stop="shutdown", deadline=time.time() + 30)
        assert ctx.should_stop
        assert ctx.stop_reason == "shutdown"
        assert 0 < ctx.grace_left <= 30
        points_of(ctx)[number]()

    with pytest.raises(StopRequested, match="shutdown") as caught:
        run_local(function, tmp_path / "t")

    assert caught.value.reason == "shutdown"
    assert saved(tmp_path / "t")["state"] == {"n": number}
    assert saved(tmp_path / "t")["reason"] == "stop"


@pytest.mark.parametrize("form", ["plain", "awaited"])
def test_a_loop_of_checkpoints_alone_is_stopped_behind_the_one_that_it_saves(
    tmp_path: Path, form: str
) -> None:
    def turn(ctx: Any) -> None:
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        ctx.set_progress(ctx.state["n"], 50)
        if ctx.state["n"] == 3:
            ask(ctx, stop="shutdown")

    @task(strategy=Manual())
    def plain(ctx: SyncResumableContext) -> None:
        for _ in range(50):
            turn(ctx)
            ctx.checkpoint("mine")

    @task(strategy=Manual())
    async def awaited(ctx: ResumableContext) -> None:
        for _ in range(50):
            turn(ctx)
            await ctx.checkpoint("mine")

    with pytest.raises(StopRequested, match="shutdown"):
        run_local(plain if form == "plain" else awaited, tmp_path / "t")
    assert saved(tmp_path / "t")["state"] == {"n": 3}
    assert saved(tmp_path / "t")["reason"] == "mine"


def looks(ctx: Any) -> None:
    assert ctx.should_stop


def asks_why(ctx: Any) -> None:
    assert ctx.stop_reason == "cancel"


def counts_down(ctx: Any) -> None:
    assert ctx.grace_left < 60


def was_struck(ctx: Any) -> None:
    with suppress(StopRequested):
        ctx.checkpoint_if_needed()


@pytest.mark.parametrize("hears", [looks, asks_why, counts_down, was_struck])
def test_who_knows_of_the_stop_saves_once_more_and_leaves_in_his_own_way(
    tmp_path: Path, hears: Callable[[Any], None]
) -> None:
    def function(ctx: SyncResumableContext) -> int:
        ask(ctx, stop="cancel", deadline=time.time() + 30)
        hears(ctx)
        ctx.state["n"] = 1
        return ctx.checkpoint().seq

    assert run_local(function, tmp_path / "t") == 1


@pytest.mark.parametrize("form", ["plain", "awaited"])
def test_a_checkpoint_in_an_at_most_once_step_does_not_interrupt_it(
    tmp_path: Path, form: str
) -> None:
    def plain(ctx: SyncResumableContext) -> None:
        def send() -> int:
            ask(ctx, stop="shutdown")
            return ctx.checkpoint().seq

        ctx.step("send", send, semantics="at_most_once")
        ctx.checkpoint()

    async def awaited(ctx: ResumableContext) -> None:
        async def send() -> int:
            ask(ctx, stop="shutdown")
            return (await ctx.checkpoint()).seq

        await ctx.step("send", send, semantics="at_most_once")
        await ctx.checkpoint()

    with pytest.raises(StopRequested):
        run_local(plain if form == "plain" else awaited, tmp_path / "t")
    assert list(read_facts(str(tmp_path / "t"), 0, os.getuid(), 9).steps) == ["send"]


@pytest.mark.parametrize(
    ("hears", "form"),
    [
        *product((looks, asks_why, counts_down), ("plain", "awaited")),
        (was_struck, "plain"),
    ],
)
def test_a_loop_of_checkpoints_is_stopped_though_a_thread_beside_it_has_heard(
    tmp_path: Path, hears: Callable[[Any], None], form: str
) -> None:
    def turn(ctx: Any, beside: ThreadPoolExecutor, number: int) -> None:
        ctx.state["n"] = number
        if number == 3:
            ask(ctx, stop="cancel", deadline=time.time() + 30)
        if number >= 3:
            beside.submit(hears, ctx).exception()

    @task(strategy=Manual())
    def plain(ctx: SyncResumableContext) -> None:
        with ThreadPoolExecutor(1) as beside:
            for number in range(50):
                turn(ctx, beside, number)
                ctx.checkpoint()

    @task(strategy=Manual())
    async def awaited(ctx: ResumableContext) -> None:
        with ThreadPoolExecutor(1) as beside:
            for number in range(50):
                turn(ctx, beside, number)
                await ctx.checkpoint()

    with pytest.raises(StopRequested, match="cancel"):
        run_local(plain if form == "plain" else awaited, tmp_path / "t")
    assert saved(tmp_path / "t")["state"]["n"] <= 4


def test_a_checkpoint_of_another_thread_only_saves(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> int:
        ask(ctx, stop="cancel")
        with ThreadPoolExecutor(1) as helper:
            return helper.submit(ctx.checkpoint).result().seq

    assert run_local(function, tmp_path / "t") == 1


def touches_nothing(_: Any) -> None: ...


def keeps_values(ctx: Any) -> None:
    ctx.set_intermediate_result("n", 1)


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (touches_nothing, "without a step, item or safe point: after a crash it would start from"),
        (keeps_values, "without a safe point: asked to stop, it would go on until it is killed"),
        (lambda ctx: ctx.checkpoint_behind().wait(), "asked to stop, it would go on"),
        (lambda ctx: ctx.checkpoint(), ""),
        (lambda ctx: ctx.should_stop, ""),
    ],
)
def test_a_task_that_cannot_be_stopped_is_told_so_also_where_it_saves(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], work: Callable[[Any], None], told: str
) -> None:
    def function(ctx: SyncResumableContext) -> None:
        work(ctx)
        ctx._warn_without_safe_point()  # what a timer calls after a minute

    run_local(function, tmp_path / "t")
    said = capfd.readouterr().err
    assert told in said
    assert bool(said) == bool(told)


def test_a_stop_with_nothing_new_saves_nothing_and_facts_alone_are_enough(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> None:
        ask(ctx, stop="cancel")
        ctx.record_item("k", "pass")

    with pytest.raises(StopRequested, match="cancel"):
        run_local(function, tmp_path / "t")

    assert saved(tmp_path / "t") is None
    assert list(read_facts(str(tmp_path / "t"), 0, os.getuid(), 9).items) == ["k"]


def test_without_a_stop_the_grace_is_infinite(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> list[bool]:
        return [ctx.should_stop, ctx.stop_reason is None, ctx.grace_left == float("inf")]

    assert run_local(function, tmp_path / "t") == [False, True, True]


@pytest.mark.parametrize("form", ["plain", "awaited"])
def test_sigterm_during_a_wait_ends_it_at_once(tmp_path: Path, form: str) -> None:
    def strike() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def plain(ctx: Any) -> None:
        ctx.state["n"] = 1
        threading.Timer(0.1, strike).start()
        ctx.sleep_until(time.time() + 3600)

    async def awaited(ctx: Any) -> None:
        ctx.state["n"] = 1
        threading.Timer(0.1, strike).start()
        await ctx.sleep_until(time.time() + 3600)

    with pytest.raises(StopRequested, match="terminated"):
        run_local(plain if form == "plain" else awaited, tmp_path / "t")
    assert saved(tmp_path / "t")["state"] == {"n": 1}


def test_the_handler_of_the_program_is_back_afterwards(tmp_path: Path) -> None:
    def own(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, own)
    try:
        run_local(lambda ctx: 1, tmp_path / "t")
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_each_request_to_save_is_honoured_once_at_the_next_safe_point(tmp_path: Path) -> None:
    @task(strategy=Manual())
    def function(ctx: SyncResumableContext) -> list[bool]:
        ctx.state["n"] = 1
        seen = [ctx.checkpoint_if_needed()]
        for number in (1, 3):
            ask(ctx, stop=None, checkpoint=number)
            seen += [ctx.checkpoint_if_needed(), ctx.checkpoint_if_needed()]
        return seen

    assert run_local(function, tmp_path / "t") == [False, True, False, True, False]


@pytest.mark.parametrize("form", ["plain", "awaited"])
def test_a_long_sleep_parks_with_the_state_saved_and_the_wish_durable(
    tmp_path: Path, form: str
) -> None:
    def plain(ctx: Any) -> None:
        ctx.state["n"] = 1
        ctx.sleep_until(time.time() + 3600)

    async def awaited(ctx: Any) -> None:
        ctx.state["n"] = 1
        await ctx.sleep_until(time.time() + 3600)

    for attempt in (1, 2):
        with pytest.raises(Parked, match="sleep"):
            run_local(plain if form == "plain" else awaited, tmp_path / "t", park_after=10)
        manifest = saved(tmp_path / "t")
        assert (manifest["reason"], manifest["pause_count"]) == ("park", attempt)
        assert manifest["state"] == {"n": 1}
        wish_s = read_facts(str(tmp_path / "t"), 0, os.getuid(), 9).retry_after_s(attempt)
        assert 3500 < wish_s <= 3600
    assert saved(tmp_path / "t")["resume_count"] == 1
    assert saved(tmp_path / "t")["wait_s"] > 0


def test_a_short_wait_is_waited_in_place_and_counted(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> bool:
        until_s = time.time() + 0.1
        ctx.sleep_until(until_s)
        ctx.checkpoint()
        return time.time() >= until_s

    assert run_local(function, tmp_path / "t", park_after=10) is True
    assert saved(tmp_path / "t")["wait_s"] >= 0.09
    assert saved(tmp_path / "t")["pause_count"] == 0


def test_a_wait_longer_than_a_day_asks_for_a_day_and_parks_again(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> None:
        ctx.sleep_until(time.time() + 30 * 86_400)

    with pytest.raises(Parked):
        run_local(function, tmp_path / "t", park_after=10)
    facts = read_facts(str(tmp_path / "t"), 0, os.getuid(), 9)
    assert 86_000 < facts.retry_after_s(1) <= 86_400


def test_a_transient_error_leaves_its_wish_to_wait(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> None:
        raise TransientError("busy", retry_after=50)

    with pytest.raises(TransientError):
        run_local(function, tmp_path / "t")
    assert 40 < read_facts(str(tmp_path / "t"), 0, os.getuid(), 9).retry_after_s(1) <= 50


def test_a_second_process_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    code = (
        "from ckptd.sdk import run_local\nimport sys\n"
        "run_local(lambda ctx: (print('runs', flush=True), sys.stdin.read()), sys.argv[1])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "t")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"runs\n"
        with pytest.raises(AlreadyRunning, match="another process runs the task"):
            run_local(lambda ctx: 1, tmp_path / "t")
        other.kill()

    assert until(lambda: run_local(lambda ctx: 1, tmp_path / "t")) == 1
