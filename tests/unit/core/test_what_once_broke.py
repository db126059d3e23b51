"""One test per defect that was found in the core, named after the damage."""

import pytest

from ckptd.core import image, outcome
from ckptd.core.explain import ending
from ckptd.core.plan import Observed, adoption, effects, intents
from ckptd.core.port import Control, Deliver, EndSeen, Freeze, MarkSeen
from ckptd.core.records import DaemonStarted, Phase, StartIntent
from ckptd.protocol import codec
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadRequest
from tests.unit.core.world import ROOT, SECOND, World


def ids(*numbers: int) -> m.Selector:
    return m.Selector(ids=numbers)


def finished(world: World, **spec: object) -> int:
    number = world.submit(**spec)
    world.begins(number)
    world.ends(number)
    return number


def test_an_edited_ended_task_is_removed_only_once() -> None:
    world = World()
    number = finished(world)
    for priority in range(3):
        world.ask(m.Edit(ids(number), priority=priority))
    world.pass_time(40 * 86_400)
    assert world.state.tasks.get(number) is None


def test_retention_counts_tasks_and_not_stale_entries() -> None:
    world = World(finished_max=3)
    numbers = [finished(world) for _ in range(3)]
    for number in numbers[:2]:
        world.ask(m.Retry(ids(number)))
        world.begins(number)
        world.ends(number)
    assert all(world.state.tasks.get(number) for number in numbers)


def test_what_a_dependent_kept_goes_once_nobody_waits_for_it() -> None:
    world = World(finished_max=0)
    world.ask(m.GroupSet("default", paused=True), ROOT)
    held = world.submit()
    world.ask(m.GroupSet("default", paused=False), ROOT)
    child = world.submit(after=(m.Dependency(held), m.Dependency(world.submit(hold=True))))
    world.begins(held)
    world.ends(held)
    assert world.state.tasks.get(held)
    world.ask(m.Cancel(ids(child)))
    world.turn()
    assert world.state.tasks.get(held) is None


@pytest.mark.parametrize("why", ["exit", "cancel", "kill"])
def test_a_file_that_cannot_be_read_never_beats_the_truth_about_the_end(why: str) -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    if why != "exit":
        world.ask(m.Cancel(ids(number)) if why == "cancel" else m.Kill(ids(number)))
    world.saves(number, 1, problem="cannot be read")
    world.ends(number)
    assert world.phase(number) is (Phase.SUCCEEDED if why == "exit" else Phase.CANCELLED)


def test_a_crash_between_an_end_and_its_dependents_is_mended_by_the_next_plan() -> None:
    world = World()
    parent = world.submit()
    child = world.submit(after=(m.Dependency(parent),))
    world.begins(parent)
    before = len(world.log)
    world.starts = 0
    world.ends(parent)
    cut = [record for record in world.log[before:] if type(record).__name__ == "Ended"]
    again = World()
    again.put([*world.log[:before], *cut])
    restored = image.load(image.chunks(again.state))
    restored.index()
    again.state = restored
    again.turn()
    assert again.phase(child) is Phase.STARTING


def test_a_thaw_that_died_with_the_daemon_is_ordered_again() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    observed = Observed()
    adoption(world.state, observed, world.now)
    orders = effects(world.state, observed, [number], [])
    assert [order.frozen for order in orders if isinstance(order, Freeze)] == [False]


def test_a_restart_gives_an_adopted_attempt_time_to_say_that_it_needs_more() -> None:
    world = World()
    number = world.submit(timeout_s=10.0)
    world.begins(number)
    world.at_ns += 11 * SECOND
    world.observed = Observed()
    adoption(world.state, world.observed, world.now)
    world.turn()
    assert world.phase(number) is Phase.RUNNING
    world.pass_time(31)
    assert world.phase(number) is Phase.STOPPING


def test_a_wish_for_a_checkpoint_does_not_erase_a_stop() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.ask(m.Cancel(ids(number)))
    world.ordered(Control)
    world.ask(m.CheckpointNow(ids(number)))
    (control,) = world.ordered(Control)
    assert isinstance(control, Control)
    assert control.stop == "cancel"


def test_a_released_task_has_all_its_patience_again() -> None:
    world = World(attempts_max=2)
    number = world.submit(retries=50, backoff_s=0.0)
    for step in range(2):
        world.begins(number)
        world.saves(number, step + 1)
        world.ends(number, code=1)
        world.pass_time(1)
    assert world.phase(number) is Phase.QUARANTINED
    world.ask(m.Release(ids(number)))
    world.begins(number)
    world.saves(number, 9)
    world.ends(number, code=1)
    assert world.phase(number) is not Phase.QUARANTINED


def test_many_parents_and_many_children_cost_one_record_each() -> None:
    world = World()
    world.starts = 0
    parents = [world.submit(hold=True) for _ in range(20)]
    needs = tuple(m.Dependency(number) for number in parents)
    for _ in range(20):
        world.submit(after=needs)
    before = len(world.log)
    world.ask(m.Cancel(ids(*parents)))
    assert len(world.log) - before == 40


def test_heaps_do_not_grow_with_what_happens_to_one_task() -> None:
    world = World()
    number = world.submit(timeout_s=1_000_000.0)
    world.begins(number)
    waiting = world.submit(in_s=1_000_000.0)
    for step in range(3_000):
        world.saves(number, step + 1)
        world.ask(m.Hold(ids(waiting)))
        world.ask(m.Release(ids(waiting)))
    assert len(world.state.timers) < 3_000


def test_one_pass_starts_no_more_than_it_may() -> None:
    world = World(slots=100)
    world.starts = 0
    for _ in range(10):
        world.submit()
    records = intents(world.state, world.observed, [], world.now, world.policy, starts=3)
    assert sum(isinstance(record, StartIntent) for record in records) == 3


@pytest.mark.parametrize("field", ["at_ns", "deadline_ns"])
def test_a_time_beyond_64_bits_is_refused_at_the_door(field: str) -> None:
    frame = b'{"v":1,"id":"a","verb":"submit","args":{"tasks":[{"argv":["x"],"%s":%d}]}}'
    with pytest.raises(BadRequest):
        codec.decode_args(codec.decode_request(frame % (field.encode(), 1 << 64)))


@pytest.mark.parametrize("argv", [("",), ("{resume:x}",), ("a\0b",)])
def test_a_command_that_can_never_run_is_refused_by_submit_and_edit(argv: tuple[str, ...]) -> None:
    world = World()
    with pytest.raises(BadRequest):
        world.submit(*argv)
    number = world.submit(hold=True)
    with pytest.raises(BadRequest):
        world.ask(m.Edit(ids(number), argv=argv))


def test_an_edit_of_many_tasks_is_bounded_as_a_whole() -> None:
    world = World()
    numbers = [world.submit(hold=True) for _ in range(90)]
    with pytest.raises(BadRequest, match="too many"):
        world.ask(m.Edit(ids(*numbers), argv=("x" * 100_000,)))


def test_a_snapshot_of_large_specs_environments_and_answers_has_small_chunks() -> None:
    world = World()
    for number in range(300):
        world.ask(m.Submit((m.TaskSpec(("x" * 9_000,), hold=True),), {"V": f"{number}" * 2_000}))
        world.state.remember(f"r{number}", b"y" * 9_000)
    sizes = [len(chunk) for chunk in image.chunks(world.state)]
    assert max(sizes) < image.CHUNK_BYTES_GOAL * 2


def test_a_signal_is_not_ordered_again_by_a_new_daemon() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.ask(m.Signal(ids(number), 10))
    assert len(world.ordered(Deliver)) == 1
    observed = Observed()
    adoption(world.state, observed, world.now)
    assert not [o for o in effects(world.state, observed, [number], []) if isinstance(o, Deliver)]


def test_a_claim_that_went_with_the_power_is_a_reboot_and_not_a_start_that_never_was() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.ends(number, "not_started")
    run = world.task(number).run
    assert run is not None
    assert (run.past[-1].cause, run.interruptions) == ("reboot", 1)


def test_work_that_steps_and_items_recorded_is_not_told_as_lost() -> None:
    world = World()
    number = world.submit(retries=2, backoff_s=1.0)
    world.begins(number)
    world.pass_time(10)
    world.mark = MarkSeen(number, world.attempt(number), 0, 0, "c", gained_ns=world.at_ns)
    world.pass_time(2)
    world.ends(number, "signal", signal=9)
    run = world.task(number).run
    assert run is not None
    assert run.past[-1].lost_s == 2


@pytest.mark.parametrize(("cause", "most"), [("lost", "at most "), ("exit", "")])
def test_how_long_an_attempt_took_whose_end_nobody_saw_is_explained_as_the_most(
    cause: str, most: str
) -> None:
    world = World()
    number = world.submit(retries=2)
    world.begins(number)
    world.pass_time(15)
    world.ends(number, cause, code=1)
    run = world.task(number).run
    assert run is not None
    assert f"after {most}15.0s, {most}15.0s of work lost" in ending(run.past[-1])


def test_a_late_word_about_an_earlier_attempt_ends_no_later_one() -> None:
    world = World()
    number = world.submit(retries=2)
    world.begins(number)
    world.ends(number, code=1)
    world.pass_time(3_600)
    world.begins(number)
    late = EndSeen(number, 1, "exit", code=0, ended_ns=world.at_ns)
    assert outcome.ended(world.state, late, None, world.now, world.policy) == []
    assert world.phase(number) is Phase.RUNNING


def test_a_start_of_the_daemon_renews_no_patience() -> None:
    world = World()
    number = world.submit(retries=2)
    world.begins(number)
    world.ends(number, code=1)
    before = world.task(number)
    world.put([DaemonStarted(world.at_ns, 2, "boot", "0", 1, clean=False)])
    assert world.task(number) == before


def test_a_second_kill_by_hand_is_delivered_where_the_first_was_lost() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.ask(m.Kill(ids(number)))
    first = world.ordered(Deliver)
    world.turn()
    assert not world.ordered(Deliver)

    world.ask(m.Kill(ids(number)))

    assert world.ordered(Deliver) == first == [Deliver(number, 1, 9, tree=True)]


def test_an_edit_to_a_deadline_that_has_passed_is_refused_and_fails_no_task() -> None:
    world = World()
    number = world.submit(hold=True, deadline_ns=world.at_ns + SECOND)
    for passed_ns in (1, world.at_ns):
        with pytest.raises(BadRequest, match="passed already"):
            world.ask(m.Edit(ids(number), deadline_ns=passed_ns))
    assert world.task(number).deadline_ns == world.at_ns + SECOND

    world.ask(m.Edit(ids(number), deadline_ns=0))

    assert (world.phase(number), world.task(number).deadline_ns) == (Phase.HELD, 0)


def test_a_start_long_past_is_refused_and_one_that_was_a_day_under_way_begins_at_once() -> None:
    world = World()
    world.pass_time(100_000)
    with pytest.raises(BadRequest, match="86401 s in the past"):
        world.submit(at_ns=world.at_ns - 86_401 * SECOND)
    with pytest.raises(BadRequest, match="in the past"):
        world.submit(at_ns=1, hold=True)
    assert not world.log

    assert world.phase(world.submit(at_ns=world.at_ns - 86_400 * SECOND)) is Phase.STARTING


def test_a_submit_by_key_that_was_taken_is_still_answered_when_its_start_is_long_past() -> None:
    world = World()
    when = world.at_ns + SECOND
    number = world.submit(key="nightly", at_ns=when)
    world.pass_time(100_000)
    assert world.submit(key="nightly", at_ns=when) == number


def test_a_task_that_may_not_be_cleaned_names_some_of_those_that_wait_for_it() -> None:
    world = World(slots=1)
    world.begins(world.submit())  # holds the only slot
    parent = world.submit()
    first, second = (world.submit(after=(m.Dependency(parent),)) for _ in range(2))
    world.ask(m.Cancel(ids(parent)))
    assert refusal(world, parent).endswith(f"still wait for how it ended: {first}, {second}")

    more = [world.submit(after=(m.Dependency(parent),)) for _ in range(5)]

    named = ", ".join(map(str, (first, second, *more[:3])))
    assert refusal(world, parent).endswith(f"{named} and 2 more")


def refusal(world: World, number: int) -> str:
    answer = world.ask(m.Clean(ids(number)))
    assert isinstance(answer, m.Changed)
    (row,) = answer.tasks
    assert row.error is not None
    return row.error.message


def test_a_clean_names_no_waiting_task_that_its_caller_may_not_see() -> None:
    world = World()
    mine = finished(world)
    world.submit(caller=ROOT, after=(m.Dependency(mine), m.Dependency(world.submit(hold=True))))
    assert refusal(world, mine).endswith(": 1 of others")
