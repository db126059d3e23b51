"""The daemon's life under a real systemd: see docs/LIFECYCLE.md, whose claims these are.

`sh` runs a script in a booted machine that has ckptd installed.
"""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.waiting import until

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.timeout(180)
DROP_INS = "/run/systemd/system/ckptd.service.d"
SAVES = r"""#!/bin/bash
# saves when it is told to stop, which takes $1 seconds
save() {
  sleep "$seconds"; echo "$count" >"$CKPTD_DIR/stage/count"
  mv "$CKPTD_DIR/stage" "$CKPTD_DIR/ckpt/$count"; exit 75
}
trap save TERM
seconds=$1 count=1
[ -z "$CKPTD_LAST" ] || count=$(($(cat "$CKPTD_LAST/count") + 1))
echo "run $count"
while :; do sleep 0.1; done
"""


Sh = Callable[[str], str]
"""Runs a script as root in the machine; returns what it prints. Raises where it fails."""


def put(sh: Sh, path: str, text: str) -> str:
    coded = base64.b64encode(text.encode()).decode()
    sh(f"mkdir -p $(dirname {path}); echo {coded} | base64 -d >{path}; chmod 755 {path}")
    return path


def main_pid(sh: Sh) -> int:
    return int(sh("systemctl show ckptd -p MainPID --value"))


def python_of(sh: Sh) -> str:
    """Return how the daemon's Python is called, so that `import ckptd` finds what is installed."""
    proc = f"/proc/{main_pid(sh)}"
    path = sh(f"tr '\\0' '\\n' <{proc}/environ | grep ^PYTHONPATH= || true").strip()
    return f"env {path} " + sh(f"tr '\\0' '\\n' <{proc}/cmdline | head -1").strip()


def status_of(sh: Sh, task: int) -> str:
    rows = json.loads(sh(f"ckptctl status {task} -o json"))["tasks"]
    return str(rows[0]["phase"])


def submit(sh: Sh, command: str, options: str = "") -> int:
    sh("ckptctl group set default --parallel 20")
    task = int(sh(f"ckptctl submit -q {options} -- {command}"))
    until(lambda: status_of(sh, task) == "running", 20)
    return task


def main_of(sh: Sh, task: int) -> int:
    return int(json.loads(sh(f"ckptctl show {task} -o json"))["tasks"][0]["row"]["pid"])


def told_since(sh: Sh, mark: str) -> str:
    """Return the journal of the unit behind a line that `marked` wrote."""
    text = sh("journalctl --sync; journalctl -o cat --no-pager _SYSTEMD_UNIT=ckptd.service "
                      "+ UNIT=ckptd.service + SYSLOG_IDENTIFIER=life-cycle")  # fmt: skip
    return text.rpartition(mark)[2]


def marked(sh: Sh, text: str) -> str:
    sh(f"logger -t life-cycle '{text}'")
    return text


@contextmanager
def setting(sh: Sh, lines: str) -> Iterator[None]:
    """Give the service other values, and take them away again."""
    put(sh, f"{DROP_INS}/life-cycle.conf", f"[Service]\n{lines}\n")
    sh("systemctl daemon-reload")
    yield
    sh(f"rm {DROP_INS}/life-cycle.conf; systemctl daemon-reload")


@pytest.fixture(autouse=True)
def running(sh: Sh) -> Iterator[None]:
    sh("systemctl start ckptd")
    yield
    sh("systemctl start ckptd; ckptctl cancel --all --yes; true")


def test_a_replay_longer_than_its_time_limit_succeeds_by_progress(sh: Sh) -> None:
    python = python_of(sh)
    fill = put(sh, "/tmp/life/fill_log.py", (HERE / "fill_log.py").read_text())
    sh(f"systemctl stop ckptd.socket ckptd; {python} {fill} /var/lib/ckptd 3000000")
    with setting(sh, "TimeoutStartSec=1"):
        mark = marked(sh, "a long replay")
        sh("systemctl start ckptd")
    told = told_since(sh, mark)
    ready_ms = int(told.partition("ready after ")[2].partition(" ms")[0])
    assert ready_ms > 1_000, "the log was too short for this test"
    assert "timed out" not in told
    sh("systemctl stop ckptd; rm -r /var/lib/ckptd/*")  # every other start would take as long


@pytest.mark.parametrize("how", ["the process is stopped", "the main thread hangs"])
def test_a_loop_that_does_not_turn_is_ended_with_its_stacks_told_and_tasks_do_not_notice(
    sh: Sh, how: str
) -> None:
    python, hang = (
        python_of(sh),
        put(sh, "/tmp/life/hang.py", (HERE / "hang.py").read_text()),
    )
    with setting(sh, "WatchdogSec=2s"):
        sh("systemctl restart ckptd")
        task = submit(sh, "sleep 1000")
        pid, before = main_of(sh, task), main_pid(sh)
        mark = marked(sh, f"watchdog: {how}")
        if how == "the process is stopped":
            sh(f"kill -STOP {before}")
        else:
            sh(f"{python} {hang} {before}")
        until(lambda: main_pid(sh) not in {0, before}, 30)
        until(lambda: "ready after" in told_since(sh, mark), 30)
        # journald reads stderr and what is sent to it in any order: the stacks may come last.
        until(lambda: "daemon/loop.py" in told_since(sh, mark), 30)
    assert "Watchdog timeout" in told_since(sh, mark)
    assert (status_of(sh, task), main_of(sh, task)) == ("running", pid)


def test_a_wrong_configuration_fails_the_reload_and_the_old_one_stays(sh: Sh) -> None:
    path = "/etc/ckptd/ckptd.toml"
    sh(f"mkdir -p /etc/ckptd; touch {path}; cp {path} /tmp/life.toml")
    try:
        put(sh, path, '[daemon]\nlog_level = "warning"\n')
        sh("systemctl reload ckptd")
        assert 'log_level = "warning"' in sh("ckptctl config show")
        put(sh, path, '[daemon]\nlog_levle = "debug"\n')
        mark = marked(sh, "a wrong configuration")
        assert "failed" in sh("systemctl reload ckptd || echo failed")
        assert 'log_level = "warning"' in sh("ckptctl config show")
        assert sh("systemctl is-active ckptd").strip() == "active"
        assert "did you mean daemon.log_level?" in told_since(sh, mark)
    finally:
        sh(f"cp /tmp/life.toml {path}; systemctl reload ckptd")


def test_stopping_the_daemon_leaves_tasks_and_stopping_the_slice_lets_them_save(
    sh: Sh,
) -> None:
    saves = put(sh, "/opt/life/saves", SAVES)
    quick, slow, paused = (submit(sh, f"{saves} {seconds}", "--grace 30s") for seconds in (0, 6, 0))
    deaf = submit(sh, """sh -c 'trap "" TERM; while :; do sleep 0.1; done'""", "--grace 2s")
    pids = [main_of(sh, task) for task in (quick, slow, paused, deaf)]
    sh(f"ckptctl pause {paused}")

    sh("systemctl stop ckptd; systemctl start ckptd")
    assert [main_of(sh, task) for task in (quick, slow, paused, deaf)] == pids

    with setting(sh, "TimeoutStopSec=2s"):  # the drain takes longer, and asks for the time
        sh("systemctl restart ckptd; systemctl stop ckptd.slice")
    alive = " ".join(f"/proc/{pid}" for pid in pids)
    assert sh(f"ls -d {alive} 2>/dev/null || true") == ""

    sh("systemctl start ckptd")
    for task in (quick, slow, paused):
        until(lambda task=task: "run 2" in sh(f"ckptctl logs {task}"), 20)  # type: ignore[misc]
    until(lambda: status_of(sh, deaf) == "running", 20)
    for task in (quick, slow, paused, deaf):
        ends = json.loads(sh(f"ckptctl show {task} -o json"))["tasks"][0]["attempts"]
        assert [end["cause"] for end in ends] == ["shutdown"]


@pytest.mark.parametrize("has_socket_unit", [False, True])
def test_no_request_is_lost_or_made_twice_while_the_daemon_comes_and_goes(
    sh: Sh, *, has_socket_unit: bool
) -> None:
    python = python_of(sh)
    load = put(sh, "/tmp/life/load.py", (HERE / "load.py").read_text())
    sh("systemctl stop ckptd.socket ckptd")
    sh(f"systemctl {'start ckptd.socket' if has_socket_unit else 'start ckptd'}")
    ends = "systemctl restart ckptd", "systemctl kill -s KILL ckptd"
    script = f"{python} {load} 6 8 >/tmp/life/load.json & "
    script += "".join(f"sleep 1; {end}; " for end in ends * 2)
    if has_socket_unit:
        script += "sleep 1; systemctl stop ckptd; "  # the next request starts it again
    found = json.loads(sh(f"{script} wait; cat /tmp/life/load.json"))
    assert found.pop("acknowledged") > 500
    assert found == {"refused": [], "lost": [], "doubled": []}
    if has_socket_unit:
        sh("systemctl stop ckptd.socket ckptd")
