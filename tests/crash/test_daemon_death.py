"""Promises 3, 4 and 5 over the death of the daemon, the supervisor, the task, and all of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.daemon_fixture import (
    LiveDaemon,
    StartDaemon,
    is_alive,
    kill_quietly,
    parent_of,
    processes_of,
)
from tests.waiting import let_pass, until

END_AT_GO = """
import os, signal, sys, time
how, code = sys.argv[1], int(sys.argv[2])
open("pid", "w").write(str(os.getpid()))
while not os.path.exists("go"):
    time.sleep(0.01)
aside = f"end.{os.getpid()}"  # two tasks of one test share the directory
with open(aside, "w") as file:
    file.write(str(time.time_ns()))
os.rename(aside, "end")
if how == "signal":
    os.kill(os.getpid(), code)
os._exit(code)
"""
"""Waits for the file `go`, notes the time and ends as told: exit CODE or signal CODE."""

ALONE = """
import fcntl, os, subprocess, sys, time
me = os.environ["CKPTD_ATTEMPT"]
lock = open("lock", "a+")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    open("overlap", "w").write(me)
child = subprocess.Popen(["sleep", "1000"], start_new_session=True, close_fds=False,
                         pass_fds=[lock.fileno()])
open("pid.tmp", "w").write(f"{os.getpid()} {child.pid}")
os.rename("pid.tmp", f"pid{me}")
while not os.path.exists("go"):
    time.sleep(0.01)
child.kill()
"""
"""Holds a lock together with a child in a session of its own: a second instance would notice."""

COUNTING = """
import os, subprocess, sys, time
last = os.environ["CKPTD_LAST"]
count = int(open(last + "/count").read()) if last else 0
print("from", count, "attempt", os.environ["CKPTD_ATTEMPT"], flush=True)
open("began.tmp", "w").write(str(time.time_ns()))
os.rename("began.tmp", "began" + os.environ["CKPTD_ATTEMPT"])
while count < 5:
    count += 1
    open("count", "w").write(str(count))
    subprocess.run([sys.executable, "-m", "ckptd.sdk.ckpt", "save", "count"], check=True)
open("five", "w").write("5")
while not os.path.exists("go"):
    time.sleep(0.01)
"""
"""Counts to five with a checkpoint each (`ckpt save`), then waits for `go`."""


@pytest.mark.parametrize(
    ("how", "code", "phase"),
    [
        ("exit", 0, "succeeded"),
        ("exit", 7, "failed"),
        ("signal", signal.SIGUSR1, "failed"),
    ],
)
def test_the_end_of_a_task_is_true_although_no_daemon_was_there(
    daemon: LiveDaemon, how: str, code: int, phase: str
) -> None:
    task = daemon.submit_python(END_AT_GO, how, str(int(code)))
    pid = int(daemon.wait_file("pid"))
    daemon.kill9()
    (daemon.work / "go").touch()
    end_ns = int(daemon.wait_file("end"))
    until(lambda: not is_alive(pid))
    let_pass(1.0)  # so that the end and the restart cannot be mistaken for each other
    daemon.start()

    row = daemon.wait_phase(task, "succeeded", "failed")
    assert row["phase"] == phase
    assert row["cause"] == how
    assert row["signal" if how == "signal" else "code"] == code
    assert abs(row["ended_ns"] - end_ns) < 100_000_000


def test_wait_and_run_in_other_terminals_survive_the_restart(daemon: LiveDaemon) -> None:
    task = daemon.submit_python(END_AT_GO, "exit", "7")
    waiting = daemon.spawn_ctl("wait", "--exit-code", "task", str(task))
    running = daemon.spawn_ctl("run", "--", sys.executable, "-c", END_AT_GO, "exit", "9")
    daemon.wait_file("pid")
    until(lambda: daemon.connections() == 2, timeout_s=20.0)
    let_pass(0.5)  # both are in conversation now; who never met a daemon gives up at once
    daemon.restart()
    daemon.restart()
    (daemon.work / "go").touch()

    _, waited = waiting.communicate(timeout=40)
    assert waiting.returncode == 7, waited
    _, ran = running.communicate(timeout=40)
    assert running.returncode == 9, ran


def test_ctl_says_clearly_that_no_daemon_is_there(daemon: LiveDaemon) -> None:
    daemon.kill9()
    done = daemon.ctl("status", "--timeout", "1", check=False)

    assert done.returncode == 2
    assert str(daemon.run) in done.stderr
    assert not done.stdout


def test_a_running_task_is_adopted_and_not_started_again(daemon: LiveDaemon) -> None:
    task = daemon.submit_python(ALONE)
    daemon.wait_file("pid1")
    before = daemon.wait_phase(task, "running")
    for _ in range(3):
        daemon.restart()
        after = daemon.wait_phase(task, "running")
        assert (after["pid"], after["attempt"]) == (before["pid"], 1)
    (daemon.work / "go").touch()

    assert daemon.wait_phase(task, "succeeded", "failed")["phase"] == "succeeded"
    assert not (daemon.work / "overlap").exists()
    assert not (daemon.work / "pid2").exists()


@pytest.mark.parametrize("daemon_dies_too", [False, True])
def test_a_killed_supervisor_is_noticed_and_never_leaves_two_at_once(
    daemon: LiveDaemon, *, daemon_dies_too: bool
) -> None:
    task = daemon.submit_python(ALONE, options=("--retries", "3", "--backoff", "0.1"))
    main, child = map(int, daemon.wait_file("pid1").split())
    daemon.wait_phase(task, "running")
    if daemon_dies_too:
        daemon.kill9()
    kill_quietly(parent_of(main))
    killed_ns = time.time_ns()
    if daemon_dies_too:
        daemon.start()

    daemon.wait_file("pid2", timeout_s=20)
    assert not is_alive(main)
    assert not is_alive(child), "an orphan of the first attempt lives beside the second"
    (first, *_) = daemon.detail(task)["attempts"]
    assert first["cause"] == "lost"
    assert first["ended_ns"] - killed_ns < 5_000_000_000
    (daemon.work / "go").touch()
    assert daemon.wait_phase(task, "succeeded", "failed")["phase"] == "succeeded"
    assert not (daemon.work / "overlap").exists()


def kill_all(daemon: LiveDaemon) -> None:
    """What a power cut leaves of our processes: nothing."""
    daemon.kill9()

    def none_left() -> bool:
        left = list(processes_of(daemon.root))
        for pid in left:
            kill_quietly(pid)
        return not left

    until(none_left)


def other_boot(root: Path) -> list[str]:
    """Return a command prefix under which the machine seems to have been booted anew."""
    fake = root / "boot_id"
    fake.write_text("01234567-89ab-4cde-8f01-23456789abcd\n")
    script = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", script, str(fake)]
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"cannot pretend another boot: {tried.stderr.strip()}")
    return prefix


@pytest.mark.root
def test_after_a_reboot_the_task_goes_on_from_its_last_checkpoint(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon()
    reboot = other_boot(daemon.root)
    task = daemon.submit_python(COUNTING)
    daemon.wait_file("five")
    until(lambda: daemon.json("checkpoint", "ls", str(task))["checkpoints"])
    kill_all(daemon)
    (daemon.work / "go").touch()
    daemon.prefix = reboot
    daemon.start()

    assert daemon.wait_phase(task, "succeeded", "failed")["phase"] == "succeeded"
    first, second = daemon.detail(task)["attempts"]
    assert first["cause"] == "reboot"
    assert second["checkpoint"] == 5
    lines = daemon.ctl("events", "--since", "0", "-o", "jsonl").stdout.splitlines()
    ends = [event for event in map(json.loads, lines) if event["type"] == "ended"]
    assert ends[0]["fields"]["verdict"]["phase"] == "queued", "it waited for nothing"
    output = daemon.ctl("logs", str(task)).stdout
    assert "from 0 attempt 1" in output, "the output of the first attempt is gone"
    assert "from 5 attempt 2" in output


def test_everything_killed_at_once_resumes_without_overlap(daemon: LiveDaemon) -> None:
    task = daemon.submit_python(COUNTING)
    daemon.wait_file("five")
    kill_all(daemon)
    (daemon.work / "go").touch()
    daemon.start()

    assert daemon.wait_phase(task, "succeeded", "failed")["phase"] == "succeeded"
    first, second = daemon.detail(task)["attempts"]
    assert first["cause"] == "lost"
    assert second["checkpoint"] == 5


def test_an_orderly_stop_leaves_tasks_alone(daemon: LiveDaemon) -> None:
    task = daemon.submit_python(END_AT_GO, "exit", "0")
    pid = int(daemon.wait_file("pid"))

    assert daemon.stop() == os.EX_OK
    assert is_alive(pid)
    daemon.start()
    assert daemon.row(task)["pid"] == pid
    (daemon.work / "go").touch()
    assert daemon.wait_phase(task, "succeeded", "failed")["attempt"] == 1


def test_a_daemon_whose_runtime_directory_was_removed_makes_it_and_its_socket_again(
    daemon: LiveDaemon,
) -> None:
    follower = daemon.spawn_ctl("events", "-f")  # it stays connected to the old socket
    until(lambda: daemon.connections() > 0)
    mode = daemon.run.stat().st_mode
    shutil.rmtree(daemon.run)
    os.kill(daemon.pid, signal.SIGHUP)  # an idle daemon is not woken for a look
    until((daemon.run / "ctl.sock").exists)

    task = daemon.submit("sh", "-c", 'test -S "$NOTIFY_SOCKET"')
    daemon.wait_phase(task, "succeeded")

    assert daemon.run.stat().st_mode == mode
    assert follower.poll() is None
    assert "had been removed: made again" in daemon.log.read_text()
