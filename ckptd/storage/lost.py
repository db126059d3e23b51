"""What the daemon's log knows of a task's files and is not there: told, never passed over.

    known          found           then
    nothing        anything        a first start, or one from nothing that a person asked for
    checkpoint 4   none            a problem: the task must not start over in silence
    checkpoint 4   3               a warning, unless 4 was set aside: that is told already
    a journal      none            a problem: what must not run twice would

What is known was durable before the log took it in (a checkpoint by `blobs.mark`, that there is a
journal by `has_journal`). So no loss of power explains that it is gone, but for what decision 15
of ARCHITECTURE.md leaves open: somebody took it away, or its disk is not mounted.
Read next: `ckptd/core/outcome.py:marked` (what the log takes in), `blobs.py:newest_valid`.
"""

import os
from typing import Final, NamedTuple

from ckptd.storage.blobs import Found
from ckptd.storage.disk import sync_fd
from ckptd.storage.taskdir import is_number, opened
from ckptd.storage.untrusted import is_empty, names_in, open_directory

JOURNAL_IS_GONE: Final = "its journal is gone, and with it which steps and items are done"


class Known(NamedTuple):
    """How far a task had come when its files were last looked at; empty: nothing was saved."""

    checkpoint: int = 0
    has_journal: bool = False

    @property
    def is_anything(self) -> bool:
        """Tell whether there is anything that must be found again."""
        return bool(self.checkpoint or self.has_journal)


NOTHING: Final = Known()


def compared(task_dir: str, uid: int, found: Found, known: Known) -> Found:
    """Return what was found, with a problem or a warning where what is known is not there.

    Raises:
        OSError: passing trouble of the machine; nothing is known.
    """
    if found.problem:
        return found
    found = found._replace(has_journal=has_journal(task_dir, uid))
    if known.checkpoint and not found.seq:
        told = f"; {found.warning}" if found.warning else ""
        text = f"checkpoint {known.checkpoint} is gone, and no older one is there{told}"
        return found._replace(problem=text)
    if known.has_journal and not found.has_journal:
        return found._replace(problem=JOURNAL_IS_GONE)
    if found.seq < known.checkpoint and not _is_aside(task_dir, uid, known.checkpoint):
        told = found.warning or f"resumed from {found.seq}"
        return found._replace(warning=f"checkpoint {known.checkpoint} is gone, {told}")
    return found


def has_journal(task_dir: str, uid: int, *, is_known: bool = False) -> bool:
    """Return whether any attempt recorded anything; only `--fresh` takes a journal away.

    `is_known`: this said so before, nothing need be synced for it.

    Raises:
        OSError, NotTrusted: it cannot be said for sure.

    Durable: that there is one, where there is; not what is in it.
    """
    folder = f"{task_dir}/journal"
    if is_empty(folder):
        return False
    for path in () if is_known else (folder, task_dir):
        fd = open_directory(path, uid)
        try:
            sync_fd(fd)
        finally:
            os.close(fd)
    return True


def _is_aside(task_dir: str, uid: int, seq: int) -> bool:
    with opened(task_dir, uid) as (_, ckpt_fd):
        parts = [name.partition(".") for name in names_in(ckpt_fd)]
    return any(dot and is_number(stem) and int(stem) == seq for stem, dot, _ in parts)
