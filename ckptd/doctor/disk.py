"""The disk below the state directory: what kind, how fast, how full; and the log that is on it.

Here is the only check that writes: a small file for timing, which is removed again.
Read next: `log.py`, `ckptd/storage/disk.py`.
"""

import os
import statistics
from collections.abc import Iterator

import psutil

from ckptd.daemon.offline_wal import state_option
from ckptd.doctor.finding import Check, Finding, bad, ok, warn
from ckptd.doctor.place import Place
from ckptd.host import clock
from ckptd.runner import linux
from ckptd.storage.disk import RealDisk
from ckptd.storage.recovery import LOOK, RecoveryReport

SYNCS = 200
SYNC_BYTES = 200
SYNCS_NS_MAX = 3_000_000_000  # a slow disk is known after a few
SYNC_SLOW_US = 20_000  # fifty durable requests a second, one at a time
ROOM_MIN_BYTES = 64 << 20  # a few segments: below it the log may refuse new tasks at any time
ROOM_LOW_BYTES = 1 << 30
NETWORK_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "ceph"})
SYNC_NONE_US = 5  # no disk is that fast: the file system does nothing at a sync
VOLATILE_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})


def state(place: Place) -> Iterator[Finding]:
    """Look at the state directory and its file system."""
    path = place.paths.state
    there = _existing(path)
    kind = _file_system(there)
    if kind in NETWORK_FILE_SYSTEMS:
        advice = "set daemon.state_dir to a local disk: locks and syncs of this one promise less"
        yield bad("state directory", f"{path} is on {kind}", advice)
    elif kind in VOLATILE_FILE_SYSTEMS:
        text = f"{path} is on {kind}: nothing survives a reboot"
        yield warn("state directory", text, "set daemon.state_dir to a disk")
    elif kind == "overlay":
        text = f"{path} is on overlay: in a container it goes with the container"
        yield warn("state directory", text, "mount a volume there, or set daemon.state_dir to one")
    else:
        yield ok("state directory", f"{path} on {kind}")
    if not place.is_ours:
        yield ok("sync", f"not tried: the directory is {_whose(place)}")
    elif not os.access(there, os.W_OK | os.X_OK):
        advice = "set XDG_STATE_HOME or daemon.state_dir to a directory of yours"
        yield bad("state directory", f"{path} cannot be written", advice)


def _whose(place: Place) -> str:
    return "root's" if place.is_system else "another user's"


def room(place: Place) -> Iterator[Finding]:
    """Look how full it is."""
    usage = psutil.disk_usage(_existing(place.paths.state))
    text = f"{usage.free >> 20} MiB free of {usage.total >> 20}"
    if usage.free < ROOM_MIN_BYTES:
        advice = "free space: new tasks may be refused, and what runs may fail for it"
        yield bad("disk room", text, advice)
    elif usage.free < ROOM_LOW_BYTES:
        yield warn("disk room", text, "free space before checkpoints need it")
    else:
        yield ok("disk room", text)


def sync(place: Place) -> Iterator[Finding]:
    """Time what every acknowledged request waits for; look how records of ends are written."""
    there = _existing(place.paths.state)
    if not place.is_ours or not os.access(there, os.W_OK | os.X_OK):
        return
    try:
        taken_us, count, is_synchronous = _time_syncs(there)
    except OSError as wrong:
        advice = "free space, or look at the disk: dmesg"
        yield bad("sync", f"cannot write and sync in {there}: {wrong.strerror}", advice)
        return
    text = f"{taken_us:.0f} us in the middle of {count} fdatasyncs of {SYNC_BYTES} bytes"
    if taken_us > SYNC_SLOW_US:
        yield warn("sync", text, "every submit waits for one: a faster disk helps")
    elif taken_us < SYNC_NONE_US:
        yield warn("sync", f"{text}: it does nothing", "what is on disk after a power cut is luck")
    else:
        yield ok("sync", text)
    way = "by the write itself (chattr +S)" if is_synchronous else "by sync(1): one process more"
    yield ok("end records", f"durable {way}")


def _time_syncs(directory: str) -> tuple[float, int, bool]:
    """Return the median in microseconds of how many, and whether chattr +S is there."""
    disk, watch, taken_ns = RealDisk(), clock.Clock(), []
    path = os.path.join(directory, f".doctor.{os.getpid()}")
    file = disk.create(path)
    try:
        file.write(bytes(SYNCS * SYNC_BYTES), 0)  # what the log does, too: room ahead of need
        file.sync()
        began_ns = watch.mono_ns()
        for number in range(SYNCS):
            started_ns = watch.mono_ns()
            if started_ns - began_ns > SYNCS_NS_MAX:
                break
            file.write(b"x" * SYNC_BYTES, number * SYNC_BYTES)
            file.sync_data()
            taken_ns.append(watch.mono_ns() - started_ns)
        is_synchronous = _can_be_synchronous(path)
    finally:
        file.close()
        disk.unlink(path)
    return statistics.median(taken_ns) / 1_000, len(taken_ns), is_synchronous


def _can_be_synchronous(path: str) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return linux.make_synchronous(fd)
    finally:
        os.close(fd)


def lock(place: Place) -> Iterator[Finding]:
    """Look whether the store is held by the daemon that answers, and by nobody else."""
    path = os.path.join(place.paths.state, "LOCK")
    if not place.is_ours or not os.access(path, os.R_OK | os.W_OK):
        return
    try:
        RealDisk().lock(path).close()
    except BlockingIOError:
        if place.heard.pong is not None:
            yield ok("lock", "held by the daemon")
        else:
            yield _mute(place, path)
    except OSError as wrong:
        yield warn("lock", f"{path}: {wrong.strerror}", f"what is it? ls -l {path}")
    else:
        yield ok("lock", "free")


def _mute(place: Place, path: str) -> Finding:
    """Return what is to be done with a holder that nobody can ask: its socket may be gone."""
    pid = place.mute
    text = f"{path} is held{f' by pid {pid}' if pid else ''}, but no daemon answers"
    if place.is_of_unit and pid == place.pid:
        return warn("lock", text, f"{place.systemd.command} restart ckptd; tasks live on")
    look = f"ps -fp {pid}" if pid else f"fuser -v {path}"
    who = pid or "PID"
    ways = f"`kill -HUP {who}` makes its socket anew, else kill {who}, start it again"
    return warn("lock", text, f"who is it? {look}; a daemon: {ways}; tasks live on")


def log(place: Place) -> Iterator[Finding]:
    """Look whether a start would read the log, where no daemon has done so."""
    seen = place.log.seen if place.is_ours and place.heard.pong is None else None
    if seen is None:
        return
    verify = f"ckptctl wal verify{state_option(place.paths.state)}"
    if seen.report is not None:
        yield _read(seen.report, verify, is_replayed=seen.is_replayed)
    elif seen.refusal is not None:
        wrong = seen.refusal
        text = f"a start ends with exit {wrong.exit_code}: {wrong.message}"
        yield bad("log", text, wrong.hint if wrong.hint not in {"", LOOK} else verify)
    else:
        yield warn("log", f"not looked at: {seen.unread}", verify)


def _read(report: RecoveryReport, verify: str, *, is_replayed: bool) -> Finding:
    """Return what is to be said of a log that a start reads."""
    much = "" if is_replayed else "; checked, and too much to be replayed here"
    text = f"a start reads it, up to LSN {report.last_lsn} ({report.bytes_read >> 20} MiB{much})"
    wrong = report.warnings
    if report.torn_bytes:  # the last of them, and no damage
        text += f"; {report.torn_bytes} bytes behind it were never acknowledged, it cuts them off"
        wrong = wrong[:-1]
    return warn("log", f"{text}; {'; '.join(wrong)}", verify) if wrong else ok("log", text)


CHECKS: tuple[Check, ...] = (state, room, sync, lock, log)


def _existing(path: str) -> str:
    """Return the path or the nearest directory above it that exists. Bound: `/` does."""
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    return path


def _file_system(path: str) -> str:
    """Return the type of the file system that holds `path`."""
    real = os.path.realpath(path)
    mounts = [
        (len(part.mountpoint), part.fstype)
        for part in psutil.disk_partitions(all=True)
        if os.path.commonpath([real, part.mountpoint]) == part.mountpoint
    ]
    return max(mounts, default=(0, "unknown"))[1]
