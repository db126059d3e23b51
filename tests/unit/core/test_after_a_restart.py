"""What a daemon knows and does after it came up from a snapshot, and no test would have missed."""

import pytest

from ckptd.core import image, outcome
from ckptd.core.plan import Observed, adoption, wake_ns
from ckptd.core.port import Deliver, EndSeen, Identity, MarkSeen, Start, StartSeen
from ckptd.core.records import Ended, Phase
from ckptd.core.state import State
from ckptd.protocol import messages as m
from tests.unit.core.world import ROOT, SECOND, World

ONE = m.Selector(ids=(1,))


def restarted(world: World) -> None:
    """Let the next daemon take over, from a snapshot alone."""
    state: State = image.load(list(image.chunks(world.state)))
    state.index()
    world.state, world.observed = state, Observed()
    adoption(state, world.observed, world.now)
    world.orders = []
    world.turn()


def test_a_task_from_a_snapshot_starts_in_the_environment_it_was_submitted_with() -> None:
    world = World()
    task = m.TaskSpec(("true",), hold=True)
    world.ask(m.Submit((task,), {"TOKEN": "7"}))
    restarted(world)
    world.ask(m.Release(ONE))
    (start,) = world.ordered(Start)
    assert isinstance(start, Start)
    assert start.env == {"TOKEN": "7"}


def test_a_group_that_a_person_has_paused_is_paused_after_a_restart_from_a_snapshot() -> None:
    world = World()
    world.ask(m.GroupSet("default", 1, paused=True), ROOT)
    world.submit()
    restarted(world)
    assert world.phase(1) is Phase.QUEUED
    world.ask(m.GroupSet("default", paused=False), ROOT)
    world.submit()
    assert (world.phase(1), world.phase(2)) == (Phase.STARTING, Phase.QUEUED)


def test_a_kill_that_was_durable_when_the_daemon_died_is_delivered_by_the_next_one() -> None:
    world = World()
    world.begins(world.submit())
    world.ask(m.Kill(ONE))
    restarted(world)
    assert world.ordered(Deliver) == [Deliver(1, 1, 9, tree=True)]


def test_what_a_retry_from_scratch_gives_up_is_known_no_more_before_it_starts() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.saves(number, 3)
    world.ends(number, code=1)
    world.ask(m.GroupSet("default", paused=True), ROOT)
    world.ask(m.Retry(ONE, fresh=True))
    run = world.task(number).run
    assert run is not None
    assert (run.cursor, run.checkpoint, run.checkpoint_ns) == ("", 0, 0)


def test_a_retry_from_scratch_that_comes_as_far_as_before_has_made_progress() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.saves(number, 1)
    world.ends(number, code=65)
    world.ask(m.Retry(ONE, fresh=True))
    world.begins(number)
    world.saves(number, 1)
    world.ends(number, code=1)
    assert world.phase(number) is Phase.WAITING, "a failure after progress is not final"


def test_what_a_start_from_scratch_saved_while_no_daemon_saw_it_is_not_put_away() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.saves(number, 1)
    world.ends(number, code=65)
    world.ask(m.Retry(ONE, fresh=True))
    restarted(world)  # attempt 2 was ordered, and nobody heard that it began
    mark = MarkSeen(number, 2, 41, world.at_ns, "c41")
    end = EndSeen(number, 2, "exit", 85, started_ns=world.at_ns - SECOND, ended_ns=world.at_ns)
    world.put(outcome.marked(world.state, mark, world.now))
    world.put(outcome.ended(world.state, end, mark, world.now, world.policy))
    world.turn()
    (start,) = world.ordered(Start)
    assert isinstance(start, Start)
    assert (start.attempt, start.fresh) == (3, False)


def test_a_start_from_scratch_that_never_began_is_still_one_the_next_time() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.saves(number, 1)
    world.ends(number, code=65)
    world.ask(m.Retry(ONE, fresh=True))
    restarted(world)
    world.ends(number, "not_started")
    (start,) = world.ordered(Start)
    assert isinstance(start, Start)
    assert (start.attempt, start.fresh) == (3, True)


def test_the_next_daemon_wakes_up_for_the_deadline_of_a_task_that_runs() -> None:
    world = World()
    number = world.submit(deadline_ns=world.at_ns + 60 * SECOND)
    world.begins(number)
    restarted(world)
    assert wake_ns(world.state) == world.at_ns + 60 * SECOND
    world.pass_time(61)
    assert (world.phase(number), world.task(number).reason) == (Phase.STOPPING, "deadline")


@pytest.mark.parametrize("missing", [0, 1, -1], ids=["head", "tasks", "tail"])
def test_a_snapshot_of_which_a_chunk_is_missing_is_no_state(missing: int) -> None:
    world = World()
    world.submit(hold=True)
    whole = list(image.chunks(world.state))
    assert image.load(whole).tasks.get(1) == world.task(1)
    del whole[missing]
    with pytest.raises(ValueError, match="is not whole"):
        image.load(whole)


def test_an_attempt_that_was_not_seen_to_begin_has_nothing_of_the_one_before() -> None:
    world = World()
    number = world.submit(retries=9, timeout_s=600.0, backoff_s=0.0)
    shim = Identity("boot", 7, 1)
    seen = StartSeen(
        number, 1, shim, 8, world.at_ns, resumed_from=5, warning="damaged", invocation="a" * 32
    )
    world.put(outcome.started(world.state, seen))
    world.ask(m.CheckpointNow(ONE))
    world.ends(number, code=1)
    world.pass_time(1)
    run = world.task(number).run
    assert run is not None
    assert run.attempt == 2
    assert (run.shim, run.pid, run.started_ns, run.timeup_ns, run.asked) == (None, 0, 0, 0, 0)
    assert (run.resumed_from, run.warning, run.invocation) == (0, "", "")
    world.ends(number, "lost")
    (ended,) = [one for one in world.log if isinstance(one, Ended) and one.attempt == 2]
    assert (ended.cause, ended.core) == ("lost", False)
    run = world.task(number).run
    assert run is not None
    assert [past.checkpoint for past in run.past] == [5, 0]
