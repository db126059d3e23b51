"""One life: a daemon, its clients and its machine, from one seed, through every fault drawn."""

import errno
import os
import random
import traceback
from collections import Counter, deque
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from ckptd.core import image
from ckptd.core.state import State
from ckptd.daemon.recovery import replay
from ckptd.protocol import codec
from ckptd.protocol import messages as m
from ckptd.protocol.errors import CkptdError, Corrupt
from ckptd.storage.store import Store
from tests.fakes.memory_disk import MemoryDisk
from tests.fakes.sim_runner import SimAttempt
from tests.sim.agenda import Agenda, S, SimClock
from tests.sim.asked import Violation
from tests.sim.clients import Janitor, Person
from tests.sim.crash_states import Broken, CrashStates
from tests.sim.daemon import PARALLEL, ROOT, Daemon, Descriptors, Told
from tests.sim.faults import Blow, Climate, Killed, PowerCut, draw
from tests.sim.jobs import JobMachine
from tests.sim.model import Model
from tests.sim.network import Network, Weather

AMPLE_BYTES = 1 << 40
QUIET_S_MAX = 4_000  # of simulated time: the longest backoffs in a row, with room
JUMP_S_MAX = 7_200  # of the wall clock, to either side of the truth
STEPS_MAX = 400_000
SPINS_MAX = 3_000  # turns in a row without rest
TURN_S = 0.0002
ROOM_TOLD_S = 60  # until then an answer may be of before: a disk that stalls holds it up
KEPT_PER_ACTIVE_BYTES, ASKED_BYTES_MAX, HEADER_BYTES = 2 << 10, 2 << 10, 4 << 10
KEPT_FOR_EVER = 10_000  # ended tasks: more than there are in any life
FIRST_RECORDS_MAX = 64  # of a reign, before it serves anybody
SEEN_AT_ONCE = frozenset({"hold", "pause", "resume", "edit"})
NO_DISK = frozenset({"reply", "adopt", "order"})
EDGES = (
    "any", "any", "any", "order", "reply", "adopt", "sync", "write", "sync_dir", "rename", "create",
    "unlink",
)  # fmt: skip
ERRORS = {"eio_write": "write", "eio_sync": "sync", "eio_sync_dir": "sync_dir", "stall": "sync"}
INTENTS_LOOKED_AT = 0.2  # of all starts: each look is a recovery
ACTS_LOOKED_AT = {"reply": 0.02, "adopt": 0.02, "order": 0.2}  # likewise


class Life:
    """Everything in one life. `run` returns the hash of what happened, or raises Violation."""

    def __init__(
        self,
        seed: int,
        say: Callable[[str], None] | None = None,
        climate: Climate | None = None,
    ) -> None:
        self.seed = seed
        self.dice = random.Random(seed)
        self.climate = climate or draw(self.dice)
        self.agenda = Agenda()
        self.clock = SimClock(self.agenda, random.Random(self.dice.random()))
        self.model = Model(PARALLEL, keeps_all=self.climate.finished_max > KEPT_FOR_EVER)
        self.disk = MemoryDisk(AMPLE_BYTES, self.dice.randrange(1 << 30))
        self.network = Network(self.agenda, random.Random(self.dice.random()))
        self.machine = JobMachine(
            self.agenda, self.clock, random.Random(self.dice.random()), self.model
        )
        self.machine.delay_s = self.climate.delay_s
        self.machine.on_begin = self._check_intent
        self.network.weather = self.climate.weather
        self.model.elapsed_ns = lambda: self.agenda.elapsed_ns
        self.model.has_doubles = self.climate.weather.double > 0
        self.network.on_arrival = self._poke
        self.network.on_reply = self._take_reply
        self.counts: Counter[str] = Counter()
        self.last: deque[str] = deque(maxlen=300)
        self.fds = Descriptors()
        self.daemon: Daemon | None = None
        self.is_quiet = False
        self.people = [self._person(number) for number in range(self.climate.people)]
        self._say = say
        self._hash = blake2b(digest_size=16)
        self._edges: Counter[str] = Counter()
        self._due: dict[tuple[str, int], str] = {}
        self._turn_ns = 0
        self._spins = 0
        self._reigns = 0
        self._durable_lsn = 0
        self._appended_lsn = 0
        self._is_stalled = False
        self._has_trouble = False  # the disk failed or was full in this reign
        self._is_stop_asked = False  # by SIGTERM, of this reign
        self._full_until_ns = 0  # until then a daemon may not know yet that there is room again
        self._watch_dice = random.Random(self.dice.random())  # looking on changes nothing
        self._states = CrashStates(
            ROOT, self.climate.segment_bytes, random.Random(self.dice.random())
        )

    def _person(self, number: int) -> Person:
        person = Person(
            f"c{number}", self.agenda, self.network, self.model, random.Random(self.dice.random())
        )
        person.pause_s, person.acts_left = self.climate.pause_s, self.climate.acts
        person.wall_ns = self.clock.wall_ns
        return person

    def tell(self, text: str) -> None:
        """Note what happens, for people and for the hash."""
        line = f"{self.agenda.elapsed_ns / 1e9:10.4f} {text}"
        self.last.append(line)
        self._hash.update(line.encode())
        if self._say is not None:
            self._say(line)

    # --- the whole --------------------------------------------------------------------------------

    def run(self) -> str:
        """Live; return the hash of all that was told."""
        try:
            self._start()
            for person in self.people:
                self.agenda.after(self.dice.random(), person.live)
            self._trouble_later()
            end_ns = self.agenda.elapsed_ns + int(self.climate.busy_s * S)
            self._live_while(lambda: self.agenda.elapsed_ns < end_ns)
            self._grow_quiet()
            self._live_to_the_end()
        finally:
            if self.daemon is not None:
                self.daemon.bury()
            self.fds.close()
            self._sum_up()
        return self._hash.hexdigest()

    def _sum_up(self) -> None:
        """Add what the others have counted."""
        self.counts.update(self._states.counts)
        self.counts.update(self.machine.happened)
        self.counts.update({f"messages_{what}": n for what, n in self.network.counts.items()})
        self.counts["tasks"] = len(self.model.unique_of)
        self.counts["accepted"] = len(self.model.acknowledged)
        self.counts["attempts"] = len(self.machine.begun)
        self.counts["checks"] = self.model.checks
        self.counts["steered"] = self.model.steering.answered
        self.counts["simulated_s"] = self.agenda.elapsed_ns // S

    def _live_while(self, goes_on: Callable[[], bool]) -> None:
        for _ in range(STEPS_MAX):
            if not goes_on():
                return
            if not self.agenda.step():
                raise Violation("nothing can happen any more")
        raise Violation(f"{STEPS_MAX} steps, and no end of it")

    def _grow_quiet(self) -> None:
        """The faults stop; people finish what they do and go."""
        self.tell("the faults stop")
        self.is_quiet = True
        self._due.clear()
        self._room()
        self.disk.faults = []
        self.clock.skew_ns = 0
        self.model.attendance.jumped(self.agenda.elapsed_ns)
        self.network.weather = Weather()
        self.machine.accidents = 0.0
        for person in self.people:
            person.is_leaving = True
        if self.daemon is not None:
            self._turn_in(0)

    def _live_to_the_end(self) -> None:
        """Everything that should end must end, and every client hear of it."""
        skewed_s = 2 * JUMP_S_MAX if "jump" in self.climate.kinds else 0
        limit_ns = self.agenda.elapsed_ns + (QUIET_S_MAX + skewed_s) * S
        self._live_while(
            lambda: (
                not all(person.has_left for person in self.people) and self._is_in_time(limit_ns)
            )
        )
        janitor = Janitor(self.agenda, self.network, self.model, random.Random(0))
        janitor.begin()
        self._live_while(lambda: not janitor.is_done and self._is_in_time(limit_ns))
        self.model.finished(janitor.rows)
        self.tell(f"{len(janitor.rows)} tasks have ended")

    def _is_in_time(self, limit_ns: int) -> bool:
        if self.agenda.elapsed_ns < limit_ns:
            return True
        waits = [person.request for person in self.people if person.request]
        raise Violation(f"no end of it, and no fault for long; unanswered: {waits}")

    # --- the daemon -------------------------------------------------------------------------------

    def _start(self) -> None:
        """A daemon starts, as the service manager does it; it may die on its way up."""
        self._reigns += 1
        self.model.begins_to_reign()
        self.tell(f"daemon {self._reigns} starts")
        self._look_at_log()
        self._draw_reign()
        self._is_stop_asked = False
        self._has_trouble = self.disk.capacity < AMPLE_BYTES
        number, told = self._reigns, Told(self.tell)
        daemon = Daemon(self.climate, self.disk, self.clock, self.machine.boot_id, told, number)
        self.daemon = daemon
        self.disk.watch = self._edge
        if self._survives(lambda: daemon.start(self.machine, self.network, self.fds, self._edge)):
            assert daemon.runner is not None
            daemon.runner.on_news = self._poke
            self.model.attendance.serves(self.agenda.elapsed_ns)
            self._take_bounds(daemon)
            self._inspect(daemon)
            self._turn_in(0)
            for person in self.people:
                self.agenda.after(self.dice.random() * 0.5, person.reconnected)

    def _inspect(self, daemon: Daemon) -> None:
        """See what a client sees, and let the model judge it."""
        rows = _rows(daemon)
        self.model.recovered(rows)
        self._look_at_groups(daemon)
        ids = [row["id"] for row in rows]
        for first in range(0, len(ids), 100):
            chosen = m.Selector(ids=tuple(ids[first : first + 100]))
            self.model.details(daemon.ask("show", m.Show(chosen))["tasks"])
        self.counts["recoveries"] += 1

    def _look_at_groups(self, daemon: Daemon) -> None:
        groups = daemon.ask("groups", m.Empty())["groups"]
        self.model.steering.check_groups(groups, self.model.now + 1)

    def _look_at_changes(self, daemon: Daemon) -> None:
        """See at once what became of what a turn has answered: later it may be undone."""
        verbs = {one.verb: one for one in self.model.turn_is_over()}
        if "group_set" in verbs:
            self._look_at_groups(daemon)
        changed = {row["id"] for one in verbs.values() for row in one.changed()}
        if SEEN_AT_ONCE & verbs.keys():
            rows = [row for row in _rows(daemon) if row["id"] in changed]
            self.model.seen(rows, self.model.now + 1)

    def _turn_in(self, delay_ns: int) -> None:
        """Let the daemon have its turn then, unless it is to have one sooner."""
        at_ns = self.agenda.elapsed_ns + delay_ns
        if self._turn_ns and self._turn_ns <= at_ns:
            return
        self._turn_ns = at_ns
        self.agenda.at(at_ns, lambda: self._turn_at(at_ns))

    def _poke(self) -> None:
        """Something arrived that the daemon's epoll would wake up for."""
        if self.daemon is not None and self.daemon.is_built and not self._is_stalled:
            self._turn_in(int(self.dice.random() * TURN_S * S))

    def _turn_at(self, at_ns: int) -> None:
        daemon = self.daemon
        if at_ns != self._turn_ns or daemon is None or not daemon.is_built:
            return
        self._turn_ns = 0
        self.counts["turns"] += 1
        if not self._survives(daemon.loop.turn):
            return
        self._take_bounds(daemon)
        self._look_at_changes(daemon)
        if daemon.loop.is_over:
            if self._survives(daemon.end):
                self._gone("it ended in order")
            return
        self._rest(daemon)

    def _rest(self, daemon: Daemon) -> None:
        rests: list[float] = []
        if not self._survives(lambda: rests.append(daemon.loop.rest_s())):
            return
        rest_s = 0.0 if daemon.has_news else rests[0]
        self._spins = self._spins + 1 if rest_s == 0.0 else 0
        if self._spins > SPINS_MAX:
            raise Violation(f"{SPINS_MAX} turns in a row without rest")
        if rest_s >= 0:
            self._turn_in(max(int(rest_s * S), int(TURN_S * S)))

    def _survives(self, act: Callable[[], object]) -> bool:
        """Let the daemon do something; False where it died of it."""
        daemon = self.daemon
        assert daemon is not None
        try:
            act()
        except Blow as blow:
            self._take_bounds(daemon)
            self._struck(blow)
        except CkptdError as failed:
            self._take_bounds(daemon)
            if isinstance(failed, Corrupt):
                raise Violation(f"a crash is taken for damage: {failed.message}") from failed
            if not self._has_trouble:
                raise Violation(f"a daemon gave up on a sound disk: {failed}") from failed
            self.counts["gave_up"] += 1
            self._gone(f"it gave up: {failed.message}")
        except (Violation, Broken):
            raise
        except Exception as bug:
            raise Violation(f"the daemon crashed:\n{traceback.format_exc()}") from bug
        else:
            return True
        return False

    def _take_bounds(self, daemon: Daemon) -> None:
        """Take down what is durable by the daemon's own word, and how far the log may reach."""
        if hasattr(daemon, "engine"):
            wal = daemon.engine.wal
            self._appended_lsn = wal.next_lsn - 1
            self._durable_lsn = max(self._durable_lsn, wal.durable_lsn)

    def _struck(self, blow: Blow) -> None:
        if self.daemon is not None and not self.daemon.is_built:
            self.counts["in_recovery"] += 1
        if isinstance(blow, PowerCut):
            self._cut_power()
        else:
            self.counts["kill"] += 1
            self._gone("killed")

    def _cut_power(self) -> None:
        keep = self.climate.keep if self.climate.keep >= 0 else self.dice.random()
        self.counts["power"] += 1
        self._gone(f"the power is cut, {keep:.2f} of what was not synced survives")
        self.disk = self.disk.crash(self.dice, keep)
        self.machine.tick_clock()
        self.machine.reboot()

    def _gone(self, how: str) -> None:
        """The daemon is no more; the next one comes by itself."""
        daemon, self.daemon = self.daemon, None
        self.tell(f"daemon {self._reigns} is gone: {how}")
        if daemon is not None:
            self.disk.watch = None
            daemon.bury()
        self.model.attendance.is_gone()
        self._turn_ns = 0
        self._due.clear()
        self.network.daemon_gone()
        self.machine.crash_daemon()
        self.machine.forget_orders()
        delay_s = self.dice.choice([0.001, 0.1, 2.0, 30.0])
        self.agenda.after(delay_s, self._start)

    # --- faults -----------------------------------------------------------------------------------

    def _draw_reign(self) -> None:
        """Draw what is to happen at which edge of this reign: the n-th of all, or of a kind."""
        self._edges.clear()
        self._due.clear()
        dice, climate = self.dice, self.climate
        if self.is_quiet:
            return
        if dice.random() < climate.cut_short:
            kind = "power" if dice.random() < climate.power else "kill"
            edge = dice.choice(EDGES)
            limit = climate.reign_edges if edge == "any" else max(2, climate.reign_edges // 8)
            if kind in climate.kinds:
                self._due[edge, dice.randint(1, limit)] = kind
        for fault, edge in ERRORS.items():
            if fault in climate.kinds and dice.random() < 0.2:
                self._due[edge, dice.randint(1, climate.reign_edges // 4)] = fault

    def _edge(self, kind: str, path: str) -> None:
        """The daemon is about to do something that the world can see."""
        if kind in NO_DISK and self._watch_dice.random() < ACTS_LOOKED_AT[kind]:
            self._check_durable(f"{kind} {path}")
        if kind not in NO_DISK and self._watch_dice.random() < self.climate.looks:
            self._look_at_states()
        for edge in (kind, "any"):
            self._edges[edge] += 1
            fault = "" if self._is_stalled else self._due.pop((edge, self._edges[edge]), "")
            if fault:
                self._strike(fault, f"{kind} {path}", path)

    def _strike(self, fault: str, where: str, path: str) -> None:
        self.tell(f"{fault} at {where}")
        if fault == "kill":
            raise Killed
        if fault == "power":
            raise PowerCut
        self.counts[fault] += 1
        if fault == "stall":
            self._stall()
        else:
            self._has_trouble = True
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    def _look_at_states(self) -> None:
        """See what a power cut at this very moment could leave, all or many of it."""
        assert self.daemon is not None
        self._take_bounds(self.daemon)
        self._states.look(self.disk, self._durable_lsn, self._appended_lsn)

    def _stall(self) -> None:
        """The disk takes its time; the world goes on, the daemon does not."""
        self._is_stalled = True
        self.model.attendance.stands_still(is_so=True, now_ns=self.agenda.elapsed_ns)
        try:
            until_ns = self.agenda.elapsed_ns + int(self.dice.choice([0.1, 5.0, 40.0]) * S)
            self.agenda.pass_until(until_ns)
        finally:
            self._is_stalled = False
            self.model.attendance.stands_still(is_so=False, now_ns=self.agenda.elapsed_ns)

    def _trouble_later(self) -> None:
        if not self.is_quiet:
            self.agenda.after(self.dice.expovariate(1 / self.climate.trouble_s), self._trouble)

    def _trouble(self) -> None:
        """Something happens to the machine, by chance."""
        if self.is_quiet:
            return
        kind = self.dice.choice(("shim_death", "task_death", "jump", "enospc", "reboot_idle",
                                 "sigterm"))  # fmt: skip
        if kind in self.climate.kinds:
            getattr(self, f"_{kind}")()
        self._trouble_later()

    def _victim(self) -> SimAttempt | None:
        alive = self.machine.alive()
        return self.dice.choice(alive) if alive else None

    def _shim_death(self) -> None:
        if (one := self._victim()) is not None:
            self.tell(f"the supervisor of {one.key} dies")
            self.machine.kill_supervisor(*one.key)

    def _task_death(self) -> None:
        if (one := self._victim()) is not None:
            self.tell(f"somebody kills {one.key}")
            self.machine.signal(one, self.dice.choice([9, 11, 15]))

    def _jump(self) -> None:
        skew_s = self.dice.choice([-JUMP_S_MAX, -60, -1, 0, 1, 60, JUMP_S_MAX])
        self.counts["jump"] += 1
        self.tell(f"the wall clock jumps to {skew_s} s beside the truth")
        self.clock.skew_ns = skew_s * S
        self.model.attendance.jumped(self.agenda.elapsed_ns)

    def _enospc(self) -> None:
        used = self.disk.capacity - self.disk.free_bytes("")
        self.counts["enospc"] += 1
        self._has_trouble = True
        self.disk.capacity = used + self.dice.choice([0, 512, 5_000, 40_000])
        self.tell(f"the disk has {self.disk.capacity - used} bytes left")
        self.agenda.after(self.dice.choice([0.5, 5.0, 30.0]), self._room)

    def _room(self) -> None:
        self.tell("the disk has room again")
        if self.disk.capacity < AMPLE_BYTES:
            self._full_until_ns = self.agenda.elapsed_ns + ROOM_TOLD_S * S
        self.disk.capacity = AMPLE_BYTES

    def _reboot_idle(self) -> None:
        if self.dice.random() < 0.3 and not self._is_stalled:
            self._cut_power() if self.daemon is not None else self._cut_while_down()

    def _cut_while_down(self) -> None:
        self.counts["power"] += 1
        self.tell("the power is cut while no daemon runs")
        self.disk = self.disk.crash(self.dice, self.dice.random())
        self.machine.tick_clock()
        self.machine.reboot()

    def _sigterm(self) -> None:
        daemon = self.daemon
        if daemon is not None and daemon.is_built and self.dice.random() < 0.3:
            assert daemon.wake is not None
            self.counts["sigterm"] += 1
            self.tell("SIGTERM")
            self._is_stop_asked = True
            daemon.wake.stop_asked = True
            daemon.wake.up()
            self._poke()

    # --- looking at the log -----------------------------------------------------------------------

    def _look_at_log(self) -> None:
        """Recover copies of the disk: within its bounds, and the same however often."""
        if self._reigns == 1:
            self._appended_lsn = FIRST_RECORDS_MAX
            return
        once = self.disk.clone()
        (lsn, first), (again, second) = _recovered(once), _recovered(once)
        self.model.checks += 1
        if (lsn, first) != (again, second):
            raise Violation(f"recovery is not idempotent: LSN {lsn}, then {again}")
        if not self._durable_lsn <= lsn <= self._appended_lsn:
            raise Violation(
                f"recovered up to LSN {lsn}: durable was {self._durable_lsn}, "
                f"written at most {self._appended_lsn}"
            )
        # A start may write its first records before its engine can be asked how far it came.
        self._appended_lsn = lsn + FIRST_RECORDS_MAX

    def _check_durable(self, act: str) -> None:
        """What is told or ordered, of whatever kind, rests on records that no power cut takes."""
        assert self.daemon is not None
        left = _replayed(self.disk.crash(random.Random(0), 0.0)).lsn
        known = self.daemon.engine.state.lsn
        self.model.checks += 1
        if left < known:
            raise Violation(f"{act}: State is of LSN {known}, the disk holds it up to {left}")

    def _take_reply(self, frame: bytes) -> None:
        reply = codec.decode_reply(frame)
        self.model.issued(reply.id, bytes(reply.result), is_ok=reply.ok)
        if reply.error is not None:
            self.model.refused(
                reply.id,
                reply.error.code,
                is_full=self._may_be_full(),
                is_stopping=self._is_stop_asked,
            )

    def _may_be_full(self) -> bool:
        """Tell whether there may be no room in the log for what a client asks.

        Half a segment is kept for what is to be recorded in any case, and more for each task that
        runs: in the smallest segments, which no configuration may ask for, that can be all.
        """
        assert self.daemon is not None
        if self.disk.capacity < AMPLE_BYTES or self.agenda.elapsed_ns < self._full_until_ns:
            return True
        segment_bytes = self.climate.segment_bytes
        kept = segment_bytes // 2 + KEPT_PER_ACTIVE_BYTES * len(self.daemon.engine.state.active)
        return kept + ASKED_BYTES_MAX > segment_bytes - HEADER_BYTES

    def _check_intent(self, one: SimAttempt) -> None:
        """At the start of a process its intent must be on the disk, whatever a power cut leaves."""
        if self._watch_dice.random() >= INTENTS_LOOKED_AT:
            return
        left = _replayed(self.disk.crash(random.Random(0), 0.0))
        task = left.tasks.get(one.start.task)
        run = task.run if task is not None else None
        self.model.check_intent(*one.key, run.attempt if run is not None else 0)


def _rows(daemon: Daemon) -> list[dict[str, Any]]:
    """Return all tasks, as `status` tells them."""
    rows: list[dict[str, Any]] = []
    cursor = 0
    for _ in range(1_000):
        page = daemon.ask("status", m.Status(limit=200, cursor=cursor))
        rows += page["tasks"]
        cursor = page["next"]
        if not cursor:
            break
    return rows


def _recovered(disk: MemoryDisk) -> tuple[int, bytes]:
    """Return LSN and image of what the log on a disk says."""
    state = _replayed(disk)
    return state.lsn, b"".join(image.chunks(state))


def _replayed(disk: MemoryDisk) -> State:
    """Recover a disk as a start does, up to its State; names are synced by that, nothing else."""
    disk.capacity = AMPLE_BYTES
    try:
        store = Store.open(ROOT, disk, has_threads=False)
        try:
            found = store.recover()
            return replay(found.chunks(), found.frames()).state
        finally:
            store.close()
    except Corrupt as refused:
        raise Violation(f"a crash is taken for damage: {refused.message}") from refused
