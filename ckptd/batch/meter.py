"""How far, how fast, how long still: a bar at a terminal, else a line now and then, on stderr.

    [##########----------] 170/340  50%  12.1/s  ETA 0:14  8 in flight  2 fail
    batch lint: 170 of 340 done, 12.1/s, 14 s to go; 168 pass, 2 fail

The bar is taken off before anything else is printed. The rate is that of the last half minute.
It decides nothing. Read next: `runner.py`.
"""

import shutil
import sys
import time
from collections import deque
from typing import Final, TextIO

LINE_EVERY_S: Final = 5.0
_BAR_EVERY_S: Final = 0.1
_WINDOW_S: Final = 30.0
_BAR_CHARS: Final = 20
_CLEAR: Final = "\r\x1b[K"


def span(seconds: float) -> str:
    """Return `0:14`, `2:05:00`."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


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
            parts += [f"{rate:.3g}/s", f"ETA {span(self.eta_s(done, now_s))}"]
        parts += [f"{flying} in flight"]
        parts += [f"{number} {status}" for status, number in counts.items() if status != "pass"]
        columns = shutil.get_terminal_size((80, 24)).columns
        return "  ".join(parts)[: columns - 1]

    def _line(self, done: int, counts: dict[str, int], now_s: float) -> str:
        text = f"batch {self._name}: {done:,} of {self._total:,} done"
        if rate := self.rate(now_s):
            text += f", {rate:.3g}/s, {span(self.eta_s(done, now_s))} to go"
        said = ", ".join(f"{number:,} {status}" for status, number in counts.items())
        return text + (f"; {said}" if said else "")

    def _write(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except OSError:
            self._is_terminal = False  # nobody looks any more
