"""What a cut may leave is counted exactly, a good log survives all of it, a bad one is found."""

import random

import pytest

from ckptd.storage.store import Store
from tests.fakes.memory_disk import SECTOR, MemoryDisk
from tests.sim.crash_states import Broken, CrashStates
from tests.sim.cuts import Book, Cuts
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
