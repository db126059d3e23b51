"""The log: would a daemon that starts now read it, and what would keep it from that.

What a start reads is read, by the very code of a start: no more, and nothing is changed. A daemon
that runs has read it already, so the log is looked at only where the store's lock is free.
Read next: `ckptd/storage/recovery.py`, `ckptd/daemon/offline_wal.py` (which reads all of it).
"""

import os
from bisect import bisect_right
from functools import cached_property
from typing import NamedTuple

from ckptd.daemon.recovery import replay
from ckptd.protocol.errors import Busy, CkptdError
from ckptd.storage import segment, snapshot
from ckptd.storage.disk import ReadOnlyDisk
from ckptd.storage.recovery import RecoveryReport
from ckptd.storage.segment import Place
from ckptd.storage.store import Store
from ckptd.storage.wal import WalFailed

READ_BYTES_MAX = 512 << 20  # a second or two of checking, where the disk gives it
REPLAY_BYTES_MAX = 128 << 20  # some seconds; by default a snapshot is due every 64 MiB


class Seen(NamedTuple):
    """What was found: a report, a refusal, or why nothing was looked at."""

    report: RecoveryReport | None = None  # a start works
    is_replayed: bool = False
    refusal: CkptdError | None = None  # a start ends with this
    unread: str = ""  # why it was not looked at


class Log:
    """The log of one state directory, read when it is first asked for."""

    def __init__(self, state: str) -> None:
        self._state = state

    @cached_property
    def seen(self) -> Seen | None:
        """Return what was found; None where there is no log yet, or somebody holds it.

        Bound: READ_BYTES_MAX. A daemon that starts in that time finds the store locked.
        """
        try:
            names = os.listdir(self._state)
        except OSError:
            return None
        if not {"FORMAT", "wal"} & {*names}:
            return None
        if "LOCK" not in names:
            return Seen(unread="nothing can be locked: LOCK is missing, the next start makes it")
        try:
            opened = Store.open(self._state, ReadOnlyDisk(), create=False, has_threads=False)
        except Busy:
            return None
        except CkptdError as refused:
            return Seen(refusal=refused)
        try:
            return _seen(opened)
        finally:
            opened.close()

    @property
    def is_refused(self) -> bool:
        """Tell whether a start would end because of it."""
        return self.seen is not None and self.seen.refusal is not None


def _seen(opened: Store) -> Seen:
    """Do what a start does, up to the State, which is dropped; of much, only check the bytes."""
    try:
        wanted = _bytes_of_a_start(opened.place)
        if wanted > READ_BYTES_MAX:
            return Seen(unread=f"a start reads {wanted >> 20} MiB of it")
        found = opened.recover()
        is_replayed = wanted <= REPLAY_BYTES_MAX
        if is_replayed:
            replay(found.chunks(), found.frames())
    except CkptdError as refused:
        return Seen(refusal=refused)
    except OSError as bad:
        return Seen(refusal=WalFailed(f"it cannot be read: {bad}", "look at the disk: dmesg"))
    return Seen(found.report, is_replayed)


def _bytes_of_a_start(place: Place) -> int:
    """Return the size of the newest snapshot and of the segments from where it ends."""
    disk = place.disk
    lsn = max(snapshot.listed(disk, place.snap_dir), default=0)
    names, _ = segment.newest_names(disk.names(place.wal_dir))
    begin = bisect_right(names, lsn + 1, key=lambda name: name.first_lsn)
    paths = [f"{place.wal_dir}/{name}" for name in names[max(0, begin - 1) :]]
    if lsn:
        paths.append(f"{place.snap_dir}/{snapshot.name_of(lsn)}")
    return sum(os.stat(path).st_size for path in paths)
