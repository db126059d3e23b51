import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.protocol.errors import Corrupt
from ckptd.storage import frame, snapshot
from ckptd.storage.segment import BLOCK_BYTES, Place
from ckptd.storage.snapshot import SnapshotDone, SnapshotFailed
from ckptd.storage.store import Store
from tests.fakes.log_model import ROOT, Writer, open_store, replay
from tests.fakes.memory_disk import MemoryDisk


def written(count: int = 3) -> Writer:
    writer = Writer(MemoryDisk())
    writer.append(count)
    writer.sync()
    return writer


def test_chunks_of_all_sizes_come_back_from_the_thread(tmp_path: Path) -> None:
    store = Store.open(f"{tmp_path}/state")
    wal = store.arm(store.recover(), epoch=1, boot_id="b", at_ns=1)
    wal.append(b"x", 1)
    wal.sync()
    sizes = (0, 1, 7, 8, 4096, (1 << 20) - 40, 1 << 20, (1 << 20) + 1, 4_900_000, 3, 9 << 19)
    chunks = [os.urandom(size) for size in sizes]
    writer = store.begin_snapshot(1)
    for chunk in chunks:
        writer.add(chunk)
    writer.finish()
    done = writer.wait(30)
    assert isinstance(done, SnapshotDone)
    assert done.bytes == (tmp_path / "state/snap" / snapshot.name_of(1)).stat().st_size
    store.close()
    store = Store.open(f"{tmp_path}/state")
    recovery = store.recover()
    assert list(recovery.chunks()) == chunks
    assert recovery.snapshot_lsn == 1
    store.close()


def test_two_snapshots_are_kept_and_the_log_since_the_older() -> None:
    writer = written()
    for _ in range(6):
        for _ in range(25):
            writer.append(4)
        writer.snapshot()
    disk = writer.store.place.disk
    lsns = snapshot.listed(disk, f"{ROOT}/snap")
    assert lsns == [writer.acked - 100, writer.acked]
    assert writer.wal.earliest_lsn <= lsns[0] + 1
    assert writer.wal.earliest_lsn > lsns[0] - 60
    disk.unlink(f"{ROOT}/snap/{snapshot.name_of(lsns[1])}")
    assert isinstance(disk, MemoryDisk)
    disk.locked.clear()
    assert replay(open_store(disk).recover()) == writer.acked


def test_only_what_is_durable_can_be_shown_in_a_snapshot() -> None:
    writer = written()
    writer.append(1)
    with pytest.raises(AssertionError):
        writer.store.begin_snapshot(writer.wal.next_lsn - 1)
    begun = writer.store.begin_snapshot(writer.wal.durable_lsn)
    with pytest.raises(AssertionError):
        begun.finish(end_lsn=writer.wal.next_lsn - 1)


@pytest.mark.parametrize("kind", ["write", "sync", "rename", "create"])
def test_a_snapshot_that_fails_leaves_everything_as_it_was(kind: str) -> None:
    writer = written()
    writer.snapshot()
    disk = writer.store.place.disk
    assert isinstance(disk, MemoryDisk)
    names = disk.names(f"{ROOT}/snap")
    writer.append(2)
    writer.sync()
    disk.fail(kind, "/snap/", error=errno.ENOSPC)
    begun = writer.store.begin_snapshot(writer.acked)
    begun.add(b"chunk")
    begun.finish()
    failed = begun.poll()
    assert isinstance(failed, SnapshotFailed)
    assert "No space" in failed.why
    assert [name for name in disk.names(f"{ROOT}/snap") if name.endswith(".snap")] == names
    disk.locked.clear()
    Writer(disk, writer.acked, writer.acked)
    assert disk.names(f"{ROOT}/snap") == names


def test_a_snapshot_can_be_given_up() -> None:
    writer = written()
    begun = writer.store.begin_snapshot(writer.acked)
    begun.add(b"chunk")
    begun.abort()
    assert isinstance(begun.poll(), SnapshotFailed)
    assert not writer.store.place.disk.names(f"{ROOT}/snap")


def test_a_snapshot_that_the_disk_garbles_is_found_before_it_gets_its_name() -> None:
    writer = written()
    disk = writer.store.place.disk
    assert isinstance(disk, MemoryDisk)
    garbled = disk.inode

    def garble(kind: str, path: str) -> None:
        if kind == "sync" and path.endswith(".snap.tmp"):
            garbled(path).data[4200] ^= 1

    disk.watch = garble
    begun = writer.store.begin_snapshot(writer.acked)
    begun.add(b"y" * 300)
    begun.finish()
    assert isinstance(begun.poll(), SnapshotFailed)
    assert not snapshot.listed(disk, f"{ROOT}/snap")


def test_a_log_that_ends_before_its_snapshot_is_refused() -> None:
    writer = written(9)
    writer.snapshot()
    disk = writer.store.place.disk
    assert isinstance(disk, MemoryDisk)
    fresh = Writer(MemoryDisk())  # the same seed, so the same store id
    other = fresh.store.place.disk
    assert isinstance(other, MemoryDisk)
    disk.dirs[f"{ROOT}/wal"], disk.dirs["/state"] = other.dirs[f"{ROOT}/wal"], other.dirs["/state"]
    disk.locked.clear()
    with pytest.raises(Corrupt, match="log ends at LSN 0"):
        open_store(disk).recover()


def test_a_snapshot_for_which_memory_runs_out_fails_is_removed_and_the_next_one_works() -> None:
    writer = written()
    disk = writer.store.place.disk
    assert isinstance(disk, MemoryDisk)

    def run_out(kind: str, path: str) -> None:
        if kind == "write" and path.endswith(".tmp"):
            raise MemoryError

    disk.watch = run_out
    unlucky = writer.store.begin_snapshot(writer.acked)
    unlucky.add(b"begin")
    unlucky.finish()
    disk.watch = None
    assert isinstance(unlucky.poll(), SnapshotFailed)
    assert disk.names(f"{ROOT}/snap") == []
    writer.snapshot()
    assert snapshot.listed(disk, f"{ROOT}/snap") == [writer.acked]


class OutOfMemoryAtRead(MemoryDisk):
    """Reads of what is being written find no memory to put it in."""

    def check(self, kind: str, path: str) -> None:
        if kind == "read" and path.endswith(".tmp"):
            raise MemoryError
        super().check(kind, path)


def test_a_snapshot_for_which_memory_runs_out_at_reading_back_is_removed() -> None:
    """One that stays, tried again every minute, fills the disk."""
    disk = OutOfMemoryAtRead()
    writer = Writer(disk)
    writer.append(3)
    writer.sync()
    unlucky = writer.store.begin_snapshot(writer.acked)
    unlucky.add(b"begin")
    unlucky.finish()
    assert isinstance(unlucky.poll(), SnapshotFailed)
    assert disk.names(f"{ROOT}/snap") == []


def snapped(path: Path, chunks: int) -> Place:
    """Write a snapshot at LSN 1 of so many chunks, of one size; return where it stands."""
    store = Store.open(f"{path}/state", has_threads=False)
    wal = store.arm(store.recover(), epoch=1, boot_id="b", at_ns=1)
    wal.append(b"x", 1)
    wal.sync()
    writer = store.begin_snapshot(1)
    for number in range(chunks):
        writer.add(b"%08d" % number)
    writer.finish()
    assert isinstance(writer.poll(), SnapshotDone)
    store.close()
    return store.place


def test_an_old_snapshot_under_the_name_of_a_newer_one_is_damage(tmp_path: Path) -> None:
    place = snapped(tmp_path, 3)
    old, new = (f"{place.snap_dir}/{snapshot.name_of(lsn)}" for lsn in (1, 2))
    os.rename(old, new)
    with pytest.raises(Corrupt, match="is a snapshot of LSN 1"):
        snapshot.verify(place, new, 2)


@pytest.mark.parametrize("way", ["a chunk is missing", "two chunks are exchanged"])
def test_a_snapshot_whose_chunks_are_not_those_in_their_order_is_damage(
    tmp_path: Path, way: str
) -> None:
    place = snapped(tmp_path, 3)
    path = Path(place.snap_dir, snapshot.name_of(1))
    data = path.read_bytes()
    head, frames = data[:BLOCK_BYTES], data[BLOCK_BYTES:]
    size = frame.frame_bytes(8)
    first, second, rest = frames[:size], frames[size : 2 * size], frames[2 * size :]
    path.write_bytes(head + (first + rest if "missing" in way else second + first + rest))
    with pytest.raises(Corrupt, match="does not check after"):
        snapshot.verify(place, str(path), 1)


def test_a_process_ends_though_a_snapshot_of_it_is_still_to_be_finished(tmp_path: Path) -> None:
    """What fails meanwhile ends the daemon: whoever waited for the rest would wait for ever."""
    begin = (
        "from ckptd.storage.store import Store\n"
        f"store = Store.open({str(tmp_path / 'state')!r})\n"
        "store.arm(store.recover(), epoch=1, boot_id='b', at_ns=1)\n"
        "store.begin_snapshot(0).add(b'x')\n"
    )
    subprocess.run([sys.executable, "-c", begin], check=True, timeout=30)
