"""What every runner owes the daemon. One suite, run against the real one and the simulated one."""

import errno
import os
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from ckptd.core.port import (
    Control,
    Delete,
    Deliver,
    EndSeen,
    Forget,
    Freeze,
    Runner,
    Sighting,
    Start,
    StartSeen,
)
from ckptd.runner.fork import ForkRunner
from ckptd.units.bus import system_bus, user_bus
from ckptd.units.runner import UnitRunner
from tests.fakes.sim_runner import SimMachine, SimRunner
from tests.waiting import until

S = TypeVar("S")
NEVER_ENDS = ("sleep", "1000")


class World:
    """A runner under test, and what a test can do to the machine below it."""

    runner: Runner

    def __init__(self) -> None:
        self.seen: list[Sighting] = []

    def start(self, *argv: str, task: int = 1, attempt: int = 1, **fields: Any) -> None:
        given: dict[str, Any] = {
            "env": {"PATH": "/usr/bin:/bin"}, "cwd": "/", "uid": os.getuid(), "gid": os.getgid(),
            "stdin": "", "umask": 0o022, "memory_bytes": 0, "epoch": 1, "deadline_ns": 0,
            "fresh": False, **fields,
        }  # fmt: skip
        self.runner.carry_out(Start(task=task, attempt=attempt, argv=argv, **given))

    def wait_for(self, kind: type[S], task: int = 1, attempt: int = 1) -> S:
        """Return the first sighting of this kind that was not returned before."""

        def found() -> S | None:
            self.seen += self.runner.poll()
            for index, one in enumerate(self.seen):
                is_it = isinstance(one, kind) and (one.task, one.attempt) == (task, attempt)
                if is_it:
                    del self.seen[index]
                    return one  # type: ignore[return-value]
            return None

        result = until(found, every_s=0.001)
        assert result is not None
        return result

    def run(self, *argv: str, **fields: Any) -> EndSeen:
        self.start(*argv, **fields)
        self.wait_for(StartSeen)
        return self.wait_for(EndSeen)

    def restart(self) -> None:
        """Crash the daemon; the next one has a runner of its own."""
        raise NotImplementedError

    def kill_supervisor(self, started: StartSeen) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.runner.close()


class RealWorld(World):
    has_cgroups = True

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp(prefix="ck-", dir="/tmp")
        os.chmod(self.root, 0o755)
        self.runner = self.make()

    def make(self) -> Runner:
        state, run = f"{self.root}/state", f"{self.root}/run"
        return ForkRunner(state, run, has_cgroups=self.has_cgroups)

    def restart(self) -> None:
        self.runner.close()
        self.runner = self.make()
        self.seen.clear()

    def kill_supervisor(self, started: StartSeen) -> None:
        os.kill(started.shim.pid, signal.SIGKILL)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.root, ignore_errors=True)


class WorldWithoutCgroups(RealWorld):
    has_cgroups = False


class UnitWorld(RealWorld):
    """Transient units of the booted service manager: system as root, else the user's own."""

    def __init__(self) -> None:
        if not os.path.isdir("/run/systemd/system"):
            pytest.skip("systemd is not running here; make test-systemd boots one")
        super().__init__()

    def make(self) -> Runner:
        state, run = f"{self.root}/state", f"{self.root}/run"
        is_system = os.getuid() == 0
        address = system_bus() if is_system else user_bus()
        return UnitRunner(state, run, bus_address=address, is_system=is_system)

    def close(self) -> None:
        super().close()
        mode = "--system" if os.getuid() == 0 else "--user"
        for verb in ("stop", "reset-failed"):
            command = ["systemctl", mode, verb, "ckptd-task-*.service"]
            subprocess.run(command, check=False, capture_output=True)

    def kill_supervisor(self, started: StartSeen) -> None:
        pytest.skip("the supervisor is the service manager: nobody kills it")


class SimulatedWorld(World):
    def __init__(self) -> None:
        super().__init__()
        self.machine = SimMachine()
        self.runner = SimRunner(self.machine, is_automatic=True)

    def restart(self) -> None:
        self.runner.close()
        self.machine.crash_daemon()
        self.runner = SimRunner(self.machine, is_automatic=True)
        self.seen.clear()

    def kill_supervisor(self, started: StartSeen) -> None:
        self.machine.kill_supervisor(started.task, started.attempt)


@pytest.fixture(
    params=[RealWorld, WorldWithoutCgroups, UnitWorld, SimulatedWorld],
    ids=["fork", "fork, no cgroup", "unit", "sim"],
)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    make: Callable[[], World] = request.param
    made = make()
    yield made
    for one in (1, 2, 3):
        made.runner.carry_out(Deliver(1, one, signal.SIGKILL, tree=True))
    made.runner.poll()
    made.close()


def test_a_task_is_seen_to_start_and_to_end(world: World) -> None:
    world.start("true")

    started = world.wait_for(StartSeen)
    ended = world.wait_for(EndSeen)

    assert started.pid > 0
    assert started.shim.pid != started.pid
    assert (ended.cause, ended.code, ended.signal) == ("exit", 0, 0)
    assert ended.started_ns == started.at_ns <= ended.ended_ns


def test_the_exit_code_is_told(world: World) -> None:
    ended = world.run("sh", "-c", "exit 3")

    assert (ended.cause, ended.code) == ("exit", 3)


def test_the_signal_that_ended_a_task_is_told(world: World) -> None:
    ended = world.run("sh", "-c", "kill -9 $$")

    assert (ended.cause, ended.signal) == ("signal", signal.SIGKILL)


@pytest.mark.parametrize(
    ("argv", "fields"),
    [(("/nonexistent/program",), {}), (("true",), {"cwd": "/nonexistent"})],
    ids=["no such program", "no such directory"],
)
def test_what_cannot_be_started_ends_with_the_reason(
    world: World, argv: tuple[str, ...], fields: dict[str, Any]
) -> None:
    world.start(*argv, **fields)

    ended = world.wait_for(EndSeen)

    assert (ended.cause, ended.code) == ("spawn_error", errno.ENOENT)
    assert "/nonexistent" in ended.text


def test_a_second_start_of_the_same_attempt_runs_nothing(world: World) -> None:
    world.start(*NEVER_ENDS)
    world.wait_for(StartSeen)

    world.start(*NEVER_ENDS)
    world.runner.carry_out(Deliver(1, 1, signal.SIGTERM, tree=False))

    world.wait_for(EndSeen)
    assert not [one for one in world.seen if isinstance(one, StartSeen)]


@pytest.mark.parametrize("tree", [False, True])
def test_a_signal_ends_a_running_task(world: World, *, tree: bool) -> None:
    world.start(*NEVER_ENDS)
    world.wait_for(StartSeen)

    world.runner.carry_out(Deliver(1, 1, signal.SIGTERM, tree))

    assert world.wait_for(EndSeen).signal == signal.SIGTERM


def test_a_signal_that_comes_before_the_start_is_not_lost(world: World) -> None:
    world.start(*NEVER_ENDS)
    world.runner.carry_out(Deliver(1, 1, signal.SIGTERM, tree=False))

    assert world.wait_for(EndSeen).signal == signal.SIGTERM


def test_what_is_asked_of_an_attempt_that_is_not_there_is_done_already(world: World) -> None:
    world.run("true")

    for attempt in (1, 2):
        world.runner.carry_out(Deliver(1, attempt, signal.SIGKILL, tree=True))
        world.runner.carry_out(Freeze(1, attempt, frozen=True))
        world.runner.carry_out(Control(1, attempt, "cancel", 0, 0))
        world.runner.carry_out(Forget(1, attempt))
        world.runner.carry_out(Forget(1, attempt))
    world.runner.carry_out(Delete(1))

    assert not [one for one in world.runner.poll() if isinstance(one, EndSeen)]


def test_a_frozen_task_that_is_asked_to_stop_hears_it(world: World) -> None:
    world.start(*NEVER_ENDS)
    world.wait_for(StartSeen)
    world.runner.carry_out(Freeze(1, 1, frozen=True))
    world.runner.carry_out(Deliver(1, 1, signal.SIGTERM, tree=False))

    world.runner.carry_out(Control(1, 1, "cancel", 0, 0))

    assert world.wait_for(EndSeen).signal == signal.SIGTERM


def test_a_frozen_task_can_be_killed(world: World) -> None:
    world.start(*NEVER_ENDS)
    world.wait_for(StartSeen)
    world.runner.carry_out(Freeze(1, 1, frozen=True))

    world.runner.carry_out(Deliver(1, 1, signal.SIGKILL, tree=True))

    assert world.wait_for(EndSeen).signal == signal.SIGKILL


def test_a_thawed_task_goes_on_and_the_next_attempt_is_not_frozen(world: World) -> None:
    world.start(*NEVER_ENDS)
    world.wait_for(StartSeen)
    world.runner.carry_out(Freeze(1, 1, frozen=True))
    world.runner.carry_out(Freeze(1, 1, frozen=False))
    world.runner.carry_out(Freeze(1, 1, frozen=True))
    world.runner.carry_out(Deliver(1, 1, signal.SIGKILL, tree=True))
    world.wait_for(EndSeen)

    world.start("sh", "-c", "exit 4", attempt=2)

    assert world.wait_for(EndSeen, attempt=2).code == 4


def test_a_running_attempt_is_adopted_with_its_identity(world: World) -> None:
    world.start(*NEVER_ENDS)
    before = world.wait_for(StartSeen)

    world.restart()
    world.runner.adopt(1, 1)
    after = world.wait_for(StartSeen)
    world.runner.carry_out(Deliver(1, 1, signal.SIGTERM, tree=True))

    assert (after.shim, after.pid, after.at_ns) == (before.shim, before.pid, before.at_ns)
    assert world.wait_for(EndSeen).signal == signal.SIGTERM


def test_an_end_that_the_daemon_missed_is_told_to_the_next_one(world: World) -> None:
    ended = world.run("sh", "-c", "exit 5")

    world.restart()
    world.runner.adopt(1, 1)

    assert world.wait_for(EndSeen) == ended


def test_an_attempt_that_nobody_ran_is_refused_for_ever(world: World) -> None:
    world.runner.adopt(1, 1)
    assert world.wait_for(EndSeen).cause == "not_started"

    world.start("true")
    world.restart()
    world.runner.adopt(1, 1)

    assert world.wait_for(EndSeen).cause == "not_started"


def test_an_attempt_whose_supervisor_is_killed_is_lost_and_the_next_one_runs(world: World) -> None:
    world.start(*NEVER_ENDS)
    world.kill_supervisor(world.wait_for(StartSeen))
    assert world.wait_for(EndSeen).cause == "lost"

    world.start("sh", "-c", "exit 6", attempt=2)

    assert world.wait_for(EndSeen, attempt=2).code == 6


def test_the_death_of_an_adopted_supervisor_is_noticed(world: World) -> None:
    world.start(*NEVER_ENDS)
    world.wait_for(StartSeen)
    world.restart()
    world.runner.adopt(1, 1)

    world.kill_supervisor(world.wait_for(StartSeen))

    assert world.wait_for(EndSeen).cause == "lost"


def test_the_descriptor_is_readable_when_there_is_news(world: World) -> None:
    world.start(*NEVER_ENDS)
    world.wait_for(StartSeen)
    poll = select.poll()
    poll.register(world.runner.fileno(), select.POLLIN)

    world.runner.carry_out(Deliver(1, 1, signal.SIGKILL, tree=True))

    assert poll.poll(5_000)
    assert world.wait_for(EndSeen)
