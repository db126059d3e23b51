"""The machine, or the user, has no process left for a while: nothing is lost by that.

Each life is that of a process whose user has no other ones: the kernel counts by user, and never
refuses root.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptd.core.retry import SPAWN_TRANSIENT
from tests.unit.runner.test_fork import Bench
from tests.waiting import until

USER = 64_321
READS_ALL = "dac_read_search"  # the interpreter and this file may be root's own
ROOT_DIR = Path(__file__).parents[3]


def told_by_a_user_of_its_own(life: Callable[[], None]) -> str:
    """Return what went wrong in a life, "" for nothing."""
    become: list[str] = []
    if os.getuid() == 0:
        if (setpriv := shutil.which("setpriv")) is None:
            pytest.skip("needs setpriv")
        user = [f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
        become = [setpriv, *user, f"--inh-caps=+{READS_ALL}", f"--ambient-caps=+{READS_ALL}"]
    script = f"from {__name__} import {life.__name__}; {life.__name__}()"
    command = [*become, sys.executable, "-c", script]
    ran = subprocess.run(command, cwd=ROOT_DIR, capture_output=True, text=True, check=False)
    return ran.stderr or f"exit {ran.returncode}" if ran.returncode else ""


@contextmanager
def with_no_spare_supervisor() -> Iterator[Bench]:
    """Tasks 1 and 2 are run by those that were made beforehand."""
    bench = Bench()
    try:
        for task in (1, 2):
            bench.start("sleep", "1000", task=task)
            bench.start_of(task)
        yield bench
    finally:
        bench.close()


@contextmanager
def no_process_left(*pids: int) -> Iterator[None]:
    """Refuse every fork of these and of this process with EAGAIN."""
    before = resource.getrlimit(resource.RLIMIT_NPROC)
    for pid in (0, *pids):
        resource.prlimit(pid, resource.RLIMIT_NPROC, (0, before[1]))
    yield
    for pid in (0, *pids):
        resource.prlimit(pid, resource.RLIMIT_NPROC, before)


def parent_of(bench: Bench) -> int:
    parent = bench.runner._pool._parent
    assert parent is not None
    return parent.pid


def queued_in_a_shortage() -> None:
    with with_no_spare_supervisor() as bench:
        parent = parent_of(bench)
        with no_process_left(parent):
            for task in (3, 4, 5):
                bench.start("true", task=task)
            ends = [bench.end_of(task) for task in (3, 4, 5)]
        assert [end.cause for end in ends] == ["spawn_error"] * 3
        assert {end.code for end in ends} <= SPAWN_TRANSIENT, ends

        bench.start("true", task=3, attempt=2)
        assert bench.end_of(3, 2).cause == "exit"
        assert parent_of(bench) == parent


def queued_in_a_shortage_without_a_parent() -> None:
    with with_no_spare_supervisor() as bench:
        with no_process_left():
            os.kill(parent_of(bench), signal.SIGKILL)
            bench.start("true", task=3)
            end = bench.end_of(3)
        assert (end.cause, end.code in SPAWN_TRANSIENT) == ("spawn_error", True), end

        bench.start("true", task=3, attempt=2)
        assert bench.end_of(3, 2).cause == "exit"


def refused_again_and_again() -> None:
    bench = Bench()
    try:
        bench.start("sleep", "1000", task=1)
        bench.start_of(1)
        bench.shell("true", task=2)
        supervisors = children_of(parent_of(bench))
        before = descriptors_of(supervisors)
        with no_process_left(parent_of(bench), *supervisors):
            for attempt in (1, 2, 3):
                bench.start("true", task=3, attempt=attempt)
                end = bench.end_of(3, attempt)
                assert (end.cause, end.code in SPAWN_TRANSIENT) == ("spawn_error", True), end
                assert "cannot make its process" in end.text, end
        assert children_of(parent_of(bench)) == supervisors
        until(lambda: descriptors_of(supervisors) <= before)  # the last record is closed late
        told = [line for line in bench.output(3) if "cannot make its process" in line]
        assert len(told) == 3, bench.output(3)
    finally:
        bench.close()


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descriptors_of(pids: list[int]) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def started_in_a_shortage() -> None:
    with with_no_spare_supervisor() as bench:
        bench.runner.close()
        with no_process_left():
            bench.make()

        bench.start("true", task=3)
        assert bench.end_of(3).cause == "exit"


def test_a_passing_shortage_of_processes_failed_all_that_was_queued_for_good() -> None:
    assert not told_by_a_user_of_its_own(queued_in_a_shortage)


def test_a_shortage_that_met_a_killed_parent_failed_all_that_was_queued_for_good() -> None:
    assert not told_by_a_user_of_its_own(queued_in_a_shortage_without_a_parent)


def test_a_daemon_did_not_start_while_no_process_was_left() -> None:
    assert not told_by_a_user_of_its_own(started_in_a_shortage)


def test_every_process_that_a_supervisor_was_refused_cost_it_a_descriptor() -> None:
    assert not told_by_a_user_of_its_own(refused_again_and_again)
