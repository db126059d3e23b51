"""Many threads, one journal, one sync: whoever comes first writes for all who came meanwhile.

    record(facts) in 8 threads  ->  one append of 8 groups, one fdatasync, 8 returns

Invariant: `record` returns after the sync that covers its facts, or raises and they are not there.
Invariant: one thread at a time is in the journal; the others wait or queue. No thread of our own.
Read next: `ckptd/storage/journal.py`.
"""

from collections.abc import Sequence
from threading import Condition
from typing import Final, Protocol

from ckptd.storage.journal import Fact, TooLarge

_GROUP_FACTS_MAX: Final = 500  # half of what a frame takes


class Appends(Protocol):
    """What is written to: a journal."""

    def append(self, facts: list[Fact]) -> int:
        """Durable: the facts."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


class _Waiting:
    """The facts of one call on their way to the disk."""

    __slots__ = ("error", "facts", "is_settled")

    def __init__(self, facts: list[Fact]) -> None:
        self.facts = facts
        self.is_settled = False
        self.error: BaseException | None = None


class Recorder:
    """One journal, shared by the threads of a task."""

    def __init__(self, journal: Appends) -> None:
        self._journal = journal
        self._turn = Condition()
        self._queue: list[_Waiting] = []
        self._is_writing = False

    def record(self, facts: list[Fact]) -> None:
        """Make facts durable; raises what `Journal.append` raises, and then they are not there.

        Durable: all of them, before it returns.
        """
        mine = _Waiting(facts)
        with self._turn:
            self._queue.append(mine)
            while not mine.is_settled:  # Bound: each turn settles what was queued before it
                if self._is_writing:
                    self._turn.wait()
                else:
                    self._write_group()
        if mine.error is not None:
            raise mine.error

    def _write_group(self) -> None:
        """Write for all who wait; the lock is released over the sync."""
        group = self._next_group()
        self._is_writing = True
        self._turn.release()
        try:
            _settle(self._journal, group)
        finally:
            self._turn.acquire()
            self._is_writing = False
            self._turn.notify_all()

    def _next_group(self) -> list[_Waiting]:
        count = facts = 0
        for one in self._queue:
            facts += len(one.facts)
            if count and facts > _GROUP_FACTS_MAX:
                break
            count += 1
        group, self._queue = self._queue[:count], self._queue[count:]
        return group

    def close(self) -> None:
        """Close the journal; whoever records afterwards is refused by it."""
        with self._turn:
            while self._is_writing:  # Bound: one append
                self._turn.wait()
            self._journal.close()


def _settle(journal: Appends, group: Sequence[_Waiting]) -> None:
    try:
        journal.append([fact for one in group for fact in one.facts])
    except TooLarge as error:
        # Nothing was written. One call's facts must not cost the others theirs.
        if len(group) == 1:
            group[0].error = error
        else:
            for one in group:
                _settle(journal, [one])
    except BaseException as error:  # noqa: BLE001 - each of the callers gets it raised
        for one in group:
            one.error = error
    finally:
        for one in group:
            one.is_settled = True
