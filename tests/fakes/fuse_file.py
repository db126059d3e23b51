"""One regular file over FUSE, served by a thread of ours: what a fake disk is made of.

A subclass says what a read, a write and a flush are; what it raises is what the asker gets.
Only calls that let other threads run may work on what lies on it: it is this process that answers.
Source: linux/fuse.h (protocol 7.31), mount.fuse(8).
"""

import ctypes
import errno
import os
import struct
import subprocess
import threading
from enum import IntEnum
from pathlib import Path

from tests.waiting import until

BLOCK_BYTES = 4096
WRITE_BYTES_MAX = 1 << 20
_REQUEST = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, 2 x unused
_REPLY = struct.Struct("<IiQ")  # length, minus errno, unique
_RANGE = struct.Struct("<QQI")  # file handle, offset, size: so begin read_in and write_in
_WRITE_IN_BYTES = 40
_ATTR = struct.Struct("<QII6Q10I")
_INIT = struct.Struct("<4I2H2I2H8I")
_FUSE_VERSION = (7, 31)
_BIG_WRITES, _MAX_PAGES = 1 << 5, 1 << 22
_DIRECT_IO = 1
_CLONE_FILES = 0x400  # Source: linux/sched.h
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


class FuseFile:
    """A file at `node` of `size_bytes`; it is there from the end of `__init__` until `close`."""

    def __init__(self, node: Path, size_bytes: int) -> None:
        """Serve it. Raises OSError where FUSE is not there, or not for us."""
        node.touch()
        self.node = node
        self.size_bytes = size_bytes
        self._fd = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._fd},rootmode=100000,user_id=0,group_id=0"
        try:
            run("mount", "-i", "-t", "fuse", "-o", options, "ckptd-test", node, fds=(self._fd,))
        except OSError:
            os.close(self._fd)
            raise
        self._is_served = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="fuse-file", daemon=True)
        self._thread.start()
        self._is_served.wait()
        os.close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        """Return what stands there."""
        raise NotImplementedError

    def write(self, offset: int, data: memoryview) -> None:
        """Put it there, in the volatile cache at least."""
        raise NotImplementedError

    def flush(self) -> None:
        """Make durable what was written before."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop serving; nothing may use the file any more."""
        until(lambda: runs("umount", self.node), 10.0, every_s=0.05)
        self._thread.join()

    def _serve(self) -> None:
        _keep_alone(self._fd)
        self._is_served.set()
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
                return self.read(offset, size)
            case Op.WRITE:
                _, offset, size = _RANGE.unpack_from(body)
                self.write(offset, body[_WRITE_IN_BYTES : _WRITE_IN_BYTES + size])
                return struct.pack("<II", size, 0)
            case Op.FSYNC:
                self.flush()
                return b""
            case Op.INIT:
                (readahead,) = struct.unpack_from("<I", body, 8)
                flags = _BIG_WRITES | _MAX_PAGES
                bounds = (64, 48, WRITE_BYTES_MAX, 1, WRITE_BYTES_MAX // BLOCK_BYTES, 0)
                return _INIT.pack(*_FUSE_VERSION, readahead, flags, *bounds, *bytes(8))
            case Op.GETATTR | Op.SETATTR:  # kept for an hour
                times, owner = (0,) * 6, (0, 0, 0)
                head = (3600, 0, 0, 1, self.size_bytes, self.size_bytes // 512)
                return _ATTR.pack(*head, *times, 0o100600, 1, *owner, BLOCK_BYTES, 0)
            case Op.OPEN:
                return struct.pack("<QII", 1, _DIRECT_IO, 0)
            case Op.RELEASE | Op.FLUSH | Op.DESTROY:
                return b""
            case _:  # no allocation, no discard
                raise OSError(errno.ENOSYS, "not served")


def _keep_alone(fd: int) -> None:
    """Make this thread the only one that has `fd`; of the others' files it has only stdio.

    Crash: whoever waits for this file cannot be killed before it is answered, and holds open all
    that it shares. Where the server dies first, its last descriptor answers: not connected.
    """
    if _libc.unshare(_CLONE_FILES):
        raise OSError(ctypes.get_errno(), "unshare")
    os.closerange(3, fd)
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))


def run(*command: str | Path, fds: tuple[int, ...] = ()) -> None:
    """Run a command to its end. Raises OSError with what it said."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, pass_fds=fds)
    if done.returncode:
        raise OSError(errno.EIO, f"{command[0]}: {done.stderr.strip()}")


def runs(*command: str | Path) -> bool:
    """Return whether a command succeeds."""
    return subprocess.run(command, check=False, capture_output=True).returncode == 0
