"""The listening socket: bound anew, kept by a service manager, or made by ckptd.socket.

The service manager here is a real socket that takes descriptors, as PID 1 does.
"""

import contextlib
import errno
import io
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.door.listen import GIVEN, Handed, Listening, clear_path, listen, take_descriptors
from ckptd.host.clock import Clock
from ckptd.host.config import Ipc
from ckptd.host.journal import Journal, StreamSink
from ckptd.host.notify import Notify
from ckptd.protocol.errors import Busy, Internal
from tests.raw_client import RawClient
from tests.unit.daemon.desk import Desk

IPC = Ipc(group="", mode="0600")


class Keeper:
    """What PID 1 is to a service: it keeps descriptors by name and hands them to the next one."""

    def __init__(self, directory: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(f"{directory}/notify")
        self.socket.settimeout(5)
        self.kept: dict[str, int] = {}
        os.environ["NOTIFY_SOCKET"] = f"{directory}/notify"
        self.notify = Notify({**os.environ, "SYSTEMD_EXEC_PID": str(os.getpid())}, Clock())
        del os.environ["NOTIFY_SOCKET"]

    def hear(self) -> str:
        """Take one message in; returns it."""
        data, fds, _, _ = socket.recv_fds(self.socket, 4_096, 4)
        lines = dict(line.split("=", 1) for line in data.decode().splitlines())
        name = lines.get("FDNAME", "")
        if lines.get("FDSTORE") == "1":
            (self.kept[name],) = fds
        elif lines.get("FDSTOREREMOVE") == "1":
            os.close(self.kept.pop(name))
        return data.decode()

    def handed(self) -> list[Handed]:
        return [Handed(name, os.dup(fd)) for name, fd in self.kept.items()]

    def close(self) -> None:
        self.notify.close()
        self.socket.close()
        for fd in self.kept.values():
            os.close(fd)


@pytest.fixture
def directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ck-", dir="/tmp") as found:
        yield found


@pytest.fixture
def keeper(directory: str) -> Iterator[Keeper]:
    found = Keeper(directory)
    yield found
    found.close()


def journal(told: io.StringIO | None = None) -> Journal:
    return Journal(StreamSink(told or io.StringIO(), prefixed=True))


def first_life(path: str, keeper: Keeper) -> None:
    """A daemon that binds, has its socket kept, and is gone."""
    listening = listen(path, IPC, [], journal())
    listening.is_kept = keeper.notify.keep(listening.name, listening.fileno())
    assert keeper.hear() == f"FDSTORE=1\nFDNAME={listening.name}\nFDPOLL=0"
    listening.close()


def serves(listening: Listening) -> bool:
    """Whether a client that connects to the path reaches this very socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(listening.path)
        with socket.socket(fileno=listening.copy()) as accepting:
            accepting.accept()[0].close()
            return True


def systemd_socket(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(path)
    made.listen(64)
    return made


# --- a path of our own --------------------------------------------------------------------------


def test_a_socket_left_behind_is_replaced_and_a_live_one_is_not(directory: str) -> None:
    path = f"{directory}/deeper/ctl.sock"
    clear_path(path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    listening = listen(path, IPC, [], journal())
    assert serves(listening)
    with pytest.raises(Busy, match="another process answers"):
        clear_path(path)
    listening.close()
    assert not Path(path).exists()
    Path(path).write_text("no socket")
    with pytest.raises(Internal, match="in the way"):
        clear_path(path)
    assert Path(path).read_text() == "no socket"


def test_a_live_socket_whose_queue_is_full_is_no_free_path_and_keeps_nobody_waiting(
    directory: str,
) -> None:
    path = f"{directory}/ctl.sock"
    with socket.socket(socket.AF_UNIX) as busy, contextlib.ExitStack() as waiting:
        busy.bind(path)
        busy.listen(0)
        clients = [waiting.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(9)]
        for client in clients:  # the kernel takes one more than the backlog
            client.setblocking(False)
        assert errno.EAGAIN in {client.connect_ex(path) for client in clients}
        with pytest.raises(Busy, match="another process answers"):
            clear_path(path)
        assert Path(path).exists()


def test_a_path_that_was_removed_is_bound_again_and_one_that_is_kept_never(
    directory: str,
) -> None:
    path = f"{directory}/run/ctl.sock"
    listening = listen(path, IPC, [], journal())
    assert not listening.is_lost
    shutil.rmtree(f"{directory}/run")
    assert listening.is_lost
    listening.renew(IPC, journal())
    assert not listening.is_lost
    assert serves(listening)
    Path(path).unlink()
    with systemd_socket(path):  # somebody else's now
        with pytest.raises(Busy):
            listening.renew(IPC, journal())
        assert listening.is_lost
        listening.is_kept = True
        assert not listening.is_lost
    listening.close()


def test_a_path_that_does_not_fit_a_socket_address_says_so() -> None:
    with pytest.raises(Internal, match=r"socket path of 1\d+ bytes"):
        clear_path("/tmp/" + "x" * 99 + "/ctl.sock")


def test_a_path_that_somebody_else_took_meanwhile_is_not_removed(directory: str) -> None:
    path = f"{directory}/ctl.sock"
    listening = listen(path, IPC, [], journal())
    Path(path).unlink()
    with systemd_socket(path):
        listening.close()
        assert Path(path).exists()


# --- kept by the service manager ------------------------------------------------------------------


def test_requests_sent_while_no_daemon_runs_wait_in_the_kept_socket(
    directory: str, keeper: Keeper
) -> None:
    path = f"{directory}/ctl.sock"
    first_life(path, keeper)
    with RawClient(f"ipc://{path}") as client:
        client.send("ping", {})  # nobody is there
        listening = listen(path, IPC, keeper.handed(), journal())
        assert listening.is_kept
        desk = Desk(IPC, path, listening=listening)
        try:
            assert client.socket.poll(5_000)
        finally:
            desk.close()
    third = listen(path, IPC, keeper.handed(), journal())  # and so on, life after life
    assert serves(third)
    third.close()
    assert Path(path).exists()


def test_the_rights_of_a_kept_socket_follow_the_configuration(
    directory: str, keeper: Keeper
) -> None:
    path = f"{directory}/ctl.sock"
    first_life(path, keeper)
    assert Path(path).stat().st_mode & 0o777 == 0o600
    listen(path, Ipc(group="", mode="0700"), keeper.handed(), journal()).close()
    assert Path(path).stat().st_mode & 0o777 == 0o700


def test_a_kept_socket_whose_path_is_gone_or_another_ones_is_given_up(
    directory: str, keeper: Keeper
) -> None:
    path = f"{directory}/ctl.sock"
    first_life(path, keeper)
    (old,) = keeper.kept
    Path(path).unlink()
    listening = listen(path, IPC, keeper.handed(), journal())
    assert (listening.is_kept, listening.stale) == (False, [old])
    assert serves(listening)
    keeper.notify.drop(old)
    assert keeper.hear() == f"FDSTOREREMOVE=1\nFDNAME={old}"
    assert not keeper.kept
    listening.close()


def test_the_socket_of_systemd_wins_over_a_kept_one(directory: str, keeper: Keeper) -> None:
    path = f"{directory}/ctl.sock"
    first_life(path, keeper)
    (old,) = keeper.kept
    Path(path).unlink()  # systemd does so where ckptd.socket starts
    with systemd_socket(path) as made:
        handed = [*keeper.handed(), Handed(GIVEN, os.dup(made.fileno()))]
        listening = listen(path, IPC, handed, journal())
        assert (listening.is_ours, listening.stale) == (False, [old])
        assert serves(listening)
        listening.close()
        assert Path(path).exists()


def test_without_a_manager_nothing_is_kept_and_a_deaf_one_costs_no_more_than_a_moment(
    directory: str, keeper: Keeper
) -> None:
    assert not Notify({}, Clock()).keep("ctl.1", 0)
    keeper.socket.close()
    assert not keeper.notify.keep("ctl.1", 0)
    assert keeper.notify.lost == 1


def test_one_who_listens_to_notifications_but_is_not_systemd_keeps_nothing(
    directory: str, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", f"{directory}/notify")
    notify = Notify(os.environ, Clock())
    assert notify.connected
    assert not notify.keep("ctl.1", 0)
    notify.close()


# --- made by ckptd.socket -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ctl", "", "unknown", "ckptd.socket"])
def test_a_listening_socket_of_systemd_is_taken_over_and_kept(directory: str, name: str) -> None:
    path = f"{directory}/ctl.sock"
    with systemd_socket(path) as made:
        listening = listen(path, IPC, [Handed(name, os.dup(made.fileno()))], journal())
        desk = Desk(IPC, path, listening=listening)
        try:
            with RawClient(desk.endpoint) as client:
                client.ask("ping")
        finally:
            desk.close()
        assert Path(path).exists()


def test_a_socket_of_systemd_is_never_lost_to_us(directory: str) -> None:
    """Bound anew by us, it would be another one than ckptd.socket starts the next daemon by."""
    path = f"{directory}/ctl.sock"
    with systemd_socket(path) as made:
        listening = listen(path, IPC, [Handed(GIVEN, os.dup(made.fileno()))], journal())
        Path(path).unlink()
        assert not listening.is_lost
        listening.close()


def test_a_socket_of_systemd_at_another_place_is_a_mistake_that_is_named(directory: str) -> None:
    with systemd_socket(f"{directory}/ctl.sock") as made:
        handed = [Handed(GIVEN, os.dup(made.fileno()))]
        with pytest.raises(Internal, match="handed over a socket at"):
            listen(f"{directory}/other.sock", IPC, handed, journal())
        os.close(handed[0].fd)


def test_descriptors_that_nobody_asked_for_are_closed_and_told(directory: str) -> None:
    told = io.StringIO()
    ends = os.pipe()
    handed = [Handed("surprise", ends[0]), Handed("", ends[1])]
    listen(f"{directory}/ctl.sock", IPC, handed, journal(told)).close()
    assert "dropped a descriptor called 'surprise'" in told.getvalue()
    for fd in ends:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_variables_of_another_processes_activation_are_dropped_unheeded() -> None:
    env = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "ctl", "HOME": "/"}
    assert take_descriptors(env) == []
    assert env == {"HOME": "/"}


def test_no_descriptors_are_none() -> None:
    for count in ("0", "", "x"):
        assert take_descriptors({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count}) == []
