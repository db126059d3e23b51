"""The model finds each broken promise by itself, told by hand: no daemon takes part."""

import json
from typing import Any

import pytest

from tests.sim.asked import NEVER, Violation
from tests.sim.model import Model

S = 10**9
SPEC: dict[str, Any] = {"argv": ["job", "c0.1"], "key": "", "priority": 2}


class Tale:
    """One task of one client, under one daemon; each sentence takes a moment."""

    def __init__(self, **spec: Any) -> None:
        self.model = Model(2, keeps_all=True)
        self.now_ns = 0
        self.model.elapsed_ns = lambda: self.now_ns
        self._asked = 0
        self.starts()
        self.model.sent("s", "submit", {"tasks": [SPEC | spec]}, ["c0.1"])
        self.gives("s", {"ids": [1], "created": [True]})

    def starts(self) -> None:
        self.model.begins_to_reign()
        self.model.attendance.serves(self.now_ns)

    def gives(self, request: str, result: dict[str, Any]) -> None:
        """The daemon answers, and is heard."""
        wire = json.dumps(result).encode()
        self.model.issued(request, wire, is_ok=True)
        self.model.answered(request, wire, result)

    def asks(self, verb: str, **args: Any) -> str:
        self._asked += 1
        request = f"r{self._asked}"
        self.model.sent(request, verb, {"select": {"ids": [1]}, **args}, [])
        return request

    def changes(self, verb: str, phase: str = "", **args: Any) -> None:
        """A client asks for something of the task, or of its group, and is answered."""
        request = self.asks(verb, **args)
        self.gives(request, {"tasks": [{"id": 1, "phase": phase}]} if phase else {})

    def sets_group(self, parallel: int, *, paused: bool) -> None:
        self.changes("group_set", name="default", parallel=parallel, paused=paused)

    def sees(self, phase: str, attempt: int = 0, priority: int = 2) -> None:
        row = {
            "id": 1, "argv": SPEC["argv"], "phase": phase, "attempt": attempt, "cause": "",
            "priority": priority,
        }  # fmt: skip
        self.model.seen([row], self.model.now + 1)

    def sees_group(self, parallel: int, *, paused: bool) -> None:
        rows = [{"name": "default", "parallel": parallel, "paused": paused}]
        self.model.steering.check_groups(rows, self.model.now + 1)

    def passes(self, seconds: float) -> None:
        self.now_ns += int(seconds * S)

    def begins(self, attempt: int = 1) -> None:
        self.model.begun(1, attempt, 0)

    def works(self) -> None:
        self.model.did(1, 1, 1)


def test_what_is_held_does_not_start() -> None:
    tale = Tale()
    tale.changes("hold", "held")
    tale.sees("held")
    with pytest.raises(Violation, match="is held, and it starts"):
        tale.begins()


def test_what_was_submitted_on_hold_does_not_start() -> None:
    with pytest.raises(Violation, match="is held, and it starts"):
        Tale(hold=True).begins()


@pytest.mark.parametrize("phase", ["queued", "running", "succeeded"])
def test_what_is_held_is_not_seen_to_go_on(phase: str) -> None:
    tale = Tale()
    tale.changes("hold", "held")
    with pytest.raises(Violation, match="hold r1 was answered"):
        tale.model.steering.check_row(
            {"id": 1, "phase": phase, "priority": 2}, NEVER, 2, tale.model.now + 1
        )


def test_what_was_released_or_may_have_been_starts() -> None:
    tale = Tale()
    tale.changes("hold", "held")
    tale.asks("release")
    tale.begins()


def test_a_hold_that_nobody_answered_may_have_come_to_nothing() -> None:
    tale = Tale()
    tale.asks("hold")
    tale.begins()
    tale.sees("running", 1)


def test_nothing_starts_in_a_group_that_has_been_paused_for_long() -> None:
    tale = Tale()
    tale.sets_group(4, paused=True)
    tale.passes(20)
    with pytest.raises(Violation, match="the group is paused by r1"):
        tale.begins()


def test_an_order_on_its_way_is_carried_out_though_the_group_was_paused_meanwhile() -> None:
    tale = Tale()
    tale.sets_group(4, paused=True)
    tale.passes(10)
    tale.begins()


def test_a_group_that_may_go_on_again_starts_tasks() -> None:
    tale = Tale()
    tale.sets_group(4, paused=True)
    tale.passes(20)
    tale.asks("group_set", name="default", parallel=4, paused=False)
    tale.begins()


def test_a_group_is_told_as_it_was_set_last() -> None:
    tale = Tale()
    tale.sees_group(2, paused=False)
    tale.sets_group(4, paused=True)
    tale.sets_group(1, paused=False)
    tale.sees_group(1, paused=False)
    with pytest.raises(Violation, match=r"told as \(4, True\)"):
        tale.sees_group(4, paused=True)
    with pytest.raises(Violation, match=r"told as \(2, False\)"):
        tale.sees_group(2, paused=False)


def test_what_nobody_answered_may_be_seen_and_may_not() -> None:
    tale = Tale()
    tale.asks("group_set", name="default", parallel=4, paused=True)
    tale.sees_group(2, paused=False)
    tale.sees_group(4, paused=True)
    tale.asks("edit", priority=7)
    tale.sees("queued", priority=2)
    tale.sees("queued", priority=7)


def test_a_priority_is_told_as_it_was_edited_last() -> None:
    tale = Tale()
    tale.sees("queued", priority=2)
    tale.changes("edit", "queued", priority=7)
    tale.changes("edit", "queued", priority=5)
    tale.sees("queued", priority=5)
    for gone in (2, 7):
        with pytest.raises(Violation, match=f"has priority {gone}"):
            tale.sees("queued", priority=gone)


@pytest.mark.parametrize(
    ("verb", "leaves", "other", "undo"),
    [("pause", "paused", "running", "resume"), ("resume", "running", "paused", "pause")],
)
def test_what_was_paused_or_resumed_stays_so_until_somebody_may_have_undone_it(
    verb: str, leaves: str, other: str, undo: str
) -> None:
    tale = Tale()
    tale.begins()
    tale.changes(verb, leaves)
    tale.sees(leaves, 1)
    with pytest.raises(Violation, match=f"{verb} r1 was answered"):
        tale.sees(other, 1)
    tale.asks(undo)
    tale.sees(other, 1)


def test_the_attempt_after_one_that_was_paused_runs() -> None:
    tale = Tale()
    tale.begins()
    tale.changes("pause", "paused")
    tale.model.ended(1, 1, "signal", 0, 9)
    tale.begins(2)
    tale.sees("running", 2)


def test_a_signal_that_was_answered_is_sent_in_the_same_turn() -> None:
    tale = Tale()
    tale.begins()
    tale.changes("signal", "running", signal=10)
    tale.model.signalled(1, 1, 10)
    tale.model.turn_is_over()
    tale.changes("signal", "running", signal=10)
    with pytest.raises(Violation, match="signal r2 of task 1 was answered, and never sent"):
        tale.model.turn_is_over()


def test_a_signal_that_an_earlier_daemon_was_asked_for_may_have_gone_with_it() -> None:
    tale = Tale()
    tale.begins()
    request = tale.asks("signal", signal=10)
    tale.starts()
    tale.gives(request, {"tasks": [{"id": 1, "phase": "running"}]})
    tale.model.turn_is_over()


def test_nothing_works_on_when_its_time_is_over() -> None:
    tale = Tale(timeout_s=4.0)
    tale.begins()
    tale.passes(5)
    tale.works()
    tale.passes(2)
    with pytest.raises(Violation, match=r"runs on after its 4.0 s"):
        tale.works()


def test_what_was_told_to_stop_may_take_its_time() -> None:
    tale = Tale(timeout_s=4.0)
    tale.begins()
    tale.model.told_to_stop(1, 1)
    tale.passes(7)
    tale.works()


def test_what_a_new_daemon_took_over_has_half_a_minute_more() -> None:
    tale = Tale(timeout_s=4.0)
    tale.begins()
    tale.model.attendance.is_gone()
    tale.passes(60)
    tale.works()
    tale.starts()
    tale.passes(31)
    tale.works()
    tale.passes(2)
    with pytest.raises(Violation, match="runs on"):
        tale.model.ended(1, 1, "exit", 0, 0)


def test_a_daemon_that_waits_for_its_disk_stops_nobody_until_it_goes_on() -> None:
    tale = Tale(timeout_s=4.0)
    tale.begins()
    tale.model.attendance.stands_still(is_so=True, now_ns=tale.now_ns)
    tale.passes(40)
    tale.works()
    tale.model.attendance.stands_still(is_so=False, now_ns=tale.now_ns)
    tale.passes(1)
    tale.model.did(1, 1, 2)
    tale.passes(2)
    with pytest.raises(Violation, match="runs on"):
        tale.model.did(1, 1, 3)


def test_a_clock_that_is_set_costs_a_timeout_only_what_it_was_not_there_to_see() -> None:
    tale = Tale(timeout_s=60.0)
    tale.begins()
    tale.passes(10)
    tale.model.attendance.jumped(tale.now_ns)
    tale.passes(53)
    with pytest.raises(Violation, match="runs on"):
        tale.works()
    tale.starts()
    tale.passes(600)
    tale.works()
