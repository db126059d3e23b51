"""The fuzz targets on what is known: valid inputs, the kept corpus, and damage by chance."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.__main__ import shared_s, summed
from tests.fuzz.chance import hunt
from tests.fuzz.every import CORPUS, ROOT, TARGETS, kept, tidy
from tests.fuzz.target import Script, Target, damaged

CORPUS_BYTES_MAX = 400 << 10
EACH = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


@pytest.fixture(autouse=True, scope="module")
def _tidied() -> Iterator[None]:
    yield
    tidy()


@EACH
def test_valid_inputs_and_every_input_of_the_kept_corpus_are_borne(target: Target) -> None:
    for data in [*target.seeds(), *kept(target)]:
        target.run(data)


@EACH
def test_damage_by_chance_is_borne(target: Target) -> None:
    seeds = st.sampled_from([*target.seeds(), *kept(target)])

    @given(seeds, st.binary(max_size=40), st.booleans())
    @settings(max_examples=40, deadline=None, database=None)
    def property_of_target(seed: bytes, script: bytes, is_foreign: bool) -> None:  # noqa: FBT001
        data = script if is_foreign else damaged(seed, Script(script))
        target.run(data[: target.input_bytes_max])

    property_of_target()


def test_the_kept_corpus_is_small_and_of_targets_that_are_there() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} <= TARGETS.keys()
    assert sum(path.stat().st_size for path in files) < CORPUS_BYTES_MAX


def test_the_time_goes_by_weight_and_the_target_with_the_fewest_inputs_is_told() -> None:
    shares_s = shared_s(list(TARGETS.values()), 25)
    assert shares_s["pipe"] > 2 * shares_s["config"] > 4 * shares_s["frame"] > 0
    assert abs(sum(shares_s.values()) - 25 * len(TARGETS)) < len(TARGETS)
    assert shared_s([TARGETS["pipe"]], 25) == {"pipe": 25}

    rows = {name: {"executions": at + 5, "finds": 0} for at, name in enumerate(("wire", "pipe"))}
    found = summed(rows, 1)
    assert (found["inputs_min"], found["inputs_min_target"]) == (5, "wire")


def _fails_on_zero(data: bytes) -> None:
    if b"\0" in data:
        raise KeyError("a seeded bug")


def test_a_hunt_by_chance_finds_a_seeded_bug_and_says_by_which_input() -> None:
    found = hunt(Target("seeded", _fails_on_zero, lambda: [b"abcdefgh"]), 1, 20.0, 10_000)
    (find,) = found.finds
    assert b"\0" in find.data
    assert isinstance(find.error, KeyError)


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="needs atheris: make fuzz installs it"
)
def test_coverage_leads_to_a_bug_that_chance_does_not_reach(tmp_path: Path) -> None:
    options = ["-runs=2000000", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    command = [sys.executable, "-m", "tests.fuzz.guided", "canary", *options]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, timeout=120)
    assert b"the canary sings" in done.stdout + done.stderr
    (find,) = tmp_path.glob("crash-*")
    assert find.read_bytes().startswith(b"ckptd")
