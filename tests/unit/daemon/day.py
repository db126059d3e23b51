"""A `Day`: a daemon without its socket, over a real engine and log and a simulated machine."""

import io
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.core.decide import Case, decide
from ckptd.core.plan import Adopt, adoption
from ckptd.core.policy import Caller, Now, Policy
from ckptd.core.port import Start
from ckptd.core.records import Phase
from ckptd.core.state import State, Task
from ckptd.daemon.ending import STOPPING_FLAG, Ending
from ckptd.daemon.engine import Engine
from ckptd.daemon.readiness import Progress, Readiness
from ckptd.host.clock import Clock
from ckptd.host.journal import Journal, StreamSink
from ckptd.host.notify import Notify
from ckptd.protocol import messages as m
from ckptd.storage.disk import RealDisk
from ckptd.storage.store import Store
from tests.fakes.sim_runner import SIGTERM, Plan, SimMachine, SimRunner

ROOT = Caller(0, 0, admin=True)
SECOND = 1_000_000_000
GRACE_S = 5.0


def script(start: Start) -> Plan:
    """Run until told; `deaf` lives through the stop signal."""
    return Plan(ignores=(SIGTERM,)) if start.argv[0] == "deaf" else Plan()


class Day:
    """A daemon without a socket: engine, ending, readiness, the manager it talks to, a machine."""

    def __init__(self, directory: Path, manager: socket.socket) -> None:
        self.directory, self.manager = directory, manager
        self._store = Store.open(str(directory / "state"), RealDisk(), segment_bytes=8 << 20)
        wal = self._store.arm(self._store.recover(), epoch=1, boot_id="b", at_ns=1)
        self.engine = Engine(State(), wal, Policy(slots=8))
        self.machine = SimMachine(script)
        self.at_ns = SECOND
        self.notify = Notify(os.environ, Clock())
        self.runner = SimRunner(self.machine)
        self.restart()

    def restart(self) -> None:
        """Begin the next daemon's life: it adopts."""
        self.runner.close()
        self.runner = SimRunner(self.machine)
        self.engine.observed.instances.clear()
        self.engine.draining = False
        journal = Journal(StreamSink(io.StringIO(), prefixed=True))
        self.ending = Ending(self.engine, self.notify, journal, str(self.directory))
        orders = adoption(self.engine.state, self.engine.observed, Now(self.at_ns))
        for order in orders:
            self.runner.adopt(order.task, order.attempt)
        keys = [(order.task, order.attempt) for order in orders]
        self.readiness = Readiness(self.runner, Progress(self.notify, Clock()), keys)

    def close(self) -> None:
        self.runner.close()
        self.notify.close()
        self._store.close()

    def turn(self, *, after_s: float = 0.0) -> None:
        """One turn as in `loop.py`, then the machine goes one step on."""
        self.at_ns += int(after_s * SECOND)
        now, engine = Now(self.at_ns), self.engine
        self.machine.now_ns = self.at_ns
        news = self.runner.poll()
        for seen in news:
            engine.see(seen, now)
        self.readiness.hear(news)
        self.ending.drive(now)
        engine.plan(now)
        engine.commit()
        for order in engine.orders():
            if isinstance(order, Adopt):
                self.runner.adopt(order.task, order.attempt)
            else:
                self.runner.carry_out(order)
        self.readiness.look()
        self.machine.advance()

    def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(20):
            if condition():
                return
            self.turn()
        raise AssertionError("it does not come to that")

    def ask(self, command: m.Message) -> m.Answer:
        case = Case(self.engine.state, ROOT, Now(self.at_ns), self.engine.policy)
        records, answer = decide(case, command)
        self.engine.stage(records)
        return answer

    def running(self, command: str = "sleep") -> int:
        """Submit a task and see it start."""
        spec = m.TaskSpec((command, "9"), grace_s=GRACE_S)
        answer = self.ask(m.Submit((spec,)))
        assert isinstance(answer, m.Submitted)
        (number,) = answer.ids
        self.until(lambda: self.task(number).phase is Phase.RUNNING)
        return number

    def task(self, number: int) -> Task:
        task = self.engine.state.tasks.get(number)
        assert task is not None
        return task

    def go_down(self) -> None:
        (self.directory / STOPPING_FLAG).touch()

    def heard(self) -> list[str]:
        """What the manager was told since the last look."""
        said = []
        while True:  # Bound: nobody else sends
            try:
                said.append(self.manager.recv(4_096, socket.MSG_DONTWAIT).decode())
            except BlockingIOError:
                return said

    def extended_s(self) -> list[float]:
        lines = [line for line in self.heard() if line.startswith("EXTEND")]
        return [int(line.partition("=")[2]) / 1e6 for line in lines]


@pytest.fixture
def day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Day]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
        found = Day(tmp_path, manager)
        yield found
        found.close()
