"""What a fuzz target is: bytes in, nothing out; an exception that escapes is a find.

Oracle of every target: foreign bytes give a result that survives a round trip, or one of our own
errors that says what is wrong. Everything else (KeyError, a hang, memory, an accepted damage) is a
bug. A target keeps nothing between two inputs that could change what an input does.
"""

from collections.abc import Callable
from typing import NamedTuple

Run = Callable[[bytes], None]


# Shares of a run's time. What has few branches is exhausted within a second, at tens of thousands
# of inputs; what has hundreds, or waits for files and sockets, is far from it after a minute.
LIGHT, PLAIN, DEEP = 1, 4, 12
SLOW = 24  # deep, and below a hundred inputs a second


class Target(NamedTuple):
    """One entrance of the product for bytes that it did not write itself."""

    name: str
    run: Run
    seeds: Callable[[], list[bytes]]  # valid inputs, to start from
    input_bytes_max: int = 4_096
    weight: int = PLAIN


class Script:
    """Reads an input as a script of small numbers and texts; past its end everything is zero."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Tell whether something is left."""
        return self._at < len(self._data)

    def byte(self) -> int:
        """Return the next byte."""
        return int.from_bytes(self.take(1))

    def number(self, below: int) -> int:
        """Return a number below a bound, of three bytes."""
        return int.from_bytes(self.take(3)) % max(1, below)

    def take(self, count: int) -> bytes:
        """Return the next bytes, as many as there are."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(len(self._data))


def damaged(data: bytes, script: Script) -> bytes:
    """Return `data` after the edits of a script: flips, overwrites, cuts, insertions, copies."""
    changed = bytearray(data)
    while script:  # Bound: each edit takes a byte of the script
        kind, at = script.byte() % 6, script.number(len(changed) + 1)
        span = script.byte()
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << span % 8
        elif kind == 1:
            changed[at : at + 4] = script.take(4)
        elif kind == 2:
            changed[at : at + span] = bytes(len(changed[at : at + span]))
        elif kind == 3:
            del changed[at : at + span]
        elif kind == 4:
            changed[at:at] = script.take(span % 16)
        else:
            source = script.number(len(changed) + 1)
            part = bytes(changed[source : source + span])
            changed[at : at + len(part)] = part
    return bytes(changed)
