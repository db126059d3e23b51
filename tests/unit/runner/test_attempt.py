"""The start fence and the record of an attempt, byte by byte."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from ckptd.runner import attempt, identity, stop
from ckptd.runner.attempt import End, Found, Holder, Order, Record
from ckptd.runner.instance import Began, began_of, exit_of
from ckptd.runner.shim import Supervisor
from tests.fakes.durable_image import DurableImage

CLAIM = Holder("b", 10, 20).claim
EXIT = End("exit", code=3).line(7, 2)


@pytest.fixture
def attempts(tmp_path: Path) -> str:
    attempt.begin_reign(str(tmp_path), "token")
    return str(tmp_path)


def test_the_second_claim_of_an_attempt_is_refused_and_changes_nothing(attempts: str) -> None:
    place = attempt.place_of(attempts, 7, 2)
    first = Record(attempts, place, "token.1", CLAIM)
    second = Record(attempts, place, "token.2", Holder("other", 1, 2).claim)

    assert first.take()
    assert not second.take()

    found = attempt.read(place)
    assert found is not None
    assert found.claim == CLAIM.splitlines()[0]
    first.close()
    second.close()


def test_a_recycled_record_says_nothing_of_its_former_attempt(attempts: str) -> None:
    directory = os.open(attempts, os.O_RDONLY)
    for number in (1, 2):
        record = Record(attempts, attempt.place_of(attempts, 7, number), "token.1", CLAIM)
        assert record.take()
        found = attempt.read(record.place)
        assert found is not None
        assert (found.start, found.exit) == (None, None)

        record.write_start(CLAIM)
        record.write_exit(EXIT, directory)
        record.close()
        found = attempt.read(record.place)
        assert found is not None
        assert found.exit == EXIT.splitlines()[0]
        attempt.forget(record.place)
        assert attempt.read(record.place) is None
    os.close(directory)


def test_a_record_cut_or_changed_at_any_byte_is_no_record() -> None:
    line = EXIT.splitlines()[0]
    assert attempt.checked(EXIT + bytes(100)) == line

    for length in range(len(EXIT) - 1):
        assert attempt.checked(EXIT[:length].ljust(200, b"\0")) is None
    for index in range(len(EXIT) - 1):
        for bit in range(8):
            garbled = bytearray(EXIT)
            garbled[index] ^= 1 << bit
            assert attempt.checked(bytes(garbled)) is None


def test_an_empty_file_is_a_record_that_says_nothing() -> None:
    found = Found(b"")

    assert (found.claim, found.start, found.exit) == (None, None, None)


@pytest.mark.parametrize(
    "text",
    ["", "plain", 'quote " and \\', "new\nline\t\x7f", "ünïcödé \u2192", "\ud800", "x" * 9_999],
)
def test_any_text_makes_valid_json_that_fits_its_place(text: str) -> None:
    record = End("spawn_error", code=2, text=text).line(7, 2)

    read = exit_of(attempt.checked(record))

    assert len(record) <= 2_048
    assert read is not None
    assert (read.task, read.attempt, read.cause, read.code) == (7, 2, "spawn_error", 2)
    if text.isprintable() and len(text) < 200:
        assert read.text == text


def test_claims_and_starts_are_read_as_they_were_written() -> None:
    holder = Holder("boot", 10, 20)

    claim = began_of(attempt.checked(holder.claim))
    start = began_of(attempt.checked(holder.start(30, 40, 50, 60)))

    assert claim == Began("boot", 10, 20)
    assert start == Began("boot", 10, 20, 30, 40, 50, 60)


def test_a_new_reign_revokes_the_old_one_and_its_spare_records(attempts: str) -> None:
    place = attempt.place_of(attempts, 7, 1)
    unread = Record(attempts, place, "token.1", CLAIM)

    attempt.begin_reign(attempts, "next")

    assert not attempt.is_reigning(attempts, "token")
    assert attempt.is_reigning(attempts, "next")
    with pytest.raises(FileNotFoundError):
        unread.take()
    unread.close()


def test_an_order_comes_out_as_it_went_in() -> None:
    order = Order()
    for name in Order.__slots__:
        setattr(order, name, name)
    order.argv, order.programs, order.groups = b"sh\0-c", (b"/bin/sh",), (1, 2)

    again = Order.unpack(order.pack())

    assert all(getattr(again, name) == getattr(order, name) for name in Order.__slots__)


def test_an_exit_record_that_was_kept_survives_the_power(
    attempts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = DurableImage(Path(attempts), monkeypatch)
    directory = os.open(attempts, os.O_RDONLY)
    record = Record(attempts, attempt.place_of(attempts, 7, 2), "token.1", CLAIM)
    assert record.take()
    record.write_start(Holder("b", 10, 20).start(11, 21, 5, 0))
    record.write_exit(EXIT, directory)
    image.cut()
    found = attempt.read(record.place)
    assert found is not None
    assert found.exit == EXIT.splitlines()[0]
    record.close()
    os.close(directory)
    image.close()


def test_a_process_that_has_the_pid_of_a_dead_one_is_not_taken_for_it() -> None:
    pid = os.getpid()
    ticks = identity.ticks_of(pid)
    os.close(identity.open_exactly(pid, ticks))
    assert identity.open_exactly(pid, ticks - 1) == -1


class Daemons:
    """The daemon's end of a supervisor's link: notes what is on disk when it is told something."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.told: list[tuple[bytes, bytes | None]] = []

    def send(self, message: bytes) -> None:
        found = attempt.read(self.place)
        self.told.append((message[:1], found.exit if found else None))


def test_an_end_is_told_once_and_its_record_is_there_by_then(attempts: str) -> None:
    place = attempt.place_of(attempts, 7, 2)
    order = Order()
    order.task, order.attempt = 7, 2
    supervisor = object.__new__(Supervisor)
    link = Daemons(place)
    supervisor.link, supervisor.is_sound = link, True  # type: ignore[assignment]
    supervisor.attempts = os.open(attempts, os.O_RDONLY)
    record = Record(attempts, place, "token.1", CLAIM)
    assert record.take()
    supervisor._keep(order, record, End("exit", code=3))
    assert link.told == [(b"E", EXIT.splitlines()[0])]
    record.close()
    os.close(supervisor.attempts)


def test_a_signal_to_a_pid_that_was_used_again_reaches_nobody() -> None:
    number = signal.SIGUSR1
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})  # whom we start inherits it
    try:
        child = subprocess.Popen(["/bin/sleep", "60"])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with child:
        try:
            ticks = identity.ticks_of(child.pid)
            stop.send(child.pid, ticks - 1, number)
            assert _pending(child.pid) == 0
            stop.send(child.pid, ticks, number)
            assert _pending(child.pid) == 1 << (number - 1)
        finally:
            child.kill()


def _pending(pid: int) -> int:
    """Return the signals that wait for a process that blocks them, as a mask."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("ShdPnd:")[2].split()[0], 16)
