"""Checkpoints that are spent: their task succeeded, and retention gives back what they take.

    ckpt/00000009/          -> ckpt/.leftover-...    -> deleted, then `ckpt/` itself
    stage/                  -> .leftover-...         -> deleted
    journal/ attempt.json   stay: what the task came to, and how, can still be asked for

Nothing here is called from the daemon's loop: it may delete gigabytes. Called again after a crash,
it goes on where it was; `is_left` says whether there is anything to go on with.
Invariant: what a newer attempt was given is not touched: the renames hold the fence of
`taskdir.py`, and look again who is the newest. Stdlib only. Read next: `blobs.py`.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from ckptd.storage.taskdir import LEFTOVER, attempt_of, discard, fence, opened
from ckptd.storage.untrusted import is_empty, names_in, remove_tree


def is_left(task_dir: str) -> bool:
    """Return whether checkpoints lie there; one system call. `ckpt/` goes last."""
    return os.path.lexists(f"{task_dir}/ckpt")


def delete_spent(task_dir: str, attempt: int, uid: int) -> bool:
    """Delete the checkpoints and the stage of a task whose last attempt is `attempt`.

    Returns whether all of it is gone; False where a newer attempt was prepared, or something
    else holds the fence just now. May raise OSError or NotTrusted: what is left is left.

    Durable: nothing; what comes back after a power loss is deleted by the next call.
    """
    try:
        with opened(task_dir, uid) as (task_fd, ckpt_fd):
            return _deleted(task_fd, ckpt_fd, attempt, uid)
    except FileNotFoundError:
        return not is_left(task_dir)


def _deleted(task_fd: int, ckpt_fd: int, attempt: int, uid: int) -> bool:
    """Crash: between the two fences only leftovers lie here, which every prune deletes as well."""
    with _as_last(task_fd, attempt, uid) as is_last:
        if not is_last:
            return False
        if not is_empty("stage", task_fd):
            discard("stage", task_fd)
        for name in names_in(ckpt_fd):
            if not name.startswith(LEFTOVER):
                discard(name, ckpt_fd)
    for fd in (ckpt_fd, task_fd):
        for name in names_in(fd):
            if name.startswith(LEFTOVER):
                remove_tree(name, fd)
    with _as_last(task_fd, attempt, uid) as is_last:
        if is_last:
            os.rmdir("ckpt", dir_fd=task_fd)
        return is_last


@contextlib.contextmanager
def _as_last(task_fd: int, attempt: int, uid: int) -> Iterator[bool]:
    """Tell whether no newer attempt was prepared; none is until the end of the block."""
    try:
        fence(task_fd, waits=False)  # the task's user may hold it for ever
    except BlockingIOError:
        yield False
        return
    try:
        yield attempt_of(task_fd, uid)[0] <= attempt
    finally:
        fcntl.flock(task_fd, fcntl.LOCK_UN)
