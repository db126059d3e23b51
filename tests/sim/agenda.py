"""Simulated time: what is to happen when, and the clock that the daemon reads.

One heap, one thread, no clock of the machine. What falls on the same instant happens in the order
in which it was entered, so a life is wholly determined by its seed.
"""

import heapq
import random
from collections.abc import Callable

from ckptd.core.policy import Now
from ckptd.host.clock import Clock

BEGIN_NS = 1_800_000_000 * 10**9  # of the wall clock, in 2027
S = 10**9


class Agenda:
    """What is still to happen, and how far time has come."""

    def __init__(self) -> None:
        self.elapsed_ns = 10 * S
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._number = 0

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        self.at(self.elapsed_ns + max(0, int(delay_s * S)), act)

    def at(self, at_ns: int, act: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._heap, (at_ns, self._number, act))

    def next_ns(self) -> int:
        return self._heap[0][0] if self._heap else 0

    def step(self) -> bool:
        """Let the next thing happen; False where there is nothing any more."""
        if not self._heap:
            return False
        at_ns, _, act = heapq.heappop(self._heap)
        self.elapsed_ns = max(self.elapsed_ns, at_ns)  # a stall may have passed it
        act()
        return True

    def pass_until(self, at_ns: int) -> None:
        """Let everything happen that happens up to then: the daemon stands still meanwhile."""
        while self._heap and self._heap[0][0] <= at_ns:
            self.step()
        self.elapsed_ns = max(self.elapsed_ns, at_ns)


class SimClock(Clock):
    """The machine's clocks; `skew_ns` is by how much the wall clock is wrong."""

    def __init__(self, agenda: Agenda, dice: random.Random) -> None:
        super().__init__()
        self._random = dice
        self._agenda = agenda
        self.skew_ns = 0

    def wall_ns(self) -> int:
        return BEGIN_NS + self._agenda.elapsed_ns + self.skew_ns

    def now(self) -> Now:
        return Now(self.wall_ns(), self._random.getrandbits(64))

    def mono_ns(self) -> int:
        return self._agenda.elapsed_ns
