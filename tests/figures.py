"""What a rig measured, as JSON: written by the run itself, kept in docs/figures/ once published.

Every run writes build/figures/NAME.json. docs/reliability.md shows what `make figures` took over
from there; a test compares the two.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FRESH = ROOT / "build" / "figures"


def begin(name: str) -> None:
    """A run begins: what the one before wrote goes, so that a run that crashes leaves nothing."""
    (FRESH / f"{name}.json").unlink(missing_ok=True)


def write(name: str, figures: Mapping[str, Any], *, command: str) -> Path:
    """Write the figures of one run beside when, where and how it ran; return the file."""
    FRESH.mkdir(parents=True, exist_ok=True)
    about = {
        "command": command,
        "commit": commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    path = FRESH / f"{name}.json"
    path.write_text(json.dumps({**about, **figures}, indent=2) + "\n")
    return path


def commit() -> str:
    """Return the commit, marked with + where the tree has changes that are not in it."""
    said = subprocess.run(
        ("git", "describe", "--always", "--dirty=+", "--abbrev=12"),
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    return said.stdout.strip() or "unknown"
