"""A scripted daemon in a short directory, and a way to run the real command line against it."""

import os
import pty
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.scripted_daemon import Handler, ScriptedDaemon

ROOT = Path(__file__).resolve().parents[3]
Scripted = Callable[[dict[str, Handler]], ScriptedDaemon]


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose name leaves room for a socket path (107 bytes)."""
    with tempfile.TemporaryDirectory(prefix="ck-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def scripted(short_dir: Path) -> Iterator[Scripted]:
    started: list[ScriptedDaemon] = []

    def start(script: dict[str, Handler]) -> ScriptedDaemon:
        daemon = ScriptedDaemon(short_dir, script).start()
        started.append(daemon)
        return daemon

    yield start
    for daemon in started:
        daemon.close()


def ctl_process(endpoint: str, *words: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ckptctl", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CKPTD_ENDPOINT": endpoint, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ctl(endpoint: str, *words: str, stdin: str = "", **env: str) -> tuple[int, str, str]:
    """Run `ckptctl WORDS`; return (exit code, stdout, stderr)."""
    with ctl_process(endpoint, *words, **env) as process:
        out, err = process.communicate(stdin, timeout=50)
    return process.returncode, out, err


def ctl_on_terminal(endpoint: str, *words: str, typed: str = "", **env: str) -> tuple[int, str]:
    """Run `ckptctl WORDS` on a terminal of its own; return (exit code, all that it showed)."""
    mine, theirs = pty.openpty()
    os.write(mine, typed.encode())
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptctl", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CKPTD_ENDPOINT": endpoint,
             "NO_COLOR": "1", "COLUMNS": "200", **env},
        stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(mine, 65_536):
            shown += data
    except OSError:  # EIO: nobody holds the other side any more
        pass
    os.close(mine)
    return process.wait(50), shown.decode().replace("\r\n", "\n")
