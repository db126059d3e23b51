"""What a task waits for, its deadline, and what is done to it while it runs: once, and in time."""

import pytest

from ckptd.core.port import Control, Deliver
from ckptd.core.records import Phase
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadRequest
from tests.unit.core.world import ROOT, SECOND, World


def ids(*numbers: int) -> m.Selector:
    return m.Selector(ids=numbers)


def refusal(answer: m.Answer) -> str:
    assert isinstance(answer, m.Changed)
    error = answer.tasks[0].error
    return f"{error.message}: {error.hint}" if error is not None else ""


def chain() -> tuple[World, int, int, int]:
    """Three tasks, each after the one before it."""
    world = World(slots=8)
    first = world.submit()
    second = world.submit(after=(m.Dependency(first),))
    return world, first, second, world.submit(after=(m.Dependency(second),))


def phases(world: World, *numbers: int) -> list[str]:
    return [world.phase(number).word for number in numbers]


def end_in_turn(world: World, *ends: tuple[int, int]) -> None:
    """Let each of these (task, exit code) run, one after the other."""
    for number, code in ends:
        world.begins(number)
        world.ends(number, code=code)
        world.at_ns += SECOND


# --- deadlines ------------------------------------------------------------------------------


def test_a_task_that_waits_for_its_time_fails_at_its_deadline_before_that() -> None:
    world = World()
    number = world.submit(in_s=3_600.0, deadline_ns=world.at_ns + 60 * SECOND)
    world.pass_time(61)
    assert (world.phase(number), world.task(number).reason) == (Phase.FAILED, "deadline")


@pytest.mark.parametrize("timeout_s", [0.0, 3_600.0])
def test_a_running_task_is_stopped_at_its_deadline_whatever_its_timeout(timeout_s: float) -> None:
    world = World()
    number = world.submit(timeout_s=timeout_s, deadline_ns=world.at_ns + 60 * SECOND)
    world.begins(number)
    world.pass_time(61)
    assert (world.phase(number), world.task(number).reason) == (Phase.STOPPING, "deadline")


def test_who_asked_for_more_time_before_it_was_stopped_is_killed_after_its_grace() -> None:
    world = World()
    number = world.submit(grace_s=5.0)
    world.begins(number)
    instance = world.observed.of(number, 1)
    assert instance is not None
    instance.extended_ns = world.at_ns + 86_400 * SECOND
    world.ask(m.Cancel(ids(number)))
    world.pass_time(6)
    assert Deliver(number, 1, 9, tree=True) in world.orders


# --- groups ---------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [m.Cancel, m.Pause])
def test_a_task_that_is_being_stopped_or_paused_keeps_its_place_in_the_group(
    verb: type[m.Cancel | m.Pause],
) -> None:
    world = World(slots=1)
    first, second = world.submit(), world.submit()
    world.begins(first)
    world.ask(verb(ids(first)))
    assert world.phase(second) is Phase.QUEUED
    world.ends(first, "signal", signal=15)
    assert world.phase(second) is Phase.STARTING


# --- others ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "code", "phase"),
    [
        ("ok", 0, Phase.STARTING), ("ok", 1, Phase.BLOCKED), ("fail", 0, Phase.BLOCKED),
        ("fail", 1, Phase.STARTING), ("any", 0, Phase.STARTING), ("any", 1, Phase.STARTING),
    ],
)  # fmt: skip
def test_what_waits_for_another_goes_by_how_that_ended(when: str, code: int, phase: Phase) -> None:
    world = World(slots=8)
    parent = world.submit()
    child = world.submit(after=(m.Dependency(parent, when=when),))  # type: ignore[arg-type]
    world.begins(parent)
    world.ends(parent, code=code)
    assert world.phase(child) is phase


def test_what_a_person_retries_does_not_wait_for_its_delay_any_more() -> None:
    world = World()
    number = world.submit(retries=9, backoff_s=600.0)
    world.begins(number)
    world.ends(number, code=1)
    assert world.phase(number) is Phase.WAITING
    world.ask(m.GroupSet("default", paused=True), ROOT)
    for verb in (m.Retry, m.Hold, m.Release):
        world.ask(verb(ids(number)))
    assert (world.phase(number), world.task(number).until_ns) == (Phase.QUEUED, 0)


def test_a_task_that_can_never_start_is_blocked_at_once_though_it_waits_for_others_too() -> None:
    world = World(slots=8)
    running, failed = world.submit(), world.submit()
    world.begins(failed)
    world.ends(failed, code=1)
    child = world.submit(after=(m.Dependency(running), m.Dependency(failed)))
    assert world.phase(child) is Phase.BLOCKED


def test_what_runs_after_a_failure_runs_after_a_cancel_too() -> None:
    world = World(slots=8)
    parent = world.submit(hold=True)
    cleanup = world.submit(after=(m.Dependency(parent, when="fail"),))
    world.ask(m.Cancel(ids(parent)))
    assert world.phase(cleanup) is Phase.STARTING


def test_a_task_that_others_wait_for_is_not_cleaned_away() -> None:
    world = World()
    parent, other = world.submit(), world.submit()
    world.begins(parent)
    world.ends(parent)
    child = world.submit(hold=True, after=(m.Dependency(parent), m.Dependency(other)))
    assert "still wait" in refusal(world.ask(m.Clean(ids(parent))))
    world.begins(other)
    world.ends(other)
    world.ask(m.Release(ids(child)))
    assert world.phase(child) is Phase.STARTING


def test_a_task_that_never_ran_does_not_start_behind_a_failure_that_was_cleaned_away() -> None:
    world = World(slots=8)
    failed, other = world.submit(), world.submit()
    child = world.submit(after=(m.Dependency(failed), m.Dependency(other)))
    world.ask(m.Cancel(ids(child)))
    world.begins(failed)
    world.ends(failed, code=1)
    world.ask(m.Clean(ids(failed)))
    assert world.state.tasks.get(failed) is None
    world.ask(m.Retry(ids(child)))
    assert world.phase(child) is Phase.WAITING
    world.begins(other)
    world.ends(other)
    assert (world.phase(child), world.task(child).reason) == (Phase.BLOCKED, "dependency")


def test_a_retry_does_not_make_a_task_overtake_those_that_it_waits_for() -> None:
    world = World()
    child = world.submit(after=(m.Dependency(world.submit()),))
    assert "it waits: after" in refusal(world.ask(m.Retry(ids(child))))
    assert world.phase(child) is Phase.WAITING


def test_what_is_cancelled_and_retried_together_runs_in_its_order_again() -> None:
    world, first, second, third = chain()
    world.begins(first)
    world.ask(m.Cancel(ids(first, second, third)))
    world.ends(first, "signal", signal=15)
    world.ask(m.Retry(ids(first, second, third)))
    assert phases(world, first, second, third) == ["starting", "waiting", "waiting"]
    for earlier, later in ((first, second), (second, third)):
        world.begins(earlier)
        world.ends(earlier)
        assert world.phase(later) is Phase.STARTING


def test_what_has_ended_and_is_retried_together_runs_in_its_order_again() -> None:
    world, first, second, third = chain()
    end_in_turn(world, (first, 0), (second, 1))
    assert phases(world, first, second, third) == ["succeeded", "failed", "blocked"]
    world.ask(m.Retry(ids(first, second, third)))
    assert phases(world, first, second, third) == ["starting", "waiting", "waiting"]


def test_a_cancelled_task_that_is_retried_waits_for_what_still_runs() -> None:
    world, first, second, _ = chain()
    world.begins(first)
    world.ask(m.Cancel(ids(second)))
    world.ask(m.Retry(ids(second)))
    assert (world.phase(second), world.task(second).reason) == (Phase.WAITING, "after")
    world.ends(first)
    assert world.phase(second) is Phase.STARTING


def test_a_cancelled_task_that_is_retried_alone_is_blocked_by_what_was_cancelled_before() -> None:
    world = World()
    first = world.submit(hold=True)
    second = world.submit(after=(m.Dependency(first),))
    world.ask(m.Cancel(ids(first, second)))
    world.ask(m.Retry(ids(second)))
    assert (world.phase(second), world.task(second).reason) == (Phase.BLOCKED, "dependency")
    world.ask(m.Retry(ids(first)))
    assert world.phase(second) is Phase.WAITING


def test_a_task_that_has_run_or_is_blocked_is_retried_whatever_became_of_what_it_needed() -> None:
    world, first, second, third = chain()
    end_in_turn(world, (first, 0), (second, 1))
    world.ask(m.Clean(ids(first)))
    world.ask(m.Retry(ids(third)))
    assert world.phase(third) is Phase.STARTING
    world.ask(m.Retry(ids(second)))
    assert world.phase(second) is Phase.STARTING


def test_what_was_cleaned_since_a_task_ran_does_not_block_it_when_it_waits_again() -> None:
    world = World(slots=8)
    cleaned, again = world.submit(), world.submit()
    child = world.submit(after=(m.Dependency(cleaned), m.Dependency(again)))
    end_in_turn(world, (cleaned, 0), (again, 0), (child, 1))
    world.ask(m.Clean(ids(cleaned)))
    world.ask(m.Retry(ids(again, child)))
    assert world.phase(child) is Phase.WAITING
    world.begins(again)
    world.ends(again)
    assert world.phase(child) is Phase.STARTING


def test_what_fails_while_a_task_that_ran_before_waits_again_does_block_it() -> None:
    world = World(slots=8)
    first = world.submit()
    child = world.submit(after=(m.Dependency(first),))
    end_in_turn(world, (first, 0), (child, 1))
    world.ask(m.Retry(ids(first, child)))
    world.begins(first)
    world.ends(first, code=1)
    assert (world.phase(child), world.task(child).reason) == (Phase.BLOCKED, "dependency")


def test_a_task_that_was_released_beside_a_failure_is_not_blocked_by_it_once_more() -> None:
    world = World(slots=8)
    failed, again = world.submit(), world.submit()
    child = world.submit(after=(m.Dependency(failed), m.Dependency(again)))
    end_in_turn(world, (failed, 1), (again, 0))
    world.ask(m.Release(ids(child)))
    world.begins(child)
    world.ends(child, code=1)
    world.ask(m.Retry(ids(again, child)))
    assert world.phase(child) is Phase.WAITING
    world.begins(again)
    world.ends(again)
    assert world.phase(child) is Phase.STARTING


# --- times ----------------------------------------------------------------------------------


def test_a_delayed_task_that_was_held_and_released_still_starts_when_it_is_due() -> None:
    world = World()
    number = world.submit(in_s=60.0)
    world.ask(m.Hold(ids(number)))
    world.ask(m.Release(ids(number)))
    assert (world.phase(number), world.task(number).reason) == (Phase.WAITING, "at")
    world.pass_time(59)
    assert world.phase(number) is Phase.WAITING
    world.pass_time(2)
    assert world.phase(number) is Phase.STARTING


# --- what runs ------------------------------------------------------------------------------


def test_of_a_task_that_runs_nothing_but_its_priority_is_edited() -> None:
    world = World()
    number = world.submit("sleep", "1")
    world.begins(number)
    assert "not running can be edited" in refusal(world.ask(m.Edit(ids(number), argv=("rm",))))
    assert world.task(number).unpacked().argv == ("sleep", "1")
    assert not refusal(world.ask(m.Edit(ids(number), priority=7)))
    assert world.task(number).priority == 7


def test_a_task_that_is_asked_once_to_save_gets_its_signal_once() -> None:
    world = World()
    number = world.submit(checkpoint_signal=10)
    world.begins(number)
    for _ in range(2):
        world.ask(m.CheckpointNow(ids(number)))
        assert world.ordered(Deliver) == [Deliver(number, 1, 10, tree=False)]
        world.saves(number, world.at_ns)
        world.ask(m.Edit(ids(number), priority=world.task(number).priority + 1))
        assert world.ordered(Deliver) == []


def test_a_task_that_was_never_asked_to_save_is_told_why_it_gets_its_stop_signal() -> None:
    world = World()
    number = world.submit(grace_s=5.0)
    world.begins(number)
    world.ask(m.Cancel(ids(number)))
    force_ns = world.at_ns + 5 * SECOND
    assert world.ordered(Control) == [Control(number, 1, "cancel", force_ns, 1)]
    assert world.ordered(Deliver) == [Deliver(number, 1, 15, tree=False)]


def test_a_task_that_was_asked_to_save_and_does_not_end_is_killed_after_its_grace() -> None:
    world = World(ask_s=2.0)
    number = world.submit(grace_s=5.0)
    world.begins(number)
    world.saves(number, 1)
    world.ask(m.Cancel(ids(number)))
    world.pass_time(2)
    assert world.ordered(Deliver) == [Deliver(number, 1, 15, tree=False)]
    world.pass_time(4.9)
    assert world.ordered(Deliver) == []
    world.pass_time(0.1)
    assert world.ordered(Deliver) == [Deliver(number, 1, 9, tree=True)]
    world.pass_time(1_000)
    assert world.ordered(Deliver) == []


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"cwd": "work"}, "cwd 'work' is not an absolute path"),
        ({"cwd": "/a\0b"}, "is not an absolute path"),
        ({"cwd": ""}, "cwd is empty"),
        ({"argv": ("",)}, "first word is empty"),
        ({"argv": ("a", "b\0")}, "NUL byte"),
        ({"on_oom": "retry"}, "on_oom: 'retry' needs a factor"),
        ({"deadline_ns": SECOND}, "deadline has passed"),
    ],
)
def test_an_edit_is_refused_what_a_submit_is(changed: dict[str, object], complaint: str) -> None:
    world = World()
    number = world.submit(hold=True)
    before = world.task(number)
    with pytest.raises(BadRequest, match=complaint):
        world.ask(m.Edit(ids(number), **changed))  # type: ignore[arg-type]
    assert world.task(number) == before


def test_a_need_that_fails_by_a_clock_that_was_set_back_is_not_taken_for_one_judged_before() -> (
    None
):
    world = World(slots=8)
    first = world.submit()
    child = world.submit(after=(m.Dependency(first),))
    end_in_turn(world, (first, 0), (child, 1))
    world.at_ns -= 100 * SECOND
    world.ask(m.Retry(ids(first, child)))
    world.at_ns += SECOND
    world.begins(first)
    world.ends(first, code=1)
    assert world.phase(child) is Phase.BLOCKED
