"""One set of expectations for the disk of the tests and the disk of the kernel."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from ckptd.storage.disk import Disk, ReadOnlyDisk, RealDisk
from tests.fakes.memory_disk import MemoryDisk


@pytest.fixture(params=[MemoryDisk, RealDisk])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Disk, str]:
    disk: Disk = request.param()
    root = f"{tmp_path}/state"
    disk.make_dir(root, 0o700)
    return disk, root


def test_what_is_written_is_read_back(place: tuple[Disk, str]) -> None:
    disk, root = place
    file = disk.create(f"{root}/a")
    file.write(b"hello", 10)
    file.sync_data()
    file.sync()
    file.drop_cache()
    assert file.read(100, 8) == b"\0\0hello"
    assert file.read(3, 10) == b"hel"
    assert file.read(3, 100) == b""
    assert file.size() == 15
    file.close()
    assert disk.open(f"{root}/a").read(5, 10) == b"hello"


def test_names_follow_rename_link_and_unlink(place: tuple[Disk, str]) -> None:
    disk, root = place
    disk.make_dir(f"{root}/sub", 0o700)
    disk.create(f"{root}/a").write(b"1", 0)
    disk.create(f"{root}/b").write(b"2", 0)
    disk.rename(f"{root}/a", f"{root}/b")
    disk.link(f"{root}/b", f"{root}/sub/c")
    assert disk.names(root) == ["b", "sub"]
    disk.unlink(f"{root}/b")
    disk.sync_dir(root)
    assert disk.names(root) == ["sub"]
    assert disk.open(f"{root}/sub/c").read(9, 0) == b"1"
    with pytest.raises(FileNotFoundError):
        disk.open(f"{root}/b")
    with pytest.raises(FileNotFoundError):
        disk.names(f"{root}/nothing")


def test_creating_over_a_file_empties_it(place: tuple[Disk, str]) -> None:
    disk, root = place
    disk.create(f"{root}/a").write(b"old", 0)
    disk.create(f"{root}/a").write(b"n", 0)
    assert disk.open(f"{root}/a").read(9, 0) == b"n"


def test_a_lock_is_held_until_it_is_closed(place: tuple[Disk, str]) -> None:
    disk, root = place
    lock = disk.lock(f"{root}/LOCK")
    with pytest.raises(BlockingIOError):
        disk.lock(f"{root}/LOCK")
    lock.close()
    disk.lock(f"{root}/LOCK").close()


def test_the_real_disk_never_follows_a_link_and_keeps_files_private(tmp_path: Path) -> None:
    disk = RealDisk()
    os.symlink(tmp_path / "elsewhere", tmp_path / "link")
    for use in (disk.create, disk.open, disk.lock):
        with pytest.raises(OSError, match="symbolic links"):
            use(f"{tmp_path}/link")
    disk.create(f"{tmp_path}/file").close()
    assert os.stat(tmp_path / "file").st_mode & 0o777 == 0o600


def test_a_file_that_is_closed_twice_closes_nobody_elses(tmp_path: Path) -> None:
    file = RealDisk().create(str(tmp_path / "a"))
    file.close()
    other = RealDisk().open(str(tmp_path / "a"))  # under the number that became free
    file.close()
    assert other.size() == 0
    other.close()


def test_who_only_looks_needs_no_right_to_write_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, which makes of flock(2) a lock of the whole file."""
    path, real = str(tmp_path / "LOCK"), fcntl.flock

    def flock(fd: int, how: int) -> None:
        if how & fcntl.LOCK_EX and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    RealDisk().lock(path).close()
    looks = ReadOnlyDisk().lock(path)
    with pytest.raises(BlockingIOError):
        RealDisk().lock(path)
    looks.close()
    held = RealDisk().lock(path)
    with pytest.raises(BlockingIOError):
        ReadOnlyDisk().lock(path)
    held.close()


def test_who_only_looks_passes_over_a_sync_that_cannot_be_and_over_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log whose sync fails is not known to be on disk: no verdict may be built on it."""
    disk, path = ReadOnlyDisk(), str(tmp_path / "a")
    RealDisk().create(path).close()
    file, code = disk.open(path), errno.EIO

    def fsync(_fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    for sync in (file.sync, lambda: disk.sync_dir(str(tmp_path))):
        code = errno.EIO
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            sync()
        for code in (errno.EROFS, errno.EINVAL):  # noqa: B007 (what fsync says)
            sync()
    file.close()
