"""Workers that die, fork, or are killed: who is to blame, who is not, and nothing left behind."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.batch_world import BatchWorld, children_of, kill_with_children
from tests.waiting import until


@pytest.fixture
def world(tmp_path: Path) -> BatchWorld:
    return BatchWorld(tmp_path)


def shell(script: str) -> list[str]:
    return ["sh", "-c", script, "sh"]


def runs(world: BatchWorld) -> Counter[str]:
    path = world.work / "runs"
    return Counter(path.read_text().split()) if path.exists() else Counter()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in {"Z", "X"}


def pids_in(world: BatchWorld, name: str) -> list[int]:
    path = world.work / name
    return [int(word) for word in path.read_text().split()] if path.exists() else []


KILLERS = """
import os, signal, time

def note(item):
    fd = os.open("runs", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{item}\\n".encode())
    os.close(fd)

def work(item):
    note(item)
    if item == "exit":
        os._exit(7)
    if item == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "fork" and os.fork() == 0:
        time.sleep(1000)
    time.sleep(0.05)
    return item

async def loop(item):
    return work(item)
"""


@pytest.mark.parametrize("mode", ["process", "threads", "async"])
def test_items_that_kill_their_worker_are_quarantined_alone(world: BatchWorld, mode: str) -> None:
    world.module(KILLERS)
    good = [f"good{n}" for n in range(12)]
    function = "items:loop" if mode == "async" else "items:work"
    world.prepare(python=function, mode=mode, jobs=4, items=[*good[:6], "exit", "kill", *good[6:]])

    world.run(code=1)
    found = world.results()

    assert {key for key in found if found[key]["status"] == "quarantined"} == {"exit", "kill"}
    assert all(found[key]["status"] == "pass" for key in good)
    assert "its process exited with 7" in found["exit"]["text"]
    assert "killed by SIGKILL" in found["kill"]["text"]
    assert runs(world)["kill"] <= 5  # among others it may be suspect before it is alone
    assert all(runs(world)[key] <= 4 for key in good)
    assert world.run(code=1).stdout == ""


def test_a_command_that_is_killed_runs_again_but_not_for_ever(world: BatchWorld) -> None:
    script = "echo $1 >>runs; test $1 = bad && kill -9 $$; test -e $1 && exit 0; >$1; kill -9 $$"
    world.prepare(argv=shell(script), items=["bad", "once"], jobs=2)
    world.run(code=1)

    assert world.statuses() == {"bad": "quarantined", "once": "pass"}
    assert runs(world) == {"bad": 3, "once": 2}


def test_children_that_an_item_leaves_in_its_group_are_gone_with_it(world: BatchWorld) -> None:
    script = (
        "old=$(head -n1 pids 2>/dev/null || echo none); n=0\n"
        'while grep -q "State:.[RSD]" /proc/$old/status 2>/dev/null; do\n'
        "  n=$((n+1)); test $n -gt 300 && exit 1; sleep 0.01\n"
        "done\n"
        "sleep 1000 & echo $! >>pids"
    )
    world.prepare(argv=shell(script), items=["a", "b"], jobs=1)
    world.run()

    assert world.statuses() == {"a": "pass", "b": "pass"}
    pids = pids_in(world, "pids")
    assert len(pids) == 2
    until(lambda: not any(map(is_alive, pids)))


def test_children_that_left_the_group_are_ended_with_the_run(world: BatchWorld) -> None:
    script = "setsid sh -c 'echo $$ >>pids; exec sleep 1000' & until test -s pids; do :; done"
    world.prepare(argv=shell(script), items=["a"])

    done = world.run()

    assert "ended 1 process that left" in done.stderr
    assert not is_alive(pids_in(world, "pids")[0])


def test_a_function_that_forks_leaves_nothing_behind(world: BatchWorld) -> None:
    world.module(KILLERS)
    world.prepare(python="items:work", mode="process", jobs=2, items=["fork", "a", "b"])
    world.run()

    assert set(world.statuses().values()) == {"pass"}
    wanted = f"CKPTD_BATCH_RUN={world.dir}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            assert wanted not in path.read_bytes()
        except OSError:
            continue


def test_what_a_killed_runner_leaves_alive_never_runs_beside_the_next(world: BatchWorld) -> None:
    script = "echo $$ >>pids; echo $1 >>runs; test -e free || sleep 1000"
    world.prepare(argv=shell(script), items=["a", "b"], jobs=2)
    runner = world.start()
    until(lambda: len(pids_in(world, "pids")) == 2)
    old = pids_in(world, "pids")
    runner.kill()
    runner.communicate(timeout=20)
    assert all(map(is_alive, old))
    (world.work / "free").touch()

    done = world.run()

    assert not any(map(is_alive, old))
    assert "that an earlier run left alive" in done.stderr
    assert runs(world) == {"a": 2, "b": 2}
    assert set(world.statuses().values()) == {"pass"}


def test_the_hosts_of_a_killed_runner_end_by_themselves(world: BatchWorld) -> None:
    world.module("import time\ndef work(item):\n    open('begun', 'w')\n    time.sleep(1000)\n")
    world.prepare(python="items:work", items=["a", "b"], jobs=2)
    runner = world.start()
    until((world.work / "begun").exists)
    hosts = children_of(runner.pid)
    assert hosts
    runner.kill()
    runner.communicate(timeout=20)

    until(lambda: not any(map(is_alive, hosts)))


def killed_in_flight(world: BatchWorld, item: str, times: int) -> list[str]:
    """Kill the runner while an item is in flight; return who was beside it each time."""
    beside = []
    for _ in range(times):
        before = runs(world)[item]
        runner = world.start()
        until(lambda before=before: runs(world)[item] > before)  # type: ignore[misc]
        kill_with_children(runner)
        beside.append(" ".join(sorted(world.facts().flying)))
    return beside


def test_an_item_that_takes_its_runner_along_is_isolated_then_quarantined(
    world: BatchWorld,
) -> None:
    script = (
        "echo $1 >>runs; case $1 in poison) sleep 1000;; slow) test -e free || sleep 1000;; esac"
    )
    world.prepare(argv=shell(script), items=["poison", "slow", "c", "d", "e"], jobs=2)

    beside = killed_in_flight(world, "poison", 2)
    (world.work / "free").touch()
    alone = killed_in_flight(world, "poison", 3)
    others = set(world.statuses())
    world.run(code=1)

    assert beside == ["poison slow", "poison slow"]
    assert alone == ["poison slow", "poison", "poison"]  # slow is named from before, and runs next
    assert others == {"slow", "c", "d", "e"}
    assert world.statuses() == {"poison": "quarantined"} | dict.fromkeys("cde", "pass") | {
        "slow": "pass"
    }
    assert runs(world)["poison"] == 5
    assert "while nothing else ran" in world.results()["poison"]["text"]


def test_stops_in_order_never_quarantine(world: BatchWorld) -> None:
    world.prepare(argv=shell("echo $1 >>runs; test -e free || sleep 1000"), items=["a"], jobs=1,
                  grace_s=0.1)  # fmt: skip
    for number in range(6):
        runner = world.start()
        until(lambda number=number: runs(world)["a"] > number)  # type: ignore[misc]
        runner.send_signal(signal.SIGTERM if number % 2 else signal.SIGINT)
        assert runner.communicate(timeout=20)
        assert runner.returncode == (75 if number % 2 else 130)
        assert not world.facts().flying
    (world.work / "free").touch()
    world.run()

    assert world.statuses() == {"a": "pass"}


def test_items_in_flight_at_a_reboot_are_no_suspects(world: BatchWorld) -> None:
    world.prepare(argv=shell("echo $1 >>runs; test -e free || sleep 1000"), items=["a"], jobs=1)
    for number in range(6):
        runner = world.start()
        until(lambda number=number: runs(world)["a"] > number)  # type: ignore[misc]
        kill_with_children(runner)
        forget_boot(world)
    (world.work / "free").touch()
    world.run()

    assert world.statuses() == {"a": "pass"}


def forget_boot(world: BatchWorld) -> None:
    """Rewrite the newest journal as if it were of another boot."""
    from ckptd.batch import ledger, place  # noqa: PLC0415

    path, batch = str(world.dir), place.load(str(world.dir))
    known = ledger.read(path, batch)
    run = place.newest_run(path)
    journal = world.dir / "journal" / f"{run:06d}.j"
    journal.unlink()
    made = ledger.Ledger(path, batch, run)
    made.append([{"op": "run", "event": "begin", "boot": "another"}])
    made.append([{**fact, "op": "item_start"} for fact in known.flying.values()])
    made.close()


def test_a_runner_alone_is_killed_by_pid_and_its_lock_is_free(world: BatchWorld) -> None:
    world.prepare(argv=shell("echo $1 >>runs; test -e free || sleep 1000"), items=["a"])
    runner = world.start()
    until(lambda: runs(world)["a"] == 1)

    assert "is running: process" in world.run(code=5).stderr
    os.kill(runner.pid, signal.SIGKILL)
    runner.communicate(timeout=20)
    (world.work / "free").touch()
    world.run()


def test_what_an_item_leaves_in_its_directory_no_other_item_finds(world: BatchWorld) -> None:
    precious = world.folder / "precious"
    precious.write_text("kept")
    script = (
        'test "$(echo $(ls -A $CKPTD_DIR))" = "attempt.json ckpt err out stage" || exit 1\n'
        'test -z "$(ls -A $CKPTD_DIR/stage $CKPTD_DIR/ckpt | grep -v :)" || exit 1\n'
        "case $1 in\n"
        f"link) rm $CKPTD_DIR/out; ln -s {precious} $CKPTD_DIR/out;;\n"
        "gone) rm -r $CKPTD_DIR;;\n"
        "stage) echo x >$CKPTD_DIR/stage/x;;\n"
        "file) rm -r $CKPTD_DIR/ckpt; echo x >$CKPTD_DIR/ckpt;;\n"
        "facts) ckpt set a 1; ckpt save $0;;\n"
        "esac\n"
    )
    (world.work / "sh").write_text("x")
    kinds = ["link", "gone", "stage", "file", "facts"]
    items = [name for kind in kinds for name in (kind, f"after {kind}")]
    world.prepare(argv=shell(script), items=items, jobs=1)
    world.run()

    assert set(world.statuses().values()) == {"pass"}
    assert precious.read_text() == "kept"
