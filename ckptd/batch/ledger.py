"""The ledger of a batch: one journal for each run, and what all of them add up to.

    {"op":"run","event":"begin","boot":"0b9c...","config":"5f1d...","items":340,"jobs":8}
    {"op":"item_start","key":"a.txt","lane":2,"tries":1}            rides with a group
    {"op":"item","key":"a.txt","status":"pass","result":"ok","lane":2,"tries":1,"seconds":0.12}
    {"op":"run","event":"pause","why":"rate_limit","scope":"api","seconds":60,"until_ns":...}
    {"op":"run","event":"resume","waited_s":60.2}
    {"op":"run","event":"end","why":"finished"}

The same frames and facts as a task's journal, written by the same code. The last `item` of a key
holds; a torn one was never there. An `item_start` without its end, of a run without its own end,
is an item in flight when the runner was killed: a suspect. Read next: `choose.py`, `runner.py`.
"""

import json
import os
import time
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec

from ckptd.batch.place import Batch, newest_run
from ckptd.batch.refusal import BAD_DATA, Refused
from ckptd.storage import facts, taskdir
from ckptd.storage.facts import Facts, read_durable, read_facts
from ckptd.storage.journal import FACTS_PER_FRAME_MAX, Bounds, Fact, Journal
from ckptd.storage.taskdir import this_boot_id
from ckptd.storage.untrusted import Damaged, NotTrusted

_FRAME_BYTES: Final = 2 << 20  # of facts, by estimate; a frame takes twice that
_FACT_BYTES: Final = 20_000  # of one without its result, at most: a long key in escapes, a text
_SHOWN_CHARS: Final = 200
BOUNDS: Final = Bounds(4 << 30, 16 << 30)


_At = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class _Item(msgspec.Struct):
    """What is read of a result, beside its value: the types that every version wrote."""

    at_ns: _At
    status: Literal["pass", "fail", "error", "skipped", "quarantined"]
    text: str = ""
    tries: int = 0
    lane: int = -1
    seconds: float | None = None


class _Start(msgspec.Struct):
    """What is read of an item in flight."""

    tries: int = 0
    lane: int = -1
    run_deaths: int = 0
    alone_deaths: int = 0


class _Run(msgspec.Struct):
    """What is read of an event of a run."""

    at_ns: _At
    event: str
    task: int | None = None
    until_ns: _At = 0
    waited_s: float = 0.0
    to: str | None = None
    accepted_ns: int | None = None


class Waits(NamedTuple):
    """How often a batch waited as a whole, and how long."""

    pause_count: int
    resume_count: int
    total_wait_s: float


def read(path: str, batch: Batch, *, is_acted_on: bool = False) -> Facts:
    """Return what all runs recorded; changes nothing.

    Raises:
        Refused: it does not check.

    Durable: what it returns, if `is_acted_on` or handed on; else a run that was killed may not have
    synced it yet.
    """
    reads = read_durable if is_acted_on else read_facts
    try:
        try:
            found = reads(path, batch.id, os.getuid(), newest_run(path), bounds=BOUNDS)
        except FileNotFoundError:  # `--fresh` archived it meanwhile; the new one is there
            found = reads(path, batch.id, os.getuid(), newest_run(path), bounds=BOUNDS)
    except (Damaged, NotTrusted) as bad:
        raise Refused(
            f"the ledger of {batch.name} does not check: {bad}",
            "nothing was changed; copy the directory, then `--fresh` archives it and starts anew",
            code=BAD_DATA,
        ) from bad
    if found.problem:
        raise Refused(f"the ledger of {batch.name}: {found.problem}", code=BAD_DATA)
    _refuse_strange(found, batch.name)
    return found


def _refuse_strange(found: Facts, name: str) -> None:
    """Refuse facts whose frames check, and whose members mean nothing here: of a newer version.

    Who reads on, or prints them, relies on their types, and on texts that can be shown.
    """
    kinds = ((_Item, found.items.values()), (_Start, found.flying.values()), (_Run, found.runs))
    for kind, some in kinds:
        for fact in some:
            try:
                msgspec.convert(fact, kind)
                msgspec.json.encode(fact)
            except (msgspec.ValidationError, UnicodeEncodeError) as bad:
                shown = json.dumps(fact)[:_SHOWN_CHARS]
                raise Refused(
                    f"the ledger of {name} holds what cannot be read: {bad}: {shown}",
                    "nothing was changed; upgrade if a newer ckptd wrote it, or use `--fresh`",
                    code=BAD_DATA,
                ) from bad


def begin(path: str, *, fresh: bool = False) -> int:
    """Return the number of a new run, made ready; with `fresh` what was there is archived.

    Invariant: called with the batch locked, so no two runs get one number.
    Durable: no; the first append syncs all names above it.
    """
    run = newest_run(path) + 1
    taskdir.prepare(path, run, os.getuid(), os.getgid(), fresh=fresh)
    return run


class Ledger:
    """The journal of one run, open for appending."""

    def __init__(self, path: str, batch: Batch, run: int) -> None:
        self._journal = Journal(path, batch.id, run, 0, bounds=BOUNDS)

    def append(self, group: list[Fact], *, is_synced: bool = True) -> None:
        """Append one group; without `is_synced` it outlives this process, but no power cut.

        Durable: all of it if `is_synced`, and everything appended before.
        """
        parts = _frames_of(group)
        for part in parts:
            self._journal.append(part, is_synced=is_synced and part is parts[-1])

    def close(self) -> None:
        """Close; nothing is left to be written."""
        self._journal.close()


def _frames_of(group: list[Fact]) -> list[list[Fact]]:
    """Return a group cut into what fits a frame each; large results are rare."""
    parts: list[list[Fact]] = []
    room_bytes = 0
    for fact in group:
        size = _FACT_BYTES
        if "result" in fact:
            size += len(json.dumps(fact["result"]))
        if size > room_bytes or len(parts[-1]) >= FACTS_PER_FRAME_MAX:
            parts.append([])
            room_bytes = _FRAME_BYTES
        parts[-1].append(fact)
        room_bytes -= size
    return parts


def begin_event(batch: Batch, items: int, jobs: int, task: int) -> Fact:
    """Return the fact that a run begins."""
    return facts.run_event(
        "begin",
        boot=this_boot_id(),
        config=batch.digest,
        items=items,
        jobs=jobs,
        pid=os.getpid(),
        task=task,
        base_run=batch.next.base_run,
    )


def accepted_events(batch: Batch, known: Facts) -> list[Fact]:
    """Return the changes of config that the ledger does not know yet."""
    told = {(run.get("to"), run.get("accepted_ns")) for run in known.runs}
    return [
        facts.run_event(
            "config",
            to=one.to_digest,
            accepted_ns=one.at_ns,
            diff=one.diff,
            **{"from": one.from_digest},
        )
        for one in batch.accepted
        if (one.to_digest, one.at_ns) not in told
    ]


def pause_event(why: str, scope: str, seconds: float) -> Fact:
    """Return the fact that nothing can go on for some seconds."""
    until_ns = time.time_ns() + int(seconds * 1e9)
    return facts.run_event(
        "pause", why=why, scope=scope, seconds=round(seconds, 3), until_ns=until_ns
    )


def open_pause(known: Facts) -> Fact | None:
    """Return the pause that the runs so far left open: a batch that was parked."""
    last: Fact | None = None
    for run in known.runs:
        if run["event"] == "pause":
            last = run
        elif run["event"] == "resume":
            last = None
    return last


def waits(known: Facts, now_ns: int = 0) -> Waits:
    """Return the counters of waiting; a pause still open counts up to `now_ns`, where given."""
    pauses = sum(run["event"] == "pause" for run in known.runs)
    resumes = [run for run in known.runs if run["event"] == "resume"]
    total_s = sum(float(run.get("waited_s", 0)) for run in resumes)
    still = open_pause(known)
    if still is not None and now_ns:
        total_s += max(0, now_ns - int(still["at_ns"])) / 1e9
    return Waits(pauses, len(resumes), round(total_s, 3))


def counts(items: dict[str, Any]) -> dict[str, int]:
    """Return how many results there are of each status."""
    found = dict.fromkeys(facts.STATUSES, 0)
    for fact in items.values():
        found[str(fact["status"])] = found.get(str(fact["status"]), 0) + 1
    return found
