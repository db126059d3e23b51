"""`wait_rate_limit(rate=...)`: every return is one taking, however many wait at once."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from ckptd.sdk import RateLimited, TransientError, run_local

RATE, TAKINGS = 50, 8
AT_LEAST_S = (TAKINGS - 1) / RATE  # a burst is one taking


@pytest.fixture(autouse=True)
def _scopes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_SCOPES_DIR", str(tmp_path / "scopes"))


def test_one_after_the_other_keeps_the_rate(tmp_path: Path) -> None:
    def function(ctx: Any) -> None:
        for _ in range(TAKINGS):
            ctx.wait_rate_limit("api", rate=f"{RATE}/s")

    began_s = time.monotonic()
    run_local(function, tmp_path / "task")
    assert time.monotonic() - began_s >= AT_LEAST_S


def test_threads_of_items_keep_the_rate_together(tmp_path: Path) -> None:
    def function(ctx: Any) -> dict[str, int]:
        def fetch(value: int) -> int:
            ctx.wait_rate_limit("api", rate=f"{RATE}/s")
            return value

        tally = ctx.items(range(TAKINGS), concurrency=4).run(fetch)
        counts: dict[str, int] = tally.counts
        return counts

    began_s = time.monotonic()
    assert run_local(function, tmp_path / "task") == {"pass": TAKINGS}
    assert time.monotonic() - began_s >= AT_LEAST_S


def test_coroutines_keep_the_rate_together(tmp_path: Path) -> None:
    async def function(ctx: Any) -> None:
        await asyncio.gather(
            *(ctx.wait_rate_limit("api", rate=f"{RATE}/s") for _ in range(TAKINGS))
        )

    began_s = time.monotonic()
    run_local(function, tmp_path / "task")
    assert time.monotonic() - began_s >= AT_LEAST_S


@pytest.mark.parametrize(
    ("header", "least_s", "most_s"),
    [(7, 7, 7), ("7", 7, 7), ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400, 86_400), ("soon", 0, 0)],
)
def test_an_error_takes_a_retry_after_header_as_it_came(
    header: float | str, least_s: float, most_s: float
) -> None:
    for error in (TransientError(retry_after=header), RateLimited("slow", retry_after=header)):
        assert least_s <= error.retry_after_s <= most_s
