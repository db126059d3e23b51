"""examples/batch_wc.sh: killed at random, every file has one result, few were counted twice."""

import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.daemon_fixture import kill_quietly, processes_of
from tests.examples.killing import Example, seeded
from tests.task_world import ROOT

FILES = 60
JOBS = 4
STDLIB = Path(sysconfig.get_path("stdlib"))


class WordCount(Example):
    """The example over some files, with a `wc` that notes that it was called."""

    def __init__(self, folder: Path, name: str) -> None:
        home = folder / name
        tools = home / "bin"
        tools.mkdir(parents=True)
        self.begun = home / "begun"
        self.begun.touch()
        self.home = home
        self.files = folder / "files"
        scripts = {
            "ckptctl": f'exec "{sys.executable}" -m ckptctl "$@"',
            "python3": f'exec "{sys.executable}" "$@"',
            "wc": f'echo "$2" >>"{self.begun}"\nexec "{shutil.which("wc")}" "$@"',
        }
        for tool, line in scripts.items():
            (tools / tool).write_text(f"#!/bin/sh\n{line}\n")
            (tools / tool).chmod(0o755)
        path = f"{tools}:/usr/bin:/bin"
        super().__init__("batch_wc.sh", env={"PATH": path, "XDG_DATA_HOME": str(home)}, cwd=home)
        self.command = [str(ROOT / "examples/batch_wc.sh"), str(self.files)]

    def count(self) -> int:
        return len(self.begun.read_text().splitlines())

    def kill_all_that_is_left(self) -> None:
        for pid in processes_of(self.home):
            kill_quietly(pid)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = tmp_path / "files"
    files.mkdir()
    for path in sorted(STDLIB.glob("*.py"))[:FILES]:
        shutil.copy(path, files / f"{len(list(files.iterdir())):03d} {path.name}")
    return tmp_path


def test_every_file_is_counted_and_few_are_counted_twice(folder: Path) -> None:
    chance, killed, whole = seeded(), WordCount(folder, "killed"), WordCount(folder, "whole")
    kills = 0
    for _ in range(3):
        kills += killed.kill_in_the_middle(chance, killed.count, most=12)
        killed.kill_all_that_is_left()
    assert kills

    lines = sum(path.read_bytes().count(b"\n") for path in (folder / "files").iterdir())
    for example in (killed, whole):
        assert f"{FILES} files, {lines} lines" in example.run()
    assert killed.count() <= FILES + kills * JOBS


def test_the_next_run_counts_what_is_new(folder: Path) -> None:
    example = WordCount(folder, "home")
    example.run()
    (folder / "files" / "new file.py").write_text("one\ntwo\n")

    assert f"{FILES + 1} files" in example.run()
    assert example.count() == FILES + 1
