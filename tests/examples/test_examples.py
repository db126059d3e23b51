"""The examples and the scripts of CHECKPOINTS.md run, are killed, and go on; no daemon needed."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.killing import needs_perl
from tests.task_world import CKPT, ROOT, TaskWorld
from tests.waiting import let_pass, until

SQUARES = sum(n * n for n in range(1, 101))
DOCUMENT = (ROOT / "docs" / "CHECKPOINTS.md").read_text()
SCRIPTS = re.findall(r"^```\w+\n(#!.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def world(tmp_path: Path) -> TaskWorld:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    ckpt = bin_dir / "ckpt"
    ckpt.write_text(f"#!/bin/sh\nexec '{CKPT[0]}' -c '{CKPT[2]}' \"$@\"\n")
    ckpt.chmod(0o755)
    return TaskWorld(tmp_path)


def start(world: TaskWorld, *command: str, **extra: str) -> subprocess.Popen[str]:
    """Start the command as the daemon would start the current attempt."""
    found = world.newest()
    assert not found.problem
    python = os.path.dirname(sys.executable)
    environ = world.environ(
        CKPTD_RESUME="1" if found.seq else "0",
        CKPTD_LAST=found.path,
        CKPTD_SEQ=str(found.seq),
        PATH=f"{world.path('..', '..', 'bin')}:{python}:{os.environ['PATH']}",
        **extra,
    )
    return subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, text=True, process_group=0
    )


def killed_until_done(world: TaskWorld, *command: str, kill_s_max: float) -> str:
    """Kill the command's first attempts at random moments, let the last one end; return it all."""
    said = ""
    for kill in (True, True, True, False):
        with start(world, *command) as process:
            if kill:
                let_pass(random.uniform(kill_s_max / 4, kill_s_max))
                os.killpg(process.pid, 9)
            said += process.communicate(timeout=50)[0]
        world.begin()
    assert process.returncode == 0
    return said


def test_the_shell_example_resumes_by_files_alone(world: TaskWorld) -> None:
    said = killed_until_done(
        world, str(ROOT / "examples/shell_resume.sh"), "100000", "100", kill_s_max=0.2
    )

    assert said.splitlines()[-1] == f"sum {100_000 * 100_001 // 2}"
    assert "resumed at" in said


def test_the_shell_example_saves_when_it_is_asked_to_stop(world: TaskWorld) -> None:
    script = str(ROOT / "examples/shell_resume.sh")
    with start(world, script, "100000000", "100") as process:
        let_pass(0.1)
        process.terminate()
        process.communicate(timeout=20)

    assert process.returncode == 75
    world.begin()
    assert world.newest().seq


POLLS = next(script for script in SCRIPTS if "ckpt 'stop?'" in script)


@pytest.mark.parametrize("page", ["example", "document"])
def test_a_shell_that_polls_ends_its_item_when_the_stop_signal_comes(
    world: TaskWorld, tmp_path: Path, page: str
) -> None:
    script, work = tmp_path / "script", tmp_path / "steps"
    script.write_text(POLLS)
    script.chmod(0o755)
    example = (str(ROOT / "examples/shell_steps.sh"), str(work))
    command, begun = {
        "example": (example, work / "squares"),
        "document": ((str(script),), world.path("done")),
    }[page]

    with start(world, *command) as process:
        until(begun.exists)
        process.terminate()
        process.communicate(timeout=20)

    assert process.returncode == 75


def test_the_step_example_repeats_no_step_and_at_most_the_current_item(
    world: TaskWorld, tmp_path: Path
) -> None:
    work = tmp_path / "steps"
    command = (str(ROOT / "examples/shell_steps.sh"), str(work))

    said = killed_until_done(world, *command, kill_s_max=0.8)

    assert said.splitlines()[-1] == f"sum of squares {sum(n * n for n in range(1, 21))}"
    squares = (work / "squares").read_text().split()
    assert len(set(squares)) == 20
    assert len(squares) <= 20 + 3


@needs_perl
def test_the_perl_example_resumes_by_the_pipe(world: TaskWorld) -> None:
    said = killed_until_done(
        world, "perl", str(ROOT / "examples/perl_resume.pl"), "100", kill_s_max=0.25
    )

    assert said.splitlines()[-1] == f"sum of squares {SQUARES}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda text: text.splitlines()[0])
def test_the_scripts_of_the_document_run_and_run_again(
    world: TaskWorld, tmp_path: Path, script: str
) -> None:
    path = tmp_path / "script"
    path.write_text(script)
    path.chmod(0o755)

    for _ in range(2):
        with start(world, str(path)) as process:
            process.communicate(timeout=30)
        assert process.returncode == 0
        world.begin()


def test_the_document_has_a_script_for_every_level_with_code() -> None:
    assert len(SCRIPTS) == 3


@pytest.mark.parametrize("name", ["download", "ingest", "migrate"])
def test_an_example_without_its_words_says_its_usage(name: str) -> None:
    line = [sys.executable, f"examples/{name}.py"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.partition(".py")[0]) == (1, f"usage: {name}")
