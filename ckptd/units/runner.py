"""The unit back end of the Runner port: every attempt is a transient service of systemd.

    order -> StartTransientUnit -> job removed -> StartSeen
    end   -> the recorder's line in the exit record (inotify) -> EndSeen

PID 1 is the one supervisor that nobody kills or upgrades away. The record on disk is the truth of
an end; what the manager says of the unit is asked only where no record comes: the recorder could
not run, or ran out of memory with its task. A lost connection, a reexec, an answer that never
comes: the order is sent again, because the name and the record fence it.
Read next: `launch.py`, `recorder.py`, `systemd.py`.
"""

import errno
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from msgspec.structs import replace

from ckptd.core.port import Deliver, EndSeen, Identity, Start, StartSeen
from ckptd.runner import linux, quota
from ckptd.runner.backend import Backend
from ckptd.runner.instance import RECORD_COMES_S, Stage, Unit
from ckptd.storage.blobs import Found
from ckptd.units import launch, recorder
from ckptd.units.bus import DISCONNECTED, NO_REPLY, Reply
from ckptd.units.papers import Papers
from ckptd.units.recorder import Began, Record, Records, Stopped
from ckptd.units.steering import Steering
from ckptd.units.systemd import NO_SUCH_UNIT, UNIT_EXISTS, Listing, Manager, errno_of
from ckptd.units.systemd import Found as Properties

LOOK_LATER_S = 2.0
_NO_REPLY = frozenset({NO_REPLY, "org.freedesktop.DBus.Error.NoReply"})  # reexec: the latter
STARTED = ("ExecMainPID", "ExecMainStartTimestamp", "InvocationID")
WHOLE = (
    "Job",  # first: what it ran is seen by what is asked after it
    *STARTED, "LoadState", "ActiveState", "Conditions", "ConditionResult",
    "ExecMainExitTimestamp", "ExecMainCode", "ExecMainStatus", "Result",
)  # fmt: skip
STOP_TIMES = ("ActiveExitTimestampMonotonic", "ExecMainExitTimestampMonotonic")
_DEAD = frozenset({"inactive", "failed"})


class UnitRunner(Backend[Unit]):
    """Runs attempts as transient units."""

    name = "unit"

    def __init__(  # noqa: PLR0913 - where it works, whose it is, who hears of the machine
        self,
        state_dir: str,
        run_dir: str,
        *,
        bus_address: str,
        is_system: bool,
        boot_id: str = "",
        ckpt_dir: str | None = None,
        on_shutdown: Callable[[bool], None] | None = None,
    ) -> None:
        super().__init__(state_dir, run_dir, boot_id, ckpt_dir)
        self.cgroup = launch.SLICE
        self._is_system = is_system
        self._controllers = quota.managed(0 if is_system else os.geteuid())
        self._shim = Identity(self.boot_id, 1 if is_system else 0, 0)
        self._records = Records(state_dir, run_dir, self.boot_id)
        self._papers = Papers(state_dir, run_dir, self._records, is_system=is_system)
        self._active: dict[str, str] | None = None  # state of every unit, at the last connection
        self._written = linux.inotify()
        linux.watch_writes(self._written, self._records.directory)
        self._watch.add(self._written, self._records_changed)
        self._manager = Manager(
            bus_address, self._watch, on_up=self._up, on_down=self._down, on_job=self._job_done,
            on_new_job=self._job_new, on_reloaded=self._reloaded, on_shutdown=on_shutdown,
        )  # fmt: skip
        self.inhibit = self._manager.inhibit  # asks for a delay lock; `on_shutdown` tells of it
        self._steering = Steering(self._manager, self._watch)

    def _is_known(self, unit: str) -> bool:
        return self.knows(*(launch.key_of(unit) or (0, 0)))

    def knows(self, task: int, attempt: int) -> bool:
        """Tell whether the attempt was ordered from, or refused by, a runner of this kind."""
        key = (task, attempt)
        return key in self._instances or key in self._records  # the record is made late

    def _made(self, task: int, attempt: int, uid: int) -> Unit:
        return Unit(task, attempt, uid)

    def _let_go(self) -> None:
        self._manager.close()
        for one in self._instances.values():
            self._unfollow(one)
        os.close(self._written)

    # --- the connection -----------------------------------------------------------------------

    def _up(self) -> None:
        self._manager.listing(self._listed)

    def _down(self) -> None:
        self._active = None

    def _listed(self, listing: Listing) -> None:
        """Go on with all that waited for the connection, or may have changed without it."""
        if listing.error:
            if self._manager.is_up:
                self._watch.after(LOOK_LATER_S, self._up)
            return
        self._active = {row.unit: row.active for row in listing.rows}
        self._manager.clear(listing, self._is_known)
        for one in list(self._instances.values()):
            if one.stage == Stage.PREPARING and one.is_taken_up:
                self._watch.patiently(partial(self._take_up, one))
            elif one.stage == Stage.ORDERED and one.start is not None:
                self._order(one)
            elif one.stage in {Stage.ORDERED, Stage.RUNNING}:
                self._look(one)
            self._steering.renew(one)

    def _reloaded(self) -> None:
        """The manager was reloaded or replaced: a job may have ended unheard."""
        for one in list(self._instances.values()):
            self._look_for_start(one)
            self._steering.renew(one)

    # --- starting -----------------------------------------------------------------------------

    def _launch(self, one: Unit, start: Start, found: Found) -> None:
        one.start, one.resumed_from = start, found.seq
        try:
            self._papers.prepare(start, self._place(one), found, self._ckpt_dir)
        except FileExistsError:  # refused, or ordered by an earlier daemon: no second time
            self._watch.patiently(partial(self._take_up, one))
            return
        except (OSError, ValueError) as error:
            self._refuse(one, "spawn_error", f"cannot prepare its start: {error}", error)
            return
        self._warn_of_limits(
            one, start, self._controllers, has_memory="memory" in self._controllers
        )
        one.stage = Stage.ORDERED
        self._order(one)

    def _order(self, one: Unit) -> None:
        """Ask for the unit, again where the answer was lost: the fence lets one through."""
        if self._active is None:
            return
        assert one.start is not None, "only our own are ordered"
        one.orders_left -= 1
        try:
            wanted, fd = self._papers.order(one.start, self._place(one))
        except OSError as error:
            self._refuse(one, "spawn_error", f"cannot open its output: {error}", error)
            return
        self._manager.start(one.name, wanted, partial(self._answered, one))
        os.close(fd)

    def _answered(self, one: Unit, reply: Reply) -> None:
        if one.stage != Stage.ORDERED:
            return
        if not reply.error:  # JobRemoved follows, but for a few that get lost in a reload
            self._watch.after(LOOK_LATER_S, partial(self._look_for_start, one))
        elif reply.error == UNIT_EXISTS or reply.error in _NO_REPLY:
            self._look(one)
        elif reply.error != DISCONNECTED:  # then `_listed` orders it again
            number = reply.number or errno_of(reply.error)
            text = f"systemd refuses the unit: {reply.text or reply.error}"
            self._refuse(one, "spawn_error", text, OSError(number, reply.text))

    def _look_for_start(self, one: Unit) -> None:
        if one.stage == Stage.ORDERED:
            self._look(one)

    def _refuse(self, one: Unit, cause: str, text: str, error: Exception | None = None) -> None:
        self._records.refuse(one.key)
        is_error = cause == "spawn_error"
        code = (getattr(error, "errno", 0) or errno.EINVAL) if is_error else 0
        self._over(one, recorder.without(one.key, cause, text, code))

    def _job_done(self, unit: str, result: str) -> None:
        one = self._of(unit)
        if one is not None and one.stage == Stage.ORDERED:
            names = STARTED if result == "done" else WHOLE
            self._manager.get(unit, names, partial(self._looked, one))

    def _job_new(self, unit: str) -> None:
        one = self._of(unit)
        if one is not None and one.stage == Stage.RUNNING:
            one.has_new_job = True

    def _of(self, unit: str) -> Unit | None:
        key = launch.key_of(unit)
        return self._instances.get(key) if key is not None else None

    # --- looking at a unit --------------------------------------------------------------------

    def _look(self, one: Unit) -> None:
        self._manager.get(one.name, WHOLE, partial(self._looked, one))

    def _looked(self, one: Unit, found: Properties) -> None:
        if one.stage >= Stage.ENDING or found.error == DISCONNECTED:
            return  # `_listed` looks again
        if found.error in {"", NO_SUCH_UNIT}:
            self._watch.patiently(partial(self._judge, one, found.values))
        else:
            self._watch.after(LOOK_LATER_S, partial(self._look, one))

    def _judge(self, one: Unit, said: dict[str, Any]) -> None:
        """Go by what the manager says. The record has the last word on an end."""
        if one.stage >= Stage.ENDING:
            return
        is_dead = said.get("ActiveState") in _DEAD and not said.get("Job", (0,))[0]
        if not said:
            self._absent(one)
        elif "Conditions" in said and not self._is_ours(one, said):
            self._in_the_way(one, is_dead=is_dead)
        elif said.get("ExecMainPID"):
            self._began(one, said)
            self._settle(one, said, is_dead=is_dead)
        elif is_dead:
            self._never_ran(one, said)
        else:
            self._adopting.discard(one.key)  # its job may wait for our READY: After=ckptd.service
            self._watch.after(RECORD_COMES_S, partial(self._look, one))

    def _is_ours(self, one: Unit, said: dict[str, Any]) -> bool:
        """Tell whether the unit bears our record's name, which is partly random."""
        return any(self._records.path(one.key) in condition for condition in said["Conditions"])

    def _in_the_way(self, one: Unit, *, is_dead: bool) -> None:
        if one.start is None:
            self._absent(one)
        elif is_dead and one.orders_left > 0:  # of a store that was thrown away
            self._manager.forget(one.name)
            self._order(one)
        else:
            text = f"{one.name} runs already, and is not this daemon's"
            self._refuse(one, "spawn_error", text, OSError(errno.EEXIST, text))

    def _never_ran(self, one: Unit, said: dict[str, Any]) -> None:
        """There is a unit, but it never had a process: fenced, or no resources."""
        if said.get("ActiveState") == "failed":
            result = said.get("Result", "")
            text = f"systemd could not start it: {result}; see: journalctl -u {one.name}"
            self._refuse(one, "spawn_error", text, OSError(errno.EAGAIN, result))
        else:
            self._give_up(one)

    def _began(self, one: Unit, said: dict[str, Any]) -> None:
        if one.stage != Stage.RUNNING:
            at_ns = said["ExecMainStartTimestamp"] * 1_000
            pid, invocation = said["ExecMainPID"], said["InvocationID"]
            began = Began(at_ns, pid, one.resumed_from, invocation)
            self._is_running(one, began)
            self._records.note_start(one.key, began)

    def _is_running(self, one: Unit, began: Began) -> None:
        one.stage = Stage.RUNNING
        if one.listener is None:
            self._listen(one)
            self._marks.hinted(one)
        self._see(
            StartSeen(
                *one.key, self._shim, began.pid, began.at_ns, began.resumed_from, one.warning,
                began.invocation,
            )
        )  # fmt: skip
        try:
            one.pidfd = os.pidfd_open(began.pid)
            self._watch.add(one.pidfd, partial(self._main_ended, one))
        except OSError as error:  # or there are no descriptors left
            one.is_main_gone = isinstance(error, ProcessLookupError)
        self._steering.catch_up(one)

    # --- ends ---------------------------------------------------------------------------------

    def _records_changed(self) -> None:
        for _, name in linux.arrivals(self._written):
            one = self._instances.get(recorder.key_of(name) or (0, 0))
            if one is not None and one.stage == Stage.RUNNING:
                self._watch.patiently(partial(self._read_record, one))

    def _read_record(self, one: Unit) -> None:
        if one.stage == Stage.RUNNING:
            record = self._records.read(one.key)
            if record.stopped is not None:
                self._end_by(one, record, record.stopped)

    def _main_ended(self, one: Unit) -> None:
        one.is_main_gone = True
        self._unfollow(one)
        self._watch.after(one.rest_s, partial(self._miss_record, one))

    def _miss_record(self, one: Unit) -> None:
        """Its process is gone, its record should be there."""
        self._watch.patiently(partial(self._read_record, one))
        self._look(one)  # in vain, where it has ended

    def _settle(self, one: Unit, said: dict[str, Any], *, is_dead: bool) -> None:
        self._read_record(one)
        if one.stage != Stage.RUNNING:
            return
        if is_dead and "Result" in said:
            self._end_from_unit(one, said)
        elif is_dead:
            self._look(one)
        elif one.pidfd < 0:  # stopping: what it left is killed, the recorder is to run
            one.rest_s = min(2 * one.rest_s, LOOK_LATER_S)
            self._watch.after(one.rest_s, partial(self._miss_record, one))

    def _end_by(self, one: Unit, record: Record, stopped: Stopped) -> None:
        one.is_synced = stopped.is_synced
        if one.has_new_job and not stopped.is_stopping and self._active is not None:
            one.stage = Stage.ENDING
            told = partial(self._told_times, one, record, stopped)
            self._manager.get(one.name, STOP_TIMES, told)
            return
        self._finish(one, record, stopped, is_stopped=False)

    def _told_times(self, one: Unit, record: Record, stopped: Stopped, found: Properties) -> None:
        """Who was stopped left the active state before its process ended."""
        left, ended = (found.values.get(name, 0) for name in STOP_TIMES)
        self._finish(one, record, stopped, is_stopped=0 < left < ended)

    def _finish(self, one: Unit, record: Record, stopped: Stopped, *, is_stopped: bool) -> None:
        memory_bytes = one.start.memory_bytes if one.start is not None else 0
        end = recorder.seen(one.key, stopped, record.began, memory_bytes)
        problem = (
            self._papers.complaint(one.key, one.start) if end.cause == "exit" and end.code else None
        )
        if problem is not None:
            end = replace(end, cause="spawn_error", code=problem[0], text=problem[1])
        elif is_stopped:
            end = recorder.as_stopped(end)
        self._over(one, end)

    def _end_from_unit(self, one: Unit, said: dict[str, Any]) -> None:
        """There will be no record: the recorder could not run."""
        code, status = said.get("ExecMainCode", 0), int(said.get("ExecMainStatus", 0))
        problem = launch.systemd_problem(code, status, one.name)
        if problem is not None:
            self._over(one, recorder.without(one.key, "spawn_error", problem[1], problem[0]))
            return
        has_limit = one.start is not None and one.start.memory_bytes > 0
        is_stopping = self._papers.is_stopping
        stopped = recorder.from_unit(said, has_limit=has_limit, is_stopping=is_stopping)
        self._end_by(one, self._records.read(one.key), stopped)

    def _absent(self, one: Unit) -> None:
        """There is no such unit, or none of ours."""
        is_unknown = self._records.read(one.key) == Record()
        if is_unknown and one.stage == Stage.ORDERED and one.start and one.orders_left > 0:
            self._order(one)
        else:
            self._give_up(one)

    def _give_up(self, one: Unit) -> None:
        """Nothing was seen to run. Invariant: what passed the fence before it was shut is seen."""
        record = self._records.read(one.key)
        if record.stopped is not None:
            self._end_by(one, record, record.stopped)
        elif not record.is_refused:
            self._records.refuse(one.key)
            is_shut = self._records.read(one.key).is_refused  # else: a failing disk
            self._watch.after(0 if is_shut else LOOK_LATER_S, partial(self._look, one))
        else:
            self._end_without(one, record)

    def _end_without(self, one: Unit, record: Record) -> None:
        cause, text = "not_started", "the order never reached the service manager"
        if record.began is not None:
            cause, text = "lost", "its unit is gone and nobody recorded how it ended"
        self._over(one, recorder.without(one.key, cause, text, began=record.began))

    def _over(self, one: Unit, end: EndSeen) -> None:
        self._unfollow(one)
        super()._over(one, self._papers.close_output(self._place(one), end, one.uid))

    def _unfollow(self, one: Unit) -> None:
        if one.pidfd >= 0:
            self._watch.remove(one.pidfd)
            os.close(one.pidfd)
            one.pidfd = -1

    # --- adoption -------------------------------------------------------------------------------

    def _take_up(self, one: Unit) -> None:
        """Find out what became of an attempt that an earlier daemon ordered.

        | record       | unit                     | then                                     |
        | none         |                          | refused, EndSeen(not_started)            |
        | ended        |                          | EndSeen as recorded                      |
        | another boot |                          | EndSeen(reboot)                          |
        | another store|                          | EndSeen(lost)                            |
        | started      | active, same invocation  | StartSeen                                |
        | any          | loaded                   | StartSeen, then its end by its state     |
        | started      | none                     | refused, looked for again, EndSeen(lost) |
        | empty        | none                     | the same, EndSeen(not_started)           |
        """
        if one.key not in self._records:
            self._refuse(one, "not_started", "the order never reached the service manager")
            return
        record = self._records.read(one.key)
        one.is_taken_up = one.has_left_frozen = True
        if record.stopped is not None:
            self._end_by(one, record, record.stopped)
        elif (gone := self._records.gone(one.key)) is not None:
            self._over(one, recorder.without(one.key, *gone, began=record.began))
        elif self._active is None:
            return  # `_listed` comes back to it
        elif record.began is not None and self._active.get(one.name) == "active":
            identified = partial(self._identified, one, record)
            self._manager.get(one.name, ("LoadState", "InvocationID"), identified)
        else:
            self._look(one)

    def _identified(self, one: Unit, record: Record, found: Properties) -> None:
        began = record.began
        assert began is not None, "asked for what has begun"
        if one.stage != Stage.PREPARING or found.error == DISCONNECTED:
            return
        if found.values.get("InvocationID") != began.invocation:
            self._look(one)
            return
        self._is_running(one, began)
        self._watch.patiently(partial(self._read_record, one))
        if one.pidfd < 0:  # it ended since the listing
            self._watch.after(one.rest_s, partial(self._miss_record, one))

    # --- the other effects ------------------------------------------------------------------------

    def _deliver(self, effect: Deliver) -> None:
        one = self._running(effect.task, effect.attempt)
        if one is not None:
            self._steering.signal(one, effect.signal, tree=effect.tree)

    def _freeze(self, one: Unit, *, frozen: bool) -> None:
        self._steering.freeze(one, frozen=frozen)

    def _starve(self, one: Unit) -> None:
        self._steering.starve(one)

    def _forget(self, one: Unit | None, task: int, attempt: int) -> None:
        made = one or Unit(task, attempt, -1)
        is_sure = made.end is not None and (made.end.cause, made.end.code) == ("exit", 0)
        self._manager.forget(made.name, has_failed=not is_sure)
        self._papers.forget(made.key)
