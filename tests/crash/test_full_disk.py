"""Promise 7: a full disk costs nothing that was acknowledged."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon_fixture import LiveDaemon, StartDaemon, is_alive
from tests.raw_client import RawClient, RefusedError
from tests.waiting import until

DISK_BYTES = 96 << 20
FAT_BYTES = 400 << 10
FINAL = ("--on-exit", "7=fail")  # also on a full disk
END_AT_GO = """
import os, sys, time
open("pid", "w").write(str(os.getpid()))
while not os.path.exists("go"):
    time.sleep(0.01)
os._exit(int(sys.argv[1]))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that is soon full."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=755", "tmpfs", str(mount)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def fill(disk: Path) -> Path:
    """Take every byte that is left; return the file to delete."""
    balloon = disk / "balloon"
    with balloon.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(bytes(size)) == size:  # Bound: the disk is small
                    continue
            except OSError:
                continue
    return balloon


def submit_fat(client: RawClient) -> dict[str, Any] | None:
    """Submit a task that is big in the log; return the error, if it was refused."""
    fat = {f"FAT{part}": os.urandom(FAT_BYTES // 8).hex() for part in range(8)}
    spec = {"argv": ["/bin/true"], "hold": True, "env": fat}
    try:
        client.ask("submit", {"tasks": [spec]})
    except RefusedError as refused:
        return refused.error
    return None


def can_submit(daemon: LiveDaemon) -> bool:
    return daemon.ctl("submit", "-q", "--", "/bin/true", check=False).returncode == 0


def refused_submit(
    daemon: LiveDaemon, accepted: set[int]
) -> subprocess.CompletedProcess[str] | None:
    """Submit something; return the refusal, or note what was accepted."""
    done = daemon.ctl("submit", "-q", "--hold", "-E", f"A={'a' * 60_000}", "true", check=False)
    if done.returncode == 0:
        accepted.add(int(done.stdout))
        return None
    assert done.returncode == 2, done
    return done


@pytest.mark.root
@pytest.mark.timeout(120)
def test_full_disk_refuses_new_work_keeps_the_old_and_recovers_by_itself(
    small_disk: Path, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(state_dir=small_disk / "state")
    task = daemon.submit(sys.executable, "-c", END_AT_GO, "7", options=FINAL)
    pid = int(daemon.wait_file("pid"))
    daemon_pid = daemon.pid
    with RawClient(daemon.endpoint) as client:
        balloon = fill(small_disk)
        error = until(lambda: submit_fat(client), 60.0)
        accepted = {row["id"] for row in client.rows()}

    assert error["code"] == "disk_full"
    assert error["retryable"] is True
    refused = daemon.ctl("submit", "--", "/bin/true", check=False)
    while refused.returncode == 0:  # Bound: what fits where a fat one did not
        accepted.add(max(accepted) + 1)
        refused = daemon.ctl("submit", "--hold", "-E", f"A={'a' * 60_000}", "true", check=False)
    assert refused.returncode == 2, refused
    assert is_alive(pid), "the running task was harmed"

    (daemon.work / "go").touch()
    row = daemon.wait_phase(task, "succeeded", "failed")
    assert (row["cause"], row["code"]) == ("exit", 7)

    balloon.unlink()
    until(lambda: can_submit(daemon), 30.0, every_s=0.1)
    assert daemon.process is not None
    assert daemon.process.poll() is None, "the daemon was restarted or died"
    assert daemon.pid == daemon_pid
    daemon.restart()
    with RawClient(daemon.endpoint) as client:
        rows = {row["id"]: row for row in client.rows()}
    assert accepted <= set(rows)
    assert (rows[task]["phase"], rows[task]["code"]) == ("failed", 7)


@pytest.mark.root
@pytest.mark.timeout(120)
def test_a_daemon_killed_on_a_full_disk_starts_on_it_adopts_and_notes_the_end(
    small_disk: Path, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(state_dir=small_disk / "state")
    task = daemon.submit(sys.executable, "-c", END_AT_GO, "7", options=FINAL)
    pid = int(daemon.wait_file("pid"))
    daemon.wait_phase(task, "running")
    balloon = fill(small_disk)
    with RawClient(daemon.endpoint) as client:
        until(lambda: submit_fat(client), 60.0)
        before = {row["id"] for row in client.rows()}
    for _ in range(3):
        daemon.restart()
        row = daemon.row(task)
        assert (row["phase"], row["pid"], row["attempt"]) == ("running", pid, 1)
    refused = until(lambda: refused_submit(daemon, before), 30.0)
    assert "free space" in refused.stderr
    daemon.kill9()
    (daemon.work / "go").touch()
    until(lambda: not is_alive(pid))
    daemon.start()

    row = daemon.wait_phase(task, "succeeded", "failed")
    assert (row["phase"], row["cause"], row["code"]) == ("failed", "exit", 7)
    balloon.unlink()
    until(lambda: can_submit(daemon), 30.0, every_s=0.1)
    daemon.restart()
    with RawClient(daemon.endpoint) as client:
        rows = {row["id"]: row for row in client.rows()}
    assert before <= set(rows)
    assert (rows[task]["phase"], rows[task]["code"]) == ("failed", 7)


PRINT_AT_GO = """
import os, sys, time
open("pid", "w").write(str(os.getpid()))
while not os.path.exists("go"):
    time.sleep(0.01)
try:
    for _ in range(100):
        print("y" * 2000, flush=True)
except OSError:
    os._exit(1)
"""


@pytest.mark.root
@pytest.mark.timeout(120)
def test_a_task_that_cannot_print_for_a_full_disk_goes_on_once_there_is_room(
    small_disk: Path, start_daemon: StartDaemon
) -> None:
    config = "[retry]\ntransient_backoff_s = 600.0\n"  # at least a minute to look at it
    daemon = start_daemon(config=config, state_dir=small_disk / "state")
    task = daemon.submit(sys.executable, "-c", PRINT_AT_GO)
    told = daemon.submit(sys.executable, "-c", PRINT_AT_GO, options=("--on-exit", "1=fail"))
    daemon.wait_phase(task, "running")
    daemon.wait_phase(told, "running")
    balloon = fill(small_disk)
    (daemon.work / "go").touch()

    row = daemon.wait_phase(task, "waiting", "failed", "queued")
    assert (row["phase"], row["cause"], row["code"], row["failures"]) == ("waiting", "exit", 1, 0)
    said = " ".join(daemon.ctl("explain", str(task)).stdout.split())
    assert "the disk of its output was full when it failed: free space there" in said
    assert "no failure is counted" in said
    assert "(disk" in daemon.ctl("status", str(task)).stdout
    assert "disk full" in daemon.ctl("show", str(task)).stdout
    assert "disk full" in daemon.ctl("events", "--task", str(task)).stdout
    own = daemon.wait_phase(told, "failed", "waiting")
    assert (own["phase"], own["reason"]) == ("failed", "permanent")
    assert "disk full" in daemon.ctl("show", str(told)).stdout

    balloon.unlink()
    until(lambda: can_submit(daemon), 30.0, every_s=0.1)
    daemon.ctl("retry", str(task))
    assert daemon.wait_phase(task, "succeeded", "failed")["phase"] == "succeeded"
