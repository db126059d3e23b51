"""The doctor: true about a good machine, clear about a bad one, and it leaves nothing behind."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from ckptd.doctor import machine
from ckptd.runner import cgroup
from tests.daemon_fixture import ROOT, LiveDaemon


def examine(*words: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "ckptd.doctor", "--json", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=30
    )
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["fit"] == (done.returncode == 0)
    return done.returncode, {finding["name"]: finding for finding in report["findings"]}


def table(*words: str, columns: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "ckptd.doctor", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=30,
        env={**os.environ, "COLUMNS": str(columns)},
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


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
    assert (found["daemon"]["level"], found["daemon"]["advice"]) == ("warn", "start it: ckptd")
    assert "fdatasyncs" in found["sync"]["text"]
    assert "durable by" in found["end records"]["text"]
    assert sorted(config.parent.rglob("*")) == before


def test_a_running_daemon_is_asked_how_it_is(daemon: LiveDaemon) -> None:
    _, found = examine("--config", str(daemon.config))
    assert f"(pid {daemon.pid}) answers" in found["daemon"]["text"]
    assert found["health"]["text"] == "ok"
    assert found["lock"]["text"] == "held by the daemon"


def test_a_socket_that_nobody_listens_to_means_no_daemon(daemon: LiveDaemon) -> None:
    daemon.kill9()
    _, found = examine("--config", str(daemon.config))
    assert (found["daemon"]["level"], found["lock"]["text"]) == ("warn", "free")
    assert "left over" in found["daemon"]["text"]


def test_a_daemon_whose_socket_was_removed_is_found_by_its_lock(daemon: LiveDaemon) -> None:
    (daemon.run / "ctl.sock").unlink()
    _, found = examine("--config", str(daemon.config))
    assert "none answers" in found["daemon"]["text"]
    assert "see `lock`" in found["daemon"]["advice"]
    assert f"held by pid {daemon.pid}, but no daemon answers" in found["lock"]["text"]
    assert f"kill {daemon.pid}, start it again; tasks live on" in found["lock"]["advice"]


def test_a_daemon_that_does_not_answer_is_bad_and_another_endpoint_is_looked_at(
    config: Path,
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name, socket.socket(socket.AF_UNIX) as mute:
        mute.bind(f"{name}/ctl.sock")
        mute.listen()
        code, found = examine("--config", str(config), "--endpoint", f"ipc://{name}/ctl.sock")
    assert (code, found["daemon"]["level"]) == (1, "bad")
    assert f"somebody listens at {name}/ctl.sock, but does not" in found["daemon"]["text"]


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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["/etc/ckptd/ckptd.toml"], "for that configuration: --config /etc/ckptd/ckptd.toml"),
        (["--confg", "x"], "did you mean --config?"),
        (["--conf=x"], "did you mean --config?"),
        (["--config"], "see: ckptctl doctor -h"),
        (["--config", ""], "leave --config out"),
        (["--json", "-o", "csv"], "see: ckptctl doctor -h"),
    ],
)
def test_words_that_the_doctor_does_not_know_are_wrong_usage_with_a_hint(
    words: list[str], told: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ckptd.doctor", *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (64, "")
    said, hint = done.stderr.splitlines()
    assert said.startswith("ckptctl: doctor: ")
    assert told in hint


@pytest.mark.parametrize("columns", [80, 100])
def test_the_table_has_its_parts_and_fits_the_terminal(config: Path, columns: int) -> None:
    lines = table("--config", str(config), columns=columns)
    assert {line.split()[0] for line in lines if line[:1] == " "} >= {"->"}
    parts = [line for line in lines if line and line[0].isupper() and " " not in line]
    assert parts == ["Daemon", "Journal", "Machine", "Disk"] or "systemd" in lines
    assert lines[-1].startswith(("Fit", "Not fit"))
    too_long = [line for line in lines if len(line) > columns and len(line.split()[-1]) < 40]
    assert not too_long  # but for a path, which is copied whole


def test_a_control_group_that_somebody_else_sweeps_away_is_no_trouble_of_the_doctor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    discover = cgroup.discover
    names = []

    def swept(name: str) -> cgroup.Roots:
        names.append(name)
        found = discover(name)
        for path in filter(None, (found.unified, found.memory, found.freezer)):
            os.rmdir(path)
        return found

    monkeypatch.setattr(cgroup, "discover", swept)
    assert machine._delegated() <= {"memory", "cpu", "cpuset", "io", "pids"}
    assert names == [f"/ckptd-doctor-{os.getpid()}"], "two doctors at once would share it"


def test_each_finding_that_is_not_well_says_what_to_do(config: Path) -> None:
    config.write_text("[wal]\nx = 1\n")
    _, found = examine("--config", str(config))
    assert not [
        name for name, each in found.items() if (each["level"] == "ok") == bool(each["advice"])
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_stranger_is_told_how_to_be_let_in(daemon: LiveDaemon) -> None:
    daemon.run.chmod(0o755)
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable]
    words = ["-m", "ckptd.doctor", "--json", "--endpoint", daemon.endpoint]
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, check=False, cwd=ROOT, timeout=30
    )
    found = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    assert (done.returncode, found["daemon"]["level"]) == (1, "bad")
    assert "you may not use" in found["daemon"]["text"]
    assert "group" in found["daemon"]["advice"]


@pytest.mark.skipif(os.path.isdir("/run/systemd/system"), reason="systemd is here")
def test_without_systemd_the_unit_runner_is_bad_and_auto_means_fork(config: Path) -> None:
    text = config.read_text()
    _, found = examine("--config", str(config))
    assert found["runner"]["text"] == "fork: this machine was not booted by systemd"
    config.write_text(f'{text}runner = "unit"\n')
    code, found = examine("--config", str(config))
    assert (code, found["runner"]["level"]) == (1, "bad")


def test_who_asks_is_told_its_roles_and_the_runner_in_force(daemon: LiveDaemon) -> None:
    _, found = examine("--config", str(daemon.config))
    assert found["your roles"]["text"].endswith("read, submit, admin")
    assert found["runner"]["text"].startswith("fork in force")


def test_the_clock_is_kept_by_what_can_run_here() -> None:
    assert "timedatectl" in machine.clock_advice(has_systemd=True)
    assert "systemd" not in machine.clock_advice(has_systemd=False)
