"""docs/reliability.md is true: its table is that of docs/figures, and what it names is there."""

import re

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


def test_every_file_and_target_that_the_page_names_is_there() -> None:
    paths = set(re.findall(r"`((?:tests|ckptd|docs)/[\w/.]+)", TEXT))
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path.rstrip(".")).exists()]
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`make ([a-z-]+)", TEXT))
    assert targets
    assert not [name for name in targets if f"\n{name}:" not in makefile]
