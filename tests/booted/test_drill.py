"""`ckptctl drill` where systemd starts the daemon again, and the kernel kills a starved task."""

import json
from typing import Any

from tests.booted.machine import Machine
from tests.booted.nspawn import Nspawn
from tests.booted.vm import Vm

GROUPS = "/sys/fs/cgroup/ckptd.slice"
COUNTS = r"""#!/usr/bin/python3
import os, subprocess, sys, time
last, kept = os.environ["CKPTD_LAST"], bytearray(b"x") * (int(sys.argv[1]) << 20)
count = int(open(last + "/count").read()) if last else 0
os.chdir(os.environ["CKPTD_DIR"])
while True:
    count += 1
    open("count", "w").write(str(count))
    how_far = f"{count}/100000"
    for words in (["progress", how_far], ["save", "count", "--progress", how_far]):
        subprocess.run(["ckpt", *words], check=True)
    time.sleep(0.2)
"""


def counting(machine: Machine) -> int:
    """Return a task of alice's that saves, once it has."""
    machine.put("/usr/local/bin/counts", COUNTS, mode=0o755)
    submitted = machine.run(["ckptctl", "submit", "-q", "--", "counts", "30"], user="alice")
    task = int(submitted.out)
    machine.run(["ckptctl", "wait", "--for", "checkpoint", str(task)])
    return task


def drilled(machine: Machine, task: int, how: str, user: str) -> dict[str, Any]:
    words = ["ckptctl", "drill", str(task), f"--{how}", "--yes", "-o", "json"]
    done = machine.run(words, user=user, check=False)
    assert done.out, done.err
    found: dict[str, Any] = json.loads(done.out)["drill"]
    assert (done.code, found["passed"]) == (0, True), done.out
    return found


def causes(machine: Machine, task: int) -> list[str]:
    (detail,) = json.loads(machine.run(["ckptctl", "show", str(task), "-o", "json"]).out)["tasks"]
    assert detail["row"]["failures"] == 0
    return [one["cause"] for one in detail["attempts"]]


def test_a_unit_and_the_daemon_come_back_from_a_drill(machine: Nspawn) -> None:
    task = counting(machine)
    daemon = ["ckptctl", "drill", str(task), "--daemon", "--yes"]
    assert machine.run(daemon, user="alice", check=False).code == 77
    twice = machine.run([*daemon, "--restart", "ckptd"], check=False)
    assert (twice.code, "two would be started" in twice.err) == (5, True)
    assert drilled(machine, task, "daemon", "root")["attempts"] == [1, None]
    assert drilled(machine, task, "kill9", "alice")["attempts"] == [1, 2]
    assert drilled(machine, task, "sigterm", "alice")["attempts"] == [2, 3]
    assert causes(machine, task) == ["drill", "drill"]
    refused = machine.run(
        ["ckptctl", "drill", str(task), "--oom", "--yes"], user="alice", check=False
    )
    assert (refused.code, "cgroup v2" in refused.err) == (5, True)  # these machines have v1


def test_the_kernel_ends_a_starved_task_that_then_goes_on_with_the_memory_it_had(vm: Vm) -> None:
    task = counting(vm)
    assert drilled(vm, task, "oom", "alice")["attempts"] == [1, 2]
    assert causes(vm, task) == ["oom"]
    assert vm.sh(f"cat {GROUPS}/ckptd-task-{task}-2.service/memory.max").strip() == "max"
    small = vm.run(["ckptctl", "submit", "-q", "--", "sleep", "999"], user="alice").out.strip()
    vm.run(["ckptctl", "wait", "--for", "running", small])
    refused = vm.run(["ckptctl", "drill", small, "--oom", "--yes"], user="alice", check=False)
    assert (refused.code, "left for its end" in refused.err) == (5, True)
