"""What belongs to a tree that has no control group: all that came of it, and nothing else."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ckptd.runner.cgroup import Group, Roots
from ckptd.runner.identity import ticks_of
from ckptd.runner.stop import Tree
from tests.waiting import until


class Processes:
    """Real ones, dead at the end of the test."""

    def __init__(self, directory: str) -> None:
        self.directory = directory  # of this test alone: all of /proc is searched
        self._left = ExitStack()

    def of(self, task: int, attempt: int) -> int:
        """Start a process that carries the marks of an attempt."""
        env = {"CKPTD_DIR": f"{self.directory}/{task}", "CKPTD_ATTEMPT": str(attempt)}
        return self.begin("exec sleep 60", **env)

    def tree(self, main: tuple[int, int] = (0, 0), *, shim_ticks: int = 0) -> Tree:
        """Return the tree of attempt 2 of task 7."""
        marks = f"CKPTD_DIR={self.directory}/7", "CKPTD_ATTEMPT=2"
        group = Group(Roots(), "0.0")
        return Tree(group, main, (0, shim_ticks), tuple(mark.encode() for mark in marks))

    def begin(self, command: str, **env: str) -> int:
        """Start one in a session of its own."""
        made = subprocess.Popen(
            ["/bin/sh", "-c", command], env={"PATH": os.defpath, **env}, start_new_session=True
        )
        self._left.callback(made.wait)
        self._left.callback(made.kill)
        until(lambda: b"sh" not in executable(made.pid))
        return made.pid

    def close(self) -> None:
        self._left.close()


def executable(pid: int) -> bytes:
    with open(f"/proc/{pid}/comm", "rb") as file:
        return file.read()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(str(tmp_path))
    yield made
    made.close()


def test_a_process_that_carries_the_marks_is_found_wherever_it_went(processes: Processes) -> None:
    pid = processes.of(7, 2)
    assert processes.tree().members() == [(pid, ticks_of(pid))]


def test_the_same_attempt_of_another_task_is_left_alone(processes: Processes) -> None:
    processes.of(8, 2)
    assert processes.tree().is_empty()


def test_another_attempt_of_the_same_task_is_left_alone(processes: Processes) -> None:
    processes.of(7, 3)
    assert processes.tree().is_empty()


def test_what_is_older_than_the_attempt_is_none_of_it_though_it_carries_its_marks(
    processes: Processes,
) -> None:
    pid = processes.of(7, 2)
    assert processes.tree(shim_ticks=ticks_of(pid) + 1).is_empty()


def test_the_session_of_whoever_has_the_pid_of_the_main_process_now_is_left_alone(
    processes: Processes,
) -> None:
    pid = processes.begin("exec sleep 60")
    assert processes.tree((pid, ticks_of(pid))).members() == [(pid, ticks_of(pid))]
    assert processes.tree((pid, ticks_of(pid) - 1)).is_empty()


def test_what_descends_from_the_main_process_is_found_and_killed_whatever_sessions_it_made(
    processes: Processes,
) -> None:
    flee = "import os,time; [os.fork() or os.setsid() for _ in range(3)]; time.sleep(60)"
    pid = processes.begin(f'exec {sys.executable} -S -c "{flee}"')
    ours = processes.tree((pid, ticks_of(pid)))
    assert len(until(lambda: len(found := ours.members()) == 8 and found)) == 8
    ours.signal_all(signal.SIGKILL)
    until(ours.is_empty)
