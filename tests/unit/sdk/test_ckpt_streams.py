"""`ckpt` between broken streams: 1 is only ever an answer, no loop takes a failure for one."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.task_world import CKPT, TaskWorld

YES = [["stop?"], ["get", "k"], ["last"], ["items"]]
FULL, CLOSED = ">/dev/full", ">&-"


@pytest.fixture
def world(tmp_path: Path) -> TaskWorld:
    world = TaskWorld(tmp_path)
    asked(world, {"stop": "cancel"})
    world.ckpt("set", "k", "v")
    world.ckpt("item", "a", "pass")
    world.publish(1, file="x")
    world.seal()
    return world


def asked(world: TaskWorld, control: object) -> None:
    world.path("control.json").write_text(json.dumps(control))


def said(
    world: TaskWorld, words: list[str], redirected: str = "", out: int = subprocess.PIPE, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirected}', "sh", *CKPT, *words],
        env=world.environ(**env), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE,
        text=True, check=False, timeout=30,
    )  # fmt: skip


@pytest.mark.parametrize("words", YES, ids=" ".join)
def test_an_answer_that_cannot_be_written_is_no_no(world: TaskWorld, words: list[str]) -> None:
    assert said(world, words).returncode == 0
    for redirected, why in ((FULL, "No space left on device"), (CLOSED, "it is closed")):
        done = said(world, words, redirected)

        assert (done.returncode, done.stderr) == (74, f"ckpt: stdout cannot be written: {why}\n")


@pytest.mark.parametrize("words", YES, ids=" ".join)
def test_a_reader_that_left_is_141_and_not_told(world: TaskWorld, words: list[str]) -> None:
    reads, writes = os.pipe()
    os.close(reads)

    done = said(world, words, out=writes)

    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("words", [*YES, ["done", "none"]], ids=" ".join)
def test_a_stderr_that_is_broken_changes_no_answer(world: TaskWorld, words: list[str]) -> None:
    code = said(world, words).returncode

    assert code == (1 if "none" in words else 0)
    assert said(world, words, "2>&-").returncode == code
    assert said(world, words, "2>/dev/full").returncode == code


@pytest.mark.parametrize("redirected", ["", "2>&-", "2>/dev/full"])
def test_a_question_outside_of_a_task_is_64_on_any_stderr(
    world: TaskWorld, redirected: str
) -> None:
    assert said(world, ["stop?"], redirected, CKPTD_DIR="").returncode == 64


@pytest.mark.parametrize("words", [*YES, ["done", "a"], ["wanted"], ["resume"]], ids=" ".join)
def test_where_the_task_is_gone_nothing_is_answered(
    world: TaskWorld, tmp_path: Path, words: list[str]
) -> None:
    gone = str(tmp_path / "gone")

    done = said(world, words, CKPTD_DIR=gone, CKPTD_CONTROL=f"{gone}/control.json")

    assert (done.returncode, done.stdout) == (74, "")


@pytest.mark.parametrize("verb", ["stop?", "wanted"])
@pytest.mark.parametrize("text", ["", '{"stop":', "[]", "[" * 4_096])
def test_what_no_daemon_wrote_is_damage_and_no_no(world: TaskWorld, verb: str, text: str) -> None:
    world.path("control.json").write_text(text)

    assert said(world, [verb]).returncode == 65


def test_a_control_file_that_cannot_be_read_is_an_error_of_the_disk(world: TaskWorld) -> None:
    world.path("control.json").unlink()
    world.path("control.json").mkdir()

    assert said(world, ["stop?"]).returncode == 74
    (answer,) = world.pipe({"op": "should_stop"})
    assert answer["error"]["code"] == "io_error"


def test_a_pipe_whose_answers_are_lost_does_not_say_that_nothing_was_recorded(
    world: TaskWorld,
) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >/dev/full', "sh", *CKPT, "pipe"],
        env=world.environ(), input='{"op":"set","key":"k","value":"new"}\n', text=True,
        capture_output=True, check=False, timeout=30,
    )  # fmt: skip

    assert done.returncode == 74
    assert done.stderr == "ckpt: stdout cannot be written: No space left on device\n"
    assert world.ckpt("get", "k").stdout == "new\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_was_given_comes_back_byte_for_byte(world: TaskWorld, encoding: str) -> None:
    given = "日本".encode() + b"\xff"
    subprocess.run([*CKPT, "set", "k", given], env=world.environ(), check=True)

    got = subprocess.run(
        [*CKPT, "get", "k"],
        env=world.environ(PYTHONIOENCODING=encoding), capture_output=True, check=False,
    )  # fmt: skip

    assert (got.returncode, got.stdout) == (0, given + b"\n")
