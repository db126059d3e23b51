"""A drill is real damage that counts as an interruption: the task goes on, no failure counts."""

import pytest

from ckptd.core.port import Deliver, Starve
from ckptd.core.records import Phase
from ckptd.protocol import messages as m
from tests.unit.core.world import ROOT, World

ONE = m.Selector(ids=(1,))


def running(world: World, *, invocation: str = "", **spec: object) -> int:
    number = world.submit(**spec)
    world.begins(number, invocation)
    return number


def error_of(answer: m.Answer) -> str:
    assert isinstance(answer, m.Changed)
    error = answer.tasks[0].error
    return f"{error.message}: {error.hint}" if error is not None else ""


@pytest.mark.parametrize("how", ["kill9", "sigterm"])
def test_what_a_drill_killed_is_queued_again_at_once_and_no_failure_is_counted(how: str) -> None:
    world = World()
    number = running(world, retries=0)
    answer = world.ask(m.Drill(ONE, how))  # type: ignore[arg-type]
    assert not error_of(answer)
    wanted = {"kill9": Deliver(1, 1, 9, tree=True), "sigterm": Deliver(1, 1, 15, tree=False)}[how]
    assert wanted in world.orders
    world.ends(number, "signal", signal=wanted.signal)
    run = world.task(number).run
    assert run is not None
    assert (run.attempt, run.failures, run.interruptions) == (2, 0, 1)
    assert (run.past[-1].cause, run.past[-1].signal) == ("drill", wanted.signal)


def test_a_task_that_saves_at_the_drill_and_exits_with_0_goes_on() -> None:
    world = World()
    number = running(world)
    world.ask(m.Drill(ONE, "sigterm"))
    world.ends(number, "exit", code=0)
    assert world.phase(number) is Phase.STARTING


def test_a_unit_is_starved_and_what_the_kernel_did_is_told_as_it_was() -> None:
    world = World()
    number = running(world, invocation="ab" * 16, memory_bytes=1 << 30, on_oom="fail")
    world.ask(m.Drill(ONE, "oom"))
    assert Starve(1, 1) in world.orders
    world.ends(number, "oom", signal=9, blame="limit")
    task = world.task(number)
    assert task.run is not None
    assert (task.phase, task.run.failures, task.run.past[-1].cause) == (Phase.STARTING, 0, "oom")
    assert task.unpacked().memory_bytes == 1 << 30  # the limit did not grow


def test_a_unit_that_lives_on_without_memory_is_killed_in_the_end() -> None:
    world = World()
    running(world, invocation="ab" * 16)
    world.ask(m.Drill(ONE, "oom"))
    world.pass_time(11)
    assert world.orders[-1] == Deliver(1, 1, 9, tree=True)


def test_a_task_that_gets_done_without_memory_is_not_done_again() -> None:
    world = World()
    number = running(world, invocation="ab" * 16)
    world.ask(m.Drill(ONE, "oom"))
    world.ends(number, "exit", code=0)
    assert world.phase(number) is Phase.SUCCEEDED


def test_a_task_that_says_done_though_the_drill_killed_its_child_goes_on() -> None:
    world = World()
    number = running(world, invocation="ab" * 16)
    world.ask(m.Drill(ONE, "oom"))
    world.ends(number, "exit", code=0, blame="limit")
    assert world.phase(number) is Phase.STARTING


def test_who_cancels_a_task_without_memory_has_it_asked_before_it_is_killed() -> None:
    world = World()
    running(world, invocation="ab" * 16, grace_s=60.0)
    world.ask(m.Drill(ONE, "oom"))
    world.ask(m.Cancel(ONE))
    assert Deliver(1, 1, 15, tree=False) in world.orders
    world.pass_time(61)
    assert world.orders[-1] == Deliver(1, 1, 9, tree=True)


def test_a_task_that_a_paused_group_would_keep_down_is_not_drilled() -> None:
    world = World()
    number = running(world)
    world.ask(m.GroupSet("default", paused=True), ROOT)
    assert "is paused" in error_of(world.ask(m.Drill(ONE, "kill9")))
    assert world.phase(number) is Phase.RUNNING


def test_a_drill_that_would_harm_is_refused_and_changes_nothing() -> None:
    world = World(interruptions_max=1)
    number = world.submit()
    assert "only a running task" in error_of(world.ask(m.Drill(ONE, "kill9")))
    world.begins(number)
    assert "no unit of its own" in error_of(world.ask(m.Drill(ONE, "oom")))
    world.ask(m.Drill(ONE, "kill9"))
    world.ends(number, "signal", signal=9)
    world.begins(number)
    before = len(world.log)
    assert "quarantine" in error_of(world.ask(m.Drill(ONE, "kill9")))
    assert len(world.log) == before
