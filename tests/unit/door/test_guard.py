"""The guard with real sockets and the descriptor numbers that libzmq would tell it."""

import fcntl
import io
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from ckptd.door.guard import RECOUNT_EVERY, Guard
from ckptd.host.journal import Journal, StreamSink

ACCEPTED, DISCONNECTED = int(zmq.Event.ACCEPTED), int(zmq.Event.DISCONNECTED)


class Door:
    """A listening socket, its connections, and the guard over them."""

    def __init__(self, path: str, per_uid: int) -> None:
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(path)
        self.listening.listen(64)
        self.guard = Guard(
            path,
            per_uid=per_uid,
            total=8,
            journal=Journal(StreamSink(io.StringIO(), prefixed=True)),
        )
        self.open: list[socket.socket] = [self.listening]

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """Return both ends; the guard has heard of it."""
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(self.listening.getsockname()))
        accepted, _ = self.listening.accept()
        self.open += [client, accepted]
        self.guard.on_event(ACCEPTED, accepted.fileno())
        return client, accepted


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    made = Door(str(tmp_path / "s"), per_uid=3)
    yield made
    for one in made.open:
        one.close()


def is_shut(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False


def test_connections_up_to_the_bound_live_and_the_next_one_is_shut_down(door: Door) -> None:
    clients = [door.connect()[0] for _ in range(4)]
    assert [is_shut(client) for client in clients] == [False, False, False, True]
    assert (door.guard.open, door.guard.refused) == (3, 1)


@pytest.mark.parametrize("is_recounted", [False, True])
def test_a_number_that_another_file_has_by_now_leaves_nothing_of_that_file_open(
    door: Door, tmp_path: Path, *, is_recounted: bool
) -> None:
    client, accepted = door.connect()
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    before = len(os.listdir("/proc/self/fd"))
    if is_recounted:
        os.dup2(fd, accepted.fileno())
        door.guard._recount(os.geteuid())
        accepted.close()
    else:
        door.guard.on_event(ACCEPTED, fd)
    os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before - 1 - is_recounted

    again = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(again)
    client.close()


def test_a_connection_that_ends_makes_room(door: Door) -> None:
    accepted = [door.connect()[1] for _ in range(3)]
    door.guard.on_event(DISCONNECTED, accepted[0].fileno())
    assert not is_shut(door.connect()[0])


def test_a_descriptor_that_is_gone_or_is_another_file_by_now_is_left_alone(door: Door) -> None:
    left, right = socket.socketpair()
    with left, right, open(os.devnull, "rb") as file:
        door.open += [door.connect()[0] for _ in range(3)]
        for fd in (left.fileno(), file.fileno(), 9_999):
            door.guard.on_event(ACCEPTED, fd)
        assert (door.guard.open, door.guard.refused) == (3, 0)
        assert not is_shut(right)


def test_ends_that_were_never_heard_of_lock_nobody_out_for_long(door: Door) -> None:
    held = [door.connect()[1] for _ in range(4)]
    unheard = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    for accepted, fd in zip(held, unheard, strict=False):
        os.dup2(fd, accepted.fileno())  # the connection is gone, its number names another file
    tries = 0
    while is_shut(door.connect()[0]):
        tries += 1
        assert tries <= RECOUNT_EVERY
    for fd in unheard:
        os.close(fd)
