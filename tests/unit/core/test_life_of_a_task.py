import pytest

from ckptd.core.policy import Caller
from ckptd.core.port import Control, Deliver, Forget, Freeze, Start
from ckptd.core.records import Phase
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadRequest, Conflict, Denied, NotFound
from tests.unit.core.world import ME, ROOT, World


def ids(*numbers: int) -> m.Selector:
    return m.Selector(ids=numbers)


def change(answer: m.Answer) -> m.TaskChange:
    assert isinstance(answer, m.Changed)
    return answer.tasks[0]


def test_a_submitted_task_is_started_in_the_same_turn() -> None:
    world = World()
    number = world.submit("sleep", "1")
    assert world.phase(number) is Phase.STARTING
    (start,) = world.ordered(Start)
    assert isinstance(start, Start)
    assert (start.task, start.attempt, start.argv) == (number, 1, ("sleep", "1"))


def test_a_start_is_ordered_once_however_often_the_turn_comes_round() -> None:
    world = World()
    number = world.submit()
    world.state.touched.add(number)
    world.turn()
    assert len(world.ordered(Start)) == 1


def test_exit_zero_succeeds_and_lets_the_next_one_start() -> None:
    world = World(slots=1)
    first, second = world.submit(), world.submit()
    assert world.phase(second) is Phase.QUEUED
    world.begins(first)
    world.ends(first)
    assert world.phase(first) is Phase.SUCCEEDED
    assert world.phase(second) is Phase.STARTING
    assert [order.task for order in world.ordered(Forget)] == [first]  # type: ignore[union-attr]


def test_high_priority_goes_first_and_equals_go_by_age() -> None:
    world = World(slots=1)
    running = world.submit()
    low, old, new = world.submit(), world.submit(priority=5), world.submit(priority=5)
    for expected in (old, new, low):
        world.begins(running)
        world.ends(running)
        assert world.phase(expected) is Phase.STARTING
        running = expected


def test_a_plain_failure_ends_a_task_that_made_no_progress() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.ends(number, code=1)
    assert world.phase(number) is Phase.FAILED


def test_a_failure_after_progress_goes_on_from_the_checkpoint_by_itself() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.saves(number, 1)
    world.ends(number, "signal", signal=9)
    assert world.phase(number) is Phase.WAITING
    world.pass_time(2)
    assert world.phase(number) is Phase.STARTING
    world.begins(number)
    world.ends(number, code=1)
    assert world.phase(number) is Phase.FAILED


def test_retries_are_counted_and_wait_longer_each_time() -> None:
    world = World(stalls_max=10)
    number = world.submit(retries=2, backoff_s=1.0)
    waits = []
    for _ in range(2):
        world.begins(number)
        world.ends(number, code=1)
        assert world.phase(number) is Phase.WAITING
        waits.append(world.task(number).until_ns - world.at_ns)
        world.pass_time(10)
    assert 0 < waits[0] <= 1e9
    assert 0 < waits[1] <= 2e9
    world.begins(number)
    world.ends(number, code=1)
    assert world.phase(number) is Phase.FAILED


def test_three_failures_without_progress_are_poison() -> None:
    world = World()
    number = world.submit(retries=50)
    for _ in range(3):
        world.begins(number)
        world.ends(number, code=1)
        world.pass_time(100)
    assert world.phase(number) is Phase.QUARANTINED


def test_progress_between_failures_is_never_poison() -> None:
    world = World()
    number = world.submit(retries=50)
    for step in range(6):
        world.begins(number)
        world.saves(number, step + 1)
        world.ends(number, code=1)
        world.pass_time(1_000)
    assert world.phase(number) is Phase.STARTING


def test_two_crashes_at_the_same_cursor_are_poison() -> None:
    world = World()
    number = world.submit(retries=50)
    for _ in range(2):
        world.begins(number)
        world.ends(number, "signal", signal=11)
        world.pass_time(100)
    assert world.phase(number) is Phase.QUARANTINED


def test_two_host_deaths_without_progress_are_poison() -> None:
    world = World()
    number = world.submit()
    for _ in range(2):
        world.begins(number)
        world.state.clean = False
        world.ends(number, "reboot")
    assert world.phase(number) is Phase.QUARANTINED


def test_a_reboot_after_an_orderly_shutdown_is_no_host_death() -> None:
    world = World()
    number = world.submit()
    for _ in range(5):
        world.begins(number)
        world.state.clean = True
        world.ends(number, "reboot")
    assert world.phase(number) is Phase.STARTING


@pytest.mark.parametrize(
    ("code", "phase"), [(75, Phase.WAITING), (85, Phase.STARTING), (65, Phase.FAILED)]
)
def test_exit_codes_mean_what_the_contract_says(code: int, phase: Phase) -> None:
    world = World()
    number = world.submit(retries=5)
    world.begins(number)
    world.ends(number, code=code)
    assert world.phase(number) is phase


def test_transient_ends_count_no_failure() -> None:
    world = World()
    number = world.submit()
    for _ in range(5):
        world.begins(number)
        world.ends(number, code=75)
        world.pass_time(1_000)
    run = world.task(number).run
    assert run is not None
    assert (run.failures, run.interruptions) == (0, 5)


def test_progress_gives_patience_with_interruptions_anew() -> None:
    world = World(interruptions_max=2)
    number = world.submit()
    for step in range(10):
        world.begins(number)
        world.saves(number, step + 1)
        world.ends(number, code=75)
        world.pass_time(1_000)
    assert world.phase(number) is Phase.STARTING
    for _ in range(2):
        world.begins(number)
        world.ends(number, code=75)
        world.pass_time(1_000)
    assert world.phase(number) is Phase.QUARANTINED


def test_waits_that_the_task_asks_for_never_run_out() -> None:
    world = World(interruptions_max=2, attempts_max=5)
    number = world.submit()
    for _ in range(10):
        world.begins(number)
        world.saves(number, 1, retry_s=60)
        world.ends(number, code=75)
        assert (world.phase(number), world.task(number).reason) == (Phase.WAITING, "rate_limit")
        world.pass_time(1_000)


def test_exit_2_at_once_and_again_is_a_mistyped_line_though_2_means_try_again() -> None:
    world = World()
    number = world.submit(on_exit={"2": "transient"})
    for _ in range(2):
        world.begins(number)
        world.ends(number, code=2)
        assert world.phase(number) is Phase.WAITING
        world.pass_time(1_000)
    world.begins(number)
    world.ends(number, code=2)
    assert (world.phase(number), world.task(number).reason) == (Phase.FAILED, "usage error")
    world.ask(m.Retry(ids(number)))
    world.begins(number)
    world.ends(number, code=2)
    assert world.phase(number) is Phase.WAITING  # a person said "again": patience is new


def test_exit_2_after_some_work_or_with_a_wish_to_wait_is_tried_for_ever() -> None:
    world = World()
    number = world.submit(on_exit={"2": "transient"})
    for turn in range(8):
        world.begins(number)
        if turn % 2:
            world.at_ns += 3 * 10**9
        else:
            world.saves(number, 1, retry_s=60)
        world.ends(number, code=2)
        assert world.phase(number) is Phase.WAITING
        world.pass_time(1_000)


def test_on_exit_overrides_the_meaning_of_a_code() -> None:
    world = World()
    number = world.submit(on_exit={"3": "ok"})
    world.begins(number)
    world.ends(number, code=3)
    assert world.phase(number) is Phase.SUCCEEDED


def test_a_rate_limit_waits_as_long_as_it_was_told() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.saves(number, 1, retry_s=120)
    world.ends(number, code=75)
    assert world.task(number).reason == "rate_limit"
    world.pass_time(119)
    assert world.phase(number) is Phase.WAITING
    world.pass_time(20)
    assert world.phase(number) is Phase.STARTING


def test_a_checkpoint_that_cannot_be_used_blocks_and_never_starts_afresh() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.saves(number, 1, problem="state version 9 is newer than this ckptd")
    world.ends(number, code=1)
    assert world.phase(number) is Phase.BLOCKED


def test_a_blocked_task_says_why_and_a_release_lets_it_go_on() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.saves(number, 1, problem="no way from version 1 to 2", why="version")
    world.ends(number, code=1)
    assert (world.phase(number), world.task(number).reason) == (Phase.BLOCKED, "version")

    world.ask(m.Release(ids(number)))
    world.begins(number)
    world.ends(number, code=0)
    assert world.phase(number) is Phase.SUCCEEDED


def test_a_missing_program_is_no_matter_of_retrying() -> None:
    world = World()
    number = world.submit(retries=9)
    world.ends(number, "spawn_error", code=2)
    assert world.phase(number) is Phase.FAILED


# --- stopping -------------------------------------------------------------------------------


def test_cancel_climbs_from_signal_to_kill() -> None:
    world = World()
    number = world.submit(grace_s=5.0)
    world.begins(number)
    world.ask(m.Cancel(ids(number)))
    assert world.phase(number) is Phase.STOPPING
    (term,) = world.ordered(Deliver)
    assert isinstance(term, Deliver)
    assert (term.signal, term.tree) == (15, False)
    world.pass_time(4.9)
    assert not world.ordered(Deliver)
    world.pass_time(0.2)
    (kill,) = world.ordered(Deliver)
    assert isinstance(kill, Deliver)
    assert (kill.signal, kill.tree) == (9, True)
    world.ends(number, "signal", signal=9)
    assert world.phase(number) is Phase.CANCELLED


def test_a_task_that_saves_is_asked_to_save_before_the_signal() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.saves(number, 1)
    world.ask(m.Cancel(ids(number)))
    assert not world.ordered(Deliver)
    (control,) = world.ordered(Control)
    assert isinstance(control, Control)
    assert control.stop == "cancel"
    world.pass_time(2.1)
    assert len(world.ordered(Deliver)) == 1


def test_cancelling_twice_is_cancelling_once() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.ask(m.Cancel(ids(number)))
    before = len(world.log)
    world.ask(m.Cancel(ids(number)))
    assert len(world.log) == before
    world.ends(number, "signal", signal=15)
    assert change(world.ask(m.Cancel(ids(number)))).error is None


def test_a_waiting_task_is_cancelled_at_once() -> None:
    world = World()
    number = world.submit(hold=True)
    assert change(world.ask(m.Cancel(ids(number)))).phase == "cancelled"


def test_a_timeout_is_a_failure_of_its_own_kind() -> None:
    world = World()
    number = world.submit(timeout_s=30.0)
    world.begins(number)
    world.pass_time(31)
    assert world.phase(number) is Phase.STOPPING
    world.ends(number, "signal", signal=15)
    run = world.task(number).run
    assert run is not None
    assert run.past[-1].cause == "timeout"
    assert world.phase(number) is Phase.FAILED


def test_a_task_past_its_deadline_never_starts() -> None:
    world = World()
    number = world.submit(hold=True, deadline_ns=world.at_ns + 10)
    world.pass_time(1)
    assert world.phase(number) is Phase.FAILED


def test_pause_and_resume_freeze_and_thaw() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.ask(m.Pause(ids(number)))
    assert world.phase(number) is Phase.PAUSED
    world.ask(m.Resume(ids(number)))
    assert world.phase(number) is Phase.RUNNING
    assert [order.frozen for order in world.ordered(Freeze)] == [True, False]  # type: ignore[union-attr]


def test_who_resumes_everything_starts_nothing_that_somebody_holds() -> None:
    world = World()
    running, held = world.submit(), world.submit(hold=True)
    world.begins(running)
    world.ask(m.Pause(m.Selector(all=True)))
    world.ask(m.Resume(m.Selector(all=True)))
    assert (world.phase(running), world.phase(held)) == (Phase.RUNNING, Phase.HELD)
    answer = world.ask(m.Resume(ids(held)))
    assert isinstance(answer, m.Changed)
    assert answer.tasks[0].error is not None
    assert answer.tasks[0].error.hint == f"try: ckptctl release {held}"


def test_a_frozen_task_is_thawed_to_be_stopped() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.ask(m.Pause(ids(number)))
    world.ordered(Freeze)
    world.ask(m.Cancel(ids(number)))
    assert [order.frozen for order in world.ordered(Freeze)] == [False]  # type: ignore[union-attr]


# --- waiting --------------------------------------------------------------------------------


def test_a_dependent_starts_after_its_parent_succeeded() -> None:
    world = World()
    parent = world.submit()
    child = world.submit(after=(m.Dependency(parent),))
    assert world.phase(child) is Phase.WAITING
    world.begins(parent)
    world.ends(parent)
    assert world.phase(child) is Phase.STARTING


def test_a_dependent_of_a_failure_is_blocked_until_the_parent_runs_again() -> None:
    world = World()
    parent = world.submit()
    child = world.submit(after=(m.Dependency(parent),))
    world.begins(parent)
    world.ends(parent, code=1)
    assert world.phase(child) is Phase.BLOCKED
    world.ask(m.Retry(ids(parent)))
    assert world.phase(child) is Phase.WAITING
    world.begins(parent)
    world.ends(parent)
    assert world.phase(child) is Phase.STARTING


def test_after_fail_and_after_any_do_what_they_say() -> None:
    world = World(slots=8)
    parent = world.submit()
    cleanup = world.submit(after=(m.Dependency(parent, when="fail"),))
    always = world.submit(after=(m.Dependency(parent, when="any"),))
    world.begins(parent)
    world.ends(parent, code=1)
    assert world.phase(cleanup) is Phase.STARTING
    assert world.phase(always) is Phase.STARTING


def test_tasks_of_one_submit_can_follow_each_other_by_key() -> None:
    world = World()
    answer = world.ask(
        m.Submit(
            (
                m.TaskSpec(("a",), key="a"),
                m.TaskSpec(("b",), after=(m.Dependency(key="a"),)),
            )
        )
    )
    assert isinstance(answer, m.Submitted)
    assert [world.phase(number).word for number in answer.ids] == ["starting", "waiting"]


def test_a_delayed_task_starts_when_it_is_due() -> None:
    world = World()
    number = world.submit(in_s=60.0)
    world.pass_time(59)
    assert world.phase(number) is Phase.WAITING
    world.pass_time(2)
    assert world.phase(number) is Phase.STARTING


def test_held_tasks_start_only_once_released() -> None:
    world = World()
    number = world.submit(hold=True)
    world.pass_time(1_000)
    assert world.phase(number) is Phase.HELD
    world.ask(m.Release(ids(number)))
    assert world.phase(number) is Phase.STARTING


# --- groups, keys, rights -------------------------------------------------------------------


def test_parallelism_of_a_group_changes_live() -> None:
    world = World(slots=1)
    numbers = [world.submit() for _ in range(4)]
    assert sum(world.phase(n) is Phase.STARTING for n in numbers) == 1
    world.ask(m.GroupSet("default", parallel=3), ROOT)
    assert sum(world.phase(n) is Phase.STARTING for n in numbers) == 3


def test_a_paused_group_starts_nothing() -> None:
    world = World()
    world.ask(m.GroupSet("default", paused=True), ROOT)
    number = world.submit()
    assert world.phase(number) is Phase.QUEUED


def test_an_unknown_group_is_refused_with_the_way_out() -> None:
    with pytest.raises(NotFound) as refused:
        World().submit(group="gpu")
    assert "group add gpu" in refused.value.hint


def test_the_same_key_and_spec_is_the_same_task() -> None:
    world = World()
    first = world.submit("work", key="nightly")
    answer = world.ask(m.Submit((m.TaskSpec(("work",), key="nightly"),)))
    assert answer == m.Submitted((first,), (False,))


def test_the_same_key_with_another_spec_is_a_conflict_that_names_the_task() -> None:
    world = World()
    world.submit("work", key="nightly")
    with pytest.raises(Conflict, match="names task 1"):
        world.submit("other", key="nightly")


def test_other_users_tasks_are_neither_seen_nor_touched() -> None:
    world = World()
    number = world.submit(caller=ME)
    stranger = Caller(1001, 1001, admin=False)
    with pytest.raises(Denied):
        world.ask(m.Cancel(ids(number)), stranger)
    assert world.ask(m.Cancel(m.Selector(all=True)), stranger) == m.Changed(())


def test_an_empty_selector_is_refused() -> None:
    with pytest.raises(BadRequest, match="no task selected"):
        World().ask(m.Cancel(m.Selector()))


def test_one_bad_task_does_not_stop_the_change_of_the_others() -> None:
    world = World()
    done, running = world.submit(), world.submit()
    world.begins(done)
    world.ends(done)
    answer = world.ask(m.Cancel(ids(done, running)))
    assert isinstance(answer, m.Changed)
    assert [row.error is None for row in answer.tasks] == [False, True]


def test_cleaning_forgets_ended_tasks_but_never_reuses_an_id() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.ends(number)
    world.ask(m.Clean(m.Selector(all=True)))
    assert world.state.tasks.get(number) is None
    assert world.submit() == number + 1


def test_quarantined_tasks_are_never_cleaned() -> None:
    world = World(stalls_max=1)
    number = world.submit(retries=5)
    world.begins(number)
    world.ends(number, code=1)
    assert world.phase(number) is Phase.QUARANTINED
    world.ask(m.Clean(m.Selector(all=True)))
    assert world.state.tasks.get(number) is not None
    assert change(world.ask(m.Release(ids(number)))).phase == "queued"


def test_old_tasks_go_when_there_are_too_many() -> None:
    world = World(finished_max=2, slots=1)
    numbers = []
    for _ in range(4):
        numbers.append(world.submit())
        world.begins(numbers[-1])
        world.pass_time(1)
        world.ends(numbers[-1])
    assert [world.state.tasks.get(n) is None for n in numbers] == [True, True, False, False]
