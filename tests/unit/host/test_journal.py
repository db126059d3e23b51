"""The journal: journald's own protocol, honest drops, and lines that people can read."""

import array
import io
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from ckptd.host import journal
from ckptd.host.journal import (
    DEBUG,
    ERROR,
    KEPT_BYTES_MAX,
    Journal,
    JournaldSink,
    Kind,
    StreamSink,
)


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    """What journald is to a sender: a datagram socket with a short queue."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.settimeout(5)
        yield listening


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[JournaldSink]:
    opened = JournaldSink(str(tmp_path / "socket"))
    yield opened
    opened.close()


def parse(entry: bytes) -> dict[str, str]:
    """Read an entry as journald does."""
    fields: dict[str, str] = {}
    while entry:
        line, _, entry = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", entry[:8])
            value, entry = entry[8 : 8 + size], entry[8 + size + 1 :]
        fields[name.decode()] = value.decode()
    return fields


def test_an_event_carries_its_fields_and_the_id_of_its_kind(
    journald: socket.socket, sink: JournaldSink
) -> None:
    told = Journal(sink)
    told.event(Kind.TASK_ENDED, "task 7 ended", ERROR, task_id=7, duration_us=12, errno=5)
    fields = parse(journald.recv(4096))
    assert fields == {
        "MESSAGE": "task 7 ended",
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "ckptd",
        "MESSAGE_ID": Kind.TASK_ENDED.value,
        "CKPTD_EVENT": "task_ended",
        "CKPTD_TASK_ID": "7",
        "CKPTD_DURATION_US": "12",
        "ERRNO": "5",
    }


@pytest.mark.parametrize("text", ["two\nlines", "\n", "PRIORITY=0\nMESSAGE=fake", "žluť \udc80"])
def test_no_value_can_forge_another_field(
    journald: socket.socket, sink: JournaldSink, text: str
) -> None:
    Journal(sink).note(text, task=text)
    fields = parse(journald.recv(65_536))
    readable = text.encode(errors="backslashreplace").decode()
    assert (fields["MESSAGE"], fields["CKPTD_TASK"]) == (readable, readable)
    assert (fields["PRIORITY"], len(fields)) == ("6", 6)


def test_a_line_too_big_for_a_datagram_travels_as_a_sealed_file(
    journald: socket.socket, sink: JournaldSink
) -> None:
    Journal(sink).note("x" * (8 << 20))
    data, ancillary, _, _ = journald.recvmsg(16, 64)
    assert data == b""
    ((_, _, raw),) = ancillary
    (fd,) = array.array("i", raw)
    with open(fd, "rb") as file:
        file.seek(0)
        assert parse(file.read())["MESSAGE"] == "x" * (8 << 20)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)


def drained(journald: socket.socket) -> list[str]:
    """Read what lies in the socket; return the messages."""
    journald.setblocking(False)
    found = []
    with suppress(BlockingIOError):
        while True:
            found.append(parse(journald.recv(65_536))["MESSAGE"])
    return found


def test_lines_wait_for_a_journald_that_is_busy(
    journald: socket.socket, sink: JournaldSink
) -> None:
    told = Journal(sink)
    wanted = [f"line {number}" for number in range(1_000)]
    for line in wanted:
        told.note(line)
    assert not told.flush()
    found = drained(journald)
    while not told.flush():
        found += drained(journald)
    assert found + drained(journald) == wanted
    assert told.dropped_ever == 0


def test_a_journald_that_does_not_read_costs_lines_that_are_told_later(
    journald: socket.socket, sink: JournaldSink
) -> None:
    told = Journal(sink)
    sent = 0
    while told.dropped < 3:
        told.note("fill" * 1_000)
        sent += 1
    assert sent * 4_000 > KEPT_BYTES_MAX
    found = drained(journald)
    while not told.flush():
        found += drained(journald)
    found += drained(journald)
    assert len(found) == sent - 3 + 1
    assert found[-1].startswith("3 lines were dropped")
    assert (told.dropped, told.dropped_ever) == (0, 3)


def test_a_restarted_journald_is_found_again(tmp_path: Path, sink: JournaldSink) -> None:
    path = str(tmp_path / "socket")
    told = Journal(sink)
    told.note("nobody listens")
    assert not told.flush()
    for wanted in (["nobody listens", "here"], ["here"]):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
            listening.bind(path)
            told.note("here")
            assert drained(listening) == wanted
        os.unlink(path)


def test_lines_below_the_level_are_not_told(journald: socket.socket, sink: JournaldSink) -> None:
    told = Journal(sink, "error")
    told.note("info")
    told.event(Kind.NOTE, "debug", DEBUG)
    told.event(Kind.NOTE, "error", ERROR)
    assert parse(journald.recv(4096))["MESSAGE"] == "error"


def test_a_terminal_gets_words_and_systemd_gets_priorities() -> None:
    plain, prefixed = io.StringIO(), io.StringIO()
    fields: Mapping[str, int] = {"task_id": 7}
    StreamSink(plain, prefixed=False).send(Kind.NOTE, "a\nb", 4, fields)
    StreamSink(prefixed, prefixed=True).send(Kind.NOTE, "a\nb", 4, fields)
    assert plain.getvalue()[8:] == " warning a\\nb task_id=7\n"
    assert prefixed.getvalue() == "<4>a\\nb task_id=7\n"
    terminal = io.StringIO()
    StreamSink(terminal, prefixed=False, indented=True).send(Kind.NOTE, "a\nb", 4, fields)
    assert terminal.getvalue()[8:] == " warning a\n                 b task_id=7\n"


@pytest.mark.parametrize(
    ("told", "seen"),
    [
        ("x is in use\n  stop it", "x is in use; stop it"),
        ("Traceback:\n  File a\n    raise", "Traceback:\\n  File a\\n    raise"),
        ("a\nb\n  c", "a\\nb\\n  c"),
        ("a\n12:30:01 error forged", "a\\n12:30:01 error forged"),
    ],
)
def test_in_a_file_a_hint_is_joined_to_what_failed_and_every_other_newline_is_escaped(
    told: str, seen: str
) -> None:
    file = io.StringIO()
    StreamSink(file, prefixed=False).send(Kind.NOTE, told, 4, {})
    assert file.getvalue()[8:] == f" warning {seen}\n"


def test_a_stream_that_is_gone_costs_lines_and_nothing_else() -> None:
    read, write = os.pipe()
    os.close(read)
    stream = open(write, "w", encoding="utf-8")  # noqa: SIM115 - closed below, where it fails
    told = Journal(StreamSink(stream, prefixed=True))
    told.note("nobody reads")
    assert told.dropped == 1
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_journald_is_used_only_where_the_stream_is_the_one_it_named(tmp_path: Path) -> None:
    left, right = socket.socketpair()
    with left, right, open(os.dup(left.fileno()), "w", encoding="utf-8") as stream:
        status = os.fstat(stream.fileno())
        env = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert journal._leads_to_journald(env, stream.fileno())
        assert not journal._leads_to_journald({"JOURNAL_STREAM": "1:2"}, stream.fileno())
    with open(tmp_path / "file", "w", encoding="utf-8") as stream:
        assert not journal._leads_to_journald(env, stream.fileno())


def test_every_kind_has_an_id_of_its_own() -> None:
    assert len({kind.value for kind in Kind}) == len(list(Kind)) == len(Kind.__members__)
    assert all(len(kind.value) == 32 and int(kind.value, 16) for kind in Kind)
