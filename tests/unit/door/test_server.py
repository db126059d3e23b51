"""The control socket against real clients: good, clumsy, broken and rude ones."""

import errno
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from ckptd.door.listen import Listening, listen
from ckptd.door.server import FRAME_BYTES_MAX, UNREAD_BYTES_MAX, Server
from ckptd.host.config import Ipc
from ckptd.host.journal import Journal, StreamSink
from ckptd.protocol import limits
from ckptd.protocol.errors import Internal
from tests.raw_client import RawClient
from tests.unit.daemon.desk import Desk, open_desk
from tests.waiting import until

NOBODY = 65_534
GREETING = bytes.fromhex("ff00000000000000017f0300") + b"NULL".ljust(20, b"\0") + bytes(32)


def answer_to(client: RawClient, *frames: bytes) -> dict[str, Any]:
    client.socket.send_multipart(frames)
    assert client.socket.poll(5_000), f"no answer to {frames!r:.80}"
    reply: dict[str, Any] = json.loads(client.socket.recv_multipart()[-1])
    return reply


def test_a_request_reaches_the_loop_with_the_kernels_word_on_who_asks(desk: Desk) -> None:
    with RawClient(desk.endpoint) as client:
        client.ask("ping")
    (seen,) = desk.seen
    assert seen.peer == (os.geteuid(), os.getegid(), os.getpid())
    assert (seen.verb, seen.delimiter) == ("ping", False)


def test_a_req_socket_with_its_empty_delimiter_is_served_too(desk: Desk) -> None:
    with zmq.Context() as context, context.socket(zmq.REQ) as client:
        client.linger = 0
        client.connect(desk.endpoint)
        for number in range(3):
            client.send(b'{"v":1,"id":"%d","verb":"ping"}' % number)
            assert client.poll(5_000)
            assert json.loads(client.recv())["id"] == str(number)
    assert all(request.delimiter for request in desk.seen)


@pytest.mark.parametrize(
    ("frame", "code", "named"),
    [
        (b"", "bad_request", ""),
        (b"{", "bad_request", ""),
        (b"[" * 100_000, "bad_request", ""),
        (b'{"v":1,"id":"\x80","verb":"ping"}', "bad_request", ""),
        (b'{"v":1,"id":"e","verb":"\xff"}', "bad_request", "e"),
        (
            b'{"v":1,"id":"f","verb":"show","args":{"select":{"keys":["\xed\xa0\x80"]}}}',
            "bad_request",
            "f",
        ),
        (b'{"v":1}', "bad_request", ""),
        (b'{"v":2,"id":"a","verb":"ping"}', "protocol_mismatch", "a"),
        (b'{"v":1,"id":"b","verb":"dance"}', "bad_request", "b"),
        (b'{"v":1,"id":"c","verb":"status","args":{"limit":0}}', "bad_request", "c"),
        (b'{"v":1,"id":"d","verb":"ping","args":{"tpyo":1}}', "bad_request", "d"),
        (b'{"v":1,"id":"%s","verb":"ping"}' % (b"x" * 65), "bad_request", ""),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_malformed_request_is_answered_under_its_id_and_never_reaches_the_loop(
    desk: Desk, frame: bytes, code: str, named: str
) -> None:
    with RawClient(desk.endpoint) as client:
        reply = answer_to(client, frame)
        assert (reply["ok"], reply["error"]["code"], reply["id"]) == (False, code, named)
        assert not desk.seen
        client.ask("ping")


def test_a_message_of_many_frames_is_refused_and_the_next_one_is_read_right(desk: Desk) -> None:
    with RawClient(desk.endpoint) as client:
        for frames in ([b"{}"] * 500, [b"", b"{}", b"{}"], [b""] * 7):
            assert answer_to(client, *frames)["error"]["code"] == "bad_request"
        client.ask("ping")
    assert len(desk.seen) == 1


def test_a_request_over_the_bound_is_answered_and_one_far_over_it_is_cut_off(desk: Desk) -> None:
    with RawClient(desk.endpoint) as client:
        reply = answer_to(client, b"x" * (limits.REQUEST_BYTES_MAX + 1))
        assert "bytes is over" in reply["error"]["message"]
        client.socket.send(b"x" * (FRAME_BYTES_MAX + 1))
        assert not client.socket.poll(200)
    with RawClient(desk.endpoint) as other:
        other.ask("ping")


def test_half_finished_handshakes_and_garbage_do_not_hold_others_up(desk: Desk) -> None:
    rude = []
    for said in (b"", GREETING[:5], GREETING, b"GET / HTTP/1.1\r\n\r\n", b"\0" * 999):
        client = socket.socket(socket.AF_UNIX)
        client.connect(desk.path)
        client.sendall(said)
        rude.append(client)
    with RawClient(desk.endpoint) as client:
        client.ask("ping")
    for one in rude:  # the handshake limit ends those that say nothing
        one.settimeout(10)
        try:
            while one.recv(4_096):
                pass
        except ConnectionResetError:
            continue
        finally:
            one.close()


def test_a_peer_that_is_gone_before_its_reply_is_counted_and_harms_nobody(desk: Desk) -> None:
    for _ in range(50):
        with RawClient(desk.endpoint) as client:
            client.socket.setsockopt(zmq.LINGER, 100)
            client.send("ping", {})
    with RawClient(desk.endpoint) as client:
        client.ask("ping")


def test_replies_that_are_never_read_are_bounded_by_bytes(desk: Desk) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as deaf:
        deaf.linger = 0
        deaf.rcvhwm = 1
        deaf.connect(desk.endpoint)
        args = {"task": 1, "limit": limits.OUTPUT_CHUNK_BYTES_MAX}
        ask = json.dumps({"v": 1, "id": "a", "verb": "output", "args": args}).encode()
        asked = 4 * UNREAD_BYTES_MAX // limits.OUTPUT_CHUNK_BYTES_MAX
        for _ in range(asked):
            deaf.send(ask)

        def settled() -> bool:  # the last request is seen before its reply is sent or dropped
            stats = desk.server.stats()
            sent, dropped = stats.get("replies", 0), stats.get("replies_dropped_slow", 0)
            return sent + dropped == asked

        until(settled)
        assert desk.server.stats()["replies"] < asked // 2
    until(lambda: desk.server.stats()["connections"] == 0)
    with RawClient(desk.endpoint) as client:  # what the deaf one held is free again
        assert client.ask("output", args)["size"] == limits.OUTPUT_CHUNK_BYTES_MAX


def test_more_connections_than_a_uid_may_have_are_refused_and_room_comes_back() -> None:
    with open_desk(Ipc(group="", mode="0600", connections_per_uid=8)) as desk:
        held = []
        for _ in range(30):
            client = socket.socket(socket.AF_UNIX)
            client.connect(desk.path)
            held.append(client)
        until(lambda: desk.server.stats()["connections_refused"] == 22)
        assert desk.server.stats()["connections"] == 8
        for client in held:
            client.close()
        until(lambda: desk.server.stats()["connections"] == 0)
        with RawClient(desk.endpoint) as polite:
            polite.ask("ping")
    assert desk.told.getvalue().count("connections open") == 1


PING_AS = """
import os, sys, zmq
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(65534)
client = zmq.Context().socket(zmq.DEALER)
client.linger = 0
client.connect(sys.argv[1])
client.send(b'{"v":1,"id":"a","verb":"ping"}')
print(client.recv().decode() if client.poll(1000) else "silence")
"""


def ping_as_nobody(desk: Desk, gid: int) -> str:
    command = [sys.executable, "-c", PING_AS, desk.endpoint, str(gid)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


@pytest.mark.root
def test_only_root_the_own_uid_and_the_group_are_let_in_by_the_handshake() -> None:
    with open_desk(Ipc(group="daemon", mode="0666")) as desk:
        assert ping_as_nobody(desk, NOBODY) == "silence\n"
        assert desk.server.stats()["handshakes_refused"] > 0
        assert json.loads(ping_as_nobody(desk, 1))["result"]["uid"] == NOBODY
        with RawClient(desk.endpoint) as root:
            root.ask("ping")
    assert desk.told.getvalue().count("may not connect") == 1


@pytest.mark.root
def test_the_socket_gets_its_mode_and_group() -> None:
    with open_desk(Ipc(group="daemon", mode="0660")) as desk:
        status = Path(desk.path).stat()
        assert (status.st_mode & 0o777, status.st_gid) == (0o660, 1)


# --- a path that was removed ---------------------------------------------------------------------


class Alone:
    """A server that nobody but the test calls, and what its journal was told."""

    def __init__(self, path: Path) -> None:
        self.path, self.told = path, io.StringIO()
        ipc, journal = Ipc(group="", mode="0600"), Journal(StreamSink(self.told, prefixed=True))
        self.listening = listen(str(path), ipc, [], journal)
        self.server = Server(self.listening, ipc, journal)

    def looks(self) -> tuple[int, int]:
        """Look at the path; return how often its loss and its return were told by now."""
        self.server.look_at_path()
        told = self.told.getvalue()
        return told.count("nobody can reach us"), told.count("made again")

    def is_reached(self) -> bool:
        with RawClient(f"ipc://{self.path}") as client:
            client.send("ping", {})
            until(lambda: self.server.receive(1))
        return True


@pytest.fixture
def alone() -> Iterator[Alone]:
    with tempfile.TemporaryDirectory(prefix="ck-", dir="/tmp") as directory:
        made = Alone(Path(directory) / "ctl.sock")
        yield made
        made.server.close()


def test_a_socket_that_cannot_be_served_is_an_error_at_once(tmp_path: Path) -> None:
    """A daemon that went on would run tasks and hear nobody."""
    made = socket.socket(socket.AF_UNIX)
    listening = Listening(f"{tmp_path}/{'x' * 108}", made, is_ours=False)
    journal = Journal(StreamSink(io.StringIO(), prefixed=True))
    with pytest.raises(Internal, match="cannot serve"):
        Server(listening, Ipc(group="", mode="0600"), journal)
    assert made.fileno() == -1


def test_a_path_that_cannot_be_bound_again_is_told_once_and_bound_when_it_can(
    alone: Alone,
) -> None:
    assert alone.looks() == (0, 0)
    alone.path.unlink()
    alone.path.write_text("in the way")
    assert alone.looks() == (1, 0)
    assert alone.looks() == (1, 0)
    alone.path.unlink()
    assert alone.looks() == (1, 1)
    assert alone.is_reached()
    assert alone.looks() == (1, 1)


def test_a_socket_that_is_bound_again_and_not_served_is_served_at_the_next_look(
    alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    alone.path.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(type(alone.listening), "copy", copy)
        assert alone.looks() == (1, 0)
        assert not alone.listening.is_lost
    assert alone.looks() == (1, 1)
    assert alone.is_reached()
