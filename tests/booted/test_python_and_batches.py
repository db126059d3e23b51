"""A Python function and a batch of a plain user, as units of a booted systemd: killed, resumed."""

import json
from typing import Any

from tests.booted.machine import Machine
from tests.waiting import until

HOME = "/home/alice"
SQUARES = """\
import os, time

def main(ctx, count):
    for item in ctx.items(range(count), key=str):
        with open("ran", "a") as file:
            print(item.value, file=file)
        item.record("pass", item.value ** 2)
        while item.value == 5 and ctx.attempt == 1:
            time.sleep(0.05)
    return [ctx.attempt, os.getuid(), sum(fact for fact in ctx.item_results().values())]
"""


def as_alice(machine: Machine, script: str) -> str:
    """Run a script in alice's home, as after a login."""
    return machine.sh(f"cd {HOME} && {script}", user="alice")


def shown(machine: Machine, task: str) -> Any:
    return json.loads(as_alice(machine, f"ckptctl show {task} -o json"))["tasks"][0]


def test_a_function_of_a_user_is_killed_and_goes_on_in_its_own_interpreter(
    machine: Machine,
) -> None:
    machine.put(f"{HOME}/squares.py", SQUARES, owner="alice")
    words = "ckptctl submit -q --python squares:main --input '{\"count\": 10}'"
    task = as_alice(machine, words).strip()
    until(lambda: machine.exists(f"{HOME}/ran") and "5" in machine.get(f"{HOME}/ran").decode(), 30)
    as_alice(machine, f"ckptctl signal KILL {task} && ckptctl wait {task}")

    attempt, uid, total = shown(machine, task)["result"]
    assert (attempt, total) == (2, sum(n * n for n in range(10)))
    assert uid == int(machine.run(["id", "-u", "alice"]).out)
    ran = machine.get(f"{HOME}/ran").decode().split()
    assert sorted(set(ran), key=int) == [str(n) for n in range(10)]
    assert len(ran) <= 11


def test_a_batch_of_a_user_outlives_its_runner_and_the_daemon(machine: Machine) -> None:
    names = "ran=$(ls ran-* 2>/dev/null | wc -l)"
    each = "sh -c 'sleep 0.05; : > ran-$1' _ {}"
    items = f"seq 1 60 | ckptctl batch submit -q --name sixty -j 4 -- {each}"
    task = as_alice(machine, items).strip()
    until(lambda: int(as_alice(machine, f"{names}; echo $ran")) > 8, 30)
    as_alice(machine, f"ckptctl signal KILL {task}")
    machine.sh("systemctl kill -s KILL ckptd; systemctl restart ckptd")
    as_alice(machine, "ckptctl batch wait sixty")

    rows = as_alice(machine, "ckptctl batch items sixty -o '{key} {status}'").splitlines()
    assert sorted(rows) == sorted(f"{n} pass" for n in range(1, 61))
    assert int(as_alice(machine, f"{names}; echo $ran")) == 60
