"""The private directory of an item without a result: the contract of a task, for one item.

`items/<number>/` is laid out and fenced as a task's directory is, so `ckpt step`, `ckpt save` and
`ckpt retry-after` work in an item as they do in a task, and an item that was interrupted goes on
from its own checkpoint. It is removed once the item has a result; where it is as it was made, it
is renamed for the next item instead, for directories are what a short command costs most.
A runner that is killed takes nobody along, so what it started is found by CKPTD_BATCH_RUN in its
environment, and ended before the same items run again; so is what left the group of its item.
Invariant: only processes of our own user are looked at, and they are killed by pidfd, so a pid
that was reused meanwhile is never hit.
The daemon's notify socket is not handed on: an item's progress is not that of the batch.
Read next: `ckptd/storage/taskdir.py`.
"""

import contextlib
import errno
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from ckptd.batch.job import Job, Setting
from ckptd.batch.place import newest_run
from ckptd.storage import taskdir
from ckptd.storage.blobs import Found, Mark, mark, newest_valid
from ckptd.storage.taskdir import this_boot_id
from ckptd.storage.untrusted import (
    NotTrusted,
    is_empty,
    open_directory,
    remove_tree,
    replace_small,
)

RUN_VARIABLE: Final = "CKPTD_BATCH_RUN"  # the batch's directory: by it leftovers are found
_NOT_FOR_ITEMS: Final = ("NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_", "CKPTD_")
_KEPT: Final = ("CKPTD_SCOPES_DIR", "CKPTD_BATCH_DIR")
_USUAL: Final = {"stage": True, "ckpt": True, "out": False, "err": False, "attempt.json": False}
_SPARES_MAX: Final = 256
_READ_BYTES_MAX: Final = 1 << 20
_ROOM_BYTES: Final = 64 << 10
_TROUBLES: Final = frozenset((errno.EIO, errno.ENOSPC, errno.EDQUOT))
_GONE_S_MAX: Final = 10.0
_ENVIRON_BYTES_MAX: Final = 4 << 20
_ROUNDS_MAX: Final = 20


class ItemDir(NamedTuple):
    """One item's directory, ready for a run of it."""

    path: str
    number: int
    attempt: int
    found: Found

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """Open a new file for output; what an earlier try left there, a FIFO say, is removed."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.path}/{name}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(f"{self.path}/{name}", flags, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)

    def read(self, name: str) -> bytes:
        """Return the end of what was printed, bounded; what was cut off is told."""
        try:
            fd = os.open(f"{self.path}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return b""  # the item removed it: its own doing
        try:
            lost = max(0, os.fstat(fd).st_size - _READ_BYTES_MAX)
            data = os.pread(fd, _READ_BYTES_MAX, lost)
        except OSError:
            return b""  # a FIFO, a directory: it was put there by the item
        finally:
            os.close(fd)
        return b"[%d bytes before this are left out]\n%s" % (lost, data) if lost else data

    def trouble(self) -> OSError | None:
        """Return why the disk of the batch takes nothing more, None where it does.

        Tried with more than what items that have ended since may have given back.
        """
        path = f"{os.path.dirname(self.path)}/room"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, _ROOM_BYTES)
            finally:
                os.close(fd)
                os.unlink(path)
        except OSError as error:
            return error if error.errno in _TROUBLES else None
        return None

    def mark(self) -> Mark:
        """Return how far the item came by its own files, and how long it wants to wait."""
        return mark(self.path, self.attempt, os.getuid(), this_boot_id())

    def environment(self, env: Mapping[str, str], job: Job) -> dict[str, str]:
        """Return the environment of one run of the item."""
        made = {
            **env,
            "CKPTD_TASK_ID": str(self.number),
            "CKPTD_ATTEMPT": str(self.attempt),
            "CKPTD_EPOCH": "0",
            "CKPTD_DIR": self.path,
            "CKPTD_RESUME": "1" if self.found.seq else "0",
            "CKPTD_LAST": self.found.path,
            "CKPTD_SEQ": str(self.found.seq),
            "CKPTD_CONTROL": f"{self.path}/{taskdir.CONTROL}",
            "CKPTD_JOURNAL": f"{self.path}/journal/{self.attempt:06d}.j",
            "CKPTD_LANE": str(job.lane),
        }
        if "\0" not in job.item.key:
            made["CKPTD_ITEM_KEY"] = job.item.key
        return made


def base_environment(path: str, name: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what all items of a batch find in their environment."""
    env = {
        key: value
        for key, value in environ.items()
        if key in _KEPT or not key.startswith(_NOT_FOR_ITEMS)
    }
    beside = os.path.dirname(sys.executable)
    if os.path.exists(f"{beside}/ckpt"):
        env["PATH"] = f"{env.get('PATH') or '/usr/local/bin:/usr/bin:/bin'}:{beside}"
    return env | {RUN_VARIABLE: path, "CKPTD_BATCH": name}


def path_of(setting: Setting, job: Job) -> str:
    """Return where the item's directory is, or can be made."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(f"{setting.path}/items", 0o700)
    return f"{setting.path}/items/{job.number}"


def make(setting: Setting, job: Job) -> ItemDir:
    """Return the item's directory, ready for its next run; what it saved before is found.

    Durable: nothing; an item that saves syncs what it needs.
    """
    path = path_of(setting, job)
    attempt = newest_run(path) + 1
    if attempt == 1 and setting.spares:
        with contextlib.suppress(OSError):  # it was there after all, without an attempt
            os.rename(f"{setting.path}/items/{setting.spares.pop()}", path)
    taskdir.prepare(path, attempt, os.getuid(), os.getgid(), fresh=False)
    has_saved = attempt > 1 and taskdir.has_anything(path)
    found = newest_valid(path, os.getuid(), this_boot_id()) if has_saved else Found()
    return ItemDir(path, job.number, attempt, found)


def ask_to_stop(path: str, numbers: list[int], data: bytes) -> None:
    """Write the control file of items in flight; `ckpt stop?` in them says yes from now on."""
    for number in numbers:
        with contextlib.suppress(OSError, NotTrusted):  # the item may have replaced it
            fd = open_directory(f"{path}/items/{number}", os.getuid())
            try:
                replace_small(taskdir.CONTROL, data, fd, os.getuid(), is_synced=False)
            finally:
                os.close(fd)


def retire(setting: Setting, number: int) -> None:
    """Put away the directory of an item that has a result: as a spare, or removed.

    What cannot be removed (an item may take its own rights away) stays, and harms nobody.
    Durable: no; what is left after a crash is removed by `sweep`.
    """
    with contextlib.suppress(OSError, NotTrusted):
        items_fd = open_directory(f"{setting.path}/items", os.getuid())
        try:
            if len(setting.spares) < _SPARES_MAX and _is_emptied(str(number), items_fd):
                setting.spares.append(number)
            else:
                remove_tree(str(number), items_fd)
        finally:
            os.close(items_fd)


def _is_emptied(name: str, items_fd: int) -> bool:
    """Return whether a directory holds no more than a new one; its files are gone then."""
    fd = open_directory(name, os.getuid(), items_fd)
    try:
        with os.scandir(fd) as entries:
            found = {one.name: one.is_dir(follow_symlinks=False) for one in entries}
        is_usual = all(_USUAL.get(one) == is_dir for one, is_dir in found.items())
        if not is_usual or not (is_empty("stage", fd) and is_empty("ckpt", fd)):
            return False
        for one, is_dir in found.items():
            if not is_dir:
                os.unlink(one, dir_fd=fd)
        return True
    finally:
        os.close(fd)


def remove_spares(setting: Setting) -> None:
    """Remove the directories that were put away: the run is over."""
    with contextlib.suppress(OSError, NotTrusted):
        items_fd = open_directory(f"{setting.path}/items", os.getuid())
        try:
            for number in setting.spares:
                remove_tree(str(number), items_fd)
        finally:
            os.close(items_fd)
    setting.spares.clear()


def empty_outputs(path: str) -> None:
    """Remove what items without a result printed: it may be what filled the disk."""
    with contextlib.suppress(OSError):
        for number in os.listdir(f"{path}/items"):  # Bound: one for each item in play, and spares
            for name in ("out", "err"):
                with contextlib.suppress(OSError):
                    os.unlink(f"{path}/items/{number}/{name}")


def sweep(path: str, kept: set[int]) -> None:
    """Remove the directories of all items but those that have no result yet."""
    try:
        fd = open_directory(f"{path}/items", os.getuid())
    except FileNotFoundError:
        return
    try:
        with os.scandir(fd) as entries:
            names = [entry.name for entry in entries]  # Bound: one for each item without a result
        for name in names:
            if not (name.isdecimal() and int(name) in kept):
                with contextlib.suppress(OSError):
                    remove_tree(name, fd)
    finally:
        os.close(fd)


# --- processes -----------------------------------------------------------------------------------


def end_leftovers(path: str) -> int:
    """Kill every process that belongs to a run of this batch; return how many there were.

    Raises:
        TimeoutError: one does not die: it is stuck in the kernel.
    """
    killed = 0
    for _ in range(_ROUNDS_MAX):  # Bound: each round kills what the one before left forking
        found = _found(path)
        if not found:
            return killed
        killed += len(found)
        try:
            for fd in found:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
            _wait(found)
        finally:
            for fd in found:
                os.close(fd)
    raise TimeoutError(f"processes of {path} keep starting others faster than they can be killed")


def _found(path: str) -> list[int]:
    """Return a pidfd for each of them."""
    wanted = os.fsencode(f"{RUN_VARIABLE}={path}")
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid() and _is_of(name, wanted):
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(int(name))
                if _is_of(name, wanted):  # still the same one
                    found.append(fd)
                else:
                    os.close(fd)
    return found


def _is_of(pid: str, wanted: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return wanted in file.read(_ENVIRON_BYTES_MAX).split(b"\0")
    except OSError:
        return False  # gone, or somebody else's


def _wait(fds: list[int]) -> None:
    until_s = time.monotonic() + _GONE_S_MAX
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    left = set(fds)
    while left:  # Bound: _GONE_S_MAX
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"{len(left)} processes of an earlier run do not die")
        for fd, _ in poll.poll(left_s * 1000):
            poll.unregister(fd)
            left.discard(fd)
