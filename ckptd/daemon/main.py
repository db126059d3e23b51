"""`ckptd`: start, recover, adopt, serve, stop. The only place where the parts are constructed.

In order: configuration, store and its lock, replay, the log in append mode, the runner and what
it adopts, the socket, the loop, in which READY is said. Read next: `loop.py`.
"""

import argparse
import contextlib
import ctypes
import errno
import faulthandler
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, NoReturn

import msgspec

from ckptd import streams
from ckptd.core.plan import Adopt, adoption
from ckptd.core.port import Runner
from ckptd.core.records import AnyRecord, DaemonStarted
from ckptd.core.state import State
from ckptd.daemon.echo import Echo
from ckptd.daemon.ending import Ending
from ckptd.daemon.engine import Engine
from ckptd.daemon.files import Files
from ckptd.daemon.housekeeping import Housekeeping, Life
from ckptd.daemon.inhibitor import Inhibitor
from ckptd.daemon.loop import Loop
from ckptd.daemon.policy import group_changes, policy_of
from ckptd.daemon.readiness import Progress, Readiness
from ckptd.daemon.recovery import replay
from ckptd.daemon.requests import Requests
from ckptd.daemon.runners import choose
from ckptd.daemon.snapshots import Snapshots
from ckptd.daemon.story import Story
from ckptd.daemon.sweep import set_aside
from ckptd.door.access import Roles
from ckptd.door.listen import Listening, listen, take_descriptors
from ckptd.door.server import Server
from ckptd.host import clock as clocks
from ckptd.host import config as cfg
from ckptd.host import paths as locations
from ckptd.host.journal import (
    CRITICAL,
    ERROR,
    INFO,
    JOURNAL_SOCKET,
    LEVELS,
    WARNING,
    Journal,
    JournaldSink,
    Kind,
    open_journal,
)
from ckptd.host.notify import Notify
from ckptd.host.wake import Wake
from ckptd.protocol.errors import BadConfig, Busy, CkptdError, Corrupt, DiskFull, Internal
from ckptd.protocol.version import VERSION
from ckptd.runner.original import living
from ckptd.storage.disk import RealDisk
from ckptd.storage.frame import Frame
from ckptd.storage.recovery import Recovery
from ckptd.storage.store import Store
from ckptd.storage.wal import NO_ROOM, WalFailed
from ckptd.units.original import living_unit

_NO_PLACE: Final = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ELOOP,
     errno.ENAMETOOLONG)
)  # fmt: skip
"""What no later start finds otherwise, unless a person mends it."""


@dataclass
class Base:
    """What everything in one daemon shares."""

    config: cfg.Config
    config_path: str | None
    paths: locations.Paths
    journal: Journal
    notify: Notify
    clock: clocks.Clock
    boot_id: str
    progress: Progress
    pid: int


@dataclass
class Recovered:
    """What a start makes of the log."""

    engine: Engine
    snapshot_lsn: int
    tail_bytes: int  # of the log behind that snapshot
    report: dict[str, Any]


@dataclass
class Edges:
    """Where one daemon meets the world: its disk, its tasks, its clients, its signals."""

    store: Store
    runner: Runner
    server: Server
    wake: Wake
    ending: Ending
    inhibitor: Inhibitor


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon; returns its exit code: 0, or that of the error that ended it."""
    # Where stderr is closed, the log would get its number, and our lines.
    return streams.run(lambda: _main(sys.argv[1:] if argv is None else argv), "ckptd")


def _main(argv: Sequence[str]) -> int:
    asked = argument_parser().parse_args(argv)
    faulthandler.enable(all_threads=True)
    if sys.flags.optimize:
        print("ckptd: does not run under -O: its assertions guard your data", file=sys.stderr)
        return 64
    journal = open_journal(os.environ)
    notify = Notify(os.environ, clocks.Clock())
    try:
        _serve(_base(asked.config, journal, notify))
    except CkptdError as failed:
        _say_failed(journal, notify, failed)
        if isinstance(failed, Internal):
            os._exit(failed.exit_code)  # a disk that failed a sync: touch nothing any more
        return failed.exit_code
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with 64 (EX_USAGE): argparse's 2 would say "try again"."""
        self.print_usage(sys.stderr)
        self.exit(64, f"{self.prog}: {message}\n")


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; ckptd(8) is made from it, too."""
    parser = _Parser("ckptd", description="The task daemon. Runs in foreground.")
    parser.add_argument("--config", metavar="FILE", help="configuration (TOML)")
    parser.add_argument("--version", action="version", version=f"ckptd {VERSION}")
    return parser


def _base(config_path: str | None, journal: Journal, notify: Notify) -> Base:
    config = cfg.load(config_path)
    journal.level = LEVELS[config.daemon.log_level]
    paths = locations.resolve(
        os.geteuid(), os.environ, state_dir=config.daemon.state_dir, run_dir=config.daemon.run_dir
    )
    locations.check_run(paths.run)
    clock = clocks.Clock()
    progress = Progress(notify, clock)
    boot_id, pid = clocks.boot_id(), os.getpid()
    return Base(config, config_path, paths, journal, notify, clock, boot_id, progress, pid)


def _say_failed(journal: Journal, notify: Notify, failed: CkptdError) -> None:
    text = f"{failed.message}" + (f"\n  {failed.hint}" if failed.hint else "")
    kind, priority = Kind.DAEMON_FAILED, ERROR
    if isinstance(failed, WalFailed):
        kind, priority = Kind.SYNC_FAILED, CRITICAL
    elif isinstance(failed, Corrupt):
        kind, priority = Kind.LOG_DAMAGED, CRITICAL
    elif isinstance(failed, BadConfig):
        kind = Kind.CONFIG_REFUSED
    cause = failed.__cause__
    errno = cause.errno if isinstance(cause, OSError) and cause.errno else ""
    journal.event(kind, text, priority, code=failed.code, errno=errno)
    notify.failed(failed.message)


def _serve(base: Base) -> None:
    started_mono_ns = base.clock.mono_ns()
    handed = take_descriptors(os.environ)  # first of all: no child may take them for its own
    where = f"state in {base.paths.state}, configuration {cfg.find(base.config_path) or 'built in'}"
    text = f"ckptd {VERSION} starts as uid {os.geteuid()}: {where}"
    base.journal.event(Kind.DAEMON_STARTING, text, INFO)
    make_run(base.paths.run)
    segment_bytes = base.config.wal.segment_bytes
    store = Store.open(base.paths.state, RealDisk(), segment_bytes=segment_bytes)
    gc.disable()  # a replay makes much and drops nothing; `_settle` turns it on again
    recovered = recover(base, store, partial(check_is_alone, base))
    _settle()
    ending = Ending(recovered.engine, base.notify, base.journal, base.paths.run)
    runner, inhibitor = _runner(base, ending)
    wake = Wake()
    wake.install()
    adopted = adopt(base, recovered.engine, runner)
    listening = listen(base.paths.socket, base.config.ipc, handed, base.journal)
    server = Server(listening, base.config.ipc, base.journal)
    _leave_with_manager(listening, base.notify)
    edges = Edges(store, runner, server, wake, ending, inhibitor)
    loop, requests = build(base, edges, recovered, adopted, started_mono_ns)
    loop.run()
    close(base, recovered.engine, edges, requests)


def make_run(path: str) -> None:
    """Make the runtime directory.

    Raises:
        BadConfig: it cannot be, or nothing be made in it, and the daemon stays down.
        DiskFull, Internal: the next start may do it.
    """
    try:
        locations.make_run(path)
    except OSError as bad:
        if bad.errno in NO_ROOM:
            raise DiskFull(f"cannot make {path}: {bad.strerror}") from bad
        if bad.errno in _NO_PLACE:
            raise _no_run(path, str(bad.strerror)) from bad
        raise Internal(f"cannot make {path}: {bad.strerror}") from bad  # another start may do it
    if not os.access(path, os.W_OK | os.X_OK):
        raise _no_run(path, "it may not be written to")


def _no_run(path: str, why: str) -> BadConfig:
    return BadConfig(
        f"{path} cannot be used as runtime directory: {why}",
        "make it for the user of the daemon, or choose another daemon.run_dir",
    )


class Adopted(NamedTuple):
    """What the runner finds out about, and how far the clocks were apart when it was told."""

    orders: list[Adopt]
    apart_ns: int


def adopt(base: Base, engine: Engine, runner: Runner) -> Adopted:
    """Have the runner find out about every attempt that an earlier daemon may have started."""
    now, mono_ns = base.clock.now(), base.clock.mono_ns()
    orders = adoption(engine.state, engine.observed, now)
    for order in orders:
        runner.adopt(order.task, order.attempt)
    return Adopted(orders, now.at_ns - mono_ns)


def build(
    base: Base, edges: Edges, recovered: Recovered, adopted: Adopted, started_mono_ns: int
) -> tuple[Loop, Requests]:
    """Put the parts of one daemon together; it only has to run."""
    engine, runner, server, wake = recovered.engine, edges.runner, edges.server, edges.wake
    snapshots = Snapshots(
        engine, edges.store, base.journal, recovered.snapshot_lsn, recovered.tail_bytes
    )
    life = Life(
        base.pid,
        os.geteuid(),
        base.boot_id,
        base.clock.now().at_ns,
        started_mono_ns,
        adopted.apart_ns,
        base.paths.state,
        base.paths.socket,
        base.config_path,
        recovered.report,
    )
    house = Housekeeping(
        engine,
        runner,
        snapshots,
        base.notify,
        base.journal,
        base.clock,
        wake,
        base.config,
        life,
        edges.ending,
        Readiness(runner, base.progress, [(one.task, one.attempt) for one in adopted.orders]),
    )
    roles = Roles(os.geteuid(), server.access)
    requests = Requests(engine, house, Files(base.paths.state), base.journal, roles)
    house.tell_missing_groups()
    requests.on_late = wake.up
    house.requests, house.server, house.inhibitor = requests, server, edges.inhibitor
    story = Story(base.journal, _echo(base, engine, house))
    house.on_ready = lambda: story.adopted(engine.state, life.started_ns)
    return Loop(engine, server, requests, runner, house, story, base.clock, wake), requests


def _runner(base: Base, ending: Ending) -> tuple[Runner, Inhibitor]:
    """Return what runs the tasks, and what hears of the machine's shutdown through it."""
    ending.forget()
    inhibitor = Inhibitor(ending)
    wanted = base.config.daemon.runner
    runner, units = choose(wanted, base.paths, base.boot_id, inhibitor.announced)
    if units is not None and os.geteuid() == 0:
        inhibitor.inhibit = units.inhibit
    return runner, inhibitor


def _echo(base: Base, engine: Engine, house: Housekeeping) -> Echo:
    """Return what tells the output of tasks, as it was told by the daemon before."""
    echo = Echo(
        base.paths.state,
        base.paths.run,
        JournaldSink(JOURNAL_SOCKET),
        base.journal,
        base.clock,
        lambda: house.config.task.journal_lines_per_s,
    )
    echo.resume(engine.state)
    house.echo = echo
    return echo


def check_is_alone(base: Base, state: State) -> None:
    """Refuse to start on a copy of a store whose attempts still run here.

    Raises:
        Busy: they do; the next start may find them over.
    """
    tasks = [task for number in state.active if (task := state.tasks.get(number))]
    runs = [(task.id, task.run) for task in tasks if task.run is not None]
    started = {(task, run.attempt): (run.shim, run.pid) for task, run in runs if run.shim}
    found = living(base.paths.state, base.boot_id, started) or living_unit(
        base.paths.state, base.boot_id
    )
    if found is not None:
        raise Busy(
            f"{base.paths.state} is a copy of a store whose tasks still run on this machine: task"
            f" {found.task}, attempt {found.attempt} is pid {found.pid}; nothing was changed",
            "let them end, or cancel them with the original's daemon, then start this one; or start"
            " it on another machine; see docs/HOWTO.md",
        )


def recover(
    base: Base, store: Store, check: Callable[[State], None] = lambda _state: None
) -> Recovered:
    """Replay the log, open it for appending, and make the new reign durable.

    `check` sees the State before anything is changed, and may refuse the start.
    """
    journal = base.journal

    def progress(done: int, whole: int) -> None:
        base.progress.tell(f"reading the log: {100 * done // max(1, whole)} %")

    found = store.recover(progress)
    replayed = replay(found.chunks(), _frames(base, found))
    state = replayed.state
    check(state)
    for warning in found.report.warnings:
        journal.event(Kind.LOG_DAMAGED, warning, WARNING)
    if replayed.lost:
        text = f"{replayed.lost} records of the log are lost to a salvage, {replayed.passed_over}"
        text += f" behind them passed over; {len(replayed.doubtful)} tasks in doubt are held"
        aside = set_aside(state, base.paths.state, store.place.disk)
        text += f", {aside} files of tasks that are lost are in quarantine/" if aside else ""
        journal.event(Kind.LOG_DAMAGED, text, CRITICAL)
    epoch = max(found.epoch, state.epoch) + 1
    at_ns = base.clock.now().at_ns
    wal = store.arm(found, epoch=epoch, boot_id=base.boot_id, at_ns=at_ns)
    engine = Engine(state, wal, policy_of(base.config))
    begin: list[AnyRecord] = [
        DaemonStarted(at_ns, epoch, base.boot_id, VERSION, base.pid, state.stopped)
    ]
    begin += group_changes(base.config, state)
    begin += replayed.holds(at_ns)
    engine.stage(begin)
    engine.commit()
    wal.prepare_spare()
    report: dict[str, Any] = msgspec.to_builtins(found.report)
    journal.event(
        Kind.RECOVERY_DONE,
        f"replayed to LSN {state.lsn}: {len(state.tasks)} tasks, {len(state.active)} to adopt",
        INFO,
        lsn=state.lsn,
    )
    return Recovered(engine, found.snapshot_lsn, replayed.tail_bytes, report)


def _settle() -> None:
    """Keep the collector out of what lives long, and give the memory of the replay back."""
    gc.enable()
    gc.collect()
    gc.freeze()
    with contextlib.suppress(AttributeError, OSError):  # a libc without malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def _frames(base: Base, found: Recovery) -> Iterator[Frame]:
    """Yield the frames to replay; each of them is a sign of progress."""
    for frame in found.frames():
        base.progress.tell(f"replaying: at LSN {frame.first_lsn} of {found.last_lsn}")
        yield frame


def _leave_with_manager(listening: Listening, notify: Notify) -> None:
    """Have our own socket kept, so that no request is lost while no daemon runs."""
    if listening.is_ours and not listening.is_kept:
        listening.is_kept = notify.keep(listening.name, listening.fileno())
    for name in listening.stale:
        notify.drop(name)


def close(base: Base, engine: Engine, edges: Edges, requests: Requests) -> None:
    """End in order; tasks live on."""
    edges.server.close()
    requests.close()
    edges.runner.close()
    engine.wal.mark_idle(closed=True)
    engine.wal.close()
    edges.store.close()
    left = len(engine.state.active)
    text = f"stopped in order; {left} running tasks live on" if left else "stopped in order"
    base.journal.event(Kind.DAEMON_STOPPED, text, INFO)


if __name__ == "__main__":
    raise SystemExit(main())
