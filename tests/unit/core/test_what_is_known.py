"""What State knows of a task's files, and when it stops to: what a start must find again."""

import pytest
from msgspec.structs import replace

from ckptd.core import outcome
from ckptd.core.port import MarkSeen, Start, StartSeen
from ckptd.core.records import Phase
from ckptd.core.state import Run
from ckptd.protocol import messages as m
from tests.unit.core.world import SECOND, World


def ids(*numbers: int) -> m.Selector:
    return m.Selector(ids=numbers)


def saved(world: World, *checkpoints: int) -> int:
    """Return a task whose first attempt has saved."""
    number = world.submit(retries=9)
    begins(world, number)
    for checkpoint in checkpoints:
        world.saves(number, checkpoint)
    return number


def begins(world: World, number: int, resumed_from: int = 0) -> Start:
    """Let an attempt begin; return its order."""
    order = world.ordered(Start)[-1]
    assert isinstance(order, Start)
    world.at_ns += SECOND
    world.begins(number, resumed_from=resumed_from)
    return order


def again(world: World, number: int, resumed_from: int = 0) -> Start:
    """Let the attempt fail and the next one begin."""
    world.ends(number, code=1)
    world.pass_time(1_000)
    return begins(world, number, resumed_from)


def marks(
    world: World, number: int, checkpoint: int, cursor: str, problem: str = "", **more: bool
) -> None:
    world.mark = MarkSeen(
        number, world.attempt(number), checkpoint, world.at_ns, cursor, problem=problem, **more
    )
    world.put(outcome.marked(world.state, world.mark, world.now))


def known(world: World, number: int) -> Run:
    run = world.task(number).run
    assert run is not None
    return run


def test_a_start_is_told_what_must_be_found_again() -> None:
    world = World()
    number = world.submit(retries=9)
    first = begins(world, number)
    assert (first.checkpoint, first.has_journal) == (0, False)
    world.saves(number, 2)

    second = again(world, number, 2)
    assert (second.checkpoint, second.has_journal) == (2, False)
    marks(world, number, 2, "c2 and facts", has_journal=True)
    third = again(world, number, 2)

    assert (third.checkpoint, third.has_journal) == (2, True)


def test_a_problem_of_a_start_takes_nothing_from_what_is_known() -> None:
    world = World()
    number = saved(world, 2)
    world.ends(number, code=1)
    world.pass_time(1_000)
    for _ in range(3):
        marks(world, number, 0, "", "checkpoint 2 is gone")
        world.ends(number, "not_started")
        assert world.phase(number) is Phase.BLOCKED
        world.ask(m.Release(ids(number)))
    order = world.ordered(Start)[-1]
    assert isinstance(order, Start)
    assert order.checkpoint == 2
    assert known(world, number).cursor == "c2"


@pytest.mark.parametrize("left", [0, 1])
def test_what_is_lost_under_a_running_attempt_stays_known(left: int) -> None:
    world = World()
    number = saved(world, 1, 2)
    marks(world, number, left, "facts and what is left")
    assert again(world, number, left).checkpoint == 2


def test_a_checkpoint_that_was_away_and_came_back_makes_nobody_miss_a_journal() -> None:
    world = World()
    number = saved(world, 1, 2)
    marks(world, number, 1, "c1")
    marks(world, number, 2, "c2")
    order = again(world, number, 2)
    assert (order.checkpoint, order.has_journal) == (2, False)


@pytest.mark.parametrize("is_last_look", [False, True])
def test_a_journal_that_is_lost_under_an_attempt_stays_known_whatever_is_saved_beside(
    *, is_last_look: bool
) -> None:
    world = World()
    number = saved(world, 1)
    marks(world, number, 1, "c1 and facts", has_journal=True)
    if is_last_look:
        world.mark = replace(world.mark, checkpoint=2, cursor="c2", has_journal=False)
    else:
        marks(world, number, 2, "c2")

    order = again(world, number, 1)

    assert (order.checkpoint, order.has_journal) == (1, True)
    assert known(world, number).cursor == "c1 and facts"


def test_a_journal_that_an_older_daemon_did_not_note_is_noted_though_nothing_was_gained() -> None:
    world = World()
    number = saved(world, 1)
    marks(world, number, 1, "c1", has_journal=True)
    assert again(world, number, 1).has_journal


def test_an_attempt_that_began_from_an_older_checkpoint_counts_on_from_there() -> None:
    world = World()
    number = saved(world, 5)
    assert again(world, number, 3).checkpoint == 5
    assert again(world, number, 3).checkpoint == 3, "that 5 is missing was told once"
    world.saves(number, 4)
    assert again(world, number, 4).checkpoint == 4


def test_a_save_that_is_seen_before_the_start_it_belongs_to_is_not_forgotten() -> None:
    world = World()
    number = saved(world, 1)
    world.ends(number, code=1)
    world.pass_time(1_000)
    began_ns = world.at_ns
    world.at_ns += SECOND
    world.saves(number, 2)
    run = known(world, number)
    seen = StartSeen(number, run.attempt, world.shim(number), 77, began_ns, resumed_from=1)
    world.put(outcome.started(world.state, seen))
    assert again(world, number, 2).checkpoint == 2


def test_from_nothing_nothing_is_to_be_found() -> None:
    world = World()
    number = saved(world, 2)
    marks(world, number, 2, "c2 and facts", has_journal=True)
    world.ask(m.Cancel(ids(number)))
    world.ends(number, "signal", signal=9)
    world.ask(m.Retry(ids(number), fresh=True))
    order = begins(world, number)
    assert (order.fresh, order.checkpoint, order.has_journal) == (True, 0, False)
    assert again(world, number).checkpoint == 0


def test_what_was_seen_of_files_that_were_to_be_put_away_is_not_to_be_found() -> None:
    """A daemon that dies between order and start leaves the old files; the next one looks."""
    world = World()
    number = saved(world, 2)
    world.ask(m.Cancel(ids(number)))
    world.ends(number, "signal", signal=9)
    world.ask(m.Retry(ids(number), fresh=True))
    marks(world, number, 2, "c2 and facts", has_journal=True)
    world.ends(number, "not_started")
    order = begins(world, number)
    assert (order.fresh, order.checkpoint, order.has_journal) == (True, 0, False)
    world.ends(number, "lost")
    order = begins(world, number)
    assert (order.fresh, order.checkpoint, order.has_journal) == (False, 0, False)
    assert known(world, number).cursor == ""
