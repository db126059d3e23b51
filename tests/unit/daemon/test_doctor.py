"""The doctor: true about a good machine, clear about a bad one, and it leaves nothing behind."""

import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.daemon_fixture import ROOT, LiveDaemon


def examine(*words: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "ckptd.daemon.doctor", "--json", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=30
    )
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["fit"] == (done.returncode == 0)
    return done.returncode, {finding["name"]: finding for finding in report["findings"]}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "ckptd.toml"
    path.write_text(f'[daemon]\nstate_dir = "{tmp_path}/state"\nrun_dir = "{tmp_path}/run"\n')
    return path


def test_a_machine_without_a_daemon_is_told_what_is_missing_and_left_as_it_was(
    config: Path,
) -> None:
    before = sorted(config.parent.rglob("*"))
    _, found = examine("--config", str(config))
    assert (found["socket"]["level"], found["socket"]["advice"]) == ("warn", "start ckptd")
    assert "fdatasyncs" in found["sync"]["text"]
    assert sorted(config.parent.rglob("*")) == before


def test_a_running_daemon_is_asked_how_it_is(daemon: LiveDaemon) -> None:
    _, found = examine("--config", str(daemon.config))
    assert f"(pid {daemon.pid}) answers" in found["socket"]["text"]
    assert found["health"]["text"] == "ok"
    assert found["lock"]["text"] == "held by the daemon"


def test_a_socket_that_nobody_listens_to_means_no_daemon(daemon: LiveDaemon) -> None:
    daemon.kill9()
    _, found = examine("--config", str(daemon.config))
    assert (found["socket"]["level"], found["lock"]["text"]) == ("warn", "free")
    assert "left over" in found["socket"]["text"]


def test_a_daemon_that_does_not_answer_is_bad_and_another_endpoint_is_looked_at(
    config: Path,
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name, socket.socket(socket.AF_UNIX) as mute:
        mute.bind(f"{name}/ctl.sock")
        mute.listen()
        code, found = examine("--config", str(config), "--endpoint", f"ipc://{name}/ctl.sock")
    assert (code, found["socket"]["level"]) == (1, "bad")
    assert f"{name}/ctl.sock is there, but nobody answers" in found["socket"]["text"]


def test_an_orderly_stop_leaves_no_socket(daemon: LiveDaemon) -> None:
    path = daemon.run / "ctl.sock"
    assert path.exists()
    daemon.stop()
    assert not path.exists()


def test_a_configuration_that_would_refuse_the_start_is_bad(config: Path) -> None:
    config.write_text("[wal]\nx = 1\n")
    code, found = examine("--config", str(config))
    assert (code, found["configuration"]["level"]) == (1, "bad")
    assert "unknown key wal.x" in found["configuration"]["text"]


def test_the_table_has_a_line_a_finding_and_says_what_to_do(config: Path) -> None:
    command = [sys.executable, "-m", "ckptd.daemon.doctor", "--config", str(config)]
    lines = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=30
    ).stdout.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warn", "bad", "->"}
