"""Run a task without a daemon: the same directory, journal and checkpoints, the same resume.

    run_local(ingest, "work/ingest", path="data.csv")      again after a crash: it goes on
    run_local(ingest, "work/ingest", path="data.csv")      once it is done: its result, at once
    run_local(ingest, "work/ingest", again=True, ...)      once it is done: one more time

One process at a time: a lock says so. Read next: `drive.py`, `ckptd/testing.py`.
"""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from ckptd.sdk.context import SyncResumableContext
from ckptd.sdk.declare import as_task
from ckptd.sdk.drive import drive, opened
from ckptd.sdk.outcomes import CorruptCheckpointError
from ckptd.sdk.surroundings import Surroundings
from ckptd.sdk.work import Ports
from ckptd.storage.blobs import newest_valid, prepare, prune, this_boot_id
from ckptd.storage.taskdir import newest_attempt

_LOCK: Final = "LOCK"
_NEVER_S: Final = float("inf")


class AlreadyRunning(Exception):
    """Another process runs a task in this directory."""


def run_local(
    function: Any,
    directory: str | os.PathLike[str],
    *,
    fresh: bool = False,
    again: bool = False,
    park_after: float = _NEVER_S,
    ports: Ports | None = None,
    **given: Any,
) -> Any:
    """Run a task in a directory of its own, from where it was; return its result.

    Waits are waited in place, unless `park_after` (seconds) says otherwise. `fresh` archives what
    is there and starts over; `again` does so only where the task is done, as a nightly run wants
    it: what was interrupted is gone on with, what was done is done anew.

    Raises:
        AlreadyRunning: another process is at it. StopRequested: SIGTERM, at a safe point.
        CorruptCheckpointError, StateVersionError: what is stored cannot be gone on from.
        Whatever else the function raises; then what was durable is kept for the next call.

    Durable: every fact and checkpoint as it happens, and at the end the result.
    """
    task = as_task(function)
    path = os.path.abspath(os.fspath(directory))
    with _locked(path):
        work = opened(begin(path, fresh=fresh), task, given, ports)
        if again and work.known.result:
            work.close()
            work = opened(begin(path, fresh=True), task, given, ports)
        try:
            work.attention.listen()
            return drive(work, park_after_s=park_after)
        finally:
            work.close()


@contextmanager
def open_context(
    directory: str, function: Any, *, task: int = 0, park_after: float = _NEVER_S
) -> Iterator[Any]:
    """Give the context of a directory's next attempt, as for an item of a batch.

    The caller sees to it that no other process is at it. Signals are the caller's, too.

    Raises:
        CorruptCheckpointError, StateVersionError: what is stored cannot be gone on from.
    """
    declared = as_task(function)
    work = opened(begin(directory, task=task), declared, {}, None)
    try:
        if declared.is_async:
            from ckptd.sdk.aio import ResumableContext  # noqa: PLC0415  (asyncio costs 50 ms)

            yield ResumableContext(work, park_after_s=park_after)
        else:
            yield SyncResumableContext(work, park_after_s=park_after)
    finally:
        work.close()


def begin(path: str, *, fresh: bool = False, task: int = 0) -> Surroundings:
    """Make the directory ready for its next attempt; return what that finds around it.

    Raises:
        CorruptCheckpointError: there are checkpoints, and none is valid.

    Durable: nothing; after a crash the next attempt has the same number or a higher one.
    """
    uid = os.getuid()
    os.makedirs(path, mode=0o700, exist_ok=True)
    attempt = newest_attempt(path, uid) + 1
    prepare(path, attempt, uid, os.getgid(), fresh=fresh)
    found = newest_valid(path, uid, this_boot_id())
    if found.problem:
        raise CorruptCheckpointError(f"{found.problem}; fresh=True archives it and starts over")
    if found.warning:
        sys.stderr.write(f"ckptd: {found.warning}\n")
    prune(path, uid)
    return Surroundings(
        {
            "CKPTD_DIR": path,
            "CKPTD_TASK_ID": str(task),
            "CKPTD_ATTEMPT": str(attempt),
            "CKPTD_EPOCH": str(attempt),
            "CKPTD_LAST": found.path,
            "CKPTD_SEQ": str(found.seq),
            "CKPTD_RESUME": "1" if found.seq else "0",
        }
    )


@contextmanager
def _locked(path: str) -> Iterator[None]:
    os.makedirs(path, mode=0o700, exist_ok=True)
    fd = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyRunning(f"another process runs the task in {path}") from error
        yield
    finally:
        os.close(fd)
