"""SIGKILL between any two system calls of the start and end protocol: one instance, no more.

The supervisor and the daemon are real processes, traced so that they can be stopped and killed
before each system call that they make (`tests/stepping.py`).
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from ckptd.core.port import Deliver, EndSeen, Forget, Identity, Sighting, Start, StartSeen
from ckptd.runner.fork import ForkRunner
from tests.stepping import Stepped
from tests.waiting import until

ROOT = Path(__file__).resolve().parent.parent.parent

# Says that it runs; complains if the attempt before it still does. The helper outlives the shell.
SCRIPT = """
cd "$WORK/$CKPTD_TASK_ID"
for pid in $(cat pids 2>/dev/null); do
    if grep -qs '^State:.[RSDTt]' "/proc/$pid/status"; then echo "$pid" >> overlap; fi
done
sleep 30 &
echo "$$ $!" >> pids
echo "$CKPTD_ATTEMPT" >> runs
"""

DRIVER = """
import os, select, sys
from ckptd.core.port import Start, StartSeen
from ckptd.runner.fork import ForkRunner
root, task = sys.argv[1], int(sys.argv[2])
runner = ForkRunner(root + "/state", root + "/run")
env = {"PATH": "/usr/bin:/bin", "WORK": root}
start = Start(task, 1, ("sh", "-c", sys.argv[3]), env, "/", os.getuid(), os.getgid(), "", 0o22,
              0, 1, 0, False)
print("ready", flush=True)
sys.stdin.readline()
runner.carry_out(start)
ready = select.poll()
ready.register(runner.fileno(), select.POLLIN)
while not any(isinstance(seen, StartSeen) for seen in runner.poll()):
    ready.poll()
print("done", flush=True)
sys.stdin.readline()
"""


class Bench:
    """A state directory, the runner that reigns over it, and what tasks left in their places."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ck-", dir="/tmp"))
        self.root.chmod(0o755)
        self.runner: ForkRunner | None = None
        self.seen: list[Sighting] = []

    def begin(self, boot_id: str = "") -> ForkRunner:
        self.runner = ForkRunner(f"{self.root}/state", f"{self.root}/run", boot_id=boot_id)
        return self.runner

    def start(self, task: int, attempt: int, script: str = SCRIPT) -> None:
        assert self.runner is not None
        (self.root / str(task)).mkdir(exist_ok=True)
        env = {"PATH": "/usr/bin:/bin", "WORK": str(self.root)}
        argv = ("sh", "-c", script)
        uid, gid = os.getuid(), os.getgid()
        self.runner.carry_out(
            Start(task, attempt, argv, env, "/", uid, gid, "", 0o022, 0, 1, 0, False)
        )

    def wait_for(self, kind: type[Sighting], task: int, attempt: int) -> Sighting:
        def found() -> Sighting | None:
            assert self.runner is not None
            self.seen += self.runner.poll()
            wanted = [one for one in self.seen if isinstance(one, kind)]
            return next((o for o in wanted if (o.task, o.attempt) == (task, attempt)), None)

        return until(found, every_s=0.001)

    def end_of(self, task: int, attempt: int) -> EndSeen:
        end = self.wait_for(EndSeen, task, attempt)
        assert isinstance(end, EndSeen)
        return end

    def start_of(self, task: int, attempt: int) -> StartSeen:
        start = self.wait_for(StartSeen, task, attempt)
        assert isinstance(start, StartSeen)
        return start

    def lines(self, task: int, name: str) -> list[str]:
        path = self.root / str(task) / name
        return path.read_text().split() if path.exists() else []

    def close(self) -> None:
        if self.runner is not None:
            self.runner.close()
        shutil.rmtree(self.root, ignore_errors=True)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def idle_supervisors(runner: ForkRunner) -> list[int]:
    """Return the children of the warm parent, by the file that every one of them has open."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                command = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                name = Path(f"/proc/{entry}/comm").read_text().strip()
            except OSError:
                continue
            if name == "ckptd-shim" and os.fsencode(runner.state_dir) in command:
                found.append(int(entry))
    return found


def check_one_instance(bench: Bench, task: int, end: EndSeen) -> None:
    """After the first attempt's end is told, a second one runs alone and to its end."""
    runs_before = bench.lines(task, "runs")
    bench.start(task, 2)
    second = bench.end_of(task, 2)
    runs = bench.lines(task, "runs")

    assert (second.cause, second.code) == ("exit", 0)
    assert not bench.lines(task, "overlap"), f"overlap after {end}"
    assert runs.count("1") <= 1
    assert runs == [*runs_before, "2"], f"the first attempt went on after {end}"
    if end.cause == "exit":
        assert runs_before == ["1"]
    if end.cause == "not_started":
        assert runs_before == []


def test_a_supervisor_killed_before_any_of_its_system_calls_leaves_one_instance(
    bench: Bench,
) -> None:
    runner = bench.begin()
    first, spare = until(lambda: len(found := idle_supervisors(runner)) == 2 and found) or (0, 0)
    os.kill(spare, signal.SIGKILL)
    until(lambda: (runner.poll(), idle_supervisors(runner) == [first])[1])
    pid, causes = first, set()
    for step in range(200):  # Bound: the protocol is shorter
        with Stepped(pid) as supervisor:
            bench.start(step, 1)
            is_stopped = supervisor.run_to(step, partial(has_ended, bench, step))
            if is_stopped:
                supervisor.kill()
        end = bench.end_of(step, 1)
        causes.add(end.cause)
        if not is_stopped:
            break
        check_one_instance(bench, step, end)
        pid = bench.start_of(step, 2).shim.pid
    else:
        pytest.fail("the supervisor never came to the end of an attempt")

    assert causes == {"lost", "exit"}  # before it has the claim, another one takes its place


def has_ended(bench: Bench, task: int) -> bool:
    """Return whether the end was told: the supervisor is through."""
    assert bench.runner is not None
    bench.seen += bench.runner.poll()
    return any(isinstance(one, EndSeen) and one.task == task for one in bench.seen)


def test_a_daemon_killed_before_any_of_its_system_calls_leaves_one_instance(bench: Bench) -> None:
    causes = set()
    for step in range(0, 400, 4):  # Bound: a start makes fewer calls
        (bench.root / str(step)).mkdir()
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(bench.root), str(step), SCRIPT],
            env={"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert driver.stdin is not None
        assert driver.stdout is not None
        with driver.stdin, driver.stdout:
            assert driver.stdout.readline() == b"ready\n"
            with Stepped(driver.pid) as daemon:
                driver.stdin.write(b"go\nend\n")
                driver.stdin.flush()
                if daemon.run_to(step, lambda: False):
                    daemon.kill()
            driver.returncode = -signal.SIGKILL  # the tracer reaped it
            is_done = driver.stdout.readline() == b"done\n"
        runner = bench.begin()
        runner.adopt(step, 1)
        end = bench.end_of(step, 1)
        causes.add(end.cause)
        check_one_instance(bench, step, end)
        runner.carry_out(Forget(step, 1))
        runner.carry_out(Forget(step, 2))
        runner.close()
        if is_done:
            break
    else:
        pytest.fail("the daemon never came to the end of a start")

    assert causes >= {"not_started", "exit"}


def test_a_killed_warm_parent_harms_no_task_and_is_replaced(bench: Bench) -> None:
    runner = bench.begin()
    bench.start(1, 1, "exec sleep 1000")
    started = bench.start_of(1, 1)
    parent = parent_of(started.shim.pid)

    os.kill(parent, signal.SIGKILL)
    for task in range(2, 8):  # more than there are idle supervisors
        bench.start(task, 1, "exec sleep 1000")
    for task in range(2, 8):
        bench.start_of(task, 1)
    for task in range(1, 8):
        runner.carry_out(Deliver(task, 1, signal.SIGTERM, tree=True))

    ends = [bench.end_of(task, 1) for task in range(1, 8)]
    assert [(end.cause, end.signal) for end in ends] == [("signal", signal.SIGTERM)] * 7


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_everything_killed_and_another_boot_is_a_reboot(bench: Bench) -> None:
    runner = bench.begin("boot-one")
    bench.start(1, 1, "exec sleep 1000")
    started = bench.start_of(1, 1)
    assert started.shim == Identity("boot-one", started.shim.pid, started.shim.ticks)
    runner.close()
    os.kill(started.shim.pid, signal.SIGKILL)
    os.kill(started.pid, signal.SIGKILL)
    bench.seen.clear()

    bench.begin("boot-two").adopt(1, 1)

    end = bench.end_of(1, 1)
    assert (end.cause, end.started_ns) == ("reboot", started.at_ns)


def test_an_order_that_lies_unread_when_the_daemon_dies_is_never_carried_out(bench: Bench) -> None:
    runner = bench.begin()
    supervisors = until(lambda: len(found := idle_supervisors(runner)) == 2 and found) or []
    for pid in supervisors:
        os.kill(pid, signal.SIGSTOP)
    bench.start(1, 1)
    runner.close()
    successor = bench.begin()
    successor.adopt(1, 1)
    assert bench.end_of(1, 1).cause == "not_started"
    successor.carry_out(Forget(1, 1))  # from here on nothing but the reign holds the order back

    for pid in supervisors:
        os.kill(pid, signal.SIGCONT)
    until(lambda: not set(supervisors) & set(idle_supervisors(runner)))

    assert bench.lines(1, "runs") == []
