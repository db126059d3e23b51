"""docs/reliability.md is true: its table is that of docs/figures, and what it names is there."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests import reliability
from tests.figures import ROOT
from tests.reliability import KEPT, PAGE

TEXT = PAGE.read_text()


def test_the_table_of_figures_is_made_of_the_kept_files() -> None:
    assert reliability.with_table(TEXT) == TEXT, "run: make figures"


def test_every_kept_run_held_all_that_it_promised() -> None:
    runs = {path.stem: reliability.broke(path) for path in KEPT.glob("*.json")}
    assert set(runs) == set(reliability.RIGS)
    assert not any(runs.values()), runs


@pytest.mark.parametrize(
    ("name", "changed", "why"),
    [
        ("states", {"examined": 5}, ["examined"]),
        ("states", {"violations": 1}, ["violations"]),
        ("states", {"commit": "cd74745+"}, ["commit"]),
        ("crashdisk", {"btrfs_states": 0}, ["btrfs_states"]),
        ("torture", {"seconds": 12.0}, ["seconds"]),
        ("mutants", {"part": "3/8"}, ["part"]),
        ("golden", {"skipped": 1}, ["skipped"]),
        ("crashdisk", {"skipped": {"xfs": "needs mkfs.xfs"}}, ["skipped"]),
    ],
)
def test_a_run_that_did_too_little_or_did_not_hold_is_not_published(
    tmp_path: Path, name: str, changed: dict[str, Any], why: list[str]
) -> None:
    found = json.loads((KEPT / f"{name}.json").read_text()) | changed
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(found))
    assert reliability.broke(path) == why


def test_the_page_tells_of_each_rig_once() -> None:
    _, _, below = TEXT.partition("## The rigs")
    rigs, _, _ = below.partition("\n## ")
    assert re.findall(r"^\| (\w+) \| `", rigs, re.MULTILINE) == list(reliability.RIGS)


def test_every_file_and_target_that_the_page_names_is_there() -> None:
    paths = set(re.findall(r"`((?:tests|ckptd|docs)/[\w/.]+)", TEXT))
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path.rstrip(".")).exists()]
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`make ([a-z-]+)", TEXT))
    assert targets
    assert not [name for name in targets if f"\n{name}:" not in makefile]


def test_every_test_that_the_page_names_is_there() -> None:
    lines = [shlex.split(line) for line in re.findall(r"`pytest ([^`]+)`", TEXT)]
    assert len(lines) > 40
    for place, *words in lines:
        files = [ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("test_*.py")
        names = [name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())]
        wanted = words[words.index("-k") + 1].split(" or ") if "-k" in words else [""]
        missing = [part for part in wanted if not any(part in name for name in names)]
        assert names, place
        assert not missing, (place, missing)
