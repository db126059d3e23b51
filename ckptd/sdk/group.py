"""Many threads, one journal, one sync: whoever comes first writes for all who came meanwhile.

    record(facts) in 8 threads  ->  one append of 8 groups, one fdatasync, 8 returns

Invariant: `record` returns after the sync that covers its facts, or raises and they are not there.
Invariant: one thread at a time is in the journal; the others wait or queue. No thread of our own.
Read next: `ckptd/storage/journal.py`.
"""

from _thread import allocate_lock
from collections.abc import Sequence
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
    """The facts of one call on their way to the disk; `gate` opens when its thread has to act."""

    __slots__ = ("error", "facts", "gate", "is_settled")

    def __init__(self, facts: list[Fact]) -> None:
        self.facts = facts
        self.is_settled = False
        self.error: BaseException | None = None
        self.gate = allocate_lock()
        self.gate.acquire()


class Recorder:
    """One journal, shared by the threads of a task."""

    def __init__(self, journal: Appends) -> None:
        self._journal = journal
        self._lock = allocate_lock()  # over the queue and who writes; never over a sync
        self._queue: list[_Waiting] = []
        self._writer: _Waiting | None = None

    def record(self, facts: list[Fact]) -> None:
        """Make facts durable; raises what `Journal.append` raises, and then they are not there.

        Durable: all of them, before it returns.
        """
        mine = _Waiting(facts)
        with self._lock:
            self._queue.append(mine)
            if self._writer is None:
                self._writer = mine
        if self._writer is not mine:
            self._wait(mine)
        if not mine.is_settled:
            self._write_group()
        if mine.error is not None:
            raise mine.error

    def _wait(self, mine: _Waiting) -> None:
        """Wait until the facts are settled, or this thread is the one to write."""
        try:
            mine.gate.acquire()
        except BaseException:  # a signal's exception: nobody may wait for a writer who left
            with self._lock:
                if mine in self._queue:
                    self._queue.remove(mine)
                if self._writer is mine:
                    self._elect()
            raise

    def _elect(self) -> None:
        """Make the first in the queue the writer; the lock is held."""
        self._writer = self._queue[0] if self._queue else None
        if self._writer is not None:
            self._writer.gate.release()

    def _write_group(self) -> None:
        """Write for all who wait, then hand on to the first who came meanwhile.

        Invariant: the group has the caller's own facts in it: it is the first in the queue.
        """
        with self._lock:
            group = self._next_group()
        try:
            _settle(self._journal, group)
        finally:
            with self._lock:
                self._elect()
            for one in group[1:]:
                one.gate.release()

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
        """Close the journal; no thread may be recording any more."""
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
    for one in group:
        one.is_settled = True
