import errno
import os
from pathlib import Path

import pytest

from ckptd.protocol.errors import BadConfig, Busy, CkptdError, Corrupt, DiskFull
from ckptd.storage import segment
from ckptd.storage.disk import RealDisk
from ckptd.storage.store import Store, restore_format
from ckptd.storage.wal import WalFailed
from tests.fakes.log_model import ROOT, Writer, open_store, replay
from tests.fakes.memory_disk import MemoryDisk


def test_two_cannot_have_the_same_store(tmp_path: Path) -> None:
    store = Store.open(f"{tmp_path}/state")
    with pytest.raises(Busy, match="LOCK") as refused:
        Store.open(f"{tmp_path}/state")
    # The holder may answer nobody any more: its socket can be gone.
    assert f"where no daemon answers `kill {os.getpid()}` (tasks live on)" in refused.value.hint
    store.close()
    Store.open(f"{tmp_path}/state").close()


def test_a_holder_that_the_kernel_does_not_name_is_nobody_to_be_killed() -> None:
    """`kill 0` would end the whole job of who types it."""
    disk = MemoryDisk()
    open_store(disk)
    with pytest.raises(Busy, match="another process holds") as refused:
        open_store(disk)
    assert "`kill PID` (tasks live on)" in refused.value.hint


def test_looking_at_a_directory_that_is_no_store_leaves_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no state directory"):
        Store.open(str(tmp_path), create=False)
    with pytest.raises(BadConfig):
        Store.open(f"{tmp_path}/missing", create=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (errno.EIO, WalFailed), (errno.EROFS, WalFailed), (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull), (errno.EACCES, BadConfig), (errno.ENOTDIR, BadConfig),
    ],
)  # fmt: skip
def test_a_sick_or_full_disk_is_told_from_a_wrong_configuration(
    error: int, verdict: type[CkptdError]
) -> None:
    disk = MemoryDisk()
    disk.fail("create", "FORMAT", error=error)
    with pytest.raises(verdict, match=os.strerror(error)) as told:
        open_store(disk)
    assert type(told.value) is verdict


def test_a_later_format_says_which_reader_it_needs(tmp_path: Path) -> None:
    Store.open(f"{tmp_path}/state").close()
    disk = MemoryDisk()
    writer = Writer(disk)
    writer.append(1)
    writer.sync()
    disk.locked.clear()
    name = segment.newest_names(disk.names(f"{ROOT}/wal"))[0][-1]
    inode = disk.inode(f"{ROOT}/wal/{name}")
    store = writer.store.place.store
    block = segment.decode_block(bytes(inode.data), segment.WAL_MAGIC, store, "")
    later = segment.encode_block(block._replace(format=3, min_reader=2))
    inode.data[: len(later)] = later
    with pytest.raises(BadConfig, match="takes a reader of 2"):
        open_store(disk).recover()


def test_a_later_format_that_this_reader_can_read_is_read() -> None:
    disk = MemoryDisk()
    writer = Writer(disk)
    writer.append(4)
    writer.sync()
    disk.locked.clear()
    name = segment.newest_names(disk.names(f"{ROOT}/wal"))[0][-1]
    inode = disk.inode(f"{ROOT}/wal/{name}")
    store = writer.store.place.store
    block = segment.decode_block(bytes(inode.data), segment.WAL_MAGIC, store, "")
    later = segment.encode_block(block._replace(format=3, min_reader=1))
    inode.data[: len(later)] = later
    assert replay(open_store(disk).recover()) == 4


def test_a_segment_of_another_store_is_refused() -> None:
    disk, other = MemoryDisk(seed=1), MemoryDisk(seed=2)
    for one in (disk, other):
        Writer(one)
    name = segment.newest_names(disk.names(f"{ROOT}/wal"))[0][-1]
    disk.inode(f"{ROOT}/wal/{name}").data[:] = other.inode(f"{ROOT}/wal/{name}").data
    disk.locked.clear()
    with pytest.raises(Corrupt, match="another store"):
        open_store(disk).recover()


def test_format_can_be_made_anew_from_the_headers(tmp_path: Path) -> None:
    root = tmp_path / "state"
    store = Store.open(str(root))
    store.arm(store.recover(), epoch=1, boot_id="b", at_ns=1).append(b"x", 1)
    store.close()
    before = (root / "FORMAT").read_bytes()
    (root / "FORMAT").write_bytes(before.replace(b"1", b"7", 1))
    with pytest.raises(Corrupt):
        Store.open(str(root))
    restore_format(RealDisk(), str(root))
    assert (root / "FORMAT").read_bytes() == before
    Store.open(str(root)).close()


def test_directories_have_the_modes_that_keep_others_out(tmp_path: Path) -> None:
    Store.open(f"{tmp_path}/state").close()
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "state").iterdir()}
    assert modes == {
        "wal": 0o700, "snap": 0o700, "quarantine": 0o700, "LOCK": 0o600, "FORMAT": 0o600,
    }  # fmt: skip
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o711
