"""examples/ingest.py against a real API that limits its callers: killed, limited, run again."""

import contextlib
import sqlite3
from pathlib import Path

import pytest

from tests.examples.killing import Example, seeded
from tests.examples.limited_api import PAGE, LimitedApi

COUNT = 3_000
PAGES = [*range(0, COUNT, PAGE)]


class Ingest:
    """The example with a store of its own."""

    def __init__(self, api: LimitedApi, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.store = folder / "records.db"
        self.scopes = folder / "scopes"
        env = {"CKPTD_SCOPES_DIR": str(self.scopes)}
        self.example = Example("ingest.py", api.url, self.store, env=env)

    def limits(self) -> int:
        """Return how many scopes are closed: 0 or 1."""
        files = self.scopes.glob("*:*")
        return sum('"blocked_ns":0}' not in file.read_text() for file in files)

    def rows(self) -> list[str]:
        with contextlib.closing(sqlite3.connect(self.store)) as db:
            return sorted(body for (body,) in db.execute("SELECT body FROM record"))


def test_every_record_is_there_once_and_at_most_the_current_page_is_asked_for_again(
    tmp_path: Path,
) -> None:
    chance = seeded()
    with LimitedApi(COUNT, refuses_at={4: "seconds", 11: "date", 21: "seconds"}).open() as api:
        ingest = Ingest(api, tmp_path / "killed")
        kills = sum(
            ingest.example.kill_in_the_middle(chance, lambda: api.calls, most=8) for _ in range(4)
        )
        said = ingest.example.run()

        assert kills
        assert "'new': 2700, 'total': 2700" in said
        assert api.refused == 3
        assert api.too_early <= kills  # where the answer was on its way
        assert sorted(set(api.pages)) == [*PAGES, COUNT]
        assert len(api.pages) <= len(PAGES) + 1 + kills

    with LimitedApi(COUNT, refuses_at={}).open() as api:
        whole = Ingest(api, tmp_path / "whole")
        whole.example.run()
        assert whole.rows() == ingest.rows()
        assert api.pages == [*PAGES, COUNT]


def test_the_second_run_fetches_only_what_is_new(tmp_path: Path) -> None:
    with LimitedApi(450, refuses_at={}).open() as api:
        ingest = Ingest(api, tmp_path)
        assert "'new': 405, 'total': 405" in ingest.example.run()
        api.pages.clear()

        assert "'new': 0, 'total': 405" in ingest.example.run()
        assert api.pages == [450]

        api.records += LimitedApi(530, refuses_at={}).records[450:]
        assert "'new': 72, 'total': 477" in ingest.example.run()
        assert api.pages == [450, 450, 530]


def test_a_limit_that_was_heard_of_holds_after_a_crash(tmp_path: Path) -> None:
    with LimitedApi(200, refuses_at={2: "seconds"}).open() as api:
        ingest = Ingest(api, tmp_path)
        assert ingest.example.kill_in_the_middle(seeded(), ingest.limits, most=1)

        ingest.example.run()
        assert (api.refused, api.too_early) == (1, 0)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_both_forms_of_retry_after_are_kept_to(tmp_path: Path, form: str) -> None:
    with LimitedApi(200, refuses_at={2: form}).open() as api:
        Ingest(api, tmp_path).example.run()

        assert (api.refused, api.too_early) == (1, 0)
        assert api.pages == [0, 100, 200]
