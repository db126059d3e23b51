"""A task's directory as the daemon prepares it, and `ckpt` run in it as the task would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ckptd.storage import blobs
from ckptd.storage.facts import Facts, read_facts
from ckptd.storage.journal import Fact, Journal

ROOT = Path(__file__).resolve().parent.parent
TASK = 12
CKPT = [sys.executable, "-c", "from ckptd.sdk.ckpt import main; main()"]


class TaskWorld:
    """One task; `begin` starts its next attempt."""

    def __init__(self, folder: Path) -> None:
        (folder / "tasks").mkdir()
        self.dir = str(folder / "tasks" / str(TASK))
        self.uid = os.getuid()
        self.boot_id = blobs.this_boot_id()
        self.attempt = 0
        self.begin()

    def begin(self, *, fresh: bool = False) -> None:
        self.attempt += 1
        blobs.prepare(self.dir, self.attempt, self.uid, os.getgid(), fresh=fresh)

    def path(self, *parts: str) -> Path:
        return Path(self.dir, *parts)

    def publish(self, number: int | str, **files: str) -> Path:
        """Publish by level 1: fill the stage, rename it."""
        stage, target = self.path("stage"), self.path("ckpt", str(number))
        for name, text in files.items():
            (stage / name).write_text(text)
        stage.rename(target)
        stage.mkdir()
        return target

    def seal(self) -> list[str]:
        return [one.warning for one in blobs.seal_pending(self.dir, self.uid, self.boot_id)]

    def newest(self) -> blobs.Found:
        return blobs.newest_valid(self.dir, self.uid, self.boot_id)

    def mark(self) -> blobs.Mark:
        return blobs.mark(self.dir, self.attempt, self.uid, self.boot_id)

    def journal(self) -> Journal:
        return Journal(self.dir, TASK, self.attempt, epoch=1)

    def record(self, *facts: Fact) -> int:
        journal = self.journal()
        try:
            return journal.append(list(facts))
        finally:
            journal.close()

    def facts(self) -> Facts:
        return read_facts(self.dir, TASK, self.uid, self.attempt)

    def journal_path(self, attempt: int = 0) -> Path:
        return self.path("journal", f"{attempt or self.attempt:06d}.j")

    def environ(self, **extra: str) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CKPTD_DIR": self.dir,
            "CKPTD_TASK_ID": str(TASK),
            "CKPTD_ATTEMPT": str(self.attempt),
            "CKPTD_EPOCH": "1",
            "CKPTD_RESUME": "1" if self.attempt > 1 else "0",
            "CKPTD_CONTROL": f"{self.dir}/control.json",
            **extra,
        }

    def ckpt(self, *words: str, stdin: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*CKPT, *words],
            env=self.environ(**extra),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    def pipe(self, *requests: dict[str, Any] | str) -> list[dict[str, Any]]:
        """Send requests at once, end the input, return the answers."""
        lines = [one if isinstance(one, str) else json.dumps(one) for one in requests]
        done = self.ckpt("pipe", stdin="".join(line + "\n" for line in lines))
        return [json.loads(line) for line in done.stdout.splitlines()]
