"""For every strategy and every durable point: SIGKILL there, resume, same result, nothing lost.

Each function below uses all that the SDK has. What it does outside is a line appended to a file,
so that what was done again can be counted: at most the current step or item, the items in flight
where many are, and of the bulk state's work what came after the last save.
Every point of `Time(0)`, which has them all; of the others some, evenly chosen, in `make test`, and
every one in `make crash` (CKPTD_ROUNDS).
"""

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ckptd.sdk import (
    Automatic,
    Manual,
    Progress,
    StepInterrupted,
    Time,
    task,
)
from ckptd.sdk.strategy import Strategy
from ckptd.testing import Report, Run, check_resumable, lines_of
from tests.unit.sdk.test_testing import effect, effects, place_out

ROWS = [{"id": f"r{n}", "n": n} for n in range(2)]
LANES = 4
MANY = 6
BULK = 3 + 2  # turns of the loops that only the state remembers


class Sums(msgspec.Struct):
    plain: int = 0
    turned: int = 0
    collected: int = 0


def of(ctx: Any, name: str) -> int:
    state = ctx.state
    return int(state.get(name, 0) if isinstance(state, dict) else getattr(state, name))


def put(ctx: Any, name: str, value: int) -> None:
    if isinstance(ctx.state, dict):
        ctx.state[name] = value
    else:
        setattr(ctx.state, name, value)


def fetch(out: str) -> dict[str, Any]:
    effect(out, "step fetch")
    return {"raw": b"\x00\xff", "pair": (1, 2)}


def pay(out: str) -> str:
    effect(out, "once pay")
    return "paid"


def paid_after_all(out: str) -> str:
    """Find out what the interrupted payment did, as its author must."""
    return "paid" if "once pay" in lines_of(out) else pay(out)


def write_file(ctx: Any, out: str, name: str) -> None:
    effect(out, f"file {name}")
    Path(ctx.file(name)).write_bytes(name.encode() * 1000)


def result_of(ctx: Any, *more: Any) -> list[Any]:
    contents = [Path(ctx.saved_file(name)).read_bytes()[:5] for name in ctx.files("data/")]
    items = sorted(ctx._work.known.items)
    sums = [of(ctx, name) for name in ("plain", "turned", "collected")]
    return [*more, sums, contents, items, ctx.get_intermediate_result("gone", "nothing")]


def everything(ctx: Any, out: str) -> list[Any]:
    fetched = ctx.step("fetch", fetch, out)
    try:
        receipt = ctx.step("pay", pay, out, semantics="at_most_once")
    except StepInterrupted:
        receipt = paid_after_all(out)
        ctx.complete_step("pay", receipt)
    if not ctx.was_step_completed("mark"):
        effect(out, "step mark")
        ctx.complete_step("mark")
    ctx.set_intermediate_result("gone", 1)
    ctx.set_intermediate_result("count", {"n": 3})
    ctx.delete_intermediate_result("gone")
    for item in ctx.items(["x", "y"], name="loop"):
        effect(out, f"item {item.value}")
        if item.value == "y":
            item.record("fail", {"why": "y"})
    for row in ctx.track(ROWS, key="id", name="keyed"):
        effect(out, f"item {row['id']}")
    for number in ctx.track(range(3), name="plain"):
        effect(out, f"bulk {number}")
        put(ctx, "plain", of(ctx, "plain") + number)
    position = ctx.cursor("turns")
    while position.value < 2:
        effect(out, f"bulk turn {position.value}")
        put(ctx, "turned", of(ctx, "turned") + 1)
        position.advance()
        ctx.checkpoint_if_needed(progress=(position.value, 2))
    for name in ("data/a", "data/b"):
        if ctx.saved_file(name) is None:
            write_file(ctx, out, name)
            ctx.checkpoint()
    tally = ctx.items(range(MANY), name="many", concurrency=LANES).run(
        lambda value: effect(out, f"lane {value}")
    )
    assert tally.known + sum(tally.counts.values()) == MANY
    ctx.on_checkpoint(lambda: put(ctx, "collected", 9))
    ctx.checkpoint_if_needed(step="last", force=True)
    count = ctx.get_intermediate_result("count")
    return result_of(ctx, fetched, receipt, count, ctx.idempotency_key("k") != "")


async def everything_awaited(ctx: Any, out: str) -> list[Any]:
    fetched = await ctx.step("fetch", fetch, out)
    try:
        receipt = await ctx.step("pay", pay, out, semantics="at_most_once")
    except StepInterrupted:
        receipt = paid_after_all(out)
        await ctx.complete_step("pay", receipt)
    if not ctx.was_step_completed("mark"):
        effect(out, "step mark")
        await ctx.complete_step("mark")
    await ctx.set_intermediate_result("gone", 1)
    await ctx.set_intermediate_result("count", {"n": 3})
    await ctx.delete_intermediate_result("gone")
    async for item in ctx.items(["x", "y"], name="loop"):
        effect(out, f"item {item.value}")
        if item.value == "y":
            await item.record("fail", {"why": "y"})
    async for row in ctx.track(ROWS, key="id", name="keyed"):
        effect(out, f"item {row['id']}")
    async for number in ctx.track(range(3), name="plain"):
        effect(out, f"bulk {number}")
        put(ctx, "plain", of(ctx, "plain") + number)
    position = ctx.cursor("turns")
    while position.value < 2:
        effect(out, f"bulk turn {position.value}")
        put(ctx, "turned", of(ctx, "turned") + 1)
        position.advance()
        await ctx.checkpoint_if_needed(progress=(position.value, 2))
    for name in ("data/a", "data/b"):
        if ctx.saved_file(name) is None:
            write_file(ctx, out, name)
            await ctx.checkpoint()

    async def do(value: int) -> str:
        return effect(out, f"lane {value}")

    tally = await ctx.items(range(MANY), name="many", concurrency=LANES).run(do)
    assert tally.known + sum(tally.counts.values()) == MANY
    ctx.on_checkpoint(lambda: put(ctx, "collected", 9))
    await ctx.checkpoint_if_needed(step="last", force=True)
    count = ctx.get_intermediate_result("count")
    return result_of(ctx, fetched, receipt, count, ctx.idempotency_key("k") != "")


FORMS = {"sync": everything, "async": everything_awaited}
# (strategy, turns of a loop without durable items that a crash repeats at most)
STRATEGIES: list[tuple[str, Strategy, int]] = [
    ("time 0", Time(0), 1),
    ("time for ever", Time(1e9), BULK),
    ("progress by items", Progress(items=1), 1),
    ("progress by share", Progress(0.2), 1),
    ("manual", Manual(), BULK),
    ("automatic", Automatic(), BULK),
]


def kinds(run: Run) -> Counter[str]:
    return Counter(text.split()[0] for text in run.repeated)


def check(report: Report, bulk_max: int, crashes: int) -> None:
    for run in report.runs:
        again = kinds(run)
        told = f"crashed {run.crashes}: {run.repeated}"
        limit = len(run.crashes)
        assert again["once"] == 0, told
        assert again["step"] + again["item"] + again["file"] <= limit, told
        assert again["lane"] <= limit * LANES, told
        assert again["bulk"] <= limit * bulk_max, told
    assert len(report.points) >= 18
    assert max(len(run.crashes) for run in report.runs) == crashes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "strategy", "bulk_max"), STRATEGIES, ids=[name for name, *_ in STRATEGIES]
)
def test_killed_at_any_durable_point_it_comes_to_the_same_and_repeats_the_current_at_most(
    tmp_path: Path, form: str, name: str, strategy: Strategy, bulk_max: int, rounds: int
) -> None:
    declared = task(strategy=strategy)(FORMS[form])
    at_most = 1_000 if name == "time 0" else rounds // 4

    report = check_resumable(
        declared, tmp_path, given=place_out, side_effects=effects, at_most=at_most
    )

    check(report, bulk_max, 1)


@pytest.mark.parametrize("form", FORMS)
def test_killed_again_during_the_resume_it_comes_to_the_same(tmp_path: Path, form: str) -> None:
    declared = task(strategy=Time(0))(FORMS[form])

    report = check_resumable(
        declared, tmp_path, given=place_out, side_effects=effects, twice=True, at_most=2
    )

    check(report, 1, 2)


@pytest.mark.parametrize("form", FORMS)
def test_a_state_with_a_schema_outlives_the_same(tmp_path: Path, form: str, rounds: int) -> None:
    declared = task(strategy=Time(0), state_schema=Sums)(FORMS[form])

    report = check_resumable(
        declared, tmp_path, given=place_out, side_effects=effects, at_most=rounds // 4
    )

    check(report, 1, 1)
