"""Random lives of random tasks: what holds whatever happens."""

import random
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core import image
from ckptd.core.apply import apply
from ckptd.core.plan import Adopt, Observed, adoption, effects
from ckptd.core.policy import Now
from ckptd.core.port import Start
from ckptd.core.records import ACTIVE, AnyRecord, StartIntent
from ckptd.core.state import State
from ckptd.protocol import messages as m
from ckptd.protocol.errors import Rejected
from tests.unit.core.world import World

_records = msgspec.msgpack.Decoder(list[AnyRecord])


def live(seed: int, steps: int) -> World:
    """Return a world after `steps` random things happened to it."""
    dice = random.Random(seed)
    world = World(slots=dice.randint(1, 4), stalls_max=2, finished_max=20)
    for _ in range(steps):
        one_thing(world, dice)
    return world


def one_thing(world: World, dice: random.Random) -> None:
    known = [task.id for task in world.state.tasks.ascending(0)]
    running = [n for n in known if world.phase(n) in ACTIVE]
    roll = dice.random()
    try:
        if roll < 0.3 or not known:
            world.submit("x", **_spec(dice, known))
        elif roll < 0.5 and running:
            _happens(world, dice, dice.choice(running))
        elif roll < 0.6:
            world.pass_time(dice.choice([0.1, 3, 100, 5_000]))
        else:
            world.ask(_command(dice, m.Selector(ids=(dice.choice(known),))))
    except Rejected:
        pass  # a refusal changes nothing, which the replay below proves


def _spec(dice: random.Random, known: list[int]) -> dict[str, Any]:
    spec: dict[str, Any] = {"hold": dice.random() < 0.1, "priority": dice.randint(-2, 2)}
    if dice.random() < 0.3:
        spec["key"] = f"k{dice.randint(0, 5)}"
    if dice.random() < 0.3:
        spec["timeout_s"] = 50.0
    if dice.random() < 0.3:
        spec["retries"] = 3
    if dice.random() < 0.4:
        spec["memory_bytes"] = 1 << 30
        spec["on_oom"] = dice.choice(["", "count", "fail", "hold", "retry:x2,max=3G"])
    if known and dice.random() < 0.3:
        when = dice.choice(["ok", "fail", "any"])
        spec["after"] = (m.Dependency(dice.choice(known), when=when),)
    return spec


def _happens(world: World, dice: random.Random, number: int) -> None:
    run = world.task(number).run
    assert run is not None
    if run.shim is None and dice.random() < 0.8:
        world.begins(number)
    elif dice.random() < 0.4:
        world.saves(number, run.checkpoint + 1, retry_s=dice.choice([0, 0, 30]))
    else:
        cause = dice.choice(
            ["exit", "signal", "oom", "lost", "reboot", "not_started", "shutdown", "stopped"]
        )
        code = dice.choice([0, 1, 65, 75, 85]) if cause == "exit" else 0
        blame = dice.choice(["", "limit", "host", "disk"]) if cause in ("exit", "oom") else ""
        world.ends(number, cause, code=code, signal=11 if cause == "signal" else 0, blame=blame)


def _command(dice: random.Random, select: m.Selector) -> m.Message:
    return dice.choice(
        [
            m.Cancel(select),
            m.Kill(select),
            m.Pause(select),
            m.Resume(select),
            m.Hold(select),
            m.Release(select),
            m.Drop(select),
            m.Retry(select, fresh=dice.random() < 0.5),
            m.Edit(select, priority=dice.randint(-5, 5)),
            m.Edit(select, memory_bytes=1 << dice.randint(20, 40), nice=dice.randint(-1, 5)),
            m.CheckpointNow(select),
            m.Clean(select),
        ]
    )


def same(one: State, other: State) -> bool:
    return [*one.tasks.ascending(0)] == [*other.tasks.ascending(0)] and all(
        getattr(one, name) == getattr(other, name)
        for name in (
            "lsn",
            "next_id",
            "groups",
            "envs",
            "answers",
            "keys",
            "dependents",
            "env_uses",
        )
    )


def replayed(records: list[AnyRecord], start: State | None = None) -> State:
    state = start or State(indexed=False)
    encoded = msgspec.msgpack.encode(records)  # as the log holds them
    for record in _records.decode(encoded):
        apply(state, state.lsn + 1, record)
    state.index()
    return state


@given(st.integers(0, 1 << 32), st.integers(1, 120))
@settings(max_examples=60, deadline=None)
def test_a_replay_of_the_log_gives_the_state_that_was_there(seed: int, steps: int) -> None:
    world = live(seed, steps)
    again = replayed(world.log)
    assert same(world.state, again)
    assert sorted(again.active) == sorted(world.state.active)
    assert again.totals() == world.state.totals()


@given(st.integers(0, 1 << 32), st.integers(1, 100), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_snapshot_and_the_rest_of_the_log_give_the_same_state(
    seed: int, steps: int, part: float
) -> None:
    world = live(seed, steps)
    cut = int(len(world.log) * part)
    early = replayed(world.log[:cut])
    restored = image.load(image.chunks(early))
    assert same(replayed(world.log[cut:], restored), world.state)


@given(st.integers(0, 1 << 32))
@settings(max_examples=30, deadline=None)
def test_a_snapshot_is_of_one_lsn_though_the_state_goes_on(seed: int) -> None:
    world = live(seed, 60)
    before = replayed(world.log)
    chunks = image.chunks(world.state)
    taken = [next(chunks)]
    dice = random.Random(seed + 1)
    for chunk in chunks:
        one_thing(world, dice)
        taken.append(chunk)
    restored = image.load(taken)
    restored.index()
    assert same(restored, before)


@given(st.integers(0, 1 << 32), st.integers(1, 100))
@settings(max_examples=40, deadline=None)
def test_planning_twice_is_planning_once(seed: int, steps: int) -> None:
    world = live(seed, steps)
    before = len(world.log)
    world.orders.clear()
    world.state.touched.update(task.id for task in world.state.tasks.ascending(0))
    world.turn()
    assert len(world.log) == before
    assert world.orders == []


@given(st.integers(0, 1 << 32), st.integers(1, 150))
@settings(max_examples=40, deadline=None)
def test_every_start_has_its_intent_and_no_attempt_starts_twice(seed: int, steps: int) -> None:
    world = live(seed, steps)
    intents = {(r.task, r.attempt) for r in world.log if isinstance(r, StartIntent)}
    starts = [(o.task, o.attempt) for o in world.orders if isinstance(o, Start)]
    assert len(starts) == len(set(starts))
    assert set(starts) <= intents


@given(st.integers(0, 1 << 32), st.integers(1, 100))
@settings(max_examples=30, deadline=None)
def test_a_new_daemon_adopts_every_active_attempt_and_starts_none_again(
    seed: int, steps: int
) -> None:
    state, observed = replayed(live(seed, steps).log), Observed()
    adopted = {(order.task, order.attempt) for order in adoption(state, observed, Now(0))}
    assert {task for task, _ in adopted} == set(state.active)
    orders = effects(state, observed, list(state.active), [])
    assert not [order for order in orders if isinstance(order, Start | Adopt)]


@given(st.integers(0, 1 << 32), st.integers(1, 150))
@settings(max_examples=30, deadline=None)
def test_no_group_ever_runs_more_than_its_slots(seed: int, steps: int) -> None:
    world = live(seed, steps)
    limit = world.state.groups["default"].parallel or world.policy.slots
    assert world.state.slots_used("default") <= limit
