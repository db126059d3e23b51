"""`ckptctl drill` against a real daemon: real damage, and the proof that the task came back."""

import json
import re
import shlex
import sys

import pytest

from tests.daemon_fixture import LiveDaemon, StartDaemon, parent_of
from tests.waiting import until

COUNTING = """
import os, subprocess, sys, time
last = os.environ["CKPTD_LAST"]
count = int(open(last + "/count").read()) if last else 0
while not os.path.exists("go"):
    count += 1
    open("count", "w").write(str(count))
    how_far = f"{count}/1000000"
    for words in (["progress", how_far], ["save", "count", "--progress", how_far]):
        subprocess.run([sys.executable, "-m", "ckptd.sdk.ckpt", *words], check=True)
"""
"""Counts, and saves at each step, until there is the file `go`."""

FORGETS = COUNTING.replace('os.environ["CKPTD_LAST"]', '""')
"""The same, but it never looks at what was saved."""

MUTE = COUNTING.replace('["progress", how_far], ', "").replace('"--progress", how_far]', "],")
"""The same as the first, but it does not say how far it is."""

HASTY = """
import os
from ckptd.sdk import ckpt
count = 10_000 if os.environ["CKPTD_ATTEMPT"] == "1" else 0
while True:
    count += 1
    open("count", "w").write(str(count))
    ckpt.run(["save", "count", "--progress", f"{count}/1000000"])
"""
"""Begins anew, and saves so fast that what it was handed is deleted within an instant."""

LEAVES = """
import json, os, subprocess, sys, time
subprocess.run([sys.executable, "-m", "ckptd.sdk.ckpt", "save", __file__], check=True)
while not os.path.exists(os.environ["CKPTD_CONTROL"]) or not json.load(
    open(os.environ["CKPTD_CONTROL"])
)["stop"]:
    time.sleep(0.01)
"""
"""Saves once, then leaves with exit code 0 when it is asked to stop."""


def counting(daemon: LiveDaemon, *options: str, code: str = COUNTING, least: int = 2) -> int:
    task = daemon.submit_python(code, options=options)
    until(lambda: daemon.row(task)["checkpoint"] >= least, 20.0)
    return task


def drilled(daemon: LiveDaemon, task: int, *options: str) -> dict[str, object]:
    done = daemon.ctl("drill", str(task), "--yes", "-o", "json", *options)
    found = json.loads(done.stdout)["drill"]
    assert isinstance(found, dict)
    assert found["passed"], found
    return found


@pytest.mark.parametrize("how", ["kill9", "sigterm"])
def test_a_drilled_task_goes_on_and_no_failure_is_counted(
    start_daemon: StartDaemon, how: str
) -> None:
    daemon = start_daemon()
    task = counting(daemon, "--retries", "0", "--grace", "5s")
    found = drilled(daemon, task, f"--{how}")
    assert found["attempts"] == [1, 2]
    assert {check["name"] for check in found["checks"]} == {  # type: ignore[attr-defined]
        "cause", "fence", "checkpoint", "verify", "progress",
        *(["left"] if how == "sigterm" else []),
    }  # fmt: skip
    row = daemon.row(task)
    assert (row["failures"], row["interruptions"], row["cause"]) == (0, 1, "drill")
    (daemon.work / "go").touch()
    daemon.ctl("wait", str(task), "--exit-code", "task")


def failed(daemon: LiveDaemon, task: int, how: str) -> tuple[dict[str, str], float]:
    """Return what did not hold of a drill that must fail, as {name: text}, and the items lost."""
    done = daemon.ctl("drill", str(task), "--yes", "-o", "json", how, check=False)
    found = json.loads(done.stdout)["drill"]
    assert (done.returncode, found["passed"]) == (1, False), found
    bad = {one["name"]: one["text"] for one in found["checks"] if one["holds"] is False}
    return bad, found["lost_items"] or 0.0


def test_a_task_that_never_looks_at_its_checkpoint_fails_the_drill(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon()
    task = counting(daemon, code=FORGETS, least=8)
    bad, lost = failed(daemon, task, "--kill9")
    assert list(bad) == ["checkpoint"]
    assert "/1,000,000 again, though checkpoint " in bad["checkpoint"]
    assert lost >= 1


def test_a_task_that_never_looks_at_its_checkpoint_and_has_it_deleted_at_once_passes_no_drill(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon()
    task = counting(daemon, code=HASTY)
    done = daemon.ctl("drill", str(task), "--yes", "--kill9", "--within", "5s", check=False)
    assert (done.returncode in (1, 124), "passed" in done.stdout) == (True, False), done.stdout


@pytest.mark.parametrize("how", ["--kill9", "--sigterm"])
@pytest.mark.parametrize(
    "code", [MUTE, MUTE.replace('os.environ["CKPTD_LAST"]', '""')], ids=["goes-on", "forgets"]
)
def test_whether_a_task_that_does_not_say_how_far_it_is_went_on_is_told_as_not_seen(
    start_daemon: StartDaemon, code: str, how: str
) -> None:
    daemon = start_daemon()
    task = counting(daemon, code=code)
    done = daemon.ctl("drill", str(task), "--yes", how, check=False)
    told = done.stdout
    assert done.returncode == 124, told
    assert re.findall(r"(\w+) +-- +it was handed checkpoint \d+, ", told) == ["checkpoint"], told
    assert "; whether it went on from there, nothing says" in told
    assert re.search(r"work lost +(at least |not known)", told)
    assert "where it was" not in told
    assert "not proven, for what was not seen: checkpoint; let it save how far it is: " in told


def test_a_task_that_stays_until_it_is_killed_fails_the_drill_of_a_shutdown(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon()
    stays = "trap '' TERM; [ -p fifo ] || mkfifo fifo; : >ready; read -r _ <>fifo"
    task = daemon.submit("sh", "-c", stays, options=("--grace", "0.2s"))
    until((daemon.work / "ready").exists, 20.0)
    bad, _ = failed(daemon, task, "--sigterm")
    assert bad == {"left": "it had to be killed after its grace of 0.2s"}


def test_a_daemon_that_nobody_starts_again_is_only_killed_once_it_is_told_how(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon()
    task = counting(daemon)
    pid = daemon.pid
    refused = daemon.ctl("drill", str(task), "--yes", "--daemon", check=False)
    assert (refused.returncode, daemon.pid) == (5, pid)
    assert "it would stay dead" in refused.stderr
    typo = ("--daemon", "--restart", "no-such-command --config x")
    refused = daemon.ctl("drill", str(task), "--yes", *typo, check=False)
    assert (refused.returncode, daemon.pid) == (64, pid)
    command = shlex.join([sys.executable, "-m", "ckptd", "--config", str(daemon.config)])
    found = drilled(daemon, task, "--daemon", "--restart", command)
    assert found["attempts"] == [1, None]
    row = daemon.row(task)
    assert (row["attempt"], row["interruptions"]) == (1, 0)


@pytest.mark.parametrize(
    ("is_shim_killed", "said"),
    [(False, "SIGKILL, recorded as signal"), (True, "no exit status, recorded as lost")],
)
def test_a_daemon_whose_death_takes_its_task_with_it_fails_the_drill(
    start_daemon: StartDaemon, *, is_shim_killed: bool, said: str
) -> None:
    daemon = start_daemon()
    task = counting(daemon, "--backoff", "0.1s")
    pid = daemon.row(task)["pid"]
    victims = f"{parent_of(pid)} {pid}" if is_shim_killed else f"{pid}"
    again = shlex.join([sys.executable, "-m", "ckptd", "--config", str(daemon.config)])
    words = ("--daemon", "--restart", f"kill -9 {victims}; exec {again}")
    done = daemon.ctl("drill", str(task), "--yes", "-o", "json", *words, check=False)
    found = json.loads(done.stdout)["drill"]
    assert (done.returncode, found["passed"], found["attempts"]) == (1, False, [1, 2]), found
    told = {check["name"]: check for check in found["checks"]}
    assert [name for name, check in told.items() if check["holds"] is False] == ["adopted"]
    assert f"did not live on: {said}" in told["adopted"]["text"]
    assert "was gone when attempt 2 ran; LSN of its end" in told["fence"]["text"]


def test_a_drill_is_refused_before_any_harm(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    task = counting(daemon)
    for words, code, said in (
        (("--kill9",), 64, "add --yes"),
        (("--yes", "--oom"), 5, "no memory group is its own"),
        (("--yes",), 64, "one of the arguments"),
        (("--yes", "--kill9", "--within", "soon"), 64, "soon"),
        (("--yes", "--kill9", "--within", "0"), 64, "within no time"),
        (("--yes", "--kill9", "--restart", "true"), 64, "--daemon"),
    ):
        refused = daemon.ctl("drill", str(task), *words, check=False)
        assert (refused.returncode, said in refused.stderr) == (code, True), refused.stderr
    assert daemon.row(task)["attempt"] == 1
    held = daemon.submit("true", options=("--hold",))
    assert daemon.ctl("drill", str(held), "--yes", "--kill9", check=False).returncode == 5


def test_a_task_that_ends_well_when_it_is_asked_to_stop_is_told_as_done_and_no_promise_as_broken(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon()
    leaves = daemon.work / "leaves.py"
    leaves.write_text(LEAVES)
    task = daemon.submit(sys.executable, str(leaves))
    until(lambda: daemon.row(task)["checkpoint"], 20.0)
    done = daemon.ctl("drill", str(task), "--yes", "--sigterm", check=False)
    assert (done.returncode, done.stdout) == (5, "")
    assert "was done before the blow ended it (exit 0)" in done.stderr
    assert daemon.row(task)["phase"] == "succeeded"


def test_a_task_that_ends_well_at_its_stop_signal_goes_on(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    polite = "trap 'exit 0' TERM; : >ready; while :; do sleep 0.01; done"
    task = daemon.submit("sh", "-c", polite)
    until((daemon.work / "ready").exists, 20.0)
    assert drilled(daemon, task, "--sigterm")["attempts"] == [1, 2]


def test_a_command_that_does_not_start_the_daemon_again_is_not_waited_for(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon()
    task = counting(daemon)
    late = ("--within", "1h", "--daemon", "--restart", "exit 78 # whatever")
    done = daemon.ctl("drill", str(task), "--yes", *late, check=False)
    assert (done.returncode, "ended with exit 78" in done.stderr) == (124, True), done.stderr
