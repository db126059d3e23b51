"""What is taken down at the end, while the daemon is quiet, and once it is gone."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from tests.daemon_fixture import kill_quietly
from tests.torture.clients import PENDING
from tests.torture.stage import Stage, identity, role
from tests.waiting import until

UNDER_WAY: Final = (*PENDING, "quarantined")
_GONE_S: Final = 20.0
_EXPORTS: Final = 4


def collect(stage: Stage, since: int) -> dict[str, Any]:
    """Return what ckptctl tells of all tasks, no earlier than at that LSN, and who is there."""
    rows = _rows(stage)
    told: dict[str, Any] = {"rows": rows, "checkpoints": _verified(stage, rows)}
    told |= {"forgets": stage.forgets, "since": since}

    def others() -> list[dict[str, Any]]:
        there = [(pid, identity(pid)) for pid in stage.processes()]
        ours = ("daemon", "shim", "parent")
        return [{"pid": pid, **who} for pid, who in there if who and role(who) not in ours]

    try:
        until(lambda: not others(), _GONE_S, every_s=0.1)
    except TimeoutError:
        told["processes"] = others()
    told["files"] = sorted(files(stage.daemon.state))
    told["run_files"] = sorted(files(stage.daemon.run))
    return told


def _rows(stage: Stage) -> list[dict[str, Any]]:
    found = stage.asked("status", "--all")
    rows = found["tasks"] if isinstance(found, dict) else found
    assert isinstance(rows, list)
    return rows


def _verified(stage: Stage, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Read every checkpoint again that there is; return what was wrong, by task."""
    bad: dict[str, str] = {}
    for row in rows:
        place = stage.daemon.state / "tasks" / str(row["id"]) / "ckpt"
        if not place.exists() or not os.listdir(place):
            continue
        done = stage.daemon.ctl("checkpoint", "verify", str(row["id"]), check=False)
        if done.returncode != 0:
            bad[str(row["id"])] = done.stdout + done.stderr
    return bad


def bring_down(stage: Stage, told: dict[str, Any]) -> None:
    """Stop the daemon, take down what is left, verify the log; write it to the evidence."""
    told["exit_code"] = stage.daemon.stop()
    try:
        until(lambda: not list(stage.processes()), _GONE_S, every_s=0.1)
    except TimeoutError:
        left = list(stage.processes())
        told["left"] = [{"pid": pid, **identity(pid)} for pid in left]
        for pid in left:
            kill_quietly(pid)
    done = stage.daemon.ctl("wal", "verify", "--state", str(stage.daemon.state), check=False)
    told["wal"] = {"code": done.returncode, "said": done.stdout + done.stderr}
    told["files_at_rest"] = sorted(files(stage.daemon.state))
    told["batches"] = _exported(stage)
    (stage.evidence / "closing.json").write_text(json.dumps(told, indent=1) + "\n")


def _exported(stage: Stage) -> dict[str, list[dict[str, Any]]]:
    place = stage.root / "batches"
    names = sorted(os.listdir(place)) if place.exists() else []

    def export(name: str) -> list[dict[str, Any]]:
        lines = stage.daemon.ctl("batch", "export", name).stdout.splitlines()
        return [json.loads(line) for line in lines]

    with ThreadPoolExecutor(_EXPORTS) as pool:  # hundreds after a soak
        return dict(zip(names, pool.map(export, names), strict=True))


def files(place: Path) -> Iterator[str]:
    """Yield the path of every file and directory below, from there on."""
    for folder, names, plain in os.walk(place):
        for name in (*names, *plain):
            yield os.path.relpath(os.path.join(folder, name), place)
