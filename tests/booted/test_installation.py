"""What a person does first, after `make install` on a fresh system: it simply works."""

from collections.abc import Callable

import pytest

from tests.booted.machine import Machine
from tests.booted.nspawn import Nspawn
from tests.booted.roots import MEMBERS

ALICE = MEMBERS[0]
OUTSIDER = "mallory"
DENIED = 77


def test_it_boots_to_running_with_no_failed_unit(machine: Nspawn) -> None:
    assert machine.failed_units() == []
    assert machine.state() == "running"


def test_the_version_of_systemd_is_the_one_that_is_meant(
    machine: Nspawn, systemd_version: str
) -> None:
    assert machine.sh("systemctl --version").split()[1] == systemd_version


def test_enabled_and_started_it_is_active_and_said_that_it_is_ready(machine: Nspawn) -> None:
    assert machine.sh("systemctl is-enabled ckptd").strip() == "enabled"
    assert machine.show("ckptd", "ActiveState") == "active"
    assert machine.show("ckptd", "Type") == "notify"
    assert int(machine.show("ckptd", "ExecMainPID")) > 0


def test_a_member_submits_and_sees_it_succeed(machine: Nspawn) -> None:
    assert_a_member_can_submit(machine)


def assert_a_member_can_submit(machine: Machine) -> None:
    script = "test $(id -un) = alice && echo seen >/home/alice/proof"
    task = machine.run(
        ["ckptctl", "submit", "-q", "--", "sh", "-c", script], user=ALICE
    ).out.strip()
    machine.run(["ckptctl", "wait", task], user=ALICE)
    assert machine.get("/home/alice/proof") == b"seen\n"
    assert "succeeded" in machine.run(["ckptctl", "status", task], user=ALICE).out


def test_who_is_not_in_the_group_is_refused(machine: Nspawn) -> None:
    refused = machine.run(["ckptctl", "submit", "--", "true"], user=OUTSIDER, check=False)
    assert refused.code == DENIED, refused
    assert refused.out == ""


def test_the_journal_tells_the_story_of_a_task(machine: Nspawn) -> None:
    submit = ["ckptctl", "submit", "-q", "-n", "backup", "--", "sh", "-c", "exit 3"]
    task = machine.run(submit, user=ALICE).out.strip()
    machine.run(["ckptctl", "wait", task], user=ALICE, check=False)
    story = machine.journal("-u", "ckptd")
    assert "ready after" in story
    assert f"task {task} submitted by uid 1000: backup" in story
    assert f"task {task}, attempt 1 exited with 3" in story


@pytest.mark.parametrize("user", ["root", ALICE])
def test_the_doctor_finds_nothing_wrong_that_would_stop_it(machine: Nspawn, user: str) -> None:
    found = machine.run(["ckptctl", "doctor"], user=user, check=False)
    assert found.code in (0, 1), found
    assert "Traceback" not in found.err


def test_after_a_reboot_it_runs_by_itself(fresh_machine: Callable[[], Nspawn]) -> None:
    machine = fresh_machine()
    task = machine.run(["ckptctl", "submit", "-q", "--hold", "--", "true"], user=ALICE).out.strip()
    machine.reboot()
    assert machine.show("ckptd", "ActiveState") == "active"
    assert "held" in machine.run(["ckptctl", "status", task], user=ALICE).out
