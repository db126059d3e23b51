"""What journald is to a sender, a datagram socket, and the entries that came in read back."""

import socket
import struct
from pathlib import Path

Entry = dict[str, list[str]]


def parse(payload: bytes) -> Entry:
    """Read an entry as journald does; a field may be there many times."""
    fields: Entry = {}
    while payload:
        line, _, payload = payload.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", payload[:8])
            value, payload = payload[8 : 8 + size], payload[8 + size + 1 :]
        fields.setdefault(name.decode(), []).append(value.decode(errors="replace"))
    return fields


class Journald:
    """Listens on a socket of its own until it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(self.path)

    def read(self) -> list[Entry]:
        """Return what came in since the last call."""
        found = []
        while True:  # Bound: what lies in the socket
            try:
                found.append(parse(self._socket.recv(1 << 20)))
            except BlockingIOError:
                return found

    def lines(self) -> list[str]:
        """Return the messages alone."""
        return [entry["MESSAGE"][0] for entry in self.read()]

    def close(self) -> None:
        self._socket.close()
