"""What retention gives up, and when: the checkpoints of what succeeded, never of what may go on."""

import pytest

from ckptd.core import image
from ckptd.core.apply import apply
from ckptd.core.explain import explain
from ckptd.core.port import Delete, DropCheckpoints, Start
from ckptd.core.records import CheckpointsDropped, Phase, Removed
from ckptd.core.state import STALE_MAX
from ckptd.protocol import messages as m
from tests.unit.core.world import ROOT, World

DAY_S = 86_400.0


def ids(*numbers: int) -> m.Selector:
    return m.Selector(ids=numbers)


def saved_and_ended(world: World, *, code: int = 0, **spec: object) -> int:
    number = world.submit(**spec)
    world.begins(number)
    world.saves(number, 7)
    world.ends(number, code=code)
    return number


def retried(world: World, number: int) -> Start:
    world.ordered(Start)
    world.ask(m.Retry(ids(number)))
    (start,) = world.ordered(Start)
    assert isinstance(start, Start)
    return start


def test_checkpoints_are_given_up_a_day_after_success_and_once() -> None:
    world = World()
    number = saved_and_ended(world)
    world.pass_time(DAY_S - 1)
    assert world.ordered(DropCheckpoints) == []
    assert world.task(number).run.checkpoint == 7  # type: ignore[union-attr]

    world.pass_time(2)

    assert world.ordered(DropCheckpoints) == [DropCheckpoints(number, 1)]
    assert world.phase(number) is Phase.SUCCEEDED
    world.pass_time(DAY_S)
    assert world.ordered(DropCheckpoints) == []
    assert sum(isinstance(record, CheckpointsDropped) for record in world.log) == 1


@pytest.mark.parametrize("end", ["failed", "cancelled", "backoff", "running", "saved nothing"])
def test_what_may_go_on_or_has_nothing_keeps_what_it_has(end: str) -> None:
    world = World()
    number = world.submit(retries=3 if end == "backoff" else 0)
    world.begins(number)
    if end != "saved nothing":
        world.saves(number, 7)
    match end:
        case "failed" | "backoff":
            world.ends(number, code=1)
        case "cancelled":
            world.ask(m.Cancel(ids(number)))
            world.ends(number, "signal", signal=15)
        case "saved nothing":
            world.ends(number)
        case _:
            pass

    world.pass_time(2 * DAY_S)

    assert world.ordered(DropCheckpoints) == []
    assert not any(isinstance(record, CheckpointsDropped) for record in world.log)


def test_a_retry_within_the_day_goes_on_from_the_checkpoint_and_starts_the_day_anew() -> None:
    world = World()
    number = saved_and_ended(world)
    world.pass_time(DAY_S - 10)
    assert not retried(world, number).fresh
    world.pass_time(DAY_S)
    assert world.ordered(DropCheckpoints) == []
    world.begins(number)
    world.ends(number)
    world.pass_time(DAY_S - 10)
    assert world.ordered(DropCheckpoints) == []

    world.pass_time(20)

    assert world.ordered(DropCheckpoints) == [DropCheckpoints(number, 2)]


def test_a_retry_after_the_day_starts_from_nothing_and_says_so_before() -> None:
    world = World()
    number = saved_and_ended(world)
    world.pass_time(DAY_S + 3_600)
    world.pass_time(3_600)
    text = explain(world.state, world.task(number), world.now, world.policy)
    assert "checkpoints were deleted 1h00m ago" in text
    assert f"`ckptctl retry {number}` starts from nothing" in text

    assert retried(world, number).fresh

    world.begins(number)
    world.saves(number, 1)
    world.ends(number)
    assert world.task(number).run.dropped_ns == 0  # type: ignore[union-attr]
    world.pass_time(DAY_S)
    assert world.ordered(DropCheckpoints)[-1] == DropCheckpoints(number, 2)


def test_a_retry_in_the_turn_of_the_giving_up_orders_no_deletion() -> None:
    world = World()
    number = saved_and_ended(world)
    world.at_ns += int(DAY_S * 1e9)
    world.put([CheckpointsDropped(number, world.at_ns)])

    assert retried(world, number).fresh

    assert world.ordered(DropCheckpoints) == []


def test_a_task_that_is_forgotten_at_the_same_time_is_deleted_as_a_whole() -> None:
    world = World(finished_age_s=DAY_S)
    number = saved_and_ended(world)

    world.pass_time(DAY_S + 1)

    assert world.ordered(Delete) == [Delete(number)]
    assert world.ordered(DropCheckpoints) == []
    assert sum(isinstance(record, Removed) for record in world.log) == 1


def test_a_replayed_state_gives_up_what_the_live_one_would() -> None:
    world = World(slots=4)
    numbers = [saved_and_ended(world) for _ in range(3)]
    replayed = image.load(image.chunks(world.state))
    replayed.index()
    successor = World(slots=4)
    successor.state, successor.at_ns = replayed, world.at_ns

    successor.pass_time(DAY_S)

    dropped = successor.ordered(DropCheckpoints)
    assert [order.task for order in dropped] == numbers  # type: ignore[union-attr]


def test_what_waits_to_be_given_up_takes_no_memory_after_it_went() -> None:
    world = World(checkpoints_age_s=1e9)
    number = saved_and_ended(world)
    for _ in range(STALE_MAX + 10):
        retried(world, number)
        world.begins(number)
        world.at_ns += 1_000
        world.ends(number)

    assert len(world.state.spent) <= STALE_MAX + 2


def test_giving_up_the_checkpoints_of_what_did_not_succeed_is_our_own_mistake() -> None:
    world = World()
    number = saved_and_ended(world, code=1)

    with pytest.raises(AssertionError, match="it may go on"):
        apply(world.state, world.state.lsn + 1, CheckpointsDropped(number, 1))


def needed_and_ended(world: World, count: int) -> list[int]:
    """Return tasks that have ended and that a held one waits for each."""
    world.ask(m.GroupSet("default", paused=True), ROOT)
    spec = m.TaskSpec(("true",), hold=True)
    answer = world.ask(m.Submit((spec,) * count))
    assert isinstance(answer, m.Submitted)
    waiting = (m.TaskSpec(("x",), hold=True, after=(m.Dependency(one),)) for one in answer.ids)
    world.ask(m.Submit(tuple(waiting)))
    world.ask(m.Cancel(ids(*answer.ids)))
    return list(answer.ids)


def test_what_others_wait_for_does_not_hide_from_retention_all_that_ended_later() -> None:
    world = World(finished_age_s=60.0)
    needed = needed_and_ended(world, 1_001)
    world.pass_time(1)
    later = world.submit(hold=True)
    world.ask(m.Cancel(ids(later)))

    world.pass_time(3_600)

    assert world.state.tasks.get(later) is None
    assert all(world.state.tasks.get(number) for number in needed)
    assert not world.state.ended  # the next pass does not meet them again


@pytest.mark.parametrize("count", [2, 3, 10])
def test_what_others_wait_for_takes_no_room_from_what_has_just_ended(count: int) -> None:
    world = World(finished_max=2, slots=1)
    needed = needed_and_ended(world, count)
    world.pass_time(1)
    later = [world.submit(hold=True) for _ in range(3)]
    for number in later:
        world.ask(m.Cancel(ids(number)))
        assert world.state.tasks.get(number), "it is forgotten in the turn that ended it"
        world.pass_time(1)

    assert [number for number in later if world.state.tasks.get(number)] == later[1:]
    assert all(world.state.tasks.get(number) for number in needed)


def test_what_runs_again_is_not_counted_among_what_has_ended_and_stays() -> None:
    world = World(finished_max=2)
    (needed,) = needed_and_ended(world, 1)
    more = [world.submit(hold=True) for _ in range(4)]
    world.ask(m.Cancel(ids(*more[:2])))
    world.ask(m.Retry(ids(needed)))
    assert needed not in world.state.needed
    world.pass_time(1)

    world.ask(m.Cancel(ids(*more[2:])))

    assert [number for number in more if world.state.tasks.get(number)] == more[2:]


@pytest.mark.parametrize("is_replayed", [False, True])
def test_what_the_last_one_no_longer_waits_for_is_forgotten_then(*, is_replayed: bool) -> None:
    world = World(finished_age_s=60.0)
    (number,) = needed_and_ended(world, 1)
    world.pass_time(3_600)
    if is_replayed:
        world.state = image.load(image.chunks(world.state))
        world.state.index()
    world.ask(m.Edit(ids(number + 1), priority=3))  # it waits as before
    assert world.state.tasks.get(number) is not None

    world.ask(m.Cancel(ids(number + 1)))

    assert world.state.tasks.get(number) is None
    assert world.ordered(Delete) == [Delete(number)]
