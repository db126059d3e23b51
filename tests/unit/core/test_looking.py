"""What `status` and `show` say of a task: as it is now, and as each attempt ended."""

from ckptd.core import query
from ckptd.protocol import messages as m
from tests.unit.core.world import ME, SECOND, World

ONE = m.Selector(ids=(1,))


def row(world: World) -> m.TaskRow:
    view = query.View(world.state, world.observed, ME, world.now, world.policy)
    (found,) = query.status(view, m.Status(ONE)).tasks
    return found


def attempts(world: World) -> tuple[m.AttemptRow, ...]:
    view = query.View(world.state, world.observed, ME, world.now, world.policy)
    return query.show(view, m.Show(ONE), "/state").tasks[0].attempts


def test_a_task_that_never_began_shows_no_attempt() -> None:
    world = World()
    world.submit(hold=True)
    shown = row(world)
    assert (shown.attempt, shown.failures, shown.interruptions, shown.pid) == (0, 0, 0, 0)
    assert (shown.started_ns, shown.ended_ns, shown.checkpoint, shown.checkpoint_ns) == (0, 0, 0, 0)
    assert (shown.cause, shown.code, shown.signal, shown.blame) == ("", None, None, "")
    assert attempts(world) == ()


def test_a_process_is_shown_for_as_long_as_it_runs() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.saves(number, 3)
    began_ns = world.at_ns
    shown = row(world)
    assert (shown.pid, shown.started_ns, shown.ended_ns) == (20_000 + number, began_ns, 0)
    assert (shown.checkpoint, shown.checkpoint_ns) == (3, began_ns)
    world.pass_time(5)
    world.ends(number)
    shown = row(world)
    assert (shown.pid, shown.started_ns, shown.ended_ns) == (0, began_ns, began_ns + 5 * SECOND)


def test_each_attempt_shows_either_an_exit_code_or_a_signal() -> None:
    world = World()
    number = world.submit(retries=9, backoff_s=0.0)
    for code, signal in ((0, 9), (3, 0)):
        world.begins(number)
        world.ends(number, "signal" if signal else "exit", code=code, signal=signal)
        shown = row(world)
        assert (shown.code, shown.signal) == (code or None, signal or None)
        world.pass_time(1)
    ends = [(one.attempt, one.cause, one.code, one.signal) for one in attempts(world)]
    assert ends == [(1, "signal", None, 9), (2, "exit", 3, None)]
