"""The state directory as a whole: one lock, one FORMAT, a log and its snapshots.

    store = Store.open("/var/lib/ckptd", RealDisk())         # Busy, Corrupt, BadConfig
    recovery = store.recover(lambda done, whole: None)       # reads and judges, changes nothing
    for chunk in recovery.chunks(): ...                      # State at recovery.snapshot_lsn
    for found in recovery.frames(): ...                      # found.first_lsn, .count, .payload
    wal = store.arm(recovery, epoch=recovery.epoch + 1, boot_id=boot_id, at_ns=now_ns)
    lsn = wal.append(payload, count)                         # written; DiskFull, WalFailed
    wal.sync()                                               # durable; now tell and act
    wal.mark_idle()                                          # 50 ms after the last sync
    writer = store.begin_snapshot(wal.durable_lsn)           # what it shows must be durable
    writer.add(chunk); writer.finish()                       # its own thread writes
    writer.poll()                                            # None, SnapshotDone, SnapshotFailed
    wal.mark_idle(closed=True); store.close()                # an orderly end

Invariant: a store that has a FORMAT has a log; "start empty" happens once, in `_create`.
It knows no record. Read next: `recovery.py`, `snapshot.py`, FORMAT.md.
"""

import contextlib
import errno
import json
import os
from zlib import crc32

from ckptd.protocol.errors import BadConfig, Busy, CkptdError, Corrupt, DiskFull
from ckptd.storage import frame, segment, snapshot
from ckptd.storage.disk import Disk, File, RealDisk
from ckptd.storage.forward import copy_forward
from ckptd.storage.rebuild import store_id_from_headers
from ckptd.storage.recovery import LOOK, OnProgress, Recovery
from ckptd.storage.segment import BLOCK_BYTES, SEGMENT_BYTES, Link, Name, Place
from ckptd.storage.snapshot import SnapshotWriter
from ckptd.storage.wal import NO_ROOM, Background, Reign, Wal, WalFailed, new_block

_FORMAT_BYTES_MAX = 4096
_SICK = frozenset((errno.EIO, errno.EROFS))  # a file system that met an error goes read-only
_FORMAT_CRC = b',"crc32":"'


class Store:
    """An open state directory. Made by `open`; holds the lock until `close`."""

    def __init__(self, place: Place, lock: File, *, has_threads: bool) -> None:
        self.place = place
        self.wal: Wal | None = None
        self.reign = Reign(0, "", 0)
        self.has_threads = has_threads
        self._lock = lock
        self._background = Background(has_threads=has_threads)

    @classmethod
    def open(
        cls,
        path: str,
        disk: Disk | None = None,
        *,
        create: bool = True,
        segment_bytes: int = SEGMENT_BYTES,
        has_threads: bool = True,
    ) -> "Store":
        """Lock the directory and check its FORMAT; make a new store where there is none.

        Durable: a new store, FORMAT last.

        Raises:
            Busy: another process has it.
            Corrupt: FORMAT does not check, or is missing beside a log.
            BadConfig: a later version wrote it, it cannot be used, or there is none to look at.
            DiskFull: no room for a new store.
            WalFailed: the disk failed.
        """
        disk = disk or RealDisk()
        root = path.rstrip("/")
        lock = _lock(disk, root, create=create)
        try:
            store = _read_format(disk, root)
            if store is None:
                store = _create(disk, root, segment_bytes)
        except OSError as bad:
            lock.close()
            raise _unusable(root, bad) from bad
        except BaseException:
            lock.close()
            raise
        return cls(Place(disk, root, store, segment_bytes), lock, has_threads=has_threads)

    def recover(self, on_progress: OnProgress | None = None) -> Recovery:
        """Read the newest snapshot and the log behind it and judge them; change nothing.

        Raises:
            Corrupt: damage that a power cut does not explain.
            WalFailed: the last segment or a directory cannot be synced.
        """
        try:
            return Recovery(self.place, on_progress or (lambda _done, _whole: None))
        except OSError as bad:
            raise WalFailed(f"{self.place.root} cannot be read and synced: {bad}") from bad

    def arm(self, recovery: Recovery, *, epoch: int, boot_id: str, at_ns: int) -> Wal:
        """Begin a reign: copy the good frames of the last segment into a new one of this epoch.

        Durable: every record up to `recovery.last_lsn`, whatever the disk had made of it before.

        Raises:
            DiskFull: there is neither room for a segment nor a spare; nothing was lost.
            WalFailed: the disk failed; end the process.
        """
        self.reign = Reign(epoch, boot_id, at_ns)
        self._make_snap_dir()
        found, segments, file = copy_forward(self.place, recovery, self.reign)
        recovery.report.warnings += found
        self.wal = Wal(self.place, self.reign, self._background, segments, file, recovery.kept)
        self.wal.prepare_spare()
        return self.wal

    def _make_snap_dir(self) -> None:
        """Make `snap/` where a copy of the store left it out, empty as it was."""
        place = self.place
        if "snap" in place.disk.names(place.root):
            return
        try:
            place.disk.make_dir(place.snap_dir, 0o700)
            place.disk.sync_dir(place.root)
        except OSError as bad:
            raise _unusable(place.root, bad) from bad

    def begin_snapshot(self, lsn: int, at_ns: int = 0) -> SnapshotWriter:
        """Begin a snapshot of the State at `lsn`, which must be durable."""
        return SnapshotWriter(self, lsn, at_ns)

    def assert_durable(self, lsn: int) -> None:
        """Fail where the log is not durable up to `lsn`."""
        assert self.wal, "snapshots are taken of an armed log"
        assert lsn <= self.wal.durable_lsn, f"LSN {lsn}, but durable is {self.wal.durable_lsn}"

    def keep_newest(self) -> int:
        """Remove all snapshots but the two newest; return the LSN of the older kept one, or 0.

        Crash: any of the removals may not have happened; the next snapshot repeats them.
        """
        place = self.place
        stand = snapshot.listed(place.disk, place.snap_dir)
        for old in stand[: -snapshot.KEPT]:
            place.disk.unlink(f"{place.snap_dir}/{snapshot.name_of(old)}")
        place.disk.sync_dir(place.snap_dir)
        return stand[-snapshot.KEPT] if len(stand) >= snapshot.KEPT else 0

    def retire(self, keep_lsn: int) -> None:
        """Remove the segments wholly at or below `keep_lsn`."""
        if self.wal:
            self.wal.retire(keep_lsn)

    def close(self) -> None:
        """Close the log and give up the lock."""
        if self.wal:
            self.wal.close()
        self._background.close()
        self._lock.close()


def encode_format(store: bytes) -> bytes:
    """Return the content of FORMAT; `crc32` is that of all bytes before `,"crc32"`.

    {"format":1,"min_reader":1,"store":"<32 hex digits>","crc32":"<8 hex digits>"}
    """
    fields = {"format": segment.FORMAT, "min_reader": segment.FORMAT, "store": store.hex()}
    body = json.dumps(fields, separators=(",", ":")).encode().removesuffix(b"}")
    return body + _FORMAT_CRC + f'{crc32(body):08x}"}}\n'.encode()


def _lock(disk: Disk, root: str, *, create: bool) -> File:
    try:
        if create:
            disk.make_dir(root, 0o711)
        elif "FORMAT" not in (names := disk.names(root)):
            if "wal" in names:
                raise Corrupt(f"{root} holds a log, but FORMAT is missing", LOOK)
            raise BadConfig(f"{root} is no state directory of ckptd: it has no FORMAT")
        return disk.lock(f"{root}/LOCK")
    except BlockingIOError as bad:
        pid = holder_of(root)
        holder = f"pid {pid}" if pid else "another process"
        raise Busy(
            f"{root} is in use: {holder} holds {root}/LOCK",
            "the daemon: `systemctl stop ckptd.socket ckptd`, your own: `ckptctl daemon shutdown`,"
            f" or where no daemon answers `kill {pid or 'PID'}` (tasks live on);"
            " else wait until it ends",
        ) from bad
    except OSError as bad:
        raise _unusable(root, bad) from bad


def holder_of(root: str) -> int:
    """Return the pid of the process that holds a store, as far as the kernel tells it, else 0.

    1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF
    """
    with contextlib.suppress(OSError, ValueError):
        inode = str(os.stat(f"{root}/LOCK").st_ino)
        with open("/proc/locks", encoding="ascii") as table:
            for line in table:
                words = line.split()
                if words[1] == "FLOCK" and words[5].rpartition(":")[2] == inode:
                    return max(0, int(words[4]))
    return 0


def _unusable(root: str, bad: OSError) -> CkptdError:
    """Return what keeps a store from being opened: a sick disk is no matter of configuration."""
    text = f"{root} cannot be used as state directory: {bad.strerror}"
    if bad.errno in NO_ROOM:
        return DiskFull(text)
    if bad.errno in _SICK:
        return WalFailed(text, "look at the disk; the next start replays what it really holds")
    return BadConfig(text)


def _read_format(disk: Disk, root: str) -> bytes | None:
    """Return the id of the store, or None where it has no FORMAT yet.

    Durable: the name of FORMAT.
    """
    names = disk.names(root)
    if "FORMAT" not in names:
        return None
    _need_log(root, names)
    disk.sync_dir(root)  # Crash: its maker may have died between the rename and this
    file = disk.open(f"{root}/FORMAT")
    try:
        data = file.read(_FORMAT_BYTES_MAX, 0)
    finally:
        file.close()
    try:
        body, _, crc = data.partition(_FORMAT_CRC)
        fields = json.loads(data) if crc == f'{crc32(body):08x}"}}\n'.encode() else {}
        store = bytes.fromhex(fields["store"])
        segment.check_version(int(fields["format"]), int(fields["min_reader"]), f"{root}/FORMAT")
    except (ValueError, KeyError, TypeError) as bad:
        raise Corrupt(f"{root}/FORMAT does not check: {data[:80]!r}", LOOK) from bad
    return store


def _need_log(root: str, names: list[str]) -> None:
    """Raise Corrupt where the log of a store is gone; another would forget all tasks."""
    if "wal" not in names:
        raise Corrupt(f"{root}/wal is missing, the log is gone", "look for it, or for a copy of it")


def _create(disk: Disk, root: str, segment_bytes: int) -> bytes:
    """Make a new store and return its id; take one up that was left half-made.

    Crash: without FORMAT the next start comes here again and finds an empty segment or none.
    Durable: directories, an empty segment, and FORMAT at last.
    """
    for name in ("wal", "snap", "quarantine"):
        disk.make_dir(f"{root}/{name}", 0o700)
    disk.sync_dir(root)
    store = _half_made(disk, root) or _first_segment(disk, root, segment_bytes)
    disk.sync_dir(f"{root}/wal")
    _write_format(disk, root, store)
    return store


def _write_format(disk: Disk, root: str, store: bytes) -> None:
    """Write FORMAT. Durable: its content and its name."""
    new = f"{root}/FORMAT.tmp"
    file = disk.create(new)
    try:
        file.write(encode_format(store), 0)
        file.sync()
    finally:
        file.close()
    disk.rename(new, f"{root}/FORMAT")
    disk.sync_dir(root)


def restore_format(disk: Disk, path: str) -> None:
    """Make FORMAT anew from the headers of the segments; the damaged one is kept beside it.

    Durable: the new FORMAT. Raises Corrupt where there is no log, or its headers do not agree.
    """
    root = path.rstrip("/")
    lock = _lock(disk, root, create=True)
    try:
        _need_log(root, names := disk.names(root))
        store = store_id_from_headers(Place(disk, root, b""))
        if "FORMAT" in names:
            disk.rename(f"{root}/FORMAT", f"{root}/quarantine/FORMAT.bad")
        _write_format(disk, root, store)
    finally:
        lock.close()


def _half_made(disk: Disk, root: str) -> bytes | None:
    """Return the store id of an empty first segment. Raises Corrupt where there is a log."""
    lost = Corrupt(f"{root} holds a log, but FORMAT is missing", LOOK)
    if snapshot.listed(disk, f"{root}/snap"):
        raise lost
    names, replaced = segment.newest_names(disk.names(f"{root}/wal"))
    if not names:
        return None
    data = segment.read_whole(disk, f"{root}/wal/{names[0]}")
    if (
        names != [Name(1, 0)]
        or replaced
        or frame.written_end(memoryview(data), BLOCK_BYTES) > (BLOCK_BYTES)
    ):
        raise lost
    with contextlib.suppress(CkptdError):
        return segment.decode_block(data, segment.WAL_MAGIC, data[16:32], str(names[0])).store
    raise lost


def _first_segment(disk: Disk, root: str, segment_bytes: int) -> bytes:
    """Make the empty segment that every store begins with; return the new store's id.

    Durable: the segment and its name.
    """
    store = disk.random_bytes(16)
    place = Place(disk, root, store, segment_bytes)
    segment.make_spare(disk, place.wal_dir, segment_bytes)
    name = Name(1, 0)
    block = new_block(place, Reign(0, "", 0), name, Link(1, 0), 0)
    file = disk.open(f"{place.wal_dir}/{segment.SPARE}", write=True)
    try:
        file.write(segment.encode_block(block), 0)
        file.sync()
    finally:
        file.close()
    disk.rename(f"{place.wal_dir}/{segment.SPARE}", f"{place.wal_dir}/{name}")
    disk.sync_dir(place.wal_dir)
    return store
