"""The story of a task in the journal: whole, in order, and found by its number."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.core.policy import Caller
from ckptd.core.records import AnyRecord
from ckptd.daemon.echo import Echo
from ckptd.daemon.story import BULK_LINES_MAX, LISTED_MAX, Story
from ckptd.host.clock import Clock
from ckptd.host.journal import Journal, JournaldSink, Kind
from ckptd.protocol import messages as m
from tests.unit.core.world import ME, World
from tests.unit.daemon.journald import Entry, Journald

Tell = Callable[[], list[Entry]]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    opened = Journald(tmp_path / "socket")
    yield opened
    opened.close()


@pytest.fixture
def story(tmp_path: Path, journald: Journald) -> Iterator[Story]:
    sink = JournaldSink(journald.path)
    journal = Journal(sink)
    own = JournaldSink(journald.path)
    echo = Echo(str(tmp_path), str(tmp_path), own, journal, Clock(), lambda: 1_000)
    yield Story(journal, echo)
    sink.close()
    echo.close()


@pytest.fixture
def tell(world: World, story: Story, journald: Journald) -> Tell:
    """Tell all that happened in the world since the last call; return the entries."""
    told = 0

    def now() -> list[Entry]:
        nonlocal told
        fresh: list[AnyRecord] = world.log[told:]
        story.hear(enumerate(fresh, told + 1))
        told = len(world.log)
        story.tell_all(world.state)
        return journald.read()

    return now


def messages(entries: list[Entry]) -> list[str]:
    return [entry["MESSAGE"][0] for entry in entries]


def test_the_life_of_a_task_reads_as_a_story(world: World, tell: Tell) -> None:
    number = world.submit("backup", retries=3)
    world.begins(number)
    world.pass_time(250)
    world.ends(number, code=3)
    world.pass_time(60)
    world.begins(number)
    world.pass_time(2)
    world.ends(number)
    entries = tell()
    lines = messages(entries)
    assert lines[:2] == [
        "task 1 submitted by uid 1000: backup",
        "task 1, attempt 1 started: backup, pid 20001",
    ]
    assert lines[2].startswith(
        "task 1, attempt 1 exited with 3 after 4m10s, 4m10s of work lost: tries again in "
    )
    assert lines[2].endswith(", after failure 1")
    assert lines[3:] == [
        "task 1, attempt 2 started: backup, pid 20001",
        "task 1, attempt 2 exited with 0 after 2.0s: succeeded",
    ]
    assert all(entry["CKPTD_TASK_ID"] == ["1"] for entry in entries)
    assert [entry["CKPTD_PHASE"] for entry in entries] == [
        ["queued"], ["running"], ["waiting"], ["running"], ["succeeded"],
    ]  # fmt: skip
    assert entries[2] | {"MESSAGE": []} == {
        "MESSAGE": [],
        "PRIORITY": ["6"],
        "SYSLOG_IDENTIFIER": ["ckptd"],
        "MESSAGE_ID": [Kind.TASK_RETRYING.value],
        "CKPTD_EVENT": ["task_retrying"],
        "CKPTD_TASK_ID": ["1"],
        "CKPTD_LSN": entries[2]["CKPTD_LSN"],
        "CKPTD_PHASE": ["waiting"],
        "CKPTD_ATTEMPT": ["1"],
        "CKPTD_CAUSE": ["exit"],
        "CKPTD_DURATION_US": ["250000000"],
        "CKPTD_UID": ["1000"],
    }


def test_every_task_of_a_bulk_is_found_by_its_number(world: World, tell: Tell) -> None:
    world.ask(m.Submit((m.TaskSpec(("true",), hold=True),) * 300))
    (entry,) = tell()
    assert entry["MESSAGE"] == ["300 tasks submitted by uid 1000: 1 to 300"]
    assert entry["CKPTD_TASK_ID"] == [str(number) for number in range(1, 301)]
    assert (entry["CKPTD_COUNT"], entry["CKPTD_FIRST"], entry["CKPTD_LAST"]) == (
        ["300"], ["1"], ["300"],
    )  # fmt: skip


def test_a_big_bulk_takes_more_lines_and_a_huge_one_ends_with_first_and_last(
    world: World, tell: Tell
) -> None:
    world.ask(m.Submit((m.TaskSpec(("true",), hold=True),) * 1_000))
    assert [len(entry["CKPTD_TASK_ID"]) for entry in tell()] == [LISTED_MAX, 1_000 - LISTED_MAX]
    world.ask(m.Submit((m.TaskSpec(("true",), hold=True),) * 9_000))
    entries = tell()
    assert len(entries) == BULK_LINES_MAX
    assert entries[0]["CKPTD_TASK_ID"] == [str(number) for number in range(1_001, 1_513)]
    assert len(entries[-1]["CKPTD_TASK_ID"]) == LISTED_MAX
    assert entries[-1]["CKPTD_TASK_ID"][-1] == "10000"
    assert sum(int(entry["CKPTD_COUNT"][0]) for entry in entries) == 9_000


def test_submits_of_two_users_are_two_lines(world: World, tell: Tell) -> None:
    world.submit("a", hold=True)
    world.submit("b", hold=True, caller=Caller(7, 7, admin=False))
    assert [entry["CKPTD_UID"] for entry in tell()] == [["1000"], ["7"]]


def test_a_unit_is_named_where_there_is_one(world: World, tell: Tell) -> None:
    with_unit, without = world.submit(), world.submit()
    world.begins(with_unit, invocation="ab" * 16)
    world.begins(without)
    world.ends(with_unit)
    units = {
        (entry["CKPTD_TASK_ID"][0], entry["CKPTD_EVENT"][0]): entry.get("CKPTD_UNIT")
        for entry in tell()
    }
    assert units["1", "task_started"] == units["1", "task_ended"] == ["ckptd-task-1-1.service"]
    assert units["2", "task_started"] is None


def test_what_a_power_cut_must_not_take_has_priority_2(world: World, tell: Tell) -> None:
    number = world.submit(retries=9)
    for _ in range(3):
        world.begins(number)
        world.pass_time(1)
        world.ends(number, code=1)
        world.pass_time(3_600)
    last = tell()[-1]
    assert last["CKPTD_EVENT"] == ["task_quarantined"]
    assert last["PRIORITY"] == ["2"]


def test_what_people_do_is_told_with_who_did_it(world: World, tell: Tell) -> None:
    number = world.submit()
    world.begins(number)
    tell()
    select = m.Selector(ids=(number,))
    world.ask(m.Pause(select))
    world.ask(m.Resume(select))
    world.ask(m.Signal(select, 10))
    world.ask(m.Cancel(select))
    world.ends(number, "signal", signal=15)
    assert messages(tell()) == [
        "task 1, attempt 1 frozen",
        "task 1, attempt 1 goes on",
        "task 1, attempt 1 sent signal 10 by uid 1000",
        "task 1, attempt 1 sent its stop signal (cancel) by uid 1000",
        "task 1, attempt 1 stopped by cancel (SIGTERM) after 0.0s: cancelled",
    ]


def test_a_command_that_is_not_there_is_told_with_its_errno(world: World, tell: Tell) -> None:
    number = world.submit("nothing")
    world.ends(number, "spawn_error", code=2)
    assert tell()[-1]["ERRNO"] == ["2"]


def test_tasks_that_outlived_a_daemon_are_told_in_one_line(
    world: World, story: Story, tell: Tell, journald: Journald
) -> None:
    for number in (world.submit(), world.submit()):
        world.begins(number)
    tell()
    story.adopted(world.state, world.at_ns + 1)
    (entry,) = journald.read()
    assert entry["MESSAGE"] == ["2 tasks lived on and are adopted: 1, 2"]
    assert entry["CKPTD_TASK_ID"] == ["1", "2"]
    world.ends(1)
    tell()
    story.adopted(world.state, world.at_ns + 1)
    assert journald.lines() == ["task 2, attempt 1 lived on and is adopted"]


def test_a_name_cannot_make_a_line_look_like_two(world: World, tell: Tell) -> None:
    world.submit("x", name="a\ntask 9 submitted by uid 0: evil", caller=ME)
    assert tell()[0]["MESSAGE"] == [
        "task 1 submitted by uid 1000: a\\ntask 9 submitted by uid 0: evil"
    ]
