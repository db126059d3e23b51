"""The rig itself: every mistake can still be made, and whoever does not notice one is told."""

import ast
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants.mutant import ROOT, Mutant, Stale, catalog
from tests.mutants.part import BEGIN_S, EACH_S, PAGE, Part, count_within, promised
from tests.mutants.trial import SECONDS_MAX, Verdict, ask, judged

ALL = catalog()
SUM = "def add(a, b):\n    return a + b\n"
TESTS = """
from sums import add

def test_sums_add_up():
    assert add(2, 3) == 5
"""
WRONG = Mutant("wrong", "sums.py", "a - b", "sums add up", ("t.py::test_sums_add_up",), "a + b")


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.id)
def test_every_mistake_can_still_be_made(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    assert mutant.applied(text) != text


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.id)
def test_every_killer_is_there(mutant: Mutant) -> None:
    assert mutant.killers
    for killer in mutant.killers:
        file, _, name = killer.partition("::")
        found = {
            node.name
            for node in ast.parse((ROOT / file).read_text()).body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert name.partition("[")[0] in found, killer


def test_the_mistakes_are_as_many_as_promised_and_each_breaks_something() -> None:
    assert len(ALL) >= 30
    assert all(mutant.breaks for mutant in ALL)


@pytest.mark.parametrize("count", [1, 2, 7, 30, len(ALL) + 1])
def test_every_mistake_is_in_exactly_one_part(count: int) -> None:
    parts = [Part(number, count).of(ALL) for number in range(1, count + 1)]
    assert sorted(one.id for part in parts for one in part) == sorted(one.id for one in ALL)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_commits_draw_every_part_and_each_commit_always_the_same() -> None:
    commits = [hashlib.sha1(str(number).encode()).hexdigest() for number in range(100)]
    assert {Part.drawn(one, 8).number for one in commits} == set(range(1, 9))
    assert Part.drawn("f1a9885", 8) == Part.drawn("f1a9885", 8) == Part.parsed("6/8")


@pytest.mark.parametrize("text", ["0/8", "9/8", "3", "a/b", "-1/-1"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"part|unpack|literal"):
        Part.parsed(text)


def test_the_more_time_is_left_the_larger_is_the_part_and_it_fits() -> None:
    assert count_within(60, len(ALL), 14) == 0
    for seconds in (150, 300, 600, 900):
        count = count_within(seconds, len(ALL), 14)
        largest = len(Part(1, count).of(ALL))
        assert BEGIN_S + EACH_S * (14 + largest) <= seconds
    assert count_within(10_000, len(ALL), 14) == 1


def test_the_mistakes_that_the_page_promises_to_be_noticed_are_in_the_catalog() -> None:
    ids = promised(PAGE.read_text())
    assert len(ids) == 14
    assert set(ids) <= {one.id for one in ALL}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small project with two tests, and the plugin that the rig brings along."""
    (tmp_path / "sums.py").write_text(SUM)
    (tmp_path / "t.py").write_text(TESTS)
    plugin = tmp_path / "tests" / "mutants"
    plugin.mkdir(parents=True)
    (plugin / "unshrunk.py").write_text((Path(__file__).parent / "unshrunk.py").read_text())
    return tmp_path


def verdict_on(mutant: Mutant, tree: Path) -> Verdict:
    mutant.apply(tree)
    return ask(mutant.killers, tree, tree / "room").verdict


def test_a_mistake_that_a_test_notices_is_killed(tree: Path) -> None:
    assert verdict_on(WRONG, tree) is Verdict.KILLED


def test_a_mistake_that_changes_nothing_is_told_as_survived(tree: Path) -> None:
    assert verdict_on(replace(WRONG, new="b + a"), tree) is Verdict.SURVIVED


@pytest.mark.parametrize(
    ("code", "output", "verdict"),
    [
        (0, "..", Verdict.SURVIVED),
        (0, ".s\nSKIPPED [1] t.py:3: needs root", Verdict.UNSEEN),
        (1, "FAILED t.py::test_x[a b] - assert 1 == 2", Verdict.KILLED),
        (1, "ERROR t.py::test_x - AssertionError: daemon ended with 1", Verdict.KILLED),
        (1, "FAILED t.py::test_x - NameError: name 'B' is not defined", Verdict.SLIPPED),
        (1, f"FAILED t.py::test_x - Failed: Timeout (>{SECONDS_MAX}s)", Verdict.HUNG),
        (2, "ERROR t.py - ImportError: canary", Verdict.SLIPPED),
        (4, "no such test", Verdict.SLIPPED),
    ],
)
def test_what_pytest_says_is_understood(code: int, output: str, verdict: Verdict) -> None:
    assert judged(code, output)[0] is verdict


def test_a_mistake_whose_place_has_changed_must_be_mended() -> None:
    for text in ("return 7", "a + b\na + b\n"):
        with pytest.raises(Stale, match="mend it"):
            WRONG.applied(text)
    with pytest.raises(Stale, match="no Python"):
        replace(WRONG, new="a +").applied(SUM)
