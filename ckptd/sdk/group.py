"""Many threads, one journal, one sync: whoever comes first writes for all who came meanwhile.

    record(facts) in 8 threads  ->  one append of 8 groups, one fdatasync, 8 returns

Invariant: `record` returns after the sync that covers its facts, or raises and they are not there.
Invariant: one thread at a time is in the journal; the others wait or queue. No thread of our own.
A forked child begins with an empty queue and a journal opened by itself.
Read next: `ckptd/storage/journal.py`.
"""

import os
from _thread import allocate_lock
from collections.abc import Callable, Sequence
from typing import Final, Protocol
from weakref import WeakSet

from ckptd.storage.journal import Fact, StaleAttempt, TooLarge
from ckptd.storage.untrusted import Damaged

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

    def open(self) -> None:
        """Let the thread go on; again is no harm."""
        if self.gate.locked():
            self.gate.release()


def _forget(facts: list[Fact]) -> None:
    del facts


class Recorder:
    """One journal, shared by the threads of a task."""

    def __init__(self, journal: Appends, know: Callable[[list[Fact]], None] = _forget) -> None:
        """`know` gets what is durable, in the order of the journal, before `record` returns."""
        self._journal = journal
        self._know = know
        self.begin()
        _RECORDERS.add(self)

    def begin(self) -> None:
        """Forget who waits; after fork(2) their threads are not here, and who writes is not."""
        self._writing = allocate_lock()  # over the journal
        self._lock = allocate_lock()  # over what follows; never over a sync
        self._queue: list[_Waiting] = []
        self._group: list[_Waiting] = []  # what the writer took out of the queue
        self._writer: _Waiting | None = None

    def record(self, facts: list[Fact]) -> None:
        """Make facts durable; raises what `Journal.append` raises, and then they are not there.

        Where a signal's exception strikes (Ctrl-C), or a newer attempt exists (StaleAttempt), they
        may be there or not; nobody waits for us.

        Durable: all of them, before it returns.
        """
        mine = _Waiting(facts)
        struck: BaseException | None = None
        try:
            self._settle_in_turn(mine)
        except BaseException as error:  # noqa: BLE001 - raised below
            struck = error
        while True:  # Bound: each further turn is due to a signal whose exception struck right here
            try:
                with self._lock:
                    self._hand_on(mine)
                break
            except BaseException as error:  # noqa: BLE001 - raised below
                struck = error
        failed = struck or mine.error
        if failed is not None:
            raise failed

    def _settle_in_turn(self, mine: _Waiting) -> None:
        with self._lock:
            self._queue.append(mine)
            if self._writer is None:
                self._writer = mine
        if self._writer is not mine:
            mine.gate.acquire()  # until the facts are settled, or this thread is the one to write
        if mine.is_settled:
            return
        with self._lock:  # the first in the queue is our own
            self._group, self._queue = self._parted()
        with self._writing:
            _settle(self._journal, self._group, self._know)

    def _parted(self) -> tuple[list[_Waiting], list[_Waiting]]:
        count = facts = 0
        for one in self._queue:
            facts += len(one.facts)
            if count and facts > _GROUP_FACTS_MAX:
                break
            count += 1
        return self._queue[:count], self._queue[count:]

    def _hand_on(self, mine: _Waiting) -> None:
        """Wake who was written for; the first of the others is the next to write.

        Invariant: done twice it is as done once, so that it may be struck anywhere.
        """
        if self._writer is not mine:  # settled, or struck: then nobody hands on to us
            self._queue = [one for one in self._queue if one is not mine]
            self._group = [one for one in self._group if one is not mine]
        else:
            undone = [one for one in [*self._group, *self._queue] if not one.is_settled]
            self._queue = [one for one in dict.fromkeys(undone) if one is not mine]
            for one in self._group:
                if one.is_settled:
                    one.open()
            self._group = []
            self._writer = self._queue[0] if self._queue else None
        if self._writer is not None:  # woken once it is named: two would write, else
            self._writer.open()

    def close(self) -> None:
        """Close the journal, after the append that is under way: its caller may be gone."""
        with self._writing:
            self._journal.close()


def _settle(
    journal: Appends, group: Sequence[_Waiting], know: Callable[[list[Fact]], None]
) -> None:
    """Append; what a signal's exception leaves unsettled here is for the next writer."""
    try:
        journal.append([fact for one in group for fact in one.facts])
    except TooLarge as error:
        # Nothing was written. One call's facts must not cost the others theirs.
        if len(group) > 1:
            for one in group:
                _settle(journal, [one], know)
            return
        group[0].error = error
    except (StaleAttempt, Damaged, OSError) as error:  # each of the callers gets it raised
        for one in group:
            one.error = error
    else:
        for one in group:
            know(one.facts)
    for one in group:
        one.is_settled = True


_RECORDERS: Final[WeakSet[Recorder]] = WeakSet()


def _begin_as_child() -> None:
    for one in list(_RECORDERS):
        one.begin()


os.register_at_fork(after_in_child=_begin_as_child)
