"""A disk that fails when told to: a file served over FUSE, a loop device on it, an ext4 on that.

The device keeps writes in a volatile cache until a flush. When it fails, it answers EIO and loses
what was not flushed, as a disk with a broken cache does; what it really holds at that moment is
kept in `durable`, so that a test can compare it with what was acknowledged.
It is served by a thread of the test: only other processes may work on the file system, or calls
that let other threads run. Source: linux/fuse.h (protocol 7.31), mount.fuse(8), mount(8) on loop.
"""

import ctypes
import errno
import os
from pathlib import Path
from typing import Literal

from tests.fakes.fuse_file import BLOCK_BYTES, FuseFile, run, runs
from tests.waiting import until

Kind = Literal["write", "flush"]

FOR_EVER = 1 << 60
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000  # Source: linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


class FailingDevice(FuseFile):
    """One regular file at `node` that is a disk of `size_bytes` zeros."""

    def __init__(self, node: Path, size_bytes: int) -> None:
        """Serve it. Raises OSError where FUSE is not there, or not for us."""
        self.durable = b""  # what survived the first failure
        self._content = bytearray(size_bytes)
        self._unflushed: dict[int, bytes] = {}  # block -> what it was at the last flush
        self._failures: dict[Kind, int] = {"write": 0, "flush": 0}
        super().__init__(node, size_bytes)

    def fail(self, *kinds: Kind, count: int = FOR_EVER) -> None:
        """Answer the next `count` requests of each of these kinds with EIO; 0: be healthy."""
        for kind in kinds:
            self._failures[kind] = count

    def read(self, offset: int, size: int) -> bytes:
        """Return what stands in the cache."""
        return bytes(self._content[offset : offset + size])

    def write(self, offset: int, data: memoryview) -> None:
        """Take it into the cache."""
        self._may_fail("write")
        self._write(offset, data)

    def flush(self) -> None:
        """Empty the cache onto the disk."""
        self._may_fail("flush")
        self._unflushed.clear()

    def _may_fail(self, kind: Kind) -> None:
        if not self._failures[kind]:
            return
        self._failures[kind] -= 1
        for block, before in self._unflushed.items():
            self._content[block : block + BLOCK_BYTES] = before
        self._unflushed.clear()
        self.durable = self.durable or bytes(self._content)
        raise OSError(errno.EIO, f"the {kind} failed")

    def _write(self, offset: int, data: memoryview) -> None:
        end = offset + len(data)
        for block in range(offset - offset % BLOCK_BYTES, end, BLOCK_BYTES):
            if block not in self._unflushed:
                self._unflushed[block] = bytes(self._content[block : block + BLOCK_BYTES])
        self._content[offset:end] = data


class FailingDisk:
    """A real ext4, mounted at `directory`, on a device that can fail.

    Invariant: nobody calls sync(2) while it fails. That writes what no daemon asked for: it meets
    the failure in the daemon's place, or aborts ext4's journal, and all of it is read-only. Tests
    of both kinds are in the group "sync", which one worker runs.
    Invariant: it is mounted for us and our children alone. A copy of our mounts, which every
    `unshare --mount` of a test beside us would have, keeps the file system alive after `unmount`,
    as read-only as its failed journal left it.
    """

    def __init__(self, root: Path, size_bytes: int) -> None:
        """Make and mount it. Raises OSError where that cannot be done here."""
        self.directory = root / "disk"
        self.directory.mkdir()
        self._outside = _moved_apart()
        try:
            self.device = FailingDevice(root / "device", size_bytes)
        except OSError:
            _move_back(self._outside)
            raise
        try:
            eager = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
            run("mkfs.ext4", "-q", "-F", "-b", str(BLOCK_BYTES), "-E", eager, self.device.node)
            self.mount()
        except OSError:
            self.device.close()
            _move_back(self._outside)
            raise

    def mount(self) -> None:
        """Mount; the journal is committed when somebody syncs, not by the clock."""
        options = "loop,commit=300,noinit_itable,nodiscard"
        run("mount", "-t", "ext4", "-o", options, self.device.node, self.directory)
        self.directory.chmod(0o755)

    def unmount(self) -> None:
        """Unmount, and forget all that is cached."""
        until(lambda: runs("umount", self.directory), 10.0, every_s=0.05)

    def settle(self) -> None:
        """Have everything written and flushed, so that a failure strikes what comes next."""
        run("sync", "-f", self.directory)

    def close(self) -> None:
        """Take it all away."""
        self.device.fail("write", "flush", count=0)
        self.unmount()
        self.device.close()
        _move_back(self._outside)


def _moved_apart() -> int:
    """Give this thread, and who it starts, mounts of their own; return those it had before."""
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _checked(_libc.unshare(_CLONE_NEWNS))
    except OSError:
        os.close(before)
        raise
    run("mount", "--make-rprivate", "/")
    return before


def _move_back(before: int) -> None:
    directory = os.getcwd()
    _checked(_libc.unshare(_CLONE_FS))  # threads that libzmq keeps share it: setns(2)
    _checked(_libc.setns(before, _CLONE_NEWNS))
    os.chdir(directory)
    os.close(before)


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
