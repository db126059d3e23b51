"""Output in the journal: every line once, in order, bounded, and never in anybody's way."""

import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.daemon import echo as echoes
from ckptd.daemon.echo import Echo
from ckptd.daemon.tail import BEHIND_BYTES_MAX, LINE_BYTES_MAX
from ckptd.host.clock import Clock
from ckptd.host.journal import Journal, JournaldSink, Kind
from tests.unit.core.world import World
from tests.unit.daemon.journald import Journald

SECOND = 1_000_000_000


class HandClock(Clock):
    """A clock that the test turns."""

    at_ns = SECOND

    def mono_ns(self) -> int:
        return self.at_ns


class Room:
    """A daemon's directories, a journald, and one task that asked for its output to be told."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "output").mkdir()
        self.journald = Journald(root / "socket")
        self.clock = HandClock()
        self.per_s = 1_000
        self.world = World(slots=9)
        self.number = self.world.submit("backup", journal=True)
        self.world.begins(self.number)
        self.file = root / "output" / "1.log"
        self.file.touch()
        self.sinks: list[JournaldSink] = []
        self.echo = self.opened()

    def opened(self) -> Echo:
        path = self.journald.path
        self.sinks.append(JournaldSink(path))
        journal, root = Journal(self.sinks[-1]), str(self.root)
        return Echo(root, root, JournaldSink(path), journal, self.clock, lambda: self.per_s)

    def close(self) -> None:
        self.echo.close()
        self.journald.close()
        for sink in self.sinks:
            sink.close()

    def follow(self, attempt: int = 1) -> None:
        self.echo.follow(self.world.task(self.number), attempt, "")

    def write(self, text: str) -> None:
        with self.file.open("a") as file:
            file.write(text)

    def pump(self, seconds: float = 0.2) -> list[str]:
        """Let time pass and tell; return the messages. The socket's queue may be very short."""
        found: list[str] = []
        for _ in range(round(seconds * 100)):
            self.clock.at_ns += SECOND // 100
            self.echo.pump()
            found += self.journald.lines()
        return found

    @property
    def is_readable(self) -> bool:
        return bool(select.select([self.echo.fileno()], [], [], 0)[0])


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    opened = Room(tmp_path)
    yield opened
    opened.close()


def test_lines_are_told_as_they_are_written_with_what_finds_them(room: Room) -> None:
    room.follow()
    room.write("one\ntwo\n\nthr")
    room.echo.pump()
    first, second = room.journald.read()
    assert first == {
        "MESSAGE": ["one"],
        "PRIORITY": ["6"],
        "SYSLOG_IDENTIFIER": ["ckptd/backup"],
        "MESSAGE_ID": [Kind.TASK_OUTPUT.value],
        "CKPTD_EVENT": ["task_output"],
        "CKPTD_TASK_ID": ["1"],
        "CKPTD_ATTEMPT": ["1"],
        "CKPTD_UID": ["1000"],
        "CKPTD_STREAM": ["output"],
    }
    assert second["MESSAGE"] == ["two"]
    room.write("ee\nfour\n")
    assert room.pump() == ["three", "four"]


def test_a_last_line_without_a_newline_is_told_at_the_end(room: Room) -> None:
    room.follow()
    room.write("whole\npart")
    assert room.pump() == ["whole"]
    room.echo.finish(1, 1)
    assert room.journald.lines() == ["part"]


def test_what_nobody_asked_for_is_not_told(room: Room) -> None:
    quiet = room.world.submit("journal", name="journal")
    room.world.begins(quiet)
    (room.root / "output" / "2.log").write_text("secret\n")
    room.echo.follow(room.world.task(quiet), 1, "")
    assert room.pump() == []
    assert room.echo.timeout_s(-1) == -1
    room.echo.finish(quiet, 1)
    assert room.journald.lines() == []


def test_a_silent_task_wakes_nobody(room: Room) -> None:
    room.follow()
    room.write("x\n")
    room.pump(5)
    assert not room.is_readable
    assert room.echo.timeout_s(-1) == -1
    room.write("y\n")
    assert room.is_readable


def test_between_two_looks_growth_wakes_nobody(room: Room) -> None:
    room.follow()
    room.write("x\n")
    room.echo.pump()
    room.write("y\n")
    assert not room.is_readable
    assert 0 < room.echo.timeout_s(-1) <= 0.2
    assert room.pump() == ["x", "y"]


def test_a_line_without_end_is_cut(room: Room) -> None:
    room.follow()
    room.write("a" * (2 * LINE_BYTES_MAX + 10) + "\n")
    assert [len(line) for line in room.pump()] == [LINE_BYTES_MAX, LINE_BYTES_MAX, 10]


def test_bytes_that_are_no_text_are_told_as_they_are(room: Room) -> None:
    room.follow()
    with room.file.open("ab") as file:
        file.write(b"\xff\x00=PRIORITY=0\r\n")
    assert room.pump() == ["\ufffd\x00=PRIORITY=0"]


def test_a_flood_is_told_at_the_rate_that_is_allowed_and_nothing_is_lost(room: Room) -> None:
    room.per_s = 50
    room.follow()
    wanted = [str(number) for number in range(200)]
    room.write("\n".join(wanted) + "\n")
    told = room.pump(1)
    assert told == wanted[: len(told)]
    assert 50 <= len(told) <= 100
    assert told + room.pump(4) == wanted


def test_what_lies_too_far_behind_is_left_out_and_counted(room: Room) -> None:
    room.per_s = 10
    room.follow()
    line = "z" * 99 + "\n"
    room.write(line * (BEHIND_BYTES_MAX // 100 + 1_000))
    skipped, *told = room.pump()
    assert skipped.endswith("of its output are not in the journal; `ckptctl logs 1` has them")
    assert set(told) == {line.strip()}
    assert 10 <= len(told) <= 12
    assert room.echo.stats()["output_skipped_bytes"] == int(skipped.split()[2])
    assert room.echo.stats()["output_skipped_bytes"] % 100 == 0, "a line is told whole or not"


def test_what_is_left_long_after_an_end_is_given_up(room: Room) -> None:
    room.per_s = 1
    room.follow()
    room.write("".join(f"{number}\n" for number in range(20)))
    room.pump()
    room.echo.finish(1, 1)
    told = room.pump(20)
    assert sum(line.startswith("task 1: ") for line in told) == 1
    assert room.echo.timeout_s(-1) == -1
    assert room.pump() == []


def test_a_stopped_journald_loses_no_line_of_a_task(room: Room) -> None:
    room.follow()
    wanted = [f"line {number} {'x' * 2_000}" for number in range(800)]
    room.write("\n".join(wanted) + "\n")
    for _ in range(20):  # it takes what its queue has room for, then nothing
        room.clock.at_ns += SECOND
        room.echo.pump()
    assert room.echo.timeout_s(-1) > 1, "what is refused again and again is tried less often"
    assert room.journald.lines() + room.pump(20) == wanted


def test_another_daemon_goes_on_where_the_last_one_was(room: Room) -> None:
    room.follow()
    room.write("one\ntwo\n")
    assert room.pump(2) == ["one", "two"]
    room.write("three\n")
    killed = room.echo  # as by SIGKILL: it writes nothing any more before the next one reads
    room.echo = room.opened()
    room.echo.resume(room.world.state)
    assert room.pump() == ["three"]
    killed.close()


def test_what_ended_before_it_was_told_is_told_by_the_next_daemon(room: Room) -> None:
    room.per_s = 2
    room.follow()
    room.write("1\n2\n3\n4\n")
    assert room.pump() == ["1", "2"]
    room.world.ends(1)
    room.echo.finish(1, 1)
    room.echo.close()
    room.echo = room.opened()
    room.echo.resume(room.world.state)
    assert room.pump() == ["3", "4"]
    assert room.pump(2) == []
    again = room.opened()
    again.resume(room.world.state)
    again.pump()
    assert room.journald.lines() == []
    again.close()


def test_the_next_attempt_is_told_from_its_beginning_and_the_markers_are_not(room: Room) -> None:
    room.write("--- ckptd: attempt 1 started 2026-11-20T20:44:52Z ---\nold\n")
    room.write("--- ckptd: attempt 1 ended 2026-11-20T20:44:53Z, exit code 3 ---\n")
    room.write("--- ckptd: attempt 2 started 2026-11-20T20:44:54Z ---\nnew\n")
    room.follow(attempt=2)
    assert room.pump() == ["new"]


def test_what_the_next_attempt_writes_is_not_told_as_the_last_ones(room: Room) -> None:
    room.per_s = 2
    room.follow()
    room.write("1\n2\n3\n4\n--- ckptd: attempt 1 ended 2026-11-20T20:44:53Z, exit code 3 ---\n")
    room.write("--- ckptd: attempt 2 started 2026-11-20T20:44:54Z ---\nnew\n")
    room.echo.finish(1, 1)
    room.follow(attempt=2)
    told = []
    for _ in range(400):
        room.clock.at_ns += SECOND // 100
        room.echo.pump()
        told += [(*entry["CKPTD_ATTEMPT"], *entry["MESSAGE"]) for entry in room.journald.read()]
    assert sorted(told) == [("1", "1"), ("1", "2"), ("1", "3"), ("1", "4"), ("2", "new")]
    room.echo.finish(1, 2)


def test_a_marker_that_a_task_makes_up_ends_nothing(room: Room) -> None:
    room.follow()
    room.write("a\n--- ckptd: attempt 9 started 2026-11-20T20:44:54Z ---\nb\n")
    assert room.pump() == ["a", "b"]


def test_a_task_that_truncates_its_output_harms_only_itself(room: Room) -> None:
    room.follow()
    room.write("before\n")
    assert room.pump() == ["before"]
    os.truncate(room.file, 0)
    room.write("a\n")
    assert room.pump() == ["a"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/etc/passwd", path)])
def test_what_is_no_regular_file_is_not_followed(room: Room, make: Callable[[Path], None]) -> None:
    room.file.unlink()
    make(room.file)
    room.follow()
    (line,) = room.pump()
    assert "its output cannot be told" in line


def test_without_journald_nothing_is_followed(room: Room) -> None:
    os.unlink(room.journald.path)
    room.follow()
    room.write("x\n")
    room.echo.pump()
    assert room.echo.stats() == {"output_lines": 0, "output_skipped_bytes": 0}


def test_without_a_watch_the_output_is_told_at_the_end(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(echoes.linux, "inotify", refuse)
    room.follow()
    assert "told at its end" in room.pump()[0]
    room.write("late\n")
    room.echo.finish(1, 1)
    assert room.journald.lines() == ["late"]


def test_a_name_lends_itself_no_trust(room: Room) -> None:
    number = room.world.submit("x", name="sshd\nroot hat", journal=True)
    room.world.begins(number)
    (room.root / "output" / "2.log").write_text("y\n")
    room.echo.follow(room.world.task(number), 1, "")
    room.clock.at_ns += SECOND
    room.echo.pump()
    (entry,) = room.journald.read()
    assert entry["SYSLOG_IDENTIFIER"] == ["ckptd/sshd_root_hat"]


def test_many_tasks_take_turns(room: Room) -> None:
    for number in range(2, 6):
        room.world.submit("x", journal=True)
        room.world.begins(number)
        (room.root / "output" / f"{number}.log").write_text("y\n" * 400)
        room.echo.follow(room.world.task(number), 1, "")
    told: dict[str, int] = {}
    for _ in range(2_000):
        room.clock.at_ns += SECOND // 100
        room.echo.pump()
        for entry in room.journald.read():
            (task,) = entry["CKPTD_TASK_ID"]
            told[task] = told.get(task, 0) + 1
    assert told == {"2": 400, "3": 400, "4": 400, "5": 400}


def test_a_task_that_says_nothing_gets_what_the_daemon_has() -> None:
    by_default = {is_on: World(journal=is_on) for is_on in (True, False)}
    for is_on, world in by_default.items():
        said = world.submit("x", journal=not is_on)
        assert world.task(world.submit("x")).unpacked().journal is is_on
        assert world.task(said).unpacked().journal is not is_on


def test_positions_that_are_no_text_do_not_stop_the_next_daemon(room: Room) -> None:
    room.follow()
    room.write("1\n")
    assert room.pump() == ["1"]
    room.echo.close()
    (room.root / echoes.TOLD_NAME).write_bytes(b'{"\xff":1}')
    room.echo = room.opened()
    room.echo.resume(room.world.state)
    assert room.pump() == ["1"]
