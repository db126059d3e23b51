"""The fork runner with real processes: clean context, whole trees, causes of death, checkpoints."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.core.port import (
    Control,
    Delete,
    Deliver,
    EndSeen,
    Forget,
    MarkSeen,
    Sighting,
    Start,
    StartSeen,
    TelemetrySeen,
)
from ckptd.runner.fork import ForkRunner
from tests.waiting import until

NOBODY = 65534


class Bench:
    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ck-", dir="/tmp"))
        self.root.chmod(0o755)
        self.state = self.root / "state"
        self.runner = self.make()
        self.seen: list[Sighting] = []

    def make(self) -> ForkRunner:
        self.runner = ForkRunner(str(self.state), str(self.root / "run"))
        return self.runner

    def start(self, *argv: str, task: int = 1, attempt: int = 1, **fields: Any) -> None:
        given: dict[str, Any] = {
            "env": {"PATH": "/usr/bin:/bin"}, "cwd": "/", "uid": os.getuid(), "gid": os.getgid(),
            "stdin": "", "umask": 0o022, "memory_bytes": 0, "epoch": 1, "deadline_ns": 0,
            "fresh": False, **fields,
        }  # fmt: skip
        self.runner.carry_out(Start(task=task, attempt=attempt, argv=argv, **given))

    def shell(self, script: str, **fields: Any) -> EndSeen:
        self.start("sh", "-c", script, **fields)
        return self.end_of(fields.get("task", 1), fields.get("attempt", 1))

    def wait_for(self, kind: type[Sighting], task: int = 1, attempt: int = 1) -> Sighting:
        def found() -> Sighting | None:
            self.seen += self.runner.poll()
            wanted = [one for one in self.seen if isinstance(one, kind)]
            return next((o for o in wanted if (o.task, o.attempt) == (task, attempt)), None)

        return until(found, every_s=0.001)

    def end_of(self, task: int = 1, attempt: int = 1) -> EndSeen:
        end = self.wait_for(EndSeen, task, attempt)
        assert isinstance(end, EndSeen)
        return end

    def start_of(self, task: int = 1, attempt: int = 1) -> StartSeen:
        start = self.wait_for(StartSeen, task, attempt)
        assert isinstance(start, StartSeen)
        return start

    def kinds(self) -> list[str]:
        return [type(one).__name__ for one in self.seen]

    def output(self, task: int = 1) -> list[str]:
        return (self.state / "output" / f"{task}.log").read_text().splitlines()

    def said(self, task: int = 1) -> list[str]:
        return [line for line in self.output(task) if not line.startswith("--- ckptd: ")]

    def close(self) -> None:
        for task in range(1, 10):
            self.runner.carry_out(Deliver(task, 1, signal.SIGKILL, tree=True))
        self.runner.close()
        shutil.rmtree(self.root, ignore_errors=True)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in {"Z", "X"}


# --- what the task wakes up in ------------------------------------------------------------------


GLIBCS_OWN = 0b11 << 31
"""Signals 32 and 33: nobody but glibc can set them, and make(1) hands them down ignored."""


def test_a_task_has_three_descriptors_and_default_signals(bench: Bench) -> None:
    bench.shell("ls /proc/self/fd | tr '\\n' ' '; echo; grep -E 'Sig(Blk|Ign)' /proc/self/status")

    descriptors, blocked, ignored = bench.said()
    assert descriptors.split() == ["0", "1", "2", "3"]  # 3 is what ls reads with
    assert int(blocked.split()[1], 16) == 0
    assert int(ignored.split()[1], 16) & ~GLIBCS_OWN == 0


def test_a_task_leads_its_own_session_below_a_supervisor_that_is_not_the_daemon(
    bench: Bench,
) -> None:
    bench.start("sleep", "1000")
    started = bench.start_of()

    def family() -> list[int]:
        """Parent, group, session; the child makes its own after it was told to have started."""
        fields = Path(f"/proc/{started.pid}/stat").read_text().rpartition(")")[2].split()
        return [int(field) for field in fields[1:4]]

    until(lambda: family() == [started.shim.pid, started.pid, started.pid])
    assert started.shim.pid != os.getpid()


def test_a_task_gets_its_umask_directory_input_and_a_sane_number_of_descriptors(
    bench: Bench, tmp_path: Path
) -> None:
    (tmp_path / "input").write_text("from a file\n")
    tmp_path.chmod(0o755)

    bench.shell(
        "umask; pwd; cat; ulimit -n; cat /proc/self/oom_score_adj",
        umask=0o077, cwd=str(tmp_path), stdin=str(tmp_path / "input"),
    )  # fmt: skip

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = 1_024 if hard == resource.RLIM_INFINITY else min(1_024, hard)
    assert bench.said()[:4] == ["0077", str(tmp_path), "from a file", str(soft)]


def test_an_environment_and_words_of_a_megabyte_arrive_whole(bench: Bench) -> None:
    big = "x" * 100_000
    env = {"PATH": "/usr/bin:/bin", **{f"BIG{n}": big for n in range(9)}}

    bench.shell('echo ${#BIG0} ${#BIG8} ${#1}"$2"', env=env)
    bench.start("sh", "-c", 'echo ${#BIG8} ${#1} "$2"', "sh", big, "ü \n x", task=2, env=env)
    bench.end_of(2)

    assert bench.said(1) == ["100000 100000 0"]
    assert bench.said(2) == ["100000 100000 ü ", " x"]


@pytest.mark.root
def test_as_root_a_task_becomes_its_user_and_owns_its_directory(bench: Bench) -> None:
    ended = bench.shell(
        "id -u; id -g; id -G; echo x > $CKPTD_DIR/stage/x && echo wrote; cat $CKPTD_OUTPUT",
        uid=NOBODY, gid=NOBODY,
    )  # fmt: skip

    assert bench.said()[:4] == [str(NOBODY)] * 3 + ["wrote"]
    assert ended.code != 0  # its output is written through a descriptor, it cannot reach the file
    assert (bench.state / "tasks/1").stat().st_uid == NOBODY


@pytest.mark.root
def test_a_task_of_another_user_keeps_none_of_the_groups_of_root() -> None:
    before = os.getgroups()
    os.setgroups([0, 4])
    bench = Bench()
    try:
        bench.shell("id -G", uid=NOBODY, gid=NOBODY)
        assert bench.said() == [str(NOBODY)]
    finally:
        bench.close()
        os.setgroups(before)


@pytest.mark.root
def test_the_signal_that_follows_the_supervisor_survives_the_change_of_user(bench: Bench) -> None:
    bench.start("sleep", "1000", uid=NOBODY, gid=NOBODY)
    started = bench.start_of()

    os.kill(started.shim.pid, signal.SIGKILL)

    until(lambda: not is_alive(started.pid))
    assert bench.end_of().cause == "lost"


# --- ends -----------------------------------------------------------------------------------------


def test_nothing_that_a_task_left_behind_survives_its_end(bench: Bench) -> None:
    ended = bench.shell(
        "cd $CKPTD_DIR; sleep 1000 & echo $! > a; setsid sleep 1000 & echo $! > b;"
        "(setsid sh -c 'sleep 1000 & echo $! > c' &); while [ ! -s c ]; do :; done; exit 7"
    )

    left = [int((bench.state / "tasks/1" / name).read_text()) for name in "abc"]
    assert (ended.cause, ended.code) == ("exit", 7)
    assert not any(map(is_alive, left))
    assert bench.shell("exit 8", attempt=2).code == 8  # the same supervisor goes on


def test_nothing_that_a_task_left_behind_survives_its_supervisor(bench: Bench) -> None:
    script = (
        "cd $CKPTD_DIR; (setsid sh -c 'sleep 1000 & echo $! > pid' &);"
        "while [ ! -s pid ]; do :; done; echo ready > ready; sleep 1000"
    )
    bench.start("sh", "-c", script)
    started = bench.start_of()
    directory = bench.state / "tasks/1"
    until((directory / "ready").exists)

    os.kill(started.shim.pid, signal.SIGKILL)

    assert bench.end_of().cause == "lost"
    assert not is_alive(int((directory / "pid").read_text()))


def test_exit_137_is_an_exit_and_kill_9_is_a_signal(bench: Bench) -> None:
    assert bench.shell("exit 137").cause == "exit"
    assert bench.shell("kill -9 $$", task=2).cause == "signal"


@pytest.mark.root
def test_a_task_over_its_memory_limit_is_told_from_one_that_was_killed(bench: Bench) -> None:
    if "memory" not in bench.runner.cgroup:
        pytest.skip("needs a memory controller")
    limit = 32 << 20
    hog = f"{sys.executable} -c 'len(b\"x\" * 10**9)'"

    culprit = bench.shell(f"exec {hog}", memory_bytes=limit)
    helper = bench.shell(f"{hog}; exit 0", memory_bytes=limit, task=2)
    by_hand = bench.shell("kill -9 $$", memory_bytes=limit, task=3)
    without = bench.shell("true", task=4)
    child = bench.shell(f"{hog}; exit $?", memory_bytes=limit, task=5)
    make = bench.shell(f"{hog}; exit 2", memory_bytes=limit, task=6)

    assert (culprit.cause, culprit.signal, culprit.code) == ("oom", signal.SIGKILL, 0)
    assert culprit.blame == "limit"
    assert (child.cause, child.code, child.blame) == ("oom", 128 + signal.SIGKILL, "limit")
    assert (make.cause, make.code, make.blame) == ("exit", 2, "limit")
    assert str(limit) in culprit.text
    assert (helper.cause, helper.code) == ("exit", 0)
    assert by_hand.cause == "signal"
    assert without.cause == "exit"


@pytest.mark.root
def test_memory_that_runs_out_around_a_task_is_not_its_own_doing(bench: Bench) -> None:
    found = re.search(r"v[12] (\S+) \([^)]*memory", bench.runner.cgroup)
    if found is None:
        pytest.skip("needs a memory controller")
    above, hog = Path(found[1]), f"exec {sys.executable} -c 'len(b\"x\" * 10**9)'"
    is_v1 = (above / "memory.limit_in_bytes").exists()
    limit = above / ("memory.limit_in_bytes" if is_v1 else "memory.max")
    limit.write_text(str(96 << 20))
    try:
        victim = bench.shell(hog)
        roomy = bench.shell(hog, task=2, memory_bytes=512 << 20)
    finally:
        limit.write_text("-1" if is_v1 else "max")

    assert [(end.cause, end.blame) for end in (victim, roomy)] == [("oom", "host")] * 2


def test_a_nice_task_steps_back_and_one_that_must_not_be_so_is_told(bench: Bench) -> None:
    bench.shell("nice", nice=7)
    assert bench.said() == ["7"]
    if os.geteuid() != 0:
        eager = bench.shell("nice", nice=-5, task=2)
        assert (eager.cause, eager.text) == (
            "spawn_error", "cannot set its niceness to -5: Permission denied",
        )  # fmt: skip


def test_a_limit_that_nothing_can_hold_is_told_at_the_start(bench: Bench) -> None:
    bench.runner.close()
    bench.runner = ForkRunner(str(bench.state), str(bench.root / "run"), has_cgroups=False)

    bench.shell("true", memory_bytes=1 << 30, cpus=1.5, io_weight=50)
    bench.shell("true", task=2)

    assert bench.start_of().warning == "not limited here: memory, cpus, io-weight"
    assert not bench.start_of(2).warning


def test_output_is_appended_over_attempts_with_a_line_for_each(bench: Bench) -> None:
    bench.shell("printf one; exit 1")
    bench.shell("echo two >&2", attempt=2)

    lines = bench.output()
    heads = [line.split()[2:5] for line in lines if line.startswith("--- ckptd: ")]
    assert heads == [["attempt", n, what] for n in "12" for what in ("started", "ended")]
    assert bench.said() == ["one", "two"]
    assert lines[2].endswith(", exit code 1 ---")


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"stdin": "/nonexistent"}, "open the input"), ({"argv0": "/etc/passwd"}, "execute")],
)
def test_why_a_task_could_not_start_is_told(
    bench: Bench, fields: dict[str, Any], text: str
) -> None:
    bench.start(fields.pop("argv0", "true"), **fields)

    ended = bench.end_of()

    assert ended.cause == "spawn_error"
    assert text in ended.text
    assert bench.output()[-1].endswith(f"{ended.text} ---")


# --- checkpoints, telemetry, control --------------------------------------------------------------

SAVE = "mkdir -p stage; echo {n} > stage/n; mv stage ckpt/{n}"


def test_what_was_saved_last_is_told_before_the_end(bench: Bench) -> None:
    bench.shell(f"cd $CKPTD_DIR; {SAVE.format(n=1)}")

    assert bench.kinds() == ["StartSeen", "MarkSeen", "EndSeen"]
    mark = bench.wait_for(MarkSeen)
    assert isinstance(mark, MarkSeen)
    assert mark.checkpoint == 1
    assert mark.cursor


def test_a_published_checkpoint_is_noticed_while_the_task_runs(bench: Bench) -> None:
    bench.start("sh", "-c", f"cd $CKPTD_DIR; {SAVE.format(n=5)}; sleep 1000")

    mark = bench.wait_for(MarkSeen)

    assert isinstance(mark, MarkSeen)
    assert mark.checkpoint == 5


def test_the_next_attempt_resumes_from_what_was_saved(bench: Bench) -> None:
    bench.shell(f"cd $CKPTD_DIR; {SAVE.format(n=3)}; kill -9 $$")
    script = 'echo "$CKPTD_RESUME $CKPTD_SEQ" $(cat "$CKPTD_LAST/n") "$@"'

    bench.start("sh", "-c", script, "sh", "{resume:--from {last}}", attempt=2)
    started = bench.start_of(attempt=2)
    bench.end_of(attempt=2)

    assert started.resumed_from == 3
    last = bench.state / "tasks/1/ckpt/3"
    assert bench.said() == [f"1 3 3 --from {last}"]
    assert any(", resumes from checkpoint 3 ---" in line for line in bench.output())


def test_a_damaged_checkpoint_without_another_blocks_the_start_and_says_why(bench: Bench) -> None:
    bench.shell(f"cd $CKPTD_DIR; {SAVE.format(n=1)}")
    (bench.state / "tasks/1/ckpt/1/n").write_text("changed afterwards\n")

    bench.shell("echo ran", attempt=2)

    assert bench.end_of(attempt=2).cause == "not_started"
    mark = bench.wait_for(MarkSeen, attempt=2)
    assert isinstance(mark, MarkSeen)
    assert mark.problem
    assert bench.said() == []


def test_a_fresh_start_does_not_resume(bench: Bench) -> None:
    bench.shell(f"cd $CKPTD_DIR; {SAVE.format(n=1)}")

    bench.shell("echo $CKPTD_RESUME", attempt=2, fresh=True)

    assert bench.said() == ["0"]


def test_what_was_saved_while_no_daemon_ran_is_told_on_adoption(bench: Bench) -> None:
    bench.start("sh", "-c", f"cd $CKPTD_DIR; read x < go; {SAVE.format(n=2)}", cwd="/")
    directory = bench.state / "tasks/1"
    bench.start_of()
    bench.runner.close()
    bench.seen.clear()
    (directory / "go.tmp").write_text("go\n")
    shutil.move(directory / "go.tmp", directory / "go")

    bench.make().adopt(1, 1)
    bench.end_of()

    kinds = bench.kinds()
    assert kinds[-1] == "EndSeen"


def test_a_notify_line_is_heard_and_the_last_one_comes_before_the_end(bench: Bench) -> None:
    bench.start("sleep", "1000")
    bench.start_of()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as task:
        task.connect(str(bench.root / "run/notify/1.sock"))
        task.send(b"PROGRESS=3/10\nSTATUS=on my way")
        heard = bench.wait_for(TelemetrySeen)
        task.send(b"STATUS=bye")
    bench.runner.carry_out(Deliver(1, 1, signal.SIGKILL, tree=False))
    bench.end_of()

    assert isinstance(heard, TelemetrySeen)
    assert (heard.done, heard.total, heard.text) == (3, 10, "on my way")
    assert bench.kinds() == ["StartSeen", "TelemetrySeen", "TelemetrySeen", "EndSeen"]
    assert not (bench.root / "run/notify/1.sock").exists()


def test_the_control_file_says_what_is_asked(bench: Bench) -> None:
    bench.start("sleep", "1000")
    bench.start_of()

    bench.runner.carry_out(Control(1, 1, "shutdown", 2_500_000_000, 4))

    asked = json.loads((bench.state / "tasks/1/control.json").read_text())
    assert asked == {"stop": "shutdown", "deadline": 2.5, "checkpoint": 4}


def test_forgotten_and_deleted_tasks_leave_nothing(bench: Bench) -> None:
    bench.shell("mkdir -p $CKPTD_DIR/stage/deep/er; ln -s / $CKPTD_DIR/stage/root")
    bench.runner.carry_out(Forget(1, 1))
    bench.runner.carry_out(Delete(1))

    def is_clean() -> bool:
        bench.runner.poll()
        left = ("tasks/1", "output/1.log", "attempts/1.1")
        return not any((bench.state / name).exists() for name in left)

    until(is_clean)
    assert Path("/etc").exists()


def test_many_attempts_go_through_few_supervisors(bench: Bench) -> None:
    for task in range(1, 61):
        bench.start("true", task=task)
    ended = [bench.end_of(task) for task in range(1, 61)]
    for task in range(61, 121):
        bench.start("true", task=task)
        ended.append(bench.end_of(task))

    assert all((end.cause, end.code) == ("exit", 0) for end in ended)
    later = {bench.start_of(task).shim.pid for task in range(61, 121)}
    assert len(later) <= 8
