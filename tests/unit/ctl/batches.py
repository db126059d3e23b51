"""Batches made by hand, fact by fact, for those who look at them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckptd.batch import ledger, place
from ckptd.batch.prepare import Wishes, prepare
from ckptd.storage import facts
from ckptd.storage.journal import Fact


def made(name: str, items: Sequence[Any], source: dict[str, Any] | None = None, **spec: Any) -> str:
    """Return the directory of a batch of these items, in `CKPTD_BATCH_DIR`."""
    given = {"argv": ["wc", "-c", "{}"], "cwd": "/", **spec}
    source = {"from": "lines", "lines": list(items), **(source or {})}
    return str(prepare(name, {**given, "items": source}, Wishes())["dir"])


def ran(path: str, *group: Fact, end: str = "finished", task: int = 0) -> int:
    """Record one run with these facts; without `end` it was killed. Return its number."""
    batch = place.load(path)
    run = ledger.begin(path)
    book = ledger.Ledger(path, batch, run)
    book.append([ledger.begin_event(batch, batch.items, 1, task), *group])
    if end:
        book.append([facts.run_event("end", why=end)])
    book.close()
    return run


def done(key: str, status: str = "pass", result: Any = None, text: str = "") -> Fact:
    """Return the fact of a result as the runner writes it."""
    return facts.item_done(key, status, result, text, lane=0, tries=1, seconds=0.25)


def journal(path: str, run: int) -> Path:
    """Return the file of a run."""
    return Path(path) / "journal" / f"{run:06d}.j"


def names_in(root: Path) -> set[str]:
    return set(os.listdir(root))
