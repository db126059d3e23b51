"""`submit` of what can be seen to never start."""

from pathlib import Path

import pytest

from ckptd.protocol import messages as m
from tests.unit.ctl.conftest import Scripted, ctl


@pytest.fixture
def endpoint(scripted: Scripted) -> str:
    return scripted({"submit": lambda _: m.Submitted((7,), (True,))}).endpoint


@pytest.mark.parametrize("words", [("echo a | wc",), ("make all",), ("-d", "/tmp", "--", "true;")])
def test_a_line_of_shell_as_one_word_is_refused(endpoint: str, words: tuple[str, ...]) -> None:
    code, out, err = ctl(endpoint, "submit", *words)
    assert (code, out) == (64, "")
    assert "there is no program" in err
    assert "hint: for a line of shell: --shell" in err


def test_a_line_of_shell_runs_with_shell_and_a_program_may_have_a_blank(
    endpoint: str, tmp_path: Path
) -> None:
    assert ctl(endpoint, "submit", "--shell", "--", "echo a | wc") == (0, "7\n", "")
    program = tmp_path / "my program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert ctl(endpoint, "submit", "--", str(program)) == (0, "7\n", "")
    assert ctl(endpoint, "submit", "-d", str(tmp_path), "--", "./my program") == (0, "7\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("mkae", "all"), "there is no program 'mkae' on the PATH that the task will have"),
        (("./mkae",), "there is no program './mkae'"),
        (("/etc/passwd",), "'/etc/passwd' is not executable"),
        (("-d", "/nonexistent", "true"), "there is no directory '/nonexistent'"),
        (("-E", "PATH=/nonexistent", "true"), "there is no program 'true' on the PATH"),
        (("./a tool",), "there is no program './a tool'"),
    ],
)
def test_what_is_not_there_yet_is_taken_with_a_note(
    endpoint: str, words: tuple[str, ...], said: str
) -> None:
    code, out, err = ctl(endpoint, "submit", *words)
    assert (code, out) == (0, "7\n")
    assert err.startswith(f"ckptctl: note: {said}")
    assert "fails when it starts" in err
    assert ctl(endpoint, "submit", "-q", *words) == (0, "7\n", "")


def test_a_program_with_a_blank_is_taken_though_its_directory_is_not_there_yet(
    endpoint: str, tmp_path: Path
) -> None:
    program = tmp_path / "my program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    code, out, err = ctl(endpoint, "submit", "-d", "/nonexistent", "--", str(program))
    assert (code, out) == (0, "7\n")
    assert "note: there is no directory '/nonexistent'" in err


@pytest.mark.parametrize("name", ["foo\\u0000", "foo bar\\u0000", "/foo\\u0000"])
def test_a_nul_in_a_file_of_tasks_is_left_to_the_daemon_to_refuse(
    endpoint: str, tmp_path: Path, name: str
) -> None:
    file = tmp_path / "tasks.toml"
    file.write_text(f'[[task]]\ncommand = ["{name}"]\n')
    code, _, err = ctl(endpoint, "submit", "--file", str(file))
    assert code == 0, err


def test_what_is_there_is_taken_without_a_word(endpoint: str) -> None:
    assert ctl(endpoint, "submit", "true") == (0, "7\n", "")
    assert ctl(endpoint, "submit", "--clean-env", "true", PATH="") == (0, "7\n", "")
