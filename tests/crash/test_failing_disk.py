"""Promise 7: a failing disk costs nothing that was acknowledged, and no running task."""

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.daemon_fixture import LiveDaemon, StartDaemon, is_alive
from tests.fakes.failing_device import FailingDisk, Kind
from tests.raw_client import RawClient
from tests.waiting import until

pytestmark = pytest.mark.xdist_group("sync")  # not beside one that calls sync(2)
DISK_BYTES = 96 << 20
CONFIG = f"[wal]\nsegment_bytes = {8 << 20}\n"
INTERNAL = 70
CLIENTS = 4
LOADED = 60
END_AT_GO = """
import os, sys, time
open("pid", "w").write(str(os.getpid()))
while not os.path.exists("go"):
    time.sleep(0.01)
os._exit(int(sys.argv[1]))
"""


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[FailingDisk]:
    """A real ext4 on a device that fails when told to."""
    try:
        disk = FailingDisk(tmp_path, DISK_BYTES)
    except OSError as bad:
        pytest.skip(f"cannot serve and mount a disk (FUSE, loop, ext4): {bad.strerror}")
    yield disk
    disk.close()


class Load:
    """Clients that each submit held tasks one by one, until an answer fails to come."""

    def __init__(self, daemon: LiveDaemon) -> None:
        self.submitted: set[str] = set()
        self.acknowledged: dict[str, int] = {}  # name -> id
        self._endpoint = daemon.endpoint
        self._is_over = threading.Event()
        self._clients = [
            threading.Thread(target=self._submit, args=(number,)) for number in range(CLIENTS)
        ]

    def __enter__(self) -> Self:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the answers that are still under way."""
        self._is_over.set()
        for client in self._clients:
            client.join()

    def _submit(self, client: int) -> None:
        with RawClient(self._endpoint) as raw:
            count = 0
            while not self._is_over.is_set():
                count += 1
                name = f"load-{client}-{count};"
                self.submitted.add(name)
                spec = {"argv": ["/bin/true"], "hold": True, "name": name}
                reply = self._answer(raw, raw.send("submit", {"tasks": [spec]}))
                if reply is not None:
                    assert reply["ok"], reply
                    (self.acknowledged[name],) = reply["result"]["ids"]

    def _answer(self, client: RawClient, request: str) -> dict[str, Any] | None:
        """Wait as long as there may be an answer; a daemon that has ended has sent its last."""
        reply = None
        while reply is None and not self._is_over.is_set():
            reply = client.receive(request, 0.1)
        return reply or client.receive(request, 0.5)


def end_of(daemon: LiveDaemon) -> int:
    """Wait until the daemon has ended by itself; return its exit code."""
    assert daemon.process is not None
    code = daemon.process.wait(10)
    daemon.process = None
    return code


def check_all_there_once(load: Load, rows: list[dict[str, Any]]) -> None:
    held = {row["name"]: row["id"] for row in rows if row["name"].startswith("load-")}
    assert len(held) == sum(row["name"].startswith("load-") for row in rows), "a task is doubled"
    assert load.acknowledged.items() <= held.items()
    assert held.keys() <= load.submitted, "tasks that nobody submitted"


@pytest.mark.root
@pytest.mark.parametrize("kind", ["flush", "write"])
def test_a_failed_sync_ends_the_daemon_and_costs_no_task_and_no_acknowledgement(
    failing_disk: FailingDisk, start_daemon: StartDaemon, kind: Kind
) -> None:
    daemon = start_daemon(state_dir=failing_disk.directory / "state", config=CONFIG)
    task = daemon.submit(sys.executable, "-c", END_AT_GO, "7")
    pid = int(daemon.wait_file("pid"))
    daemon.wait_phase(task, "running")
    with Load(daemon) as load:
        until(lambda: len(load.acknowledged) >= LOADED)
        failing_disk.settle()
        failing_disk.device.fail(kind, count=1)
        assert end_of(daemon) == INTERNAL, daemon.log.read_text()
    durable = set(re.findall(rb"load-\d+-\d+;", failing_disk.device.durable))
    told_too_early = {name.encode() for name in load.acknowledged} - durable
    assert not told_too_early, "acknowledged, but not on the disk when it failed"
    assert load.acknowledged.keys() < load.submitted
    assert is_alive(pid), "the running task was harmed"

    daemon.start()
    with RawClient(daemon.endpoint) as client:
        check_all_there_once(load, client.rows())
    row = daemon.row(task)
    assert (row["phase"], row["pid"], row["attempt"]) == ("running", pid, 1)
    (daemon.work / "go").touch()
    row = daemon.wait_phase(task, "succeeded", "failed")
    assert (row["phase"], row["cause"], row["code"]) == ("failed", "exit", 7)
    assert daemon.submit("/bin/true") > max(load.acknowledged.values())


@pytest.mark.root
def test_an_end_whose_own_record_the_disk_refused_is_told_all_the_same(
    failing_disk: FailingDisk, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(state_dir=failing_disk.directory / "state", config=CONFIG)
    task = daemon.submit(sys.executable, "-c", END_AT_GO, "7")
    daemon.wait_file("pid")
    daemon.wait_phase(task, "running")
    failing_disk.settle()
    failing_disk.device.fail("write", count=1)
    (daemon.work / "go").touch()

    for _ in range(2):
        row = daemon.wait_phase(task, "succeeded", "failed")
        assert (row["phase"], row["cause"], row["code"]) == ("failed", "exit", 7)
        assert failing_disk.device.durable, "the disk did not fail"
        daemon.restart()


@pytest.mark.root
def test_a_disk_that_stays_broken_refuses_every_start_and_loses_nothing_once_it_is_well(
    failing_disk: FailingDisk, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(state_dir=failing_disk.directory / "state", config=CONFIG)
    with Load(daemon) as load:
        until(lambda: len(load.acknowledged) >= LOADED)
        failing_disk.settle()
        failing_disk.device.fail("write", "flush")
        assert end_of(daemon) == INTERNAL, daemon.log.read_text()
    for _ in range(3):
        daemon.start(wait_ready=False)
        assert end_of(daemon) == INTERNAL, daemon.log.read_text()
    assert "Traceback" not in daemon.log.read_text()

    failing_disk.device.fail("write", "flush", count=0)
    failing_disk.unmount()
    failing_disk.mount()
    daemon.start()
    with RawClient(daemon.endpoint) as client:
        check_all_there_once(load, client.rows())
    daemon.submit("/bin/true")
