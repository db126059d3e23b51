"""Durable rates: both forms of Retry-After, and buckets that processes share."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckptd.sdk.rate import WAIT_S_MAX, Bucket, parse_retry_after
from tests.waiting import let_pass, until

ROOT = Path(__file__).resolve().parents[3]
NOW_S = 1_792_567_680.0  # Wed, 21 Oct 2026 07:28:00 GMT

TAKER = """
import sys, time
from ckptd.sdk.rate import Bucket
bucket, end = Bucket("api", sys.argv[1]), time.time() + float(sys.argv[2])
while time.time() < end:
    wait_s = bucket.take(200.0, 5)
    if wait_s == 0.0:
        print(time.time_ns(), flush=True)
    else:
        time.sleep(min(wait_s, 0.05))
"""


def taker(folder: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TAKER, str(folder), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("1.5", 1.5),
        ("-7", 0.0),
        ("1e99", WAIT_S_MAX),
        ("Wed, 21 Oct 2026 07:28:30 GMT", 30.0),
        ("Wednesday, 21-Oct-26 07:28:30 GMT", 30.0),
        ("Wed Oct 21 07:28:30 2026", 30.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Fri, 31 Dec 9998 23:59:59 GMT", WAIT_S_MAX),
    ],
)
def test_retry_after_is_read_in_both_forms_and_bounded(text: str, seconds: float) -> None:
    assert parse_retry_after(text, NOW_S) == seconds


@pytest.mark.parametrize("text", ["", "soon", "nan", "2026-10-21T07:28:00Z"])
def test_what_is_no_retry_after_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Retry-After"):
        parse_retry_after(text, NOW_S)


def test_a_burst_is_free_and_then_the_rate_holds(tmp_path: Path) -> None:
    bucket = Bucket("api", str(tmp_path))

    waits = [bucket.take(0.01, 3) for _ in range(5)]

    assert waits[:3] == [0.0, 0.0, 0.0]
    assert all(90 < wait_s <= 100 for wait_s in waits[3:])


def test_two_processes_never_exceed_the_rate_together(tmp_path: Path) -> None:
    began_ns = time.time_ns()
    takers = [taker(tmp_path, 1.5) for _ in range(2)]
    taken = [line for one in takers for line in one.communicate(timeout=30)[0].split()]
    passed_s = (max(map(int, taken)) - began_ns) / 1e9

    assert 5 + 100 < len(taken) <= 5 + 200 * passed_s + 1
    assert not Bucket("api", str(tmp_path)).warning


def test_a_taker_killed_at_any_moment_leaves_a_bucket_that_works(tmp_path: Path) -> None:
    began_ns, taken = time.time_ns(), 0
    for round_number in range(8):
        one = taker(tmp_path, 30)
        assert one.stdout is not None
        assert one.stdout.readline()
        let_pass(0.01 * round_number)
        one.send_signal(signal.SIGKILL)
        taken += 1 + len(one.communicate(timeout=30)[0].split())
    bucket = Bucket("api", str(tmp_path))
    until(lambda: bucket.take(200.0, 5) == 0.0)

    assert not bucket.warning
    assert taken <= 5 + 200 * (time.time_ns() - began_ns) / 1e9 + 8  # one a kill may be untold


def test_everybody_waits_as_long_as_one_was_told(tmp_path: Path) -> None:
    Bucket("api", str(tmp_path)).block(60)
    other = Bucket("api", str(tmp_path))
    other.block(5)

    assert 59 < other.wait_s() <= 60
    assert 59 < other.take(1000) <= 60
    assert Bucket("another", str(tmp_path)).take(1000) == 0.0


def test_a_wait_is_bounded_by_a_day(tmp_path: Path) -> None:
    bucket = Bucket("api", str(tmp_path))
    bucket.block(1e12)

    assert bucket.wait_s() <= WAIT_S_MAX


@pytest.mark.parametrize(
    "content", [b"x", b"\0" * 128, b'{"tat_ns":' + b"9" * 118, b"[" * 128, b"y" * 4096]
)
def test_a_torn_or_hostile_file_counts_as_empty_and_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "api").write_bytes(content)
    bucket = Bucket("api", str(tmp_path))

    assert bucket.take(1.0) == 0.0
    assert "counts as empty" in bucket.warning
    assert bucket.take(1.0) > 0.0


def test_every_cut_of_a_record_counts_as_empty(tmp_path: Path) -> None:
    Bucket("api", str(tmp_path)).block(50)
    whole = (tmp_path / "api").read_bytes()
    for size in range(1, len(whole)):
        (tmp_path / "api").write_bytes(whole[:size])
        bucket = Bucket("api", str(tmp_path))
        assert bucket.wait_s() == 0.0
        assert bucket.warning


def test_a_link_a_fifo_and_a_directory_in_its_place_are_put_aside(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "link").symlink_to(victim)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()

    for name in ("link", "fifo", "directory"):
        bucket = Bucket(name, str(tmp_path))
        assert bucket.take(1.0) == 0.0
        assert "put aside" in bucket.warning
        assert bucket.take(1.0) > 0.0
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("scope", ["", ".hidden", "a/b", "a\nb", "x" * 101])
def test_a_scope_that_can_be_no_file_is_refused(tmp_path: Path, scope: str) -> None:
    with pytest.raises(ValueError, match="scope"):
        Bucket(scope, str(tmp_path))


def test_a_clock_set_back_costs_no_more_than_a_burst(tmp_path: Path) -> None:
    bucket = Bucket("api", str(tmp_path))
    assert bucket.take(1 / 3600, 24) == 0.0  # a burst of a day: its arrival time is far ahead
    for _ in range(23):
        bucket.take(1 / 3600, 24)

    assert bucket.take(10.0, 2) <= 0.2
