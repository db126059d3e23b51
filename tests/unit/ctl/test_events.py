"""`events` against the daemon's own desk: pages without an event, and a log that was cut."""

import json

import msgspec
import pytest

from ckptctl.events import event_text
from ckptd.protocol import messages as m
from ckptd.protocol.errors import Corrupt, NotFound
from tests.fakes.scripted_daemon import Said
from tests.unit.ctl.conftest import Scripted, ctl
from tests.unit.ctl.rows import page, row
from tests.unit.daemon.test_requests import Desk

ERRORS = {kind.code: kind for kind in (NotFound, Corrupt)}


class BusyDesk(Desk):
    """A desk with more than a page of other tasks' records around those of one task."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0
        self.first = self.submit("first")
        for _ in range(10):
            self.submit(*["x" * 100_000] * 10)
        self.last = self.submit("last")

    def submit(self, *argv: str) -> int:
        self._count += 1
        task = m.TaskSpec(argv, hold=True)
        submitted = self.ask(f"s{self._count}", "submit", m.Submit((task,)))
        return int(submitted["ids"][0])

    def events(self, asked: m.Message) -> Said:
        reply = self.reply("e", "events", asked)
        if reply.error is not None:
            return ERRORS[reply.error.code](reply.error.message, reply.error.hint)
        return msgspec.json.decode(reply.result, type=m.EventPage)

    def status(self, _: m.Message) -> Said:
        return m.DaemonStatus(
            "0", 1, 0, 1, "b", 1, "/state", self.engine.wal.durable_lsn, 0, "ok", "fork", "", {},
            {}, {},
        )  # fmt: skip

    def rows(self, asked: m.Message) -> Said:
        reply = self.reply("r", "status", asked)
        if reply.error is not None:
            return ERRORS[reply.error.code](reply.error.message, reply.error.hint)
        return msgspec.json.decode(reply.result, type=m.TaskPage)

    def cut(self) -> int:
        """Retire what can be retired; return the first LSN that is left."""
        assert self.engine.wal.retire(self.engine.wal.durable_lsn)
        return self.engine.wal.earliest_lsn


@pytest.fixture(scope="module")
def whole() -> BusyDesk:
    return BusyDesk()


@pytest.fixture(scope="module")
def cut() -> BusyDesk:
    desk = BusyDesk()
    assert desk.cut() > 1
    return desk


def tasks_told(scripted: Scripted, desk: BusyDesk, *words: str) -> list[int]:
    daemon = scripted({"events": desk.events, "daemon": desk.status})
    code, out, err = ctl(daemon.endpoint, "events", "-o", "jsonl", *words)
    assert code == 0, err
    return [json.loads(line)["task"] for line in out.splitlines()]


def test_events_of_a_task_come_also_behind_a_page_full_of_other_tasks(
    scripted: Scripted, whole: BusyDesk
) -> None:
    assert tasks_told(scripted, whole, "--task", str(whole.last)) == [whole.last]
    assert tasks_told(scripted, whole, "--task", str(whole.first)) == [whole.first]
    last_of_all = tasks_told(scripted, whole, "--task", str(whole.last), "-n", "1")
    assert last_of_all == [whole.last]


def test_a_follower_goes_on_behind_a_page_full_of_other_tasks(
    scripted: Scripted, whole: BusyDesk
) -> None:
    ended = Corrupt("enough", "")  # a follower has no end of its own

    def events(asked: m.Message) -> Said:
        assert isinstance(asked, m.Events)
        is_read = asked.since >= whole.engine.wal.durable_lsn
        return ended if is_read else whole.events(msgspec.structs.replace(asked, hold_s=0.0))

    daemon = scripted({"events": events})
    words = "events", "-f", "-o", "jsonl", "--task", str(whole.last)
    code, out, _ = ctl(daemon.endpoint, *words)
    assert code == Corrupt.exit_code
    assert [json.loads(line)["task"] for line in out.splitlines()] == [whole.last]


@pytest.mark.parametrize("words", [["--since", "0"], ["--since", "2001-01-01"], ["-n", "1000"], []])
def test_events_begin_where_the_log_begins_that_was_cut(
    scripted: Scripted, cut: BusyDesk, words: list[str]
) -> None:
    told = tasks_told(scripted, cut, *words)
    assert told
    assert cut.first not in told
    assert told[-1] == cut.last


def test_events_of_a_task_are_those_that_are_left_and_a_person_is_told_where_they_begin(
    scripted: Scripted, cut: BusyDesk
) -> None:
    assert tasks_told(scripted, cut, "--task", str(cut.last)) == [cut.last]
    daemon = scripted({"events": cut.events, "status": cut.rows})
    code, out, err = ctl(daemon.endpoint, "events", "--task", str(cut.first))
    assert (code, out) == (0, "")
    assert f"the log begins at LSN {cut.engine.wal.earliest_lsn}" in err


def test_an_lsn_that_a_follower_names_and_that_is_gone_is_refused(
    scripted: Scripted, cut: BusyDesk
) -> None:
    daemon = scripted({"events": cut.events})
    code, out, err = ctl(daemon.endpoint, "events", "--since", "1")
    assert (code, out) == (4, "")
    assert f"start again from LSN {cut.engine.wal.earliest_lsn - 1}" in err


def test_an_end_that_nobody_saw_is_told_with_the_most_that_it_can_have_lasted() -> None:
    fields = {
        "cause": "lost", "code": 0, "signal": 0, "started_ns": 0, "ended_ns": 15 * 10**9,
        "lost_s": 13.0, "verdict": {"phase": "queued", "reason": ""},
    }  # fmt: skip
    told = event_text(m.Event(7, "ended", 0, 1, 1, fields))
    assert told == "lost after at most 15s, lost at most 13s of work, now queued"
    seen = event_text(m.Event(7, "ended", 0, 1, 1, {**fields, "cause": "drill", "signal": 9}))
    assert seen == "SIGKILL, drill after 15s, lost 13s of work, now queued"


@pytest.mark.parametrize(
    "words", [[], ["-f"], ["-n", "3"], ["--since", "0"], ["-f", "--since", "1"]]
)
def test_events_of_a_task_that_never_was_say_so_instead_of_nothing_for_ever(
    scripted: Scripted, whole: BusyDesk, words: list[str]
) -> None:
    daemon = scripted({"events": whole.events, "status": whole.rows, "daemon": whole.status})
    code, out, err = ctl(daemon.endpoint, "events", "--task", "999", *words)
    assert (code, out) == (4, "")
    assert err.startswith("ckptctl: no task 999\n")


def test_events_of_a_task_take_what_names_one_elsewhere(
    scripted: Scripted, whole: BusyDesk
) -> None:
    daemon = scripted({"events": whole.events, "status": whole.rows})
    code, out, err = ctl(daemon.endpoint, "events", "-o", "jsonl", "--task", "@last")
    assert code == 0, err
    assert [json.loads(line)["task"] for line in out.splitlines()] == [whole.last]


def test_a_follower_of_a_task_that_is_forgotten_has_an_end(scripted: Scripted) -> None:
    removed = m.Event(9, "removed", 0, 7, 0, {})
    pages = iter([m.EventPage((), 8), m.EventPage((), 8), m.EventPage((removed,), 9)])
    daemon = scripted({"events": lambda _: next(pages), "status": lambda _: page(row(7))})
    code, out, err = ctl(daemon.endpoint, "events", "-f", "--task", "7", "-o", "{lsn}")
    assert (code, out) == (0, "9\n")
    assert "task 7 is forgotten: nothing more happens to it" in err
    pages = iter([m.EventPage((removed,), 9), m.EventPage((), 9)])
    daemon = scripted({"events": lambda _: next(pages)})
    words = "events", "-f", "-n", "1", "--task", "7", "-o", "{lsn}"
    assert ctl(daemon.endpoint, *words)[:2] == (0, "9\n")


@pytest.mark.parametrize("words", [[], ["-f"]])
def test_an_lsn_behind_the_end_of_the_log_is_refused_not_waited_for(
    scripted: Scripted, whole: BusyDesk, words: list[str]
) -> None:
    daemon = scripted({"events": whole.events, "daemon": whole.status})
    code, out, err = ctl(daemon.endpoint, "events", "--since", "99999", *words)
    assert (code, out) == (64, "")
    end = whole.engine.wal.durable_lsn
    assert f"--since: LSN 99999 is not written yet, the log ends at LSN {end}" in err
    assert ctl(daemon.endpoint, "events", "--since", str(end))[:2] == (0, "")


def test_the_last_events_of_a_type_are_found_however_far_back(
    scripted: Scripted, whole: BusyDesk
) -> None:
    def many(_: m.Message) -> Said:
        answer = whole.status(_)
        assert isinstance(answer, m.DaemonStatus)
        return msgspec.structs.replace(answer, lsn=100_000)

    daemon = scripted({"events": whole.events, "daemon": many})
    code, out, _ = ctl(daemon.endpoint, "events", "-n", "1", "--type", "submitted", "-o", "jsonl")
    assert code == 0
    assert [json.loads(line)["task"] for line in out.splitlines()] == [whole.last]
