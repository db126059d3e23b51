"""The journal of a booted machine: one task's whole story, explained, and nobody waits for it."""

import json
from collections.abc import Callable
from typing import Any, Protocol

import pytest

from tests.waiting import until

Sh = Callable[[str], str]


class Booted(Protocol):
    """What is needed of a machine of the rig."""

    def sh(self, script: str, *, check: bool = True) -> str:
        """Run a script in it as root; return what it prints."""
        ...


@pytest.fixture
def sh(machine: Booted) -> Sh:
    return machine.sh


# It ends once journald goes on: what is left is told for ten seconds after an end, then left out.
LOUD = """seq 2000; echo done >/tmp/is-done-$CKPTD_TASK_ID
until [ -e /tmp/go-$CKPTD_TASK_ID ]; do sleep 0.1; done"""

# Not runuser: that logs a session, and waits for the journald that the tests stop.
MEMBER = "setpriv --reuid=1000 --regid=1000 --init-groups ckptctl"


def submit(sh: Sh, script: str, options: str = "") -> int:
    return int(sh(f"cd / && {MEMBER} submit -q --journal {options} -- sh -c '{script}'"))


def entries(sh: Sh, *matches: object) -> list[dict[str, Any]]:
    """Return what the journal of this boot has, oldest first."""
    found = sh(f"journalctl -b -o json --no-pager {' '.join(map(str, matches))} || true")
    return [json.loads(line) for line in found.splitlines() if line.startswith("{")]


def story(sh: Sh, task: int) -> list[str]:
    return [entry["MESSAGE"] for entry in entries(sh, f"CKPTD_TASK_ID={task}")]


def has_ended(sh: Sh, task: int) -> bool:
    ends = entries(sh, f"CKPTD_TASK_ID={task}", "CKPTD_EVENT=task_ended")
    return bool(ends)


def test_one_match_shows_the_whole_story_of_a_task(sh: Sh) -> None:
    task = submit(sh, "echo hello; printf rest; exit 3", "-n backup --retries 1 --backoff 0.1s")
    until(lambda: has_ended(sh, task), 30, every_s=0.2)
    found = [entry for entry in entries(sh, f"CKPTD_TASK_ID={task}") if "CKPTD_EVENT" in entry]
    assert [entry["CKPTD_EVENT"] for entry in found] == [
        "task_submitted", "task_started", "task_output", "task_output", "task_retrying",
        "task_started", "task_output", "task_output", "task_ended",
    ]  # fmt: skip
    told = [entry for entry in found if entry["CKPTD_EVENT"] == "task_output"]
    assert [entry["MESSAGE"] for entry in told] == ["hello", "rest"] * 2
    assert {entry["SYSLOG_IDENTIFIER"] for entry in told} == {"ckptd/backup"}
    end = found[-1]
    assert (end["CKPTD_PHASE"], end["CKPTD_CAUSE"], end["PRIORITY"]) == ("failed", "exit", "4")
    assert end["CKPTD_UNIT"] == f"ckptd-task-{task}-2.service"
    assert end["_SYSTEMD_UNIT"] == "ckptd.service"


def test_every_task_of_a_bulk_is_found(sh: Sh) -> None:
    script = f"""cd /; for i in 1 2 3; do printf '[[task]]\\ncommand = "true"\\n'; done >/tmp/b.toml
    chmod a+r /tmp/b.toml; {MEMBER} submit -q --file /tmp/b.toml"""
    ids = [int(word) for word in sh(script).split()]
    until(lambda: all(has_ended(sh, task) for task in ids), 30, every_s=0.2)
    assert {story(sh, task)[0] for task in ids} == {
        f"3 tasks submitted by uid 1000: {ids[0]} to {ids[-1]}"
    }


def test_journalctl_explains_what_happened(sh: Sh) -> None:
    task = submit(sh, "exit 1", "--retries 9 --backoff 0.1s..0.1s")
    match = f"CKPTD_TASK_ID={task} CKPTD_EVENT=task_quarantined"
    until(lambda: entries(sh, match), 30, every_s=0.2)
    text = sh(f"journalctl -b -x --no-pager {match}")
    assert f"Subject: Task {task} is in quarantine" in text
    assert f"ckptctl quarantine release {task}" in text
    assert "@" not in text.partition("Subject")[2]
    assert [entry["PRIORITY"] for entry in entries(sh, match)] == ["2"]


def test_a_stopped_journald_stops_neither_the_daemon_nor_a_task(sh: Sh) -> None:
    journald = sh("systemctl show -P MainPID systemd-journald").strip()
    sh(f"kill -STOP {journald}")
    try:
        task = submit(sh, LOUD, "-n loud")
        until(lambda: sh(f"cat /tmp/is-done-{task} || true"), 30, every_s=0.2)
        for _ in range(5):
            sh(f"cd / && {MEMBER} submit -q -- true && {MEMBER} daemon ping")
    finally:
        sh(f"kill -CONT {journald}")
    sh(f"touch /tmp/go-{task}")
    until(lambda: has_ended(sh, task), 30, every_s=0.2)
    until(lambda: len(story(sh, task)) >= 2_003, 30, every_s=0.5)
    told = [e["MESSAGE"] for e in entries(sh, f"CKPTD_TASK_ID={task}", "CKPTD_STREAM=output")]
    assert told == [str(number) for number in range(1, 2_001)]


def test_what_journald_never_took_is_counted_and_told(sh: Sh) -> None:
    """More lines than may wait: a bulk of held tasks has lines of 10 kB."""
    journald = sh("systemctl show -P MainPID systemd-journald").strip()
    dropped = "ckptctl stats -o json | grep -o '\"journal_dropped\": [0-9]*' | grep -o '[0-9]*$'"
    fill = "for i in $(seq 2000); do printf '[[task]]\\ncommand = \"true\"\\nhold = true\\n'; done"
    before, dropped_before = len(entries(sh, "CKPTD_EVENT=lines_dropped")), int(sh(dropped))
    sh(f"kill -STOP {journald}")
    try:
        sh(f"cd / && {fill} >/tmp/many.toml && chmod a+r /tmp/many.toml")
        for _ in range(60):
            sh(f"cd / && {MEMBER} submit -q --file /tmp/many.toml >/dev/null")
            if int(sh(dropped)) > dropped_before:
                break
        assert int(sh(dropped)) > dropped_before
    finally:
        sh(f"kill -CONT {journald}")

    def is_all_told() -> bool:
        told = entries(sh, "CKPTD_EVENT=lines_dropped")[before:]
        count = int(sh(dropped)) - dropped_before  # more may have waited in vain meanwhile
        return sum(int(entry["CKPTD_COUNT"]) for entry in told) == count

    until(is_all_told, 30, every_s=0.2)


def test_a_killed_daemon_and_a_restarted_journald_lose_no_line(sh: Sh) -> None:
    task = submit(sh, "for i in $(seq 150); do echo n $i; sleep 0.02; done", "-n steady")
    until(lambda: len(story(sh, task)) > 20, 30, every_s=0.1)
    sh("systemctl kill -s KILL ckptd.service")
    until(lambda: len(story(sh, task)) > 60, 30, every_s=0.1)
    sh("systemctl restart systemd-journald")
    until(lambda: has_ended(sh, task), 30, every_s=0.2)
    lines = [e["MESSAGE"] for e in entries(sh, f"CKPTD_TASK_ID={task}", "CKPTD_STREAM=output")]
    assert list(dict.fromkeys(lines)) == [f"n {number}" for number in range(1, 151)]
    adopted = entries(sh, f"CKPTD_TASK_ID={task}", "CKPTD_EVENT=attempt_adopted")
    assert len(adopted) == 1


def test_the_catalog_is_installed_whole(sh: Sh) -> None:
    known = sh("journalctl --list-catalog --no-pager")
    assert len([line for line in known.splitlines() if "ckptd: " in line]) >= 30
