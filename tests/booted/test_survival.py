"""Tasks outlive all that can be done to their daemon, and the next daemon knows how each ended.

Every task here tells of its start and its end in a file of its own, which is counted, and waits for
a word in between, so that the test and not a clock says which end falls into the daemon's absence.
"""

import json
import os
import random
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.booted.machine import Machine
from tests.booted.nspawn import Nspawn
from tests.waiting import let_pass, until

ROUNDS = int(os.environ.get("CKPTD_ROUNDS", "3"))
LONG = 10
CROWD = 500
ADOPTED_WITHIN_S = 5.0  # the promise is 1 s on an idle machine; this one may be shared

WORK = "/tmp/survival"
JOB = r"""#!/bin/sh
# job HOW: start, wait for a line, end so; with "deaf" it only notes a TERM
log=/tmp/survival/$CKPTD_TASK_ID
mkfifo "$log.go" && exec 3<>"$log.go"
[ "$2" = deaf ] && trap 'echo asked >>"$log"' TERM
echo "start $$" >>"$log"
until read -r _ <&3; do :; done
echo "end $$" >>"$log"
[ "$1" = signal ] && kill -KILL $$
exit "$1"
"""
# The clock of files is the one that the records of ends use.
LET_END = f"""
cd {WORK}; touch before
for id in $ids; do echo >$id.go; done
for id in $ids; do
  while :; do
    state=$(systemctl show -P ActiveState ckptd-task-$id-1 2>/dev/null)
    [ "$state" = inactive ] || [ "$state" = failed ] && break
    sleep 0.05
  done
done
touch after"""
UPGRADE = """
new=venv-9.9.$(date +%s%N); cd /usr/local/lib/ckptd; old=$(readlink venv)
cp -a $old $new; sed -i "s|$old|$new|g" $new/bin/ckpt*[!n]; sed -i "s|^VERSION.*|VERSION = '9.9'|" \
  $new/lib/python3*/site-packages/ckptd/protocol/version.py
cd /usr/src/ckptd; python3 -c "
import os
from install import tree
from install.places import places
where = places(os.environ, 0)
tree.switch(where, '$new')
tree.prune(where, keep={'$new'})"
systemctl daemon-reload; systemctl restart ckptd; ckptctl daemon ping | grep -q 'ckptd 9.9'"""


@dataclass(frozen=True)
class Blow:
    """What is done to the daemon: before and after tasks end that it is not to notice in time."""

    away: str
    back: str
    ends_daemon: bool


FREEZE = "kill -STOP $(systemctl show -P MainPID ckptd)"
BLOWS = {
    "kill -9 of the daemon": Blow(FREEZE, "systemctl kill -s KILL ckptd", ends_daemon=True),
    "systemctl restart": Blow(FREEZE, "systemctl restart ckptd", ends_daemon=True),
    "systemctl stop and start": Blow(
        "systemctl stop ckptd", "systemctl start ckptd", ends_daemon=True
    ),
    "a new version": Blow(FREEZE, UPGRADE, ends_daemon=True),
    "systemctl reload": Blow("systemctl reload ckptd &", "wait", ends_daemon=False),
    "daemon-reload": Blow("systemctl daemon-reload &", "wait", ends_daemon=False),
    "daemon-reexec": Blow("systemctl daemon-reexec &", "wait", ends_daemon=False),
    "a restart of dbus": Blow("systemctl restart dbus &", "wait", ends_daemon=False),
}
OWN_ENDS: Mapping[str, Sequence[object]] = {
    "0": ("succeeded", "exit", 0, None),
    "3": ("failed", "exit", 3, None),
    "signal": ("failed", "signal", None, 9),
}


@pytest.fixture(autouse=True)
def workplace(machine: Nspawn) -> Iterator[None]:
    machine.put("/opt/survival/job", JOB, mode=0o755)
    machine.sh(f"mkdir -p {WORK}; chown alice: {WORK}; ckptctl group set default --parallel 600")
    yield
    machine.sh("systemctl start ckptd; ckptctl kill --all --yes; ckptctl wait --all; true")
    machine.sh(f"rm -rf {WORK}")


def submit(machine: Machine, *commands: str) -> list[int]:
    """Submit what stands behind `ckptctl submit -q`, as alice; return the ids once all began."""
    script = "\n".join(f"ckptctl submit -q {command}" for command in commands)
    ids = [int(line) for line in machine.sh(f"set -e; cd /; {script}", user="alice").split()]
    for task in ids:
        until(lambda task=task: row(machine, task)["phase"] == "running", 30)  # type: ignore[misc]
        until(lambda task=task: "start" in log(machine, task), 30)  # type: ignore[misc]
    return ids


def shown(machine: Machine, task: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(machine.sh(f"ckptctl show {task} -o json"))["tasks"][0]
    return found


def row(machine: Machine, task: int) -> dict[str, Any]:
    found: dict[str, Any] = shown(machine, task)["row"]
    return found


def log(machine: Machine, task: int) -> list[str]:
    """Return the first words of the lines that the task wrote."""
    lines = machine.sh(f"cat {WORK}/{task} 2>/dev/null || true").splitlines()
    return [line.split()[0] for line in lines]


def verdict(machine: Machine, task: int) -> Sequence[object]:
    found = row(machine, task)
    return tuple(found[name] for name in ("phase", "cause", "code", "signal"))


def daemon_of(machine: Machine) -> str:
    return machine.show("ckptd", "MainPID")


def strike(machine: Machine, blow: Blow, ids: Sequence[int]) -> tuple[str, str]:
    """Let tasks end under the blow; return a moment before and one after, as `ended_at` is told."""
    words = " ".join(map(str, ids))
    machine.sh(f"ids='{words}'\n{blow.away}\n{LET_END}\nset -e\n{blow.back}")
    told = machine.sh(f"cd {WORK}; TZ=UTC stat -c %y before after").splitlines()
    before, after = (f"{line[:10]}T{line[11:26]}Z" for line in told)
    return before, after


ALICE = ("setpriv", "--reuid=1000", "--regid=1000", "--init-groups")
NO_BLOW = Blow("", "", ends_daemon=False)


@pytest.mark.parametrize("name", BLOWS)
def test_every_end_around_this_is_told_truly_and_nothing_runs_twice(
    machine: Nspawn, name: str
) -> None:
    blow, job = BLOWS[name], "/opt/survival/job"
    ends = [*OWN_ENDS] * 2
    own = submit(machine, *(f"-- {job} {how}" for how in ends))
    saving, cancelled, goes_on = submit(
        machine, f"--grace 60s -- {job} 0 deaf", f"-- {job} 0", f"-- {job} 0"
    )
    (slow,) = submit(machine, f"--timeout 1s --grace 60s -- {job} 0 deaf")
    machine.sh(f"ckptctl cancel {saving}")
    for task in (saving, slow):
        until(lambda task=task: "asked" in log(machine, task), 30)  # type: ignore[misc]
    daemon, runs = daemon_of(machine), row(machine, goes_on)["pid"]

    moments = [strike(machine, blow, [*own[:3], saving, slow])]
    until(lambda: machine.sh("ckptctl daemon ping || true"), 30)
    assert (daemon_of(machine) != daemon) == blow.ends_daemon
    moments.append(strike(machine, NO_BLOW, own[3:]))
    machine.sh(f"ckptctl cancel {cancelled}; ckptctl wait {' '.join(map(str, own))}; true")
    machine.sh(f"ckptctl wait {saving} {cancelled} {slow}; true")

    assert (row(machine, goes_on)["phase"], row(machine, goes_on)["pid"]) == ("running", runs)
    assert [verdict(machine, task) for task in own] == [OWN_ENDS[how] for how in ends]
    for number, task in enumerate([*own, saving, slow]):
        before, after = moments[1 if number in {3, 4, 5} else 0]
        assert before <= row(machine, task)["ended_at"] <= after
        assert log(machine, task) == ["start", *["asked"] * (task in {saving, slow}), "end"]
    assert verdict(machine, saving)[0] == "cancelled"
    assert verdict(machine, cancelled)[::3] == ("cancelled", 15)
    assert verdict(machine, slow)[:2] == ("failed", "timeout")
    strike(machine, NO_BLOW, [goes_on])
    until(lambda: verdict(machine, goes_on) == OWN_ENDS["0"], 30)
    assert log(machine, cancelled) == ["start"]
    for task in (*own, saving, cancelled, slow, goes_on):
        assert len(shown(machine, task)["attempts"]) == 1


SHORT = r"""#!/bin/sh
echo "start $$" >>/tmp/survival/$CKPTD_TASK_ID
sleep $2
echo "end $$" >>/tmp/survival/$CKPTD_TASK_ID
exit $1
"""


def test_blows_at_any_moment_cost_no_end_and_repeat_no_task(machine: Nspawn) -> None:
    """Kills strike while tasks are accepted, started and ending; the seed is told at a failure."""
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    machine.put("/opt/survival/short", SHORT, mode=0o755)
    blows = ("systemctl kill -s KILL ckptd", "systemctl daemon-reexec", "systemctl restart dbus",
             "systemctl restart ckptd", "systemctl daemon-reload")  # fmt: skip
    codes: dict[int, int] = {}
    for _ in range(ROUNDS):
        wanted = [chance.randrange(4) for _ in range(30)]
        jobs = [f"ckptctl submit -q -- /opt/survival/short {code} 0.{chance.randrange(6)}"
                for code in wanted]  # fmt: skip
        words = [*ALICE, "sh", "-c", f"set -e; cd /; {'; '.join(jobs)}"]
        with machine.spawn(words, stdout=subprocess.PIPE) as client:
            while client.poll() is None:
                let_pass(chance.random() * 0.8)
                machine.run(["sh", "-c", chance.choice(blows)])
            assert client.stdout is not None
            ids = [int(line) for line in client.stdout.read().split()]
        assert (client.returncode, len(ids)) == (0, len(wanted)), f"seed {seed}"
        codes.update(zip(ids, wanted, strict=True))
    machine.sh(f"ckptctl wait {' '.join(map(str, codes))} >/dev/null 2>&1; true")
    for task, code in codes.items():
        where = f"seed {seed}: task {task}"
        *earlier, last = shown(machine, task)["attempts"]
        assert (last["cause"], last["code"]) == ("exit", code), where
        # An order that a daemon's death overtook: fenced for ever, so the next one may run.
        assert {one["cause"] for one in earlier} <= {"not_started"}, where
        assert log(machine, task) == ["start", "end"], where


def crowd(machine: Machine, count: int) -> None:
    script = f"echo start >>{WORK}/$CKPTD_TASK_ID; exec sleep 9999"
    machine.put("/tmp/crowd.toml", f'[[task]]\ncommand = ["sh", "-c", "{script}"]\n' * count)
    machine.sh("cd /; ckptctl submit -q --file /tmp/crowd.toml >/tmp/crowd", user="root")

    def all_run() -> bool:
        return int(machine.sh(f"find {WORK} -type f | wc -l")) >= count

    until(all_run, 120, every_s=0.2)


def pids(machine: Machine) -> dict[int, int]:
    rows = json.loads(machine.sh("ckptctl status --state running -o json"))["tasks"]
    return {one["id"]: one["pid"] for one in rows}


@pytest.mark.skipif(ROUNDS < LONG, reason=f"takes 30 s; CKPTD_ROUNDS={LONG} has it run")
def test_a_time_limit_that_is_hit_in_the_daemons_absence_is_kept_by_the_next_one(
    machine: Nspawn,
) -> None:
    """An adopted task has 30 s to repeat that it asked for more time; then the limit holds."""
    (slow,) = submit(machine, "--timeout 1s -- /opt/survival/job 0")
    machine.sh("systemctl stop ckptd; sleep 1; systemctl start ckptd")
    machine.sh(f"ckptctl wait {slow}; true")
    assert verdict(machine, slow) == ("failed", "timeout", None, 15)
    assert log(machine, slow) == ["start"]


@pytest.mark.timeout(300)
def test_five_hundred_running_tasks_are_adopted_at_once(
    machine: Nspawn, systemd_version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    crowd(machine, CROWD)
    until(lambda: len(pids(machine)) == CROWD, 60, every_s=0.2)
    before, daemon = pids(machine), daemon_of(machine)

    machine.sh("systemctl kill -s KILL ckptd")

    until(lambda: daemon_of(machine) not in {"0", daemon}, 30)
    until(lambda: machine.show("ckptd", "ActiveState") == "active", 60)
    began, ready = (int(machine.show("ckptd", f"{name}TimestampMonotonic"))
                    for name in ("ExecMainStart", "ActiveEnter"))  # fmt: skip
    told = machine.journal("-u", "ckptd", "-o", "cat").rpartition("ready after ")[2].split(" ms")[0]
    took_ms = (ready - began) / 1e3
    with capsys.disabled():
        print(f"\n  systemd {systemd_version}: {CROWD} running tasks adopted, READY "
              f"{took_ms:.0f} ms after the start of the process ({told} by itself)")  # fmt: skip
    assert pids(machine) == before
    assert machine.sh(f"cat {WORK}/* | sort | uniq -c").split() == [str(CROWD), "start"]
    assert took_ms / 1e3 < ADOPTED_WITHIN_S


SAVES = r"""#!/bin/sh
# needs a second to save what it has, when it is told to stop
save() {
  sleep 1; echo saved >"$CKPTD_DIR/stage/work"; mv "$CKPTD_DIR/stage" "$CKPTD_DIR/ckpt/1"; exit 75
}
trap save TERM
echo "start $(cat "$CKPTD_LAST/work" 2>/dev/null)" >>/tmp/survival/$CKPTD_TASK_ID
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize("is_there", [True, False], ids=["daemon runs", "daemon is stopped"])
def test_who_is_stopped_with_the_slice_saves_and_goes_on_later(
    machine: Nspawn, *, is_there: bool
) -> None:
    machine.put("/opt/survival/saves", SAVES, mode=0o755)
    ids = submit(machine, *["-- /opt/survival/saves"] * 4)
    if not is_there:
        machine.sh("systemctl stop ckptd")
        assert machine.sh("pgrep -cf survival/saves").strip() >= "4"

    machine.sh("systemctl stop ckptd.slice")

    assert machine.run(["pgrep", "-f", "survival/saves"], check=False).code == 1
    machine.sh("systemctl start ckptd")
    for task in ids:
        until(lambda task=task: len(log(machine, task)) == 2, 30)  # type: ignore[misc]
        assert machine.sh(f"cat {WORK}/{task}").splitlines() == ["start ", "start saved"]
        assert [end["cause"] for end in shown(machine, task)["attempts"]] == ["shutdown"]


def test_a_unit_that_is_stopped_by_hand_is_a_cancelled_task(machine: Nspawn) -> None:
    stopped, killed = submit(machine, *["--retries 3 -- /opt/survival/job 0"] * 2)

    machine.sh(f"systemctl stop ckptd-task-{stopped}-1")
    machine.sh(f"systemctl kill -s KILL ckptd-task-{killed}-1")

    until(lambda: row(machine, stopped)["phase"] == "cancelled", 30)
    assert (row(machine, stopped)["cause"], row(machine, stopped)["attempt"]) == ("stopped", 1)
    until(lambda: row(machine, killed)["attempt"] == 2, 30)  # that is a failure, which is retried
