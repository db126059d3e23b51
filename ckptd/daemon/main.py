"""`ckptd`: start, recover, adopt, serve, stop. The only place where the parts are constructed.

In order: configuration, store and its lock, replay, the log in append mode, the runner and what
it adopts, the socket, READY, the loop. Read next: `loop.py`.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec

from ckptd.core.plan import adoption
from ckptd.core.port import Runner
from ckptd.core.records import AnyRecord, DaemonStarted
from ckptd.daemon import clock as clocks
from ckptd.daemon import config as cfg
from ckptd.daemon import paths as locations
from ckptd.daemon.engine import Engine
from ckptd.daemon.files import Files
from ckptd.daemon.housekeeping import Facts, Housekeeping
from ckptd.daemon.journal import ERROR, INFO, LEVELS, WARNING, Journal, Kind, open_journal
from ckptd.daemon.loop import Loop
from ckptd.daemon.notify import Notify
from ckptd.daemon.policy import group_changes, policy_of
from ckptd.daemon.recovery import replay
from ckptd.daemon.requests import Requests
from ckptd.daemon.server import Server, take_listen_fd
from ckptd.daemon.snapshots import Snapshots
from ckptd.daemon.story import Story
from ckptd.daemon.sweep import set_aside
from ckptd.daemon.wake import Wake
from ckptd.protocol.errors import CkptdError, Internal
from ckptd.protocol.version import VERSION
from ckptd.runner.fork import ForkRunner
from ckptd.storage.disk import RealDisk
from ckptd.storage.frame import Frame
from ckptd.storage.recovery import Recovery
from ckptd.storage.store import Store

REPLAY_STEP_S = 30.0  # the manager gives this much more time for every sign of progress

REPLAY_STEP_FRAMES = 5_000


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon; returns its exit code: 0, or that of the error that ended it."""
    asked = _arguments(sys.argv[1:] if argv is None else argv)
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


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser("ckptd", description="The task daemon. Runs in foreground.")
    parser.add_argument("--config", metavar="FILE", help="configuration (TOML)")
    parser.add_argument("--version", action="version", version=f"ckptd {VERSION}")
    return parser.parse_args(argv)


def _base(config_path: str | None, journal: Journal, notify: Notify) -> Base:
    config = cfg.load(config_path)
    journal.level = LEVELS[config.daemon.log_level]
    paths = locations.resolve(
        os.geteuid(), os.environ, state_dir=config.daemon.state_dir, run_dir=config.daemon.run_dir
    )
    clock = clocks.Clock()
    return Base(config, config_path, paths, journal, notify, clock, clocks.boot_id())


def _say_failed(journal: Journal, notify: Notify, failed: CkptdError) -> None:
    text = f"{failed.message}" + (f"\n  {failed.hint}" if failed.hint else "")
    journal.event(Kind.DAEMON_FAILED, text, ERROR, code=failed.code)
    notify.failed(failed.message)


def _serve(base: Base) -> None:
    started_ns = base.clock.mono_ns()
    listen_fd = take_listen_fd(os.environ)  # first of all: no child may take it for its own
    os.makedirs(base.paths.run, mode=0o755 if os.geteuid() == 0 else 0o700, exist_ok=True)
    segment_bytes = base.config.wal.segment_bytes
    store = Store.open(base.paths.state, RealDisk(), segment_bytes=segment_bytes)
    engine, snapshot_lsn, report = _recover(base, store)
    runner = ForkRunner(base.paths.state, base.paths.run, boot_id=base.boot_id)
    wake = Wake()
    wake.install()
    for order in adoption(engine.state, engine.observed, base.clock.now()):
        runner.adopt(order.task, order.attempt)
    server = Server(base.paths.socket, base.config.ipc, base.journal, listen_fd)
    snapshots = Snapshots(engine, store, base.journal, snapshot_lsn)
    facts = Facts(
        os.getpid(),
        os.geteuid(),
        base.boot_id,
        base.clock.now().at_ns,
        base.paths.state,
        base.config_path,
        report,
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
        facts,
    )
    requests = Requests(engine, house, Files(base.paths.state), base.journal)
    requests.on_late = wake.up
    house.requests, house.server = requests, server
    loop = Loop(engine, server, requests, runner, house, Story(base.journal), base.clock, wake)
    ready_ms = (base.clock.mono_ns() - started_ns) // 1_000_000
    text = f"ready after {ready_ms} ms on {base.paths.socket}: {house.status_line()}"
    base.journal.event(Kind.DAEMON_READY, text, INFO, lsn=engine.state.lsn)
    base.notify.ready(house.status_line())
    loop.run()
    _close(base, engine, runner, server, requests, store)


def _recover(base: Base, store: Store) -> tuple[Engine, int, dict[str, Any]]:
    """Replay the log, open it for appending, and make the new reign durable."""
    journal = base.journal

    def progress(done: int, whole: int) -> None:
        base.notify.extend_timeout(REPLAY_STEP_S)
        base.notify.status(f"reading the log: {100 * done // max(1, whole)} %")

    gc.disable()  # a replay makes much and drops nothing; `_settle` turns it on again
    found = store.recover(progress)
    replayed = replay(found.chunks(), _frames(base, found))
    state = replayed.state
    for warning in found.report.warnings:
        journal.event(Kind.LOG_DAMAGED, warning, WARNING)
    if replayed.lost:
        text = f"{replayed.lost} records of the log are lost to a salvage, {replayed.passed_over}"
        text += f" behind them passed over; {len(replayed.doubtful)} tasks in doubt are held"
        aside = set_aside(state, base.paths.state, RealDisk())
        text += f", {aside} files of tasks that are lost are in quarantine/" if aside else ""
        journal.event(Kind.LOG_DAMAGED, text, ERROR)
    epoch = max(found.epoch, state.epoch) + 1
    at_ns = base.clock.now().at_ns
    wal = store.arm(found, epoch=epoch, boot_id=base.boot_id, at_ns=at_ns)
    engine = Engine(state, wal, policy_of(base.config))
    begin: list[AnyRecord] = [
        DaemonStarted(at_ns, epoch, base.boot_id, VERSION, os.getpid(), state.stopped)
    ]
    begin += group_changes(base.config, state)
    begin += replayed.holds(at_ns)
    engine.stage(begin)
    engine.commit()
    wal.prepare_spare()
    _settle()
    report: dict[str, Any] = msgspec.to_builtins(found.report)
    journal.event(
        Kind.RECOVERY_DONE,
        f"replayed to LSN {state.lsn}: {len(state.tasks)} tasks, {len(state.active)} to adopt",
        INFO,
        lsn=state.lsn,
    )
    return engine, found.snapshot_lsn, report


def _settle() -> None:
    """Keep the collector out of what lives long, and give the memory of the replay back."""
    gc.enable()
    gc.collect()
    gc.freeze()
    with contextlib.suppress(AttributeError, OSError):  # a libc without malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def _frames(base: Base, found: Recovery) -> Iterator[Frame]:
    """Yield the frames to replay; each stretch of them is a sign of progress."""
    for number, frame in enumerate(found.frames()):
        if number % REPLAY_STEP_FRAMES == 0:
            base.notify.extend_timeout(REPLAY_STEP_S)
            base.notify.status(f"replaying: at LSN {frame.first_lsn} of {found.last_lsn}")
        yield frame


def _close(
    base: Base,
    engine: Engine,
    runner: Runner,
    server: Server,
    requests: Requests,
    store: Store,
) -> None:
    server.close()
    requests.close()
    runner.close()
    engine.wal.mark_idle(closed=True)
    engine.wal.close()
    store.close()
    left = len(engine.state.active)
    text = f"stopped in order; {left} running tasks live on" if left else "stopped in order"
    base.journal.event(Kind.DAEMON_STOPPED, text, INFO)


if __name__ == "__main__":
    raise SystemExit(main())
