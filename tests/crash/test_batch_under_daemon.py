"""Batches as tasks of a daemon: whoever dies, every item has one result in the end.

The runner, the daemon or both are killed; the batch is parked, cancelled, taken up again.
"""

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.daemon_fixture import LiveDaemon, kill_quietly
from tests.waiting import let_pass, until

SHORT = 'echo "$0" >>runs; sleep 0.03'


def submit(daemon: LiveDaemon, *words: str) -> int:
    return int(daemon.ctl("batch", "submit", "-q", "-n", "census", *words).stdout)


def status(daemon: LiveDaemon) -> dict[str, Any]:
    (batch,) = daemon.json("batch", "status", "census")["batches"]
    assert isinstance(batch, dict)
    return batch


def results(daemon: LiveDaemon) -> dict[str, Any]:
    lines = daemon.ctl("batch", "export", "census").stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert len({one["key"] for one in found}) == len(found)
    return {
        one["key"]: one["result"] if one["status"] == "pass" else one["status"] for one in found
    }


def runs(daemon: LiveDaemon) -> Counter[str]:
    path = daemon.work / "runs"
    return Counter(path.read_text().split() if path.exists() else [])


def runner_pid(daemon: LiveDaemon) -> int:
    """Return the runner at work, 0 while there is none."""
    lock = daemon.root / "batches" / "census" / "LOCK"
    try:
        return int(json.loads(lock.read_text())["pid"])
    except (OSError, ValueError, KeyError):
        return 0


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def test_a_batch_is_one_task_that_ends_when_all_items_have_a_result(daemon: LiveDaemon) -> None:
    task = submit(daemon, "-j", "2", "sh", "-c", "echo $(($0 * 2))", ":::", *numbers(6))
    assert daemon.ctl("batch", "wait", "census").returncode == 0
    daemon.wait_phase(task, "succeeded")
    assert results(daemon) == {str(n): str(n * 2) for n in range(6)}
    batch = status(daemon)
    assert (batch["state"], batch["task"], batch["done"]) == ("finished", task, 6)
    assert os.listdir(daemon.root / "batches" / "census" / "items") == []


def test_killed_runners_repeat_no_more_than_what_was_in_flight(daemon: LiveDaemon) -> None:
    items, workers, kills = numbers(60), 4, 3
    task = submit(daemon, f"-j{workers}", "sh", "-c", SHORT, ":::", *items)
    for round_number in range(kills):
        before = sum(runs(daemon).values())
        until(lambda before=before: sum(runs(daemon).values()) > before)  # type: ignore[misc]
        kill_quietly(runner_pid(daemon))
        attempts = round_number + 2
        until(lambda n=attempts: daemon.row(task)["attempt"] >= n, 20.0, every_s=0.05)  # type: ignore[misc]
    daemon.wait_phase(task, "succeeded", timeout_s=40.0)
    assert results(daemon).keys() == set(items)
    assert len(runs(daemon)) == len(items)
    assert sum(runs(daemon).values()) <= len(items) + kills * workers


def test_a_batch_outlives_its_daemon(daemon: LiveDaemon) -> None:
    items = numbers(40)
    task = submit(daemon, "-j2", "sh", "-c", SHORT, ":::", *items)
    rng = random.Random(7)
    for _ in range(2):
        until(lambda: runs(daemon))
        let_pass(rng.uniform(0.0, 0.2))
        daemon.restart()
    row = daemon.wait_phase(task, "succeeded", timeout_s=40.0)
    assert row["attempt"] == 1  # it was adopted, never started again
    assert runs(daemon) == Counter(items)


def test_a_rate_limited_batch_gives_its_slot_back_and_goes_on_when_it_may(
    daemon: LiveDaemon,
) -> None:
    ask = f"""echo "$0" >>runs
if [ "$0" = 1 ] && [ ! -e open ]; then
    touch open; "{sys.executable}" -m ckptd.sdk.ckpt retry-after 3; exit 75
fi"""
    daemon.ctl("group", "add", "narrow", "--parallel", "1")
    task = submit(
        daemon, "-g", "narrow", "-j1", "--park-after", "0.5s", "sh", "-c", ask, ":::", *numbers(4)
    )
    row = daemon.wait_phase(task, "waiting")
    assert (row["reason"], row["failures"]) == ("rate_limit", 0)
    batch = status(daemon)
    assert batch["state_text"].startswith("waiting: rate limit, in")
    assert batch["pause_count"] == 1

    other = daemon.submit("true", options=["-g", "narrow"])
    daemon.wait_phase(other, "succeeded")  # the slot is free
    daemon.restart()  # what it waits for is durable
    daemon.wait_phase(task, "succeeded", timeout_s=30.0)

    assert runs(daemon) == {"0": 1, "1": 2, "2": 1, "3": 1}
    batch = status(daemon)
    assert (batch["pause_count"], batch["resume_count"]) == (1, 1)
    assert batch["wait_s"] >= 2.9


def test_errors_fail_the_task_and_retrying_them_is_a_new_one(daemon: LiveDaemon) -> None:
    flaky = 'echo "$0" >>runs; [ "$0" != 2 ] || [ -e mended ] || exit 9'
    task = submit(daemon, "sh", "-c", flaky, ":::", *numbers(4))
    assert daemon.ctl("batch", "wait", "census", check=False).returncode == 1
    assert daemon.wait_phase(task, "failed")["code"] == 1
    assert results(daemon)["2"] == "error"
    (daemon.work / "mended").touch()
    again = daemon.ctl("batch", "retry", "census", "--errors", "--wait", "-q")
    assert int(again.stdout) > task
    assert results(daemon)["2"] is None  # it passed, and printed nothing
    assert runs(daemon) == {"0": 1, "1": 1, "2": 2, "3": 1}


def test_a_cancelled_batch_is_unfinished_and_goes_on_when_submitted_again(
    daemon: LiveDaemon,
) -> None:
    stuck = 'echo "$0" >>runs; [ "$0" -lt 3 ] || [ -e open ] || exec sleep 30'
    line = ("-j1", "--grace", "3s", "sh", "-c", stuck, ":::", *numbers(8))
    task = submit(daemon, *line)
    until(lambda: runs(daemon)["3"])
    assert submit(daemon, *line) == task  # the same line while it runs is the same task
    daemon.ctl("cancel", str(task))
    daemon.wait_phase(task, "cancelled")
    batch = status(daemon)
    assert (batch["state"], batch["done"]) == ("unfinished", 3)
    assert daemon.ctl("batch", "status", "census", "--check", check=False).returncode == 3

    (daemon.work / "open").touch()
    again = submit(daemon, *line)
    assert again != task
    assert daemon.ctl("batch", "wait", "census").returncode == 0
    assert runs(daemon) == Counter([*numbers(8), "3"])  # what was in flight, once more


def test_new_items_alone_run_when_the_list_has_grown(daemon: LiveDaemon, tmp_path: Path) -> None:
    listed = daemon.work / "list"
    listed.write_text("b\na\n")
    line = ("-i", str(listed), "sh", "-c", 'echo "$0" >>runs')
    submit(daemon, *line)
    daemon.ctl("batch", "wait", "census")
    listed.write_text("c\na\nb\n")
    submit(daemon, *line)
    daemon.ctl("batch", "wait", "census")
    assert runs(daemon) == {"a": 1, "b": 1, "c": 1}
    done = daemon.ctl("batch", "submit", "-n", "census", *line)
    assert (done.stdout, done.returncode) == ("", 0)
    assert "nothing is left to do" in done.stderr
