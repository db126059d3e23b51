"""What systemd hears: right words, in UTF-8, never a wait, and nothing left for children."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.host.clock import Clock
from ckptd.host.notify import Notify


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", listening.getsockname())
        yield listening


@pytest.fixture
def notify(manager: socket.socket) -> Iterator[Notify]:
    opened = Notify(os.environ, Clock())
    yield opened
    opened.close()


def heard(manager: socket.socket) -> str:
    return manager.recv(4096).decode()


def test_the_life_of_a_daemon_is_told_in_the_managers_words(
    manager: socket.socket, notify: Notify
) -> None:
    assert notify.connected
    notify.extend_timeout(1.5)
    assert heard(manager) == "EXTEND_TIMEOUT_USEC=1500000"
    notify.ready("3 tasks")
    assert heard(manager) == "READY=1\nSTATUS=3 tasks"
    notify.reloading()
    assert heard(manager).startswith("RELOADING=1\nMONOTONIC_USEC=")
    notify.stopping("bye")
    assert heard(manager) == "STOPPING=1\nSTATUS=bye"
    notify.failed("disk is full", 28)
    assert heard(manager) == "STATUS=disk is full\nERRNO=28"


def test_a_status_is_one_line_of_utf8_and_sent_only_when_it_changes(
    manager: socket.socket, notify: Notify
) -> None:
    for text in ("prêt →", "prêt →", "two\nREADY=1"):
        notify.status(text)
    assert heard(manager) == "STATUS=prêt →"
    assert heard(manager) == "STATUS=two READY=1"


def test_the_watchdog_is_fed_three_times_as_often_as_asked(manager: socket.socket) -> None:
    os.environ["WATCHDOG_USEC"], os.environ["WATCHDOG_PID"] = "30000000", str(os.getpid())
    notify = Notify(os.environ, Clock())
    assert notify.watchdog_s == 10.0
    notify.alive()
    assert heard(manager) == "WATCHDOG=1"
    notify.close()


@pytest.mark.parametrize(
    "env", [{}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}]
)
def test_nobody_watches_where_the_variables_are_not_for_us(env: dict[str, str]) -> None:
    assert Notify(dict(env), Clock()).watchdog_s == 0.0


def test_the_variables_are_gone_so_that_no_child_speaks_in_our_name(manager: socket.socket) -> None:
    os.environ["WATCHDOG_USEC"] = "1"
    Notify(os.environ, Clock()).close()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)


def test_a_manager_that_does_not_read_costs_messages_and_no_time(notify: Notify) -> None:
    for number in range(10_000):
        notify.status(str(number))
    assert notify.lost > 0


def test_without_a_manager_every_call_is_a_no_op() -> None:
    notify = Notify({}, Clock())
    notify.ready("x")
    notify.alive()
    assert not notify.connected
