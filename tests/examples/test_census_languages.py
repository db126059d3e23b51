"""The census in three languages: killed at random, each comes to the same result as the others."""

import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.examples.killing import ENDS_S, needs_perl, seeded
from tests.examples.test_examples import start, world
from tests.task_world import ROOT, TaskWorld
from tests.waiting import let_pass, until

STDLIB = sysconfig.get_path("stdlib")
# A script, how many modules it does here, how many of them it may do again when it is killed.
SCRIPTS = [
    pytest.param("census.sh", 32, 1, id="shell"),
    pytest.param(
        "census.pl",
        400,
        16,
        id="perl",
        marks=needs_perl,
    ),
]

__all__ = ["world"]


def measured_by_python(folder: Path, count: int) -> str:
    """Return what census.py finds, as the other two write it."""
    out = folder / "census.json"
    command = [sys.executable, str(ROOT / "examples/census.py"), "--out", str(out)]
    subprocess.run([*command, "--items", str(count)], check=True, capture_output=True)
    rows = json.loads(out.read_text())["modules"]
    return "".join(f"{row['module']}\t{row['lines']}\t{row['sha256']}\n" for row in rows)


@pytest.mark.parametrize(("script", "total", "at_most"), SCRIPTS)
def test_shell_and_perl_come_to_the_result_of_python_although_they_are_killed(
    world: TaskWorld, tmp_path: Path, script: str, total: int, at_most: int
) -> None:
    chance, result, begun = seeded(), tmp_path / "census.tsv", tmp_path / "begun"
    begun.touch()
    command = (str(ROOT / "examples" / script), STDLIB, str(result), str(total))

    def count() -> int:
        return len(begun.read_text().splitlines())

    kills = 0
    for is_killed in (True, True, True, False):
        wanted = count() + chance.randint(1, total // 6)
        with start(world, *command, CENSUS_BEGUN=str(begun)) as process:
            if is_killed:
                until(lambda: count() >= wanted or process.poll() is not None, ENDS_S)  # noqa: B023
                let_pass(chance.uniform(0, 0.03))
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=ENDS_S)
        kills += process.returncode != 0
        world.begin()

    assert process.returncode == 0
    assert kills
    assert result.read_text() == measured_by_python(tmp_path, total)
    assert count() <= total + kills * at_most


@needs_perl
def test_the_whole_library_is_measured_alike(world: TaskWorld, tmp_path: Path) -> None:
    result = tmp_path / "census.tsv"
    with start(world, str(ROOT / "examples/census.pl"), STDLIB, str(result)) as process:
        process.communicate(timeout=ENDS_S)

    modules = runpy.run_path(str(ROOT / "examples/census.py"))["modules"]
    rows = [line.split("\t") for line in result.read_text().splitlines()]
    assert [row[0] for row in rows] == modules(Path(STDLIB))
    for module, lines, digest in rows:
        content = Path(STDLIB, module).read_bytes()
        assert int(lines) == len(content.splitlines()), module
        assert digest == hashlib.sha256(content).hexdigest(), module
