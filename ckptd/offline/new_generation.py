"""A generation that is made from outside of another one: unpack, copy to the stage, compare, save.

    stage/  copies of the files  -> every digest compared -> save.py: rename, seal, publish, prune

The task does not run, so its stage is free; what an attempt left there when it died goes, as it
does at the next start. Who fills it holds a lock on it: two at a time would mix their files.
Crash: before the publishing rename, the next start makes the stage empty again; nothing changed.
Invariant: what is published has the digests that its origin's manifest names. Stdlib only.
Read next: `ckptd/sdk/save.py`, `ckptd/storage/taskdir.py`.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any, Final, NamedTuple

from ckptd.sdk.save import Saved, save
from ckptd.storage import facts
from ckptd.storage import manifest as seals
from ckptd.storage.copy import Intake, made_below
from ckptd.storage.disk import append_all, sync_fd
from ckptd.storage.journal import Fact, Journal, StaleAttempt
from ckptd.storage.manifest import Manifest
from ckptd.storage.taskdir import LEFTOVER, MANIFEST, attempt_of, fence, numbered, opened
from ckptd.storage.untrusted import (
    FILES_MAX,
    Damaged,
    is_empty,
    names_in,
    open_directory,
    remove_tree,
)

_CHUNK_BYTES: Final = 1 << 20
_FACTS_PER_GROUP: Final = 500
_BUSY: Final = "somebody else imports or edits a checkpoint of the task"
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Occupied(Exception):
    """Somebody else fills the stage just now."""


class Place(NamedTuple):
    """Where the new generation goes, and the attempt that must still be the newest."""

    task_dir: str
    task: int
    attempt: int


def now_ns() -> int:
    """Return the wall clock."""
    return time.time_ns()


def sync_file(file: IO[Any]) -> None:
    """Durable: what was written to a file."""
    file.flush()
    sync_fd(file.fileno())


def remove(path: str) -> None:
    """Delete a file or a directory with all in it."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


# --- where it comes from -------------------------------------------------------------------------


@contextlib.contextmanager
def lying(task_dir: str, seq: int) -> Iterator[str]:
    """Give the path of a generation of the task itself."""
    with opened(task_dir, os.getuid()) as (_, ckpt_fd):
        for number, name in numbered(ckpt_fd):
            if number == seq:
                yield f"{task_dir}/ckpt/{name}"
                return
    raise FileNotFoundError(errno.ENOENT, f"there is no checkpoint {seq}")


@contextlib.contextmanager
def unpacked(source: str, where: Place) -> Iterator[tuple[int, str]]:
    """Give descriptor and path of an exported generation; a tar is unpacked beside the task's.

    Raises:
        Damaged: the tar holds something else than its manifest says, first of all members.
    """
    if source != "-" and os.path.isdir(source):
        fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield fd, source
        finally:
            os.close(fd)
        return
    # Crash: the prefix makes it a leftover, which the next prune deletes.
    path = tempfile.mkdtemp(prefix=f"{LEFTOVER}import-", dir=where.task_dir)
    try:
        fd = open_directory(path, os.getuid())
        try:
            _unpack(source, fd)
            yield fd, path
        finally:
            os.close(fd)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(path)


def _unpack(source: str, dir_fd: int) -> None:
    with contextlib.ExitStack() as stack:
        stream = sys.stdin.buffer if source == "-" else stack.enter_context(open(source, "rb"))
        try:
            archive = stack.enter_context(tarfile.open(fileobj=stream, mode="r|"))
            sizes = _unpacked_manifest(archive, dir_fd)
            while member := archive.next():  # Bound: each uses up an entry of the manifest
                size = sizes.pop(member.name, None)
                if not member.isreg() or size != member.size:
                    raise Damaged(f"the tar holds {member.name!r}, the manifest does not")
                _write(archive.extractfile(member), member.name, dir_fd)
        except (tarfile.TarError, EOFError) as bad:
            raise Damaged(f"no tar of an exported checkpoint: {bad}") from bad


def _unpacked_manifest(archive: tarfile.TarFile, dir_fd: int) -> dict[str, int]:
    """Write the first member, the manifest; return the sizes of the files that it names."""
    first = archive.next()
    if first is None or first.name != MANIFEST or not first.isreg():
        raise Damaged(f"the first member of the tar is not {MANIFEST}")
    if first.size > seals.BYTES_MAX:
        raise Damaged(f"{MANIFEST} has {first.size} bytes, more than {seals.BYTES_MAX}")
    _write(archive.extractfile(first), MANIFEST, dir_fd)
    files = seals.load(dir_fd, os.getuid())["files"]
    if len(files) > FILES_MAX:
        raise Damaged(f"the manifest names {len(files)} files, more than {FILES_MAX}")
    return {entry["name"]: entry.get("bytes") for entry in files}


def _write(data: IO[bytes] | None, name: str, dir_fd: int) -> None:
    """Write a member under its name; it must stay below where it is put."""
    *folders, last = name.split("/")
    if data is None or any(part in {"", ".", ".."} for part in (*folders, last)):
        raise Damaged(f"the tar holds {name!r}")
    at = made_below(dir_fd, folders, os.getuid())
    try:
        fd = os.open(last, _NEW, 0o600, dir_fd=at)
        try:
            while chunk := data.read(_CHUNK_BYTES):  # Bound: the size in the tar's header
                append_all(fd, chunk)
        finally:
            os.close(fd)
    finally:
        os.close(at)


# --- where it goes -------------------------------------------------------------------------------


def publish(where: Place, source: str, origin: Manifest, header: Manifest) -> Saved:
    """Copy the files of a generation into the stage, compare every digest, save.

    Raises:
        StaleAttempt: an attempt was started meanwhile. Damaged: a copy differs from `origin`.
        Occupied: somebody else fills the stage. OSError: the disk refuses.

    Durable: the whole checkpoint and its name.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(f"{where.task_dir}/ckpt", 0o700)
    stage_fd = _own_stage(where)
    try:
        into = Intake(stage_fd)
        for name in names_in_order(source):
            into.take(f"{source}/{name}")
        seals.verify(stage_fd, os.getuid(), origin, is_deep=True)
        own = {"task": where.task, "attempt": where.attempt}
        return save(where.task_dir, [], {**header, **own})
    except BaseException:
        with contextlib.suppress(OSError, StaleAttempt):
            _emptied(where, keeps_lock=True)
        raise
    finally:
        os.close(stage_fd)


def names_in_order(source: str) -> list[str]:
    """Return the names at the top of a generation, but for its manifest."""
    fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return sorted(name for name in names_in(fd) if name != MANIFEST)
    finally:
        os.close(fd)


def _own_stage(where: Place) -> int:
    """Return a descriptor of the stage, empty and locked by us."""
    _emptied(where, keeps_lock=False)
    fd = _locked(open_directory(f"{where.task_dir}/stage", os.getuid()))
    if is_empty(".", fd):
        return fd
    os.close(fd)  # who held the lock until now has filled it, and published it perhaps
    raise Occupied(_BUSY)


def _locked(fd: int) -> int:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise Occupied(_BUSY) from error
    return fd


def _emptied(where: Place, *, keeps_lock: bool) -> None:
    """Take away what is in the stage. `keeps_lock`: it is we who fill it.

    Raises:
        StaleAttempt: a newer attempt exists. Occupied: somebody else fills it.
    """
    uid = os.getuid()
    task_fd = open_directory(where.task_dir, uid)
    try:
        fence(task_fd, waits=True)
        newest = attempt_of(task_fd, uid)[0]
        if newest > where.attempt:
            raise StaleAttempt(f"attempt {where.attempt} is over: attempt {newest} exists")
        with contextlib.suppress(FileExistsError):
            os.mkdir("stage", 0o700, dir_fd=task_fd)
        if not is_empty("stage", task_fd):
            if not keeps_lock:
                os.close(_locked(open_directory("stage", uid, task_fd)))
            aside = f"{LEFTOVER}stage-{now_ns()}"
            os.rename("stage", aside, src_dir_fd=task_fd, dst_dir_fd=task_fd)
            os.mkdir("stage", 0o700, dir_fd=task_fd)
            remove_tree(aside, task_fd)
    finally:
        os.close(task_fd)


# --- what the journal shall know -----------------------------------------------------------------


def record(
    where: Place, before: dict[str, Any], after: dict[str, Any], *, has_journal: bool = False
) -> int:
    """Record the values that differ: a task that resumes takes them from its journal.

    `has_journal`: there is to be one, though it say nothing: what a person brings in stands for
    all that was lost, and a lost journal would keep the task from going on.

    Crash: the checkpoint says them, the journal does not; do it again. Durable: the facts.
    """
    found = list(_facts(before, after))
    if found or (has_journal and is_empty(f"{where.task_dir}/journal")):
        journal = Journal(where.task_dir, where.task, where.attempt, 0)
        try:
            for first in range(0, max(1, len(found)), _FACTS_PER_GROUP):
                journal.append(found[first : first + _FACTS_PER_GROUP])
        finally:
            journal.close()
    return len(found)


def _facts(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Fact]:
    old, new = before.get("results") or {}, after.get("results") or {}
    for name, value in new.items():
        if name not in old or old[name] != value:
            yield facts.set_value(name, value)
    for name in old:
        if name not in new:
            yield facts.delete_value(name)
    progress = after.get("progress")
    if progress and progress != before.get("progress"):
        yield facts.progress_made(float(progress["done"]), float(progress.get("total") or 0))
