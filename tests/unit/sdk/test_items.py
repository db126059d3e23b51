"""Items: one durable result each, whatever happens; what exceptions mean; waits and stops."""

import asyncio
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from ckptd.sdk import (
    Parked,
    PermanentError,
    QuarantineItem,
    RateLimited,
    RetryPolicy,
    SkipItem,
    StopRequested,
    SyncResumableContext,
    TransientError,
    run_local,
)
from ckptd.sdk.items import key_of
from ckptd.storage.facts import read_facts
from tests.waiting import let_pass

QUICK = RetryPolicy(max_failures=3, backoff=0.001)


@pytest.fixture(autouse=True)
def _scopes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_SCOPES_DIR", str(tmp_path / "scopes"))


def known(path: Path) -> Any:
    return read_facts(str(path), 0, os.getuid(), 99)


def outcome(value: Any) -> Any:
    match value:
        case "skip":
            raise SkipItem("not wanted")
        case "poison":
            raise QuarantineItem("poison")
        case "never":
            raise PermanentError("never")
        case "differs":
            raise AssertionError("2 is not 3")
        case "bug":
            raise ZeroDivisionError("oops")
        case "unfit":
            return object()
        case "huge":
            return "x" * (2 << 20)
    return value


MEANT = {
    "fine": "pass",
    "skip": "skipped",
    "poison": "quarantined",
    "never": "fail",
    "differs": "fail",
    "bug": "error",
    "unfit": "error",
    "huge": "error",
}


def plain(ctx: SyncResumableContext, source: list[Any], lanes: int) -> dict[str, int]:
    return ctx.items(source, concurrency=lanes).run(outcome, QUICK).counts


async def awaited(ctx: Any, source: list[Any], lanes: int) -> Any:
    async def call(value: Any) -> Any:
        await asyncio.sleep(0)
        return outcome(value)

    return (await ctx.items(source, concurrency=lanes).run(call, QUICK)).counts


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("form", [plain, awaited])
def test_what_an_item_raises_is_its_own_status_and_harms_no_other(
    tmp_path: Path, form: Any, lanes: int
) -> None:
    counts = run_local(form, tmp_path / "t", source=list(MEANT), lanes=lanes)

    items = known(tmp_path / "t").items
    assert {key: fact["status"] for key, fact in items.items()} == MEANT
    assert counts == {"pass": 1, "skipped": 1, "quarantined": 1, "fail": 2, "error": 3}
    assert "ZeroDivisionError: oops" in items["bug"]["text"]
    assert "holds a object" in items["unfit"]["text"]


def test_a_second_run_does_what_is_new_in_whatever_order(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> Any:
        source = ["a", "b"] if not ctx.resumed else ["c", "b", "a", "c"]
        done = [item.value for item in ctx.items(source)]
        if ctx.attempt == 1:
            raise ZeroDivisionError
        return done

    with pytest.raises(ZeroDivisionError):
        run_local(function, tmp_path / "t")
    assert run_local(function, tmp_path / "t") == ["c"]


def test_an_item_left_by_an_exception_has_no_result(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> None:
        for item in ctx.items(["a", "b", "c"]):
            if item.value == "b":
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_local(function, tmp_path / "t")
    assert list(known(tmp_path / "t").items) == ["a"]


def test_steps_inside_of_an_item_are_its_own(tmp_path: Path) -> None:
    ran: list[str] = []

    def function(ctx: SyncResumableContext) -> None:
        for item in ctx.items(["a", "b"]):
            item.step("get", ran.append, f"get {item.key}")
            if item.key == "b" and ctx.attempt == 1:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_local(function, tmp_path / "t")
    run_local(function, tmp_path / "t")
    assert ran == ["get a", "get b"]


def test_two_sources_with_names_do_not_share_their_keys(tmp_path: Path) -> None:
    def function(ctx: SyncResumableContext) -> list[list[int]]:
        return [[item.value for item in ctx.items([1, 2], name=name)] for name in ("x", "y")]

    assert run_local(function, tmp_path / "t") == [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("value", "key", "wanted"),
    [
        ("text", None, "text"),
        ({"b": 1, "a": "ü"}, None, '{"a":"ü","b":1}'),
        ({"id": 7}, "id", "7"),
        ((1, "x"), 1, "x"),
        ({"id": 7}, lambda row: row["id"] * 2, "14"),
        (Path("/a"), None, '"/a"'),
    ],
)
def test_keys_come_of_the_content(value: Any, key: Any, wanted: str) -> None:
    assert key_of(value, key) == wanted


def test_long_keys_are_cut_and_stay_apart() -> None:
    one, other = key_of("x" * 5000 + "1"), key_of("x" * 5000 + "2")
    assert one != other
    assert len(one) < 600


@pytest.mark.parametrize(("value", "key"), [("", None), ({}, "id"), (7, "id"), ([1], 3)])
def test_an_item_without_its_key_is_told(value: Any, key: Any) -> None:
    with pytest.raises(ValueError, match=r"no field|empty key"):
        key_of(value, key)


def test_transient_errors_are_tried_again_and_then_left_for_a_later_attempt(
    tmp_path: Path,
) -> None:
    tries: list[str] = []

    def fetch(value: str) -> str:
        tries.append(value)
        if value == "down" or tries.count(value) < 2:
            raise TransientError("busy")
        return value

    def function(ctx: SyncResumableContext) -> None:
        ctx.items(["up", "down", "last"]).run(fetch, QUICK)

    with pytest.raises(TransientError, match="1 items left: TransientError: busy"):
        run_local(function, tmp_path / "t")
    assert sorted(known(tmp_path / "t").items) == ["last", "up"]
    assert tries.count("down") == 3


@pytest.mark.parametrize("form", ["plain", "awaited"])
def test_a_long_rate_limit_in_one_lane_parks_after_the_others_are_recorded(
    tmp_path: Path, form: str
) -> None:
    def fetch(value: str) -> str:
        if value == "limited":
            raise RateLimited("slow down", retry_after=3600, scope="api")
        let_pass(0.05)
        return value

    async def fetch_awaited(value: str) -> str:
        return await asyncio.to_thread(fetch, value)

    def plain(ctx: Any) -> None:
        ctx.items(["a", "limited", "b"], concurrency=3).run(fetch)

    async def awaited(ctx: Any) -> None:
        await ctx.items(["a", "limited", "b"], concurrency=3).run(fetch_awaited)

    with pytest.raises(Parked, match="rate_limit"):
        run_local(plain if form == "plain" else awaited, tmp_path / "t", park_after=10)

    found = known(tmp_path / "t")
    assert sorted(found.items) == ["a", "b"]
    assert 3500 < found.retry_after_s(1) <= 3600


def test_a_stop_in_the_middle_lets_the_items_in_flight_be_recorded(tmp_path: Path) -> None:
    gate, started = threading.Event(), []

    def work(value: int) -> int:
        started.append(value)
        if len(started) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            gate.set()
        gate.wait(10)
        return value

    def function(ctx: SyncResumableContext) -> None:
        ctx.items(range(100), concurrency=3).run(work)

    with pytest.raises(StopRequested, match="terminated"):
        run_local(function, tmp_path / "t")

    done = known(tmp_path / "t").items
    assert sorted(done) == sorted(str(value) for value in started), "in flight and recorded"
    assert len(done) < 10


def test_no_item_is_handed_out_twice_and_all_lanes_are_used(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def work(value: int) -> None:
        together.wait(20)  # four at once, or nobody goes on

    def function(ctx: SyncResumableContext) -> Any:
        return ctx.items([*range(20), *range(20)], concurrency=4).run(work).counts

    assert run_local(function, tmp_path / "t") == {"pass": 20}


def test_a_concurrency_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="concurrency is 0"):
        run_local(lambda ctx: ctx.items([], concurrency=0), tmp_path / "t")


def test_an_item_whose_step_must_be_looked_at_is_set_apart_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    def function(ctx: SyncResumableContext, crash: bool) -> Any:  # noqa: FBT001
        def pay() -> str:
            if crash:
                os._exit(9)
            return "paid"

        def do(item: Any) -> Any:
            semantics = "at_most_once" if item.value == "b" else "at_least_once"
            return item.step("pay", pay if item.value == "b" else str, semantics=semantics)

        return repr(ctx.items("abc", key=str).run(do, gives_item=True))

    pid = os.fork()
    if not pid:
        run_local(function, tmp_path / "t", crash=True)
    os.waitpid(pid, 0)
    told = run_local(function, tmp_path / "t", crash=False)
    assert told == "pass 1, quarantined 1, known before 1"
