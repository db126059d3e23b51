"""What a cut may leave is counted exactly, a good log survives all of it, a bad one is found."""

import errno
import os
import random
from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from ckptd.core import image
from ckptd.core.apply import apply
from ckptd.core.records import AnyRecord, Moved, Phase
from ckptd.core.state import State, TaskTable
from ckptd.storage import segment
from ckptd.storage.frame import Head
from ckptd.storage.store import Store
from ckptd.storage.wal import Wal, WalFailed
from tests import figures
from tests.fakes.memory_disk import SECTOR, MemoryDisk
from tests.sim import log_reader
from tests.sim.crash_states import Broken, CrashStates
from tests.sim.cuts import Book, Cuts
from tests.sim.log_reader import Log
from tests.sim.states import ROOT, LogLife

LIVES_MAX = 24  # a mistake must be found within so many
FEW = 24  # states of a moment


def _cuts(disk: MemoryDisk, most: int = 1 << 20) -> list[str]:
    """Return every state of a disk, in words and bytes."""
    bench, found = MemoryDisk(), []
    for layout, contents in Cuts(disk, Book(), random.Random(1), lambda _name: True, most):
        layout.put(contents, bench)
        files = {name: bytes(one.disk) for name, one in bench.dirs["/d"].names.items()}
        found.append(repr(sorted(files.items())))
    return found


def _disk(sectors: int) -> MemoryDisk:
    """Return a disk with one file of sectors that are not synced, each another one."""
    disk = MemoryDisk()
    disk.make_dir("/d", 0o700)
    file = disk.create("/d/a")
    file.write(bytes(sectors * SECTOR), 0)
    file.sync()
    disk.sync_dir("/d")
    file.write(b"".join(bytes([65 + at]) * SECTOR for at in range(sectors)), 0)
    return disk


@pytest.mark.parametrize("sectors", [1, 3, 6])
def test_k_unsynced_sectors_leave_two_to_the_k_states(sectors: int) -> None:
    found = _cuts(_disk(sectors))
    assert len(found) == len(set(found)) == 2**sectors


def test_each_version_that_a_sector_went_through_may_be_the_one_on_the_disk() -> None:
    disk = _disk(3)
    disk.open("/d/a", write=True).write(b"again", 2 * SECTOR)
    assert len(_cuts(disk)) == 2 * 2 * 3


def test_names_come_and_go_in_any_subset() -> None:
    disk = _disk(2)
    disk.rename("/d/a", "/d/b")
    disk.create("/d/c")
    spaces = {("a",), ("b",), ("a", "c"), ("b", "c")}
    assert len(_cuts(disk)) == len(spaces) * 2**2


def test_a_file_that_grew_has_any_of_its_sizes_and_choices_without_effect_do_not_count() -> None:
    disk = MemoryDisk()
    disk.make_dir("/d", 0o700)
    file = disk.create("/d/a")
    disk.sync_dir("/d")
    file.write(b"a" * SECTOR, 0)
    file.write(b"b" * 100, SECTOR)
    file.write(bytes(10), SECTOR + 100)  # zeros, as a hole there has them
    sizes_and_sectors = 1 + 2 + 2 * 2 + 2 * 2
    assert len(_cuts(disk)) == sizes_and_sectors


def test_what_is_synced_is_in_every_state() -> None:
    disk = _disk(4)
    disk.open("/d/a", write=True).sync()
    assert _cuts(disk) == [repr([("a", bytes(disk.inode("/d/a").data))])]


def test_many_states_are_drawn_and_none_of_them_twice() -> None:
    found = _cuts(_disk(20), most=50)
    assert len(found) == len(set(found)) == 50


def test_a_look_leaves_the_moment_as_it_was() -> None:
    life = LogLife(3)
    life.run(reigns=1, steps=3)

    def picture() -> str:
        return repr(
            [
                (path, list(one.names), list(one.disk), len(one.pending),
                 [(bytes(i.data), bytes(i.disk), i.dirty, i.sizes) for i in one.names.values()])
                for path, one in life.disk.dirs.items()
            ]
        )  # fmt: skip

    before = picture()
    CrashStates(ROOT, life.segment_bytes, random.Random(1)).look(
        life.disk, life.acked, life.appended
    )
    assert picture() == before


def test_a_life_survives_every_cut_and_its_seed_tells_all() -> None:
    once, again = LogLife(11, FEW), LogLife(11, FEW)
    once.run(reigns=3)
    again.run(reigns=3)
    assert once.states.counts == again.states.counts
    assert once.states.counts["examined"] > once.states.counts["distinct"] > 100
    assert once.states.counts["armed"] > 0


def test_what_a_failed_sync_has_lost_is_judged_as_the_next_start_reads_it() -> None:
    """The cache still shows it, clean; a start asks the disk."""
    life = LogLife(3)
    _, wal = life._begin()
    life._append(wal, life._decided())
    names = life.disk.dirs[f"{ROOT}/wal"].names
    inode = names[max(name for name in names if name.endswith(".wal"))]

    def fails(kind: str, _path: str) -> None:
        if kind == "sync":
            inode.fail_sync(random.Random(2))
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    life.disk.watch = fails
    with pytest.raises(WalFailed):
        wal.sync()
    life.disk.watch = None
    life.disk.locked.clear()

    assert inode.lost
    CrashStates(ROOT, life.segment_bytes, random.Random(1)).look(
        life.disk, life.acked, life.appended
    )


class AcknowledgesEarly(LogLife):
    """Tells the client before the sync."""

    def _before(self, kind: str, path: str) -> None:
        self.acked = self.appended
        super()._before(kind, path)


class ShowsTooMuch(LogLife):
    """Takes its snapshots of a State that the log may still lose."""

    def _snapshot(self, store: Store) -> None:
        self._taken = self._taken[0], self._chunks() if self._taken[1] else []
        super()._snapshot(store)


@pytest.mark.parametrize("kind", [AcknowledgesEarly, ShowsTooMuch])
def test_a_life_that_does_wrong_is_found(kind: type[LogLife]) -> None:
    with pytest.raises(Broken):
        _live_on(kind)


@pytest.mark.parametrize(
    "deaf",
    [
        "sync",
        "sync spare.tmp",  # the name under which the segment in use was opened
        "sync .snap.tmp",
        "sync_dir",
        "sync_dir /wal",
        "sync_dir /snap",  # so the log is removed before the name of its snapshot is durable
    ],
)
def test_a_disk_that_only_pretends_is_found(deaf: str) -> None:
    with pytest.raises(Broken):
        _live_on(LogLife, deaf)


def _live_on(kind: type[LogLife], deaf: str = "") -> None:
    for seed in range(1, LIVES_MAX + 1):
        life = kind(seed, FEW)
        life.disk.deaf |= {deaf} if deaf else set()
        life.run()


def forgetful_apply(patch: pytest.MonkeyPatch) -> None:
    """That a task is held is passed over, by whoever folds records with the daemon's own code."""

    def skip(state: State, lsn: int, record: AnyRecord) -> None:
        if isinstance(record, Moved) and record.phase is Phase.HELD:
            state.lsn = lsn
        else:
            apply(state, lsn, record)

    for where in ("ckptd.daemon.recovery", "tests.sim.crash_states", "tests.sim.states"):
        patch.setattr(f"{where}.apply", skip)


def rewriting_append(patch: pytest.MonkeyPatch) -> None:
    """The log takes other records than it was given, and keeps these well."""
    append = Wal.append

    def other(wal: Wal, payload: bytes, count: int) -> int:
        return append(wal, payload.replace(b"xxxxx", b"yxxxx"), count)

    patch.setattr(Wal, "append", other)


def modest_recovery(patch: pytest.MonkeyPatch) -> None:
    """Where the end of the log was not promised yet, a recovery does not read its last frame."""
    frames = segment.frames

    def fewer(*args: object) -> Iterator[tuple[int, Head]]:
        found = list(frames(*args))  # type: ignore[arg-type]
        is_last_promised = len(found) < 2 or found[-1][1].durable_lsn >= found[-2][1].last_lsn
        yield from found if is_last_promised else found[:-1]

    patch.setattr(segment, "frames", fewer)


def blind_image(patch: pytest.MonkeyPatch) -> None:
    """A snapshot says of no task why it is where it is."""
    chunks = image.chunks

    def without(state: State) -> Iterator[bytes]:
        bare = State(indexed=False)
        bare.__dict__.update(state.__dict__, tasks=TaskTable())
        for task in state.tasks.ascending(0):
            bare.tasks.put(replace(task, priority=0, reason=""))
        return chunks(bare)

    patch.setattr(image, "chunks", without)


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (forgetful_apply, "the records give"),
        (rewriting_append, "that nobody submitted"),
        (modest_recovery, r"by FORMAT\.md the log ends at"),
        (blind_image, "is not what the records before it give"),
    ],
)
def test_a_mistake_that_writer_and_reader_share_is_found(
    mistake: Callable[[pytest.MonkeyPatch], None], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    with pytest.raises(Broken, match=told):
        _live_on(LogLife)


def test_a_start_that_finds_less_than_was_acknowledged_is_found() -> None:
    life = LogLife(3, FEW)
    life.run(reigns=1)
    life.acked = life.appended = life.appended + 1
    with pytest.raises(Broken, match="acknowledged were"):
        life._judge(life.acked - 1)


def _golden_log(damage: int = 0) -> Log:
    """Return the kept log as `log_reader` reads it; a bit may be flipped in its last segment."""
    root = figures.ROOT / "tests" / "golden" / "format_1"
    store = log_reader.read_store((root / "FORMAT").read_bytes())
    segments = []
    for path in sorted(root.glob("wal/*.wal")):
        data = bytearray(path.read_bytes())
        if damage and "31-" in path.name:
            data[damage] ^= 4
        segments.append(log_reader.read_segment(path.name, bytes(data), store))
    (path,) = root.glob("snap/*.snap")
    snapshot = log_reader.read_snapshot(path.name, path.read_bytes(), store)
    assert snapshot is not None
    return log_reader.read_log(segments, [snapshot])


def test_the_kept_log_of_format_1_is_read_by_its_description_alone() -> None:
    log = _golden_log()
    assert log.snapshot is not None
    assert (log.last, log.snapshot.lsn, log.snapshot.until) == (48, 45, 45)
    assert log.snapshot.chunks == (b"chunk 0", bytes(range(100)))
    assert log.pieces()[-1].payload == b"after the snapshot"


@pytest.mark.parametrize("at", [0, 40, 4_095, 4_096 + 4, 4_096 + 40])
def test_a_bit_that_flipped_makes_the_kept_log_unreadable(at: int) -> None:
    with pytest.raises(log_reader.Unreadable):
        _golden_log(at or 1)
