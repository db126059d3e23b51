"""How many at once, and when: what a limit does, and what success brings back."""

from pathlib import Path

import pytest

from ckptd.batch import place
from ckptd.batch.pace import TRANSIENT_S, TRANSIENT_S_MAX, Pace
from ckptd.batch.spec import Config, Knobs, parse_rate
from ckptd.sdk.rate import Bucket

NOW_S = 1_000.0


@pytest.fixture(autouse=True)
def scopes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CKPTD_SCOPES_DIR", str(tmp_path / "scopes"))
    return tmp_path / "scopes"


def pace_of(**knobs: object) -> Pace:
    return Pace(place.new_batch("b", Config(argv=["true"]), Knobs(jobs=8, **knobs)), NOW_S)  # type: ignore[arg-type]


def test_a_limit_halves_once_for_each_wait_and_never_below_one() -> None:
    pace = pace_of()
    limits = []
    now_s = NOW_S
    for _ in range(5):
        for _ in range(3):  # all that was in flight meets it, too
            pace.hit(10.0, "", now_s)
        limits.append(pace.limit)
        now_s += 20.0

    assert limits == [4, 2, 1, 1, 1]


def test_one_more_may_run_after_each_window_of_successes() -> None:
    pace = pace_of()
    pace.hit(1.0, "", NOW_S)
    pace.hit(1.0, "", NOW_S + 5)
    assert pace.limit == 2
    successes = 0
    while pace.limit < 8:
        pace.succeeded()
        successes += 1

    assert successes == 2 + 3 + 4 + 5 + 6 + 7
    pace.succeeded()
    assert pace.limit == 8


def test_a_wait_that_nobody_named_doubles_until_a_success() -> None:
    pace = pace_of()
    waits = [pace.hit(0.0, "", NOW_S + 100 * n) for n in range(9)]

    assert TRANSIENT_S <= waits[0] <= 1.1 * TRANSIENT_S
    assert waits[0] < waits[1] < waits[2]
    assert TRANSIENT_S_MAX <= waits[-1] <= 1.1 * TRANSIENT_S_MAX
    pace.succeeded()
    assert pace.hit(0.0, "", NOW_S + 10_000) <= 1.1 * TRANSIENT_S


def test_a_limit_is_that_of_the_scope_and_outlives_the_process() -> None:
    first = pace_of(scope="api")
    first.hit(300.0, "elsewhere", NOW_S)

    assert pace_of(scope="api").wait_s(NOW_S) > 290
    assert Bucket("elsewhere").wait_s() > 290
    assert pace_of().wait_s(NOW_S) == 0.0


def test_a_scope_that_an_item_made_up_harms_nobody() -> None:
    assert pace_of().hit(5.0, "../../etc", NOW_S) >= 5.0


def test_the_rates_own_spacing_is_no_limit() -> None:
    pace = pace_of(rate="1/min")

    assert pace.take(NOW_S) == 0.0
    assert pace.take(NOW_S) > 50
    assert not pace.is_limited(NOW_S)
    pace.hit(5.0, "", NOW_S)
    assert pace.is_limited(NOW_S)


@pytest.mark.parametrize(
    ("text", "per_s"),
    [("10/s", 10.0), ("60/min", 1.0), ("100/5min", 1 / 3), ("1.5/s", 1.5), ("3600/hour", 1.0)],
)
def test_a_rate_is_read_as_it_is_said(text: str, per_s: float) -> None:
    assert parse_rate(text) == pytest.approx(per_s)
