"""Functions as tasks under a real daemon: their numbers, results and problems, edits that count."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ckptd.sdk.save import save
from tests.daemon_fixture import ROOT, LiveDaemon
from tests.task_world import TASK, TaskWorld
from tests.waiting import let_pass

WORK = """
from ckptd.sdk import task

@task(name="fold", version={version})
def fold(ctx, limit):
    first = ctx.state.get("part", 0)
    for part in range(first, limit):
        ctx.state["part"] = part + 1
        ctx.set_intermediate_result("last", part)
        ctx.checkpoint()
        if part + 1 == 6 and not first:
            raise RuntimeError("a bug at part 6")
    return {{"first": first, "last": ctx.get_intermediate_result("last")}}
"""


def write_work(daemon: LiveDaemon, version: int) -> None:
    """Write other code of the same length: within a second, the bytecode cache takes it for old."""
    (daemon.work / "work.py").write_text(WORK.format(version=version))
    shutil.rmtree(daemon.work / "__pycache__", ignore_errors=True)


def submitted(daemon: LiveDaemon, *words: str, version: int = 1) -> int:
    write_work(daemon, version)
    options = ("--python", "work:fold", "--interpreter", sys.executable, "--input", '{"limit": 8}')
    return int(daemon.ctl("submit", "-q", *options, *words).stdout)


def test_an_edited_checkpoint_is_what_a_task_goes_on_from(daemon: LiveDaemon) -> None:
    task = submitted(daemon, "--retries", "0")
    daemon.wait_phase(task, "failed")
    out = daemon.ctl("show", str(task)).stdout
    assert "saving\n  strategy" in out
    seen = daemon.json("checkpoint", "show", str(task))["checkpoint"]
    assert seen["manifest"]["state"] == {"part": 6}
    assert seen["numbers"]["saves"] >= 5

    said = daemon.ctl("checkpoint", "edit", str(task), "--set", "state.part=8",
                      "--set", "results.last=41")  # fmt: skip
    assert "state.part: 6 -> 8" in said.stdout
    assert daemon.ctl("checkpoint", "diff", str(task), check=False).returncode == 1
    daemon.ctl("retry", str(task))
    daemon.wait_phase(task, "succeeded")

    assert '{"first": 8, "last": 41}' in daemon.ctl("show", str(task)).stdout
    (shown,) = daemon.json("show", str(task))["tasks"]
    assert shown["result"] == {"first": 8, "last": 41}


def test_a_saved_state_goes_to_another_task_through_a_tar(daemon: LiveDaemon) -> None:
    task = submitted(daemon, "--retries", "0")
    daemon.wait_phase(task, "failed")
    daemon.ctl("checkpoint", "export", str(task), "saved.tar")
    other = submitted(daemon, "--hold")
    daemon.ctl("checkpoint", "import", str(other), "saved.tar")
    daemon.ctl("release", str(other))
    daemon.wait_phase(other, "succeeded")
    (shown,) = daemon.json("show", str(other))["tasks"]
    assert shown["result"] == {"first": 6, "last": 7}
    assert shown["attempts"][0]["checkpoint"] >= 1


def test_a_task_whose_code_is_too_old_is_blocked_and_goes_on_once_it_is_mended(
    daemon: LiveDaemon,
) -> None:
    task = submitted(daemon, "--retries", "0", version=2)
    daemon.wait_phase(task, "failed")
    write_work(daemon, 1)
    daemon.ctl("retry", str(task))
    assert daemon.wait_phase(task, "blocked")["reason"] == "version"
    text = daemon.ctl("explain", str(task)).stdout
    assert "of versions that do not fit" in text.replace("\n ", "")

    write_work(daemon, 2)
    daemon.ctl("release", str(task))
    daemon.wait_phase(task, "succeeded")


def start_edit(world: TaskWorld, seq: int, part: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "ckptd.offline.checkpoint", "edit"]
    process = subprocess.Popen(
        [*command, world.dir, str(TASK), "1", str(seq)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps({"set": {"state.part": part}}))
    process.stdin.close()
    return process


def saved_twice(tmp_path: Path) -> TaskWorld:
    world = TaskWorld(tmp_path)
    for name in ("a", "b"):
        world.path("stage", name).write_bytes(os.urandom(300_000))
    save(world.dir, [], {"task": TASK, "attempt": 1, "state": {"part": 0}})
    return world


def state_of(path: str) -> object:
    return json.loads(Path(path, "MANIFEST.json").read_text())["state"]


def test_killed_while_editing_the_newest_is_whole_and_the_old_one_unharmed(
    tmp_path: Path, rounds: int
) -> None:
    world = saved_twice(tmp_path)
    began_s = time.monotonic()
    with start_edit(world, world.newest().seq, 0) as process:
        assert process.wait(60) == 0
    whole_s = time.monotonic() - began_s
    reached = 0
    for part in range(1, rounds + 1):
        before = world.newest()
        with start_edit(world, before.seq, part) as process:
            assert process.stdout is not None
            let_pass(random.uniform(0, whole_s))
            process.kill()
            answered = process.stdout.read()

        newest = world.newest()
        assert (newest.warning, newest.problem) == ("", "")
        if newest.seq == before.seq:
            assert not answered
        else:
            reached += 1
            assert (newest.seq, state_of(newest.path)) == (before.seq + 1, {"part": part})
    assert reached < rounds or rounds < 3, "every kill came too late to prove anything"


def test_edits_at_the_same_time_never_mix(tmp_path: Path) -> None:
    world = saved_twice(tmp_path)
    editors = [start_edit(world, 1, part) for part in range(1, 7)]
    made: dict[int, int] = {}
    for part, process in enumerate(editors, 1):
        with process:
            assert process.stdout is not None
            assert process.stderr is not None
            out, err = process.stdout.read(), process.stderr.read()
        assert process.returncode in (0, 4, 5), err  # gone: others made two newer ones meanwhile
        if process.returncode == 0:
            made[json.loads(out)["seq"]] = part
    assert sorted(made) == list(range(2, 2 + len(made)))
    newest = world.newest()
    assert (newest.warning, newest.problem, newest.seq) == ("", "", max(made))
    assert state_of(newest.path) == {"part": made[newest.seq]}
    assert os.listdir(world.path("stage")) == []


THREE = """
from ckptd.sdk import task

def did(name):
    with open("did.log", "a") as log:
        log.write(f"{name}\\n")
    return name.upper()

@task
def three(ctx):
    return [ctx.step(name, did, name) for name in ("fetch", "clean", "load")]
"""


def test_a_finished_function_runs_again_from_a_step_on(daemon: LiveDaemon) -> None:
    (daemon.work / "three.py").write_text(THREE)
    options = ("--python", "three:three", "--interpreter", sys.executable)
    task = int(daemon.ctl("submit", "-q", *options).stdout)
    daemon.wait_phase(task, "succeeded")

    unknown = daemon.ctl("retry", "--from-step", "claen", str(task), check=False)
    assert unknown.returncode == 4
    assert "its steps are: clean, fetch, load" in unknown.stderr
    said = daemon.ctl("retry", "--from-step", "clean", str(task))
    assert "2 steps will run again: clean, load" in said.stderr
    daemon.ctl("wait", str(task))

    assert (daemon.work / "did.log").read_text().split() == [
        "fetch", "clean", "load", "clean", "load",
    ]  # fmt: skip
    (shown,) = daemon.json("show", str(task))["tasks"]
    assert shown["result"] == ["FETCH", "CLEAN", "LOAD"]
    assert [one["attempt"] for one in shown["attempts"]] == [1, 2]
