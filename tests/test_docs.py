"""The commands in the documents do what the documents say.

Convention: a block fenced as ```console is a session. A line `$ COMMAND` is executed, in one bash
per document, against a live daemon; the lines below it are what it prints, where `...` stands for
anything. A command without lines below may print what it likes. `# exit N` at the end of a
command line names its exit code, 0 where nothing is said. Other fences are only read.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.daemon_fixture import ROOT, LiveDaemon

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
    if "```console\n" in path.read_text()
)
MARK = "--- end of command"


class Command(NamedTuple):
    """One command of a session."""

    line: int
    text: str
    code: int
    expected: str


def commands_in(text: str) -> list[Command]:
    """Return the commands of all sessions of a document, in order."""
    found: list[Command] = []
    is_session = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            is_session = line == "```console"
        elif is_session and line.startswith("$ "):
            code = re.search(r"# exit (\d+)$", line)
            found.append(Command(number, line[2:], int(code[1]) if code else 0, ""))
        elif is_session and line.startswith("> "):  # the rest of a command over several lines
            found[-1] = found[-1]._replace(text=f"{found[-1].text}\n{line[2:]}")
        elif is_session:
            found[-1] = found[-1]._replace(expected=f"{found[-1].expected}{line}\n")
    return found


def matches(expected: str, got: str) -> bool:
    """Compare line by line without trailing blanks; `...` stands for anything."""
    pattern = ".*".join(re.escape(part) for part in expected.rstrip().split("..."))
    trimmed = "\n".join(line.rstrip() for line in got.rstrip().splitlines())
    return re.fullmatch(pattern, trimmed, re.DOTALL) is not None


def bin_directory(daemon: LiveDaemon) -> Path:
    """Make the console scripts, as an installed package has them."""
    made = daemon.root / "bin"
    made.mkdir()
    modules = {"ckptctl": "ckptctl", "ckpt": "ckptd.sdk.ckpt", "ckptd": "ckptd"}
    for name, module in modules.items():
        script = made / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        script.chmod(0o755)
    for name in ("python", "python3"):
        (made / name).symlink_to(sys.executable)
    return made


def play(daemon: LiveDaemon, commands: list[Command]) -> list[tuple[int, str]]:
    """Run the commands in one shell; return exit code and output of each."""
    shutil.copytree(ROOT / "examples", daemon.work / "examples")
    script = "".join(f"{command.text}\nprintf '\\n{MARK} %d\\n' $?\n" for command in commands)
    path = f"{bin_directory(daemon)}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash"],
        input=script,
        env={**daemon.env, "PATH": path, "COLUMNS": "100"},
        cwd=daemon.work,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    pieces = re.split(rf"\n{MARK} (\d+)\n", done.stdout)
    return [(int(code), out) for out, code in zip(pieces[::2], pieces[1::2], strict=False)]


@pytest.mark.timeout(150)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_of_the_documents_do_what_they_say(document: str, daemon: LiveDaemon) -> None:
    commands = commands_in((ROOT / document).read_text())
    assert commands
    results = play(daemon, commands)
    assert len(results) == len(commands), results
    for command, (code, out) in zip(commands, results, strict=True):
        where = f"{document}:{command.line}: {command.text}"
        assert code == command.code, f"{where}\ngave {code}:\n{out}"
        assert not command.expected or matches(command.expected, out), (
            f"{where}\nshould print:\n{command.expected}\nprinted:\n{out}"
        )
