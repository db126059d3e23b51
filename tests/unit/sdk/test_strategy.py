"""When to save: the arithmetic of the four strategies, against the table it was designed by."""

import math

import pytest

from ckptd.sdk.strategy import (
    FIRST_SAVE_S,
    Automatic,
    Manual,
    Pace,
    Progress,
    Time,
    daly_s,
    numbers,
    pace_of,
)

HOUR_S, DAY_S = 3600.0, 86_400.0


@pytest.mark.parametrize(
    ("cost_s", "mtbf_s", "wanted_s"),
    [
        (0.005, HOUR_S, 6.0),
        (0.05, HOUR_S, 18.9),
        (5.0, HOUR_S, 186.0),
        (60.0, HOUR_S, 618.0),
        (600.0, HOUR_S, 1698.0),
        (0.05, DAY_S, 93.0),
        (60.0, DAY_S, 3180.0),
    ],
)
def test_the_interval_is_dalys(cost_s: float, mtbf_s: float, wanted_s: float) -> None:
    assert daly_s(cost_s, mtbf_s) == pytest.approx(wanted_s, rel=0.006)


def test_where_a_save_costs_more_than_a_life_the_interval_is_the_life() -> None:
    assert daly_s(100.0, 50.0) == daly_s(200.0, 50.0) == 50.0


def pace(cost_s: float = 0.0, *, saves: int = 1, interval_s: float = 0.0) -> Pace:
    made = Pace()
    made.saves, made.cost_s, made.interval_s = saves, cost_s, interval_s
    return made


def test_automatic_saves_early_once_so_that_the_cost_is_known() -> None:
    fresh = pace(saves=0)
    assert not Automatic().is_due(fresh, FIRST_SAVE_S - 0.01)
    assert Automatic().is_due(fresh, FIRST_SAVE_S)


def test_automatic_keeps_within_its_budget() -> None:
    assert Automatic(budget=0.01).interval_s(pace(2.0), 0.0) >= 2.0 / 0.01


def test_automatic_never_risks_more_than_its_maximum_loss_and_says_where_that_costs_more() -> None:
    strategy = Automatic(budget=0.01, max_loss=60)
    assert strategy.interval_s(pace(10.0), 0.0) == 60
    assert strategy.warning(pace(10.0))
    assert not strategy.warning(pace(0.5))


def test_automatic_changes_its_interval_by_no_more_than_half_from_save_to_save() -> None:
    assert Automatic().interval_s(pace(0.0001, interval_s=90.0), 0.0) == pytest.approx(60.0)
    assert Automatic().interval_s(pace(0.05, interval_s=10.0), 0.0) == pytest.approx(15.0)


def test_a_save_that_became_dear_is_made_seldom_at_once() -> None:
    assert Automatic().interval_s(pace(2.9, interval_s=10.0), 0.0) == pytest.approx(290.0)


def test_automatic_takes_the_end_of_a_step_after_half_of_the_interval() -> None:
    known = pace(0.5)
    half_s = Automatic().interval_s(known, 0.0) / 2
    assert not Automatic().is_worth_at_step_end(known, half_s * 0.9)
    assert Automatic().is_worth_at_step_end(known, half_s * 1.1)
    assert not Time(10).is_worth_at_step_end(known, 9.0)


def test_interruptions_shorten_the_interval() -> None:
    calm, rough = pace(0.1), pace(0.1)
    rough.interruptions = 500
    assert Automatic(budget=1).interval_s(rough, 0.0) < Automatic(budget=1).interval_s(calm, 0.0)


def test_time_goes_by_the_clock_alone() -> None:
    known = pace()
    known.saved_at_s = 100.0
    assert [Time(30).is_due(known, at_s) for at_s in (129.9, 130.0)] == [False, True]
    assert Time(0).is_due(known, 100.0)


def test_progress_goes_by_share_or_items() -> None:
    known = pace()
    known.done_share = 0.049
    assert not Progress().is_due(known, 0.0)
    known.done_share = 0.05
    assert Progress().is_due(known, 0.0)
    known.done_share, known.items_since = 0.0, 3
    assert [Progress(items=n).is_due(known, 0.0) for n in (3, 4, 0)] == [True, False, False]


def test_manual_is_never_due() -> None:
    assert not Manual().is_due(pace(), math.inf)


def test_the_cost_of_a_save_is_smoothed_and_the_first_one_counts_whole() -> None:
    known = Pace()
    known.saved(10.0, 1.0, 500)
    assert (known.cost_s, known.saves, known.bytes) == (1.0, 1, 500)
    known.saved(20.0, 2.0, 600)
    assert known.cost_s == pytest.approx(1.3)
    assert (known.block_s, known.saved_at_s) == (3.0, 20.0)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Time(-1), "interval is -1"),
        (lambda: Time(math.inf), "interval is inf"),
        (lambda: Progress(0), "delta is 0"),
        (lambda: Progress(1.5), r"delta is 1\.5"),
        (lambda: Progress(items=-1), "items is -1"),
        (lambda: Automatic(0), "budget is 0"),
        (lambda: Automatic(max_loss=0.5), r"max_loss is 0\.5"),
        (lambda: Automatic(max_loss=math.nan), "max_loss is nan"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_name(make: object, told: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=told):
        make()


def test_what_a_checkpoint_says_is_gone_on_from() -> None:
    known = Pace(3)
    known.saved(10.0, 0.5, 100)
    told = numbers(Automatic(), known, 12.0)

    again = pace_of(told, 4)

    assert (again.cost_s, again.block_s, again.wall_before_s) == (0.5, 0.5, 12.0)
    assert again.interruptions == 4
    assert told["strategy"] == "automatic"


@pytest.mark.parametrize(
    "told", [None, [], {"cost_s": "x", "saves": -1, "wall_s": math.nan}, {"block_s": 1e300}]
)
def test_hostile_numbers_are_as_none(told: object) -> None:
    found = pace_of(told, 0)
    assert (found.cost_s, found.saves, found.wall_before_s, found.block_s) == (0, 0, 0, 0)


def test_a_maximum_loss_that_breaks_the_budget_is_said() -> None:
    pace = Pace()
    pace.saved(10.0, 30.0, 0)
    assert Automatic(budget=0.01, max_loss=300).warning(pace) == (
        "a save takes 30.0 s: one every 300 s (max_loss) costs 10.0% of the time, "
        "the budget is 1.0%"
    )
    assert not Automatic(budget=0.2, max_loss=300).warning(pace)
    assert not Time(1).warning(pace)
