"""The delay lock of logind: held from the start until the tasks of an announced shutdown ended."""

import os
from collections.abc import Callable, Iterator

import pytest

from ckptd.core.records import Phase
from ckptd.daemon.inhibitor import ASK_AGAIN_NS, Inhibitor
from tests.unit.daemon.day import GRACE_S, Day


class Logind:
    """Gives locks as logind does: the end of a pipe, whose other end tells when it is closed."""

    def __init__(self) -> None:
        self.asked: list[Callable[[int], None]] = []
        self.watched: list[int] = []

    def inhibit(self, then: Callable[[int], None]) -> None:
        self.asked.append(then)

    def give(self) -> None:
        here, there = os.pipe()
        os.set_blocking(here, False)
        self.watched.append(here)
        self.asked.pop(0)(there)

    def is_held(self) -> bool:
        """Whether any lock is still open."""
        return any(self._is_open(fd) for fd in self.watched)

    @staticmethod
    def _is_open(fd: int) -> bool:
        try:
            return os.read(fd, 1) != b""
        except BlockingIOError:
            return True


@pytest.fixture
def logind() -> Iterator[Logind]:
    found = Logind()
    yield found
    for fd in found.watched:
        os.close(fd)


def locked(day: Day, logind: Logind) -> Inhibitor:
    inhibitor = Inhibitor(day.ending)
    inhibitor.inhibit = logind.inhibit
    inhibitor.keep(1)
    logind.give()
    return inhibitor


def test_the_lock_is_held_until_the_last_task_of_an_announced_shutdown_has_ended(
    day: Day, logind: Logind
) -> None:
    inhibitor = locked(day, logind)
    number = day.running("deaf")
    inhibitor.announced(True)
    day.turn()
    assert logind.is_held()
    day.turn(after_s=GRACE_S)
    day.until(lambda: not logind.is_held())
    assert day.task(number).phase is Phase.QUEUED
    assert not day.ending.is_over


def test_a_shutdown_that_was_called_off_is_waited_for_the_next_time(
    day: Day, logind: Logind
) -> None:
    inhibitor = locked(day, logind)
    number = day.running()
    inhibitor.announced(True)
    day.until(lambda: not logind.is_held())
    inhibitor.keep(ASK_AGAIN_NS * 2)
    assert not logind.asked  # not in the middle of it
    inhibitor.announced(False)
    inhibitor.keep(ASK_AGAIN_NS * 2)
    logind.give()
    assert logind.is_held()
    day.until(lambda: day.task(number).phase is Phase.RUNNING)
    inhibitor.release()


def test_where_there_is_no_lock_it_is_asked_for_again_later(day: Day, logind: Logind) -> None:
    inhibitor = Inhibitor(day.ending)
    inhibitor.inhibit = logind.inhibit
    inhibitor.keep(1)
    logind.asked.pop()(-1)
    inhibitor.keep(2)
    assert not logind.asked
    inhibitor.keep(2 + ASK_AGAIN_NS)
    inhibitor.announced(True)
    logind.give()  # too late: it would only hold the shutdown up
    assert not logind.is_held()
