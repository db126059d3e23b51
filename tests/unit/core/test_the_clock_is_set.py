"""A clock that is set, forward by NTP hours after boot or back, ends no length early or late."""

import pytest

from ckptd.core.plan import wake_ns
from ckptd.core.port import Deliver
from ckptd.core.records import CheckpointsDropped, Moved, Phase
from ckptd.core.stepped import stepped
from ckptd.protocol import messages as m
from tests.unit.core.world import SECOND, World

DAY_S = 86_400
FORWARD, BACK = 50 * 365 * DAY_S, -600
STEPS = pytest.mark.parametrize("step_s", [FORWARD, BACK])


def set_clock(world: World, step_s: int) -> None:
    world.at_ns += step_s * SECOND
    world.put(stepped(world.state, world.observed, step_s * SECOND, world.now))
    world.turn()


def runs(world: World, **spec: object) -> int:
    number = world.submit(**spec)
    world.begins(number)
    return number


@STEPS
def test_a_clock_that_is_set_neither_fires_a_timeout_nor_puts_it_off(step_s: int) -> None:
    world = World()
    number = runs(world, timeout_s=100.0)
    world.pass_time(40)
    set_clock(world, step_s)
    world.pass_time(59)
    assert world.phase(number) is Phase.RUNNING
    assert wake_ns(world.state) <= world.at_ns + SECOND
    world.pass_time(1)
    assert world.phase(number) is Phase.STOPPING
    assert world.task(number).reason == "timeout"


def test_a_clock_that_is_set_forward_and_back_again_leaves_the_timeout_where_it_was() -> None:
    world = World()
    number = runs(world, timeout_s=100.0)
    for step_s in (FORWARD, -FORWARD, FORWARD, -FORWARD, BACK, -BACK):
        set_clock(world, step_s)
        world.pass_time(10)
    world.pass_time(39)
    assert world.phase(number) is Phase.RUNNING
    assert wake_ns(world.state) <= world.at_ns + SECOND
    world.pass_time(1)
    assert world.phase(number) is Phase.STOPPING


@STEPS
def test_a_clock_that_is_set_during_a_grace_leaves_the_task_its_time_to_save(step_s: int) -> None:
    world = World()
    number = runs(world, grace_s=30.0)
    world.ask(m.Cancel(m.Selector(ids=(number,))))
    world.pass_time(10)
    set_clock(world, step_s)
    world.pass_time(19)
    assert not [one for one in world.orders if isinstance(one, Deliver) and one.signal == 9]
    assert wake_ns(world.state) <= world.at_ns + SECOND
    world.pass_time(1)
    assert [one for one in world.orders if isinstance(one, Deliver) and one.signal == 9]


def test_a_rung_that_is_climbed_after_the_clock_was_set_lasts_as_long_as_any_other() -> None:
    world = World()
    number = runs(world, timeout_s=100.0, grace_s=30.0)
    set_clock(world, FORWARD)
    world.pass_time(100)
    world.pass_time(29)
    assert not [one for one in world.orders if isinstance(one, Deliver) and one.signal == 9]
    world.pass_time(1)
    assert [one for one in world.orders if isinstance(one, Deliver) and one.signal == 9]
    assert world.phase(number) is Phase.STOPPING


def test_a_clock_that_is_set_back_does_not_put_off_the_next_try() -> None:
    world = World()
    number = runs(world, retries=5, backoff_s=10.0)
    world.ends(number, code=1)
    assert world.task(number).reason == "backoff"
    set_clock(world, BACK)
    world.pass_time(10)
    assert world.phase(number) is Phase.STARTING


def test_a_delay_noted_by_a_clock_that_was_right_does_not_move_into_another_century() -> None:
    """A machine without a clock boots in 1970; until NTP sets it, the delays look endless."""
    world = World()
    number = runs(world, retries=5, backoff_s=10.0)
    world.ends(number, code=1)
    world.at_ns -= FORWARD * SECOND  # no daemon ran then
    set_clock(world, FORWARD)
    world.pass_time(10)
    assert world.phase(number) is Phase.STARTING


@STEPS
def test_what_is_named_by_the_clock_means_the_clock_as_it_is_set(step_s: int) -> None:
    world = World()
    deadline_ns = world.at_ns + 100 * SECOND
    runs_out = runs(world, timeout_s=1e9, deadline_ns=deadline_ns)
    at = world.submit(at_ns=deadline_ns)
    set_clock(world, step_s)
    is_past = step_s > 0
    assert world.phase(runs_out) is (Phase.STOPPING if is_past else Phase.RUNNING)
    assert world.phase(at) is (Phase.STARTING if is_past else Phase.WAITING)
    assert not [one for one in world.log if isinstance(one, Moved) and not is_past]
    world.pass_time(100 - step_s)
    assert world.phase(runs_out) is Phase.STOPPING


def test_a_deadline_is_not_put_off_by_a_timeout_that_was_extended() -> None:
    world = World()
    number = runs(world, timeout_s=10.0, deadline_ns=world.at_ns + 20 * SECOND)
    world.observed.instances[number].extended_ns = world.at_ns + 3_600 * SECOND
    world.pass_time(10)
    assert world.phase(number) is Phase.RUNNING
    assert wake_ns(world.state) == world.at_ns + 10 * SECOND
    world.pass_time(10)
    assert world.task(number).reason == "deadline"


def test_an_extension_of_the_timeout_is_a_length_too() -> None:
    world = World()
    number = runs(world, timeout_s=10.0)
    world.observed.instances[number].extended_ns = world.at_ns + 60 * SECOND
    set_clock(world, FORWARD)
    world.pass_time(59)
    assert world.phase(number) is Phase.RUNNING
    world.pass_time(1)
    assert world.phase(number) is Phase.STOPPING


def test_what_has_ended_is_not_forgotten_at_once_by_a_clock_that_is_set_far_ahead() -> None:
    world = World(finished_age_s=30 * DAY_S, checkpoints_age_s=DAY_S)
    number = runs(world)
    world.saves(number, 1)
    world.ends(number)
    set_clock(world, FORWARD)
    world.pass_time(DAY_S - 1)
    assert world.state.tasks.get(number) is not None
    assert not [one for one in world.log if isinstance(one, CheckpointsDropped)]
    world.pass_time(1)
    assert world.state.tasks.get(number) is None


def test_a_clock_that_was_ahead_by_mistake_and_is_set_right_costs_nothing() -> None:
    world = World(finished_age_s=30 * DAY_S)
    number = runs(world)
    world.ends(number)
    set_clock(world, FORWARD)
    world.pass_time(3_600)
    set_clock(world, -FORWARD)
    world.pass_time(29 * DAY_S)
    assert world.state.tasks.get(number) is not None
    world.pass_time(DAY_S)
    assert world.state.tasks.get(number) is None


def test_a_machine_that_sleeps_every_night_forgets_as_any_other() -> None:
    world = World(finished_age_s=2 * DAY_S)
    number = runs(world)
    world.ends(number)
    for _ in range(2):
        world.pass_time(DAY_S // 2)
        set_clock(world, DAY_S // 2)
    assert world.state.tasks.get(number) is None
