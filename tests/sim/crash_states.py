"""What a power cut may leave at one moment, each state recovered by the real code and judged.

A moment is a MemoryDisk before any of its operations; it is not disturbed. `CrashStates.look` takes
the states that `cuts.py` finds and checks of each: acknowledged <= recovered <= appended; the bytes
hold just that, read by `log_reader.py`, which knows FORMAT.md and no code of ckptd; State is what a
fold of the records up to there gives, which are those that were submitted, where whoever lives
tells what he submits; a second recovery, also one that was cut off in its middle, gives the same.

The records come from the bytes too, by `log_reader.py`. Their fold is that of `core/apply.py`;
after every frame its tasks must be those of `plain_state.py`, where the log is known from LSN 1.

A recovery is a function of the files that it reads, so contents that an earlier moment had are
judged from the remembered result, by the bounds of their own moment. Counts: `examined` states
(distinct contents of their moment), `distinct` contents that were really recovered, `again` those
recovered once more to see that the memory is right, `armed`, `inside` states within a recovery.
"""

import random
from collections import Counter
from collections.abc import Iterable
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
from ckptd.storage.recovery import Recovery
from ckptd.storage.store import Store
from tests.fakes.memory_disk import Inode, MemoryDisk
from tests.sim import log_reader
from tests.sim.cuts import Book, Cuts, Layout
from tests.sim.log_reader import Log, Piece, Segment, Snapshot, Unreadable
from tests.sim.plain_state import PlainState, picture_of

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

    The order of environments tells only whether one was out of use for a while. The picture is
    there for what a snapshot might leave out, of all States alike.
    """
    state.envs = dict(sorted(state.envs.items()))
    told = b"".join(image.chunks(state)) + repr(picture_of(state)).encode()
    return blake2b(told, digest_size=12).digest()


class History:
    """The records as they were written, and the digest of State after every frame.

    `submitted`: what was given to append, by first LSN, where somebody tells; records that the log
    holds are none but these.
    """

    def __init__(self, submitted: dict[int, Piece] | None) -> None:
        self.digests: dict[int, bytes] = {}
        self.folded = 0  # frames of which both folds agreed
        self._submitted = submitted
        self._base: list[bytes] = []  # chunks of the snapshot that the fold begins with
        self._frames: list[Piece] = []
        self._state = State()
        self._plain: PlainState | None = None
        self._acked = 0
        self._fold()

    def learn(self, log: Log, acked: int) -> None:
        """Take in what the log holds now; what a cut took away makes room for other records."""
        news = log.pieces()
        begin = news[0].first if news else log.last + 1
        old = self._frames
        now = [one for one in old if one.first < begin] + news
        if not self._is_whole(now, log.last):
            if self._submitted is not None:
                raise Broken(f"records before LSN {begin} are in no snapshot and in no segment")
            now, old = news, []
            self._base = list(log.snapshot.chunks) if log.snapshot else []
            self._fold()
            now = [one for one in now if one.last > self._state.lsn]
        same = sum(1 for one in old if one.last <= self._acked)  # by then, not by now
        acked, self._acked = self._acked, acked
        if now[:same] != old[:same]:
            raise Broken(f"records up to LSN {acked} are acknowledged, and changed")
        if now[: len(old)] != old:
            old = []
            self._fold()
        for one in now[len(old) :]:
            self._take(one)
        self._frames = now

    def _is_whole(self, frames: list[Piece], last_lsn: int) -> bool:
        """Tell whether the frames lead from what the fold begins with to the end of the log."""
        base = image.load(self._base).lsn if self._base else 0
        ends = [base, *(one.last for one in frames)]
        follow = all(one.first == end + 1 for end, one in zip(ends, frames, strict=False))
        return follow and ends[-1] == last_lsn

    def _fold(self) -> None:
        """Begin anew; indexed, because a replay drops what only the indexes know to be unused."""
        self._state = image.load(self._base) if self._base else State(indexed=False)
        self._state.index()
        self._plain = None if self._base else PlainState()
        self.digests = {self._state.lsn: digest(self._state)}

    def _take(self, one: Piece) -> None:
        if self._submitted is not None and self._submitted.get(one.first) != one:
            raise Broken(f"the log holds records {one.first} to {one.last} that nobody submitted")
        for lsn, record in enumerate(decode(one.payload), one.first):
            apply(self._state, lsn, record)
        assert self._state.lsn == one.last, f"frame {one.first} to {one.last}"
        self.digests[one.last] = digest(self._state)
        if self._plain is not None:
            for plain in log_reader.records(one.payload):
                self._plain.take(plain)
            ours, theirs = self._plain.picture(), picture_of(self._state)
            if ours != theirs:
                raise Broken(f"at LSN {one.last} the tasks are {theirs}, the records give {ours}")
            self.folded += 1


class KnownFiles:
    """Segments and snapshots by content: each is read once, by `log_reader.py`."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._format, self._store = -1, b""
        self._read: dict[tuple[str, int], Segment | Snapshot | None] = {}

    def log(self, files: Iterable[tuple[str, int, Inode]]) -> Log | None:
        """Return the log in these files, None where no store was made yet. Raises Unreadable.

        Each is its path, a number of its own for each content, the file as a start would read it.
        """
        found = {path: (number, file) for path, number, file in files}
        if (told := found.pop(f"{self._root}/FORMAT", None)) is None:
            return None
        if told[0] != self._format:
            store = log_reader.read_store(bytes(told[1].data))
            self._format, self._store, self._read = told[0], store, {}
        segments, snapshots = [], []
        for path, (number, file) in found.items():
            key = path, number
            if key not in self._read:
                self._read[key] = self._file(path, bytes(file.data))
            one = self._read[key]
            if isinstance(one, Segment):
                segments.append(one)
            elif one is not None:
                snapshots.append(one)
        return log_reader.read_log(segments, snapshots)

    def _file(self, path: str, data: bytes) -> Segment | Snapshot | None:
        folder, _, name = path.rpartition("/")
        if folder == f"{self._root}/wal" and name.endswith(".wal"):
            return log_reader.read_segment(name, data, self._store)
        if folder == f"{self._root}/snap" and name.endswith(".snap"):
            return log_reader.read_snapshot(name, data, self._store)
        return None


class CrashStates:
    """Looks at the moments of one life. `root` and `segment_bytes` are those of its store."""

    def __init__(
        self,
        root: str,
        segment_bytes: int,
        dice: random.Random,
        states_max: int = STATES_MAX,
        submitted: dict[int, Piece] | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._root = root
        self._segment_bytes = segment_bytes
        self._dice = dice
        self._states_max = states_max
        self._book = Book()
        self._known: dict[tuple[int, tuple[int, ...]], Found] = {}
        self._history = History(submitted)
        self._files = KnownFiles(root)  # as a cut leaves them
        self._cached = KnownFiles(root)  # as the page cache has them
        self._cached_numbers: dict[tuple[int, int, int], tuple[int, Inode, Inode]] = {}
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
        self._bench.dirs = disk.clone().dirs
        self._bench.locked.clear()
        found = self._benched()
        if found.refused:
            raise Broken(f"after a kill the log is refused: {found.refused}")
        log = self._log(self._cached, self._in_cache(disk))
        if log is not None:
            self._history.learn(log, acked)
        self._agree(found, log)
        self.counts["folded"] += self._history.folded
        self._history.folded = 0

    def _in_cache(self, disk: MemoryDisk) -> list[tuple[str, int, Inode]]:
        """Return the files as a start after kill -9 reads them."""
        return [
            (f"{path}/{name}", *self._as_read(inode))
            for path, one in disk.dirs.items()
            for name, inode in one.names.items()
            if is_read(name)
        ]

    def _as_read(self, inode: Inode) -> tuple[int, Inode]:
        """Return a number for the content, and the file, without what a failed sync has lost."""
        key = id(inode), inode.writes, inode.syncs if inode.lost else -1
        if key not in self._cached_numbers:
            read = inode
            if inode.lost:
                read = inode.clone()
                read.drop_cache()
            # Holding the inode keeps its id from being given to another one.
            self._cached_numbers[key] = len(self._cached_numbers), read, inode
        return self._cached_numbers[key][:2]

    @staticmethod
    def _log(files: KnownFiles, found: Iterable[tuple[str, int, Inode]]) -> Log | None:
        try:
            return files.log(found)
        except Unreadable as bad:
            raise Broken(f"by FORMAT.md there is no log: {bad}") from bad

    @staticmethod
    def _agree(found: Found, log: Log | None) -> None:
        """What was recovered is what the bytes hold."""
        last = log.last if log else 0
        if found.lsn != last:
            raise Broken(f"recovered up to LSN {found.lsn}, by FORMAT.md the log ends at {last}")

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
        if not found.refused:
            self._agree(found, self._log(self._files, layout.files_read(contents)))
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
