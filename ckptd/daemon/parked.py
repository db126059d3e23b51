"""Requests that wait: for a task to get somewhere, or for the log to grow.

Indexed by task, so that a turn costs only what it touched. Bound: WAITERS_MAX in all, each with a
deadline after which it is answered "not yet" and the client asks again.
"""

import heapq
from collections.abc import Iterable

from ckptd.door.server import Incoming
from ckptd.protocol.errors import Busy
from ckptd.protocol.limits import WAITERS_MAX


class Parked:
    """The waiting requests of all clients."""

    def __init__(self) -> None:
        self._number = 0
        self._waiting: dict[int, tuple[Incoming, frozenset[int]]] = {}
        self._by_task: dict[int, set[int]] = {}
        self._followers: dict[int, Incoming] = {}
        self._deadlines: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self._followers)

    def park_wait(self, request: Incoming, tasks: Iterable[int], until_mono_ns: int) -> None:
        """Park a `wait` over these tasks. Raises Busy."""
        number, ids = self._enter(until_mono_ns), frozenset(tasks)
        self._waiting[number] = request, ids
        for task in ids:
            self._by_task.setdefault(task, set()).add(number)

    def park_follow(self, request: Incoming, until_mono_ns: int) -> None:
        """Park an `events` until there is one. Raises Busy."""
        self._followers[self._enter(until_mono_ns)] = request

    def _enter(self, until_mono_ns: int) -> int:
        if len(self) >= WAITERS_MAX:
            raise Busy(f"{WAITERS_MAX} requests wait already", "try again in a moment")
        self._number += 1
        heapq.heappush(self._deadlines, (until_mono_ns, self._number))
        return self._number

    def concerned(self, touched: Iterable[int]) -> list[Incoming]:
        """Take out the waits that these tasks concern; they are asked again."""
        numbers: set[int] = set()
        if self._by_task:
            for task in touched:
                numbers |= self._by_task.get(task, set())
        return [self._leave(number) for number in sorted(numbers)]

    def followers(self) -> list[Incoming]:
        """Take out everybody who waits for the log to grow."""
        found = list(self._followers.values())
        self._followers.clear()
        return found

    def expired(self, mono_ns: int) -> list[Incoming]:
        """Take out those whose time is over; they are answered as things are."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= mono_ns:  # Bound: each popped once
            _, number = heapq.heappop(self._deadlines)
            if number in self._waiting:
                found.append(self._leave(number))
            elif number in self._followers:
                found.append(self._followers.pop(number))
        return found

    def wake_mono_ns(self) -> int:
        """Return the next deadline, 0 for none."""
        while self._deadlines:  # Bound: stale entries are popped once
            at_ns, number = self._deadlines[0]
            if number in self._waiting or number in self._followers:
                return at_ns
            heapq.heappop(self._deadlines)
        return 0

    def _leave(self, number: int) -> Incoming:
        request, tasks = self._waiting.pop(number)
        for task in tasks:
            numbers = self._by_task[task]
            numbers.discard(number)
            if not numbers:
                del self._by_task[task]
        return request
