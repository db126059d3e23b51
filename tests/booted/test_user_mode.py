"""A daemon of one's own, under `systemctl --user` with linger: the same promises, no root."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.booted.machine import Machine
from tests.booted.nspawn import Nspawn
from tests.waiting import until

RUN, STATE = "/run/user/1000/ckptd", "/home/alice/.local/state/ckptd"


class Alice:
    """Alice at her prompt, in a machine where the daemon of the system is not there."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.sh("systemctl disable --now ckptd ckptd.socket")
        self.env = machine.user_env("alice")
        self.sh("systemctl --user enable --now ckptd; ckptctl group set default --parallel 20")

    def sh(self, script: str, *, check: bool = True) -> str:
        return self.machine.run(
            ["sh", "-c", f"cd; {script}"], user="alice", env=self.env, check=check
        ).out

    def submit(self, *words: str) -> int:
        quoted = " ".join(f"'{word}'" for word in words)
        return int(self.sh(f"ckptctl submit -q {quoted}"))

    def row(self, task: int) -> dict[str, Any]:
        shown = json.loads(self.sh(f"ckptctl show {task} -o json"))["tasks"][0]
        return {**shown["row"], "unit": shown["unit"]}

    def show(self, unit: str, name: str) -> str:
        return self.sh(f"systemctl --user show --value -P {name} {unit}").strip()


@pytest.fixture(scope="module")
def her(machine: Nspawn) -> Alice:
    return Alice(machine)


@pytest.fixture
def alice(her: Alice) -> Iterator[Alice]:
    yield her
    her.sh("ckptctl kill --all --yes; ckptctl wait --all; true")


def running(alice: Alice, *words: str) -> int:
    task = alice.submit("--", *words)
    until(lambda: alice.row(task)["phase"] == "running", 30)
    return task


def test_tasks_are_units_of_the_users_manager_and_all_is_hers(alice: Alice) -> None:
    task = running(alice, "sleep", "1000")
    unit = alice.row(task)["unit"]
    assert unit == f"ckptd-task-{task}-1.service"
    assert alice.show(unit, "ActiveState") == "active"
    assert alice.show(unit, "Slice") == "ckptd.slice"
    assert alice.machine.show(unit, "LoadState") == "not-found"  # for the system's manager
    pids = f"{alice.show('ckptd', 'MainPID')} {alice.row(task)['pid']}"
    assert set(alice.machine.sh(f"ps -o user= -p {pids.replace(' ', ',')}").split()) == {"alice"}
    found = alice.machine.sh(f"find {RUN} {STATE} -not -user alice; stat -c %a {RUN} {STATE}")
    assert found.split()[0] == "700"
    assert int(found.split()[1], 8) & 0o022 == 0
    others = [
        "sh",
        "-c",
        f"ckptctl --version; ls {RUN} || ckptctl --endpoint {RUN}/ctl.sock status",
    ]
    said = alice.machine.run(others, user="bob", check=False)
    assert (said.code != 0, "sleep" in said.out) == (True, False)


def test_she_drills_her_task_and_her_daemon_and_so_may_root(alice: Alice) -> None:
    task = running(alice, "sleep", "1000")
    for how in ("--kill9", "--daemon"):
        alice.sh(f"ckptctl drill {task} {how} --yes")
    root = ["ckptctl", "--endpoint", f"{RUN}/ctl.sock", "drill", str(task), "--daemon", "--yes"]
    assert "passed" in alice.machine.run(root).out
    row = alice.row(task)
    assert (row["attempt"], row["interruptions"]) == (2, 1)


@pytest.mark.parametrize(
    "how",
    [
        "systemctl --user kill -s KILL ckptd",
        "systemctl --user restart ckptd",
        "systemctl --user stop ckptd; sleep 0.3; systemctl --user start ckptd",
        "systemctl --user daemon-reexec",
        "systemctl --user restart dbus; systemctl --user restart ckptd",
    ],
)
def test_tasks_live_on_and_their_ends_are_known(alice: Alice, how: str) -> None:
    alice.sh("rm -f go; mkfifo go")
    ends = running(alice, "sh", "-c", "read -r _ <go; exit 3")
    goes_on = running(alice, "sleep", "1000")
    pid, daemon = alice.row(goes_on)["pid"], alice.show("ckptd", "MainPID")

    alice.sh(f"kill -STOP {daemon}; echo >go; {how}; kill -CONT {daemon} 2>/dev/null; true")

    until(lambda: alice.row(ends)["phase"] == "failed", 30)
    assert (alice.row(ends)["cause"], alice.row(ends)["code"]) == ("exit", 3)
    assert (alice.row(goes_on)["phase"], alice.row(goes_on)["pid"]) == ("running", pid)
    assert alice.row(goes_on)["attempt"] == 1
    alice.sh(f"ckptctl cancel {goes_on}; ckptctl wait {goes_on}; true")
    assert alice.row(goes_on)["phase"] == "cancelled"


def test_a_logout_leaves_daemon_and_tasks(alice: Alice) -> None:
    """`su -l` is a login to pam_systemd: a session that begins and ends."""
    task = running(alice, "sleep", "1000")
    pid, daemon = alice.row(task)["pid"], alice.show("ckptd", "MainPID")
    said = alice.machine.sh("su -l alice -c 'echo $XDG_SESSION_ID; ckptctl status'")
    session, _, status = said.partition("\n")
    assert session
    assert f"{task}  sleep" in status
    until(lambda: not alice.machine.exists(f"/run/systemd/sessions/{session}"), 30)
    assert (alice.row(task)["phase"], alice.row(task)["pid"]) == ("running", pid)
    assert alice.show("ckptd", "MainPID") == daemon


def test_a_slice_that_is_stopped_comes_back_with_the_daemon(alice: Alice) -> None:
    task = running(alice, "sleep", "1000")
    alice.sh("systemctl --user stop ckptd.slice")
    assert alice.show("ckptd", "ActiveState") == "inactive"
    alice.sh("systemctl --user start ckptd")
    until(lambda: (alice.row(task)["phase"], alice.row(task)["attempt"]) == ("running", 2), 30)
    assert alice.row(task)["interruptions"] == 1


def test_the_doctor_examines_a_daemon_of_ones_own(alice: Alice) -> None:
    findings = json.loads(alice.sh("ckptctl doctor -o json", check=False))["findings"]
    level = {one["name"]: one["level"] for one in findings}
    for name in ("daemon", "runner", "configuration", "lock", "logout"):
        assert level[name] == "ok", name
