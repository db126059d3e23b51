"""Thousands of records from an API that limits its callers; the next run fetches what is new.

    ckptctl submit --python examples/ingest.py:ingest \
        --input '{"url": "http://127.0.0.1:8080/records", "store": "records.db"}'
    python examples/ingest.py http://127.0.0.1:8080/records records.db      # without a daemon

The API gives pages: GET /records?after=CURSOR answers {"records": [...], "next": CURSOR}. A page
and the cursor behind it are stored in one transaction, so no record is missing or there twice,
whatever dies; and the next run, tonight, begins behind the last page. Records are keyed by the
digest of their content: what the API sends again under another number is stored once.

Two limits hold for all tasks of this user that name the same scope, also across crashes: a rate of
our own, and what the API asks for (429 with Retry-After, in seconds or as a date). A long wait
costs no process: the task is parked and started again when it is over.
"""

import contextlib
import hashlib
import json
import sqlite3
import sys
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from ckptd.sdk import SyncResumableContext, TransientError, run_local, task

SCHEMA = """
CREATE TABLE IF NOT EXISTS record (digest TEXT PRIMARY KEY, body TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cursor (url TEXT PRIMARY KEY, after TEXT) WITHOUT ROWID;
"""


@task
def ingest(ctx: SyncResumableContext, url: str, store: str, rate: str = "50/s") -> dict[str, int]:
    """Fetch the records that came since the last run; return how many are new, and there."""
    with contextlib.closing(sqlite3.connect(store)) as db:
        db.executescript(SCHEMA)
        before = ctx.step("count what is there", count, db)  # once, not once in every attempt
        while True:  # Bound: the API's last page
            found = db.execute("SELECT after FROM cursor WHERE url = ?", [url]).fetchone()
            page = fetched(ctx, url, found[0] if found else "", rate)
            if not page["records"]:
                break
            keep(db, url, page)
            ctx.set_progress(count(db), unit="records")
        total = count(db)
    return {"new": total - before, "total": total}


def keep(db: sqlite3.Connection, url: str, page: dict[str, Any]) -> None:
    """Store a page and the cursor behind it, both or neither."""
    bodies = [json.dumps(record["body"], sort_keys=True) for record in page["records"]]
    rows = [(hashlib.sha256(body.encode()).hexdigest(), body) for body in bodies]
    with db:  # one transaction
        db.executemany("INSERT OR IGNORE INTO record VALUES (?, ?)", rows)
        db.execute("INSERT OR REPLACE INTO cursor VALUES (?, ?)", [url, page["next"]])


def count(db: sqlite3.Connection) -> int:
    (total,) = db.execute("SELECT count(*) FROM record").fetchone()
    return int(total)


def fetched(ctx: SyncResumableContext, url: str, after: str, rate: str) -> Any:
    """Return a page, as soon as both limits allow it."""
    scope = urllib.parse.urlsplit(url).netloc
    where = f"{url}?{urllib.parse.urlencode({'after': after})}"
    while True:  # Bound: the limits; each wait is a safe point
        ctx.wait_rate_limit(scope, rate=rate)
        try:
            with urllib.request.urlopen(where, timeout=30) as answer:  # noqa: S310 - the user's URL
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 429:
                raise
            ctx.wait_rate_limit(scope, retry_after=error.headers.get("Retry-After", "1"))
        except OSError as error:
            raise TransientError(f"{where}: {error}") from error


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: ingest.py URL STORE")
    url, store = sys.argv[1:]
    print(run_local(ingest, f"{store}.task", again=True, url=url, store=store))
