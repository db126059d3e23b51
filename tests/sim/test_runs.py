"""A run that proves nothing does not pass, and whatever ends a life is a violation of its seed."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from tests import figures
from tests.sim import __main__ as lives
from tests.sim import states
from tests.sim.clients import Person
from tests.sim.faults import Killed
from tests.sim.life import Life
from tests.sim.minima import FAULTS, WORK, lacking, least
from tests.sim.states import LogLife

FOR_EVER_S = float("inf")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where figures are written meanwhile."""
    monkeypatch.setattr(figures, "FRESH", tmp_path)
    return tmp_path


def test_a_run_in_which_nobody_asks_for_anything_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Person, "live", lambda person: setattr(person, "has_left", True))
    found = lives.many(1, 12, FOR_EVER_S)
    assert found["broken_seeds"] == []
    assert found["violations"]
    assert "VIOLATION: 0 accepted, 32 at least were to be expected" in capsys.readouterr().out


def test_a_run_of_no_life_does_not_pass() -> None:
    assert lives.many(1, 5, 0.0)["violations"] == 1


@pytest.mark.parametrize("name", [*WORK, *FAULTS])
def test_each_kind_of_work_and_fault_has_a_minimum_that_grows_with_the_lives(name: str) -> None:
    enough = {**least(233), "lives": 233}
    enough["eio_write"] = enough["disk_errors"]
    assert lacking(enough) == []
    assert least(233)[name] > least(100)[name] >= 0
    if name != "disk_errors":  # a sum of others
        assert f"0 {name}, " in " ".join(lacking({**enough, name: 0}))


def _crash(*_: object) -> str:
    raise KeyError("what nobody expected")


def _struck(*_: object) -> str:
    raise Killed


@pytest.mark.parametrize("end", [_crash, _struck])
def test_a_crash_is_a_violation_of_its_seed_and_the_run_goes_on(
    end: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Life.run
    monkeypatch.setattr(Life, "run", lambda one: end(one) if one.seed == 2 else whole(one))  # type: ignore[operator]
    found = lives.many(1, 3, FOR_EVER_S)
    assert (found["lives"], found["broken_seeds"]) == (3, [2])
    told = capsys.readouterr().out
    assert "seed 2: VIOLATION: it crashed:" in told
    assert "make sim SEED=2" in told
    assert "line " in told, "where it crashed"


def test_a_life_that_cannot_even_begin_is_told_with_its_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Life, "_person", _crash)
    assert lives.many(7, 2, FOR_EVER_S)["broken_seeds"] == [7, 8]
    assert lives.main(["--seed", "7"]) == 1
    assert "what nobody expected" in capsys.readouterr().out


def test_a_crash_in_the_lives_of_the_log_is_told_and_written(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LogLife, "run", _crash)
    assert states.main(["--lives", "2", "--seed", "4"]) == 1
    written = json.loads((fresh / "states.json").read_text())
    assert written["violations"] >= 2
    assert written["broken_seeds"] == [4, 5]
    assert "again: python -m tests.sim.states --lives 1 --seed 5" in capsys.readouterr().out


@pytest.mark.parametrize(("module", "name"), [(lives, "sim"), (states, "states")])
def test_a_run_that_is_torn_down_leaves_no_figures_of_an_older_one(
    module: object, name: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fresh / f"{name}.json").write_text("{}")

    def torn_down(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(module, "many" if name == "sim" else "run", torn_down)
    with pytest.raises(SystemExit):
        module.main(["--lives", "1"])  # type: ignore[attr-defined]
    assert not list(fresh.iterdir())


def test_every_rig_takes_older_figures_away_before_it_runs() -> None:
    tests = figures.ROOT / "tests"
    mains = [path.read_text() for path in tests.glob("*/__main__.py")]
    texts = [*mains, (tests / "sim" / "states.py").read_text()]
    assert len([text for text in texts if "figures.begin(" in text]) == len(texts) == 7


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({}, "--seed 3"),
        ({"states": 5_000}, "--seed 3 --states 5000"),
        ({"lives": 9}, "--seed 3 --lives 7"),
        ({"seconds": 2.5}, "--seed 3 --lives 7"),
        ({"states": 5_000, "seconds": 1.0}, "--seed 3 --states 5000 --lives 7"),
    ],
)
def test_the_command_that_is_kept_brings_the_run_back(asked: dict[str, float], line: str) -> None:
    chosen = Namespace(
        **{"seed": 3, "states": states.STATES, "lives": states.LIVES, "seconds": FOR_EVER_S} | asked
    )
    assert states.command(chosen, 7) == f"python -m tests.sim.states {line}"
