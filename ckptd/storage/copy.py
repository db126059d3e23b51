"""Copy files into a checkpoint, on to the next one and out of it: reflinks where there are such.

Out means `ckpt restore` and `ckptctl checkpoint export`: only files that the manifest names, each
compared with its digest while it is copied, never through a link. Stdlib only.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import stat
from typing import IO, TYPE_CHECKING, Final

from ckptd.storage.disk import append_all, sync_fd
from ckptd.storage.manifest import (
    HASHED_BYTES_MAX,
    Manifest,
    load,
    refuse_hole,
    refuse_too_much,
    sha256,
    verify,
)
from ckptd.storage.taskdir import MANIFEST, numbered, opened
from ckptd.storage.untrusted import (
    DEPTH_MAX,
    FILES_MAX,
    Damaged,
    NotTrusted,
    is_fit,
    names_in,
    open_directory,
    open_regular,
)

if TYPE_CHECKING:
    import tarfile

_FICLONE: Final = 0x40049409  # Source: linux/fs.h
_CHUNK_BYTES: Final = 1 << 20
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DANGLING: Final = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP))
_NOT_HERE: Final = frozenset((errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP))


class Intake:
    """What is copied into one new checkpoint. What sealing would refuse is not even copied."""

    def __init__(self, dir_fd: int) -> None:
        self._dir_fd = dir_fd
        self._left_names, self._left_files = 2 * FILES_MAX, FILES_MAX
        self._left_bytes = HASHED_BYTES_MAX
        self._within = [_identity(os.fstat(dir_fd))]  # this checkpoint, and what we are down in

    def take(self, path: str) -> None:
        """Copy a file, or a directory with all in it, under its own name; links are followed.

        Raises:
            NotTrusted: what no checkpoint may hold, or more than it may. OSError: the disk refuses.

        Durable: no; sealing syncs what was copied.
        """
        self._take(path, os.path.basename(os.path.abspath(path)), self._dir_fd)

    def _take(self, path: str, name: str, dir_fd: int) -> None:
        is_directory = os.path.isdir(path)
        self._left_names -= 1
        self._left_files -= not is_directory
        if self._left_names < 0 or self._left_files < 0:
            raise NotTrusted(f"more than {FILES_MAX} files in one checkpoint")
        if not is_fit(name):
            raise NotTrusted(f"a name is no UTF-8 or too long: {name[:60]!r}")
        if is_directory:
            self._take_directory(path, name, dir_fd)
        else:
            self._left_bytes -= _copy_file(path, name, dir_fd, self._left_bytes)

    def _take_directory(self, path: str, name: str, dir_fd: int) -> None:
        here = _identity(os.stat(path))
        if here in self._within:
            raise NotTrusted(f"{path} holds itself: it would be copied without end")
        if len(self._within) > DEPTH_MAX:
            raise NotTrusted(f"{path} is more than {DEPTH_MAX} directories deep")
        os.mkdir(name, 0o700, dir_fd=dir_fd)
        sub_fd = open_directory(name, os.getuid(), dir_fd)
        self._within.append(here)
        try:
            for inner in _names_in(path):
                self._take(f"{path}/{inner}", inner, sub_fd)
        finally:
            self._within.pop()
            os.close(sub_fd)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _names_in(path: str) -> list[str]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return sorted(names_in(fd))
    finally:
        os.close(fd)


def _copy_file(path: str, name: str, dir_fd: int, left_bytes: int) -> int:
    try:
        source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _DANGLING or not os.path.islink(path):
            raise  # it was there a moment ago: the next save may go well
        raise NotTrusted(f"{path} leads nowhere: {error.strerror}") from error
    try:
        found = os.fstat(source)
        if not stat.S_ISREG(found.st_mode):
            raise NotTrusted(f"{path} is not a regular file")
        refuse_too_much(found.st_size, left_bytes)
        target = os.open(name, _CREATE, (found.st_mode & 0o777) | 0o600, dir_fd=dir_fd)
        try:
            _clone(source, target, path)
        finally:
            os.close(target)
    finally:
        os.close(source)
    return found.st_size


def _clone(source: int, target: int, path: str) -> None:
    if not _is_shared(source, target):
        _refuse_without_room(os.fstat(source), target, path)
        while _copied(source, target):  # Bound: until the source ends
            pass


def _refuse_without_room(found: os.stat_result, target: int, path: str) -> None:
    """Raise what the disk would once it is full: it is not filled up for that.

    A copy has no holes. So whether its source has, is looked at only where it does not fit.
    """
    room = os.fstatvfs(target)
    free_bytes = (room.f_bavail if os.geteuid() else room.f_bfree) * room.f_frsize
    if found.st_size > free_bytes:
        refuse_hole(found, path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_shared(source: int, target: int) -> bool:
    """Return whether the target has the source's blocks now; a write to either copies them."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def _copied(source: int, target: int) -> int:
    try:
        return os.copy_file_range(source, target, 64 * _CHUNK_BYTES)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        chunk = os.read(source, _CHUNK_BYTES)
        append_all(target, chunk)
        return len(chunk)


def carry_on(generation_fd: int, entry: Manifest, uid: int, dir_fd: int) -> None:
    """Give a new checkpoint a file of a sealed one, as that one's manifest has it in `entry`.

    Blocks are shared where the file system can (reflink), and the file is not read: it has not
    changed since it was sealed. Elsewhere it is copied, and compared while it is.
    Never a hard link: a task that writes into what it published, as a database does that is
    opened there, would damage both generations that are kept.
    Invariant: the digest stays that of the first save, so what the disk loses is found at resume.

    Raises:
        FileExistsError: there is a new file of that name. Damaged: it differs from its digest.

    Durable: no; sealing syncs it.
    """
    *folders, name = _parts(entry["name"])
    source = _opened(generation_fd, [*folders, name], uid)
    try:
        folder_fd = made_below(dir_fd, folders, uid)
        try:
            _carry_one(source, folder_fd, name, entry, _sealed_ns(generation_fd))
        finally:
            os.close(folder_fd)
    finally:
        os.close(source)


def _sealed_ns(generation_fd: int) -> int:
    return os.stat(MANIFEST, dir_fd=generation_fd, follow_symlinks=False).st_mtime_ns


def made_below(dir_fd: int, folders: list[str], uid: int) -> int:
    """Return a descriptor of a directory some levels down, made where it was missing."""
    at = os.dup(dir_fd)
    try:
        for folder in folders:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700, dir_fd=at)
            below = open_directory(folder, uid, at)
            os.close(at)
            at = below
    except BaseException:
        os.close(at)
        raise
    return at


def _carry_one(source: int, folder_fd: int, name: str, entry: Manifest, sealed_ns: int) -> None:
    found = os.fstat(source)
    is_as_sealed = found.st_ctime_ns < sealed_ns and found.st_size == entry["bytes"]
    target = os.open(name, _CREATE, (found.st_mode & 0o777) | 0o600, dir_fd=folder_fd)
    try:
        if not (is_as_sealed and _is_shared(source, target)):
            _copy_compared(source, target, entry)
    except BaseException:
        os.unlink(name, dir_fd=folder_fd)
        raise
    finally:
        os.close(target)


def copy_out(task_dir: str, owner_uid: int, seq: int, into: str) -> list[str]:
    """Copy the files of a sealed generation into a directory; return their names.

    Each file replaces an older one of its name only after its digest was compared.

    Raises:
        FileNotFoundError: no such generation, or not sealed. Damaged: a digest differs.

    Durable: the files and the names in every directory written to.
    """
    os.makedirs(into, exist_ok=True)
    with opened(task_dir, owner_uid) as (_, ckpt_fd):
        fd = _generation(ckpt_fd, seq, owner_uid)
        try:
            manifest = load(fd, owner_uid)
            for entry in manifest["files"]:
                _copy_one(fd, entry, owner_uid, into)
        finally:
            os.close(fd)
    return [entry["name"] for entry in manifest["files"]]


def _generation(ckpt_fd: int, seq: int, uid: int) -> int:
    for number, name in numbered(ckpt_fd):
        if number == seq:
            return open_directory(name, uid, ckpt_fd)
    raise FileNotFoundError(errno.ENOENT, f"there is no checkpoint {seq}")


def _parts(name: str) -> list[str]:
    """Return the components of a name in a manifest; it must stay below where it is put."""
    parts = name.split("/")
    if any(part in {"", ".", ".."} for part in parts):
        raise Damaged(f"the manifest names {name!r}")
    return parts


def _opened(dir_fd: int, parts: list[str], uid: int) -> int:
    """Return a descriptor of a file some directories down, no step through a link."""
    at = os.dup(dir_fd)
    try:
        for part in parts[:-1]:
            below = open_directory(part, uid, at)
            os.close(at)
            at = below
        return open_regular(parts[-1], uid, at)
    finally:
        os.close(at)


def _copy_one(dir_fd: int, entry: Manifest, uid: int, into: str) -> None:
    parts = _parts(entry["name"])
    source = _opened(dir_fd, parts, uid)
    try:
        folder = os.path.join(into, *parts[:-1])
        os.makedirs(folder, exist_ok=True)
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _replace(source, folder_fd, parts[-1], entry)
        finally:
            os.close(folder_fd)
    finally:
        os.close(source)


def _replace(source: int, folder_fd: int, name: str, entry: Manifest) -> None:
    """Crash: a temporary file is left beside the untouched old one."""
    temporary, target = _temporary(folder_fd, os.fstat(source).st_mode & 0o777)
    try:
        _copy_compared(source, target, entry)
        sync_fd(target)
        os.rename(temporary, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        sync_fd(folder_fd)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder_fd)
        raise
    finally:
        os.close(target)


def _temporary(folder_fd: int, mode: int) -> tuple[str, int]:
    """Return name and descriptor of a new file; short, as its target's name may be the longest."""
    for serial in itertools.count():  # Bound: what crashes under our process id left here
        name = f".ckpt-{os.getpid()}-{serial}"
        with contextlib.suppress(FileExistsError):
            return name, os.open(name, _CREATE, mode, dir_fd=folder_fd)
    raise AssertionError


def _copy_compared(source: int, target: int, entry: Manifest) -> None:
    running = sha256()
    while chunk := os.read(source, _CHUNK_BYTES):  # Bound: a sealed file; one that grew differs
        running.update(chunk)
        append_all(target, chunk)
    if running.hexdigest() != entry.get("sha256"):
        raise Damaged(f"{entry['name']}: the digest differs")


class CutShort(FileNotFoundError):
    """It was cleared away while it was written: a part of the tar is out."""


def write_tar(task_dir: str, owner_uid: int, seq: int, out: IO[bytes]) -> list[str]:
    """Write a sealed generation, manifest first, as a tar stream; return the names in it.

    Raises:
        FileNotFoundError: no such generation, or not sealed. CutShort: it is gone by now.
        Damaged: it does not check.
    """
    with opened(task_dir, owner_uid) as (_, ckpt_fd):
        fd = _generation(ckpt_fd, seq, owner_uid)
        try:
            manifest = load(fd, owner_uid)
            try:
                verify(fd, owner_uid, manifest, is_deep=True)
            except Damaged:  # or cleared away meanwhile: then this says so
                os.close(_generation(ckpt_fd, seq, owner_uid))
                raise
            names = [MANIFEST, *(entry["name"] for entry in manifest["files"])]
            import tarfile  # noqa: PLC0415  (few copy to a tar; every task imports this)

            try:
                with tarfile.open(fileobj=out, mode="w|") as archive:
                    for name in names:
                        _add(archive, name, _opened(fd, _parts(name), owner_uid))
            except FileNotFoundError as gone:
                raise CutShort(*gone.args) from gone
        finally:
            os.close(fd)
    return names


def _add(archive: "tarfile.TarFile", name: str, fd: int) -> None:
    with os.fdopen(fd, "rb") as file:
        info = archive.tarinfo(name)
        found = os.fstat(fd)
        info.size, info.mtime, info.mode = found.st_size, int(found.st_mtime), 0o644
        archive.addfile(info, file)
