"""examples/migrate.py: 200 migrations, 47 kills its process the first time, others are killed."""

import contextlib
import runpy
import sqlite3
from pathlib import Path

import pytest

from ckptd.testing import check_resumable
from tests.examples.killing import Example, seeded
from tests.task_world import ROOT

COUNT, POISON = 200, 47
PYTHON = """
import os, signal

def up(db):
    db.execute("INSERT INTO applied VALUES (47)")
    with open({log!r}, "a") as log:
        log.write("begun\\n")
    if os.path.getsize({log!r}) == len("begun\\n"):
        os.kill(os.getpid(), signal.SIGKILL)  # in the middle of its transaction
"""


def migrations(folder: Path) -> Path:
    """Write 200 migrations; none of them could be applied twice without a trace."""
    made = folder / "migrations"
    made.mkdir()
    (made / "0001_start.sql").write_text(
        "CREATE TABLE applied (number INTEGER);\nINSERT INTO applied VALUES (1);\n"
        "CREATE TABLE account (id INTEGER PRIMARY KEY, cents INTEGER);\n"
        "INSERT INTO account SELECT value, 0 FROM\n"
        "  (WITH RECURSIVE n(value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM n\n"
        "   WHERE value < 500) SELECT value FROM n);\n"
    )
    for number in range(2, COUNT + 1):
        changes = {
            0: "UPDATE account SET cents = cents * 2 + id;",
            1: f"ALTER TABLE account ADD COLUMN extra_{number} TEXT;",
            2: f"CREATE INDEX by_{number} ON account (cents, id);",
        }[number % 3]
        text = f"INSERT INTO applied VALUES ({number});\n{changes if number < 120 else ''}\n"
        (made / f"{number:04d}_change.sql").write_text(text)
    (made / f"{POISON:04d}_change.sql").unlink()
    (made / f"{POISON:04d}_poison.py").write_text(PYTHON.format(log=str(folder / "log")))
    return made


def dump(database: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(database)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return list(db.iterdump())


def applied(database: Path) -> list[int]:
    """Return the numbers whose effect is in the database."""
    if not database.exists():
        return []
    with contextlib.closing(sqlite3.connect(database)) as db:
        if not db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'applied'").fetchone():
            return []
        return [number for (number,) in db.execute("SELECT number FROM applied")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return migrations(tmp_path)


def test_every_migration_is_applied_once_whatever_dies(tmp_path: Path, folder: Path) -> None:
    chance, database = seeded(), tmp_path / "shop.db"
    example = Example("migrate.py", database, folder)

    example.run(code=-9)
    assert applied(database) == list(range(1, POISON))  # 47 left nothing behind

    kills = sum(
        example.kill_in_the_middle(chance, lambda: len(applied(database)), most=40)
        for _ in range(3)
    )
    assert kills
    assert f"is at migration {COUNT}" in example.run()

    assert applied(database) == list(range(1, COUNT + 1))
    whole = tmp_path / "whole.db"
    assert f"is at migration {COUNT}" in Example("migrate.py", whole, folder).run()
    assert dump(database) == dump(whole)


def test_the_next_run_applies_only_what_is_new(tmp_path: Path, folder: Path) -> None:
    (folder / f"{POISON:04d}_poison.py").unlink()
    database = tmp_path / "shop.db"
    example = Example("migrate.py", database, folder)
    example.run()

    (folder / "0201_more.sql").write_text("INSERT INTO applied VALUES (201);")
    assert f"is at migration {COUNT}" in example.run()  # 199 and one more

    numbers = [number for number in range(1, 202) if number != POISON]
    assert applied(database) == numbers


def test_a_changed_migration_and_a_broken_one_change_nothing(tmp_path: Path, folder: Path) -> None:
    (folder / f"{POISON:04d}_poison.py").unlink()
    database = tmp_path / "shop.db"
    example = Example("migrate.py", database, folder)
    example.run()
    before = dump(database)

    (folder / "0201_broken.sql").write_text("INSERT INTO applied VALUES (201);\nDROP TABLE none;")
    assert "no such table: none" in example.run(code=1)
    assert dump(database) == before

    (folder / "0201_broken.sql").unlink()
    (folder / "0002_change.sql").write_text("SELECT 1;")
    Example("migrate.py", database, folder).run()  # the steps of this run are done already
    said = Example("migrate.py", database, folder).run(code=1)
    assert "0002_change.sql was changed after it was applied" in said
    assert dump(database) == before


def test_a_crash_at_any_durable_point_applies_nothing_twice(tmp_path: Path) -> None:
    made = tmp_path / "few"
    made.mkdir()
    for number in range(1, 5):
        (made / f"{number:04d}.sql").write_text(
            "CREATE TABLE IF NOT EXISTS applied (number INTEGER);\n"
            f"INSERT INTO applied VALUES ({number});\n"
        )

    report = check_resumable(
        runpy.run_path(str(ROOT / "examples/migrate.py"))["migrate"],
        tmp_path,
        given=lambda place: {"database": f"{place}/shop.db", "folder": str(made)},
        side_effects=lambda place: map(str, applied(Path(place, "shop.db"))),
        twice=True,
    )

    assert [point.what for point in report.points] == [
        *(f"step_done {number:04d}.sql" for number in range(1, 5)),
        "result",
    ]
    assert report.repeated_max == 0
