"""The layout of a task's directory, and how it is made ready for an attempt.

    tasks/12/                       CKPTD_DIR, 0700, owned by the task's uid
        attempt.json                {"attempt":3,"boot_id":"0b9c..."}: who may write, in which boot
        stage/                      made empty for every attempt
        ckpt/00000006/ 00000007/    published; sealed where MANIFEST.json is in it
        ckpt/00000008.damaged/      set aside: kept for inspection, its number is free again
        journal/000003.j            facts of attempt 3
        archive/4/                  what `--fresh` put away at the start of attempt 4

All of it can be changed by the task at any moment: see `untrusted.py`. Stdlib only.
Read next: `blobs.py` (what lies in `ckpt/`), `journal.py` (what lies in `journal/`).
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import stat
import time
from collections.abc import Iterator
from typing import Final

from ckptd.storage.disk import sync_fd, write_all
from ckptd.storage.untrusted import (
    NotTrusted,
    is_empty,
    is_passing,
    names_in,
    open_directory,
    read_small,
)

ATTEMPT_FILE: Final = "attempt.json"
CONTROL: Final = "control.json"
MANIFEST: Final = "MANIFEST.json"
LEFTOVER: Final = ".leftover-"  # prefix of what the next prune deletes
_SEQ_DIGITS_MAX: Final = 12
_ATTEMPT_DIGITS_MAX: Final = 9
_SMALL_BYTES_MAX: Final = 4_096
_ATTEMPT_BYTES: Final = 128  # room for the longest; blanks fill it up
_ASIDE_MAX: Final = 100
_NO_SENSE: Final = (
    OSError,
    NotTrusted,
    ValueError,
    KeyError,
    TypeError,
    OverflowError,
    RecursionError,
)


@functools.cache
def this_boot_id() -> str:
    """Return the identity of the running kernel's boot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def task_of(task_dir: str) -> int:
    """Return the task's id from the directory's name; 0 for a run without a daemon."""
    name = os.path.basename(task_dir.rstrip("/"))
    return int(name) if name.isascii() and name.isdigit() else 0


def has_anything(task_dir: str) -> bool:
    """Return whether the task ever published or recorded anything; a few microseconds."""
    return not (is_empty(f"{task_dir}/ckpt") and is_empty(f"{task_dir}/journal"))


def prepare(task_dir: str, attempt: int, uid: int, gid: int, *, fresh: bool) -> None:
    """Make the task's directory ready for an attempt: every directory there, the stage empty.

    A handful of system calls, also for a task that has much in it: what must go is renamed here
    and deleted by `prune`. With `fresh`, checkpoints and journals go to `archive/<attempt>`.

    Invariant: no attempt before takes or publishes anything meanwhile, nor afterwards: `fence`.

    Raises:
        NotTrusted: the task put something else where a directory must be.
        BlockingIOError: an attempt before is publishing just now; try again.

    Durable: nothing; after a power loss the next start does it again.
    """
    parent, name = os.path.split(task_dir.rstrip("/"))
    parent_fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        task_fd = _made(name, parent_fd, uid, gid)
    finally:
        os.close(parent_fd)
    try:
        _take_fence(task_fd)
        if fresh:
            _archive(task_fd, attempt, uid, gid)
        os.close(_made("ckpt", task_fd, uid, gid))
        _set_unsynced_aside(task_fd, uid)
        _renew_stage(task_fd, attempt, uid, gid)
        with contextlib.suppress(FileNotFoundError):  # what was asked of an earlier attempt
            os.unlink(CONTROL, dir_fd=task_fd)
        _note_attempt(task_fd, attempt, uid)
    finally:
        # Not by closing alone: another thread may have the open file too, under another number.
        fcntl.flock(task_fd, fcntl.LOCK_UN)
        os.close(task_fd)


def fence(task_fd: int, *, waits: bool) -> None:
    """Lock what only the newest attempt may do: see `attempt_of`, then act, with no one between.

    Not the lock on `ckpt/`: that one is held over a whole copy, and the daemon must not wait.
    """
    fcntl.flock(task_fd, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _take_fence(task_fd: int) -> None:
    """Take it at once. Raises BlockingIOError that tells who holds it."""
    try:
        fence(task_fd, waits=False)
    except BlockingIOError as error:
        text = f"the lock on it is held by {_holder(task_fd)}"
        raise BlockingIOError(error.errno, text) from error


def _holder(fd: int) -> str:
    """Return who holds the flock(2) on an open file. Source: /proc/locks in proc(5)."""
    found = os.fstat(fd)
    name = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with contextlib.suppress(OSError), open("/proc/locks") as locks:
        for line in locks:
            words = line.split()
            if "FLOCK" in words and name in words:
                return f"pid {_as_seen(words[words.index(name) - 1])}"
    return "somebody"


def _as_seen(pid: str) -> str:
    """Return a process with its name, state and parent."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        named, _, rest = file.read().rpartition(")")
        state, parent, *_ = rest.split()
        return f"{named}), state {state}, child of {parent}"
    return f"{pid}, gone by now"


def _made(name: str, dir_fd: int, uid: int, gid: int) -> int:
    """Return a descriptor of the directory, made and given to `uid` where it was missing."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=dir_fd)
    try:
        return open_directory(name, uid, dir_fd)
    except NotTrusted:
        # Crash: made by us but not yet given away. Nobody but us can own a directory here
        # other than `uid`: moving one in needs write permission on that directory itself.
        fd = open_directory(name, os.geteuid(), dir_fd)
        _give(fd, uid, gid)
        return fd


def _give(fd: int, uid: int, gid: int) -> None:
    """Give away what was made; a quota may refuse that (EDQUOT), and then it is closed."""
    try:
        os.fchown(fd, uid, gid)
    except OSError:
        os.close(fd)
        raise


def _archive(task_fd: int, attempt: int, uid: int, gid: int) -> None:
    """Crash: half of it is in the archive; the repeated start moves the rest.

    Durable: all of it, where it was or in the archive.
    """
    os.close(_made("archive", task_fd, uid, gid))
    archive_fd = open_directory("archive", uid, task_fd)
    try:
        into_fd = _made(str(attempt), archive_fd, uid, gid)
        sync_fd(archive_fd)
    finally:
        os.close(archive_fd)
    try:
        sync_fd(task_fd)
        kept = names_in(into_fd)
        for name in ("ckpt", "journal"):
            if name not in kept:
                with contextlib.suppress(FileNotFoundError):
                    os.rename(name, name, src_dir_fd=task_fd, dst_dir_fd=into_fd)
        sync_fd(into_fd)
    finally:
        os.close(into_fd)


def _renew_stage(task_fd: int, attempt: int, uid: int, gid: int) -> None:
    fd = _made("stage", task_fd, uid, gid)
    os.close(fd)
    if is_empty("stage", task_fd):
        return
    os.rename(
        "stage",
        f"{LEFTOVER}{attempt}-{time.time_ns()}",
        src_dir_fd=task_fd,
        dst_dir_fd=task_fd,
    )
    os.close(_made("stage", task_fd, uid, gid))


def _set_unsynced_aside(task_fd: int, uid: int) -> None:
    """Take unsealed generations of another boot out of the row: power loss may have emptied them.

    Invariant: done before `attempt.json` names this boot, which would vouch for them.
    """
    if is_empty("ckpt", task_fd) or attempt_of(task_fd, uid)[1] == this_boot_id():
        return
    ckpt_fd = open_directory("ckpt", uid, task_fd)
    try:
        for _, name in numbered(ckpt_fd):
            if not is_sealed(ckpt_fd, name):
                set_aside(ckpt_fd, name, "unsynced")
    finally:
        os.close(ckpt_fd)


def _note_attempt(task_fd: int, attempt: int, uid: int) -> None:
    """Write attempt.json in place: one short write is whole or not there, and costs no rename.

    Durable: no; lost with the power, it says that nothing unsealed is to be trusted.
    """
    data = json.dumps({"attempt": attempt, "boot_id": this_boot_id()}).encode()
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(ATTEMPT_FILE, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=task_fd)
        _give(fd, uid, -1)
    except FileExistsError:
        fd = _opened_attempt(task_fd, uid, flags)
    try:
        write_all(fd, data.ljust(_ATTEMPT_BYTES), 0)
    finally:
        os.close(fd)


def _opened_attempt(task_fd: int, uid: int, flags: int) -> int:
    try:
        fd = os.open(ATTEMPT_FILE, flags, dir_fd=task_fd)
    except OSError as error:
        if is_passing(error):
            raise
        raise NotTrusted(f"{ATTEMPT_FILE} cannot be written: {error.strerror}") from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != uid or found.st_nlink != 1:
        os.close(fd)
        raise NotTrusted(f"{ATTEMPT_FILE} is not a file of uid {uid}")
    return fd


def attempt_of(task_fd: int, uid: int) -> tuple[int, str]:
    """Return the newest attempt prepared here and its boot id; (0, "") where there is no sense.

    Raises:
        OSError: the machine has trouble; nothing is known.
    """
    try:
        found = json.loads(read_small(ATTEMPT_FILE, uid, task_fd, _SMALL_BYTES_MAX))
        attempt, boot_id = int(found["attempt"]), str(found["boot_id"])
    except _NO_SENSE as error:
        if is_passing(error):
            raise
        return 0, ""
    return (attempt, boot_id) if _attempt_in(str(attempt)) is not None else (0, "")


def journal_name(attempt: int) -> str:
    """Return the name of an attempt's journal in `journal/`."""
    return f"{attempt:06d}.j"


def attempt_of_journal(name: str) -> int | None:
    """Return whose journal a name in `journal/` is; None where it is none and nobody reads it."""
    stem = name.removesuffix(".j")
    return _attempt_in(stem) if stem != name else None


def _attempt_in(text: str) -> int | None:
    is_one = text.isascii() and text.isdigit() and len(text) <= _ATTEMPT_DIGITS_MAX
    return int(text) if is_one else None


def newest_attempt(task_dir: str, uid: int) -> int:
    """Return the number of the newest attempt where no log beside the directory knows it; 0: none.

    Nobody syncs `attempt.json`: after a power cut, the names in `journal/` and, where that was put
    away, in `archive/` know better.
    """
    try:
        task_fd = open_directory(task_dir, uid)
    except FileNotFoundError:
        return 0
    try:
        newest = attempt_of(task_fd, uid)[0]
        recorded = [attempt_of_journal(name) for name in _names_of("journal", task_fd, uid)]
        archived = [_attempt_in(name) for name in _names_of("archive", task_fd, uid)]
    finally:
        os.close(task_fd)
    return max(newest, *(attempt or 0 for attempt in (*recorded, *archived, 0)))


def _names_of(directory: str, task_fd: int, uid: int) -> list[str]:
    try:
        fd = open_directory(directory, uid, task_fd)
    except FileNotFoundError:
        return []
    try:
        return names_in(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened(task_dir: str, owner_uid: int) -> Iterator[tuple[int, int]]:
    """Open a task's directory and its `ckpt/`; both descriptors close at the end of the block."""
    task_fd = open_directory(task_dir, owner_uid)
    try:
        ckpt_fd = open_directory("ckpt", owner_uid, task_fd)
        try:
            yield task_fd, ckpt_fd
        finally:
            os.close(ckpt_fd)
    finally:
        os.close(task_fd)


@contextlib.contextmanager
def kept(task_dir: str, owner_uid: int) -> Iterator[None]:
    """Keep every generation until the end of the block: savers wait, and `prune` steps back.

    Waits for a save that is under way. Where nothing was ever saved there is nothing to keep.
    """
    with contextlib.ExitStack() as until_end:
        with contextlib.suppress(FileNotFoundError):
            _, ckpt_fd = until_end.enter_context(opened(task_dir, owner_uid))
            fcntl.flock(ckpt_fd, fcntl.LOCK_SH)
        yield


def sync_names(task_fd: int, ckpt_fd: int) -> None:
    """Make durable which generations there are: who published one may have died before its sync.

    Durable: the names in `ckpt/`, and its own.
    """
    sync_fd(ckpt_fd)
    sync_fd(task_fd)


def numbered(ckpt_fd: int) -> list[tuple[int, str]]:
    """Return (number, name) of every generation, newest first."""
    names = [name for name in names_in(ckpt_fd) if is_number(name)]
    return sorted(((int(name), name) for name in names), reverse=True)


def is_number(name: str) -> bool:
    """Return whether a name in `ckpt/` is a number from 1 on, padded with zeros or not."""
    return name.isascii() and name.isdigit() and len(name) <= _SEQ_DIGITS_MAX and int(name) > 0


def number_after(ckpt_fd: int) -> int:
    """Return a number greater than any that was ever used here, set aside or not."""
    stems = (name.partition(".")[0] for name in names_in(ckpt_fd))
    return max((int(stem) for stem in stems if is_number(stem)), default=0) + 1


def is_sealed(ckpt_fd: int, name: str) -> bool:
    """Return whether a generation carries a manifest, valid or not."""
    try:
        os.stat(f"{name}/{MANIFEST}", dir_fd=ckpt_fd, follow_symlinks=False)
    except OSError as error:
        if is_passing(error):
            raise
        return False
    return True


def set_aside(ckpt_fd: int, name: str, why: str) -> str:
    """Rename a generation out of the row, keeping it; return its new name.

    Invariant: afterwards its number is free: a `mv` to it does not move into the old directory.
    """
    for serial in range(1, _ASIDE_MAX):  # Bound: pruned to a few; more is the task's doing
        aside = f"{name}.{why}" if serial == 1 else f"{name}.{why}-{serial}"
        try:
            os.rename(name, aside, src_dir_fd=ckpt_fd, dst_dir_fd=ckpt_fd)
        except FileNotFoundError:
            return aside  # its maker deletes it beside us: gone as well
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise
        else:
            return aside
    raise NotTrusted(f"checkpoint {name} cannot be set aside: {_ASIDE_MAX} names are taken")


def still_aside(ckpt_fd: int, seq: int, said: list[str]) -> list[str]:
    """Name what was set aside earlier, is newer than `seq`, and was not said already."""
    texts = []
    for name in sorted(names_in(ckpt_fd)):
        stem, dot, why = name.partition(".")
        is_newer = bool(dot) and is_number(stem) and int(stem) > seq
        if is_newer and not any(name in text for text in said):
            texts.append(f"checkpoint {int(stem)} is not used ({why}), kept as {name}")
    return texts


def discard(name: str, ckpt_fd: int) -> None:
    """Crash: renamed but not deleted; a leftover is deleted by the next prune."""
    discarded = f"{LEFTOVER}{name[:64]}-{time.time_ns()}"
    os.rename(name, discarded, src_dir_fd=ckpt_fd, dst_dir_fd=ckpt_fd)
