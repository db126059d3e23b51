"""The same on a real kernel, and what only that can show: an enforced limit, a power cut."""

import pytest

from tests.booted.roots import MEMBERS
from tests.booted.test_installation import assert_a_member_can_submit
from tests.booted.vm import Vm
from tests.waiting import let_pass, until

ALICE = MEMBERS[0]


def test_it_runs_under_cgroup_version_2_and_a_member_submits(vm: Vm) -> None:
    assert vm.state() == "running", vm.failed_units()
    assert "memory" in vm.sh("cat /sys/fs/cgroup/cgroup.controllers").split()
    assert_a_member_can_submit(vm)


def test_memory_limits_are_enforced(vm: Vm) -> None:
    hungry = ["python3", "-c", "bytearray(200 << 20)"]
    ended = vm.run(["systemd-run", "--wait", "-p", "MemoryMax=20M", *hungry], check=False)
    assert "oom-kill" in ended.err


def test_a_flushed_file_survives_a_power_cut_and_another_does_not(vm: Vm) -> None:
    vm.sh("echo kept >/srv/flushed; sync /srv/flushed /srv; echo gone >/srv/young")
    vm.power_cut()
    vm.boot()
    assert vm.get("/srv/flushed") == b"kept\n"
    assert not vm.exists("/srv/young"), "the rig does not lose what was not flushed"


@pytest.mark.parametrize("after_s", [0.0, 0.2])
def test_what_was_acknowledged_is_known_after_a_power_cut(vm: Vm, after_s: float) -> None:
    submit = ["ckptctl", "submit", "-q", "-n", "precious", "--hold", "--", "true"]
    task = vm.run(submit, user=ALICE).out.strip()
    let_pass(after_s)
    vm.power_cut()
    vm.boot()
    until(lambda: vm.show("ckptd", "ActiveState") == "active", 60, every_s=0.5)
    told = vm.run(["ckptctl", "status", task], user=ALICE).out
    assert "precious" in told
    assert "held" in told
