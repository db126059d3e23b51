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
    names = " ".join(map(str, ids))
    until(
        lambda: len(machine.sh(f"cd {WORK}; grep -ls start {names}; true").split()) == len(ids), 60
    )
    begun = {"running", "stopping"}  # on a slow machine a short timeout may be over before all run
    until(lambda: {one["row"]["phase"] for one in shown(machine, *ids)} <= begun, 30)
    return ids


def shown(machine: Machine, *tasks: int) -> list[dict[str, Any]]:
    """Return all about the tasks, in their order."""
    told = json.loads(machine.sh(f"ckptctl show {' '.join(map(str, tasks))} -o json"))["tasks"]
    by_id = {one["row"]["id"]: one for one in told}
    return [by_id[task] for task in tasks]


def row(machine: Machine, task: int) -> dict[str, Any]:
    found: dict[str, Any] = shown(machine, task)[0]["row"]
    return found


def log(machine: Machine, task: int) -> list[str]:
    """Return the first words of the lines that the task wrote."""
    return logs(machine, task)[task]


def logs(machine: Machine, *tasks: int) -> dict[int, list[str]]:
    """Return the first words of the lines that each task wrote."""
    names = " ".join(map(str, tasks))
    lines = machine.sh(f"cd {WORK}; grep -s '' /dev/null {names}; true").splitlines()
    found: dict[int, list[str]] = {task: [] for task in tasks}
    for name, _, line in (line.partition(":") for line in lines):
        found[int(name)].append(line.split()[0])
    return found


def verdict(one: dict[str, Any]) -> Sequence[object]:
    return tuple(one["row"][name] for name in ("phase", "cause", "code", "signal"))


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
    slow, saving, cancelled, goes_on, *own = submit(
        machine,
        f"--timeout 3s --grace 60s -- {job} 0 deaf",
        f"--grace 60s -- {job} 0 deaf",
        f"-- {job} 0",
        f"-- {job} 0",
        *(f"-- {job} {how}" for how in ends),
    )
    machine.sh(f"ckptctl cancel {saving}")
    until(lambda: sum("asked" in one for one in logs(machine, saving, slow).values()) == 2, 30)
    daemon, runs = daemon_of(machine), row(machine, goes_on)["pid"]

    early, late = [*own[:3], saving, slow], own[3:]
    moments = dict.fromkeys(early, strike(machine, blow, early))
    until(lambda: machine.sh("ckptctl daemon ping || true"), 30)
    assert (daemon_of(machine) != daemon) == blow.ends_daemon
    moments |= dict.fromkeys(late, strike(machine, NO_BLOW, late))
    over = " ".join(map(str, (*own, saving, slow, cancelled)))
    machine.sh(f"ckptctl cancel {cancelled}; ckptctl wait {over}; true")
    assert (row(machine, goes_on)["phase"], row(machine, goes_on)["pid"]) == ("running", runs)
    strike(machine, NO_BLOW, [goes_on])
    machine.sh(f"ckptctl wait {goes_on}")

    found = {one["row"]["id"]: one for one in shown(machine, *moments, cancelled, goes_on)}
    assert [verdict(found[task]) for task in own] == [OWN_ENDS[how] for how in ends]
    assert verdict(found[goes_on]) == OWN_ENDS["0"]
    assert verdict(found[saving])[0] == "cancelled"
    assert verdict(found[cancelled])[::3] == ("cancelled", 15)
    assert verdict(found[slow])[:2] == ("failed", "timeout")
    for task, (before, after) in moments.items():
        assert before <= found[task]["row"]["ended_at"] <= after
    for task, told in logs(machine, *found).items():
        asked, end = ["asked"] * (task in {saving, slow}), ["end"] * (task != cancelled)
        assert told == ["start", *asked, *end]
        assert len(found[task]["attempts"]) == 1


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
    restart_bus = "systemctl reset-failed dbus; systemctl restart dbus"
    blows = ("systemctl kill -s KILL ckptd", "systemctl daemon-reexec", restart_bus,
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
    told = logs(machine, *codes)
    for one in shown(machine, *codes):
        task = one["row"]["id"]
        where = f"seed {seed}: task {task}"
        *earlier, last = one["attempts"]
        assert (last["cause"], last["code"]) == ("exit", codes[task]), where
        # An order that a daemon's death overtook: fenced for ever, so the next one may run.
        assert {end["cause"] for end in earlier} <= {"not_started"}, where
        assert told[task] == ["start", "end"], where


@pytest.mark.skipif(ROUNDS < LONG, reason=f"takes 30 s; CKPTD_ROUNDS={LONG} has it run")
def test_a_time_limit_that_is_hit_in_the_daemons_absence_is_kept_by_the_next_one(
    machine: Nspawn,
) -> None:
    """An adopted task has 30 s to repeat that it asked for more time; then the limit holds."""
    (slow,) = submit(machine, "--timeout 1s -- /opt/survival/job 0")
    machine.sh("systemctl stop ckptd; sleep 1; systemctl start ckptd")
    machine.sh(f"ckptctl wait {slow}; true")
    assert verdict(*shown(machine, slow)) == ("failed", "timeout", None, 15)
    assert log(machine, slow) == ["start"]


def crowd(machine: Machine, count: int) -> None:
    """Have so many tasks run that note their start and then do nothing."""
    script = f"echo start >>{WORK}/$CKPTD_TASK_ID; exec sleep 9999"
    machine.put("/tmp/crowd.toml", f'[[task]]\ncommand = ["sh", "-c", "{script}"]\n' * count)
    machine.sh("cd /; ckptctl submit -q --file /tmp/crowd.toml")
    until(lambda: int(machine.sh(f"find {WORK} -type f | wc -l")) == count, 120, every_s=0.2)
    until(lambda: len(pids(machine)) == count, 60, every_s=0.2)


def pids(machine: Machine) -> dict[int, int]:
    rows = json.loads(machine.sh("ckptctl status --state running -o json"))["tasks"]
    return {one["id"]: one["pid"] for one in rows}


@pytest.mark.timeout(300)
def test_five_hundred_running_tasks_are_adopted_at_once(
    machine: Nspawn, systemd_version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    crowd(machine, CROWD)
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
        assert [end["cause"] for end in shown(machine, task)[0]["attempts"]] == ["shutdown"]


def test_a_unit_that_is_stopped_by_hand_is_a_cancelled_task(machine: Nspawn) -> None:
    stopped, killed = submit(machine, *["--retries 3 -- /opt/survival/job 0"] * 2)

    machine.sh(f"systemctl stop ckptd-task-{stopped}-1")
    machine.sh(f"systemctl kill -s KILL ckptd-task-{killed}-1")

    until(lambda: row(machine, stopped)["phase"] == "cancelled", 30)
    assert (row(machine, stopped)["cause"], row(machine, stopped)["attempt"]) == ("stopped", 1)
    until(lambda: row(machine, killed)["attempt"] == 2, 30)  # that is a failure, which is retried
