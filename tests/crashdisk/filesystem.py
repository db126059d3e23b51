"""A real file system on a device of ours: made, mounted, looked into; and mounts of our own.

Source: loop(4), mount(2), ioctl_fiemap in Documentation/filesystems/fiemap.rst of Linux.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.fakes.fuse_file import BLOCK_BYTES

_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE, _LOOP_CLR_FD = 0x4C82, 0x4C0A, 0x4C01
_LOOP_CONFIG = struct.Struct("<II52xI240x")  # file, block size, flags
_AUTOCLEAR = 4  # a device that a dead process leaves behind goes with its mount
_FIEMAP, _LAST_EXTENT = 0xC020660B, 1
_EXTENTS_MAX = 16  # of one call: fcntl.ioctl lets other threads run up to 1,024 bytes only
_CALLS_MAX = 1_000
_SET_DEATH_SIGNAL = 1  # Source: linux/prctl.h
_NEW_MOUNTS, _RECURSIVE, _PRIVATE = 0x20000, 0x4000, 1 << 18
_TRIES_MAX = 200
_libc = ctypes.CDLL(None, use_errno=True)


class Kind(NamedTuple):
    """How one file system is made and mounted here."""

    name: str
    make: tuple[str, ...]
    size_bytes: int
    options: str
    overwrites: bool  # data in place, and FIEMAP tells that place on the device


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "ext4",
            ("mkfs.ext4", "-q", "-F", "-b", "4096", "-J", "size=4", "-E",
             "lazy_itable_init=0,lazy_journal_init=0,nodiscard"),
            32 << 20, "nodiscard,noinit_itable", overwrites=True,
        ),
        Kind("xfs", ("mkfs.xfs", "-q", "-f", "-K"), 300 << 20, "nodiscard", overwrites=True),
        Kind(
            "btrfs", ("mkfs.btrfs", "-q", "-f", "-K", "-m", "single"), 128 << 20, "nodiscard",
            overwrites=False,
        ),
    )
}  # fmt: skip


def missing(kind: Kind) -> str:
    """Return why this file system cannot be had here; "" where it can."""
    if os.geteuid() != 0:
        return "needs root: mounts a file system over FUSE and a loop device"
    if not shutil.which(kind.make[0]):
        return f"needs {kind.make[0]}"
    known = Path("/proc/filesystems").read_text().split()
    if kind.name not in known and _has_no_module(kind.name):
        return f"this kernel has no {kind.name}"
    for node in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(node):
            return f"needs {node}"
    return ""


def _has_no_module(name: str) -> bool:
    tried = subprocess.run(("modprobe", name), check=False, capture_output=True)
    return tried.returncode != 0


def made(kind: Kind, folder: Path) -> bytes:
    """Return the image of an empty file system. Raises OSError with what mkfs said."""
    path = folder / f"{kind.name}.image"
    with path.open("wb") as file:
        file.truncate(kind.size_bytes)
    done = subprocess.run((*kind.make, path), check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(errno.EIO, f"{kind.make[0]}: {done.stderr.strip()}")
    image = path.read_bytes()
    path.unlink()
    return image


def move_apart() -> None:
    """Give this process mounts of its own: they end with it, and it with its parent."""
    _checked(_libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL), "prctl")
    _checked(_libc.unshare(_NEW_MOUNTS), "unshare")
    _checked(_libc.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None), "mount")


@contextmanager
def mounted(kind: Kind, node: Path, at: Path) -> Iterator[Path]:
    """Mount what is on `node`; no process is forked, so that it takes a few ms.

    Raises OSError where the kernel refuses what is on it.
    """
    backing = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    try:
        device, loop = _looped(backing)
    finally:
        os.close(backing)
    try:
        arguments = (device.encode(), os.fsencode(at), kind.name.encode(), 0, kind.options.encode())
        _checked(_libc.mount(*arguments), f"mount {kind.name}")
        try:
            yield at
        finally:
            _unmount(at)
    finally:
        fcntl.ioctl(loop, _LOOP_CLR_FD, 0)
        os.close(loop)


def settle(at: Path) -> None:
    """Have the file system at `at` write out all it holds, and give back what was deleted."""
    fd = os.open(at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _checked(_libc.syncfs(fd), "syncfs")
    finally:
        os.close(fd)


def _unmount(at: Path) -> None:
    """Unmount; what a failure left open is closed as the end of its process would."""
    if _libc.umount2(os.fsencode(at), 0) == 0:
        return
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith(f"{at}/"):
                os.close(int(fd))
    _checked(_libc.umount2(os.fsencode(at), 0), "umount")


def _looped(backing: int) -> tuple[str, int]:
    """Return a loop device on a file; another process may take the free one first."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES_MAX):
            device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            loop = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(loop, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(backing, 0, _AUTOCLEAR))
            except OSError as taken:
                os.close(loop)
                if taken.errno != errno.EBUSY:
                    raise
                continue
            return device, loop
        raise OSError(errno.EBUSY, "no loop device is free")
    finally:
        os.close(control)


def blocks_of_files(kind: Kind, top: Path) -> set[int]:
    """Return the blocks of the device that hold data of files, where the file system tells."""
    found: set[int] = set()
    if not kind.overwrites:
        return found
    for folder, _, names in os.walk(top):
        for name in names:
            found |= _blocks_of(os.path.join(folder, name))
    return found


def _blocks_of(path: str) -> set[int]:
    found: set[int] = set()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)  # so that every block has its place
        start = 0
        for _ in range(_CALLS_MAX):
            extents = _extents(fd, start)
            for _, physical, length, _ in extents:
                found.update(range(physical // BLOCK_BYTES, (physical + length) // BLOCK_BYTES))
            if not extents or extents[-1][3] & _LAST_EXTENT:
                return found
            start = extents[-1][0] + extents[-1][2]
        raise OSError(errno.EFBIG, f"{path} has too many extents")
    finally:
        os.close(fd)


def _extents(fd: int, start: int) -> list[tuple[int, int, int, int]]:
    """Return (offset in the file, place on the device, length, flags) of the next extents."""
    head = struct.pack("<QQIIII", start, (1 << 63) - 1 - start, 0, 0, _EXTENTS_MAX, 0)
    told = fcntl.ioctl(fd, _FIEMAP, head + bytes(56 * _EXTENTS_MAX))
    (count,) = struct.unpack_from("<I", told, 20)
    extents = [struct.unpack_from("<QQQ16xI", told, 32 + 56 * at) for at in range(count)]
    return [(logical, physical, length, flags) for logical, physical, length, flags in extents]


def _checked(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
