"""What is seen of a batch: a bar at a terminal, else a line now and then, and what items print.

    [##########----------] 170/340  50%  12.1/s  ETA 0:14  8 in flight  2 fail
    batch lint: 170 of 340 done, 12.1/s, 0:14 to go; 168 pass, 2 fail

    logs/lane-02.log
    --- a.txt: pass, try 1 of run 3, 0.12 s
    12 lines counted

The bar is on stderr, and taken off before anything else is printed; its rate is that of the last
half minute. What an item prints is told in one piece when it ends, its stdout on ours, its stderr
on ours, and appended to the log of its lane; a log is turned over at 16 MiB, and one old one kept.
Durable: nothing; results are, see `ledger.py`. It decides nothing. Read next: `runner.py`.
"""

import contextlib
import errno
import os
import shutil
import sys
import time
from collections import deque
from typing import Final, TextIO

from ckptd.batch.job import Ended
from ckptd.storage.disk import append_all
from ckptd.streams import await_reader

LINE_EVERY_S: Final = 5.0
_BAR_EVERY_S: Final = 0.1
_WINDOW_S: Final = 30.0
_BAR_CHARS: Final = 20
_CLEAR: Final = "\r\x1b[K"
LOG_BYTES_MAX: Final = 16 << 20
_KEY_CHARS: Final = 200


def span(seconds: float) -> str:
    """Return `0:14`, `2:05:00`."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _speed(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


class Tally:
    """How many items have which result, and how many a run may spoil."""

    def __init__(self, counts: dict[str, int], total: int, bad: int, allowed: float) -> None:
        self.counts = counts
        self.total = total
        self.bad = bad  # of this selection; counted before they are told
        self.allowed = allowed
        self.ran = 0

    @property
    def done(self) -> int:
        """Return how many items have a result."""
        return sum(self.counts.values())

    def took(self, before: str, status: str) -> None:
        """Count a result; `before` is the status that it replaces."""
        if before:
            self.counts[before] -= 1
        self.counts[status] = self.counts.get(status, 0) + 1
        self.ran += 1

    def seen(self) -> dict[str, int]:
        """Return the counts that are not zero."""
        return {status: number for status, number in self.counts.items() if number}


class Meter:
    """What is seen of a batch while it runs."""

    def __init__(self, name: str, total: int, out: TextIO | None = None) -> None:
        self._name = name
        self._total = total
        self._out = out or sys.stderr
        self._is_terminal = self._out.isatty()
        self._shown = ""  # the bar that stands in the last line
        self._next_s = 0.0 if self._is_terminal else time.monotonic() + LINE_EVERY_S
        self._ends: deque[tuple[float, int]] = deque(maxlen=4096)  # (monotonic, done)

    def ended(self, done: int, now_s: float) -> None:
        """Take note of how many are done."""
        self._ends.append((now_s, done))
        while self._ends and now_s - self._ends[0][0] > _WINDOW_S:
            self._ends.popleft()

    def rate(self, now_s: float) -> float:
        """Return items per second of late, 0 where that is not known."""
        if len(self._ends) < 2:
            return 0.0
        (first_s, first), (_, last) = self._ends[0], self._ends[-1]
        passed_s = now_s - first_s
        return (last - first) / passed_s if passed_s > 0 else 0.0

    def eta_s(self, done: int, now_s: float) -> float:
        """Return the seconds that the rest takes at this rate, 0 where that is not known."""
        rate = self.rate(now_s)
        return (self._total - done) / rate if rate > 0 else 0.0

    def clear(self) -> None:
        """Take the bar off, so that something else can be printed."""
        if self._shown:
            self._write(_CLEAR)
            self._shown = ""

    def draw(self, done: int, flying: int, counts: dict[str, int], now_s: float) -> None:
        """Show how far, where it is time to."""
        if now_s < self._next_s:
            return
        if self._is_terminal:
            self._next_s = now_s + _BAR_EVERY_S
            line = self._bar(done, flying, counts, now_s)
            if line != self._shown:
                self._write(_CLEAR + line)
                self._shown = line
        else:
            self._next_s = now_s + LINE_EVERY_S
            self._write(self._line(done, counts, now_s) + "\n")

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self.clear()
        self._write(f"batch {self._name}: {text}\n")

    def _bar(self, done: int, flying: int, counts: dict[str, int], now_s: float) -> str:
        share = done / self._total if self._total else 1.0
        full = int(share * _BAR_CHARS)
        bar = "#" * full + "-" * (_BAR_CHARS - full)
        parts = [f"[{bar}] {done:,}/{self._total:,}", f"{share:4.0%}"]
        if rate := self.rate(now_s):
            parts += [_speed(rate), f"ETA {span(self.eta_s(done, now_s))}"]
        parts += [f"{flying} in flight"]
        parts += [f"{number} {status}" for status, number in counts.items() if status != "pass"]
        columns = shutil.get_terminal_size((80, 24)).columns
        return "  ".join(parts)[: columns - 1]

    def _line(self, done: int, counts: dict[str, int], now_s: float) -> str:
        text = f"batch {self._name}: {done:,} of {self._total:,} done"
        if rate := self.rate(now_s):
            text += f", {_speed(rate)}, {span(self.eta_s(done, now_s))} to go"
        said = ", ".join(f"{number:,} {status}" for status, number in counts.items())
        return text + (f"; {said}" if said else "")

    def _write(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except OSError:
            self._is_terminal = False  # nobody looks any more


def shown_key(key: str) -> str:
    """Return a key as the line above an item's output shows it."""
    return "".join(char if char.isprintable() else "?" for char in key[:_KEY_CHARS])


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:  # Bound: each turn writes, or waits for a reader
        try:
            left = left[os.write(fd, left) :]
        except BlockingIOError:
            await_reader(fd)


class Printed:
    """The way out for everything that items print."""

    def __init__(self, path: str, run: int) -> None:
        self._folder = f"{path}/logs"
        self._run = run
        self._logs: dict[int, int] = {}  # lane -> descriptor
        self._sizes: dict[int, int] = {}
        self.is_unread = False  # nobody reads our stdout any more
        self.lost = ""  # why not all of it came out on stdout; one that is closed is not missed
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._folder, 0o700)

    def tell(self, end: Ended, status: str, seconds: float) -> None:
        """Print what an item printed, and log it."""
        if end.out:
            self._to(1, end.out)
        if end.err:
            self._to(2, end.err)
        with contextlib.suppress(OSError):  # a log that cannot be written costs no result
            self._log(end, status, seconds)

    def _to(self, fd: int, data: bytes) -> None:
        ended = data if data.endswith(b"\n") else data + b"\n"
        try:
            _write_all(fd, ended)
        except BrokenPipeError:
            self.is_unread = self.is_unread or fd == 1
        except OSError as error:  # a full disk behind `>`: the result is what counts
            if fd == 1 and error.errno != errno.EBADF:
                self.lost = self.lost or error.strerror or str(error)

    def _log(self, end: Ended, status: str, seconds: float) -> None:
        job, lane = end.job, end.job.lane
        key = shown_key(job.item.key)
        said = f"{status}, try {job.tries} of run {self._run}, {seconds:.2f} s"
        why = f" ({end.text})" if end.text else ""
        parts = [f"--- {key}: {said}{why}\n".encode(errors="replace")]
        parts += [one if one.endswith(b"\n") else one + b"\n" for one in (end.out, end.err) if one]
        data = b"".join(parts)
        fd = self._opened(lane)
        append_all(fd, data)
        self._sizes[lane] += len(data)

    def _opened(self, lane: int) -> int:
        fd = self._logs.get(lane, -1)
        path = f"{self._folder}/lane-{lane:02d}.log"
        if fd >= 0 and self._sizes[lane] > LOG_BYTES_MAX:
            os.close(fd)
            os.rename(path, f"{path}.1")
            fd = -1
        if fd < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(path, flags, 0o600)
            self._logs[lane] = fd
            self._sizes[lane] = os.fstat(fd).st_size
        return fd

    def close(self) -> None:
        """Close the logs."""
        for fd in self._logs.values():
            os.close(fd)
        self._logs.clear()
