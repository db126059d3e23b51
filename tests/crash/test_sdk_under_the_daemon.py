"""Python tasks below a real daemon: killed, stopped, parked, blocked; each goes on as promised."""

import os
import signal
import sys
from typing import Any

import pytest

from ckptd.storage.blobs import newest_sealed
from ckptd.storage.manifest import load
from ckptd.storage.untrusted import open_directory
from tests.daemon_fixture import ROOT, LiveDaemon
from tests.waiting import until

RUN = str(ROOT / "ckptd" / "sdk" / "run.py")
MODULE = """
import os, signal, time
from ckptd.sdk import task, Manual

def told(line):
    fd = os.open("told", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{line}\\n".encode())
    os.close(fd)

def steps(ctx):
    for name in ("a", "b", "c"):
        ctx.step(name, told, f"{name} {os.getpid()}")
        while name == "b" and ctx.attempt == 1 and not os.path.exists("go"):
            time.sleep(0.02)
    return 7

def waits(ctx):
    ctx.state["is_waiting"] = 5
    told("waits")
    while True:
        ctx.checkpoint_if_needed()
        time.sleep(0.02)

def parks(ctx):
    told(f"attempt {ctx.attempt}")
    if ctx.get_intermediate_result("until") is None:
        ctx.set_intermediate_result("until", time.time() + 11.0)
    ctx.sleep_until(ctx.get_intermediate_result("until"))
    told("after")
    return [ctx.attempt, round(ctx._work.wait_s)]

VERSION = int(open("version").read()) if os.path.exists("version") else 1

@task(version=VERSION, strategy=Manual())
def versioned(ctx):
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    if ctx.attempt == 1:
        ctx.checkpoint()
        told("saved")
        while True:
            time.sleep(0.05)
    told(f"n is {ctx.state['n']}")
"""


@pytest.fixture
def world(daemon: LiveDaemon) -> LiveDaemon:
    (daemon.work / "jobs.py").write_text(MODULE)
    return daemon


def submit(world: LiveDaemon, function: str, *options: str) -> int:
    return world.submit(sys.executable, RUN, f"jobs:{function}", options=options)


def told(world: LiveDaemon) -> list[str]:
    path = world.work / "told"
    return path.read_text().splitlines() if path.exists() else []


def saved(world: LiveDaemon, task: int) -> Any:
    directory = world.state / "tasks" / str(task)
    seq, path = newest_sealed(str(directory), os.getuid())
    if not seq:
        return None
    fd = open_directory(path, os.getuid())
    try:
        return load(fd, os.getuid())
    finally:
        os.close(fd)


def test_killed_together_with_the_daemon_it_goes_on_without_repeating_a_step(
    world: LiveDaemon,
) -> None:
    task = submit(world, "steps", "--retries", "3")
    until(lambda: len(told(world)) == 2)
    pid = int(told(world)[1].split()[1])

    world.kill9()
    os.kill(pid, signal.SIGKILL)
    (world.work / "go").touch()
    world.start()

    world.wait_phase(task, "succeeded")
    assert [line.split()[0] for line in told(world)] == ["a", "b", "c"]


def test_a_cancelled_task_saves_its_state_before_it_leaves(world: LiveDaemon) -> None:
    task = submit(world, "waits")
    until(lambda: told(world) == ["waits"])

    world.ctl("cancel", str(task))

    world.wait_phase(task, "cancelled")
    manifest = saved(world, task)
    assert manifest["state"] == {"is_waiting": 5}
    assert manifest["reason"] == "stop"


def test_a_task_that_sleeps_long_parks_without_a_process_and_comes_back(world: LiveDaemon) -> None:
    task = submit(world, "parks")

    row = world.wait_phase(task, "waiting")
    assert row["phase"] == "waiting"
    assert saved(world, task)["reason"] == "park"
    world.restart()

    world.wait_phase(task, "succeeded", timeout_s=30)
    assert told(world) == ["attempt 1", "attempt 2", "after"]


def test_a_version_that_cannot_be_read_blocks_and_goes_on_with_mended_code(
    world: LiveDaemon,
) -> None:
    (world.work / "version").write_text("2")
    task = submit(world, "versioned", "--retries", "5")
    until(lambda: told(world) == ["saved"])
    (world.work / "version").write_text("1")
    os.kill(world.row(task)["pid"], signal.SIGKILL)
    world.wait_phase(task, "blocked", "failed", "quarantined", timeout_s=30)

    row = world.row(task)
    assert row["phase"] == "blocked", row
    assert "saved by version 2, this code has version 1" in str(world.detail(task))
    (world.work / "version").write_text("2")
    world.ctl("release", str(task))

    world.wait_phase(task, "succeeded")
    assert told(world)[-1] == "n is 2"
