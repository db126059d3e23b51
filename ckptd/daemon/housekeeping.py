"""What the daemon does beside its work: markers, snapshots, room, watchdog, reload, the end.

Also the answers about the daemon itself (`requests.Control`). Invariant: `heed` runs before the
turn's commit and may stage records, `keep` runs after it and may not.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from ckptd.core.plan import wake_ns
from ckptd.core.policy import Now
from ckptd.core.port import Effect, Runner, Sighting
from ckptd.daemon.echo import Echo
from ckptd.daemon.ending import Ending
from ckptd.daemon.engine import Engine
from ckptd.daemon.inhibitor import Inhibitor
from ckptd.daemon.policy import group_changes, kept_groups, policy_of
from ckptd.daemon.readiness import Readiness
from ckptd.daemon.requests import Requests
from ckptd.daemon.snapshots import Snapshots
from ckptd.daemon.sweep import leftovers
from ckptd.door.access import missing_groups
from ckptd.door.server import Server
from ckptd.host import config as cfg
from ckptd.host.clock import Clock
from ckptd.host.journal import ERROR, INFO, LEVELS, WARNING, Journal, Kind
from ckptd.host.notify import Notify
from ckptd.host.wake import Wake
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadConfig
from ckptd.protocol.version import VERSION

SPARE_RETRY_S = 1.0
SLEEP_MAX_S = 60.0  # by the monotonic clock: that the other was set is noticed by then
STEP_NS_MIN = 1_000_000_000  # adjusting a clock bit by bit takes the monotonic one along
SWEPT_PER_TURN = 100
STATUS_EVERY_S = 1.0
LOOK_AT_PATH_EVERY_S = 5.0  # in turns that happen anyway: nobody is woken for it


class Life(msgspec.Struct):
    """What does not change while the daemon lives."""

    pid: int
    uid: int
    boot_id: str
    started_ns: int
    started_mono_ns: int
    apart_ns: int  # wall clock less monotonic one, as what was adopted was measured by them
    state_dir: str
    socket: str
    config_path: str | None
    recovery: dict[str, Any]


class Housekeeping:
    """The rest of the daemon."""

    def __init__(  # noqa: PLR0913, PLR0917 - wiring
        self,
        engine: Engine,
        runner: Runner,
        snapshots: Snapshots,
        notify: Notify,
        journal: Journal,
        clock: Clock,
        wake: Wake,
        config: cfg.Config,
        life: Life,
        ending: Ending,
        readiness: Readiness,
    ) -> None:
        self._engine, self._runner, self._snapshots = engine, runner, snapshots
        self._notify, self._journal, self._clock, self._wake = notify, journal, clock, wake
        self.config, self.life = config, life
        self._ending, self._readiness = ending, readiness
        self.requests: Requests | None = None
        self.server: Server | None = None
        self.inhibitor: Inhibitor | None = None
        self.echo: Echo | None = None
        self.on_ready: Callable[[], None] = lambda: None
        self._sweep: Iterator[Effect | None] | None = leftovers(engine.state, life.state_dir)
        self._was_full = False
        self._idle_mark_due_ns = 0
        self._spare_due_ns = 0
        self._watchdog_due_ns = 0
        self._status_due_ns = 0
        self._path_due_ns = 0
        self._is_status_old = False  # something changed since the manager was told
        self._commits = 0
        self._turns = 0
        self._apart_ns = life.apart_ns

    # --- before the commit --------------------------------------------------------------------

    def watch_clock(self, now: Now, mono_ns: int) -> None:
        """Notice that the wall clock was set, or that the machine slept."""
        apart_ns = now.at_ns - mono_ns
        step_ns = apart_ns - self._apart_ns
        if abs(step_ns) < STEP_NS_MIN:
            return  # small ones add up until they make one
        self._apart_ns = apart_ns
        self._engine.step_clock(step_ns, now)
        self._ending.step_clock(step_ns)
        text = f"the wall clock was set by {step_ns / 1e9:+.0f} s, or the machine slept"
        self._journal.note(f"{text}: timeouts, graces and delays keep what is left of them", INFO)

    def hear(self, news: Sequence[Sighting]) -> None:
        """Take in what the runner saw in this turn."""
        self._readiness.hear(news)

    def heed(self, now: Now) -> None:
        """Take signals in, and drive a shutdown on."""
        if self._wake.reload_asked:
            self._wake.reload_asked = False
            self._reload_by_signal()
        if self._wake.stop_asked:
            self._wake.stop_asked = False
            self._ending.signalled()
        self._ending.drive(now)

    def shut_down(self, tasks: str) -> None:
        """Begin to stop; what happens to running tasks is `tasks`."""
        self._ending.begin(tasks)

    @property
    def is_over(self) -> bool:
        """Tell whether the loop's work is done."""
        return self._ending.is_over

    def _reload_by_signal(self) -> None:
        self._path_due_ns = 0  # who has only signals left may have lost the socket
        with contextlib.suppress(BadConfig):  # the journal has it
            self.reload()

    # --- after the commit ---------------------------------------------------------------------

    def keep(self, mono_ns: int, *, grown: bool) -> None:
        """Mark, snapshot, make room, feed the watchdog, say how things are."""
        self._turns += 1
        self._commits += grown
        wal = self._engine.wal
        if grown:
            self._idle_mark_due_ns = mono_ns + self.config.wal.idle_mark_ms * 1_000_000
        elif self._idle_mark_due_ns and mono_ns >= self._idle_mark_due_ns:
            self._idle_mark_due_ns = 0
            wal.mark_idle()
        self._snapshots.step(self.config.wal.snapshot_every_bytes, mono_ns)
        self._sweep_some()
        self._keep_room(mono_ns, grown=grown)
        if self.server is not None and mono_ns >= self._path_due_ns:
            self._path_due_ns = mono_ns + int(LOOK_AT_PATH_EVERY_S * 1e9)
            self.server.look_at_path()
        if self._readiness.look():
            self._tell_ready(mono_ns)
        if self.inhibitor is not None:
            self.inhibitor.keep(mono_ns)
        if self._notify.watchdog_s and mono_ns >= self._watchdog_due_ns:
            self._watchdog_due_ns = mono_ns + int(self._notify.watchdog_s * 1e9)
            self._notify.alive()
        self._is_status_old |= grown
        if self._is_status_old and mono_ns >= self._status_due_ns and self._readiness.is_ready:
            self._is_status_old = False
            self._status_due_ns = mono_ns + int(STATUS_EVERY_S * 1e9)
            self._notify.status(self.status_line())

    def _tell_ready(self, mono_ns: int) -> None:
        self.on_ready()
        ready_ms = (mono_ns - self.life.started_mono_ns) // 1_000_000
        line = self.status_line()
        text = f"ready after {ready_ms} ms on {self.life.socket}: {line}"
        self._journal.event(Kind.DAEMON_READY, text, INFO, lsn=self._engine.state.lsn)
        self._notify.ready(line)

    def _sweep_some(self) -> None:
        for _ in range(SWEPT_PER_TURN):
            if self._sweep is None:
                return
            try:
                effect = next(self._sweep)
            except StopIteration:
                self._sweep = None
                return
            if effect is not None:
                self._runner.carry_out(effect)

    @property
    def _is_short(self) -> bool:
        """Tell whether the disk must be looked at again before anything else happens."""
        wal = self._engine.wal
        return wal.is_tight or not wal.has_spare

    def _keep_room(self, mono_ns: int, *, grown: bool) -> None:
        wal = self._engine.wal
        if (grown or self._is_short) and mono_ns >= self._spare_due_ns:
            self._spare_due_ns = mono_ns + int(SPARE_RETRY_S * 1e9)
            wal.look_at_disk()
        is_full = not self._engine.has_room()
        if is_full == self._was_full:
            return
        self._was_full = is_full
        if is_full:
            text = f"no room in the log ({wal.last_error}): new work is refused, tasks go on"
            self._journal.event(Kind.LOG_FULL, text, ERROR)
        else:
            self._journal.event(Kind.LOG_ROOM, "there is room again: new work is taken", WARNING)
            self._engine.has_more = True  # room that this turn's plan may not have found
        self._notify.status(self.status_line())

    def timeout_s(self, now: Now, mono_ns: int) -> float:
        """Return the seconds until something is due; -1 for ever."""
        if self._snapshots.has_chunks or self._sweep is not None:
            return 0.0
        if self._engine.has_more or self._engine.state.touched or self._readiness.is_due:
            return 0.0
        due = [
            self._idle_mark_due_ns,
            self.requests.wake_mono_ns() if self.requests is not None else 0,
            self._spare_due_ns if self._is_short else 0,
            self._status_due_ns if self._is_status_old and self._readiness.is_ready else 0,
            self._watchdog_due_ns if self._notify.watchdog_s else 0,
            mono_ns + 20_000_000 if self._snapshots.is_writing else 0,
        ]
        timers = (wake_ns(self._engine.state), self._ending.wake_ns)
        due += [mono_ns + max(0, timer_ns - now.at_ns) for timer_ns in timers if timer_ns]
        waits = [at_ns - mono_ns for at_ns in due if at_ns]
        longest_ns = int(SLEEP_MAX_S * 1e9)
        return min(max(0, min(waits) + 999_999), longest_ns) / 1e9 if waits else -1

    # --- the daemon itself --------------------------------------------------------------------

    def status_line(self) -> str:
        """Return one true line about the daemon."""
        totals = self._engine.state.totals()
        words = ", ".join(f"{count} {phase}" for phase, count in totals.items())
        health = self.health()
        return (words or "no tasks") + (f"; {health}" if health != "ok" else "")

    def health(self) -> str:
        """Return "ok" or what is wrong."""
        if self._was_full:
            return f"no room in the log: {self._engine.wal.last_error}"
        if self._ending.has_begun:
            return "stopping"
        return "ok" if self._readiness.is_ready else "adopting"

    def daemon_status(self) -> m.DaemonStatus:
        """Return how the daemon is."""
        state, life = self._engine.state, self.life
        return m.DaemonStatus(
            version=VERSION,
            pid=life.pid,
            uid=life.uid,
            epoch=state.epoch,
            boot_id=life.boot_id,
            started_ns=life.started_ns,
            state_dir=life.state_dir,
            lsn=self._engine.wal.durable_lsn,
            snapshot_lsn=self._snapshots.last_lsn,
            health=self.health(),
            runner=self._runner.name,
            cgroup=self._runner.cgroup,
            totals=state.totals(),
            counters=self.counters(),
            last_recovery=life.recovery,
        )

    def counters(self) -> dict[str, float]:
        """Return what was counted since the start."""
        return {
            "turns": self._turns,
            "commits": self._commits,
            "log_bytes": self._engine.appended_bytes,
            "journal_dropped": self._journal.dropped_ever,
            **(self.echo.stats() if self.echo is not None else {}),
            **(self.server.stats() if self.server is not None else {}),
        }

    def hold_max_s(self) -> float:
        """Return the longest time that a request may be parked."""
        return self.config.ipc.hold_s

    def effective_config(self) -> m.EffectiveConfig:
        """Return the configuration in force."""
        found = cfg.find(self.life.config_path)
        return m.EffectiveConfig(found, msgspec.to_builtins(self.config))

    def reload(self) -> m.Reloaded:
        """Read the configuration again and apply what can change live. Raises BadConfig."""
        if self._readiness.is_ready:  # else READY=1 would be said too early
            self._notify.reloading()
        try:
            new = cfg.load(self.life.config_path)
            applied, waiting = cfg.live_changes(self.config, new)
            self.config = cfg.keep_fixed(self.config, new)
            self._engine.policy = policy_of(self.config)
            self._engine.stage(group_changes(self.config, self._engine.state))
            kept = kept_groups(self.config, self._engine.state, applied)
            applied = tuple(key for key in applied if key not in kept)
            self._journal.level = LEVELS[self.config.daemon.log_level]
        except BadConfig as bad:
            text = f"configuration refused, the old one stays: {bad.message}; {bad.hint}"
            self._journal.event(Kind.CONFIG_REFUSED, text, ERROR)
            raise
        finally:
            if self._readiness.is_ready:
                self._notify.ready(self.status_line())
        text = f"configuration reloaded; applied: {', '.join(applied) or 'nothing new'}"
        text += f"; after a restart: {', '.join(waiting)}" if waiting else ""
        text += f"; left as they are: {', '.join(kept)}" if kept else ""
        self._journal.event(Kind.DAEMON_RELOADED, text, INFO)
        self.tell_missing_groups()
        return m.Reloaded(applied, waiting, kept)

    def tell_missing_groups(self) -> None:
        """Warn of groups in [access] that give nobody a role, because there are none such."""
        missing = missing_groups(self._engine.policy.rules)
        if missing and self.life.uid == 0:
            self._journal.note(f"[access] names unknown groups: {', '.join(missing)}", WARNING)
