"""Checkpoint generations of a task: seal, find the newest valid one, list, prune, copy out.

Nothing here is called from the daemon's loop: it may read gigabytes. What a task may do to these
files while we look: see `untrusted.py`; where they lie: see `taskdir.py`.
Invariant: present = complete for the task; sealed and checked = complete for us.
Invariant: two valid generations stay, and the newest that the task itself saved; nothing damaged is
deleted before two newer are valid.
Stdlib only. Read next: `ckptd/sdk/save.py` (how `ckpt save` and the SDK make a generation).
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from ckptd.storage import manifest as seals
from ckptd.storage.disk import sync_fd
from ckptd.storage.gain import read_gain
from ckptd.storage.manifest import Manifest, TooNew, sha256
from ckptd.storage.taskdir import (
    LEFTOVER,
    attempt_of,
    discard,
    has_anything,
    is_number,
    is_sealed,
    numbered,
    opened,
    prepare,
    set_aside,
    still_aside,
    sync_names,
    task_of,
    this_boot_id,
)
from ckptd.storage.untrusted import (
    Damaged,
    NotTrusted,
    is_passing,
    names_in,
    open_directory,
    plain,
    remove_tree,
)

__all__ = [
    "Found", "Generation", "Mark", "Sealed", "generations", "has_anything", "mark",
    "newest_valid", "prepare", "prune", "pruned", "seal_pending", "this_boot_id",
]  # fmt: skip

KEPT: Final = 2
_LISTED_MAX: Final = 5  # times, of a task that saves faster than we look
_UNSYNCED: Final = "unsynced"
_NOT_SYNCED: Final = "is not trusted: not sealed before the machine was restarted"


class Found(NamedTuple):
    """The checkpoint to resume from; `seq` 0 where there is none.

    `warning` is for people; `problem` means: do not start, a person must look; `passing` is
    trouble of the machine: nothing is known, try again later.
    """

    seq: int = 0
    path: str = ""
    warning: str = ""
    problem: str = ""
    has_journal: bool = False
    passing: OSError | None = None


class Generation(NamedTuple):
    """One checkpoint as it lies there; `fault` says why it is not valid."""

    seq: int
    path: str
    sealed: bool
    valid: bool
    fault: str
    manifest: Manifest  # empty where there is none that checks
    is_unreadable: bool = False  # the fault is the disk's (EIO)


class Mark(NamedTuple):
    """How far the task has provably come; the cursor is equal exactly when nothing was gained."""

    checkpoint: int = 0
    checkpoint_ns: int = 0
    cursor: str = ""
    retry_after_s: float = 0.0
    gained_ns: int = 0  # when the journal last recorded what is not done again
    problem: str = ""
    why: str = ""  # what the problem is about: one of facts.WHYS
    has_journal: bool = False


# --- generations ---------------------------------------------------------------------------------


def _look(ckpt_fd: int, path: str, seq: int, name: str, uid: int, *, is_deep: bool) -> Generation:
    """Read one generation; TooNew and passing trouble but EIO are raised, else it is a `fault`."""
    sealed = is_sealed(ckpt_fd, name)
    found: Manifest = {}
    try:
        fd = open_directory(name, uid, ckpt_fd)
        try:
            found = seals.load(fd, uid)
            if found["seq"] != seq:
                raise Damaged(f"the manifest is that of checkpoint {found['seq']}")
            seals.verify(fd, uid, found, is_deep=is_deep)
        finally:
            os.close(fd)
    except (Damaged, NotTrusted, OSError) as error:
        is_unreadable = isinstance(error, OSError) and error.errno == errno.EIO
        if is_passing(error) and not is_unreadable:
            raise
        fault = plain(error) if sealed else "not sealed"
        return Generation(seq, path, sealed, False, fault, {}, is_unreadable)
    return Generation(seq, path, True, True, "", found)


def generations(task_dir: str, owner_uid: int, *, verify: bool) -> list[Generation]:
    """Return every checkpoint, newest first; with `verify`, every byte is read and compared.

    One that is deleted meanwhile, by retention or a newer save, is not bad: it is not there.
    """
    found: list[Generation] = []
    try:
        with opened(task_dir, owner_uid) as (_, ckpt_fd):
            for _ in range(_LISTED_MAX):
                listed = numbered(ckpt_fd)
                found = _looked_at(ckpt_fd, task_dir, listed, owner_uid, is_deep=verify)
                if len(found) == len(listed) or any(one.valid for one in found):
                    break  # else newer ones took their place
    except FileNotFoundError:
        return []
    except (NotTrusted, OSError) as error:
        return [Generation(0, f"{task_dir}/ckpt", False, False, plain(error), {})]
    return found


def _looked_at(
    ckpt_fd: int, task_dir: str, listed: list[tuple[int, str]], uid: int, *, is_deep: bool
) -> list[Generation]:
    found = []
    for seq, name in listed:
        path = f"{task_dir}/ckpt/{name}"
        try:
            one = _look(ckpt_fd, path, seq, name, uid, is_deep=is_deep)
        except TooNew as error:
            one = Generation(seq, path, True, False, plain(error), {})
        if one.valid or _is_there(ckpt_fd, name):
            found.append(one)
    return found


def _is_there(ckpt_fd: int, name: str) -> bool:
    """Return whether nobody cleared it away since it was listed."""
    try:
        os.stat(name, dir_fd=ckpt_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError:  # it lies there, and cannot be looked at: that is bad
        return True
    return True


def newest_valid(task_dir: str, owner_uid: int, boot_id: str) -> Found:
    """Return the checkpoint to resume from, after reading and comparing all its bytes.

    Unsealed ones of this boot are sealed first. Newer ones that are not valid are set aside once
    an older valid one is found; where none is valid, nothing is moved and `problem` says so: the
    task must not start over silently. What was lost with the power alone is no problem.
    Invariant: no number in `ckpt/` is greater than that of what is returned without a problem.

    Raises:
        OSError: passing trouble of the machine; nothing is known.

    Durable: what it returns.
    """
    try:
        unsealed = {one.seq: one for one in seal_pending(task_dir, owner_uid, boot_id)}
        with opened(task_dir, owner_uid) as (task_fd, ckpt_fd):
            found = _newest(ckpt_fd, task_dir, owner_uid, unsealed)
            sync_names(task_fd, ckpt_fd)
            return found
    except FileNotFoundError:
        return Found()
    except TooNew as error:
        return Found(problem=plain(error))
    except (NotTrusted, OSError) as error:
        if is_passing(error):
            raise
        return Found(problem=plain(f"checkpoints cannot be read: {error}"))


class _Unfit(NamedTuple):
    name: str
    why: str
    fault: str


def _newest(ckpt_fd: int, task_dir: str, uid: int, unsealed: dict[int, "Sealed"]) -> Found:
    unfit: list[_Unfit] = []
    is_unreadable = False
    for seq, name in numbered(ckpt_fd):
        path = f"{task_dir}/ckpt/{name}"
        one = _look(ckpt_fd, path, seq, name, uid, is_deep=True)
        if one.valid:
            warnings = _put_away(ckpt_fd, seq, unfit)
            warning = "; ".join([*warnings, f"resumed from {seq}"]) if warnings else ""
            return Found(seq, path, plain(warning))
        unfit.append(_unfit(one, name, unsealed.get(seq)))
        is_unreadable |= one.is_unreadable
    faults = "; ".join(one.fault for one in unfit if one.why != _UNSYNCED)
    if faults and is_unreadable:
        raise OSError(errno.EIO, f"no checkpoint can be read: {faults}")
    if faults:
        return Found(problem=plain(f"no valid checkpoint is left: {faults}"))
    return Found(warning=plain("; ".join(_put_away(ckpt_fd, 0, unfit))))


def _unfit(one: Generation, name: str, tried: "Sealed | None") -> _Unfit:
    if one.sealed:
        return _Unfit(name, "damaged", f"checkpoint {one.seq} is damaged ({one.fault})")
    if tried is None or not tried.warning:
        return _Unfit(name, "unsealed", f"checkpoint {one.seq} is not sealed")
    return _Unfit(name, "unsealed" if tried.is_refused else _UNSYNCED, tried.warning)


def _put_away(ckpt_fd: int, seq: int, unfit: list[_Unfit]) -> list[str]:
    """Set aside what stands above the one that is resumed from; tell it, and what was before."""
    said = [f"{one.fault}, kept as {set_aside(ckpt_fd, one.name, one.why)}" for one in unfit]
    return said + still_aside(ckpt_fd, seq, said)


# --- sealing and pruning -------------------------------------------------------------------------


class Sealed(NamedTuple):
    """What became of one published directory: `warning` empty where it is valid now.

    `is_refused`: not for a loss of power, but for what is in it.
    """

    seq: int
    warning: str
    is_refused: bool = False


def seal_pending(task_dir: str, uid: int, boot_id: str, *, is_synced: bool = False) -> list[Sealed]:
    """Seal what was published and is not sealed, newest first, until KEPT generations are.

    Only while the boot is the one it was published under: a power loss since then may have
    emptied files that the task believes written. Older ones are left for `prune`.
    `is_synced`: all that the attempt wrote was synced after its end, in whichever boot.

    Raises:
        OSError: passing trouble of the machine (a full disk, no descriptors): try again later.

    Durable: content, manifest and name of what it returns without a warning.
    """
    try:
        with opened(task_dir, uid) as (task_fd, ckpt_fd):
            found = numbered(ckpt_fd)
            if all(is_sealed(ckpt_fd, name) for _, name in found[:KEPT]):
                return []
            attempt, boot_of_attempt = attempt_of(task_fd, uid)
            header = {
                "task": task_of(task_dir),
                "attempt": attempt,
                "at_ns": time.time_ns(),
                "boot_id": boot_id if is_synced or boot_of_attempt == boot_id else "",
            }
            return list(_sealing(ckpt_fd, found, uid, header))
    except FileNotFoundError:
        return []
    except (NotTrusted, OSError) as error:
        if is_passing(error):
            raise
        return [Sealed(0, plain(f"checkpoints cannot be read: {error}"), is_refused=True)]


def _sealing(
    ckpt_fd: int, found: list[tuple[int, str]], uid: int, header: dict[str, Any]
) -> Iterator[Sealed]:
    sealed = 0
    for at, (seq, name) in enumerate(found):
        if sealed == KEPT:
            return
        if is_sealed(ckpt_fd, name):
            sealed += 1
        elif not header["boot_id"]:
            yield Sealed(seq, f"checkpoint {seq} {_NOT_SYNCED}")
        else:
            parent = found[at + 1][0] if at + 1 < len(found) else 0
            one = _seal_one(ckpt_fd, name, uid, {**header, "seq": seq, "parent": parent})
            sealed += not one.warning
            yield one


def _seal_one(ckpt_fd: int, name: str, uid: int, header: dict[str, Any]) -> Sealed:
    seq = header["seq"]
    try:
        fd = open_directory(name, uid, ckpt_fd)
        try:
            seals.seal(fd, uid, {**seals.EMPTY, **header})
        finally:
            os.close(fd)
        sync_fd(ckpt_fd)
    except FileNotFoundError:
        return Sealed(seq, f"checkpoint {seq} was removed while it was sealed", is_refused=True)
    except (NotTrusted, OSError) as error:
        if is_passing(error):
            raise
        return Sealed(seq, plain(f"checkpoint {seq} cannot be sealed: {error}"), is_refused=True)
    return Sealed(seq, "")


def prune(task_dir: str, owner_uid: int, keep: int = KEPT) -> list[int]:
    """Delete what nobody needs: generations below the newest `keep` valid ones; return them.

    The newest that the task itself saved stays, however many were imported or edited since: what
    a person brought in may be wrong, and this is the way back.
    Sizes and manifests are compared, digests are not. Steps back (deletes nothing) while a
    save is under way: it holds the lock on `ckpt/`.
    """
    try:
        with opened(task_dir, owner_uid) as (task_fd, ckpt_fd):
            fcntl.flock(ckpt_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return pruned(task_fd, ckpt_fd, owner_uid, keep)
    except (NotTrusted, OSError):  # locked, or it has none, or the next start tells what is wrong
        return []


def pruned(task_fd: int, ckpt_fd: int, uid: int, keep: int = KEPT) -> list[int]:
    """Prune under a lock that the caller holds."""
    oldest_kept, own = _kept(ckpt_fd, uid, keep)
    removed = []
    for seq, name in numbered(ckpt_fd):
        if seq < oldest_kept and seq != own:
            discard(name, ckpt_fd)
            removed.append(seq)
    asides = sorted(
        name for name in names_in(ckpt_fd) if is_number(name.partition(".")[0]) and "." in name
    )
    for name in asides[:-KEPT]:
        discard(name, ckpt_fd)
    for fd in (ckpt_fd, task_fd):
        for name in names_in(fd):
            if name.startswith(LEFTOVER):
                with contextlib.suppress(OSError):  # one that cannot go keeps no other
                    remove_tree(name, fd)
    return removed


def _kept(ckpt_fd: int, uid: int, keep: int) -> tuple[int, int]:
    """Return the numbers of the `keep`-th newest valid generation, and of the newest own; 0: none.

    Bound: what was published since the last prune, and the few that it kept.
    """
    valid: list[int] = []
    own = 0
    for seq, name in numbered(ckpt_fd):
        with contextlib.suppress(TooNew):
            one = _look(ckpt_fd, "", seq, name, uid, is_deep=False)
            if one.valid:
                valid.append(seq)
                own = own or (0 if seals.is_brought_in(one.manifest) else seq)
        if own and len(valid) >= keep:
            break
    return (valid[keep - 1] if len(valid) >= keep else 0), own


# --- how far it has come -------------------------------------------------------------------------


def mark(task_dir: str, attempt: int, uid: int, boot_id: str, *, is_synced: bool = False) -> Mark:
    """Return how far the task has provably come, over all its attempts up to `attempt`.

    The cursor is a digest of the newest valid checkpoint's content and of the facts in the
    journals: saving the same again does not change it, any gain does. Sizes and manifests of
    checkpoints are compared, digests of their files are not (that is `newest_valid`).

    Raises:
        OSError: passing trouble of the machine; what was known before still holds.

    Durable: the checkpoint; what a journal lost, the next look counts anew.
    """
    with contextlib.suppress(OSError):  # not sealed is not counted; the next look seals it
        seal_pending(task_dir, uid, boot_id, is_synced=is_synced)
    newest, problem = _newest_sealed(task_dir, uid)
    saved = newest.manifest if newest else {}
    gain = read_gain(task_dir, task_of(task_dir), uid, attempt)
    known = (seals.content_digest(saved) if newest else "") + gain.digest()
    cursor = sha256(known.encode()).hexdigest()[:32] if known else ""
    text, why = (problem, "version") if problem else gain.problem_of(attempt)
    of = int(saved.get("seq", 0)), int(saved.get("at_ns") or 0)
    return Mark(*of, cursor, gain.retry_after_s(attempt), gain.gained_ns, plain(text), why)


def newest_sealed(task_dir: str, owner_uid: int) -> tuple[int, str]:
    """Return number and path of the newest checkpoint that looks valid; (0, "") without one.

    For the task itself: manifest and sizes are compared, digests were when it was started.

    Raises:
        Damaged: a later version wrote the newest one.
        OSError: passing trouble of the machine; nothing is known.

    Durable: what it returns.
    """
    newest, problem = _newest_sealed(task_dir, owner_uid)
    if problem:
        raise Damaged(problem)
    return (newest.seq, newest.path) if newest else (0, "")


def _first_valid(
    ckpt_fd: int, task_dir: str, listed: list[tuple[int, str]], uid: int
) -> Generation | None:
    for seq, name in listed:
        one = _look(ckpt_fd, f"{task_dir}/ckpt/{name}", seq, name, uid, is_deep=False)
        if one.valid:
            return one
    return None


def _newest_sealed(task_dir: str, uid: int) -> tuple[Generation | None, str]:
    try:
        with opened(task_dir, uid) as (task_fd, ckpt_fd):
            for _ in range(_LISTED_MAX):
                listed = numbered(ckpt_fd)
                found = _first_valid(ckpt_fd, task_dir, listed, uid)
                if found is not None:
                    sync_names(task_fd, ckpt_fd)
                    return found, ""
                if all(_is_there(ckpt_fd, name) for _, name in listed):
                    break  # else newer ones took their place
    except TooNew as error:
        return None, str(error)
    except (NotTrusted, OSError) as error:  # it has none; the rest is told at start
        if is_passing(error):
            raise
    return None, ""
