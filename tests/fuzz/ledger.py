"""A target of a batch's ledger: the journal of an earlier run, of any content, and a run after it.

    0 script      the file as it was written, damaged by a script
    1 bytes       any file
    2 lines       each line as the payload of a frame that checks

Oracle: what is read is a beginning of what was written, at least as far as a frame that stands had
promised, and status, items and export can tell it; or it is refused. A result that
is appended then is there, with all that was there before it, and nothing else has grown.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ckptd.batch import ledger, place, report
from ckptd.batch.choose import choose
from ckptd.batch.place import Batch, Item
from ckptd.batch.refusal import Refused
from ckptd.batch.spec import parse
from ckptd.storage import frame
from ckptd.storage.facts import Facts, item_done, item_start
from ckptd.storage.journal import Fact, read
from tests.fuzz.files import promised
from tests.fuzz.target import DEEP, Script, Target, damaged

NAME: Final = "b"
_ID: Final = 7  # always the same, so that a kept input means the same in each process
_BYTES_MAX: Final = 16 << 10  # of the second run's file: one small fact
_AFTER: Final = item_done("after", "pass", {"n": 1})


@functools.cache
def _place() -> Path:
    """Return a batch's directory in memory, before any run; it lives with the process."""
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    folder = Path(tempfile.mkdtemp(prefix="ck-fuzz-", dir=base)) / NAME
    spec = parse({"argv": ["echo", "{}"], "items": {"from": "lines", "lines": ["a"]}}, None, None)
    place.make(str(folder))
    batch = place.new_batch(NAME, spec.config, spec.knobs)
    batch.id = _ID
    place.store(str(folder), batch)
    place.store_items(str(folder), [Item(f"i{number}", number, number) for number in range(1, 9)])
    return folder


def forget() -> None:
    """Remove what the targets of this process have made."""
    if _place.cache_info().currsize:
        shutil.rmtree(_place().parent, ignore_errors=True)
        _place.cache_clear()
        _written.cache_clear()


@functools.cache
def _written() -> tuple[bytes, tuple[Fact, ...]]:
    """Return the ledger of a run with pauses and results of every kind, and its facts."""
    path, batch = str(_place()), place.load(str(_place()))
    _anew()
    first = ledger.Ledger(path, batch, ledger.begin(path))
    began = {**ledger.begin_event(batch, 8, 2, 12), "pid": 1, "boot": "b"}
    first.append([began, item_start("i1", lane=1, tries=1)])
    first.append([item_done("i1", "pass", {"n": 1}, lane=1, tries=1, seconds=0.1)])
    first.append([ledger.pause_event("rate_limit", "api", 60.0)], is_synced=False)
    first.append([item_done(f"i{n}", "fail", None, "no", tries=2) for n in range(2, 5)])
    first.append([item_start("i5", lane=2, tries=1)])
    first.close()
    facts = tuple(fact for _, fact in read(path, batch.id, os.getuid(), 1))
    return _file(1).read_bytes(), facts


def _file(run: int) -> Path:
    return _place() / "journal" / f"{run:06}.j"


def _anew() -> None:
    """Make it a batch without any run."""
    for name in ("journal", "stage", "ckpt"):
        shutil.rmtree(_place() / name, ignore_errors=True)
    (_place() / "attempt.json").unlink(missing_ok=True)


def run_ledger(data: bytes) -> None:
    """Read the ledger of a run as all do who read it, then record a result in the next run."""
    whole, facts = _written()
    script = Script(data)
    kind = script.byte() % 3
    batch = place.load(str(_place()))
    content = (
        damaged(whole, script) if kind == 0
        else script.rest() if kind == 1
        else _sealed(script.rest(), batch)
    )  # fmt: skip
    _anew()
    ledger.begin(str(_place()))
    _file(1).parent.mkdir()
    _file(1).write_bytes(content)
    try:
        known = ledger.read(str(_place()), batch)
    except Refused:
        return
    if kind == 0:
        _is_a_beginning(known, facts, promised(whole, content))
    _tell(batch, known)
    _append(batch, known, content)


def _is_a_beginning(known: Facts, facts: tuple[Fact, ...], least: int) -> None:
    assert least <= known.count <= len(facts), f"{known.count} facts, {least} were promised"
    right = Facts()
    for fact in facts[: known.count]:
        right.take(1, fact)
    assert (known.items, known.flying, known.runs) == (right.items, right.flying, right.runs)


def _tell(batch: Batch, known: Facts) -> None:
    """Tell what is known in every way that there is, as status, items, export and a new run do."""
    with _named(), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
        told = report.summary(NAME, detail=True)
        assert "problem" not in told, told["problem"]
        report.items([NAME])
        for form in ("jsonl", "json", "csv"):
            report.export([NAME, f"--format={form}"])
    chosen = choose(batch, place.load_items(str(_place())), known)
    assert len(chosen.todo) == told["todo"], "status and the next run agree"
    ledger.counts(known.items)
    ledger.accepted_events(batch, known)


@contextlib.contextmanager
def _named() -> Iterator[None]:
    before = os.environ.get("CKPTD_BATCH_DIR")
    os.environ["CKPTD_BATCH_DIR"] = str(_place().parent)
    try:
        yield
    finally:
        os.environ.pop("CKPTD_BATCH_DIR")
        if before is not None:
            os.environ["CKPTD_BATCH_DIR"] = before


def _append(batch: Batch, known: Facts, content: bytes) -> None:
    """Record a result in a run of its own: nothing else changes."""
    path = str(_place())
    second = ledger.Ledger(path, batch, ledger.begin(path))
    second.append([_AFTER])
    second.close()
    again = ledger.read(path, batch, is_acted_on=True)
    assert again.count == known.count + 2, "its opening and the result"
    result = again.items.pop("after")
    assert (result["status"], result["result"], result["attempt"]) == ("pass", {"n": 1}, 2)
    known.items.pop("after", None)
    assert again.items == known.items, "what was there"
    assert again.runs == known.runs
    assert _file(1).read_bytes() == content, "the run before is nobody's to write"
    assert _file(2).stat().st_size < _BYTES_MAX


def _sealed(data: bytes, batch: Batch) -> bytes:
    """Return each line as the payload of a frame that checks, the chain of run 1."""
    chain, lsn, whole = frame.Chain(zlib.crc32(f"ckptd journal {batch.id}.1".encode()), 0), 1, b""
    for line in data.split(b"\n"):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        count = max(1, len(found)) if isinstance(found, list) else 1
        if count <= frame.COUNT_MAX and line:
            whole += chain.encode(line, lsn, lsn - 1, count, frame.NOTE)
            lsn += count
    return whole


def ledger_seeds() -> list[bytes]:
    """Return scripts, the file itself, and its facts as lines."""
    whole, facts = _written()
    lines = b"\n".join(json.dumps([fact]).encode() for fact in facts)
    scripts = [bytes([0, kind, 0, at, 33, 7]) for kind in range(6) for at in (0, 1, 2)]
    return [b"\0", *scripts, b"\1", b"\1" + whole, b"\2" + lines]


TARGETS = (Target("ledger", run_ledger, ledger_seeds, 2_048, weight=DEEP),)
