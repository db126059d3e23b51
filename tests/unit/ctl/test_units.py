import time

import pytest

from ckptctl import units
from ckptd.protocol.errors import BadRequest


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("5m", 300), ("1h30m", 5400), ("3d", 259_200), ("250ms", 0.25),
     ("1.5h", 5400), (2, 2), ("0", 0)],
)  # fmt: skip
def test_durations_are_read(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "5x", "-3", "5m3", "h"])
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        units.parse_duration(text)
    assert "90s 5m 2h" in caught.value.hint


def test_times_are_local_unless_they_say_otherwise() -> None:
    at_s = 1_795_190_400
    local = time.strftime("%Y-%m-%dT%H:%M", time.localtime(at_s))
    assert units.parse_time(local) == at_s * units.SECOND_NS
    assert units.parse_time("2026-11-20T18:00Z") == 1_795_197_600 * units.SECOND_NS
    assert units.parse_time("+3h", now_s=100.0) == 10_900 * units.SECOND_NS


def test_a_clock_time_that_is_past_today_means_tomorrow() -> None:
    now_s = time.mktime((2026, 11, 20, 18, 30, 0, 0, 0, -1))
    assert units.parse_time("18:31", now_s) == int(now_s + 60) * units.SECOND_NS
    tomorrow = time.mktime((2026, 11, 21, 18, 0, 0, 0, 0, -1))
    assert units.parse_time("18:00", now_s) == int(tomorrow) * units.SECOND_NS


@pytest.mark.parametrize("text", ["tomorrow", "25:99", "2026-13-01", "+x"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        units.parse_time(text)


def test_sizes_are_powers_of_two() -> None:
    assert units.parse_size("2G") == 2 << 30
    assert units.parse_size("1.5GiB") == 3 << 29
    assert units.parse_size("4096") == 4096
    with pytest.raises(BadRequest):
        units.parse_size("2X")


def test_signals_have_names_and_numbers() -> None:
    assert units.parse_signal("USR1") == units.parse_signal("sigusr1") == units.parse_signal(10)
    with pytest.raises(BadRequest, match="no such signal") as caught:
        units.parse_signal("TREM")
    assert caught.value.hint == "did you mean TERM?"
    with pytest.raises(BadRequest) as caught:
        units.parse_signal("FOO")
    assert caught.value.hint == "examples: TERM USR1 10"


def test_exit_maps_take_single_codes_and_ranges() -> None:
    wanted = {"3": "retry", "65": "fail", "10": "ok", "11": "ok", "12": "ok"}
    assert units.parse_exit_map("3=retry,65=fail,10-12=ok") == wanted
    assert units.parse_exit_map({"3": "retry"}) == {"3": "retry"}
    for bad in ("3", "3=maybe", "300=ok", "a=ok"):
        with pytest.raises(BadRequest):
            units.parse_exit_map(bad)


def test_backoff_has_a_first_delay_and_a_cap() -> None:
    assert units.parse_backoff("5s..10m") == (5, 600)
    assert units.parse_backoff("5s") == (5, None)


def test_durations_are_told_in_two_units() -> None:
    told = [units.duration_text(s) for s in (0.04, 12, 130, 11_100, 187_200)]
    assert told == ["40ms", "12s", "2m10s", "3h05m", "2d04h"]
    assert [units.age_text(s) for s in (5, 200, 7300, 400_000)] == ["5s", "3m", "2h", "4d"]


def test_times_are_told_in_rfc_3339_and_never_is_null() -> None:
    assert units.rfc3339(1_795_197_600_250_000_000) == "2026-11-20T18:00:00.250000Z"
    assert units.rfc3339(0) is None


@pytest.mark.parametrize("text", ["²", "5\x1f²", "³s", "1²"])
def test_signs_that_only_look_like_digits_are_refused_not_a_traceback(text: str) -> None:
    for parse in (units.parse_duration, units.parse_number, units.parse_size, units.parse_signal):
        with pytest.raises(BadRequest):
            parse(text)


def test_a_number_between_odd_blanks_is_read() -> None:
    assert units.parse_number("5\x1f") == 5


def test_a_moment_is_one_that_was(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = time.mktime((2026, 11, 20, 18, 30, 0, 0, 0, -1))
    monkeypatch.setattr(time, "time", lambda: now_s)
    today = time.mktime((2026, 11, 20, 18, 0, 0, 0, 0, -1))
    yesterday = time.mktime((2026, 11, 19, 19, 0, 0, 0, 0, -1))
    assert units.parse_moment("18:00") == int(today) * units.SECOND_NS
    assert units.parse_moment("19:00") == int(yesterday) * units.SECOND_NS
    assert units.parse_moment("2h") == int(now_s - 7200) * units.SECOND_NS
    for later in ("+1h", "2026-11-20T18:31"):
        with pytest.raises(BadRequest, match="yet to come"):
            units.parse_moment(later)
