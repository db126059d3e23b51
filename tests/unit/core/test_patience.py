"""When patience with a task ends, and when it does not: what counts, and what starts it anew."""

import errno

import pytest

from ckptd.core import outcome
from ckptd.core.explain import explain
from ckptd.core.port import Deliver, EndSeen, MarkSeen
from ckptd.core.records import Phase
from ckptd.core.retry import exit_class
from ckptd.protocol import messages as m
from tests.unit.core.world import SECOND, World


def reason(world: World, number: int) -> tuple[Phase, str]:
    task = world.task(number)
    return task.phase, task.reason


def explained(world: World, number: int) -> str:
    return explain(world.state, world.task(number), world.now, world.policy)


def test_two_crashes_with_progress_between_them_are_at_different_places_and_no_poison() -> None:
    world = World()
    number = world.submit(retries=50)
    for step in range(4):
        world.begins(number)
        world.saves(number, step + 1)
        world.ends(number, "signal", signal=11)
        world.pass_time(1_000)
    assert world.phase(number) is Phase.STARTING


@pytest.mark.parametrize("cause", ["lost", "reboot"])
def test_a_task_that_saves_between_two_deaths_of_its_host_is_no_poison(cause: str) -> None:
    world = World()
    number = world.submit()
    for step in range(4):
        world.begins(number)
        world.saves(number, step + 1)
        world.state.clean = False
        world.ends(number, cause)
    assert world.phase(number) is Phase.STARTING


def test_a_task_that_is_stopped_again_and_again_without_progress_is_set_apart_at_last() -> None:
    world = World(interruptions_max=5)
    number = world.submit()
    for _ in range(5):
        world.begins(number)
        world.ends(number, "shutdown")
        assert world.phase(number) is Phase.STARTING
    world.begins(number)
    world.ends(number, "shutdown")
    assert reason(world, number) == (Phase.QUARANTINED, "too many interruptions")


def test_a_wish_to_wait_for_less_than_a_second_is_counted_or_it_would_be_a_loop_for_ever() -> None:
    world = World(interruptions_max=5)
    number = world.submit()
    for _ in range(6):
        world.begins(number)
        world.saves(number, 1, retry_s=0.01)
        world.ends(number, code=75)
        world.pass_time(10)
    assert reason(world, number) == (Phase.QUARANTINED, "too many interruptions")


def test_no_task_waits_longer_than_the_longest_wait_that_is_allowed_whatever_it_asks_for() -> None:
    world = World(retry_after_max_s=3_600.0)
    number = world.submit()
    world.begins(number)
    world.saves(number, 1, retry_s=10**9)
    world.ends(number, code=75)
    assert reason(world, number) == (Phase.WAITING, "rate_limit")
    world.pass_time(3_600 * 1.1 + 1)
    assert world.phase(number) is Phase.STARTING


def test_a_task_that_only_says_again_and_saves_nothing_new_is_set_apart() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.saves(number, 1)
    world.ends(number, code=85)
    for _ in range(3):
        assert world.phase(number) is Phase.STARTING
        world.begins(number)
        world.saves(number, 1)
        world.ends(number, code=85)
    assert reason(world, number) == (Phase.QUARANTINED, "checkpointed without progress")


def test_a_failure_after_progress_waits_no_longer_than_the_first_one_did() -> None:
    world = World()
    number = world.submit(retries=50, backoff_s=2.0)
    for step in range(10):
        world.begins(number)
        world.saves(number, step + 1)
        world.ends(number, code=1)
        assert reason(world, number) == (Phase.WAITING, "backoff")
        world.pass_time(2.0)
        assert world.phase(number) is Phase.STARTING


def test_tasks_that_fail_together_do_not_all_come_back_together() -> None:
    world = World(slots=50)
    numbers = [world.submit(retries=5, backoff_s=100.0) for _ in range(50)]
    for number in numbers:
        world.begins(number)
    for number in numbers:
        world.ends(number, code=1)
    tenths = {(world.task(number).until_ns - world.at_ns) // (10 * SECOND) for number in numbers}
    assert len(tenths) >= 5, "spread over the delay, not one storm"


def test_the_time_without_a_daemon_is_part_of_a_delay() -> None:
    world = World()
    number = world.submit(retries=5, backoff_s=60.0)
    world.begins(number)
    ended_ns = world.at_ns
    world.at_ns += 3_600 * SECOND
    seen = EndSeen(number, 1, "exit", 1, started_ns=ended_ns, ended_ns=ended_ns)
    world.put(outcome.ended(world.state, seen, None, world.now, world.policy))
    world.turn()
    assert world.phase(number) is Phase.STARTING


def test_a_task_that_is_done_while_it_is_only_asked_to_save_is_done() -> None:
    world = World()
    number = world.submit(timeout_s=60.0)
    world.begins(number)
    world.saves(number, 1)
    world.pass_time(60.0)
    assert world.phase(number) is Phase.STOPPING
    world.pass_time(world.policy.ask_s / 2)
    assert world.ordered(Deliver) == [], "no signal was sent yet"
    world.ends(number)
    assert world.phase(number) is Phase.SUCCEEDED


@pytest.mark.parametrize(
    "number", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT]
)
def test_a_start_that_the_machine_refuses_for_now_is_no_failure_of_the_task(number: int) -> None:
    world = World()
    task = world.submit(retries=0)
    world.begins(task)
    world.ends(task, "spawn_error", code=number)
    assert reason(world, task) == (Phase.WAITING, "transient")


@pytest.mark.parametrize("code", [1, 2, 101, 127])
def test_a_task_whose_output_found_no_room_on_its_disk_waits_and_has_not_failed(code: int) -> None:
    world = World()
    task = world.submit(retries=0)
    for _ in range(3):  # at once each time, as a mistyped line would end with 2
        world.begins(task)
        world.ends(task, code=code, blame="disk")
        assert reason(world, task) == (Phase.WAITING, "transient")
        assert "the disk of its output was full" in explained(world, task)
        world.pass_time(1_000)
    run = world.task(task).run
    assert run is not None
    assert (run.failures, run.interruptions) == (0, 3)
    assert run.past[-1].blame == "disk"


def test_what_the_author_says_of_a_code_holds_on_a_full_disk_too() -> None:
    world = World()
    task = world.submit(retries=3, on_exit={"1": "retry", "2": "transient", "3": "fail"})
    for _ in range(3):
        world.begins(task)
        world.ends(task, code=2, blame="disk")
        assert reason(world, task) == (Phase.WAITING, "transient"), "no line was mistyped"
        world.pass_time(1_000)
    world.begins(task)
    world.ends(task, code=1, blame="disk")
    assert reason(world, task) == (Phase.WAITING, "backoff")
    world.pass_time(1_000)
    world.begins(task)
    world.ends(task, code=3, blame="disk")
    assert reason(world, task) == (Phase.FAILED, "permanent")


def test_what_ended_well_or_in_order_means_the_same_on_a_full_disk() -> None:
    assert exit_class(0, {}, is_full=True) == "ok"
    assert exit_class(85, {}, is_full=True) == "again"


def test_a_task_that_lost_what_it_had_saved_has_made_no_progress_by_that() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.saves(number, 1)
    world.ends(number, code=1)
    world.pass_time(1_000)
    world.begins(number)
    world.mark = MarkSeen(number, 2, 0, 0, "")
    world.put(outcome.marked(world.state, world.mark, world.now))
    world.ends(number, code=1)
    assert world.phase(number) is Phase.FAILED


def test_a_task_that_is_cancelled_while_it_starts_stays_one_that_is_being_stopped() -> None:
    world = World()
    number = world.submit()
    world.ask(m.Cancel(m.Selector(ids=(number,))))
    world.begins(number)
    assert reason(world, number) == (Phase.STOPPING, "cancel")
    world.ends(number, "signal", signal=15)
    assert world.phase(number) is Phase.CANCELLED
