"""One attempt's part of an output file, cut into lines for the journal. Read next: `echo.py`.

Invariant: `position` is where the next line begins that was not told, so that it can be taken up
anywhere; what the task does to its file (truncating included) costs its own lines alone.
"""

import os
import stat
from typing import Final, Protocol

from ckptd.host.journal import field

LINE_BYTES_MAX: Final = 48 << 10  # journald's own bound for lines from a stream (LineMax=)
READ_BYTES: Final = 64 << 10
BEHIND_BYTES_MAX: Final = 4 << 20
SEARCHED_BYTES: Final = 1 << 20
TELL_BYTES_MAX: Final = 1 << 20  # of one look
MARKER: Final = b"--- ckptd: attempt "
"""How the runner's own lines begin (`runner/output.py`); the journal has better ones for them."""

# Invariant: whatever the task did to its own output, opening it neither waits nor follows.
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Taker(Protocol):
    """Who takes entries: `journal.JournaldSink`."""

    def hand_over(self, payload: bytes) -> bool:
        """Take one entry, or return False."""
        ...


class Tail:
    """What is to be told of one attempt."""

    def __init__(self, path: str, task: int, attempt: int, head: bytes, position: int) -> None:
        """Open the file; `position` -1 stands for where the attempt begins.

        Raises:
            OSError: it is not there, or is no regular file.
        """
        self.task, self.attempt = task, attempt
        self._head = head
        self._end = -1  # where the next attempt begins, once that is known
        self.file = os.open(path, _OPEN)
        if not stat.S_ISREG(os.fstat(self.file).st_mode):
            os.close(self.file)
            raise OSError(f"{path} is no regular file")
        self.position = position if position >= 0 else self._beginning()
        self.watch = -1
        self.is_busy = False
        self.ends_by_ns = 0  # once the attempt ended: when it is let go of, told or not
        self._allowed = -1.0
        self._allowed_at_ns = 0

    def _beginning(self) -> int:
        """Return where the attempt begins: at its marker, for the first one at the start."""
        if self.attempt == 1:
            return 0
        size = self._size()
        first = max(0, size - SEARCHED_BYTES)
        data = os.pread(self.file, SEARCHED_BYTES, first)
        place = data.rfind(b"%s%d started " % (MARKER, self.attempt))
        return size if place < 0 else first + place

    def _size(self) -> int:
        return self._end if self._end >= 0 else os.fstat(self.file).st_size

    def allowance(self, per_s: int, now_ns: int) -> int:
        """Return how many lines may be told now: `per_s` a second, as many at once."""
        if self._allowed < 0:
            self._allowed = float(per_s)
        else:
            passed_s = (now_ns - self._allowed_at_ns) / 1e9
            self._allowed = min(float(per_s), self._allowed + passed_s * per_s)
        self._allowed_at_ns = now_ns
        return int(self._allowed)

    @property
    def may_go_on(self) -> bool:
        """Tell whether the last look left a part of the allowance."""
        return self._allowed >= 1

    def tell(self, taker: Taker, most: int) -> tuple[int, bool]:
        """Hand over at most `most` lines; return how many, and whether all of them were taken."""
        told, begin = 0, self.position
        while told < most and self.position - begin < TELL_BYTES_MAX:
            data = os.pread(self.file, READ_BYTES, self.position)
            if not data and self.position > self._size():
                self.position = begin = 0  # it was truncated
                continue
            before = self.position
            count, was_taken = self._tell_lines(taker, data, most - told)
            told += count
            if not was_taken or self.position == before:
                return told, was_taken
        return told, True

    def _tell_lines(self, taker: Taker, data: bytes, most: int) -> tuple[int, bool]:
        """Tell the lines of a piece of the file and move on behind them."""
        told = place = 0
        while told < most:
            end = data.find(b"\n", place, place + LINE_BYTES_MAX)
            behind = end + 1
            if end < 0:
                left = len(data) - place
                if left < LINE_BYTES_MAX and not (self.ends_by_ns and left):
                    break
                end = behind = place + min(left, LINE_BYTES_MAX)
            line = data[place:end].rstrip(b"\r")
            if self.ends_by_ns and self._is_of_next(line):
                self._end = self.position
                break
            # What is passed over counts all the same: a file of empty lines is work, too.
            is_news = line and not _is_marker(line)
            if is_news and not taker.hand_over(self._head + field("MESSAGE", line)):
                return told, False
            told += 1
            self._allowed -= 1
            self.position += behind - place
            place = behind
        return told, True

    def _is_of_next(self, line: bytes) -> bool:
        """Tell whether another attempt begins here. Before ours has ended it is the task's joke."""
        begins = _is_marker(line) and b" started " in line
        return begins and not line.startswith(b"%s%d " % (MARKER, self.attempt))

    def is_read_out(self) -> bool:
        """Tell whether nothing is left but, while the attempt runs, a line that is not complete."""
        left = self._size() - self.position
        if left <= 0 or self.ends_by_ns:
            return left <= 0
        return left < LINE_BYTES_MAX and b"\n" not in os.pread(self.file, left, self.position)

    def skip(self, *, is_late: bool) -> int:
        """Leave out what lies too far behind (`is_late`: all); return the bytes."""
        left = self._size() - self.position
        if left <= 0 or not (is_late or left > BEHIND_BYTES_MAX):
            return 0
        size = left if is_late else left - READ_BYTES
        start = self.position + size
        if not is_late:  # go on where a line begins
            place = os.pread(self.file, READ_BYTES, start).find(b"\n")
            size += place + 1
        self.position += size
        return size

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.file)


def _is_marker(line: bytes) -> bool:
    return line.startswith(MARKER) and line.endswith(b" ---")
