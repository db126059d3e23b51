"""Run an example in a process group of its own, SIGKILL it in the middle of its work, go on.

A kill strikes after a random amount of work (what `work_done` counts), never after a time, so that
it hits the middle on any machine. `CKPTD_SEED` repeats a run; it is printed.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.task_world import ROOT
from tests.waiting import let_pass, until

ENDS_S = 50.0


def _has_perl() -> bool:
    """Tell whether Perl is here with its core; some systems have its interpreter alone."""
    if not shutil.which("perl"):
        return False
    command = ["perl", "-MJSON::PP", "-MDigest::SHA", "-e1"]
    return not subprocess.run(command, check=False, capture_output=True).returncode


needs_perl = pytest.mark.skipif(not _has_perl(), reason="needs perl with its core modules")


def seeded() -> random.Random:
    """Return a source of randomness whose seed is printed."""
    seed = int(os.environ.get("CKPTD_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"CKPTD_SEED={seed}")
    return random.Random(seed)


class Example:
    """One way of starting an example; `said` is what it printed the last time."""

    def __init__(
        self,
        name: str,
        *args: object,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.command = [sys.executable, str(ROOT / "examples" / name), *map(str, args)]
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        self.cwd = cwd
        self.said = ""

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command,
            env=self.env,
            cwd=self.cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def run(self, code: int = 0) -> str:
        """Run it to its end; return what it printed, errors behind."""
        with self.start() as process:
            self.said = "".join(process.communicate(timeout=ENDS_S))
        assert process.returncode == code, f"gave {process.returncode}, not {code}\n{self.said}"
        return self.said

    def kill_in_the_middle(
        self, chance: random.Random, work_done: Callable[[], int], most: int = 4
    ) -> bool:
        """Start it, kill it after 1 to `most` pieces of work; return whether it died of that."""
        wanted = work_done() + chance.randint(1, most)
        with self.start() as process:
            until(lambda: work_done() >= wanted or process.poll() is not None, ENDS_S, 0.001)
            let_pass(chance.uniform(0, 0.02))
            os.killpg(process.pid, signal.SIGKILL)
            self.said = "".join(process.communicate(timeout=ENDS_S))
        assert process.returncode in {0, -signal.SIGKILL}, self.said
        return process.returncode != 0


def checkpoints(task_dir: Path) -> int:
    """Return the number of the newest checkpoint."""
    folder = task_dir / "ckpt"
    names = os.listdir(folder) if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)
