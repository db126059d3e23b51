"""The fault matrix: a disk that fails, is full or stalls, at each step of the log's protocol.

    fault:  write (EIO), flush (EIO), full (ENOSPC), stall (the device holds still)
    step:   append, rotate, snapshot, rename, directory sync

Promised of every cell: nothing that was acknowledged is lost, on the disk as it is after the
fault; a sync that failed is not tried again, seen by who passes the syncs on; what is refused is
refused by an error of ours. Then the disk is well again: a log that failed stays refused for ever,
any other goes on, and what it acknowledges now is there as well.
"""

import contextlib
import errno
import os
import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from ckptd.protocol.errors import CkptdError, DiskFull
from ckptd.storage.disk import Bytes, File
from ckptd.storage.snapshot import SnapshotDone, SnapshotWriter
from ckptd.storage.wal import WalFailed
from tests.crashdisk.cuts import Place
from tests.crashdisk.device import Content, Device
from tests.crashdisk.filesystem import Kind, mounted, settle
from tests.crashdisk.lives import Below
from tests.fakes.log_model import Writer

Fault = Literal["write", "flush", "full", "stall"]
Step = Literal["append", "rotate", "snapshot", "rename", "directory sync"]
FAULTS: tuple[Fault, ...] = ("write", "flush", "full", "stall")
STEPS: tuple[Step, ...] = ("append", "rotate", "snapshot", "rename", "directory sync")
APPENDS_MAX = 200
STARTS_MAX = 20
SMALL_BYTES, FILL_BYTES = 4 << 10, 1 << 20
_KINDS: dict[Step, tuple[str, str]] = {  # the operation and the part of its path that is the step
    "append": ("sync", "/wal/"),
    "rotate": ("rename", "/wal/"),
    "snapshot": ("create", "/snap/"),
    "rename": ("rename", "/snap/"),
    "directory sync": ("sync_dir", "/snap"),
}


def expected(kind: Kind, fault: Fault, step: Step) -> set[str]:
    """Return what may come of a cell.

    Where overwriting takes room, as on btrfs, a full disk is found by the sync of a log that had
    its room; and a snapshot that meets it may leave it to the log to find it first.
    """
    is_log = step in {"append", "rotate"}
    match fault:
        case "write" | "flush":
            return {"WalFailed"} if is_log else {"SnapshotFailed"}
        case "full":
            refused = {"DiskFull"} if is_log else {"SnapshotFailed"}
            return refused if kind.overwrites else {*refused, "WalFailed"}
        case "stall":
            return {"waited, then done"}


class Watched(Below):
    """Calls `strike` just before the first operation that is the awaited step.

    It notes each sync that is tried again after it failed, whatever name the file has by then.
    """

    def __init__(self, top: Path) -> None:
        super().__init__(top)
        self.top = top
        self.awaits = ("", "")
        self.strike: Callable[[], None] = lambda: None
        self.struck = threading.Event()
        self.tried_again: list[str] = []
        self._failed = set[int]()  # inodes

    def reach(self, kind: str, path: str) -> None:
        """Strike, once, where this is the step."""
        awaited, part = self.awaits
        if kind == awaited and part in path:
            self.awaits = ("", "")
            self.strike()
            self.struck.set()

    def pass_on(self, inode: int, path: str, sync: Callable[[], None]) -> None:
        """Sync something; raises OSError where that fails, and notes it."""
        if inode in self._failed:
            self.tried_again.append(path)
        try:
            sync()
        except OSError:
            self._failed.add(inode)
            raise

    def inode(self, path: str) -> int:
        """Return the number of a file or directory."""
        return os.stat(self._top + path).st_ino

    def create(self, path: str) -> File:
        self.reach("create", path)
        file = _WatchedFile(super().create(path), self, path)
        self._failed.discard(self.inode(path))  # written anew
        return file

    def open(self, path: str, *, write: bool = False) -> File:
        return _WatchedFile(super().open(path, write=write), self, path)

    def rename(self, old: str, new: str) -> None:
        self.reach("rename", new)
        super().rename(old, new)

    def sync_dir(self, path: str) -> None:
        self.reach("sync_dir", path)
        self.pass_on(self.inode(path), path, partial(super().sync_dir, path))


class _WatchedFile:
    """A file that tells its disk before it syncs."""

    def __init__(self, file: File, disk: Watched, path: str) -> None:
        self._file, self._disk, self._path = file, disk, path
        self._inode = disk.inode(path)

    def read(self, size: int, offset: int) -> bytes:
        return self._file.read(size, offset)

    def write(self, data: Bytes, offset: int) -> None:
        self._file.write(data, offset)

    def size(self) -> int:
        return self._file.size()

    def sync_data(self) -> None:
        self._disk.reach("sync", self._path)
        self._disk.pass_on(self._inode, self._path, self._file.sync_data)

    def sync(self) -> None:
        self._disk.reach("sync", self._path)
        self._disk.pass_on(self._inode, self._path, self._file.sync)

    def drop_cache(self) -> None:
        self._file.drop_cache()

    def close(self) -> None:
        self._file.close()


class Stubborn(Watched):
    """One that syncs again what failed, as nobody may: it shows that the matrix would see it."""

    def pass_on(self, inode: int, path: str, sync: Callable[[], None]) -> None:
        """Sync something, twice where it fails."""
        try:
            super().pass_on(inode, path, sync)
        except OSError:
            super().pass_on(inode, path, sync)


def cell(
    place: Place, fault: Fault, step: Step, stall_s: float, seen_by: type[Watched] = Watched
) -> str:
    """Play one cell; return what came of it. Raises AssertionError for a broken promise."""
    device = Device(place.node, Content(place.image))
    try:
        with mounted(place.kind, place.node, place.top) as top:
            outcome, acked, submitted = _struck(seen_by(top), device, (fault, step), stall_s)
        assert outcome in expected(place.kind, fault, step), f"it came to {outcome}"
        _look_again(place, acked, submitted)
    finally:
        device.release()
        device.close()
    place.states[f"{fault} x {step}: {outcome}"] += 1
    return outcome


def _struck(
    disk: Watched, device: Device, at: tuple[Fault, Step], stall_s: float
) -> tuple[str, int, int]:
    """Have the fault strike at the step; return what came of it, and what was promised."""
    fault, step = at
    writer = Writer(disk)
    writer.work(random.Random(1), 10)
    disk.strike = _strike(fault, device, disk.top)
    disk.awaits = _KINDS[step]
    outcome = Worker(writer, disk, step, is_to_the_end=fault == "full").outcome(device, stall_s)
    device.heal()
    with contextlib.suppress(OSError):  # what failed for good can only be read
        (disk.top / "filler").unlink(missing_ok=True)
    if outcome == "WalFailed":
        stays_refused(writer)
    else:
        _goes_on(writer)
    assert not disk.tried_again, f"a sync that failed was tried again: {disk.tried_again}"
    writer.store.close()
    return outcome, writer.acked, writer.submitted


def _strike(fault: Fault, device: Device, top: Path) -> Callable[[], None]:
    def strike() -> None:
        match fault:
            case "write" | "flush":
                device.fail(fault)
            case "full":
                _fill(top)
            case "stall":
                device.stall()

    return strike


def _fill(top: Path) -> None:
    """Take all the room there is, in large pieces and then in small ones."""
    with (top / "filler").open("wb", buffering=0) as file:
        for piece in (FILL_BYTES, SMALL_BYTES):
            while True:  # Bound: the disk
                try:
                    if file.write(bytes(piece)) < piece:
                        break
                except OSError as full:
                    if full.errno != errno.ENOSPC:
                        raise
                    break


class Worker:
    """Works in a thread of its own until the step was reached and is over."""

    def __init__(self, writer: Writer, disk: Watched, step: Step, *, is_to_the_end: bool) -> None:
        self._writer, self._disk, self._step = writer, disk, step
        self._is_to_the_end = is_to_the_end
        self._outcome = ""
        self._thread = threading.Thread(target=self._work)

    def outcome(self, device: Device, stall_s: float) -> str:
        """Return what came of it; where the device holds still, it is let go after `stall_s`."""
        self._thread.start()
        is_held = False
        while self._thread.is_alive():  # Bound: APPENDS_MAX
            if device.requests_held.acquire(timeout=0.02):
                is_held = True
                self._thread.join(stall_s)
                assert self._thread.is_alive(), "what waits for the disk cannot be over"
                if self._step == "append":
                    wal = self._writer.wal
                    assert wal.durable_lsn < wal.next_lsn - 1, (
                        "told durable by a disk that is still"
                    )
                device.release()
        self._thread.join()
        assert self._disk.struck.is_set(), "the step was not reached"
        return f"waited, then {self._outcome}" if is_held else self._outcome

    def _work(self) -> None:
        """Append, or snapshot, until the step is behind us, or until it is refused."""
        try:
            self._outcome = self._refused() or "done"
        except (CkptdError, OSError) as refused_by:
            self._outcome = type(refused_by).__name__

    def _refused(self) -> str:
        """Return what refused a snapshot; "" where all went well."""
        for _ in range(APPENDS_MAX):
            if "/snap" in _KINDS[self._step][1] and (refused := _snapshot(self._writer)):
                return refused
            self._writer.append(3)
            self._writer.sync()
            if self._disk.struck.is_set() and not self._is_to_the_end:
                return ""
        return ""


def _snapshot(writer: Writer) -> str:
    """Write a snapshot; return what refused it, "" where it is there."""
    writer.append(1)
    writer.sync()
    snapshot = SnapshotWriter(writer.store, writer.wal.durable_lsn)
    snapshot.add(b"begin")
    snapshot.add(str(writer.wal.durable_lsn).encode())
    snapshot.finish()
    done = snapshot.poll()
    return "" if isinstance(done, SnapshotDone) else type(done).__name__


def stays_refused(writer: Writer) -> None:
    """Promise: after a failed sync nothing is appended or synced, though the disk is well again."""
    before = writer.wal.durable_lsn
    for what, tried in (("append", partial(writer.wal.append, b"x", 1)), ("sync", writer.wal.sync)):
        with contextlib.suppress(WalFailed):
            tried()
            raise AssertionError(f"the log went on after it failed: {what}")
    assert writer.wal.durable_lsn == before


def _goes_on(writer: Writer) -> None:
    """Go on with a log that did not fail, as far as the file system bears it."""
    with contextlib.suppress(CkptdError):
        writer.append(1)
        writer.sync()


def _look_again(place: Place, acked: int, submitted: int) -> None:
    """Start again on what the disk holds now, after a mount that knows no cache of before.

    Bound: STARTS_MAX. btrfs gives room back when it likes; a start without room loses nothing.
    """
    with mounted(place.kind, place.node, place.top) as top:
        (top / "filler").unlink(missing_ok=True)
        settle(top)
    for _ in range(STARTS_MAX):
        with mounted(place.kind, place.node, place.top) as top, contextlib.suppress(DiskFull):
            writer = Writer(Below(top), acked, submitted)
            writer.append(2)
            writer.close()
            return
    raise AssertionError("no start finds the room that was given back")
