"""What a power cut may leave at one moment, each state recovered by the real code and judged.

A moment is a MemoryDisk before any of its operations; it is not disturbed. `CrashStates.look` takes
the states that `cuts.py` finds and checks of each: acknowledged <= recovered <= appended; State is
what a fold of the records up to there gives; a second recovery, also one that was cut off in its
middle, gives the same.

A recovery is a function of the files that it reads, so contents that an earlier moment had are
judged from the remembered result, by the bounds of their own moment. Counts: `examined` states
(distinct contents of their moment), `distinct` contents that were really recovered, `again` those
recovered once more to see that the memory is right, `armed`, `inside` states within a recovery.
"""

import random
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from ckptd.core import image
from ckptd.core.apply import apply
from ckptd.core.records import DaemonStarted
from ckptd.core.state import State
from ckptd.daemon.engine import decode
from ckptd.daemon.recovery import replay
from ckptd.protocol.errors import CkptdError
from ckptd.storage.frame import Frame
from ckptd.storage.recovery import Recovery
from ckptd.storage.store import Store
from tests.fakes.memory_disk import Inode, MemoryDisk
from tests.sim.cuts import Book, Cuts, Layout

STATES_MAX = 1024  # of one moment
INSIDE_MAX = 8  # of one moment within a recovery
ARMED = 1 / 80  # of the distinct contents: armed, written to, recovered once more
INSIDE = 1 / 8  # of those: cut off before every step of that
AGAIN = 1 / 500  # of the states judged from memory


Told = tuple[int, tuple[bytes, ...]]
"""What a recovery tells State of: the LSN of the snapshot, and chunks and payloads."""


class Broken(AssertionError):
    """A crash state breaks a promise."""


@dataclass(frozen=True)
class Found:
    """What a recovery gave: the last LSN and a digest of State, or why it refused."""

    lsn: int
    digest: bytes
    refused: str = ""


def is_read(name: str) -> bool:
    """Tell whether a recovery reads a file of this name; others it lists at most."""
    return name == "FORMAT" or name.endswith((".wal", ".snap"))


def digest(state: State) -> bytes:
    """Return a digest of all that a snapshot of State holds.

    The order of environments tells only whether one was out of use for a while.
    """
    state.envs = dict(sorted(state.envs.items()))
    return blake2b(b"".join(image.chunks(state)), digest_size=12).digest()


class History:
    """The records as they were written, and the digest of State after every frame."""

    def __init__(self) -> None:
        self.digests: dict[int, bytes] = {}
        self._base: list[bytes] = []  # chunks of the snapshot that the fold begins with
        self._frames: list[tuple[int, int, bytes]] = []  # first LSN, last LSN, payload
        self._state = State()
        self._acked = 0
        self._fold()

    def learn(self, chunks: list[bytes], frames: list[Frame], last_lsn: int, acked: int) -> None:
        """Take in what the log holds now; what a cut took away makes room for other records."""
        news = [(one.first_lsn, one.first_lsn + one.count - 1, one.payload) for one in frames]
        begin = news[0][0] if news else last_lsn + 1
        old = self._frames
        now = [one for one in old if one[0] < begin] + news
        if not self._is_whole(now, last_lsn):
            now, old, self._base = news, [], chunks
            self._fold()
        same = sum(1 for one in old if one[1] <= self._acked)  # by then, not by now
        acked, self._acked = self._acked, acked
        if now[:same] != old[:same]:
            raise Broken(f"records up to LSN {acked} are acknowledged, and changed")
        if now[: len(old)] != old:
            old = []
            self._fold()
        for first, last, payload in now[len(old) :]:
            self._take(first, last, payload)
        self._frames = now

    def _is_whole(self, frames: list[tuple[int, int, bytes]], last_lsn: int) -> bool:
        """Tell whether the frames lead from what the fold begins with to the end of the log."""
        base = image.load(self._base).lsn if self._base else 0
        ends = [base, *(last for _, last, _ in frames)]
        follow = all(first == end + 1 for end, (first, _, _) in zip(ends, frames, strict=False))
        return follow and ends[-1] == last_lsn

    def _fold(self) -> None:
        """Begin anew; indexed, because a replay drops what only the indexes know to be unused."""
        self._state = image.load(self._base) if self._base else State(indexed=False)
        self._state.index()
        self.digests = {self._state.lsn: digest(self._state)}

    def _take(self, first: int, last: int, payload: bytes) -> None:
        for lsn, record in enumerate(decode(payload), first):
            apply(self._state, lsn, record)
        assert self._state.lsn == last, f"frame {first} to {last}"
        self.digests[last] = digest(self._state)


class CrashStates:
    """Looks at the moments of one life. `root` and `segment_bytes` are those of its store."""

    def __init__(
        self, root: str, segment_bytes: int, dice: random.Random, states_max: int = STATES_MAX
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._root = root
        self._segment_bytes = segment_bytes
        self._dice = dice
        self._states_max = states_max
        self._book = Book()
        self._known: dict[tuple[int, tuple[int, ...]], Found] = {}
        self._history = History()
        self._learnt: tuple[dict[str, dict[str, Inode]], list[int]] = {}, []
        self._replays: dict[Told, bytes] = {}
        self._bench = MemoryDisk()
        self._store: Store | None = None  # on the bench
        self._format = b""

    def look(self, disk: MemoryDisk, acked: int, appended: int) -> None:
        """Judge what a cut may leave of `disk` now. Raises Broken.

        `acked`: the LSN that was told to be durable; `appended`: the last one that may be there.
        """
        self.counts["moments"] += 1
        self._learn(disk, acked)
        digests = self._history.digests
        cuts = Cuts(disk, self._book, self._dice, is_read, self._states_max)
        examined = distinct = 0
        known, again = self._known, self._dice.random
        for layout, contents in cuts:
            examined += 1
            key = layout.read_number, contents[: layout.read]
            found = known.get(key)
            if found is None or again() < AGAIN:
                distinct += found is None
                found = known[key] = self._really(layout, contents, found)
            if found.refused or not acked <= found.lsn <= appended:
                raise Broken(_complaint(layout, contents, found, acked, appended))
            if digests.get(found.lsn) != found.digest:
                raise Broken(
                    f"State at LSN {found.lsn} is not what the records before it give\n"
                    + layout.describe(contents)
                )
        self.counts["examined"] += examined
        self.counts["distinct"] += distinct

    def _learn(self, disk: MemoryDisk, acked: int) -> None:
        """Learn the records from the disk as the next process finds it after kill -9."""
        cached = {path: dict(one.names) for path, one in disk.dirs.items()}
        written = [inode.writes for names in cached.values() for inode in names.values()]
        if (cached, written) == self._learnt:
            return
        self._learnt = cached, written
        store = self._open(disk.clone())
        try:
            recovery = store.recover()
            chunks, frames = list(recovery.chunks()), list(recovery.frames())
        except CkptdError as bad:
            raise Broken(f"after a kill the log is refused: {bad.message}") from bad
        finally:
            store.close()
        self._history.learn(chunks, frames, recovery.last_lsn, acked)

    def _open(self, disk: MemoryDisk) -> Store:
        return Store.open(self._root, disk, segment_bytes=self._segment_bytes, has_threads=False)

    def _recovered(self, disk: MemoryDisk) -> Found:
        """Recover a disk and replay its log; names are synced by that, no content changes."""
        try:
            store = self._open(disk)
            try:
                return self._read(store)
            finally:
                store.close()
        except CkptdError as bad:
            return Found(-1, b"", bad.message)

    def _read(self, store: Store) -> Found:
        try:
            recovery = store.recover()
            return Found(recovery.last_lsn, self._replayed(recovery))
        except CkptdError as bad:
            return Found(-1, b"", bad.message)

    def _benched(self) -> Found:
        """Recover what is on the bench. A store is opened anew only where FORMAT is another."""
        root = self._bench.dirs.get(self._root)
        file = root.names.get("FORMAT") if root else None
        if file is None:
            return self._recovered(self._bench)
        if self._store is None or file.data != self._format:
            self._store, self._format = None, bytes(file.data)
            try:
                self._store = self._open(self._bench)
            except CkptdError as bad:
                return Found(-1, b"", bad.message)
        return self._read(self._store)

    def _replayed(self, recovery: Recovery) -> bytes:
        """Return the digest of State; a replay of the very same bytes is remembered."""
        chunks, frames = list(recovery.chunks()), list(recovery.frames())
        told = recovery.snapshot_lsn, (*chunks, *(one.payload for one in frames))
        known = self._replays.get(told)
        if known is None:
            self.counts["replays"] += 1
            state = replay(chunks, frames).state
            if state.lsn != recovery.last_lsn:
                raise Broken(f"the log ends at LSN {recovery.last_lsn}, State at {state.lsn}")
            known = self._replays[told] = digest(state)
        return known

    def _really(self, layout: Layout, contents: tuple[int, ...], before: Found | None) -> Found:
        """Recover a state by the real code, and a part of the states further than that."""
        layout.put(contents, self._bench)
        found = self._benched()
        if before is not None:
            self.counts["again"] += 1
            if before != found:
                raise Broken(f"equal contents gave {before}, then {found}")
        elif not found.refused and self._dice.random() < ARMED:
            layout.put(contents, self._bench)
            self._arm(self._bench.clone(), found)
        return found

    def _arm(self, disk: MemoryDisk, found: Found) -> None:
        """Begin a reign on a state and write to it; before and after, nothing may get lost."""
        self.counts["armed"] += 1
        if self._dice.random() < INSIDE:
            disk.watch = lambda _kind, _path: self._inside(disk, found)
        store = self._open(disk)
        recovery = store.recover()
        wal = store.arm(recovery, epoch=recovery.epoch + 1, boot_id="b", at_ns=1)
        disk.watch = None
        self._expect(disk.clone(), found)
        self._expect(disk.crash(self._dice, 0.0), found)
        record = DaemonStarted(1, recovery.epoch + 1, "b", "0", 1, clean=True)
        wal.append(msgspec.msgpack.encode([record]), 1)
        wal.sync()
        store.close()
        later = self._recovered(disk.crash(self._dice, self._dice.random()))
        if later.refused or later.lsn != found.lsn + 1:
            raise Broken(f"recovered up to LSN {found.lsn}, wrote one more, then {later}")

    def _inside(self, disk: MemoryDisk, found: Found) -> None:
        """Cut a recovery off: what it found once must be found for ever."""
        for layout, contents in Cuts(disk, self._book, self._dice, is_read, INSIDE_MAX):
            self.counts["inside"] += 1
            layout.put(contents, self._bench)
            self._judge_same(self._benched(), found)

    def _expect(self, disk: MemoryDisk, found: Found) -> None:
        self._judge_same(self._recovered(disk), found)

    def _judge_same(self, now: Found, found: Found) -> None:
        if now != found:
            raise Broken(f"a recovery gave LSN {found.lsn}, the next one {now}")


def _complaint(
    layout: Layout, contents: tuple[int, ...], found: Found, acked: int, appended: int
) -> str:
    what = f"refused: {found.refused}" if found.refused else f"recovered up to LSN {found.lsn}"
    return (
        f"{what}; acknowledged were {acked}, appended {appended}; what the cut left:\n"
        + layout.describe(contents)
    )
