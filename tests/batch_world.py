"""A batch of a test: its own directories, `prepare` and `run` as real processes, its results."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ckptd.batch import ledger, place
from ckptd.storage.facts import Facts

ROOT = Path(__file__).resolve().parent.parent
BATCH = [sys.executable, "-m", "ckptd.batch"]


class BatchWorld:
    """One batch named `b`, with a working directory `work` that functions are imported from."""

    def __init__(self, folder: Path, name: str = "b") -> None:
        self.folder = folder
        self.name = name
        self.work = folder / "work"
        self.work.mkdir(exist_ok=True)
        self.dir = folder / "batches" / name

    @property
    def env(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("CKPTD_")}
        return kept | {
            "PYTHONPATH": str(ROOT),
            "CKPTD_BATCH_DIR": str(self.folder / "batches"),
            "CKPTD_SCOPES_DIR": str(self.folder / "scopes"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def module(self, text: str, name: str = "items") -> None:
        (self.work / f"{name}.py").write_text(text)

    def call(self, *words: str, stdin: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*BATCH, *words],
            cwd=self.work,
            env=self.env | extra,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
        )

    def prepare(self, *flags: str, items: Any = None, code: int = 0, **spec: Any) -> dict[str, Any]:
        """Prepare; `items` is a list given in the spec, or a source."""
        if isinstance(items, list):
            items = {"from": "lines", "lines": items}
        given = {**spec, **({"items": items} if items is not None else {})}
        done = self.call("prepare", self.name, "--spec", "-", *flags, stdin=json.dumps(given))
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout) if code == 0 else {"said": done.stderr}

    def run(
        self, *flags: str, code: int | None = 0, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        done = self.call("run", str(self.dir), *flags, **extra)
        assert code is None or done.returncode == code, done.stderr
        return done

    def start(self, *flags: str, **extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*BATCH, "run", str(self.dir), *flags],
            cwd=self.work,
            env=self.env | extra,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def facts(self) -> Facts:
        return ledger.read(str(self.dir), place.load(str(self.dir)))

    def results(self) -> dict[str, Any]:
        return self.facts().items

    def statuses(self) -> dict[str, str]:
        return {key: fact["status"] for key, fact in self.results().items()}

    def events(self) -> list[str]:
        return [str(run["event"]) for run in self.facts().runs]


def children_of(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def kill_with_children(process: subprocess.Popen[str]) -> None:
    """SIGKILL a runner and, right after it, whatever it had started, by pid."""
    children = children_of(process.pid)
    process.kill()
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate(timeout=20)
