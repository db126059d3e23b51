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
# Takes memory until the kernel ends somebody; it is the last that the kernel would choose.
PRESSES = """#!/usr/bin/python3
open("/proc/self/oom_score_adj", "w").write("-1000")
def kills():
    return [line for line in open("/proc/vmstat") if line.startswith("oom_kill ")]
kept, before = [], kills()
while kills() == before:
    kept.append(bytearray(b"x") * (1 << 20))
"""
# Saves what it did before it takes the memory, and does not do it again.
SAVES_AND_EATS = """#!/bin/sh
if [ "$CKPTD_RESUME" = 1 ]; then echo "goes on: $(cat "$CKPTD_LAST/work")"
else echo half >"$CKPTD_DIR/stage/work"; mv "$CKPTD_DIR/stage" "$CKPTD_DIR/ckpt/1"; fi
exec eats "$1"
"""


@pytest.fixture
def guest(vm: Vm) -> Vm:
    for name, text in (("eats", EATS), ("presses", PRESSES), ("saves-and-eats", SAVES_AND_EATS)):
        vm.put(f"/usr/local/bin/{name}", text, mode=0o755)
    return vm


def submitted(guest: Vm, options: str, *words: str) -> int:
    argv = ["ckptctl", "submit", "-q", *options.split(), "--", *words]
    return int(guest.run(argv, user="alice").out)


def settled(guest: Vm, task: int) -> dict[str, Any]:
    """Return what is told of a task once it neither runs nor is about to."""
    going_on = {"queued", "starting", "running"}
    until(lambda: row_of(guest, task)["phase"] not in going_on, 120, every_s=0.5)
    return detail_of(guest, task)


def ended(guest: Vm, task: int) -> dict[str, Any]:
    """Return what is told of a task once its first attempt is over, whatever follows."""
    until(lambda: causes(guest, task), 120, every_s=0.5)
    return detail_of(guest, task)


def full(guest: Vm, task: int) -> int:
    """Wait until a task has the memory that it wants; return its pid."""
    logs = ["ckptctl", "logs", str(task)]
    until(lambda: "full" in guest.run(logs, check=False).out, 60, every_s=0.5)
    return int(row_of(guest, task)["pid"])


def first_end(detail: dict[str, Any]) -> Sequence[object]:
    first = detail["attempts"][0]
    return tuple(first[name] for name in ("cause", "blame", "code", "signal"))


def seen(guest: Vm, task: int) -> str:
    return " ".join(guest.run(["ckptctl", "show", str(task)]).out.split())


# --- whose memory it was --------------------------------------------------------------------


def test_the_task_its_child_and_the_host_are_three_different_ends(guest: Vm) -> None:
    itself = submitted(guest, "--memory 40M", "eats", "100")
    child = submitted(guest, "--memory 40M", "sh", "-c", "eats 100; exit $?")
    victim = submitted(guest, "--memory 300M", "eats", "200", "stay")
    full(guest, victim)
    guest.run(["presses"])

    ends = {task: first_end(ended(guest, task)) for task in (itself, child, victim)}
    texts = {task: seen(guest, task) for task in ends}

    assert ends[itself] == ("oom", "limit", None, 9)
    assert ends[child] == ("oom", "limit", 137, 9)
    assert ends[victim] == ("oom", "host", None, 9)
    assert "failed: over its memory limit command" in texts[itself]
    assert "its own limit of 41943040 bytes was hit" in texts[itself]
    assert "over its memory limit, a child was killed (exit 137)" in texts[child]
    assert "killer ended a child of it (1)" in texts[child]
    assert "the host ran out of memory" in texts[victim]
    assert "memory ran out around it: the kernel's OOM killer ended it (1)" in texts[victim]
    assert "limit of" not in texts[victim]


def test_a_host_out_of_memory_is_no_failure_of_its_victim_which_runs_again(guest: Vm) -> None:
    plain = submitted(guest, "", "eats", "200", "stay")
    full(guest, plain)
    guest.run(["presses"])

    row = ended(guest, plain)["row"]

    assert (row["failures"], row["interruptions"]) == (0, 1)
    until(lambda: (row_of(guest, plain)["attempt"], row_of(guest, plain)["phase"])
          == (2, "running"), 60, every_s=0.5)  # fmt: skip
    assert guest.show("ckptd", "NRestarts") == "0"
    assert not guest.failed_units()


def test_tasks_without_limits_that_want_all_the_memory_cost_one_of_them(guest: Vm) -> None:
    small = submitted(guest, "", "eats", "100", "stay")
    pid = full(guest, small)
    large = submitted(guest, "--retries 0", "eats", "2000")

    detail = ended(guest, large)

    assert first_end(detail) == ("oom", "host", None, 9)
    assert detail["row"]["failures"] == 0
    assert (row_of(guest, small)["pid"], row_of(guest, small)["phase"]) == (pid, "running")


def test_a_limit_of_the_slice_above_is_not_the_tasks_own(guest: Vm) -> None:
    guest.sh("systemctl set-property --runtime ckptd.slice MemoryMax=100M MemorySwapMax=0")
    task = submitted(guest, "--memory 500M", "eats", "200")
    inside = submitted(guest, "--memory 500M", "sh", "-c", "eats 200; exit 137")

    assert first_end(ended(guest, task)) == ("oom", "host", None, 9)
    assert first_end(ended(guest, inside)) == ("oom", "host", 137, 9)
    assert "lost a child, killed because the host ran out of memory" in seen(guest, inside)


def test_who_can_live_without_its_killed_child_succeeds(guest: Vm) -> None:
    task = submitted(guest, "--memory 40M", "sh", "-c", "eats 100; echo went on")

    assert settled(guest, task)["row"]["phase"] == "succeeded"
    assert "went on" in guest.run(["ckptctl", "logs", str(task)]).out


# --- what becomes of it ---------------------------------------------------------------------


def test_retry_raises_the_limit_until_it_is_enough_and_counts_no_failure(guest: Vm) -> None:
    options = "--memory 40M --on-oom retry:x2,max=1G"
    task = submitted(guest, options, "saves-and-eats", "100")

    detail = settled(guest, task)

    assert [one["cause"] for one in detail["attempts"]] == ["oom", "oom", "exit"]
    limits = [f"limit of {mib * MIB} bytes" for mib in (40, 80)]
    assert all(limit in one["text"] for limit, one in zip(limits, detail["attempts"], strict=False))
    row = detail["row"]
    assert (row["phase"], row["failures"], row["interruptions"]) == ("succeeded", 0, 0)
    assert detail["spec"]["memory_bytes"] == 160 * MIB
    assert guest.run(["ckptctl", "logs", str(task)]).out.count("goes on: half") == 2


def test_retry_at_its_greatest_limit_is_a_failure(guest: Vm) -> None:
    task = submitted(guest, "--memory 40M --on-oom retry:x2,max=60M --retries 0", "eats", "100")

    detail = settled(guest, task)

    assert len(detail["attempts"]) == 2
    assert f"limit of {60 * MIB} bytes" in detail["attempts"][1]["text"]
    assert (detail["row"]["phase"], detail["row"]["failures"]) == ("failed", 1)


def test_held_at_its_limit_it_goes_on_when_a_person_gives_it_more(guest: Vm) -> None:
    command = ["sh", "-c", "saves-and-eats 100; exit $?"]
    task = submitted(guest, "--memory 40M --on-oom hold --retries 3", *command)

    held = settled(guest, task)["row"]
    why = seen(guest, task)
    guest.run(["ckptctl", "edit", str(task), "--memory", "200M"], user="alice")
    guest.run(["ckptctl", "release", str(task)], user="alice")
    done = settled(guest, task)["row"]

    assert (held["phase"], held["reason"], held["attempt"]) == ("held", "oom", 1)
    assert "held because it went over its memory limit" in why
    assert (done["phase"], done["attempt"], done["failures"]) == ("succeeded", 2, 0)
    assert "goes on: half" in guest.run(["ckptctl", "logs", str(task)]).out


@pytest.mark.parametrize(
    ("option", "ends"),
    [
        ("--on-oom fail --retries 5", ("failed", "oom", 1)),
        ("--on-oom count --retries 0", ("failed", "", 1)),
        ("--retries 5 --backoff 1s..1s", ("quarantined", "crashes at the same place", 2)),
    ],
)
def test_fail_fails_at_once_and_count_is_a_failure_like_others(
    guest: Vm, option: str, ends: Sequence[object]
) -> None:
    task = submitted(guest, f"--memory 40M {option}", "eats", "100")

    going_on = {"queued", "starting", "running", "waiting"}
    until(lambda: row_of(guest, task)["phase"] not in going_on, 120, every_s=0.5)

    row = row_of(guest, task)
    assert (row["phase"], row["reason"], row["attempt"]) == ends


def test_the_configuration_says_what_is_done_where_the_task_does_not(guest: Vm) -> None:
    guest.sh("mkdir -p /etc/ckptd; printf '[task]\\non_oom = \"hold\"\\n' >/etc/ckptd/ckptd.toml")
    guest.sh("systemctl reload ckptd")
    task = submitted(guest, "--memory 40M", "sh", "-c", "eats 100; exit 2")

    row = settled(guest, task)["row"]

    assert (row["phase"], row["reason"], row["cause"]) == ("held", "oom", "exit")


# --- the other limits -----------------------------------------------------------------------


def group_of(guest: Vm, task: int) -> str:
    until(lambda: row_of(guest, task)["phase"] == "running", 60, every_s=0.5)
    return f"{GROUPS}/ckptd-task-{task}-1.service"


def test_every_limit_is_that_of_the_units_control_group(guest: Vm) -> None:
    options = "--memory 64M --cpus 0.5 --tasks-max 20 --nice 7"
    task = submitted(guest, options, "sleep", "1000")
    group = group_of(guest, task)

    names = ("memory.max", "memory.swap.max", "memory.oom.group", "cpu.max", "pids.max")
    told = {name: guest.sh(f"cat {group}/{name} 2>/dev/null || true").strip() for name in names}
    nice = guest.sh(f"ps -o ni= -p {row_of(guest, task)['pid']}").strip()

    assert told["memory.max"] == str(64 * MIB)
    assert told["memory.swap.max"] in {"0", ""}  # "": a kernel without swap
    assert told["memory.oom.group"] == "0"
    assert told["cpu.max"] == "50000 100000"
    assert told["pids.max"] == "20"
    assert nice == "7"
    assert not detail_of(guest, task)["warning"]


def test_a_busy_task_gets_no_more_than_its_processors_worth(guest: Vm) -> None:
    task = submitted(guest, "--cpus 0.2", "sh", "-c", "while :; do :; done")
    group = group_of(guest, task)

    def throttled() -> int:
        stat = dict(line.split() for line in guest.sh(f"cat {group}/cpu.stat").splitlines())
        return int(stat["nr_throttled"])

    until(lambda: throttled() >= 10, 60, every_s=0.5)


def test_a_task_that_forks_without_end_is_refused_more(guest: Vm) -> None:
    bomb = "for i in $(seq 100); do sleep 1000 & done; wait"
    task = submitted(guest, "--tasks-max 20", "bash", "-c", bomb)
    group = group_of(guest, task)

    until(lambda: guest.sh(f"cat {group}/pids.events").split() > ["max", "0"], 60, every_s=0.5)

    assert int(guest.sh(f"cat {group}/pids.peak 2>/dev/null || cat {group}/pids.current")) <= 20
    assert guest.run(["true"], user="alice").code == 0
