"""examples/train.py: killed three times, the loss curve is the same to the last bit."""

import json
import os
import re
from pathlib import Path

import pytest

from ckptd.storage.facts import read_facts
from tests.examples.killing import Example, checkpoints, seeded

pytest.importorskip("numpy", reason="needs numpy: pip install '.[dev]'")
EPOCHS = 150


class Training:
    """The example in a directory of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.task = folder / "train.task"
        self.example = Example("train.py", EPOCHS, cwd=folder)

    def saves(self) -> int:
        return checkpoints(self.task)

    def saved_curve(self) -> list[float]:
        """Return the losses as the last checkpoint has them."""
        manifest = self.task / "ckpt" / f"{self.saves():08d}" / "MANIFEST.json"
        losses: list[float] = json.loads(manifest.read_text())["state"]["losses"]
        return losses

    def curve(self) -> list[float]:
        """Return the result: the losses, each with all of its digits."""
        losses: list[float] = read_facts(str(self.task), 0, os.getuid(), 99).result["value"]
        return losses

    def epochs(self) -> list[int]:
        """Return the epochs that the last attempt computed."""
        found = re.findall(r"^epoch (\d+):", self.example.said, re.MULTILINE)
        return [int(number) for number in found]


def test_three_crashes_leave_no_trace_in_the_loss_curve(tmp_path: Path) -> None:
    chance = seeded()
    whole, killed = Training(tmp_path / "whole"), Training(tmp_path / "killed")
    whole.example.run()

    goes_on_at = 1
    for _ in range(3):
        assert killed.example.kill_in_the_middle(chance, killed.saves, most=8)
        assert killed.epochs()[0] == goes_on_at  # what was saved is not computed again
        goes_on_at = len(killed.saved_curve()) + 1
        assert goes_on_at > 1
    killed.example.run()

    assert killed.epochs() == list(range(goes_on_at, EPOCHS + 1))
    assert len(whole.curve()) == EPOCHS
    assert killed.curve() == whole.curve()
    assert whole.curve()[-1] < whole.curve()[0] / 10  # and it learned something
