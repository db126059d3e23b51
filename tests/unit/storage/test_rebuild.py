"""Damage, then repair or salvage, also where the tool itself is cut off at any step."""

import random
from collections.abc import Callable

import pytest

from ckptd.protocol.errors import CkptdError, Corrupt, NotFound
from ckptd.storage import examine, rebuild, segment
from ckptd.storage.rebuild import Rebuilt
from ckptd.storage.recovery import Recovery
from ckptd.storage.segment import BLOCK_BYTES, Place
from ckptd.storage.store import Store
from tests.fakes.log_model import ROOT, Writer, numbers_in, open_store, replay
from tests.fakes.memory_disk import MemoryDisk


class PowerCut(Exception):
    """The disk goes away in the middle of an operation."""


def damaged(seed: int, where: int, *, snapshots: int = 0) -> tuple[MemoryDisk, int, int]:
    """Return a disk whose `where`-th segment has a flipped bit, its last LSN, the flipped byte."""
    rng = random.Random(seed)
    disk = MemoryDisk(seed=seed)
    writer = Writer(disk)
    for n in range(70):
        writer.append(rng.randint(1, 5))
        if snapshots and n % (70 // snapshots) == 9:
            writer.snapshot()
    writer.sync()
    writer.wal.mark_idle()
    disk.locked.clear()
    names = segment.newest_names(disk.names(f"{ROOT}/wal"))[0]
    inode = disk.inode(f"{ROOT}/wal/{names[where]}")
    store = open_store(disk)
    offsets = [offset for name, offset, *_ in frames_of(store.place) if name == str(names[where])]
    disk.locked.clear()
    byte = rng.choice(offsets[:-1]) + rng.randrange(40)
    inode.data[byte] ^= 1 << rng.randrange(8)
    inode.disk = bytearray(inode.data)
    return disk, writer.acked, byte


def frames_of(place: Place) -> list[tuple[str, int]]:
    return [(name, offset) for name, offset, _, _ in examine.all_frames(place)]


def everything(recovery: Recovery) -> tuple[list[int], list[int]]:
    """Return (the records that are there, those that are lost), checking each."""
    there, lost = [], []
    for one in recovery.frames():
        if one.payload:
            there += numbers_in(one)
        else:
            lost += range(one.first_lsn, one.first_lsn + one.count)
    return there, lost


@pytest.mark.parametrize("where", [0, 1, -1])
@pytest.mark.parametrize("seed", range(8))
def test_the_flipped_bit_is_found_and_named(seed: int, where: int) -> None:
    disk, _, byte = damaged(seed, where)
    store = open_store(disk)
    with pytest.raises(Corrupt):
        store.recover()
    found = list(examine.examine(store.place))
    assert [finding.flipped[0] for finding in found if finding.flipped] == [byte]


@pytest.mark.parametrize("at", range(0, 40, 4))
@pytest.mark.parametrize("bits", [(2,), (2, 5)])
def test_of_a_frame_one_flipped_bit_is_named_and_of_more_none(
    at: int, bits: tuple[int, ...]
) -> None:
    disk = MemoryDisk()
    writer = Writer(disk)
    for _ in range(5):
        writer.append(3)
    writer.sync()
    disk.locked.clear()
    place = open_store(disk).place
    name, offset = frames_of(place)[2]
    for bit in bits:
        disk.inode(f"{ROOT}/wal/{name}").data[offset + at] ^= 1 << bit
    (found,) = examine.examine(place)
    assert found.offset == offset
    assert found.flipped == ((offset + at, bits[0]) if len(bits) == 1 else None)


def test_a_flipped_bit_in_a_header_is_named() -> None:
    disk, _, _ = damaged(1, 1)
    names = segment.newest_names(disk.names(f"{ROOT}/wal"))[0]
    disk.inode(f"{ROOT}/wal/{names[0]}").data[100] ^= 8
    found = next(examine.examine(open_store(disk).place))
    assert (found.file, found.flipped) == (str(names[0]), (100, 3))


@pytest.mark.parametrize("where", [0, 1, -1])
@pytest.mark.parametrize("seed", range(4))
def test_salvage_keeps_every_frame_that_checks_and_marks_the_rest(seed: int, where: int) -> None:
    disk, last, _ = damaged(seed, where)
    done = rebuild.salvage(open_store(disk).place, 5)
    disk.locked.clear()
    recovery = open_store(disk).recover()
    there, lost = everything(recovery)
    assert sorted(there + lost) == list(range(1, last + 1))
    assert 1 <= len(lost) <= 5
    assert done.lost == [(lost[0], lost[-1])]
    assert recovery.last_lsn == done.last_lsn == last
    assert any("salvaged" in note for note in recovery.report.notes)
    assert not list(examine.examine(open_store_again(disk).place))
    kept = disk.names(done.kept_in)
    assert len([name for name in kept if name.endswith(".wal")]) >= 3


def open_store_again(disk: MemoryDisk) -> Store:
    disk.locked.clear()
    return open_store(disk)


def test_salvage_of_a_lost_segment_keeps_its_place() -> None:
    disk, last, _ = damaged(3, 1)
    names = segment.newest_names(disk.names(f"{ROOT}/wal"))[0]
    disk.unlink(f"{ROOT}/wal/{names[1]}")
    rebuild.salvage(open_store(disk).place, 5)
    there, lost = everything(open_store_again(disk).recover())
    assert lost == list(range(names[1].first_lsn, names[2].first_lsn))
    assert sorted(there + lost) == list(range(1, last + 1))


def test_salvage_of_a_lost_log_goes_on_from_the_snapshot() -> None:
    disk, _, _ = damaged(3, 1, snapshots=3)
    for name in segment.newest_names(disk.names(f"{ROOT}/wal"))[0]:
        disk.unlink(f"{ROOT}/wal/{name}")
    rebuild.salvage(open_store(disk).place, 5)
    recovery = open_store_again(disk).recover()
    assert recovery.last_lsn == recovery.snapshot_lsn > 0


@pytest.mark.parametrize("where", [1, -1])
@pytest.mark.parametrize("seed", range(4))
def test_repair_cuts_after_an_lsn_and_keeps_the_rest_in_quarantine(seed: int, where: int) -> None:
    disk, last, _ = damaged(seed, where)
    store = open_store(disk)
    with pytest.raises(NotFound, match="cannot be cut after") as refused:
        rebuild.repair(store.place, last, 5)
    whole = int(refused.value.hint.split()[2].rstrip(","))
    assert whole < last
    with pytest.raises(Corrupt):
        store.recover()  # the refusal has changed nothing
    done = rebuild.repair(store.place, whole, 5)
    recovery = open_store_again(disk).recover()
    assert replay(recovery) == done.last_lsn == whole
    assert any("repaired" in note for note in recovery.report.notes)
    disk.locked.clear()
    writer = Writer(disk, whole, whole)
    writer.append(3)
    writer.close()
    assert replay(open_store(disk).recover()) == whole + 3


def test_repair_before_what_the_snapshots_know_is_refused() -> None:
    disk, _, _ = damaged(2, -1, snapshots=3)
    with pytest.raises(NotFound):
        rebuild.repair(open_store(disk).place, 1, 5)


@pytest.mark.parametrize(
    "mend", [lambda place: rebuild.salvage(place, 5), lambda place: rebuild.repair(place, 59, 5)]
)
def test_a_mending_that_is_cut_off_can_be_run_again(mend: Callable[[Place], Rebuilt]) -> None:
    rng = random.Random(4)
    wanted = None
    for cut in range(200):
        disk, _, _ = damaged(4, -2)
        store = open_store(disk)
        steps = 0

        def watch(kind: str, path: str, cut: int = cut) -> None:
            nonlocal steps
            steps += 1
            if steps > cut:
                raise PowerCut

        wanted = wanted or mended(mend)
        disk.watch = watch
        try:
            mend(store.place)
        except PowerCut:
            disk.watch = None
            for keep in (0.0, 1.0, rng.random()):
                after = disk.crash(rng, keep)
                mend(open_store(after).place)
                assert everything(open_store_again(after).recover()) == wanted
            continue
        break
    else:
        pytest.fail("it never comes to an end")


def mended(mend: Callable[[Place], Rebuilt]) -> tuple[list[int], list[int]]:
    disk, _, _ = damaged(4, -2)
    mend(open_store(disk).place)
    return everything(open_store_again(disk).recover())


def test_salvage_without_anything_is_refused() -> None:
    disk = MemoryDisk()
    Writer(disk)
    for name in segment.newest_names(disk.names(f"{ROOT}/wal"))[0]:
        disk.unlink(f"{ROOT}/wal/{name}")
    with pytest.raises(CkptdError):
        rebuild.salvage(open_store_again(disk).place, 5)


def test_a_segment_whose_header_is_gone_is_salvaged_from_its_name() -> None:
    disk, last, _ = damaged(6, 0)
    names = segment.newest_names(disk.names(f"{ROOT}/wal"))[0]
    inode = disk.inode(f"{ROOT}/wal/{names[1]}")
    inode.data[:BLOCK_BYTES] = bytes(BLOCK_BYTES)
    rebuild.salvage(open_store(disk).place, 5)
    there, lost = everything(open_store_again(disk).recover())
    assert sorted(there + lost) == list(range(1, last + 1))
    assert len(lost) <= 5
