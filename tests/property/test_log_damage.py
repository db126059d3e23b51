"""What a disk can do to the log: power cut anywhere, torn, flipped, garbled, cut, failed, full."""

import contextlib
import errno
import itertools
import random
from collections.abc import Callable

import pytest

from ckptd.protocol.errors import BadConfig, CkptdError, Corrupt, DiskFull
from ckptd.storage import frame, segment
from ckptd.storage.segment import BLOCK_BYTES
from ckptd.storage.store import Store
from ckptd.storage.wal import WalFailed
from tests.fakes.log_model import ROOT, SMALL, CrashAtEveryStep, Writer, open_store, replay
from tests.fakes.memory_disk import Inode, MemoryDisk


def quiet_log(seed: int, *, snapshots: int = 0) -> tuple[MemoryDisk, int]:
    """Return a disk with a log of some segments, all synced and closed by an idle marker."""
    rng = random.Random(seed)
    disk = MemoryDisk(seed=seed)
    writer = Writer(disk)
    for n in range(60):
        writer.append(rng.randint(1, 5))
        if rng.random() < 0.5:
            writer.sync()
        if snapshots and n % (60 // snapshots) == 5:
            writer.snapshot()
    writer.sync()
    writer.wal.mark_idle()
    writer.wal.sync()
    disk.locked.clear()
    return disk, writer.acked


def log_files(disk: MemoryDisk) -> list[tuple[str, Inode]]:
    names, _ = segment.newest_names(disk.names(f"{ROOT}/wal"))
    return [(str(name), disk.inode(f"{ROOT}/wal/{name}")) for name in names]


def must_refuse(store: Store, what: str = "the damage") -> None:
    try:
        store.recover()
    except Corrupt:
        return
    pytest.fail(f"{what} was not seen")


def ends(store: Store, inode: Inode) -> list[int]:
    """Return the offset after each frame of a segment."""
    data = memoryview(bytes(inode.data))
    found = frame.find_later(data, BLOCK_BYTES, store.place.seed)
    return [BLOCK_BYTES, *(offset + head.size for offset, head in found)]


def with_damage(
    inode: Inode, damage: Callable[[bytearray], None], check: Callable[[], None]
) -> None:
    """Damage one file, check, and put it back."""
    before = bytes(inode.data)
    damage(inode.data)
    inode.disk = bytearray(inode.data)
    try:
        check()
    finally:
        inode.data, inode.disk = bytearray(before), bytearray(before)


def test_every_one_of_10000_flipped_bits_in_synced_data_is_seen() -> None:
    rng = random.Random(1)
    for seed in range(20):
        disk, acked = quiet_log(seed)
        store = open_store(disk)
        files = log_files(disk)
        marker = ends(store, files[-1][1])[-2]
        assert len(files) > 2
        for _ in range(500):
            name, inode = rng.choice(files)
            end = ends(store, inode)[-1] if inode is not files[-1][1] else marker
            byte, bit = rng.randrange(end), rng.randrange(8)
            inode.data[byte] ^= 1 << bit
            must_refuse(store, f"seed {seed}: bit {bit} of byte {byte} of {name}")
            inode.data[byte] ^= 1 << bit
        assert replay(store.recover()) == acked


def test_a_flipped_bit_is_seen_by_the_frames_behind_it_where_there_is_no_marker() -> None:
    disk = MemoryDisk(seed=2)
    writer = Writer(disk)
    for _ in range(4):
        writer.append(2)
        writer.sync()
    disk.locked.clear()
    store = open_store(disk)
    inode = log_files(disk)[-1][1]
    for begin, end in itertools.pairwise(ends(store, inode)[:-2]):  # the last two may be torn

        def flip(data: bytearray, at: int = (begin + end) // 2) -> None:
            data[at] ^= 1

        with_damage(inode, flip, lambda: must_refuse(store))


def test_a_flipped_bit_in_the_last_marker_loses_no_record() -> None:
    disk, acked = quiet_log(3)
    store = open_store(disk)
    inode = log_files(disk)[-1][1]
    start, end = ends(store, inode)[-2:]
    for byte in range(start, end):
        for bit in range(8):
            inode.data[byte] ^= 1 << bit
            recovery = store.recover()
            assert replay(recovery) == acked
            assert recovery.report.torn_bytes > 0
            inode.data[byte] ^= 1 << bit


def test_every_flipped_bit_in_what_a_new_reign_took_over_is_seen() -> None:
    disk, acked = quiet_log(4)
    Writer(disk, acked, acked)  # armed, nothing appended: no marker, no later frame
    disk.locked.clear()
    store = open_store(disk)
    inode = log_files(disk)[-1][1]
    for byte in range(ends(store, inode)[-1]):
        inode.data[byte] ^= 1 << byte % 8
        with pytest.raises(Corrupt):
            store.recover()
        inode.data[byte] ^= 1 << byte % 8


def test_a_damaged_snapshot_is_replaced_by_the_one_before_with_a_warning() -> None:
    rng = random.Random(5)
    disk, acked = quiet_log(5, snapshots=4)
    store = open_store(disk)
    names = disk.names(f"{ROOT}/snap")
    assert len(names) == 2
    inode = disk.inode(f"{ROOT}/snap/{names[-1]}")
    for _ in range(300):
        byte, bit = rng.randrange(len(inode.data)), rng.randrange(8)
        inode.data[byte] ^= 1 << bit
        recovery = store.recover()
        assert replay(recovery) == acked
        assert recovery.snapshot_lsn == int(names[0][:20])
        assert recovery.report.warnings
        inode.data[byte] ^= 1 << bit


def test_none_of_10000_torn_tails_is_refused() -> None:
    rng = random.Random(6)
    torn = 0
    for seed in range(100):
        disk = MemoryDisk(seed=seed)
        writer = Writer(disk)
        writer.work(rng, 15)
        for _ in range(rng.randint(1, 4)):
            writer.append(rng.randint(1, 60))
        if rng.random() < 0.3:
            writer.sync()
            writer.wal.mark_idle()
            writer.append(rng.randint(1, 9))
        for _ in range(100):
            after = disk.crash(rng, rng.random())
            recovery = open_store(after).recover()
            assert writer.acked <= replay(recovery) <= writer.submitted
            torn += recovery.report.torn_bytes > 0
    assert torn > 1000, "the tails were not torn at all"


def prefix_or_refusal(store: Store, acked: int) -> Callable[[], None]:
    def check() -> None:
        with contextlib.suppress(Corrupt):
            assert replay(store.recover()) <= acked

    return check


def test_a_log_cut_at_every_byte_is_a_prefix_or_refused() -> None:
    disk, acked = quiet_log(7)
    store = open_store(disk)
    for _, inode in log_files(disk):
        end = ends(store, inode)[-1]
        for at in range(BLOCK_BYTES - 20, end):

            def zero(data: bytearray, at: int = at) -> None:
                data[at:] = bytes(len(data) - at)

            with_damage(inode, zero, prefix_or_refusal(store, acked))
        for at in range(0, len(inode.data), 7):

            def cut(data: bytearray, at: int = at) -> None:
                del data[at:]

            with_damage(inode, cut, lambda: must_refuse(store))


def test_a_log_garbled_at_every_byte_is_refused() -> None:
    rng = random.Random(8)
    disk, _ = quiet_log(8)
    store = open_store(disk)
    inode = log_files(disk)[-1][1]
    marker = ends(store, inode)[-2]
    for at in range(BLOCK_BYTES, marker):

        def garble(data: bytearray, at: int = at) -> None:
            length = min(rng.randint(1, 90), marker - at)
            data[at] ^= rng.randint(1, 255)
            data[at + 1 : at + length] = rng.randbytes(length - 1)

        with_damage(inode, garble, lambda: must_refuse(store))


def test_a_missing_segment_is_a_hole_and_not_an_end() -> None:
    disk, _ = quiet_log(9)
    names = [name for name, _ in log_files(disk)]
    for name in names[:-1]:
        after = disk.clone()
        after.unlink(f"{ROOT}/wal/{name}")
        with pytest.raises(Corrupt):
            open_store(after).recover()


def test_a_segment_of_another_past_does_not_fit_in() -> None:
    disks = []
    for text in (b"this", b"that"):
        disk = MemoryDisk(seed=1)  # the same seed, so the same store id
        wal = Writer(disk).wal
        for _ in range(100):
            wal.append(text * 5, 1)
        wal.sync()
        disk.locked.clear()
        disks.append(disk)
    assert open_store(disks[0]).recover().last_lsn == 100
    [(name, ours), *_], [(_, theirs), *_] = map(log_files, disks)
    ours.data[:] = theirs.data
    disks[0].locked.clear()
    must_refuse(open_store(disks[0]), f"{name} from elsewhere")


def test_a_log_that_is_gone_is_never_an_empty_log() -> None:
    disk, _ = quiet_log(10)
    for name, _ in log_files(disk):
        disk.unlink(f"{ROOT}/wal/{name}")
    with pytest.raises(Corrupt):
        open_store(disk).recover()
    disk.unlink(f"{ROOT}/FORMAT")
    disk.locked.clear()
    assert open_store(disk).recover().last_lsn == 0  # nothing is left: this is a new store


def test_a_lost_format_beside_a_log_is_refused() -> None:
    disk, _ = quiet_log(11)
    disk.unlink(f"{ROOT}/FORMAT")
    with pytest.raises(Corrupt):
        open_store(disk)


def test_every_flipped_bit_in_format_is_refused() -> None:
    disk, _ = quiet_log(12)
    inode = disk.inode(f"{ROOT}/FORMAT")
    for at in range(8 * len(inode.data)):
        inode.data[at // 8] ^= 1 << at % 8
        with pytest.raises(CkptdError):
            open_store(disk).recover()
        disk.locked.clear()
        inode.data[at // 8] ^= 1 << at % 8


@pytest.mark.parametrize("has_snapshots", [False, True])
def test_a_short_life_survives_a_power_cut_before_every_operation(*, has_snapshots: bool) -> None:
    rng = random.Random(1)
    crash = CrashAtEveryStep(MemoryDisk(seed=1), rng, depth=1)
    crash.live(reigns=2, steps=10)
    writer = crash.writer
    assert writer
    for _ in range(3 if has_snapshots else 0):
        for _ in range(4):
            writer.append(6)
        writer.snapshot()
    assert crash.states > 200


@pytest.mark.parametrize("seed", range(4))
def test_power_cut_before_every_operation_loses_nothing_acknowledged(seed: int) -> None:
    rng = random.Random(seed)
    crash = CrashAtEveryStep(MemoryDisk(seed=seed), rng)
    crash.live(reigns=3, steps=22)
    assert crash.states > 400


@pytest.mark.parametrize("seed", range(3))
def test_power_cut_while_snapshots_replace_each_other(seed: int) -> None:
    rng = random.Random(seed)
    disk = MemoryDisk(seed=seed)
    crash = CrashAtEveryStep(disk, rng)
    crash.live(reigns=1, steps=0)
    for _ in range(4):
        writer = crash.writer
        assert writer
        for _ in range(rng.randint(3, 12)):
            writer.append(rng.randint(1, 6))
        writer.snapshot()
    assert len(disk.names(f"{ROOT}/snap")) == 2


@pytest.mark.parametrize("kind", ["sync", "sync_dir"])
def test_the_suite_would_notice_a_sync_that_does_nothing(kind: str) -> None:
    disk = MemoryDisk(seed=1)
    disk.deaf = {kind}
    crash = CrashAtEveryStep(disk, random.Random(1), depth=1)
    with pytest.raises((AssertionError, CkptdError)):
        crash.live(reigns=3, steps=40)


@pytest.mark.parametrize("part", ["/wal/", "/snap/", "/FORMAT", "/quarantine/"])
@pytest.mark.parametrize("kind", ["write", "sync", "rename", "create", "sync_dir", "unlink"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_failing_operation_never_costs_what_was_acknowledged(
    kind: str, part: str, error: int
) -> None:
    rng = random.Random(f"{kind}{part}{error}")
    for after in range(0, 24, 2):
        disk = MemoryDisk(seed=after)
        acked = submitted = 0
        writer = None
        disk.fail(kind, part, error=error, after=after)
        try:
            writer = Writer(disk)
            writer.work(rng, 40)
        except (WalFailed, DiskFull, BadConfig, AssertionError) as bad:
            if isinstance(bad, AssertionError) and "Snapshot" not in str(bad):
                raise
        if writer:
            acked, submitted = writer.acked, writer.submitted
        disk.faults.clear()
        disk.locked.clear()
        for survivor in (disk.clone(), disk.crash(rng, 0.0), disk.crash(rng, rng.random())):
            Writer(survivor, acked, submitted)


def test_a_sync_is_never_tried_again() -> None:
    disk = MemoryDisk()
    writer = Writer(disk)
    writer.append(2)
    disk.fail("sync", "/wal/")
    for call in (writer.wal.sync, writer.wal.sync, lambda: writer.append(1), writer.wal.mark_idle):
        with pytest.raises(WalFailed):
            call()
    assert not [fault for fault in disk.faults if fault.times]


def test_after_a_failed_sync_the_next_reign_believes_the_disk_and_not_the_cache() -> None:
    for seed in range(50):
        disk = MemoryDisk(seed=seed)
        writer = Writer(disk)
        writer.append(4)
        writer.sync()
        for _ in range(4):
            writer.append(9)
        disk.fail("sync", "/wal/")
        with pytest.raises(WalFailed):
            writer.sync()
        disk.locked.clear()
        second = Writer(disk, writer.acked, writer.submitted)
        Writer(disk.crash(random.Random(seed), 0.0), second.recovered, second.recovered)


def test_a_full_disk_is_written_to_the_last_byte_of_the_spare_and_then_refused() -> None:
    disk = MemoryDisk()
    writer = Writer(disk)
    disk.capacity = sum(len(i.data) for d in disk.dirs.values() for i in d.names.values())
    room = writer.wal.room_bytes
    assert room > SMALL - BLOCK_BYTES
    with pytest.raises(DiskFull):
        append_for_ever(writer)
    assert writer.wal.room_bytes < 200
    writer.sync()  # what was taken can still be made durable
    disk.capacity = 1 << 30
    writer.wal.prepare_spare()
    writer.append(3)
    writer.sync()
    disk.locked.clear()
    assert Writer(disk, writer.acked, writer.submitted).recovered == writer.acked


def append_for_ever(writer: Writer) -> None:
    while True:
        writer.append(3)


def test_recovery_on_a_full_disk_takes_the_spare() -> None:
    disk = MemoryDisk()
    writer = Writer(disk)
    writer.append(5)
    writer.sync()
    disk.capacity = 0
    disk.locked.clear()
    assert Writer(disk, writer.acked, writer.submitted).wal.has_spare is False
