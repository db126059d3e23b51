"""Power-off and reboot by systemd: every task saves first, and carries on by itself."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.booted.machine import Machine
from tests.booted.nspawn import Nspawn
from tests.waiting import until

SAVES = r"""#!/bin/bash
# counts; at SIGTERM it saves the count, which takes $1 seconds
save() {
  sleep "$seconds" & wait $!
  echo "$count" >"$CKPTD_DIR/stage/count"; mv "$CKPTD_DIR/stage" "$CKPTD_DIR/ckpt/$count"
  exit 0
}
seconds=$1 count=0
trap save TERM
[ -z "$CKPTD_LAST" ] || count=$(cat "$CKPTD_LAST/count")
echo "counts from $count"
while :; do count=$((count + 1)); sleep 0.1 & wait $!; done
"""


def row_of(machine: Machine, task: int) -> dict[str, Any]:
    """Return the row of a task in `ckptctl status`."""
    out = machine.run(["ckptctl", "status", str(task), "-o", "json"]).out
    row: dict[str, Any] = json.loads(out)["tasks"][0]
    return row


def detail_of(machine: Machine, task: int) -> dict[str, Any]:
    """Return what `ckptctl show` says of a task."""
    out = machine.run(["ckptctl", "show", str(task), "-o", "json"]).out
    detail: dict[str, Any] = json.loads(out)["tasks"][0]
    return detail


def submit(machine: Machine, *words: str, options: str = "", user: str = "alice") -> int:
    """Submit a command that runs, and return its task once it does."""
    argv = ["ckptctl", "submit", "-q", *options.split(), "--", *words]
    task = int(machine.run(argv, user=user).out)
    until(lambda: row_of(machine, task)["phase"] == "running", 20)
    if words[0] == "saves":
        until(lambda: "counts from" in machine.run(["ckptctl", "logs", str(task)]).out, 20)
    return task


def until_running_again(machine: Machine, task: int) -> None:
    """Wait for another attempt of a task."""
    until(lambda: (row_of(machine, task)["attempt"], row_of(machine, task)["phase"])
          == (2, "running"), 30)  # fmt: skip


def causes(machine: Machine, task: int) -> list[str]:
    """Return how the attempts of a task that are over have ended."""
    return [one["cause"] for one in detail_of(machine, task)["attempts"] if one["ended_at"]]


def has_resumed(machine: Machine, task: int) -> bool:
    """Tell whether the newest attempt started from the checkpoint that the one before saved."""
    saved = detail_of(machine, task)["row"]["checkpoint"]
    logs = machine.run(["ckptctl", "logs", str(task)]).out
    return saved > 0 and f"resumes from checkpoint {saved} ---" in logs


@pytest.fixture
def machine_of_mine(fresh_machine: Callable[[], Nspawn]) -> Nspawn:
    machine = fresh_machine()
    machine.put("/usr/local/bin/saves", SAVES, mode=0o755)
    return machine


def test_at_power_off_every_task_saves_first_and_goes_on_from_there_after_the_boot(
    machine_of_mine: Nspawn,
) -> None:
    machine = machine_of_mine
    tasks = [submit(machine, "saves", "3", user=user) for user in ("alice", "bob", "alice")]
    deaf = submit(machine, "sh", "-c", "trap '' TERM; while :; do sleep 1; done",
                  options="--grace 2s")  # fmt: skip

    machine.poweroff()
    machine.boot()

    for task in tasks:
        until_running_again(machine, task)
        detail = detail_of(machine, task)
        assert causes(machine, task) == ["shutdown"]
        assert has_resumed(machine, task)
        assert (detail["row"]["failures"], detail["row"]["interruptions"]) == (0, 1)
    until_running_again(machine, deaf)
    assert causes(machine, deaf) == ["shutdown"]
    assert not machine.failed_units()


def test_a_dead_daemon_is_not_needed_for_tasks_to_save_at_a_reboot(
    machine_of_mine: Nspawn,
) -> None:
    machine = machine_of_mine
    task = submit(machine, "saves", "1")
    machine.sh("systemctl stop ckptd.socket ckptd.service 2>/dev/null; systemctl stop ckptd")
    machine.sh("systemctl is-active ckptd-drain")

    machine.reboot()

    until_running_again(machine, task)
    assert causes(machine, task) == ["shutdown"]
    assert has_resumed(machine, task)


def test_a_paused_task_is_let_go_on_so_that_it_can_save(machine_of_mine: Nspawn) -> None:
    machine = machine_of_mine
    task = submit(machine, "saves", "1")
    machine.run(["ckptctl", "pause", str(task)], user="alice")

    machine.reboot()

    until(lambda: row_of(machine, task)["attempt"] == 2, 30)
    assert has_resumed(machine, task)
    assert causes(machine, task) == ["shutdown"]


def test_stopping_the_slice_ends_every_task_and_the_daemon_and_all_of_it_comes_back(
    machine_of_mine: Nspawn,
) -> None:
    machine = machine_of_mine
    task = submit(machine, "saves", "1")

    machine.sh("systemctl stop ckptd.slice")

    assert machine.show("ckptd.service", "ActiveState") == "inactive"
    assert machine.sh("systemctl list-units --plain --no-legend 'ckptd-task-*' | wc -l") == "0\n"
    machine.sh("systemctl start ckptd")
    until_running_again(machine, task)
    assert causes(machine, task) == ["shutdown"]
    assert machine.show("ckptd-drain.service", "ActiveState") == "active"
    assert not machine.exists("/run/ckptd/stopping")
