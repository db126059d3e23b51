"""Make a checkpoint from inside the task: copy, seal, publish, prune; valid at once.

    ckpt/.leftover-new-4711/   copies and MANIFEST.json, synced
      -> rename -> ckpt/00000008/ -> sync of ckpt/ -> prune to two

All or nothing: before the rename the generation before is the newest, after the sync the new
one is, also after a loss of power. Savers of one task take turns by a lock on `ckpt/`; what a
zombie copied is refused at the rename, see `taskdir.fence`.
Stdlib only. Read next: `ckptd/storage/blobs.py`.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from ckptd.sdk.surroundings import Surroundings
from ckptd.storage.blobs import pruned
from ckptd.storage.copy import copy_in
from ckptd.storage.disk import sync_fd
from ckptd.storage.facts import read_facts
from ckptd.storage.journal import StaleAttempt
from ckptd.storage.manifest import EMPTY, Manifest, seal
from ckptd.storage.taskdir import (
    LEFTOVER,
    attempt_of,
    fence,
    number_after,
    numbered,
    opened,
    this_boot_id,
)
from ckptd.storage.untrusted import NotTrusted, is_empty, open_directory, remove_tree

_COLLISIONS_MAX: Final = 10


class Saved(NamedTuple):
    """A checkpoint that is durable now."""

    seq: int
    path: str
    manifest: Manifest


def save(task_dir: str, files: list[str], header: dict[str, Any]) -> Saved:
    """Save files, or without any what lies in `stage/`, as the next generation.

    `header` is what the manifest says beside the files: task, attempt, epoch, state, progress,
    steps, results and so on (`manifest.EMPTY` lists them all).

    Raises:
        StaleAttempt: a newer attempt exists. NotTrusted: not regular files, or too many.
        OSError: a file is missing or the disk refuses; the generation before stays the newest.

    Durable: the whole checkpoint and its name.
    """
    uid = os.getuid()
    with contextlib.suppress(FileExistsError):
        os.mkdir(f"{task_dir}/ckpt", 0o700)
    with opened(task_dir, uid) as (task_fd, ckpt_fd):
        fcntl.flock(ckpt_fd, fcntl.LOCK_EX)  # until the descriptor is closed
        attempt = int(header.get("attempt", 0))
        name = f"{LEFTOVER}new-{os.getpid()}"
        remove_tree(name, ckpt_fd)
        try:
            _fill(name, files, attempt, task_fd, ckpt_fd)
            manifest = _publish(name, task_fd, ckpt_fd, header)
        except BaseException:
            _take_back(name, files, attempt, task_fd, ckpt_fd)
            raise
        sync_fd(ckpt_fd)
        sync_fd(task_fd)
        with contextlib.suppress(OSError, NotTrusted):  # saved is saved; the next one prunes again
            pruned(task_fd, ckpt_fd, uid)
    seq = int(manifest["seq"])
    return Saved(seq, f"{task_dir}/ckpt/{seq:08d}", manifest)


@contextlib.contextmanager
def _as_newest(task_fd: int, uid: int, attempt: int) -> Iterator[None]:
    """Take a step that only the newest attempt may take; none is prepared meanwhile.

    Raises:
        StaleAttempt: a newer attempt exists; what the stage holds, and the row, are its own.
    """
    fence(task_fd, waits=True)
    try:
        newest = attempt_of(task_fd, uid)[0]
        if newest > attempt:
            raise StaleAttempt(f"attempt {attempt} is over: attempt {newest} exists")
        yield
    finally:
        fcntl.flock(task_fd, fcntl.LOCK_UN)


def _fill(name: str, files: list[str], attempt: int, task_fd: int, ckpt_fd: int) -> None:
    uid = os.getuid()
    with _as_newest(task_fd, uid, attempt):
        if not files and not is_empty("stage", task_fd):
            # Crash: what was staged is lost, as it is when a task dies before it publishes.
            os.rename("stage", name, src_dir_fd=task_fd, dst_dir_fd=ckpt_fd)
            os.mkdir("stage", 0o700, dir_fd=task_fd)
            return
    os.mkdir(name, 0o700, dir_fd=ckpt_fd)
    new_fd = open_directory(name, uid, ckpt_fd)
    try:
        for path in files:
            copy_in(path, new_fd)
    finally:
        os.close(new_fd)


def _take_back(name: str, files: list[str], attempt: int, task_fd: int, ckpt_fd: int) -> None:
    """Leave nothing behind of a save that failed; what was staged goes back to the stage."""
    with contextlib.suppress(OSError):  # what cannot go back stays for the next prune
        if not files:
            with contextlib.suppress(StaleAttempt), _as_newest(task_fd, os.getuid(), attempt):
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir("stage", dir_fd=task_fd)
                os.rename(name, "stage", src_dir_fd=ckpt_fd, dst_dir_fd=task_fd)
        remove_tree(name, ckpt_fd)


def _publish(name: str, task_fd: int, ckpt_fd: int, header: dict[str, Any]) -> Manifest:
    """Crash: a sealed generation without a number; the next save starts over."""
    uid = os.getuid()
    new_fd = open_directory(name, uid, ckpt_fd)
    try:
        for _ in range(_COLLISIONS_MAX):  # Bound: only a plain `mv` beside us can take a number
            seq = number_after(ckpt_fd)
            newest = max((number for number, _ in numbered(ckpt_fd)), default=0)
            parent = int(header.get("parent") or newest)  # an edit names what it was made of
            own = {"seq": seq, "parent": parent, "at_ns": time.time_ns(), "boot_id": this_boot_id()}
            manifest = seal(new_fd, uid, {**EMPTY, **header, **own})
            with _as_newest(task_fd, uid, int(header.get("attempt", 0))):  # copying took its time
                if _renamed(name, f"{seq:08d}", ckpt_fd):
                    return manifest
    finally:
        os.close(new_fd)
    raise OSError(errno.EEXIST, "something else publishes checkpoints at the same time")


def _renamed(name: str, number: str, ckpt_fd: int) -> bool:
    try:
        os.rename(name, number, src_dir_fd=ckpt_fd, dst_dir_fd=ckpt_fd)
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
            raise
        return False
    return True


def facts_for_header(steps: list[str], results: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint repeats of the journal, unless that is too much for it."""
    both = {"steps": steps, "results": results}
    return both if len(json.dumps(both)) <= 1 << 20 else {}


def save_from(
    around: Surroundings,
    files: list[str],
    state: Any,
    progress: tuple[float, float] | None,
) -> Saved:
    """Save with what the journal knows, and tell the daemon to look.

    Durable: the whole checkpoint and its name.
    """
    known = read_facts(around.dir, around.task, os.getuid(), around.attempt)
    done_total = progress and {"done": progress[0], "total": progress[1]}
    header = {
        "task": around.task,
        "attempt": around.attempt,
        "epoch": around.epoch,
        "state": state,
        "progress": done_total,
        **facts_for_header(sorted(known.steps), known.values),
    }
    saved = save(around.dir, files, header)
    lines = [f"PROGRESS={progress[0]:.15g}/{progress[1]:.15g}"] if progress else []
    around.notify("CHECKPOINT=1", *lines)
    return saved
