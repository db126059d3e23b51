"""The power goes at random moments under load: nothing acknowledged is lost, nothing runs twice.

Every attempt leaves lines in a file of its own, each durable before it goes on (see `Lines`), and
holds a lock, which a second one at the same time would find taken. What was acknowledged leaves the
machine over its serial line. The disk is the same over all rounds; so are the tasks that count.
"""

import json
import os
import random
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.booted.guest_channel import MachineGone
from tests.booted.machine import CommandFailed
from tests.booted.test_life_cycle import python_of
from tests.booted.test_shutdown import SAVES, causes, detail_of, has_resumed, submit
from tests.booted.vm import Vm
from tests.waiting import let_pass, until

ROUNDS = int(os.environ.get("CKPTD_ROUNDS", "2"))
SEED = int(os.environ.get("CKPTD_SEED", str(random.randrange(1 << 32))))
USERS = ("alice", "bob")
SHORT_EACH = 80  # more than most rounds have time for
LOAD_S = 5.0
BOOT_CUT_S = 5.0
WORK = "/srv/power"

# Counts for ever: a checkpoint each turn, durable when `ckpt pipe` says so, and then noted.
COUNTS = r"""#!/usr/bin/python3
import fcntl, json, os, subprocess, sys, time
env = os.environ
task, attempt, here = env["CKPTD_TASK_ID"], env["CKPTD_ATTEMPT"], env["CKPTD_DIR"]
lines = os.open(f"/srv/power/{task}", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_DSYNC, 0o644)
tell = lambda *words: os.write(lines, (" ".join(map(str, words)) + "\n").encode())
lock = open(f"/srv/power/{task}.lock", "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    tell("twice", attempt)
count = int(open(env["CKPTD_LAST"] + "/count").read()) if env["CKPTD_LAST"] else 0
boot = open("/proc/sys/kernel/random/boot_id").read().strip()
up = time.clock_gettime(time.CLOCK_BOOTTIME)
tell("start", attempt, boot, f"{up:.2f}", env["CKPTD_SEQ"], count)
pipe = subprocess.Popen(["ckpt", "pipe"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
def ask(**request):
    pipe.stdin.write(json.dumps(request) + "\n")
    pipe.stdin.flush()
    answer = json.loads(pipe.stdout.readline())
    if not answer["ok"]:
        tell("refused", answer)
        sys.exit(70)
    return answer
ask(op="hello", protocol=1)
while not os.path.exists("/srv/power/finish"):
    count += 1
    with open(f"{here}/count", "w") as file:
        file.write(str(count))
    seq = ask(op="checkpoint", files=[f"{here}/count"])["seq"]
    tell("saved", seq, count)
    time.sleep(0.3)
tell("end", attempt)
"""
# The same with files alone, sealed when the daemon gets to it: what it has shown, counts.
RENAMES = r"""#!/bin/bash
lines=/srv/power/$CKPTD_TASK_ID
exec 9>$lines.lock; flock -n 9 || echo twice >>$lines
tell() { echo "$*" >>$lines; sync $lines; }
seq=$CKPTD_SEQ count=0
[ -z "$CKPTD_LAST" ] || read -r count <"$CKPTD_LAST/count"
read -r boot </proc/sys/kernel/random/boot_id; read -r up _ </proc/uptime
tell start $CKPTD_ATTEMPT $boot $up $seq $count
until [ -e /srv/power/finish ]; do
  count=$((count + 1)) seq=$((seq + 1))
  echo $count >"$CKPTD_DIR/stage/count"
  mv "$CKPTD_DIR/stage" "$CKPTD_DIR/ckpt/$seq" && mkdir "$CKPTD_DIR/stage"
  systemd-notify CHECKPOINT=1
  sleep 0.5
done
tell end $CKPTD_ATTEMPT
"""
SHORT = r"""#!/bin/sh
set -e
lines=/srv/power/$CKPTD_TASK_ID
exec 9>$lines.lock; flock -n 9 || echo twice >>$lines
read -r boot </proc/sys/kernel/random/boot_id; read -r up _ </proc/uptime
echo start $CKPTD_ATTEMPT $boot $up 0 0 >>$lines; sync $lines
echo end $CKPTD_ATTEMPT >>$lines; sync $lines
"""
# A task may well be cut off ten times in a row before it gets anywhere.
CONFIG = "[retry]\nhost_deaths_max = 1000\ninterruptions_max = 1000\n"


@dataclass
class Lines:
    """What the attempts of one task wrote: start, saved, end, twice."""

    starts: list[tuple[int, str, float, int, int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    saved: dict[int, int] = field(default_factory=dict)  # checkpoint -> count
    odd: list[str] = field(default_factory=list)
    open_in: str = ""  # the boot in which an attempt began that has not ended

    def add(self, line: str) -> None:
        kind, *words = line.split()
        if kind == "start" and len(words) == 5:
            attempt, boot, up, seq, count = words
            if boot == self.open_in:
                self.odd.append(f"began beside another: {line}")
            if int(seq) < max(self.saved, default=0) or count != str(
                self.saved.get(int(seq), count)
            ):
                self.odd.append(f"saved {list(self.saved.items())[-2:]}, but {line}")
            self.starts.append((int(attempt), boot, float(up), int(seq), int(count)))
            self.open_in = boot
        elif kind == "saved" and len(words) == 2:
            self.saved[int(words[0])] = int(words[1])
        elif kind == "end" and len(words) == 1:
            self.ends.append(int(words[0]))
            self.open_in = ""
        else:
            self.odd.append(line)


@dataclass
class Load:
    """What is known outside of the guest."""

    acknowledged: dict[int, str] = field(default_factory=dict)
    counting: list[int] = field(default_factory=list)
    shown: dict[int, dict[str, Any]] = field(default_factory=dict)  # the last rows before a cut


@pytest.fixture
def guest(vm: Vm) -> Vm:
    vm.put("/etc/ckptd/ckptd.toml", CONFIG)
    jobs = {"counts": COUNTS, "renames": RENAMES, "short-job": SHORT, "saves": SAVES}
    for name, text in jobs.items():
        vm.put(f"/usr/local/bin/{name}", text, mode=0o755)
    vm.put("/opt/submits.py", Path(__file__).with_name("submits.py").read_text())
    vm.sh(f"mkdir -m 1777 {WORK}; systemctl restart ckptd")
    vm.sh("ckptctl group set default --parallel 10; sync")
    return vm


def rows(guest: Vm) -> dict[int, dict[str, Any]]:
    """Return all tasks by their number."""
    told = guest.run(["ckptctl", "status", "--all", "-o", "json"]).out
    return {row["id"]: row for row in json.loads(told)["tasks"]}


def lines_of(guest: Vm) -> dict[int, Lines]:
    """Return what the tasks wrote."""
    found: dict[int, Lines] = {}
    text = guest.sh(f"cd {WORK}; grep -as '' $(ls | grep -v -e lock -e finish) /dev/null || true")
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        found.setdefault(int(name), Lines()).add(rest.replace("\0", ""))  # cut off unsynced
    return found


def submit_until_the_cut(guest: Vm, python: str, user: str, prefix: str) -> None:
    group = f"--reuid={user} --regid={1000 + USERS.index(user)} --init-groups --reset-env"
    client = f"{python} /opt/submits.py {prefix}-{user} {SHORT_EACH}"
    try:
        guest.sh(f"exec setpriv {group} -- {client} 3>/dev/ttyS0", timeout_s=60)
    except (MachineGone, CommandFailed, TimeoutError):
        return  # as wanted; what it could not do is missing in what was acknowledged


def acknowledged(guest: Vm) -> dict[int, str]:
    """Return what came out over the serial line since the boot, name by task."""
    said = guest.console.read_text(errors="replace")
    return {
        int(task): name for task, name in re.findall(r"^ACK (\d+) (\S+)\r?$", said, re.MULTILINE)
    }


def cut_under_load(guest: Vm, load: Load, chance: random.Random, prefix: str) -> str:
    """Let users submit, look once, cut the power at random; return what happened in words."""
    python = python_of(guest.sh)
    clients = [
        threading.Thread(target=submit_until_the_cut, args=(guest, python, user, prefix))
        for user in USERS
    ]
    for client in clients:
        client.start()
    until(lambda: acknowledged(guest), 60, every_s=0.05)
    load.shown = rows(guest)
    after_s = chance.uniform(0, LOAD_S)
    let_pass(after_s)
    guest.power_cut()
    for client in clients:
        client.join()
    new = acknowledged(guest)
    load.acknowledged.update(new)
    return f"cut {after_s:.2f} s after a look, {len(new)} new tasks acknowledged"


def boot_again(guest: Vm, chance: random.Random) -> str:
    """Boot, at times after another cut while it boots; return what happened in words."""
    said = ""
    if chance.random() < 0.25:
        guest.boot(until_running=False)
        let_pass(after_s := chance.uniform(0, BOOT_CUT_S))
        guest.power_cut()
        said = f", cut again {after_s:.2f} s into the boot"
    guest.boot()
    until(lambda: guest.show("ckptd", "ActiveState") == "active", 60, every_s=0.25)
    return said


def check_nothing_is_lost(guest: Vm, load: Load) -> None:
    found = rows(guest)
    lost = {task: name for task, name in load.acknowledged.items()
            if task not in found or found[task]["name"] != name}  # fmt: skip
    assert not lost, f"acknowledged and lost: {lost}"
    for task, row in load.shown.items():
        assert found[task]["attempt"] >= row["attempt"]
        assert found[task]["checkpoint"] >= row["checkpoint"]
        if row["phase"] == "succeeded":
            assert found[task] == row, "what was over is told otherwise now"


def check_lines(guest: Vm, load: Load) -> dict[int, Lines]:
    """Nothing ran beside itself or went on from less than it had; return what was written."""
    found = rows(guest)  # first: what is over then has written its lines
    lines = lines_of(guest)
    assert not {task: one.odd for task, one in lines.items() if one.odd}
    for task, row in found.items():
        if row["phase"] == "succeeded":
            assert lines[task].ends[-1] == row["attempt"], f"task {task} did not do what is told"
        assert row["phase"] in {"queued", "starting", "running", "waiting", "succeeded"}, row
    for task in load.counting:
        *_, (_, _, _, seq, _) = lines[task].starts
        assert seq >= load.shown[task]["checkpoint"], f"task {task} went on from {seq}"
    return lines


def resumed(guest: Vm, load: Load, boot: str) -> bool:
    lines = lines_of(guest)
    return all(
        task in lines and lines[task].starts and lines[task].starts[-1][1] == boot
        for task in load.counting
    )


def seconds_to(guest: Vm, load: Load, lines: dict[int, Lines]) -> str:
    """Return when the daemon was ready and the tasks went on, in s since the kernel's start."""
    log = guest.journal("-u", "ckptd")
    ready = re.search(r"\[ *([\d.]+)\] .* ready after", log)
    assert ready, log
    began = [
        float(found[1])
        for task in load.counting
        if (found := re.search(rf"\[ *([\d.]+)\] .*task {task}, attempt \d+ started", log))
    ]
    assert len(began) == len(load.counting)
    works = [lines[task].starts[-1][2] for task in load.counting]
    return (
        f"kernel to ready {float(ready[1]):.1f} s, to the first task resumed {min(began):.1f} s, "
        f"to all {max(began):.1f} s; they count again at {min(works):.1f} to {max(works):.1f} s"
    )


@pytest.mark.timeout(120 + 120 * ROUNDS)
def test_after_power_cuts_under_load_nothing_is_lost_or_run_twice_and_tasks_go_on(
    guest: Vm, capsys: pytest.CaptureFixture[str]
) -> None:
    chance, load = random.Random(SEED), Load()
    for user in USERS:
        for job in ("counts", "renames"):
            argv = ["ckptctl", "submit", "-q", "-n", job, "--", job]
            task = int(guest.run(argv, user=user).out)
            load.acknowledged[task] = job
            load.counting.append(task)
    until(lambda: resumed(guest, load, boot_id(guest)), 60, every_s=0.5)
    for number in range(1, ROUNDS + 1):
        said = cut_under_load(guest, load, chance, f"r{number}")
        said += boot_again(guest, chance)
        with capsys.disabled():
            print(f"\n  round {number} of seed {SEED}: {said}", end="")
        check_nothing_is_lost(guest, load)
        until(lambda: resumed(guest, load, boot_id(guest)), 90, every_s=0.5)
        lines = check_lines(guest, load)
        with capsys.disabled():
            print(f"; {seconds_to(guest, load, lines)}")
    finish(guest, load)


def boot_id(guest: Vm) -> str:
    return guest.sh("cat /proc/sys/kernel/random/boot_id").strip()


def finish(guest: Vm, load: Load) -> None:
    """Let all tasks end; each that was acknowledged has done its work."""
    guest.sh(f"touch {WORK}/finish")
    until(lambda: {row["phase"] for row in rows(guest).values()} == {"succeeded"}, 200, every_s=1)
    lines = check_lines(guest, load)
    for task in load.acknowledged:
        assert lines[task].ends, f"task {task} never ran to its end"
    for task in load.counting:
        assert len(lines[task].starts) > ROUNDS


def test_at_power_off_tasks_have_the_seconds_they_need_to_save_and_go_on_after_the_boot(
    guest: Vm, capsys: pytest.CaptureFixture[str]
) -> None:
    users = ("alice", "bob", "alice", "bob")
    tasks = [submit(guest, "saves", "3", user=user) for user in users]

    guest.poweroff()
    guest.boot()

    until(lambda: all(rows(guest)[task]["attempt"] == 2 for task in tasks), 60, every_s=0.5)
    for task in tasks:
        until(lambda task=task: has_resumed(guest, task), 60, every_s=0.5)  # type: ignore[misc]
        row = detail_of(guest, task)["row"]
        assert causes(guest, task) == ["shutdown"]
        assert (row["phase"], row["failures"], row["interruptions"]) == ("running", 0, 1)
    log = guest.journal("-u", "ckptd")
    began = [float(up) for up in re.findall(r"\[ *([\d.]+)\] .*, attempt 2 started", log)]
    assert len(began) == len(tasks)
    with capsys.disabled():
        print(f"\n  power-off with {len(tasks)} tasks that take 3 s to save: resumed "
              f"{min(began):.1f} to {max(began):.1f} s after the kernel's start")  # fmt: skip
    assert not guest.failed_units()
