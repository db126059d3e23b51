"""What the daemon does beside its work: markers, snapshots, room, watchdog, reload, the end.

Also the answers about the daemon itself (`requests.Control`). Invariant: `heed` runs before the
turn's commit and may stage records, `keep` runs after it and may not.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from ckptd.core.decide import Case, stop
from ckptd.core.plan import wake_ns
from ckptd.core.policy import Caller, Now
from ckptd.core.port import Effect, Runner
from ckptd.core.records import ACTIVE, DaemonStopped, StopIntent
from ckptd.daemon import config as cfg
from ckptd.daemon.clock import Clock
from ckptd.daemon.engine import Engine
from ckptd.daemon.journal import ERROR, INFO, LEVELS, WARNING, Journal, Kind
from ckptd.daemon.notify import Notify
from ckptd.daemon.policy import group_changes, policy_of
from ckptd.daemon.requests import Requests
from ckptd.daemon.server import Server
from ckptd.daemon.snapshots import Snapshots
from ckptd.daemon.sweep import leftovers
from ckptd.daemon.wake import Wake
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadConfig
from ckptd.protocol.version import VERSION

SPARE_RETRY_S = 1.0
SLEEP_MAX_S = 3_600.0
SWEPT_PER_TURN = 100
STATUS_EVERY_S = 1.0
_ITSELF = Caller(-1, -1, admin=True)


class Facts(msgspec.Struct):
    """What does not change while the daemon lives."""

    pid: int
    uid: int
    boot_id: str
    started_ns: int
    state_dir: str
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
        facts: Facts,
    ) -> None:
        self._engine, self._runner, self._snapshots = engine, runner, snapshots
        self._notify, self._journal, self._clock, self._wake = notify, journal, clock, wake
        self.config, self.facts = config, facts
        self.requests: Requests | None = None
        self.server: Server | None = None
        self.is_over = False
        self._sweep: Iterator[Effect | None] | None = leftovers(engine.state, facts.state_dir)
        self._ending = ""  # keep, checkpoint or kill once a shutdown was asked for
        self._was_full = False
        self._idle_mark_due_ns = 0
        self._spare_due_ns = 0
        self._watchdog_due_ns = 0
        self._status_due_ns = 0
        self._commits = 0
        self._turns = 0

    # --- before the commit --------------------------------------------------------------------

    def heed(self, now: Now) -> None:
        """Take signals in, and drive a shutdown on."""
        if self._wake.reload_asked:
            self._wake.reload_asked = False
            self._reload_by_signal()
        if self._wake.stop_asked and self._ending != "keep":
            self.shut_down("keep")  # also what ends a shutdown that waits for its tasks
        if not self._ending:
            return
        if self._ending != "keep":
            self._stop_tasks(now)
        if self._ending == "keep" or not self._engine.state.active:
            self._engine.stage([DaemonStopped(now.at_ns)])
            self.is_over = True

    def shut_down(self, tasks: str) -> None:
        """Begin to stop; what happens to running tasks is `tasks`."""
        self._ending = tasks
        self._engine.draining = True
        count = len(self._engine.state.active)
        text = f"stopping, {count} running tasks: {tasks}"
        self._notify.stopping(text)
        self._journal.event(Kind.DAEMON_STOPPING, text, INFO)

    def _stop_tasks(self, now: Now) -> None:
        state, policy = self._engine.state, self._engine.policy
        case = Case(state, _ITSELF, now, policy)
        orders: list[StopIntent] = []
        for number in state.active:
            task = state.tasks.get(number)
            if task is None or task.run is None or task.phase not in ACTIVE:
                continue
            run = task.run
            if run.stop is None and self._ending == "checkpoint":
                grace_s = task.unpacked().grace_s
                orders.append(stop(task, run, case, "shutdown", grace_s=grace_s, ask=True))
            elif run.stop is None or (self._ending == "kill" and run.stop.rung < 2):
                why = run.stop.why if run.stop is not None else "shutdown"
                orders.append(StopIntent(task.id, run.attempt, now.at_ns, why, 2, 0, 0.0, -1))
        self._engine.stage(orders)

    def _reload_by_signal(self) -> None:
        try:
            self.reload()
        except BadConfig as bad:
            self._journal.event(Kind.CONFIG_REFUSED, f"{bad.message}; {bad.hint}", ERROR)

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
        if self._notify.watchdog_s and mono_ns >= self._watchdog_due_ns:
            self._watchdog_due_ns = mono_ns + int(self._notify.watchdog_s * 1e9)
            self._notify.alive()
        if grown and mono_ns >= self._status_due_ns:
            self._status_due_ns = mono_ns + int(STATUS_EVERY_S * 1e9)
            self._notify.status(self.status_line())

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
            self._engine.state.touched.update(self._engine.state.active)  # plan again
        self._notify.status(self.status_line())

    def timeout_s(self, now: Now, mono_ns: int) -> float:
        """Return the seconds until something is due; -1 for ever."""
        if self._snapshots.has_chunks or self._sweep is not None:
            return 0.0
        if self._engine.has_more or self._engine.state.touched:
            return 0.0
        due = [
            self._idle_mark_due_ns,
            self.requests.wake_mono_ns() if self.requests is not None else 0,
            self._spare_due_ns if self._is_short else 0,
            self._watchdog_due_ns if self._notify.watchdog_s else 0,
            mono_ns + 20_000_000 if self._snapshots.is_writing else 0,
        ]
        timer_ns = wake_ns(self._engine.state)
        if timer_ns:
            due.append(mono_ns + max(0, timer_ns - now.at_ns))
        waits = [at_ns - mono_ns for at_ns in due if at_ns]
        longest_ns = int(SLEEP_MAX_S * 1e9)  # epoll takes no more than 24 days
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
        return "stopping" if self._ending else "ok"

    def daemon_status(self) -> m.DaemonStatus:
        """Return how the daemon is."""
        state, facts = self._engine.state, self.facts
        return m.DaemonStatus(
            version=VERSION,
            pid=facts.pid,
            uid=facts.uid,
            epoch=state.epoch,
            boot_id=facts.boot_id,
            started_ns=facts.started_ns,
            state_dir=facts.state_dir,
            lsn=self._engine.wal.durable_lsn,
            snapshot_lsn=self._snapshots.last_lsn,
            health=self.health(),
            runner=self._runner.name,
            cgroup=self._runner.cgroup,
            totals=state.totals(),
            counters=self.counters(),
            last_recovery=facts.recovery,
        )

    def counters(self) -> dict[str, float]:
        """Return what was counted since the start."""
        return {
            "turns": self._turns,
            "commits": self._commits,
            "log_bytes": self._engine.appended_bytes,
            "journal_dropped": self._journal.dropped,
            **(self.server.stats() if self.server is not None else {}),
        }

    def hold_max_s(self) -> float:
        """Return the longest time that a request may be parked."""
        return self.config.ipc.hold_s

    def effective_config(self) -> m.EffectiveConfig:
        """Return the configuration in force."""
        found = cfg.find(self.facts.config_path)
        return m.EffectiveConfig(found, msgspec.to_builtins(self.config))

    def reload(self) -> m.Reloaded:
        """Read the configuration again and apply what can change live. Raises BadConfig."""
        self._notify.reloading()
        try:
            new = cfg.load(self.facts.config_path)
            applied, waiting = cfg.live_changes(self.config, new)
            self.config = cfg.keep_fixed(self.config, new)
            self._engine.policy = policy_of(self.config)
            self._engine.stage(group_changes(self.config, self._engine.state))
            self._journal.level = LEVELS[self.config.daemon.log_level]
        finally:
            self._notify.ready(self.status_line())
        text = f"configuration reloaded; applied: {', '.join(applied) or 'nothing new'}"
        text += f"; after a restart: {', '.join(waiting)}" if waiting else ""
        self._journal.event(Kind.DAEMON_RELOADED, text, INFO)
        return m.Reloaded(applied, waiting)
