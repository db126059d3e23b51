"""Clients that are broken, rude or many: the daemon stays up and answers the others."""

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.daemon_fixture import LiveDaemon, StartDaemon
from tests.raw_client import RawClient
from tests.waiting import until

CONNECTIONS = 8_000
NOBODY = 65_534
FLOOD = """
import os, resource, socket, sys
path, count, uid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (count + 64, count + 64))
if uid:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
held, refused = [], 0
for number in range(count):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(2)
    try:
        client.connect(path)
        client.send(bytes.fromhex("ff00000000000000017f")[: number % 11])
        held.append(client)
    except OSError as bad:
        refused += 1
print(len(held), refused, flush=True)
sys.stdin.read()
"""
"""Opens so many connections, says nothing or half a greeting on each, and holds them."""

MALFORMED = [
    b"",
    b"{",
    b"\xff" * 100,
    b"null",
    b"[]",
    b"[" * 100_000,
    b'{"v":1}',
    b'{"v":1,"id":"","verb":"ping","args":{}}',
    b'{"v":1,"id":"a","verb":7,"args":{}}',
    b'{"v":1e999,"id":"a","verb":"ping","args":{}}',
    b'{"v":1,"id":"a","verb":"submit","args":{"tasks":[{"argv":[]}]}}',
    b'{"v":1,"id":"a","verb":"submit","args":{"tasks":[{"argv":["a\\u0000b"]}]}}',
    b'{"v":1,"id":"a","verb":"status","args":{"limit":-1}}',
    b'{"v":1,"id":"a","verb":"status","args":{"unknown":1}}',
    b'{"v":1,"id":"a","verb":"output","args":{"task":99999999999}}',
    b'{"v":1,"id":"\x80","verb":"ping"}',
    b'{"v":1,"id":"a","verb":"\x80","args":{}}',
    b'{"v":1,"id":"a","verb":"status","args":{"select":{"names":["\xed\xa0\x80"]}}}',
    b'{"v":18446744073709551616,"id":"a","verb":"ping","args":{}}',
    b'{"v":-9223372036854775809,"id":"a","verb":"ping","args":{}}',
    b'{"v":1,"id":"a","verb":"events","args":{"since":9223372036854775808}}',
    b'{"v":1,"id":"a","verb":"events","args":{"since":9223372036854775807}}',
    b'{"v":1,"id":"a","verb":"wait","args":{"select":{"all":true},"hold_s":1e308}}',
    b'{"v":1,"id":"a","verb":"output","args":{"task":1,"offset":-9223372036854775808}}',
    b'{"v":1,"id":"a","verb":"status","args":{"select":{"ids":[18446744073709551615]}}}',
]
REFUSALS = {"bad_request", "not_found", "protocol_mismatch"}


def error_code(reply: bytes) -> str:
    answer: dict[str, Any] = json.loads(reply)
    assert answer["ok"] is False
    code: str = answer["error"]["code"]
    return code


def check_alive(daemon: LiveDaemon, pid: int) -> None:
    """The same process still answers a client that behaves."""
    with RawClient(daemon.endpoint) as client:
        assert client.ask("ping", timeout_s=10.0)["pid"] == pid


@pytest.mark.parametrize("frame", MALFORMED, ids=lambda frame: repr(frame[:50]))
def test_a_malformed_frame_gets_an_error_or_silence_and_harms_nobody(
    daemon: LiveDaemon, frame: bytes
) -> None:
    pid = daemon.pid
    with RawClient(daemon.endpoint) as client:
        client.socket.send(frame)
        if client.socket.poll(500):
            assert error_code(client.socket.recv()) in REFUSALS
        for parts in ([frame, b"more"], [b"", frame], [b""] * 40):
            client.socket.send_multipart(parts)
    check_alive(daemon, pid)


def test_other_versions_verbs_and_sizes_are_answered_or_cut_off(daemon: LiveDaemon) -> None:
    pid = daemon.pid
    with RawClient(daemon.endpoint) as client:
        for request, code in (
            ({"v": 2, "id": "a", "verb": "ping", "args": {}}, "protocol_mismatch"),
            ({"v": 0, "id": "b", "verb": "ping", "args": {}}, "protocol_mismatch"),
            ({"v": 1, "id": "c", "verb": "pong", "args": {}}, "bad_request"),
        ):
            client.socket.send(json.dumps(request).encode())
            assert client.socket.poll(5_000), request
            assert error_code(client.socket.recv()) == code
        client.socket.send(b"x" * (64 << 20), zmq.NOBLOCK)
        check_alive(daemon, pid)
    check_alive(daemon, pid)


def test_half_a_handshake_and_plain_garbage_hold_nobody_up(daemon: LiveDaemon) -> None:
    pid = daemon.pid
    path = str(daemon.run / "ctl.sock")
    greeting = bytes.fromhex("ff00000000000000017f0300") + b"NULL".ljust(20, b"\0") + bytes(32)
    for said in (
        b"",
        greeting[:5],
        greeting[:30],
        greeting,
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 999,
    ):
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(path)
            rude.sendall(said)
            check_alive(daemon, pid)
    check_alive(daemon, pid)


def test_a_client_that_never_reads_does_not_stop_the_others(daemon: LiveDaemon) -> None:
    pid = daemon.pid
    with RawClient(daemon.endpoint) as deaf:
        deaf.socket.setsockopt(zmq.RCVHWM, 1)
        for _ in range(20_000):
            try:
                deaf.socket.send(b'{"v":1,"id":"a","verb":"config","args":{}}', zmq.NOBLOCK)
            except zmq.Again:
                break
        check_alive(daemon, pid)
    check_alive(daemon, pid)


@pytest.mark.timeout(120)
def test_eight_thousand_connections_neither_kill_the_daemon_nor_lock_others_out(
    start_daemon: StartDaemon,
) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(CONNECTIONS, most - 64) if most != resource.RLIM_INFINITY else CONNECTIONS
    daemon = start_daemon(config='[ipc]\nmode = "0666"\n')
    pid = daemon.pid
    uid = NOBODY if os.geteuid() == 0 else 0  # as root we can be somebody else
    flood = subprocess.Popen(
        [sys.executable, "-c", FLOOD, str(daemon.run / "ctl.sock"), str(count), str(uid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert flood.stdout is not None
        held, *_ = flood.stdout.readline().split()
        assert held.isdigit(), held + flood.stdout.read()
        assert Path(f"/proc/{pid}").exists()
        if uid:
            check_alive(daemon, pid)
    finally:
        flood.kill()
        flood.communicate()

    def answers() -> bool:
        return daemon.ctl("daemon", "ping", check=False).returncode == 0

    until(answers, 20.0, every_s=0.2)
    check_alive(daemon, pid)
