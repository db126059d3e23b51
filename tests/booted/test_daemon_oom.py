"""The kernel's OOM killer ends the daemon: tasks do not notice, the next daemon tells every end.

Each task waits for a word, so that the test says which end falls into the daemon's absence.
"""

from collections.abc import Callable, Sequence

import pytest

from tests.booted.test_memory import PRESSES
from tests.booted.test_shutdown import row_of
from tests.booted.vm import Vm
from tests.waiting import until

WORK = "/srv/oom"
JOB = """#!/bin/sh
# job CODE: start, wait for a line, end so; with "child" a child of it does the waiting
lines=/srv/oom/$CKPTD_TASK_ID
mkfifo "$lines.go" && exec 3<>"$lines.go"
echo "start $$" >>"$lines"
if [ "$2" = child ]; then (read -r _ <&3); else read -r _ <&3; fi
echo "end $$" >>"$lines"
[ "$1" = signal ] && kill -KILL $$
exit "$1"
"""
# The daemon is kept away by a drop-in until the test lets it come back.
AWAY = "[Service]\nRestartSec=1d\n"
HOWS = {"0": ("succeeded", "exit", 0, None), "3": ("failed", "exit", 3, None),
        "signal": ("failed", "signal", None, 9)}  # fmt: skip


@pytest.fixture
def guest(vm: Vm) -> Vm:
    vm.put("/usr/local/bin/job", JOB, mode=0o755)
    vm.put("/usr/local/bin/presses", PRESSES, mode=0o755)
    vm.put("/run/systemd/system/ckptd.service.d/away.conf", AWAY)
    # Not sticky: there even root may not open another's pipe (fs.protected_fifos).
    vm.sh(f"mkdir -m 0777 {WORK}; systemctl daemon-reload")
    return vm


def submitted(guest: Vm, *words: str, user: str = "alice") -> int:
    task = int(guest.run(["ckptctl", "submit", "-q", "--", "job", *words], user=user).out)
    until(lambda: lines_of(guest, task), 60, every_s=0.5)
    until(lambda: row_of(guest, task)["phase"] == "running", 60, every_s=0.5)
    return task


def lines_of(guest: Vm, task: int) -> Sequence[str]:
    return guest.sh(f"cat {WORK}/{task} 2>/dev/null || true").splitlines()


def let_end(guest: Vm, task: int) -> None:
    """Give a task its word, and wait until its unit is over."""
    guest.sh(f"echo >{WORK}/{task}.go")
    unit = f"ckptd-task-{task}-1"
    until(lambda: guest.show(unit, "ActiveState") in {"inactive", "failed"}, 60, every_s=0.5)


def by_the_whole_host(guest: Vm, pid: str) -> None:
    """Memory runs out on the machine, and the daemon is what the kernel would rather lose."""
    guest.sh(f"echo 1000 >/proc/{pid}/oom_score_adj")
    guest.run(["presses"])


def by_its_own_limit(guest: Vm, pid: str) -> None:
    """The daemon's own control group has no room for it any more."""
    guest.sh("systemctl set-property --runtime ckptd MemoryMax=1M MemoryHigh=infinity", check=False)
    # What the kernel cannot reclaim at once is what the daemon needs for the next answer.
    guest.run(["ckptctl", "--answer-within", "5s", "status", "--all"], check=False)
    until(lambda: not guest.exists(f"/proc/{pid}"), 60, every_s=0.5)
    guest.sh("systemctl set-property --runtime ckptd MemoryMax=2G MemoryHigh=1G")


@pytest.mark.parametrize("out_of_memory", [by_the_whole_host, by_its_own_limit])
def test_tasks_outlive_a_daemon_killed_for_memory_and_every_end_is_told(
    guest: Vm, out_of_memory: Callable[[Vm, str], None]
) -> None:
    away = {how: submitted(guest, how) for how in HOWS}
    later = {how: submitted(guest, how, "child", user="bob") for how in HOWS}
    goes_on = submitted(guest, "0")
    pids = {task: row_of(guest, task)["pid"] for task in [*later.values(), goes_on]}
    daemon = guest.show("ckptd", "MainPID")

    out_of_memory(guest, daemon)
    until(lambda: guest.show("ckptd", "SubState") == "auto-restart", 60, every_s=0.5)
    assert f"Killed process {daemon} (ckptd" in guest.sh("dmesg | grep 'ut of memory: Killed'")
    for task in away.values():
        let_end(guest, task)
    guest.sh("rm -r /run/systemd/system/ckptd.service.d; systemctl daemon-reload")
    guest.sh("systemctl start ckptd")

    assert guest.show("ckptd", "MainPID") not in {"0", daemon}
    assert {task: row_of(guest, task)["pid"] for task in pids} == pids
    for task in later.values():
        let_end(guest, task)
    check_ends(guest, {**{task: how for how, task in away.items()},
                         **{task: how for how, task in later.items()}})  # fmt: skip
    assert row_of(guest, goes_on)["phase"] == "running"
    for task in (*away.values(), *later.values(), goes_on):
        assert [line.split()[0] for line in lines_of(guest, task)].count("start") == 1
        assert row_of(guest, task)["attempt"] == 1


def check_ends(guest: Vm, expected: dict[int, str]) -> None:
    for task, how in expected.items():
        until(lambda task=task: row_of(guest, task)["phase"] != "running", 60, every_s=0.5)  # type: ignore[misc]
        row = row_of(guest, task)
        told = tuple(row[name] for name in ("phase", "cause", "code", "signal"))
        assert told == HOWS[how], f"task {task} of {how}"
        assert not row["blame"], "it was not the task that ran out of memory"


def test_the_daemon_comes_back_by_itself_and_takes_requests(guest: Vm) -> None:
    # Not at once: it would ask for memory while what took it all is still being taken apart.
    soon = AWAY.replace("1d", "5s")
    guest.put("/run/systemd/system/ckptd.service.d/away.conf", soon)
    guest.sh("systemctl daemon-reload")
    task = submitted(guest, "0")
    pid, daemon = row_of(guest, task)["pid"], guest.show("ckptd", "MainPID")

    by_the_whole_host(guest, daemon)

    until(lambda: guest.show("ckptd", "MainPID") not in {"0", daemon}, 60, every_s=0.5)
    until(lambda: guest.show("ckptd", "ActiveState") == "active", 60, every_s=0.5)
    assert row_of(guest, task)["pid"] == pid
    after = guest.sh(f"cat /proc/{guest.show('ckptd', 'MainPID')}/oom_score_adj").strip()
    assert after == "-900"
    let_end(guest, task)
    check_ends(guest, {task: "0"})
    assert guest.run(["ckptctl", "run", "--", "true"], user="bob").code == 0
