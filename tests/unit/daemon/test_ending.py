"""How the daemon comes to its end, and when it says that it is ready."""

from ckptd.core.records import DaemonStarted, Phase
from ckptd.daemon.ending import MARGIN_S, STOPPING_FLAG
from ckptd.protocol import messages as m
from tests.unit.daemon.day import GRACE_S, Day


def test_sigterm_leaves_the_tasks_running(day: Day) -> None:
    day.engine.stage([DaemonStarted(1, 1, "b", "0", 1, clean=True)])
    number = day.running()
    day.ending.signalled()
    day.turn()
    assert day.ending.is_over
    assert day.task(number).phase is Phase.RUNNING
    assert len(day.machine.alive()) == 1
    assert day.engine.state.stopped, (
        "a reboot after this is taken for a crash, and tasks for deadly"
    )


def test_sigterm_while_the_machine_goes_down_ends_every_task_as_an_interruption(day: Day) -> None:
    number = day.running()
    day.go_down()
    day.ending.signalled()
    day.turn()
    day.ending.signalled()  # once more changes nothing
    assert not day.ending.is_over
    day.until(lambda: day.ending.is_over)
    task = day.task(number)
    assert (task.phase, task.run.stop if task.run else None) == (Phase.QUEUED, None)
    assert not day.machine.alive()
    day.restart()
    (day.directory / STOPPING_FLAG).unlink()
    day.until(lambda: day.task(number).phase is Phase.RUNNING)


def test_a_second_sigterm_ends_the_wait_for_tasks(day: Day) -> None:
    number = day.running("deaf")
    day.ending.begin("checkpoint")
    day.turn()
    day.turn()
    assert not day.ending.is_over
    day.ending.signalled()
    day.turn()
    assert day.ending.is_over
    assert day.task(number).phase is Phase.STOPPING


def test_a_deaf_task_meets_the_ladder_and_time_is_asked_for_rung_by_rung(day: Day) -> None:
    day.running("deaf")
    day.heard()
    day.ending.begin("checkpoint")
    for _ in range(3):
        day.turn()
    assert day.extended_s() == [GRACE_S + MARGIN_S]  # no progress, no more time
    day.turn(after_s=GRACE_S)
    day.until(lambda: day.ending.is_over)
    assert day.extended_s() == [MARGIN_S]
    assert not day.machine.alive()


def test_what_nothing_ends_is_left_after_a_while_so_that_the_machine_can_go_down(day: Day) -> None:
    number = day.running("deaf")
    day.machine.signal = lambda *_: None  # type: ignore[method-assign]  # as with a dead bus
    day.ending.begin("checkpoint")
    day.turn()
    day.turn(after_s=GRACE_S)
    day.turn()
    day.turn(after_s=MARGIN_S - 1)
    assert not day.ending.is_over
    day.turn(after_s=2)
    assert day.ending.is_over
    assert day.task(number).phase is Phase.STOPPING


def test_each_task_that_ends_is_progress(day: Day) -> None:
    day.running()
    day.running("deaf")
    day.heard()
    day.ending.begin("checkpoint")
    for _ in range(4):
        day.turn()
    first, second = day.extended_s()
    assert first == second == GRACE_S + MARGIN_S
    assert not day.ending.is_over


def test_a_paused_task_is_thawed_so_that_it_can_save(day: Day) -> None:
    number = day.running()
    day.ask(m.Pause(m.Selector(ids=(number,))))
    day.until(lambda: day.task(number).phase is Phase.PAUSED)
    day.turn()
    assert day.machine.alive()[0].is_frozen
    day.ending.begin("checkpoint")
    day.until(lambda: day.ending.is_over)
    assert not day.machine.alive()


def test_a_shutdown_asked_for_while_adopting_reaches_every_task(day: Day) -> None:
    numbers = [day.running(), day.running("deaf")]
    day.ask(m.Pause(m.Selector(ids=(numbers[0],))))
    day.turn()
    day.restart()
    assert day.runner.is_adopting
    assert not day.readiness.is_ready
    day.ending.begin("checkpoint")
    day.turn()
    day.turn(after_s=GRACE_S)
    day.until(lambda: day.ending.is_over)
    assert not day.machine.alive()
    assert [day.task(number).phase for number in numbers] == [Phase.QUEUED] * 2


def test_tasks_save_when_a_shutdown_is_announced_and_start_again_when_it_is_called_off(
    day: Day,
) -> None:
    number = day.running()
    drained = []
    day.ending.on_drained = lambda: drained.append(True)
    day.heard()
    day.ending.announced(is_coming=True)
    day.until(lambda: bool(drained))
    assert day.task(number).phase is Phase.QUEUED
    day.turn()
    assert not day.ending.is_over
    assert not any("STOPPING=1" in said for said in day.heard())  # it could not be taken back
    day.ending.announced(is_coming=False)
    day.until(lambda: day.task(number).phase is Phase.RUNNING)


def test_sigterm_after_an_announcement_waits_for_the_tasks(day: Day) -> None:
    day.running("deaf")
    day.ending.announced(is_coming=True)
    day.turn()
    day.ending.signalled()
    day.turn()
    assert not day.ending.is_over
    day.turn(after_s=GRACE_S)
    day.until(lambda: day.ending.is_over)
    assert not day.machine.alive()


def test_ready_is_said_once_all_that_lived_on_is_told_and_time_is_asked_for_on_the_way(
    day: Day,
) -> None:
    for _ in range(3):
        day.running()
    day.restart()
    day.heard()
    assert not day.readiness.is_ready
    day.until(lambda: day.readiness.is_ready)
    assert not day.readiness.look()  # once
    assert any("adopting 3 of 3 tasks" in said for said in day.heard())


def test_without_anything_to_adopt_the_first_turn_is_ready(day: Day) -> None:
    day.turn()
    assert day.readiness.is_ready


def test_a_task_that_never_stops_talking_does_not_keep_the_daemon_from_being_ready(
    day: Day,
) -> None:
    number = day.running()
    day.restart()
    for _ in range(5):  # the one that was adopted, every turn
        day.machine.say(number, 1, 1, 2)
        day.turn()
        day.machine.say(number, 1, 2, 2)
    assert day.readiness.is_ready
