"""Journals and checkpoints of every format ever released stay readable, byte for byte as kept."""

import os
import shutil
from pathlib import Path

from ckptd.storage import blobs
from ckptd.storage.facts import read_facts

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "task_format_1" / "12"


def test_a_task_of_format_1_is_still_read(tmp_path: Path) -> None:
    task_dir = str(tmp_path / "12")
    shutil.copytree(GOLDEN, task_dir)

    found = read_facts(task_dir, 12, os.getuid(), 2)
    newest = blobs.newest_valid(task_dir, os.getuid(), "another boot")
    mark = blobs.mark(task_dir, 2, os.getuid(), "another boot")

    assert found.steps["fetch"]["result"] == {"rows": 7}
    assert list(found.started) == ["fold"]
    assert found.values == {"k": 2}
    assert (found.items["a"]["status"], found.items["a"]["attempt"]) == ("pass", 2)
    assert (found.problem, found.count) == ("", 11)
    assert (newest.seq, newest.warning, newest.problem) == (1, "", "")
    assert (mark.checkpoint, mark.cursor) == (1, "7c45afc4fe584a536485284fc3f175e1")
