"""PROTOCOL.md is true: its tables are the code's, its bytes are real, its client works."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ckptctl.cli import overview
from ckptd.door import access, server
from ckptd.host import config
from ckptd.protocol import codec, limits
from ckptd.protocol.errors import all_errors
from ckptd.protocol.messages import Empty, Pong
from tests.daemon_fixture import LiveDaemon
from tests.raw_client import RawClient
from tests.unit.daemon.desk import open_desk
from tests.unit.protocol.tables import DOCUMENT, REGION, REGIONS, regenerated

TEXT = DOCUMENT.read_text()
PROSE = " ".join(TEXT.split())


def test_its_tables_are_those_of_the_code() -> None:
    assert {name for _, name, _ in REGION.findall(TEXT)} == set(REGIONS[DOCUMENT])
    assert regenerated(DOCUMENT) == TEXT, "run: python -m tests.unit.protocol.tables"


def test_its_links_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) <= anchors


def test_its_bounds_in_words_are_those_of_the_door() -> None:
    assert f"over {server.SEND_QUEUE:,}, or over {server.UNREAD_BYTES_MAX >> 20} MiB" in PROSE
    assert f"may hold {config.Ipc().connections_per_uid} connections" in PROSE
    assert f"says nothing for {server.HANDSHAKE_MS // 1_000} s at the handshake" in PROSE
    assert server.FRAME_BYTES_MAX == 2 * limits.REQUEST_BYTES_MAX  # "one over twice that"
    assert f"asked for again after {access.KEPT_S:g} s" in PROSE
    assert f"`hold_s` seconds (at most {limits.HOLD_S_MAX:g})" in PROSE
    assert f"At most {limits.WAITERS_MAX:,} are kept" in PROSE


def test_it_and_the_help_name_the_same_exit_codes_and_those_of_all_errors() -> None:
    said = PROSE.partition("Exit codes of `ckptctl`: ")[2].partition(". `run`")[0]
    helped = " ".join(overview()).partition("Exit codes: ")[2]
    codes = re.findall(r"(?:^|, )(\d+) ", said)
    assert codes == re.findall(r"(?:^|, )(\d+) ", helped)
    assert {str(error.exit_code) for error in all_errors()} <= set(codes)


def test_its_example_of_bytes_is_what_goes_over_the_socket() -> None:
    example = re.search(r"```text\n(.*?)```", TEXT, re.DOTALL)
    assert example
    said, answered = re.findall(r'^   (\{"v".*\})$', example[1], re.MULTILINE)
    assert codec.encode_request("a", "ping", Empty()) == said.encode()
    pong = codec.encode_answer(Pong("0.1.0", 1, 4711, 0, 3, 1000, ("submit",)))
    assert codec.encode_reply("a", pong) == answered.encode()
    assert f"00 {len(said):02x} " in example[1]
    assert f"00 {len(answered):02x} " in example[1]


def test_its_handshake_by_hand_reaches_the_daemon() -> None:
    """The bytes of the document, written without any ZeroMQ on the client's side."""
    greeting = bytes.fromhex("ff 00000000000000 01 7f 03 01") + b"NULL".ljust(20, b"\0") + bytes(32)
    ready = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\0"
    request = codec.encode_request("a", "ping", Empty())
    with open_desk() as desk, socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(5)
        raw.connect(desk.path)
        raw.sendall(greeting)
        with raw.makefile("rb") as stream:
            assert stream.read(64)[:12] == greeting[:12]
            raw.sendall(bytes([4, len(ready)]) + ready)
            kind, size = stream.read(2)
            assert (kind, stream.read(size)[:6]) == (4, b"\x05READY")
            raw.sendall(bytes([0, len(request)]) + request)  # before READY it would be refused
            kind, size = stream.read(2)
            assert kind == 0
            assert json.loads(stream.read(size))["id"] == "a"


def test_its_example_of_a_refusal_is_what_the_daemon_says() -> None:
    example = re.search(r"```json\n(.*)\n(.*)\n```", TEXT)
    assert example
    with open_desk() as desk, RawClient(desk.endpoint) as client:
        client.socket.send(example[1].encode())
        assert client.socket.poll(5_000)
        assert client.socket.recv() == example[2].encode()


def test_its_client_runs_a_task_and_exits_with_its_code(daemon: LiveDaemon, tmp_path: Path) -> None:
    program = tmp_path / "client.py"
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    program.write_text(code)
    done = subprocess.run(
        [sys.executable, str(program), "sh", "-c", "exit 7"],
        env=daemon.env,
        capture_output=True,
        text=True,
        check=False,
        timeout=40,
    )
    assert (done.returncode, done.stdout) == (7, "task 1 failed, attempt 1\n"), done.stderr


@pytest.mark.parametrize(("verb", "args"), [("ping", {}), ("status", {}), ("groups", {})])
def test_what_it_says_of_left_out_arguments_holds(
    daemon: LiveDaemon, verb: str, args: dict[str, Any]
) -> None:
    with RawClient(daemon.endpoint) as client:
        short = {"v": limits.PROTOCOL_VERSION, "id": "a", "verb": verb}
        client.socket.send(msgspec.json.encode(short))
        assert client.socket.poll(5_000)
        assert json.loads(client.socket.recv())["ok"]
        assert client.ask(verb, args) is not None
