"""The copy forward: how a reign takes over a log that was read and judged.

The good frames of the last segment go, byte for byte, into a new segment of the same first LSN
and a higher epoch; the old file is never written again. So what is acted upon has been synced by
the one who acts, a torn tail is never overwritten, and stale bytes never lie behind new frames.
Trailing markers are left out: `synced_lsn` in the new header promises what they did.
Read next: `wal.py`.
"""

from collections.abc import Callable
from functools import partial

from ckptd.protocol.errors import DiskFull
from ckptd.storage import segment
from ckptd.storage.disk import File
from ckptd.storage.recovery import Recovery
from ckptd.storage.segment import BLOCK_BYTES, TAIL_BYTES, Name, Place, Segment
from ckptd.storage.wal import NO_ROOM, Reign, WalFailed

TORN_KEPT = 8  # cut-off tails kept for inspection, the newest


def copy_forward(
    place: Place, recovery: Recovery, reign: Reign
) -> tuple[list[str], list[Segment], File]:
    """Return (warnings, the segments of the log, the last of them open for writing).

    Durable: every record up to `recovery.last_lsn`. Raises DiskFull, WalFailed.
    """
    assert reign.epoch > recovery.epoch, f"epoch {reign.epoch} after {recovery.epoch}"
    old = recovery.segments[-1]
    name = Name(old.name.first_lsn, reign.epoch)
    try:
        file = _make(place, recovery, name, reign)
    except OSError as bad:
        if bad.errno in NO_ROOM:
            raise DiskFull(
                f"no room for the {place.segment_bytes} bytes of a new segment in "
                f"{place.wal_dir}; the log is whole up to LSN {recovery.last_lsn}",
                "free space on that file system and start again",
            ) from bad
        raise WalFailed(f"the log cannot be made writable: {bad.strerror}") from bad
    warnings = _put_away(place, recovery, old.name, reign.epoch)
    current = Segment(name, old.prev_first, recovery.tail.keep_end, old.index)
    return warnings, [*recovery.segments[:-1], current], file


def _make(place: Place, recovery: Recovery, name: Name, reign: Reign) -> File:
    """Make the first segment of this reign.

    Crash: before the rename there is the old segment, after it both, and the higher epoch
    counts: it holds the same records.
    Durable: the new segment, its frames and its name.
    """
    disk, tail = place.disk, recovery.tail
    spare = f"{place.wal_dir}/{segment.SPARE}"
    size = place.segment_bytes
    if tail.keep_end + TAIL_BYTES > size:
        size = tail.block.file_bytes  # it was made under a greater setting
    file = segment.claim_spare(disk, place.wal_dir, size)
    if not file:
        segment.make_spare(disk, place.wal_dir, size)
        file = disk.open(spare, write=True)
    block = tail.block._replace(
        format=segment.FORMAT,
        min_reader=segment.FORMAT,
        synced_lsn=recovery.last_lsn,
        at_ns=reign.at_ns,
        file_bytes=size,
        epoch=reign.epoch,
        boot_id=reign.boot_id.encode()[:40],
    )
    try:
        file.write(recovery.last_frames(), BLOCK_BYTES)
        file.write(segment.encode_block(block), 0)
        file.sync()  # Crash: frames in a spare; the next claim makes it zero again
        disk.rename(spare, f"{place.wal_dir}/{name}")
        disk.sync_dir(place.wal_dir)
    except OSError:
        file.close()
        raise
    return file


def _put_away(place: Place, recovery: Recovery, old: Name, epoch: int) -> list[str]:
    """Clear what the new segment replaces; keep a torn original. Return what went wrong.

    Crash: whatever is left over has a lower epoch and is put away by the next reign.
    """
    replaced = [str(name) for name in recovery.replaced]
    jobs: list[Callable[[], None]] = []
    if recovery.tail.torn_bytes:
        replaced.append(str(old))
    else:
        jobs.append(partial(place.disk.unlink, f"{place.wal_dir}/{old}"))
    aside = [(f"{place.wal_dir}/{name}", f"{name}.torn-{epoch:010d}") for name in replaced]
    aside += [
        (f"{place.snap_dir}/{name}", f"{name}.bad-{epoch:010d}") for name in recovery.bad_snapshots
    ]
    for path, name in aside:
        jobs.append(partial(place.disk.rename, path, f"{place.quarantine_dir}/{name}"))
    jobs.append(partial(_sweep, place))
    warnings = []
    for job in jobs:
        try:
            job()
        except OSError as bad:  # the log does not depend on it
            warnings.append(f"clearing up after recovery: {bad}")
    return warnings


def _sweep(place: Place) -> None:
    """Remove half-made files, and all but the newest cut-off tails."""
    disk = place.disk
    for name in disk.names(place.wal_dir):
        if name == segment.SPARE_UNFINISHED:
            disk.unlink(f"{place.wal_dir}/{name}")
    for name in disk.names(place.snap_dir):
        if name.endswith(".tmp"):
            disk.unlink(f"{place.snap_dir}/{name}")
    torn = [name for name in disk.names(place.quarantine_dir) if ".wal.torn-" in name]
    for name in sorted(torn, key=lambda text: text[-10:])[:-TORN_KEPT]:
        disk.unlink(f"{place.quarantine_dir}/{name}")
