"""Memory limits on a real kernel: whose memory ran out is told, and `--on-oom` does what it says.

Each task takes memory page by page until the kernel ends it or its child. Also the other limits.
"""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.booted.test_shutdown import causes, detail_of, row_of
from tests.booted.vm import Vm
from tests.waiting import until

MIB = 1 << 20
GROUPS = "/sys/fs/cgroup/ckptd.slice"
EATS = """#!/usr/bin/python3
import sys, time
# eats MIB [then stay]
kept = [bytearray(b"x") * (1 << 20) for mib in range(int(sys.argv[1]))]
print("full", flush=True)
while sys.argv[2:]:
    time.sleep(1)
"""
# Takes memory until a process is gone; it is the last that the kernel would choose.
PRESSES = """#!/usr/bin/python3
import os, sys
open("/proc/self/oom_score_adj", "w").write("-1000")
kept = []
while os.path.exists(f"/proc/{sys.argv[1]}"):
    kept.append(bytearray(b"x") * (4 << 20))
"""
# Saves what it did before it takes the memory, and does not do it again.
SAVES_AND_EATS = """#!/bin/sh
if [ "$CKPTD_RESUME" = 1 ]; then echo "goes on: $(cat "$CKPTD_LAST/work")"
else echo half >"$CKPTD_DIR/stage/work"; mv "$CKPTD_DIR/stage" "$CKPTD_DIR/ckpt/1"; fi
exec eats "$1"
"""


@pytest.fixture
def machine(vm: Vm) -> Vm:
    for name, text in (("eats", EATS), ("presses", PRESSES), ("saves-and-eats", SAVES_AND_EATS)):
        vm.put(f"/usr/local/bin/{name}", text, mode=0o755)
    return vm


def submitted(machine: Vm, options: str, *words: str) -> int:
    argv = ["ckptctl", "submit", "-q", *options.split(), "--", *words]
    return int(machine.run(argv, user="alice").out)


def settled(machine: Vm, task: int) -> dict[str, Any]:
    """Return what is told of a task once it neither runs nor is about to."""
    going_on = {"queued", "starting", "running"}
    until(lambda: row_of(machine, task)["phase"] not in going_on, 120, every_s=0.5)
    return detail_of(machine, task)


def ended(machine: Vm, task: int) -> dict[str, Any]:
    """Return what is told of a task once its first attempt is over, whatever follows."""
    until(lambda: causes(machine, task), 120, every_s=0.5)
    return detail_of(machine, task)


def full(machine: Vm, task: int) -> int:
    """Wait until a task has the memory that it wants; return its pid."""
    logs = ["ckptctl", "logs", str(task)]
    until(lambda: "full" in machine.run(logs, check=False).out, 60, every_s=0.5)
    return int(row_of(machine, task)["pid"])


def first_end(detail: dict[str, Any]) -> Sequence[object]:
    first = detail["attempts"][0]
    return tuple(first[name] for name in ("cause", "blame", "code", "signal"))


def seen(machine: Vm, task: int) -> str:
    return " ".join(machine.run(["ckptctl", "show", str(task)]).out.split())


# --- whose memory it was --------------------------------------------------------------------


def test_the_task_its_child_and_the_host_are_three_different_ends(machine: Vm) -> None:
    itself = submitted(machine, "--memory 40M", "eats", "100")
    child = submitted(machine, "--memory 40M", "sh", "-c", "eats 100; exit $?")
    victim = submitted(machine, "--memory 300M", "eats", "200", "stay")
    machine.run(["presses", str(full(machine, victim))])

    ends = {task: first_end(ended(machine, task)) for task in (itself, child, victim)}
    texts = {task: seen(machine, task) for task in ends}

    assert ends[itself] == ("oom", "limit", None, 9)
    assert ends[child] == ("oom", "limit", 137, 9)
    assert ends[victim] == ("oom", "host", None, 9)
    assert "failed: over its memory limit command" in texts[itself].replace("group", "command")
    assert "its own limit of 41943040 bytes was hit" in texts[itself]
    assert "over its memory limit, a child was killed (exit 137)" in texts[child]
    assert "killer ended a child of it (1)" in texts[child]
    assert "the host ran out of memory" in texts[victim]
    assert "memory ran out around it: the kernel's OOM killer ended it (1)" in texts[victim]
    assert "limit of" not in texts[victim]


def test_a_host_out_of_memory_is_no_failure_of_its_victim_which_runs_again(machine: Vm) -> None:
    plain = submitted(machine, "", "eats", "200", "stay")
    machine.run(["presses", str(full(machine, plain))])

    row = ended(machine, plain)["row"]

    assert (row["failures"], row["interruptions"]) == (0, 1)
    until(lambda: (row_of(machine, plain)["attempt"], row_of(machine, plain)["phase"])
          == (2, "running"), 60, every_s=0.5)  # fmt: skip
    assert machine.show("ckptd", "NRestarts") == "0"
    assert not machine.failed_units()


def test_tasks_without_limits_that_want_all_the_memory_cost_one_of_them(machine: Vm) -> None:
    small = submitted(machine, "", "eats", "100", "stay")
    pid = full(machine, small)
    large = submitted(machine, "--retries 0", "eats", "2000")

    detail = ended(machine, large)

    assert first_end(detail) == ("oom", "host", None, 9)
    assert detail["row"]["failures"] == 0
    assert (row_of(machine, small)["pid"], row_of(machine, small)["phase"]) == (pid, "running")


def test_a_limit_of_the_slice_above_is_not_the_tasks_own(machine: Vm) -> None:
    machine.sh("systemctl set-property --runtime ckptd.slice MemoryMax=100M MemorySwapMax=0")
    task = submitted(machine, "--memory 500M", "eats", "200")
    inside = submitted(machine, "--memory 500M", "sh", "-c", "eats 200; exit 137")

    assert first_end(ended(machine, task)) == ("oom", "host", None, 9)
    assert first_end(ended(machine, inside)) == ("oom", "host", 137, 9)
    assert "lost a child, killed because the host ran out of memory" in seen(machine, inside)


def test_who_can_live_without_its_killed_child_succeeds(machine: Vm) -> None:
    task = submitted(machine, "--memory 40M", "sh", "-c", "eats 100; echo went on")

    assert settled(machine, task)["row"]["phase"] == "succeeded"
    assert "went on" in machine.run(["ckptctl", "logs", str(task)]).out


# --- what becomes of it ---------------------------------------------------------------------


def test_retry_raises_the_limit_until_it_is_enough_and_counts_no_failure(machine: Vm) -> None:
    options = "--memory 40M --on-oom retry:x2,max=1G"
    task = submitted(machine, options, "saves-and-eats", "100")

    detail = settled(machine, task)

    assert [one["cause"] for one in detail["attempts"]] == ["oom", "oom", "exit"]
    limits = [f"limit of {mib * MIB} bytes" for mib in (40, 80)]
    assert all(limit in one["text"] for limit, one in zip(limits, detail["attempts"], strict=False))
    row = detail["row"]
    assert (row["phase"], row["failures"], row["interruptions"]) == ("succeeded", 0, 0)
    assert detail["spec"]["memory_bytes"] == 160 * MIB
    assert machine.run(["ckptctl", "logs", str(task)]).out.count("goes on: half") == 2


def test_retry_at_its_greatest_limit_is_a_failure(machine: Vm) -> None:
    task = submitted(machine, "--memory 40M --on-oom retry:x2,max=60M --retries 0", "eats", "100")

    detail = settled(machine, task)

    assert len(detail["attempts"]) == 2
    assert f"limit of {60 * MIB} bytes" in detail["attempts"][1]["text"]
    assert (detail["row"]["phase"], detail["row"]["failures"]) == ("failed", 1)


def test_held_at_its_limit_it_goes_on_when_a_person_gives_it_more(machine: Vm) -> None:
    command = ["sh", "-c", "saves-and-eats 100; exit $?"]
    task = submitted(machine, "--memory 40M --on-oom hold --retries 3", *command)

    held = settled(machine, task)["row"]
    why = seen(machine, task)
    machine.run(["ckptctl", "edit", str(task), "--memory", "200M"], user="alice")
    machine.run(["ckptctl", "release", str(task)], user="alice")
    done = settled(machine, task)["row"]

    assert (held["phase"], held["reason"], held["attempt"]) == ("held", "oom", 1)
    assert "held because it went over its memory limit" in why
    assert (done["phase"], done["attempt"], done["failures"]) == ("succeeded", 2, 0)
    assert "goes on: half" in machine.run(["ckptctl", "logs", str(task)]).out


@pytest.mark.parametrize(
    ("option", "ends"),
    [
        ("--on-oom fail --retries 5", ("failed", "oom", 1)),
        ("--on-oom count --retries 0", ("failed", "", 1)),
        ("--retries 5 --backoff 1s..1s", ("quarantined", "crashes at the same place", 2)),
    ],
)
def test_fail_fails_at_once_and_count_is_a_failure_like_others(
    machine: Vm, option: str, ends: Sequence[object]
) -> None:
    task = submitted(machine, f"--memory 40M {option}", "eats", "100")

    going_on = {"queued", "starting", "running", "waiting"}
    until(lambda: row_of(machine, task)["phase"] not in going_on, 120, every_s=0.5)

    row = row_of(machine, task)
    assert (row["phase"], row["reason"], row["attempt"]) == ends


def test_the_configuration_says_what_is_done_where_the_task_does_not(machine: Vm) -> None:
    machine.sh("mkdir -p /etc/ckptd; printf '[task]\\non_oom = \"hold\"\\n' >/etc/ckptd/ckptd.toml")
    machine.sh("systemctl reload ckptd")
    task = submitted(machine, "--memory 40M", "sh", "-c", "eats 100; exit 2")

    row = settled(machine, task)["row"]

    assert (row["phase"], row["reason"], row["cause"]) == ("held", "oom", "exit")


# --- the other limits -----------------------------------------------------------------------


def group_of(machine: Vm, task: int) -> str:
    until(lambda: row_of(machine, task)["phase"] == "running", 60, every_s=0.5)
    return f"{GROUPS}/ckptd-task-{task}-1.service"


def test_every_limit_is_that_of_the_units_control_group(machine: Vm) -> None:
    options = "--memory 64M --cpus 0.5 --tasks-max 20 --nice 7"
    task = submitted(machine, options, "sleep", "1000")
    group = group_of(machine, task)

    names = ("memory.max", "memory.swap.max", "memory.oom.group", "cpu.max", "pids.max")
    told = {name: machine.sh(f"cat {group}/{name} 2>/dev/null || true").strip() for name in names}
    nice = machine.sh(f"ps -o ni= -p {row_of(machine, task)['pid']}").strip()

    assert told["memory.max"] == str(64 * MIB)
    assert told["memory.swap.max"] in {"0", ""}  # "": a kernel without swap
    assert told["memory.oom.group"] == "0"
    assert told["cpu.max"] == "50000 100000"
    assert told["pids.max"] == "20"
    assert nice == "7"
    assert not detail_of(machine, task)["warning"]


def test_a_busy_task_gets_no_more_than_its_processors_worth(machine: Vm) -> None:
    task = submitted(machine, "--cpus 0.2", "sh", "-c", "while :; do :; done")
    group = group_of(machine, task)

    def throttled() -> int:
        stat = dict(line.split() for line in machine.sh(f"cat {group}/cpu.stat").splitlines())
        return int(stat["nr_throttled"])

    until(lambda: throttled() >= 10, 60, every_s=0.5)


def test_a_task_that_forks_without_end_is_refused_more(machine: Vm) -> None:
    bomb = "for i in $(seq 100); do sleep 1000 & done; wait"
    task = submitted(machine, "--tasks-max 20", "bash", "-c", bomb)
    group = group_of(machine, task)

    until(lambda: machine.sh(f"cat {group}/pids.events").split() > ["max", "0"], 60, every_s=0.5)

    assert int(machine.sh(f"cat {group}/pids.peak 2>/dev/null || cat {group}/pids.current")) <= 20
    assert machine.run(["true"], user="alice").code == 0
