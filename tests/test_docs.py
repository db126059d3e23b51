"""The commands in the documents do what the documents say.

Convention: a block fenced as ```console is a session. A line `$ COMMAND` is executed, in one bash
per document, against a live daemon; the lines below it are what it prints, where `...` stands for
anything. A command without lines below may print what it likes. `# exit N` at the end of a
command line names its exit code, 0 where nothing is said. A block fenced as ```python in such a
document begins with `# NAME.py` and is that file for the commands that follow. Other fences are
only read. `$FILE_URL` is a file on a web server, `$API_URL` an API with pages that limits callers.
"""

import importlib
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ckptd.core.retry import EXIT_PERMANENT
from tests.daemon_fixture import ROOT, LiveDaemon, StartDaemon
from tests.examples.limited_api import LimitedApi
from tests.examples.servers import small_server

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
    if "```console\n" in path.read_text()
)
MARK = "--- end of command"
END_OF_FILE = "END OF FILE"


class Command(NamedTuple):
    """One command of a session."""

    line: int
    text: str
    code: int
    expected: str


def commands_in(text: str) -> list[Command]:
    """Return the commands of all sessions of a document, and its files, in order."""
    found: list[Command] = []
    fence, is_python_next = "", False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            if fence == "python" and found:
                found[-1] = found[-1]._replace(text=f"{found[-1].text}\n{END_OF_FILE}")
            is_python_next = line == "```python"
            fence = "" if fence else line[3:] or "text"
        elif fence == "python":
            if is_python_next:
                name = re.fullmatch(r"# ([\w/]+\.py)", line)
                assert name, f"line {number}: a block of Python begins with # NAME.py, not {line!r}"
                found.append(Command(number, f"cat >{name[1]} <<'{END_OF_FILE}'", 0, ""))
                is_python_next = False
            found[-1] = found[-1]._replace(text=f"{found[-1].text}\n{line}")
        elif fence == "console":
            _take(found, number, line)
    return found


def _take(found: list[Command], number: int, line: str) -> None:
    """Take a line of a session: a command, the rest of one, or what it prints."""
    if line.startswith("$ "):
        code = re.search(r"# exit (\d+)$", line)
        found.append(Command(number, line[2:], int(code[1]) if code else 0, ""))
    elif line.startswith("> "):  # the rest of a command over several lines
        found[-1] = found[-1]._replace(text=f"{found[-1].text}\n{line[2:]}")
    else:
        found[-1] = found[-1]._replace(expected=f"{found[-1].expected}{line}\n")


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
    for name in ("python", "python3"):  # no link: by its own path it finds its packages
        script = made / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        script.chmod(0o755)
    return made


def play(
    daemon: LiveDaemon, commands: list[Command], urls: dict[str, str]
) -> list[tuple[int, str]]:
    """Run the commands in one shell; return exit code and output of each."""
    shutil.copytree(ROOT / "examples", daemon.work / "examples")
    script = "".join(f"{command.text}\nprintf '\\n{MARK} %d\\n' $?\n" for command in commands)
    path = f"{bin_directory(daemon)}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash"],
        input=script,
        env={**daemon.env, **urls, "PATH": path, "COLUMNS": "100"},
        cwd=daemon.work,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    pieces = re.split(rf"\n{MARK} (\d+)\n", done.stdout)
    return [(int(code), out) for out, code in zip(pieces[::2], pieces[1::2], strict=False)]


@pytest.fixture
def urls(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Where the servers of `$FILE_URL` and `$API_URL` are."""
    with small_server(tmp_path) as site, LimitedApi(1_000, {3: "seconds"}).open() as api:
        site.publish("big.bin", random.Random(0).randbytes(12_000_000))
        yield {"FILE_URL": f"{site.url}/big.bin", "API_URL": api.url}


@pytest.mark.timeout(150)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_of_the_documents_do_what_they_say(
    document: str, start_daemon: StartDaemon, tmp_path: Path, urls: dict[str, str]
) -> None:
    daemon = start_daemon(env={"XDG_STATE_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)})
    commands = commands_in((ROOT / document).read_text())
    assert commands
    results = play(daemon, commands, urls)
    assert len(results) == len(commands), results
    for command, (code, out) in zip(commands, results, strict=True):
        where = f"{document}:{command.line}: {command.text}"
        assert code == command.code, f"{where}\ngave {code}:\n{out}"
        assert not command.expected or matches(command.expected, out), (
            f"{where}\nshould print:\n{command.expected}\nprinted:\n{out}"
        )


@pytest.mark.parametrize("kind", ["context:SyncResumableContext", "aio:ResumableContext"])
def test_the_page_for_authors_names_every_member_of_the_context(kind: str) -> None:
    module, name = kind.split(":")
    context = getattr(importlib.import_module(f"ckptd.sdk.{module}"), name)
    page = (ROOT / "docs/SDK.md").read_text()
    named = set(re.findall(r"`(\w+)", page[page.index("## All members") :]))
    public = {member for member in dir(context) if not member.startswith("_")}
    assert not public - named


def test_the_page_for_tasks_names_every_exit_code_that_is_final() -> None:
    page = (ROOT / "docs/CHECKPOINTS.md").read_text()
    named = re.search(r"^\| ([\d, -]+) \| will not get better", page, re.MULTILINE)
    assert named
    spans = [(int(low), int(high or low)) for low, high in re.findall(r"(\d+)-?(\d*)", named[1])]
    assert {code for low, high in spans for code in range(low, high + 1)} == EXIT_PERMANENT


def test_every_name_of_the_sdk_that_the_documents_import_is_there() -> None:
    for document in DOCUMENTS:
        for names in re.findall(r"from ckptd\.sdk import (.+)", (ROOT / document).read_text()):
            for name in names.split(", "):
                assert hasattr(importlib.import_module("ckptd.sdk"), name), f"{document}: {name}"
