"""The directories of a batch's items, where items can leave anything."""

import os
from pathlib import Path

from ckptd.batch.itemdir import sweep


def test_a_name_that_only_looks_like_a_number_is_swept_and_ends_no_runner(tmp_path: Path) -> None:
    items = tmp_path / "items"
    for name in ("7", "8", "²", "x"):
        (items / name).mkdir(parents=True)

    sweep(str(tmp_path), {8})

    assert os.listdir(items) == ["8"]
