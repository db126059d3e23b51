"""Damage that hostile tasks once did to the runner: to its supervisors, groups and descriptors."""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.core.port import Delete, Deliver, EndSeen, StartSeen
from ckptd.runner import attempt, identity, linux
from ckptd.runner.attempt import Order
from ckptd.runner.cgroup import Roots
from ckptd.runner.claims import Claims
from ckptd.runner.fork import ForkRunner
from ckptd.runner.instance import began_of, exit_of
from ckptd.runner.shim import Supervisor
from ckptd.runner.watch import Watch, Worker
from tests.unit.runner.test_fork import NOBODY, Bench
from tests.waiting import until

MOUNT = "$(grep -w cgroup2 /proc/self/mounts | cut -d' ' -f2 | head -1)"
OWN_GROUP = f"g={MOUNT}$(grep ^0:: /proc/self/cgroup | cut -d: -f3)"
ENDS_FIRST_THREAD = """
import ctypes, os, threading
threading.Thread(target=threading.Event().wait).start()
open(os.environ["CKPTD_DIR"] + "/{name}.tmp", "w").write(str(os.getpid()))
os.rename(os.environ["CKPTD_DIR"] + "/{name}.tmp", os.environ["CKPTD_DIR"] + "/{name}")
ctypes.CDLL(None).syscall({exit}, 0)
"""
EXIT_OF_ONE_THREAD = {"x86_64": 60}.get(os.uname().machine, 93)


class BareBench(Bench):
    """Without control groups."""

    def make(self) -> ForkRunner:
        state, run = str(self.state), str(self.root / "run")
        self.runner = ForkRunner(state, run, has_cgroups=False)
        return self.runner


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@pytest.fixture
def bare() -> Iterator[Bench]:
    made = BareBench()
    yield made
    made.close()


def needs_v2(bench: Bench) -> str:
    """Return where v2 is mounted."""
    if not bench.runner.cgroup.startswith("v2"):
        pytest.skip(f"needs a writable v2 hierarchy, there is: {bench.runner.cgroup}")
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return next(line.split()[1] for line in mounts if line.split()[2] == "cgroup2")


def pid_in(path: Path) -> int:
    return int(until(lambda: path.exists() and path.read_text().strip()) or 0)


def can_run(pid: int) -> bool:
    """Return whether any thread of it is alive."""
    states = []
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            states.append(stat.read_text().rpartition(")")[2].split()[0])
    return any(state not in {"Z", "X"} for state in states)


# --- two at once ----------------------------------------------------------------------------------


@pytest.mark.root
def test_a_descendant_that_left_the_group_does_not_outlive_a_lost_attempt(bench: Bench) -> None:
    needs_v2(bench)
    leave = f"echo $$ > {MOUNT}/cgroup.procs; echo $$ > $CKPTD_DIR/left; exec sleep 1000"
    env = {"PATH": "/usr/bin:/bin", "LEAVE": leave}
    bench.start("sh", "-c", 'setsid sh -c "$LEAVE" & sleep 1000', env=env)
    started = bench.start_of()
    left = pid_in(bench.state / "tasks/1/left")

    os.kill(started.shim.pid, signal.SIGKILL)

    assert bench.end_of().cause == "lost"
    assert not can_run(left)


def test_a_process_whose_first_thread_ended_does_not_outlive_a_lost_attempt(bare: Bench) -> None:
    code = ENDS_FIRST_THREAD.format(name="left", exit=EXIT_OF_ONE_THREAD)
    script = f"setsid {sys.executable} -c '{code}' & sleep 1000"
    bare.start("sh", "-c", script)
    started = bare.start_of()
    left = pid_in(bare.state / "tasks/1/left")
    until(lambda: (stat := identity.look(left)) and stat.state == b"Z")

    os.kill(started.shim.pid, signal.SIGKILL)

    assert bare.end_of().cause == "lost"
    assert not can_run(left)


def test_a_task_whose_first_thread_ended_can_be_killed(bare: Bench) -> None:
    code = ENDS_FIRST_THREAD.format(name="main", exit=EXIT_OF_ONE_THREAD)
    bare.start(sys.executable, "-c", code)
    main = bare.start_of().pid
    until(lambda: (stat := identity.look(main)) and stat.state == b"Z")

    bare.runner.carry_out(Deliver(1, 1, signal.SIGKILL, tree=True))

    assert bare.end_of().signal == signal.SIGKILL


# --- supervisors that do harm ---------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize(
    "harm",
    ["echo 1 > $g/cgroup.kill", "mkdir $g/below; sleep 1000 & exit 1"],
    ids=["killed from inside", "with a group below"],
)
def test_a_group_that_a_task_spoilt_does_not_kill_the_tasks_after_it(
    bench: Bench, harm: str
) -> None:
    needs_v2(bench)
    bench.shell(f"{OWN_GROUP}; {harm}")

    ends = [bench.shell("exit 0", task=task) for task in range(2, 6)]

    assert [(end.cause, end.code) for end in ends] == [("exit", 0)] * 4


def test_a_task_that_stops_its_supervisor_can_be_killed(bench: Bench) -> None:
    bench.start("sh", "-c", "kill -STOP $PPID; exec sleep 1000")
    shim = bench.start_of().shim.pid
    until(lambda: (stat := identity.look(shim)) and stat.is_stopped)

    bench.runner.carry_out(Deliver(1, 1, signal.SIGKILL, tree=True))

    assert bench.end_of().signal == signal.SIGKILL


@pytest.mark.root
def test_a_supervisor_that_cannot_go_on_does_not_keep_a_killed_attempt(bench: Bench) -> None:
    group = Path(needs_v2(bench)) / f"ckptd-frozen-{os.getpid()}"
    bench.start("sleep", "1000")
    shim = bench.start_of().shim.pid
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(shim))
        (group / "cgroup.freeze").write_text("1")
        until(lambda: "frozen 1" in (group / "cgroup.events").read_text())

        bench.runner.carry_out(Deliver(1, 1, signal.SIGKILL, tree=True))

        assert bench.end_of().cause == "lost"
    finally:
        until(lambda: not can_run(shim))
        until(lambda: "populated 0" in (group / "cgroup.events").read_text())
        group.rmdir()


def test_an_order_behind_a_stopped_warm_parent_can_be_killed(bench: Bench) -> None:
    bench.start("sleep", "1000")
    shim = identity.look(bench.start_of().shim.pid)
    assert shim is not None
    os.kill(shim.parent, signal.SIGSTOP)
    for task in (2, 3, 4):  # more than there are idle supervisors
        bench.start("sleep", "1000", task=task)

    for task in (2, 3, 4):
        bench.runner.carry_out(Deliver(task, 1, signal.SIGKILL, tree=True))

    assert {bench.end_of(task).cause for task in (2, 3, 4)} <= {"signal", "not_started"}


@pytest.fixture
def set_uid(tmp_path: Path) -> Iterator[str]:
    """A program that becomes root for whoever starts it; what it ran is ended afterwards."""
    place = Path(tempfile.mkdtemp(prefix="ck-", dir="/tmp"))
    place.chmod(0o755)
    program = Path(shutil.copy("/usr/bin/setpriv", place / "become"))
    program.chmod(0o4755)
    if os.statvfs(place).f_flag & os.ST_NOSUID:
        pytest.skip("needs a file system that knows set-uid")
    yield f"{program} --reuid=0 --regid=0 --clear-groups"
    for pid in identity.every_pid():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x00987\x00":
                os.kill(pid, signal.SIGKILL)
    shutil.rmtree(place)


@pytest.mark.root
def test_a_set_uid_leftover_does_not_turn_a_good_end_into_a_spawn_error(set_uid: str) -> None:
    root = tempfile.mkdtemp(prefix="ck-", dir="/tmp")
    attempts = f"{root}/attempts"
    os.mkdir(attempts)
    attempt.begin_reign(attempts, "token")
    for path in (root, attempts, f"{attempts}/spare"):
        os.chown(path, NOBODY, NOBODY)
    order = Order()
    order.task, order.attempt, order.reign, order.spare = 1, 1, "token", 1
    script = f"{set_uid} sleep 987 & until grep -q ^sleep /proc/$!/comm; do :; done; exit 0"
    order.programs, order.argv = (b"/bin/sh",), b"sh\0-c\0" + script.encode()
    order.env, order.cwd, order.stdin, order.output = b"PATH=/usr/bin:/bin", "/", "", f"{root}/log"
    order.umask, order.uid, order.gid, order.groups = 0o022, -1, -1, ()
    order.memory_bytes = order.resumed_from = 0
    order.cpus, order.tasks_max, order.io_weight, order.nice = 0.0, 0, 0, 0
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.send(order.pack())
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            near.close()
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            linux.adopt_orphans()
            Supervisor(far, attempts, "boot", Roots()).serve()  # type: ignore[arg-type]
        os._exit(0)
    far.close()
    near.settimeout(20)

    with near:
        assert near.recv(8_192)[:1] == b"S"
        told = attempt.checked(near.recv(8_192)[1:])
        os.waitpid(pid, 0)  # it does not take another attempt
    shutil.rmtree(root)

    ended = json.loads(told or b"{}")
    assert (ended["cause"], ended["code"]) == ("exit", 0)
    assert "not permitted" in ended["text"]


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_memory_limit_holds_whatever_the_task_before_left_in_a_tmpfs(bench: Bench) -> None:
    if "memory" not in bench.runner.cgroup:
        pytest.skip("needs a memory controller")
    fill = Path(f"/dev/shm/ckptd-fill-{os.getpid()}")
    hog = f"exec {sys.executable} -c 'len(b\"x\" * (128 << 20))'"
    try:
        filled = bench.shell(f"head -c 96M /dev/zero > {fill}")
        ends = [bench.shell(hog, task=task, memory_bytes=48 << 20) for task in (2, 3)]
    finally:
        fill.unlink()

    assert (filled.cause, filled.code) == ("exit", 0)
    assert [end.cause for end in ends] == ["oom", "oom"]


# --- what must not end the daemon -----------------------------------------------------------------


def test_a_directory_in_the_place_of_the_notify_socket_harms_nobody(bench: Bench) -> None:
    ended = bench.shell("rm $NOTIFY_SOCKET; mkdir $NOTIFY_SOCKET")

    assert ended.cause == "exit"
    assert bench.shell("exit 5", attempt=2).code == 5


def test_the_notify_socket_takes_no_descriptors(bench: Bench) -> None:
    if tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) < (6, 16):
        pytest.skip("needs SO_PASSRIGHTS of Linux 6.16")
    bench.start("sleep", "1000")
    bench.start_of()

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as task:
        task.connect(str(bench.root / "run/notify/1.sock"))
        with pytest.raises(PermissionError):
            socket.send_fds(task, [b"STATUS=hi"], [task.fileno()])


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Let every call that needs one fail with EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(int(name) for name in os.listdir("/proc/self/fd")) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("is_dead", [False, True], ids=["living", "dead"])
def test_want_of_descriptors_neither_ends_the_daemon_nor_a_living_attempt(
    bench: Bench, *, is_dead: bool
) -> None:
    bench.start("sleep", "1000")
    started = bench.start_of()
    bench.runner.close()
    bench.seen.clear()
    if is_dead:
        os.kill(started.shim.pid, signal.SIGKILL)
        until(lambda: not can_run(started.shim.pid))
    bench.make()
    with no_descriptors():
        bench.runner.adopt(1, 1)
        bench.runner.carry_out(Delete(9))
        bench.runner.carry_out(Deliver(1, 1, signal.SIGTERM, tree=False))
        until(lambda: not bench.runner._worker._waiting)
        bench.seen += bench.runner.poll()
    assert not [seen for seen in bench.seen if isinstance(seen, EndSeen)]

    if is_dead:
        assert bench.end_of().cause == "lost"
    else:
        assert bench.start_of().pid == started.pid
        assert isinstance(bench.wait_for(StartSeen), StartSeen)
        assert bench.end_of().signal == signal.SIGTERM


def test_refused_attempts_that_are_forgotten_leave_no_record_files(tmp_path: Path) -> None:
    claims = Claims(str(tmp_path), "boot")
    for number in range(1, 50):
        claims.refuse(1, number)
        claims.forget(1, number)

    assert len(os.listdir(tmp_path / "attempts/spare")) == 1


# --- the worker -----------------------------------------------------------------------------------


def test_a_job_that_takes_long_keeps_only_its_own_task_waiting() -> None:
    watch = Watch()
    worker = Worker(watch.wake)
    may_end, done = threading.Event(), list[int]()
    worker.submit(1, may_end.wait, lambda _: done.append(1))
    worker.submit(1, may_end.is_set, lambda after: done.append(10 + after))
    worker.submit(2, lambda: None, lambda _: done.append(2))

    until(lambda: (worker.settle(), done == [2])[1])
    may_end.set()
    until(lambda: (worker.settle(), len(done) == 3)[1])

    assert done == [2, 1, 11]
    worker.close()
    watch.close()


# --- what is left behind --------------------------------------------------------------------------


def test_the_notify_socket_of_a_task_that_ended_while_no_daemon_was_there_is_removed(
    bench: Bench,
) -> None:
    sockets = bench.root / "run" / "notify"
    bench.start("sh", "-c", "until [ -e go ]; do sleep 0.01; done", cwd=str(bench.root))
    bench.start_of()
    bench.runner.close()
    assert os.listdir(sockets) == ["1.sock"]
    (bench.root / "go").touch()
    claims = Claims(str(bench.state), identity.boot_id())
    until(lambda: (found := claims.read(1, 1)) is not None and found.exit)

    bench.make().adopt(1, 1)

    assert bench.end_of().cause == "exit"
    assert os.listdir(sockets) == []


def test_a_record_that_is_no_text_is_nothing_that_we_wrote() -> None:
    assert began_of(b'{"boot_id":"\xff"}') is None
    assert exit_of(b'{"text":"\xff"}') is None
