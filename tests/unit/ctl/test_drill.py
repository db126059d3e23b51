"""What a drill makes of what it saw: each promise that did not hold is a check that fails."""

import os
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from msgspec.structs import replace

from ckptctl import drill_checks, drill_watch
from ckptctl.drill_watch import Before, Story
from ckptd.protocol.errors import Conflict, NotFound
from ckptd.protocol.messages import (
    Changed,
    CheckpointList,
    CheckpointRow,
    DaemonStatus,
    Event,
    EventPage,
    Events,
    Message,
    Pong,
    Progress,
    TaskChange,
    TaskRow,
)
from tests.unit.ctl.conftest import Scripted, ctl, ctl_on_terminal
from tests.unit.ctl.rows import page, row

SECOND = 1_000_000_000
HIT_NS = 100 * SECOND
GONE = 1  # tick of a process that was seen before, and that no pid of now has


def task_row(**fields: Any) -> TaskRow:
    found = row(7, phase="running", attempt=2, pid=4711, checkpoint=5)
    return replace(found, progress=Progress(30, 100, at_ns=HIT_NS), **fields)


def event(lsn: int, kind: str, attempt: int, at_s: float, **fields: Any) -> Event:
    return Event(lsn, kind, HIT_NS + int(at_s * SECOND), 7, attempt, fields)


def ended(lsn: int = 12, at_s: float = 1, **changes: Any) -> Event:
    fields = {
        "cause": "drill", "blame": "", "signal": 9, "code": 0, "lost_s": 2.5,
        "cursor": "",
        "started_ns": HIT_NS - 60 * SECOND, "ended_ns": HIT_NS + SECOND,
        "verdict": {"phase": "queued", "failures": 0},
    }  # fmt: skip
    return event(lsn, "ended", 2, at_s, **{**fields, **changes})


INTENT = event(13, "start_intent", 3, 1.1)
LATER_INTENT = event(14, "start_intent", 3, 1.1)
STARTED = event(15, "started", 3, 1.5, pid=4712, resumed_from=5)
GOOD = (ended(), INTENT, STARTED)
SAVED = CheckpointRow(
    5, True, True, 1, 2, 10, (), "d", "", "/c",
    progress=Progress(29, 100, at_ns=HIT_NS - int(1.5 * SECOND)),
)  # fmt: skip


def drilled(
    row: TaskRow | None = None, ticks: int = 0, *, lsn: int = 11, is_hit: bool = True
) -> Story:
    found = Story(Before(row or task_row(), lsn, ticks), HIT_NS, is_hit=is_hit)
    found.note([SAVED])
    return found


def marked(lsn: int, attempt: int, at_s: float, checkpoint: int) -> Event:
    saved = {"checkpoint": checkpoint, "checkpoint_ns": HIT_NS + int(at_s * SECOND), "cursor": "c"}
    return event(lsn, "marked", attempt, at_s, **saved)


def say(found: Story, attempt: int, done: float, at_s: float) -> None:
    progress = Progress(done, 100, at_ns=HIT_NS + int(at_s * SECOND))
    found.look(replace(task_row(attempt=attempt), progress=progress), 0)


def story(*events: Event, lsn: int = 11) -> Story:
    """Return one of a task that was at 30 when it was hit, began again at 29, and got on."""
    found = drilled(ticks=GONE, lsn=lsn)
    found.hear(events)
    say(found, 3, 29, 3)
    say(found, 3, 31, 4)
    return found


def failed(found: Story, how: str = "kill9", saved: CheckpointRow = SAVED) -> list[str]:
    checks = drill_checks.checks_of_task(how, found, [saved])
    return [check.name for check in checks if check.holds is False]


def test_a_task_that_came_back_as_promised_passes_and_its_times_are_told() -> None:
    found = story(*GOOD)
    assert not failed(found)
    assert found.is_over
    assert drill_watch.figures(found) == {
        "lost_s": 2.5, "ended_s": 1.0, "restart_s": 0.5, "progress_s": 3.0, "back_s": 3.0,
    }  # fmt: skip


def test_a_next_attempt_that_only_failed_has_neither_got_on_nor_come_back_to_where_it_was() -> None:
    for phase, seconds in (("failed", None), ("succeeded", 4.0)):
        found = drilled()
        verdict = {"phase": phase, "failures": 0}
        found.hear([*GOOD, event(20, "ended", 3, 5, ended_ns=HIT_NS + 5 * SECOND, verdict=verdict)])
        told = drill_watch.figures(found)
        assert (told["progress_s"], told["back_s"]) == (seconds, seconds)


@pytest.mark.parametrize(
    ("check", "events"),
    [
        ("cause", (ended(verdict={"phase": "queued", "failures": 1}), INTENT, STARTED)),
        ("cause", (ended(cause="lost"), INTENT, STARTED)),
        ("cause", (INTENT, STARTED)),
        ("fence", (ended(lsn=20), INTENT, STARTED)),
        ("fence", (ended(), INTENT, INTENT, STARTED)),
        ("fence", (event(12, "start_intent", 2, 0.1), ended(lsn=13), LATER_INTENT, STARTED)),
        ("checkpoint", (ended(), INTENT, event(14, "started", 3, 1.5, pid=1, resumed_from=4))),
    ],
)
def test_a_promise_that_did_not_hold_fails_its_check(check: str, events: tuple[Event, ...]) -> None:
    assert check in failed(story(*events))


def test_an_old_process_that_still_lives_when_the_new_one_begins_fails_the_fence() -> None:
    ticks = drill_watch.look_at(os.getpid())
    found = drilled(task_row(pid=os.getpid()), ticks)
    found.hear(GOOD)
    assert failed(found) == ["fence"]


def test_a_fence_whose_old_process_cannot_be_seen_is_not_proven_by_the_log_alone() -> None:
    found = drilled(ticks=0)
    found.hear(GOOD)
    say(found, 3, 31, 4)
    say(found, 3, 32, 5)
    checks = drill_checks.checks_of_task("kill9", found, [SAVED])
    assert {check.name: check.holds for check in checks if not check.holds} == {"fence": None}


def test_a_checkpoint_that_the_task_had_and_that_is_there_no_more_fails_the_drill() -> None:
    checks = drill_checks.checks_of_task("kill9", story(*GOOD), [])
    told = {check.name: check for check in checks}["verify"]
    assert (told.holds, told.text) == (False, "checkpoint 5 is gone; the newest is 0")
    assert failed(story(*GOOD), saved=replace(SAVED, seq=4)) == ["verify"]


def test_a_silent_task_that_was_ordered_again_has_come_back_only_once_it_is_seen_to_run() -> None:
    silent = replace(task_row(), checkpoint=0, progress=None)
    found = drilled(silent, ticks=GONE)
    found.hear([ended(), INTENT, replace(STARTED, fields={"pid": 4712, "resumed_from": 0})])
    found.look(replace(silent, attempt=3, phase="waiting"), 0)  # gone before anybody looked
    assert not found.is_over
    checks = drill_checks.checks_of_task("kill9", found, [])
    assert [(check.name, check.holds) for check in checks if not check.holds] == [
        ("progress", None)
    ]
    found.look(replace(silent, attempt=3, pid=4712), 0)
    assert found.is_over
    assert not [one for one in drill_checks.checks_of_task("kill9", found, []) if not one.holds]


def test_a_bad_checkpoint_fails_the_drill() -> None:
    assert failed(story(*GOOD), saved=replace(SAVED, valid=False)) == ["verify"]


def test_what_waits_for_its_seal_fails_no_drill_and_is_told_unless_a_newer_one_is_sealed() -> None:
    waits = replace(SAVED, seq=6, sealed=False, valid=False)
    checks = drill_checks.checks_of_task("kill9", story(*GOOD), [waits, SAVED])
    told = {check.name: check for check in checks}["verify"]
    assert (told.holds, told.text) == (
        True,
        "1 checkpoint read again, every byte; 1 not sealed yet",
    )
    checks = drill_checks.checks_of_task("kill9", story(*GOOD), [waits])
    assert {check.name: check.holds for check in checks}["verify"] is None, "nothing was read"
    never = replace(waits, seq=4)
    checks = drill_checks.checks_of_task("kill9", story(*GOOD), [SAVED, never])
    told = {check.name: check for check in checks}["verify"]
    assert (told.holds, told.text) == (False, "bad: 4")


def test_a_task_that_was_not_seen_to_get_on_has_neither_passed_nor_failed() -> None:
    silent = drilled(ticks=GONE)
    silent.hear(GOOD)
    assert not silent.is_over
    checks = drill_checks.checks_of_task("kill9", silent, [SAVED])
    assert [(check.name, check.holds) for check in checks if not check.holds] == [
        ("checkpoint", None), ("progress", None),
    ]  # fmt: skip


def test_where_an_attempt_begins_again_is_no_sign_that_it_gets_on() -> None:
    found = drilled()
    found.hear(GOOD)
    say(found, 3, 40, 2)  # a batch says so before it has done anything
    assert (found.sign_ns, found.back_ns) == (0, HIT_NS + 2 * SECOND)
    say(found, 3, 7, 3)  # another loop, from its own beginning
    assert not found.sign_ns
    say(found, 3, 8, 4)
    assert found.sign_ns == HIT_NS + 4 * SECOND


def test_a_checkpoint_that_the_blow_itself_made_has_to_be_the_one_that_is_resumed() -> None:
    def again(resumed_from: int) -> Story:
        saved, died = marked(9, 2, 0.5, checkpoint=6), ended(lsn=10)
        order = event(11, "start_intent", 3, 1.1)
        start = event(12, "started", 3, 1.5, pid=4712, resumed_from=resumed_from)
        found = story(saved, died, order, start, lsn=8)
        found.note([replace(SAVED, seq=6)])
        return found

    assert failed(again(5), "sigterm", replace(SAVED, seq=6)) == ["checkpoint"]
    assert not failed(again(6), "sigterm", replace(SAVED, seq=6))
    texts = [one.text for one in drill_checks.checks_of_task("sigterm", again(6), [SAVED])]
    assert "resumed from 6, the newest was 6" in texts


def test_an_oom_drill_that_the_kernel_did_not_end_fails() -> None:
    assert failed(story(ended(cause="oom"), INTENT, STARTED), "oom") == []
    assert failed(story(ended(cause="drill_oom"), INTENT, STARTED), "oom") == ["cause"]


@pytest.mark.parametrize(
    ("rungs", "end", "holds", "said"),
    [
        ((0, 1, 2), {}, False, "it had to be killed after its grace of 2s"),
        ((0, 1), {}, None, "somebody else killed it before its grace was over"),
        ((0, 1), {"signal": 15}, True, "it was ended by SIGTERM"),
        ((0,), {"signal": 0, "code": 75}, True, "it left with exit 75"),
        ((0, 1, 2), {"signal": 0, "code": 0}, True, "it left with exit 0"),
    ],
)
def test_a_task_that_has_to_be_killed_has_not_left_as_a_shutdown_asks(
    rungs: tuple[int, ...], end: dict[str, Any], *, holds: bool | None, said: str
) -> None:
    stops = [event(12, "stop_intent", 2, 0.1, rung=rung, grace_s=2.0) for rung in rungs]
    found = story(*stops, ended(lsn=13, **end), LATER_INTENT, STARTED)
    checks = {one.name: one for one in drill_checks.checks_of_task("sigterm", found, [SAVED])}
    assert (checks["left"].holds, checks["left"].text) == (holds, said)
    assert "left" not in {one.name for one in drill_checks.checks_of_task("kill9", found, [SAVED])}


def test_what_a_task_does_between_the_blow_and_its_end_is_no_sign_of_its_return() -> None:
    found = drilled()
    say(found, 2, 40, 0)
    found.hear([marked(12, 2, 0.1, checkpoint=6), *GOOD])
    assert not found.sign_ns
    say(found, 3, 34, 1)
    say(found, 3, 35, 2)
    assert (found.sign_ns, found.back_ns) == (HIT_NS + 2 * SECOND, 0)  # not yet where it was: 40


@pytest.mark.parametrize(
    ("epochs", "now", "more", "bad"),
    [
        ((1, 2), task_row(), (), []),
        ((1, 1), task_row(), (), ["daemon"]),
        ((1, 2), task_row(pid=4712), (), ["adopted"]),
        ((1, 2), task_row(attempt=3), (INTENT,), ["adopted", "fence"]),
    ],
)
def test_a_daemon_that_comes_back_has_let_its_task_alone(
    epochs: tuple[int, int], now: TaskRow, more: tuple[Event, ...], bad: list[str]
) -> None:
    found = drilled(is_hit=False)
    found.hear(more)
    say(found, 2, 31, 1)
    found.look(now, 0)
    checks = drill_checks.checks_of_daemon(found, now, epochs, [SAVED])
    assert [check.name for check in checks if not check.holds] == bad


def test_a_task_that_its_new_daemon_only_believes_to_run_has_not_lived_on() -> None:
    with subprocess.Popen(["sleep", "999"]) as process:
        before = task_row(pid=process.pid)
        found = drilled(replace(before, checkpoint=0, progress=None), is_hit=False,
                        ticks=drill_watch.look_at(process.pid))  # fmt: skip
        found.look(before, 0)
        was_over = found.is_over
        process.kill()
    found.look(before, 0)
    assert (was_over, found.is_over) == (True, False)
    checks = drill_checks.checks_of_daemon(found, before, (1, 2), [SAVED])
    assert [(check.name, check.holds) for check in checks if not check.holds] == [
        ("adopted", False), ("progress", None),
    ]  # fmt: skip


def of_daemon(found: Story, now: TaskRow | None = None) -> dict[str, bool | None]:
    """Return what does not hold, or is not proven, of a drill whose daemon came back."""
    checks = drill_checks.checks_of_daemon(found, now or task_row(), (1, 2), [SAVED])
    return {check.name: check.holds for check in checks if not check.holds}


@pytest.mark.parametrize("cause", ["signal", "lost", "reboot", "shutdown", "stopped"])
def test_a_task_that_a_signal_took_with_its_daemon_has_noticed_though_its_next_attempt_gets_on(
    cause: str,
) -> None:
    found = drilled(is_hit=False, ticks=GONE)
    found.hear([ended(cause=cause, verdict={"phase": "waiting", "failures": 1})])
    assert not found.is_over  # a second attempt is to come
    found.hear([INTENT, STARTED])
    say(found, 3, 31, 4)
    drill_checks.check_left_alone(found)
    assert found.is_over
    assert of_daemon(found, task_row(attempt=3)) == {"adopted": False}
    texts = [one.text for one in drill_checks.checks_of_daemon(found, task_row(), (1, 2), [SAVED])]
    assert f"attempt 2, pid 4711 did not live on: SIGKILL, recorded as {cause}" in texts
    fence = "pid 4711 was gone when attempt 3 ran; LSN of its end 12, of the next order 13"
    assert fence in texts


def test_a_second_attempt_that_was_ordered_before_the_first_had_ended_fails_the_fence() -> None:
    for more in ((), (STARTED,)):
        found = drilled(is_hit=False, ticks=GONE)
        found.hear([replace(INTENT, lsn=12), ended(lsn=13, cause="lost"), *more])
        say(found, 3, 31, 4)
        failed_ = {name for name, holds in of_daemon(found).items() if holds is False}
        assert failed_ == {"adopted", "fence"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cause": "exit", "code": 0, "signal": 0}, "nothing tells whether by itself"),
        ({"cause": "exit", "code": 75, "signal": 0}, "nothing tells whether by itself"),
        ({"cause": "signal", "ended_ns": HIT_NS - 1}, "had ended before the blow"),
        ({"cause": "cancel"}, "by something else meanwhile"),
        ({"cause": "oom"}, "by something else meanwhile"),
        ({"cause": "drill"}, "by something else meanwhile"),
    ],
)
def test_an_end_that_says_nothing_about_the_daemons_death_proves_nothing(
    fields: dict[str, Any], said: str
) -> None:
    found = drilled(is_hit=False, ticks=GONE)
    found.hear([ended(**fields), INTENT, STARTED])
    say(found, 3, 31, 4)
    with pytest.raises(Conflict, match=said):
        drill_checks.check_left_alone(found)


def test_an_exit_is_the_tasks_own_only_where_it_was_seen_to_live_under_the_new_daemon() -> None:
    exited = ended(cause="exit", signal=0, verdict={"phase": "succeeded", "failures": 0})
    found = drilled(is_hit=False, ticks=GONE)
    say(found, 2, 31, 0.5)
    found.hear([exited])
    drill_checks.check_left_alone(found)
    assert not of_daemon(found)
    unseen = drilled(is_hit=False, ticks=GONE)
    unseen.hear([exited])
    assert of_daemon(unseen) == {"adopted": None, "fence": None}


def test_a_task_that_nobody_looked_at_since_its_daemon_died_is_not_proven_to_live() -> None:
    found = drilled(replace(task_row(), progress=None), is_hit=False)
    assert of_daemon(found) == {"adopted": None, "fence": None, "progress": None}
    texts = [one.text for one in drill_checks.checks_of_daemon(found, task_row(), (1, 2), [SAVED])]
    assert "attempt 2, pid 4711: the new daemon did not tell of it in time" in texts
    found.look(found.before.row, 0)  # the daemon's word; the process cannot be seen from here
    assert of_daemon(found) == {"adopted": None}


def test_a_task_that_got_on_and_is_gone_is_waited_for_until_its_end_is_told() -> None:
    with subprocess.Popen(["sleep", "999"]) as process:
        before = task_row(pid=process.pid)
        found = drilled(before, drill_watch.look_at(process.pid), is_hit=False)
        now = replace(before, progress=Progress(31, 100, at_ns=HIT_NS + SECOND))
        found.look(now, 0)
        was_over = found.is_over
        process.kill()
    found.look(now, 0)
    assert (was_over, found.is_over) == (True, False)


def test_a_task_of_the_same_number_in_another_log_is_no_proof_for_this_one() -> None:
    found = drilled(is_hit=False)
    say(found, 2, 31, 1)
    assert of_daemon(found, replace(task_row(), submitted_ns=1)) == {"daemon": False}


def test_what_was_said_before_the_blow_fell_or_is_sealed_only_after_it_is_no_sign_of_life() -> None:
    found = drilled(is_hit=False)
    found.struck_ns = HIT_NS + SECOND
    say(found, 2, 40, 1)
    found.hear([marked(12, 2, 0.5, checkpoint=6), marked(13, 2, 2, checkpoint=7)])
    assert (found.sign_ns, found.has_lived) == (0, False)
    found.hear([marked(14, 2, 3, checkpoint=8)])
    assert found.sign_ns == HIT_NS + 3 * SECOND


def test_an_attempt_that_had_ended_before_the_blow_was_not_hit_by_it() -> None:
    with pytest.raises(Conflict, match="had ended before the blow"):
        drill_checks.check_hit("kill9", story(ended(ended_ns=HIT_NS - 1), INTENT, STARTED))


def test_a_journal_that_holds_more_than_the_last_checkpoint_is_not_waited_for() -> None:
    saves = replace(task_row(checkpoint_ns=HIT_NS - 10 * SECOND, started_ns=1), progress=None)
    saved_once = replace(saves, started_ns=HIT_NS - 5 * SECOND)  # at the end of attempt 1
    for row_, lost_s, is_over in (saves, 11.0, False), (saves, 2.5, True), (saved_once, 6.0, True):
        found = drilled(row_)
        found.hear([ended(lost_s=lost_s), INTENT, STARTED])
        found.look(replace(row_, attempt=3, pid=4712), 0)
        assert found.is_over is is_over


def test_what_was_saved_before_the_daemon_died_is_no_sign_of_life_after_it() -> None:
    found = drilled(is_hit=False)
    found.hear([event(12, "marked", 2, 2, checkpoint=6, checkpoint_ns=HIT_NS - 1, cursor="d")])
    assert not found.sign_ns
    found.hear([marked(13, 2, 3, checkpoint=7)])
    assert found.sign_ns == HIT_NS + 3 * SECOND


@pytest.mark.parametrize(
    ("cause", "phase", "said"),
    [
        ("drill", "succeeded", "was done before the blow"),
        ("cancel", "cancelled", "was ended by something else meanwhile"),
        ("shutdown", "queued", "was ended by something else meanwhile"),
    ],
)
def test_an_end_that_was_not_the_blows_doing_proves_nothing(
    cause: str, phase: str, said: str
) -> None:
    end = ended(cause=cause, signal=0, verdict={"phase": phase, "failures": 0})
    with pytest.raises(Conflict, match=said):
        drill_checks.check_hit("sigterm", story(end))


def test_a_blow_of_somebody_else_to_a_task_that_had_got_on_is_no_broken_promise() -> None:
    other = event(20, "ended", 3, 5, **ended().fields)
    found = story(*GOOD)
    found.hear([other])
    assert not failed(found)
    silent = drilled()
    silent.hear([*GOOD, other])
    assert failed(silent) == ["progress"]


def test_what_a_journal_kept_behind_the_checkpoint_is_not_told_as_lost() -> None:
    at_ns = HIT_NS - 10 * SECOND
    assert story(*GOOD).kept_since(at_ns)  # 2.5 s lost, the checkpoint is 11 s old
    assert not story(ended(lost_s=11.0), INTENT, STARTED).kept_since(at_ns)


def test_a_journal_of_an_earlier_attempt_is_gone_on_from_though_the_last_one_added_nothing() -> (
    None
):
    never_saved = replace(task_row(), checkpoint=0)
    anew = event(14, "started", 3, 1.5, pid=4712, resumed_from=0)
    for cursor, said in (("c", "it goes on from its journal"), ("", "it began anew")):
        found = drilled(never_saved)
        found.hear([ended(cursor=cursor, lost_s=61.0), INTENT, anew])
        texts = [check.text for check in drill_checks.checks_of_task("kill9", found, [])]
        assert f"none was saved, {said}" in texts


@pytest.mark.parametrize(("typed", "hits"), [("n\n", 0), ("y\n", 1)])
def test_a_person_is_asked_first_and_a_no_does_no_harm(
    scripted: Scripted, typed: str, hits: int
) -> None:
    asked: list[object] = []

    def hit(command: object) -> Changed:
        asked.append(command)
        refusal = Conflict("cannot drill task 7: it is being stopped").reply()
        return Changed((TaskChange(7, "stopping", refusal),))

    daemon = scripted(
        {
            "events": lambda _: EventPage((), 11),
            "status": lambda _: page(task_row(pid=0)),
            "checkpoints": lambda _: CheckpointList((SAVED,)),
            "drill": hit,
        }
    )
    code, shown = ctl_on_terminal(daemon.endpoint, "drill", "7", "--kill9", typed=typed)
    assert "it goes on from checkpoint 5" in shown
    assert "Do it? [y/N]" in shown
    assert (code, len(asked)) == (5 if hits else 64, hits)


@pytest.mark.parametrize("verb", ["status", "ping"])
def test_a_daemon_that_dies_before_the_blow_is_told_without_a_traceback(
    scripted: Scripted, verb: str
) -> None:
    with subprocess.Popen(["sh", "-c", "read ckptd"], stdin=subprocess.PIPE) as process:
        answers = {
            "events": EventPage((), 11),
            "status": page(task_row(pid=0)),
            "checkpoints": CheckpointList((SAVED,)),
            "ping": Pong("0.1.0", 1, process.pid, os.geteuid(), 1),
        }

        def answer(asked: str, _: Message) -> Any:
            if asked == verb and len(daemon.asked(verb)) == 2:
                process.kill()
                process.wait()
            return answers[asked]

        daemon = scripted({name: partial(answer, name) for name in answers})
        words = ("drill", "7", "--daemon", "--restart", "true")
        code, shown = ctl_on_terminal(daemon.endpoint, *words, typed="y\n")
    assert (code, "ended before the blow" in shown) == (5, True), shown


def drill_of_daemon(
    scripted: Scripted, events: Callable[[Events], EventPage | NotFound | None], *options: str
) -> tuple[int, str]:
    """Return exit code and output of a drill whose daemon dies, and then tells these events."""
    row_ = replace(task_row(), pid=os.getpid(), checkpoint=0, progress=None)
    with subprocess.Popen(["sh", "-c", "read ckptd"], stdin=subprocess.PIPE) as process:

        def ping(_: Message) -> Pong:
            return Pong("0.1.0", 1, process.pid, os.geteuid(), 1 + (process.poll() is not None))

        def told(asked: Message) -> EventPage | NotFound | None:
            assert isinstance(asked, Events)
            return EventPage((), 11) if process.poll() is None else events(asked)

        daemon = scripted(
            {
                "ping": ping,
                "events": told,
                "daemon": lambda _: DaemonStatus(
                    "0.1.0", 1, 0, 2, "b", 0, "/s", 11, 0, "ok", "fork", "", {}, {}, {}
                ),
                "status": lambda _: page(row_),
                "checkpoints": lambda _: CheckpointList(()),
            }
        )
        words = ("drill", "7", "--daemon", "--yes", "--restart", "true", *options)
        code, out, err = ctl(daemon.endpoint, *words)
        process.kill()
    return code, out + err


def test_a_log_that_is_told_in_pieces_is_read_to_its_end_before_the_verdict(
    scripted: Scripted,
) -> None:
    pieces = {11: EventPage((), 12), 12: EventPage((INTENT,), 13), -1: EventPage((), 13)}
    code, told = drill_of_daemon(scripted, lambda asked: pieces.get(asked.since))
    assert (code, "a second attempt was ordered beside it: LSN 13" in told) == (1, True), told
    code, told = drill_of_daemon(scripted, lambda asked: EventPage((), max(11, asked.since)))
    assert (code, "passed" in told) == (0, True), told


def test_a_log_that_was_cut_behind_what_was_read_proves_nothing(scripted: Scripted) -> None:
    gone = NotFound("LSN 11 is gone; the earliest there is: 40")
    answer = EventPage((), 50)
    code, told = drill_of_daemon(scripted, lambda asked: gone if asked.since > 0 else answer)
    assert (code, "the log was cut behind what was read" in told) == (5, True), told


def test_a_new_daemon_that_tells_nothing_in_time_leaves_all_unproven(scripted: Scripted) -> None:
    code, told = drill_of_daemon(scripted, lambda _: None, "--within", "1s")
    said = "not proven, for what was not seen: adopted, fence, progress"
    assert (code, said in told) == (124, True), told
