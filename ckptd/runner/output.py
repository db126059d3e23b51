"""A task's output: one file over all its attempts, with a line of ours where each begins and ends.

    --- ckptd: attempt 2 started 2026-11-20T20:44:52Z, resumes from checkpoint 7 ---
    --- ckptd: attempt 2 ended 2026-11-20T20:45:10Z, exit code 0 ---

Loaded by the supervisors too: stdlib only, and of that only what costs no memory (see `shim.py`).
"""

import os
import time

FULL = "the disk of its output was full"
_NO_ROOM = (28, 122)  # ENOSPC, EDQUOT
_TRIED_BYTES = 4_096  # more than a file system keeps beside the name, in no block


def opened(path: str, uid: int, gid: int) -> int:
    """Return the file, open for appending; `uid` -1 leaves it ours.

    It does not wait: the file is its user's, who may hold a lease on it (45 s for each open).

    Raises:
        OSError: it cannot be made, or something else lies there; EAGAIN where it is leased.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(path, flags | os.O_NONBLOCK, 0o600)
    os.set_blocking(fd, True)  # the task's standard output is an ordinary one
    if uid >= 0:  # the task may open its own /dev/stdout again; nobody else gets there
        os.fchown(fd, uid, gid)
    return fd


def write_start(fd: int, attempt: int, at_ns: int, resumed_from: int) -> None:
    """Say that an attempt begins."""
    resumes = f", resumes from checkpoint {resumed_from}" if resumed_from else ""
    _write(fd, f"--- ckptd: attempt {attempt} started {_stamp(at_ns)}{resumes} ---\n")


def write_end(fd: int, attempt: int, at_ns: int, said: str) -> None:
    """Say how an attempt ended, on a line of its own."""
    try:
        size = os.fstat(fd).st_size
        is_open = size > 0 and os.pread(fd, 1, size - 1) not in {b"\n", b""}
    except OSError:  # a disk that fails
        is_open = True
    line = f"--- ckptd: attempt {attempt} ended {_stamp(at_ns)}, {said} ---\n"
    _write(fd, "\n" * is_open + line)


def is_full(path: str, uid: int) -> bool:
    """Tell whether the disk of an output takes nothing more from its user; `uid` -1: from us.

    Tried with a file that has no name: our last line may fit into the output's last block. What
    is kept for root says nothing of other users. Where it cannot be tried, it is not full.
    """
    directory = os.path.dirname(path)
    try:
        room = os.statvfs(directory)
        if uid > 0 and room.f_blocks and not room.f_bavail:
            return True
        fd = os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, bytes(_TRIED_BYTES))
        finally:
            os.close(fd)
    except OSError as error:
        return error.errno in _NO_ROOM
    return False


def ending(cause: str, code: int, signal: int, text: str, *, blame: str, is_oom: bool) -> str:
    """Return what the last line says."""
    if cause not in {"exit", "signal", "oom"}:  # it never began, or nobody knows how it ended
        return text or cause
    if signal:
        return f"signal {signal}" + (" (out of memory)" if is_oom else "")
    return f"exit code {code}" + (f" ({FULL})" if blame == "disk" else "")


def _stamp(at_ns: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_ns // 1_000_000_000))


def _write(fd: int, line: str) -> None:
    try:
        os.write(fd, line.encode(errors="replace"))
    except OSError:  # a full disk costs a marker, never the attempt
        return
