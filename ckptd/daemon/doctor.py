"""`python -m ckptd.daemon.doctor`: is this machine fit for ckptd, and what to do where it is not.

Looks from outside, as the user who runs it, with or without a daemon; changes nothing but a
small file for timing that it removes again. Exit 1 where something is bad, else 0.
Read next: `guard.py` on descriptors, [systemd 2] in the design's research for the why.
"""

import argparse
import grp
import os
import platform
import resource
import signal
import socket
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version as version_of
from typing import Literal

import msgspec
import psutil
import zmq

from ckptd.daemon import clock, config, paths
from ckptd.daemon.guard import DESCRIPTORS_MIN
from ckptd.protocol import codec
from ckptd.protocol.errors import CkptdError
from ckptd.protocol.messages import DaemonStatus, Empty
from ckptd.protocol.version import VERSION
from ckptd.runner import cgroup
from ckptd.storage.disk import RealDisk

SYNCS = 200
SYNC_BYTES = 200
SYNC_SLOW_US = 20_000  # fifty durable requests a second, one at a time
ANSWER_MS = 3_000
ROOM_MIN_BYTES = 64 << 20  # a few segments: below it the log may refuse new tasks at any time
ROOM_LOW_BYTES = 1 << 30
CLOCK_MIN_NS = 1_735_689_600 * 10**9  # 2025: before it, the clock was never set
NETWORK_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "ceph"})
VOLATILE_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})


class Finding(msgspec.Struct, frozen=True):
    """One line: what was looked at, how it is, and what to do."""

    name: str
    level: Literal["ok", "warn", "bad"]
    text: str
    advice: str = ""


class Report(msgspec.Struct, frozen=True):
    """All findings, as `--json` prints them."""

    schema: str
    fit: bool
    findings: tuple[Finding, ...]


class Place(msgspec.Struct, frozen=True):
    """What to look at: the configuration in force here and its directories."""

    config: config.Config
    paths: paths.Paths
    daemon: DaemonStatus | None


def examine(config_path: str | None, endpoint: str = "") -> Iterator[Finding]:
    """Yield every finding. Bound: none takes longer than a few seconds."""
    yield _versions()
    try:
        loaded = config.load(config_path)
        where = config.find(config_path) or "defaults, no file"
        yield Finding("configuration", "ok", where)
    except CkptdError as bad:
        yield Finding("configuration", "bad", bad.message, bad.hint)
        loaded = config.Config()
    at = paths.resolve(
        os.geteuid(),
        os.environ,
        state_dir=loaded.daemon.state_dir,
        run_dir=loaded.daemon.run_dir,
    )
    if endpoint:
        at = msgspec.structs.replace(at, socket=os.path.abspath(endpoint.removeprefix("ipc://")))
    found = _ask_daemon(at.socket)
    if endpoint and found is not None:
        at = msgspec.structs.replace(at, state=found.state_dir)
    place = Place(loaded, at, found)
    for check in CHECKS:
        yield check(place)


def _versions() -> Finding:
    parts = [
        f"ckptd {VERSION}",
        f"Python {platform.python_version()}",
        f"pyzmq {zmq.pyzmq_version()} (libzmq {zmq.zmq_version()})",
        f"msgspec {version_of('msgspec')}",
        f"Linux {platform.release()}",
    ]
    return Finding("versions", "ok", ", ".join(parts))


def _ask_daemon(path: str) -> DaemonStatus | None:
    if not os.path.exists(path) or _is_left_over(path):
        return None
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.linger = 0
        client.connect(f"ipc://{path}")
        client.send(codec.encode_request("doctor", "daemon", Empty()))
        if not client.poll(ANSWER_MS):
            return None
        try:
            return codec.decode_result(codec.decode_reply(client.recv()), DaemonStatus)
        except CkptdError:
            return None


def _is_left_over(path: str) -> bool:
    """Tell whether a daemon that ended left the socket: nobody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _socket(place: Place) -> Finding:
    path = place.paths.socket
    if place.daemon is not None:
        text = f"daemon {place.daemon.version} (pid {place.daemon.pid}) answers at {path}"
        return Finding("socket", "ok", text)
    if not os.path.exists(path):
        return Finding("socket", "warn", f"no daemon: nothing at {path}", "start ckptd")
    if not os.access(path, os.W_OK):
        advice = f"join the group {place.config.ipc.group!r}, then log in anew"
        return Finding("socket", "bad", f"you may not use {path}", advice)
    if _is_left_over(path):
        text = f"no daemon: {path} is left over from one that ended"
        return Finding("socket", "warn", text, "start ckptd, it clears it away")
    text = f"{path} is there, but nobody answers within {ANSWER_MS // 1000} s"
    return Finding("socket", "bad", text, "see the journal: journalctl -u ckptd")


def _health(place: Place) -> Finding:
    if place.daemon is None:
        return Finding("health", "ok", "no daemon to ask")
    level: Literal["ok", "bad"] = "ok" if place.daemon.health == "ok" else "bad"
    return Finding("health", level, place.daemon.health)


def _group(place: Place) -> Finding:
    name = place.config.ipc.group
    if os.geteuid() != 0 or not name:
        return Finding("group", "ok", "only this user and root may connect")
    try:
        members = grp.getgrnam(name).gr_mem
    except KeyError:
        text = f"there is no group {name!r}: only root may connect"
        return Finding("group", "warn", text, f"groupadd --system {name}")
    return Finding("group", "ok", f"{name}: {', '.join(members) or 'no members'}")


def _cgroup(place: Place) -> Finding:
    found = place.daemon.cgroup if place.daemon is not None else _groups_here()
    if found and found != "none":
        return Finding("cgroup", "ok", found)
    text = "none is writable: tasks are ended by process group, without memory limits"
    return Finding("cgroup", "warn", text, "under systemd set Delegate=yes")


def _groups_here() -> str:
    """Return what a daemon started here would get; leaves nothing behind."""
    roots = cgroup.discover("ckptd-doctor")
    for path in (roots.unified, roots.memory, roots.freezer):
        if path:
            os.rmdir(path)
    return str(roots)


def _descriptors(_: Place) -> Finding:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard >= DESCRIPTORS_MIN:
        return Finding("open files", "ok", f"limit {hard}")
    text = f"limit {hard} is too low to stand a flood of connections"
    return Finding("open files", "warn", text, f"set LimitNOFILE={DESCRIPTORS_MIN} or more")


def _state(place: Place) -> Finding:
    path = place.paths.state
    there = _existing(path)
    if not os.access(there, os.W_OK | os.X_OK):
        advice = "root's daemon: run this as root; yours: set XDG_STATE_HOME or daemon.state_dir"
        return Finding("state directory", "bad", f"{path} cannot be written", advice)
    kind = _file_system(there)
    if kind in NETWORK_FILE_SYSTEMS:
        advice = "use a local disk: locks and syncs of this one promise less"
        return Finding("state directory", "bad", f"{path} is on {kind}", advice)
    if kind in VOLATILE_FILE_SYSTEMS:
        text = f"{path} is on {kind}: nothing survives a reboot"
        return Finding("state directory", "warn", text, "set daemon.state_dir to a disk")
    return Finding("state directory", "ok", f"{path} on {kind}")


def _room(place: Place) -> Finding:
    usage = psutil.disk_usage(_existing(place.paths.state))
    text = f"{usage.free >> 20} MiB free of {usage.total >> 20}"
    if usage.free < ROOM_MIN_BYTES:
        advice = "free space: new tasks may be refused, running ones go on"
        return Finding("disk room", "bad", text, advice)
    if usage.free < ROOM_LOW_BYTES:
        return Finding("disk room", "warn", text, "free space before checkpoints need it")
    return Finding("disk room", "ok", text)


def _sync(place: Place) -> Finding:
    there = _existing(place.paths.state)
    try:
        taken_us = _time_syncs(there)
    except OSError as bad:
        return Finding("sync", "bad", f"cannot write and sync in {there}: {bad.strerror}")
    text = f"{taken_us:.0f} us in the middle of {SYNCS} fdatasyncs of {SYNC_BYTES} bytes"
    if taken_us > SYNC_SLOW_US:
        return Finding("sync", "warn", text, "every submit waits for one: a faster disk helps")
    return Finding("sync", "ok", text)


def _time_syncs(directory: str) -> float:
    """Return the median in microseconds, on a file that is removed again."""
    disk, watch, taken_ns = RealDisk(), clock.Clock(), []
    path = os.path.join(directory, f".doctor.{os.getpid()}")
    file = disk.create(path)
    try:
        file.write(bytes(SYNCS * SYNC_BYTES), 0)  # what the log does, too: room ahead of need
        file.sync()
        for number in range(SYNCS):
            started_ns = watch.mono_ns()
            file.write(b"x" * SYNC_BYTES, number * SYNC_BYTES)
            file.sync_data()
            taken_ns.append(watch.mono_ns() - started_ns)
    finally:
        file.close()
        disk.unlink(path)
    return statistics.median(taken_ns) / 1_000


def _lock(place: Place) -> Finding:
    path = os.path.join(place.paths.state, "LOCK")
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding("lock", "ok", "no store yet, or not ours to look at")
    try:
        RealDisk().lock(path).close()
    except BlockingIOError:
        if place.daemon is not None:
            return Finding("lock", "ok", "held by the daemon")
        text = f"{path} is held, but no daemon answers"
        return Finding("lock", "warn", text, f"who is it? fuser {path}")
    return Finding("lock", "ok", "free")


def _clock(_: Place) -> Finding:
    if clock.Clock().now().at_ns < CLOCK_MIN_NS:
        advice = "set it: due times and retention go by it"
        return Finding("clock", "bad", "the wall clock was never set", advice)
    return Finding("clock", "ok", f"set; boot {clock.boot_id()}")


def _linger(_: Place) -> Finding:
    """A user's processes end at logout unless that user lingers."""
    uid = os.geteuid()
    if uid == 0 or not os.path.isdir("/run/systemd/system"):
        return Finding("logout", "ok", "does not end tasks")
    name = psutil.Process().username()
    if os.path.exists(f"/var/lib/systemd/linger/{name}"):
        return Finding("logout", "ok", f"{name} lingers: tasks outlive the session")
    text = "may end daemon and tasks; they resume at the next start"
    return Finding("logout", "warn", text, "loginctl enable-linger")


CHECKS: tuple[Callable[[Place], Finding], ...] = (
    _socket,
    _health,
    _group,
    _cgroup,
    _descriptors,
    _state,
    _room,
    _sync,
    _lock,
    _clock,
    _linger,
)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; 1 where something is bad."""
    parser = argparse.ArgumentParser("doctor", description="Is this machine fit for ckptd?")
    parser.add_argument("--config", metavar="FILE", help="the daemon's configuration")
    parser.add_argument("--endpoint", metavar="PATH", default="", help="the daemon's socket")
    parser.add_argument("-o", choices=["table", "json"], default="table", dest="form")
    parser.add_argument("--json", action="store_const", const="json", dest="form")
    asked = parser.parse_args(argv)
    findings = []
    for finding in examine(asked.config, asked.endpoint):
        findings.append(finding)
        if asked.form == "table":
            print(f"{finding.level:<5}{finding.name:<16} {finding.text}")
            if finding.advice:
                print(f"{'':<21} -> {finding.advice}")
    fit = all(finding.level != "bad" for finding in findings)
    if asked.form == "json":
        report = Report("ckptd.doctor/1", fit, tuple(findings))
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    return 0 if fit else 1


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has seen enough is no error
    sys.exit(main())
