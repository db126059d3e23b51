"""Numbered migrations of an SQLite database: each is applied exactly once, whatever dies.

    ckptctl submit --python examples/migrate.py:migrate \
        --input '{"database": "shop.db", "folder": "migrations"}'
    python examples/migrate.py shop.db migrations                           # without a daemon

The folder holds 0001_accounts.sql, 0002_orders.sql, 0003_prices.py ... (Python: `def up(db)`).
Where an effect and the note that it happened can be in one transaction, they belong there: the row
in `schema_migrations` is committed together with the migration, or neither is. That is what makes
it exactly once. The step is the fast path and the record for people: after a crash in the moment
between commit and step, the step runs again, finds the row, and does nothing.
"""

import contextlib
import hashlib
import os
import runpy
import sqlite3
import sys
from collections.abc import Iterator

from ckptd.sdk import Manual, PermanentError, SyncResumableContext, run_local, task

NOTES = "CREATE TABLE IF NOT EXISTS schema_migrations (name TEXT PRIMARY KEY, sha256 TEXT)"


@task(strategy=Manual())  # there is no bulk state: what is done is in the steps
def migrate(ctx: SyncResumableContext, database: str, folder: str) -> int:
    """Apply what is missing of the folder's migrations, in order; return how many there are."""
    names = sorted(name for name in os.listdir(folder) if name.endswith((".sql", ".py")))
    for number, name in enumerate(names, 1):
        ctx.step(name, apply, database, os.path.join(folder, name))
        ctx.set_progress(number, len(names), message=name)
    return len(names)


def apply(database: str, path: str) -> str:
    """Apply one migration together with its note; say what was to be done."""
    name = os.path.basename(path)
    with open(path, "rb") as file:
        text = file.read()
    digest = hashlib.sha256(text).hexdigest()
    with transaction(database) as db:
        db.execute(NOTES)
        noted = db.execute("SELECT sha256 FROM schema_migrations WHERE name = ?", [name]).fetchone()
        if noted == (digest,):
            return "was there"
        if noted:
            raise PermanentError(f"{name} was changed after it was applied to {database}")
        if name.endswith(".py"):
            runpy.run_path(path)["up"](db)
        else:
            for statement in statements(text.decode()):
                db.execute(statement)
        db.execute("INSERT INTO schema_migrations VALUES (?, ?)", [name, digest])
    return "applied"


@contextlib.contextmanager
def transaction(database: str) -> Iterator[sqlite3.Connection]:
    """Give a connection in a transaction that is committed, and synced, at the end."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")  # nobody else migrates meanwhile
        yield db
        db.execute("COMMIT")  # closed without it, SQLite takes everything back


def statements(text: str) -> Iterator[str]:
    """Yield the statements of a script. `executescript` would commit before each."""
    begun = ""
    for line in text.splitlines(keepends=True):
        begun += line
        if sqlite3.complete_statement(begun):
            yield begun
            begun = ""
    if begun.strip():
        raise PermanentError(f"the last statement does not end: {begun.strip()[:60]!r}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: migrate.py DATABASE FOLDER")
    database, folder = sys.argv[1:]
    given = {"database": database, "folder": folder}
    total = run_local(migrate, f"{database}.task", again=True, **given)
    print(f"{database} is at migration {total}")
