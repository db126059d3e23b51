"""The turn: whatever leaves the process is durable by then, as the disk has it."""

import io
import os
import random
from collections.abc import Iterator

import msgspec
import pytest

from ckptd.core.plan import wake_ns
from ckptd.core.policy import Now
from ckptd.core.port import Effect, EndSeen, Identity, StartSeen
from ckptd.core.records import Moved, Phase
from ckptd.core.state import State
from ckptd.daemon.ending import Ending
from ckptd.daemon.inhibitor import Inhibitor
from ckptd.daemon.main import Base, Edges, adopt, build, recover
from ckptd.daemon.readiness import Progress
from ckptd.daemon.recovery import replay
from ckptd.door.server import Incoming
from ckptd.door.zap import Access, Peer
from ckptd.host.clock import Clock
from ckptd.host.config import Config, Wal
from ckptd.host.journal import Journal, StreamSink
from ckptd.host.notify import Notify
from ckptd.host.paths import Paths
from ckptd.protocol import codec
from ckptd.protocol import messages as m
from ckptd.storage.store import Store
from tests.fakes.memory_disk import MemoryDisk
from tests.fakes.sim_runner import Plan, SimMachine, SimRunner

UID = os.geteuid()
NOWHERE = "/nonexistent/ckptd-loop"


def durable(disk: MemoryDisk) -> State:
    """Return the State that a power cut would leave at this moment, at least."""
    left = disk.crash(random.Random(1), keep=0.0)
    found = Store.open("/state", left, has_threads=False).recover()
    return replay(found.chunks(), found.frames()).state


class Door:
    """The daemon's end of the socket; at each reply it is noted what is durable."""

    def __init__(self, disk: MemoryDisk) -> None:
        self.disk = disk
        self.access = Access(UID, "")
        self.inbox: list[Incoming] = []
        self.told: dict[str, tuple[object, State]] = {}
        self._fd = os.eventfd(0)

    def fileno(self) -> int:
        return self._fd

    def ask(self, request_id: str, verb: str, args: m.Message) -> None:
        peer = Peer(UID, UID, 1)
        self.inbox.append(Incoming(peer, b"c", False, request_id, verb, args, 1))

    def pending(self) -> bool:
        return bool(self.inbox)

    def receive(self, limit: int) -> list[Incoming]:
        found, self.inbox = self.inbox[:limit], self.inbox[limit:]
        return found

    def send(self, request: Incoming, frame: bytes) -> None:
        reply = codec.decode_reply(frame)
        assert reply.ok, reply
        told = msgspec.json.decode(reply.result)
        self.told[request.request_id] = told, durable(self.disk)

    def look_at_path(self) -> None:
        pass

    def stats(self) -> dict[str, int]:
        return {}


class Wake:
    """No signals come."""

    stop_asked = reload_asked = False

    def __init__(self) -> None:
        self._fd = os.eventfd(0)

    def fileno(self) -> int:
        return self._fd

    def clear(self) -> None:
        return

    up = clear


class Runner(SimRunner):
    """At each order it is noted what is durable."""

    def __init__(self, disk: MemoryDisk) -> None:
        super().__init__(SimMachine(lambda _: Plan()))
        self.disk = disk
        self.ordered: list[tuple[Effect, State]] = []

    def carry_out(self, effect: Effect) -> None:
        self.ordered.append((effect, durable(self.disk)))
        super().carry_out(effect)


class SetClock(Clock):
    """The machine's clocks; the wall clock can be set, and time can go by."""

    ahead_ns = later_ns = 0

    def now(self) -> Now:
        now = super().now()
        return Now(now.at_ns + self.later_ns + self.ahead_ns, now.seed)

    def mono_ns(self) -> int:
        return super().mono_ns() + self.later_ns


class Life:
    """One daemon after another over one disk."""

    def __init__(self) -> None:
        self.disk = MemoryDisk()
        self.config = Config()
        self.begin()

    def begin(self) -> None:
        clock = self.clock = SetClock()
        journal = Journal(StreamSink(io.StringIO(), prefixed=True))
        notify = Notify({}, clock)
        paths = Paths("/state", NOWHERE, f"{NOWHERE}/ctl.sock")
        base = Base(
            self.config, None, paths, journal, notify, clock, "boot", Progress(notify, clock), 1
        )
        store = Store.open("/state", self.disk, has_threads=False)
        recovered = recover(base, store)
        self.engine = recovered.engine
        self.door, self.runner = Door(self.disk), Runner(self.disk)
        ending = Ending(self.engine, notify, journal, NOWHERE)
        adopted = adopt(base, self.engine, self.runner)
        edges = Edges(store, self.runner, self.door, Wake(), ending, Inhibitor(ending))  # type: ignore[arg-type]
        self.loop, self.requests = build(base, edges, recovered, adopted, clock.mono_ns())

    def close(self) -> None:
        self.loop.close()
        self.requests.close()
        self.runner.close()

    def die(self) -> None:
        self.close()
        self.disk = self.disk.crash(random.Random(1), keep=0.0)


@pytest.fixture
def life() -> Iterator[Life]:
    made = Life()
    yield made
    made.close()


def test_what_is_answered_is_durable_by_then(life: Life) -> None:
    life.door.ask("a", "submit", m.Submit((m.TaskSpec(("true",)),)))
    life.loop.turn()
    answer, known = life.door.told["a"]
    assert answer["ids"] == [1]  # type: ignore[index]
    assert known.tasks.get(1) is not None


def test_what_is_ordered_has_its_intent_by_then(life: Life) -> None:
    life.door.ask("a", "submit", m.Submit((m.TaskSpec(("true",)),)))
    life.loop.turn()
    ((start, known),) = life.runner.ordered
    task = known.tasks.get(start.task)
    assert task is not None
    assert task.run is not None, "started without an intent that survives"


def test_the_end_that_a_wait_tells_is_durable_by_then(life: Life) -> None:
    life.door.ask("a", "submit", m.Submit((m.TaskSpec(("true",)),)))
    life.loop.turn()
    life.door.ask("b", "wait", m.Wait(m.Selector(ids=(1,)), hold_s=60.0))
    life.loop.turn()
    assert "b" not in life.door.told
    life.runner.see(EndSeen(1, 1, "exit", 0))
    life.loop.turn()
    _, known = life.door.told["b"]
    task = known.tasks.get(1)
    assert task is not None
    assert task.phase.word == "succeeded"


@pytest.mark.parametrize("ahead_s", [50 * 365 * 86_400, -86_400])
def test_a_clock_that_is_set_hours_after_boot_kills_no_task_for_its_timeout(
    life: Life, ahead_s: int
) -> None:
    life.door.ask("a", "submit", m.Submit((m.TaskSpec(("true",), timeout_s=3_600.0),)))
    life.loop.turn()
    at_ns = life.clock.now().at_ns
    life.runner.see(StartSeen(1, 1, Identity("boot", 10, 10), 11, at_ns))
    life.loop.turn()
    life.clock.ahead_ns = ahead_s * 10**9
    life.loop.turn()
    task = life.engine.state.tasks.get(1)
    assert task is not None
    assert task.phase.word == "running"
    left_s = (wake_ns(life.engine.state) - life.clock.now().at_ns) / 1e9
    assert 0 < left_s <= 3_600


def test_a_clock_that_is_set_often_and_by_little_kills_no_task_for_its_timeout(life: Life) -> None:
    life.door.ask("a", "submit", m.Submit((m.TaskSpec(("true",), timeout_s=3_600.0),)))
    life.loop.turn()
    at_ns = life.clock.now().at_ns
    life.runner.see(StartSeen(1, 1, Identity("boot", 10, 10), 11, at_ns - 3_500 * 10**9))
    for _ in range(200):
        life.loop.turn()
        life.clock.ahead_ns += 9 * 10**8
    task = life.engine.state.tasks.get(1)
    assert task is not None
    assert task.phase.word == "running"


def test_a_clock_that_is_set_while_a_daemon_starts_stops_no_task_for_its_timeout(
    life: Life,
) -> None:
    """Nor is an end that came before then told as a timeout."""
    life.door.ask("a", "submit", m.Submit((m.TaskSpec(("true",), timeout_s=3_600.0),)))
    life.loop.turn()
    at_ns = life.clock.now().at_ns
    life.runner.see(StartSeen(1, 1, Identity("boot", 10, 10), 11, at_ns))
    life.loop.turn()
    life.die()
    life.begin()
    life.runner.poll()  # that it does not know this attempt
    life.clock.ahead_ns = 86_400 * 10**9
    life.loop.turn()
    life.runner.see(EndSeen(1, 1, "exit", 1, started_ns=at_ns, ended_ns=at_ns + 10**9))
    life.loop.turn()
    task = life.engine.state.tasks.get(1)
    assert task is not None
    assert task.run is not None
    assert task.run.past[-1].cause == "exit"


def test_each_start_of_the_daemon_has_a_greater_epoch(life: Life) -> None:
    epochs = []
    for _ in range(3):
        epochs.append(life.engine.state.epoch)
        life.die()
        life.begin()
    assert epochs == [1, 2, 3]


def test_the_log_of_many_short_reigns_is_cut_behind_snapshots(life: Life) -> None:
    life.config = Config(wal=Wal(snapshot_every_bytes=10_000))
    appended = []
    for reign in ("a", "b", "c"):
        life.die()
        life.begin()
        life.door.ask(reign, "submit", m.Submit((m.TaskSpec(("true", "x" * 5_000)),)))
        for _ in range(10):
            life.loop.turn()
        appended.append(life.engine.appended_bytes)
    assert max(appended) < 10_000, "no reign alone would be worth a snapshot"
    assert any(name.endswith(".snap") for name in life.disk.names("/state/snap"))


def fill(life: Life) -> None:
    """Fill the log, and leave the disk no room for another segment."""
    life.disk.capacity -= life.disk.free_bytes("/state")
    while life.engine.has_room():  # Bound: two segments
        life.engine.stage([Moved(1, 2, Phase.HELD, "x" * 100_000)])
        life.engine.commit()
    life.engine.orders()


def test_a_queued_task_does_not_wait_for_a_call_where_room_was_made_right_after_the_plan(
    life: Life,
) -> None:
    """Room comes after the plan found none, and before the look at the disk that ends the turn."""
    life.door.ask("a", "submit", m.Submit((m.TaskSpec(("true",), hold=True),)))
    life.door.ask("b", "group_set", m.GroupSet("g", paused=True))
    life.door.ask("c", "submit", m.Submit((m.TaskSpec(("true",), group="g"),)))
    life.loop.turn()
    fill(life)
    life.clock.later_ns += 10**10
    life.door.ask("d", "group_set", m.GroupSet("g", paused=False))
    life.loop.turn()
    life.clock.later_ns += 10**10  # the idle mark is written, behind the plan, and nothing else
    life.disk.watch = lambda kind, _: make_room(life.disk) if kind == "write" else None
    life.loop.turn()
    assert life.runner.ordered == [], "the plan found no room"
    assert life.loop.rest_s() == 0.0, "the loop sleeps, and nobody wakes it"
    life.loop.turn()
    assert [effect.task for effect, _ in life.runner.ordered] == [2]


def make_room(disk: MemoryDisk) -> None:
    disk.capacity = 1 << 40
