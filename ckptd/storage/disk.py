"""The disk: the only file that writes, syncs, renames and locks; it knows paths, not meanings.

`Disk` is the port, `RealDisk` the kernel, `tests/fakes/memory_disk.py` a disk whose power can be
cut. Every method raises OSError as the kernel gave it. The functions on top do the same for code
that must walk with directory descriptors (task files are hostile). Standard library only.
Invariant: a failed sync is never repeated; after one, what the page cache shows may not be what
the disk holds (Source: "Can Applications Recover from fsync Failures?", ATC 2020).
Read next: `frame.py`.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from typing import Protocol

Bytes = bytes | bytearray | memoryview

ZEROS = bytes(1 << 20)


def write_all(fd: int, data: Bytes, offset: int) -> None:
    """Write all of `data` at `offset`; a short write is carried on with."""
    done = os.pwrite(fd, data, offset)
    while done < len(data):  # Bound: pwrite gives at least one byte or raises
        done += os.pwrite(fd, memoryview(data)[done:], offset + done)


def append_all(fd: int, data: Bytes) -> None:
    """Write all of `data` at the descriptor's own position (its end, with O_APPEND)."""
    done = os.write(fd, data)
    while done < len(data):  # Bound: write gives at least one byte or raises
        done += os.write(fd, memoryview(data)[done:])


def sync_fd(fd: int) -> None:
    """Sync a file or a directory, given by descriptor.

    Durable: content and size of the file; of a directory its names.
    """
    os.fsync(fd)


def sync_data_fd(fd: int) -> None:
    """Sync the content of a file and what is needed to read it back.

    Durable: content, and the size where it changed.
    """
    os.fdatasync(fd)


class File(Protocol):
    """An open file; offsets and sizes in bytes."""

    def read(self, size: int, offset: int) -> bytes:
        """Return up to `size` bytes; fewer only at the end of the file."""
        ...

    def write(self, data: Bytes, offset: int) -> None:
        """Write all of `data` into the page cache."""
        ...

    def size(self) -> int:
        """Return the length of the file."""
        ...

    def sync_data(self) -> None:
        """Durable: the content written so far."""
        ...

    def sync(self) -> None:
        """Durable: the content written so far, and size and times."""
        ...

    def drop_cache(self) -> None:
        """Forget clean pages, so that the next read comes from the disk itself."""
        ...

    def close(self) -> None:
        """Close; a lock held through this file is given up."""
        ...


class Disk(Protocol):
    """What the log, the snapshots and the store need from a file system."""

    def make_dir(self, path: str, mode: int) -> None:
        """Make a directory, and those above it, where they are missing."""
        ...

    def create(self, path: str) -> File:
        """Open for reading and writing, empty (0600); an old file of that name is emptied."""
        ...

    def open(self, path: str, *, write: bool = False) -> File:
        """Open a file that exists."""
        ...

    def names(self, path: str) -> list[str]:
        """Return the names in a directory, sorted."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Give a file a new name, replacing what had it; atomic, durable after `sync_dir`."""
        ...

    def link(self, old: str, new: str) -> None:
        """Give a file a second name; durable after `sync_dir`."""
        ...

    def unlink(self, path: str) -> None:
        """Remove a name; durable after `sync_dir`."""
        ...

    def sync_dir(self, path: str) -> None:
        """Durable: the names in this directory."""
        ...

    def lock(self, path: str) -> File:
        """Take the exclusive lock, creating the file. Raises BlockingIOError where it is held."""
        ...

    def free_bytes(self, path: str) -> int:
        """Return what the file system would still let us write."""
        ...

    def random_bytes(self, count: int) -> bytes:
        """Return bytes that nobody else has."""
        ...


class RealFile:
    """A file of the kernel."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, size: int, offset: int) -> bytes:
        """Return up to `size` bytes; fewer only at the end of the file."""
        data = os.pread(self._fd, size, offset)
        if len(data) == size or not data:
            return data
        parts = [data]
        have = len(data)
        while have < size:  # Bound: each read gives at least one byte or is the end
            data = os.pread(self._fd, size - have, offset + have)
            if not data:
                break
            parts.append(data)
            have += len(data)
        return b"".join(parts)

    def write(self, data: Bytes, offset: int) -> None:
        """Write all of `data` into the page cache."""
        if os.pwrite(self._fd, data, offset) != len(data):
            write_all(self._fd, data, offset)

    def size(self) -> int:
        """Return the length of the file."""
        return os.fstat(self._fd).st_size

    def sync_data(self) -> None:
        """Durable: the content written so far."""
        os.fdatasync(self._fd)

    def sync(self) -> None:
        """Durable: the content written so far, and size and times."""
        os.fsync(self._fd)

    def drop_cache(self) -> None:
        """Forget clean pages, so that the next read comes from the disk itself."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close; a lock held through this file is given up."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class RealDisk:
    """The kernel's file system."""

    def make_dir(self, path: str, mode: int) -> None:
        """Make a directory, and those above it, where they are missing."""
        if os.path.isdir(path):
            return
        parent = os.path.dirname(path.rstrip("/"))
        if parent and not os.path.isdir(parent):
            self.make_dir(parent, 0o755)
        os.mkdir(path, mode)
        os.chmod(path, mode)  # the umask has no say

    def create(self, path: str) -> File:
        """Open for reading and writing, empty (0600); an old file of that name is emptied."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        return RealFile(os.open(path, flags, 0o600))

    def open(self, path: str, *, write: bool = False) -> File:
        """Open a file that exists."""
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW
        return RealFile(os.open(path, flags))

    def names(self, path: str) -> list[str]:
        """Return the names in a directory, sorted."""
        return sorted(os.listdir(path))

    def rename(self, old: str, new: str) -> None:
        """Give a file a new name, replacing what had it; atomic, durable after `sync_dir`."""
        os.rename(old, new)

    def link(self, old: str, new: str) -> None:
        """Give a file a second name; durable after `sync_dir`."""
        os.link(old, new, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        """Remove a name; durable after `sync_dir`."""
        os.unlink(path)

    def sync_dir(self, path: str) -> None:
        """Durable: the names in this directory."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def lock(self, path: str) -> File:
        """Take the exclusive lock, creating the file. Raises BlockingIOError where it is held."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return _locked(os.open(path, flags, 0o600), fcntl.LOCK_EX)

    def free_bytes(self, path: str) -> int:
        """Return what the file system would still let us write."""
        stat = os.statvfs(path)
        return stat.f_bavail * stat.f_frsize

    def random_bytes(self, count: int) -> bytes:
        """Return bytes that nobody else has."""
        return os.urandom(count)


def _locked(fd: int, how: int) -> File:
    """Return the file once its lock is ours. Raises BlockingIOError where it is held."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return RealFile(fd)


class ReadOnlyDisk(RealDisk):
    """The same for those who only look: nothing is made, also not where nothing can be written.

    Of a backup or a file system that is mounted read-only nothing is left to be synced.
    """

    def open(self, path: str, *, write: bool = False) -> File:  # noqa: ARG002 (the port)
        """Open a file for reading, whatever is asked; that is enough to sync it."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        return _ReadFile(os.open(path, flags))

    def sync_dir(self, path: str) -> None:
        """Durable: the names in this directory, where it can be written to at all."""
        with _nothing_to_sync():
            super().sync_dir(path)

    def lock(self, path: str) -> File:
        """Keep a daemon out, not others who look; a copy may have no file for it.

        Shared: NFS gives the exclusive one only to who may write. Source: flock(2).
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return RealFile(-1)
        return _locked(fd, fcntl.LOCK_SH)


class _ReadFile(RealFile):
    __slots__ = ()

    def sync(self) -> None:
        with _nothing_to_sync():
            super().sync()


@contextlib.contextmanager
def _nothing_to_sync() -> Iterator[None]:
    """Pass over a sync that a file system refuses because it is read-only."""
    try:
        yield
    except OSError as bad:
        if bad.errno not in {errno.EROFS, errno.EINVAL}:
            raise
