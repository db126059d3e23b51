"""Look into a directory that somebody else may be changing: a task's files are hostile input.

Everything is reached through directory descriptors, never by a path from the root: a link that
the task puts in our way is refused (O_NOFOLLOW), a FIFO cannot stall us (O_NONBLOCK), a device, a
socket or another user's file (hard link) is refused by fstat, and every walk has a bound.
Stdlib only. It does not know what a checkpoint is: read next `manifest.py`.
"""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from ckptd.storage.disk import sync_fd

FILES_MAX: Final = 10_000  # files in one checkpoint
DEPTH_MAX: Final = 8  # directories below a checkpoint
ENTRIES_MAX: Final = 20_000  # names looked at in one directory
PATH_BYTES_MAX: Final = 1_024
TEXT_CHARS_MAX: Final = 500
JSON_DEPTH_MAX: Final = 64
DEPTH_REMOVED_MAX: Final = 100_000  # a tree to delete may be as deep as its maker liked
# The machine's trouble, not the task's: it passes, and tells nothing about what the files hold.
PASSING: Final = frozenset(
    (errno.EIO, errno.ENOMEM, errno.ENFILE, errno.EMFILE, errno.ENOSPC, errno.EDQUOT)
)

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class NotTrusted(Exception):
    """A name is not what it must be: a link, a device, another owner's, too many, too deep."""


class Damaged(Exception):
    """Stored bytes do not check; nothing was changed."""


def is_passing(error: BaseException) -> bool:
    """Return whether to try again later; never a reason to judge files, or to block their task."""
    is_known = isinstance(error, OSError) and error.errno in PASSING
    return is_known or isinstance(error, MemoryError)


def plain(text: object) -> str:
    """Return a text fit for logs and terminals, whatever the task named its files."""
    return "".join(char if char.isprintable() else "?" for char in str(text)[:TEXT_CHARS_MAX])


class Leaf(NamedTuple):
    """A name met on a walk, with the open directory that holds it."""

    path: str  # relative to where the walk began, with slashes
    parent_fd: int  # open only until the walk goes on
    name: str


def open_directory(name: str, uid: int, dir_fd: int | None = None) -> int:
    """Return a descriptor of a real directory owned by `uid`.

    Raises:
        NotTrusted: it is a link, no directory, or another owner's.
        FileNotFoundError: it is not there.
    """
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=dir_fd)
    except NotADirectoryError as error:  # also what a link gives: O_DIRECTORY is looked at first
        raise NotTrusted(f"{name} is not a directory") from error
    return _owned(fd, name, uid)


def open_regular(name: str, uid: int, dir_fd: int) -> int:
    """Return a read-only descriptor of a regular file owned by `uid`.

    Raises:
        NotTrusted: it is a link, a FIFO, a device, or another owner's.
        OSError: it is not there, or the machine has trouble.
    """
    try:
        fd = os.open(name, _FILE, dir_fd=dir_fd)
    except OSError as error:  # ELOOP for a link, ENXIO for a socket or device, EACCES
        if isinstance(error, FileNotFoundError) or is_passing(error):
            raise
        raise NotTrusted(f"{name} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotTrusted(f"{name} is not a regular file")
    return _owned(fd, name, uid)


def _owned(fd: int, name: str, uid: int) -> int:
    owner = os.fstat(fd).st_uid
    if owner == uid:
        return fd
    os.close(fd)
    raise NotTrusted(f"{name} belongs to uid {owner}, expected {uid}")


def read_small(name: str, uid: int, dir_fd: int, bytes_max: int) -> bytes:
    """Return a whole file of at most `bytes_max` bytes; a larger one raises NotTrusted."""
    fd = open_regular(name, uid, dir_fd)
    try:
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(bytes_max + 1)
    finally:
        os.close(fd)
    if len(data) > bytes_max:
        raise NotTrusted(f"{name} is larger than {bytes_max} bytes")
    return data


def replace_small(name: str, data: bytes, dir_fd: int, uid: int, *, is_synced: bool = True) -> None:
    """Replace a small file as a whole; readers see the old one or the new one.

    Crash: `name.tmp` may be left; the next call removes it.
    Durable: the content if `is_synced`; the name once the caller syncs the directory.
    """
    temporary = name + ".tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=dir_fd)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600, dir_fd=dir_fd)
    try:
        if os.fstat(fd).st_uid != uid:
            os.fchown(fd, uid, -1)
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(data)
        if is_synced:
            sync_fd(fd)
    finally:
        os.close(fd)
    os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)


def names_in(dir_fd: int) -> list[str]:
    """Return the names in a directory, unordered; more than ENTRIES_MAX raises NotTrusted."""
    names: list[str] = []
    _rewind(dir_fd)
    with os.scandir(dir_fd) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) > ENTRIES_MAX:
                raise NotTrusted(f"more than {ENTRIES_MAX} names in one directory")
    return names


def _rewind(dir_fd: int) -> None:
    """Make an open directory show what came into it since.

    Source: btrfs since Linux 6.6 lists up to the newest name of when it was opened or rewound.
    """
    os.lseek(dir_fd, 0, os.SEEK_SET)


def is_empty(name: str, dir_fd: int | None = None) -> bool:
    """Return whether a directory has no entries, or is not there at all."""
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=dir_fd)
    except (FileNotFoundError, NotADirectoryError):
        return True
    try:
        with os.scandir(fd) as entries:
            return next(entries, None) is None
    finally:
        os.close(fd)


def walk(dir_fd: int, uid: int) -> Iterator[Leaf]:
    """Yield every name below that is not a directory, in order, at most FILES_MAX and DEPTH_MAX.

    Directories themselves come too, after what is in them, as a Leaf with an empty name and
    their own descriptor as `parent_fd`, so that a sealing walk can sync them.
    """
    for count, leaf in enumerate(_walk(dir_fd, uid, "", 0)):
        if count > 2 * FILES_MAX:
            raise NotTrusted(f"more than {FILES_MAX} files in one checkpoint")
        yield leaf


def _walk(dir_fd: int, uid: int, prefix: str, depth: int) -> Iterator[Leaf]:
    if depth > DEPTH_MAX:
        raise NotTrusted(f"{prefix} is more than {DEPTH_MAX} directories deep")
    for name in sorted(names_in(dir_fd)):
        path = prefix + name
        if not is_fit(path):
            raise NotTrusted(f"a name is no UTF-8 or too long: {path[:60]!r}")
        mode = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode
        if not stat.S_ISDIR(mode):
            yield Leaf(path, dir_fd, name)
            continue
        sub_fd = open_directory(name, uid, dir_fd)
        try:
            yield from _walk(sub_fd, uid, path + "/", depth + 1)
        finally:
            os.close(sub_fd)
    yield Leaf(prefix, dir_fd, "")


def parse_json(data: bytes) -> Any:
    """Return hostile JSON as a value that our own code can walk and write again.

    Raises ValueError for what is no JSON, or nested deeper than JSON_DEPTH_MAX: the parser's own
    limit is far above what `json.dumps` or a recursion of ours survives.
    """
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    refuse_deep(value)
    return value


def refuse_deep(value: Any) -> None:
    """Raise ValueError for what `parse_json` would refuse; asked before anything is written."""
    level = [value]
    for _ in range(JSON_DEPTH_MAX):
        inner = [part for part in level if isinstance(part, dict | list)]
        if not inner:
            return
        level = [x for part in inner for x in (part.values() if isinstance(part, dict) else part)]
    raise ValueError(f"nested deeper than {JSON_DEPTH_MAX}")


def is_fit(path: str) -> bool:
    """Return whether a name can stand in a manifest: UTF-8 and at most PATH_BYTES_MAX bytes."""
    try:
        return len(path.encode()) <= PATH_BYTES_MAX
    except UnicodeEncodeError:
        return False


def remove_tree(name: str, dir_fd: int) -> None:
    """Delete a directory with all that is in it, however deep; follows no link.

    A directory of our own that refuses us (a cache copied with its mode 0555) is made to let us.

    Durable: no; what is left after a crash is deleted by the next call.
    """
    try:
        root_fd = _open_to_empty(name, dir_fd)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        os.unlink(name, dir_fd=dir_fd)
        return
    try:
        for depth in range(DEPTH_REMOVED_MAX):  # Bound: each pass lifts every directory by a level
            if _flatten(root_fd, f".lifted-{os.urandom(8).hex()}-{depth}"):
                break
    finally:
        os.close(root_fd)
    os.rmdir(name, dir_fd=dir_fd)


def _flatten(root_fd: int, stem: str) -> bool:
    """Unlink a directory's files and lift what its directories hold into it; True once empty."""
    _rewind(root_fd)
    found = os.listdir(root_fd)
    for serial, name in enumerate(found):
        if not _unlinked(name, root_fd):
            _lift(name, root_fd, f"{stem}-{serial}")
    return not found


def _lift(name: str, root_fd: int, stem: str) -> None:
    sub_fd = _open_to_empty(name, root_fd)
    try:
        for serial, inner in enumerate(os.listdir(sub_fd)):
            if not _unlinked(inner, sub_fd):
                _unlock(inner, sub_fd)  # its "..", too, is changed by what follows
                os.rename(inner, f"{stem}-{serial}", src_dir_fd=sub_fd, dst_dir_fd=root_fd)
    finally:
        os.close(sub_fd)
    os.rmdir(name, dir_fd=root_fd)


def _open_to_empty(name: str, dir_fd: int) -> int:
    _unlock(name, dir_fd)
    return os.open(name, _DIRECTORY, dir_fd=dir_fd)


def _unlock(name: str, dir_fd: int) -> None:
    """Let the owner of a directory list and change it, where we are that owner; follows no link.

    Says nothing where that cannot be: whatever needed it does.
    """
    with contextlib.suppress(OSError):
        # O_PATH opens what may not be read; such a descriptor has no fchmod, but a name in /proc.
        fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            found = os.fstat(fd)
            if found.st_uid == os.geteuid() and found.st_mode & stat.S_IRWXU != stat.S_IRWXU:
                os.chmod(f"/proc/self/fd/{fd}", stat.S_IRWXU)
        finally:
            os.close(fd)


def _unlinked(name: str, dir_fd: int) -> bool:
    try:
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return True
    except IsADirectoryError:
        return False
    return True
