"""The raw socket: anything that is not ZMTP, or nearly is. A real server, a real connection.

Oracle: whatever one connection sends, the next one is served, and the journal tells of no bug.
"""

import contextlib
import functools
import socket
from contextlib import ExitStack

from tests.fuzz.target import SLOW, Target
from tests.raw_client import RawClient
from tests.unit.daemon.desk import Desk, open_desk

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
PING = b'{"v":1,"id":"a","verb":"ping"}'
_open = ExitStack()


@functools.cache
def _desk() -> Desk:
    return _open.enter_context(open_desk())


@functools.cache
def _client() -> RawClient:
    return _open.enter_context(RawClient(_desk().endpoint))


def close() -> None:
    """End the server of this process, if it was started."""
    _open.close()
    _client.cache_clear()
    _desk.cache_clear()


def run_wire(data: bytes) -> None:
    """Send bytes over a connection of their own; read what comes until they are done with."""
    desk = _desk()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(0.001)
        raw.connect(desk.path)
        with contextlib.suppress(OSError):
            raw.sendall(data)
            raw.recv(4096)
    _client().ask("ping", timeout_s=10)
    assert "internal_error" not in desk.told.getvalue(), desk.told.getvalue()[-500:]
    desk.seen.clear()


def wire_seeds() -> list[bytes]:
    """Return a handshake that is good, and each of its parts."""
    message = b"\x00" + bytes([len(PING)]) + PING
    met = GREETING + READY
    return [met + message, met, GREETING, message, met + b"\x01\x00" + message, met + b"\x02"]


TARGETS = (Target("wire", run_wire, wire_seeds, 512, SLOW),)
