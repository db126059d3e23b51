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
import struct
import subprocess
import threading
from enum import IntEnum
from pathlib import Path
from typing import Literal

from tests.waiting import until

Kind = Literal["write", "flush"]

BLOCK_BYTES = 4096
WRITE_BYTES_MAX = 1 << 20
FOR_EVER = 1 << 60
_REQUEST = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, 2 x unused
_REPLY = struct.Struct("<IiQ")  # length, minus errno, unique
_RANGE = struct.Struct("<QQI")  # file handle, offset, size: so begin read_in and write_in
_WRITE_IN_BYTES = 40
_ATTR = struct.Struct("<QII6Q10I")
_INIT = struct.Struct("<4I2H2I2H8I")
_FUSE_VERSION = (7, 31)
_BIG_WRITES, _MAX_PAGES = 1 << 5, 1 << 22
_DIRECT_IO = 1
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000  # Source: linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)


class Op(IntEnum):
    """The requests that the kernel makes of a single file."""

    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25  # a close
    INIT = 26
    DESTROY = 38
    BATCH_FORGET = 42


class FailingDevice:
    """One regular file at `node` that is a disk of `size_bytes` zeros."""

    def __init__(self, node: Path, size_bytes: int) -> None:
        """Serve it. Raises OSError where FUSE is not there, or not for us."""
        node.touch()
        self.node = node
        self.durable = b""  # what survived the first failure
        self._content = bytearray(size_bytes)
        self._unflushed: dict[int, bytes] = {}  # block -> what it was at the last flush
        self._failures: dict[Kind, int] = {"write": 0, "flush": 0}
        self._fd = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._fd},rootmode=100000,user_id=0,group_id=0"
        try:
            _run("mount", "-i", "-t", "fuse", "-o", options, "ckptd-test", node, fds=(self._fd,))
        except OSError:
            os.close(self._fd)
            raise
        self._thread = threading.Thread(target=self._serve, name="failing-device", daemon=True)
        self._thread.start()

    def fail(self, *kinds: Kind, count: int = FOR_EVER) -> None:
        """Answer the next `count` requests of each of these kinds with EIO; 0: be healthy."""
        for kind in kinds:
            self._failures[kind] = count

    def close(self) -> None:
        """Stop serving; nothing may use the file any more."""
        until(lambda: _runs("umount", self.node), 10.0, every_s=0.05)
        self._thread.join()
        os.close(self._fd)

    def _serve(self) -> None:
        while True:  # Bound: the unmount
            try:
                request = os.read(self._fd, WRITE_BYTES_MAX + 2 * BLOCK_BYTES)
            except OSError as bad:
                if bad.errno == errno.ENODEV:
                    return
                continue  # the asker gave up
            _, opcode, unique, *_ = _REQUEST.unpack_from(request)
            if opcode in (Op.FORGET, Op.BATCH_FORGET):
                continue
            try:
                answer, error = self._answer(opcode, memoryview(request)[_REQUEST.size :]), 0
            except OSError as bad:
                answer, error = b"", bad.errno or errno.EIO
            os.writev(self._fd, [_REPLY.pack(_REPLY.size + len(answer), -error, unique), answer])

    def _answer(self, opcode: int, body: memoryview) -> bytes:
        """Carry one request out. Raises OSError for what the asker shall get."""
        match opcode:
            case Op.READ:
                _, offset, size = _RANGE.unpack_from(body)
                return bytes(self._content[offset : offset + size])
            case Op.WRITE:
                _, offset, size = _RANGE.unpack_from(body)
                self._may_fail("write")
                self._write(offset, body[_WRITE_IN_BYTES : _WRITE_IN_BYTES + size])
                return struct.pack("<II", size, 0)
            case Op.FSYNC:
                self._may_fail("flush")
                self._unflushed.clear()
                return b""
            case Op.INIT:
                (readahead,) = struct.unpack_from("<I", body, 8)
                flags = _BIG_WRITES | _MAX_PAGES
                bounds = (64, 48, WRITE_BYTES_MAX, 1, WRITE_BYTES_MAX // BLOCK_BYTES, 0)
                return _INIT.pack(*_FUSE_VERSION, readahead, flags, *bounds, *bytes(8))
            case Op.GETATTR | Op.SETATTR:  # kept for an hour
                size = len(self._content)
                times, owner = (0,) * 6, (0, 0, 0)
                mode = (0o100600, 1)
                head = (3600, 0, 0, 1, size, size // 512)
                return _ATTR.pack(*head, *times, *mode, *owner, BLOCK_BYTES, 0)
            case Op.OPEN:
                return struct.pack("<QII", 1, _DIRECT_IO, 0)
            case Op.RELEASE | Op.FLUSH | Op.DESTROY:
                return b""
            case _:  # no allocation, no discard
                raise OSError(errno.ENOSYS, "not served")

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
            _run("mkfs.ext4", "-q", "-F", "-b", str(BLOCK_BYTES), "-E", eager, self.device.node)
            self.mount()
        except OSError:
            self.device.close()
            _move_back(self._outside)
            raise

    def mount(self) -> None:
        """Mount; the journal is committed when somebody syncs, not by the clock."""
        options = "loop,commit=300,noinit_itable,nodiscard"
        _run("mount", "-t", "ext4", "-o", options, self.device.node, self.directory)
        self.directory.chmod(0o755)

    def unmount(self) -> None:
        """Unmount, and forget all that is cached."""
        until(lambda: _runs("umount", self.directory), 10.0, every_s=0.05)

    def settle(self) -> None:
        """Have everything written and flushed, so that a failure strikes what comes next."""
        _run("sync", "-f", self.directory)

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
    _run("mount", "--make-rprivate", "/")
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


def _run(*command: str | Path, fds: tuple[int, ...] = ()) -> None:
    """Run a command. Raises OSError with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=fds)
    if done.returncode:
        raise OSError(done.returncode, f"{command[0]}: {done.stderr.strip()}")


def _runs(*command: str | Path) -> bool:
    return not subprocess.run(command, capture_output=True, check=False).returncode
