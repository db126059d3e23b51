"""Marks: a call of any thread and child counts, who is traced lives on, none is missed for ever."""

import json
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.daemon_fixture import ROOT
from tests.torture.marked import CALLS, IS_POSSIBLE
from tests.torture.marks import MARKS, RARE, VAIN_MAX, Marks
from tests.waiting import until

needs_ptrace = pytest.mark.skipif(not IS_POSSIBLE, reason="needs root on x86-64 (ptrace)")

_TURNS = """
import itertools, os, threading
numbers = itertools.count()
def turn():
    number = next(numbers)
    open(f"{number}.new", "w").close()
    os.rename(f"{number}.new", f"{number}")
def turns():
    while True:
        turn()
"""
_ONE_THREAD = _TURNS + "threading.Thread(target=turns).start(); print(flush=True)"
_NEW_THREADS = f"""{_TURNS}
print(flush=True)
while True:
    thread = threading.Thread(target=turn)
    thread.start()
    thread.join()
"""
_ANSWERS = """
import os, signal
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"heard\\n"))  # print cannot be re-entered
print(flush=True)
while True:
    signal.pause()
"""


@contextmanager
def begun(cwd: Path, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """Begin a process that counts as a task; it is killed in the end."""
    env = {**os.environ, "WORK": "w1"}
    with subprocess.Popen(argv, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE) as task:
        try:
            yield task
        finally:
            task.kill()


def read(task: subprocess.Popen[str]) -> str:
    """Return the next line that a process says."""
    assert task.stdout
    return task.stdout.readline().strip()


def line_of(pid: int, *marks: str, within_s: float = 20.0) -> list[str]:
    """Return how to trace a process."""
    return [sys.executable, "-m", "tests.torture.marked", str(within_s), "1", str(pid), *marks]


def traced(pid: int, *marks: str, within_s: float = 20.0) -> list[dict[str, Any]]:
    """Trace a process and return what the tracer tells."""
    line = line_of(pid, *marks, within_s=within_s)
    done = subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    return [json.loads(one) for one in done.stdout.splitlines()]


def status_of(pid: int, field: str) -> str:
    """Return a field of /proc/PID/status."""
    with open(f"/proc/{pid}/status") as file:
        return next(line.split()[1] for line in file if line.startswith(f"{field}:"))


@needs_ptrace
@pytest.mark.parametrize("script", [_ONE_THREAD, _NEW_THREADS], ids=["there", "new"])
@pytest.mark.parametrize(("when", "undone"), [("before", 1), ("after", 0)])
def test_a_step_in_a_thread_of_its_own_is_met_before_it_and_after_it(
    tmp_path: Path, script: str, when: str, undone: int
) -> None:
    with begun(tmp_path, sys.executable, "-c", script) as task:
        read(task)
        told = traced(task.pid, f"task {when} rename")
        assert told[0]["pid"] == task.pid
        assert task.wait() == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.new"))) == undone


@needs_ptrace
def test_what_a_task_forks_is_met_at_its_own_calls_and_the_task_goes_on(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with begun(tmp_path, "/bin/sh", "-c", "while :; do mv a b; mv b a; done") as task:
        told = traced(task.pid, "task before rename")
        assert told[0]["name"] == "mv"
        assert told[0]["work"] == "w1", "an audit asks whose it was"
        assert task.poll() is None


@needs_ptrace
def test_a_task_that_has_forked_is_followed_to_its_later_calls(tmp_path: Path) -> None:
    tasks = 'echo there; while :; do sh -c "/bin/true; /bin/true; exit 3"; done'
    with begun(tmp_path, "env", "-u", "WORK", "/bin/sh", "-c", tasks) as parent:  # as a shim is
        read(parent)
        marks = ("task before exit", "task after exec", "task after fork")
        told = traced(parent.pid, *marks)
    assert {one["how"] for one in told[:-1]} == set(marks)
    assert told[-1] == {"tried": []}


@needs_ptrace
def test_a_mark_that_nobody_came_to_is_told(tmp_path: Path) -> None:
    with begun(tmp_path, "/bin/sh", "-c", "while :; do sleep 0.01; done") as task:
        told = traced(task.pid, "task before link", "batch before link", within_s=2.0)
    assert told == [{"tried": ["task before link"]}], "there was no batch"


@needs_ptrace
def test_what_was_cut_short_was_not_tried(tmp_path: Path) -> None:
    with begun(tmp_path, "/bin/sh", "-c", "sleep 0.2; sleep 0.2") as task:
        assert traced(task.pid, "task before link") == [{"tried": []}]


@needs_ptrace
def test_who_is_traced_hears_signals_stays_stopped_and_outlives_the_tracer(tmp_path: Path) -> None:
    with begun(tmp_path, sys.executable, "-c", _ANSWERS) as task:
        read(task)
        with subprocess.Popen(line_of(task.pid, "task before rename"), cwd=ROOT) as tracer:
            until(lambda: status_of(task.pid, "TracerPid") != "0")
            task.send_signal(signal.SIGUSR1)
            assert read(task) == "heard"
            task.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, task.pid, os.WSTOPPED | os.WNOWAIT)
            task.send_signal(signal.SIGUSR1)
            assert not select.select([task.stdout], [], [], 0.3)[0], "it is stopped"
            tracer.kill()
        until(lambda: status_of(task.pid, "TracerPid") == "0")
        until(lambda: status_of(task.pid, "State") == "T")
        task.send_signal(signal.SIGCONT)
        assert read(task) == "heard"


def an_hour(impossible: set[str]) -> Marks:
    """Aim as often as an hour does; each tracer meets one of the marks that can be met."""
    chance = random.Random(1)
    marks = Marks(chance)
    for _ in range(130):
        for parts in (
            ("daemon",),
            ("shim",),
            ("shim before exit",),
            ("parent",),
            ("task", "batch"),
        ):
            aims = marks.aims(parts)
            possible = [mark for mark in aims if mark not in impossible]
            if possible:
                marks.met[chance.choice(possible)] += 1
            else:
                marks.vain.update(aims)
    return marks


def test_within_an_hour_all_marks_are_met() -> None:
    marks = an_hour(set())
    assert marks.missed() == []
    assert marks.unreachable() == []


@pytest.mark.parametrize("mark", [mark for mark in MARKS if mark not in RARE])
def test_within_an_hour_a_mark_that_cannot_be_met_is_a_violation(mark: str) -> None:
    marks = an_hour({mark})
    assert marks.missed() == [mark]
    assert marks.unreachable() == [
        f"unreachable: {mark}, aimed at in vain {marks.vain[mark]} times"
    ]


def test_a_mark_is_given_the_tries_that_chance_needs_before_it_is_unreachable() -> None:
    marks = Marks(random.Random(1))
    marks.vain[MARKS[0]] = VAIN_MAX - 1
    assert marks.unreachable() == []
    marks.vain[MARKS[0]] += 1
    assert len(marks.unreachable()) == 1
    marks.met[MARKS[0]] += 1
    assert marks.unreachable() == []


def test_every_mark_names_calls_that_a_tracer_knows() -> None:
    assert {mark.split()[2] for mark in MARKS} == CALLS.keys()
