"""What the directories of batches say: `report`, `items` and `export`, all in JSON or CSV.

    python -m ckptd.batch report [--detail|--brief] [NAME...]     one line of JSON a batch
    python -m ckptd.batch items NAME [--status=S] [--key=K]       one line of JSON an item
    python -m ckptd.batch export NAME [--format=jsonl|json|csv] [--status=S]

It only reads, beside a runner at work as well: what it shows is what was durable a moment ago.
A batch that cannot be read is a line with a `problem`, so that one never hides the others.
Read next: `ledger.py` (the facts), `gc.py` (which clears batches away).
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from ckptd.batch import ledger, place
from ckptd.batch.choose import BAD
from ckptd.batch.export import FORMATS, write
from ckptd.batch.refusal import Refused
from ckptd.storage.facts import STATUSES, Facts

TODO: Final = "todo"
RUNNING: Final = "running"
_LATELY_NS: Final = 30_000_000_000  # what the rate is told by, as the runner's own
_TROUBLES: Final = 10
_TEXT_CHARS: Final = 300
_SOURCES: Final = {"csv": "rows of CSV", "jsonl": "lines of JSON", "null": "ended by NUL"}


class Asked:
    """The words of one verb: `--name=value` (each may come several times), and names."""

    def __init__(self, words: Sequence[str], known: Sequence[str]) -> None:
        """Take the words apart.

        Raises:
            Refused: an option that is not among `known`.
        """
        self.names: list[str] = []
        self._given: list[tuple[str, str]] = []
        for word in words:
            if not word.startswith("--"):
                self.names.append(word)
                continue
            name, _, value = word[2:].partition("=")
            if name not in known:
                raise Refused(f"unknown option --{name}", f"known: {', '.join(known)}")
            self._given.append((name, value))

    def all(self, name: str) -> list[str]:
        """Return every value that was given for an option."""
        return [value for given, value in self._given if given == name]

    def has(self, name: str) -> bool:
        """Return whether an option was given."""
        return any(given == name for given, _ in self._given)

    def last(self, name: str, default: str = "") -> str:
        """Return the last value of an option."""
        return (self.all(name) or [default])[-1]

    def one_name(self) -> str:
        """Return the one name. Raises Refused."""
        if len(self.names) != 1:
            raise Refused(
                f"one batch is named, not {len(self.names)}", "`ckptctl batch` lists them"
            )
        return self.names[0]


# --- report -------------------------------------------------------------------------------------


def report(words: Sequence[str]) -> int:
    """Print a line for each batch."""
    asked = Asked(words, ("detail", "brief"))
    for name in asked.names or names():
        if asked.has("brief"):
            found: dict[str, Any] | None = {"name": name, "dir": place.path_of(name)}
        else:
            is_named, detail = bool(asked.names), asked.has("detail")
            found = summary_or_none(name, is_named=is_named, detail=detail)
        if found is not None:
            sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
    sys.stdout.buffer.flush()
    return 0


def names() -> list[str]:
    """Return the names of all batches of this user, sorted."""
    try:
        with os.scandir(place.root()) as entries:
            return sorted(
                entry.name
                for entry in entries
                if not entry.name.startswith(".")
                and os.path.lexists(f"{entry.path}/{place.BATCH_FILE}")
            )
    except FileNotFoundError:
        return []


def summary_or_none(name: str, *, is_named: bool, detail: bool = False) -> dict[str, Any] | None:
    """Return the summary; None for one of a list that `gc` removed since it was listed.

    Raises:
        Refused: there is none of this name, and it was named.
    """
    try:
        found = summary(name, detail=detail)
    except Refused:
        if is_named or _is_there(name):
            raise
        return None
    return found if is_named or _is_there(name) else None


def summary(name: str, *, detail: bool = False) -> dict[str, Any]:
    """Return what there is to say about a batch; one that cannot be read has a `problem`.

    Raises:
        Refused: there is none of this name.
    """
    path = place.path_of(name)
    if not _is_there(name):
        place.load(path)  # says that there is none
    try:
        held = place.holder(path)  # first: a run that ends meanwhile leaves no old facts at rest
        batch = place.load(path)
        known = ledger.read(path, batch)
        found = _told(path, batch, known, held)
    except Refused as refused:
        return {"name": name, "dir": path, "problem": f"{refused}; {refused.hint}".rstrip("; ")}
    if detail:
        found["troubles"] = troubles(known)
    return found


def _is_there(name: str) -> bool:
    return os.path.lexists(f"{place.path_of(name)}/{place.BATCH_FILE}")


def _told(path: str, batch: place.Batch, known: Facts, held: place.Holder | None) -> dict[str, Any]:
    total, todo = 0, 0
    counts = dict.fromkeys(STATUSES, 0)
    for item in place.load_items(path):
        total += 1
        result = known.items.get(item.key)
        todo += is_todo(batch, item.key, result)
        if result is not None:
            counts[result["status"]] += 1
    until_ns = paused_until_ns(known)
    waits = ledger.waits(known, min(time.time_ns(), until_ns))
    config = batch.config
    return {
        "name": batch.name,
        "dir": path,
        "command": config.argv or [config.python],
        "is_function": not config.argv,
        "cwd": config.cwd,
        "source": _source_text(batch),
        "format": config.format,
        "total": total,
        "done": total - todo,
        "todo": todo,
        "counts": {status: count for status, count in counts.items() if count},
        "made_ns": batch.created_ns,
        "changed_ns": _changed_ns(batch, known),
        "lock_pid": 0 if held is None else held.pid or -1,
        "runs": runs(known),
        "rate_per_s": rate_of(known),
        "pause_count": waits.pause_count,
        "resume_count": waits.resume_count,
        "wait_s": waits.total_wait_s,
        "paused_until_ns": until_ns,
        "archived": len(archives(path)),
        "bytes": bytes_of(path),
    }


def is_todo(batch: place.Batch, key: str, result: dict[str, Any] | None) -> bool:
    """Return whether an item is to run: it has no result, or an old one that was asked again."""
    if result is None:
        return True
    wish = batch.next
    is_old = int(result["attempt"]) <= wish.base_run
    return is_old and (key in wish.only or result["status"] in wish.statuses)


def _source_text(batch: place.Batch) -> str:
    """Return how the items were given, "" for plain lines."""
    parts = [_SOURCES[batch.config.format]] if batch.config.format in _SOURCES else []
    if batch.config.key:
        parts.append(f"told apart by {batch.config.key!r}")
    return ", ".join(parts)


def runs(known: Facts) -> list[dict[str, Any]]:
    """Return every run with its begin and its orderly end, if it had one."""
    found: dict[int, dict[str, Any]] = {}
    for fact in known.runs:
        number, at_ns = int(fact["attempt"]), int(fact["at_ns"])
        one = found.setdefault(number, {"run": number, "began_ns": at_ns, "task": 0})
        if fact["event"] == "begin":
            one["task"] = int(fact.get("task") or 0)
        elif fact["event"] == "end":
            one |= {"ended_ns": at_ns, "end": str(fact.get("why", ""))}
    return list(found.values())


def rate_of(known: Facts) -> float:
    """Return results a second, told by the last half minute of the last run; 0.0 without any."""
    begins = [fact for fact in known.runs if fact["event"] == "begin"]
    if not begins:
        return 0.0
    run, began_ns = int(begins[-1]["attempt"]), int(begins[-1]["at_ns"])
    ends = [int(fact["at_ns"]) for fact in known.items.values() if fact["attempt"] == run]
    newest_ns = max(ends, default=0)
    since_ns = max(began_ns, newest_ns - _LATELY_NS)
    if newest_ns <= since_ns:
        return 0.0
    return round(sum(end > since_ns for end in ends) / ((newest_ns - since_ns) / 1e9), 6)


def paused_until_ns(known: Facts) -> int:
    """Return until when the batch waits as a whole, 0 where it does not."""
    pause = ledger.open_pause(known)
    return int(pause.get("until_ns", 0)) if pause is not None else 0


def _changed_ns(batch: place.Batch, known: Facts) -> int:
    facts = (*known.items.values(), *known.runs)
    newest_ns = max((int(fact["at_ns"]) for fact in facts), default=0)
    return max(newest_ns, batch.items_at_ns, batch.created_ns)


def troubles(known: Facts) -> list[dict[str, Any]]:
    """Return the texts of bad ends, the most frequent first; the item's own name stands as {}."""
    counted: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    for key, fact in known.items.items():
        if fact["status"] in BAD:
            text = str(fact.get("text", ""))[:_TEXT_CHARS]
            kind = (str(fact["status"]), text.replace(key, "{}") if len(key) > 2 else text)
            counted[kind] += 1
            first.setdefault(kind, key)
    return [
        {"status": kind[0], "text": kind[1], "count": count, "key": first[kind]}
        for kind, count in counted.most_common(_TROUBLES)
    ]


def archives(path: str) -> list[str]:
    """Return the directories that `--fresh` put things away in."""
    try:
        with os.scandir(f"{path}/archive") as entries:
            return sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def bytes_of(path: str) -> int:
    """Return what a directory takes on disk, links not followed; what vanishes counts nothing."""
    total, left = 0, [path]
    while left:  # Bound: the directories below; links are not followed
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            continue
    return total


# --- items, export --------------------------------------------------------------------------------


def items(words: Sequence[str]) -> int:
    """Print a line for each item that was asked for, in the order of the list."""
    asked = Asked(words, ("status", "key"))
    rows = _rows(asked.one_name(), set(asked.all("status")), set(asked.all("key")))
    out = sys.stdout.buffer
    for row in rows:
        out.write(msgspec.json.encode(row) + b"\n")
    out.flush()
    return 0


def export(words: Sequence[str]) -> int:
    """Print every result with its item; those of items that are listed no more come last."""
    asked = Asked(words, ("status", "format"))
    form = asked.last("format", "jsonl")
    if form not in FORMATS:
        raise Refused(f"unknown format {form!r}", f"known: {', '.join(FORMATS)}")
    name = asked.one_name()
    statuses = set(asked.all("status")) or set(STATUSES)
    write(name, form, _rows(name, statuses, set(), vanished=True))
    return 0


def _rows(
    name: str, statuses: set[str], keys: set[str], *, vanished: bool = False
) -> Iterator[dict[str, Any]]:
    path = place.path_of(name)
    is_held = place.holder(path) is not None  # asked first: see `summary`
    batch = place.load(path)
    known = ledger.read(path, batch, is_acted_on=True)
    flying = known.flying if is_held else {}
    listed: set[str] = set()
    for item in place.load_items(path):
        listed.add(item.key)
        fact = known.items.get(item.key)
        row = _row(item.key, fact, item.value, is_running=item.key in flying)
        is_wanted = row["status"] in statuses or (row["status"] == RUNNING and TODO in statuses)
        if (is_wanted or not statuses) and (not keys or item.key in keys):
            yield row
    if vanished:
        for key, fact in known.items.items():
            if key not in listed and fact["status"] in statuses:
                yield {**_row(key, fact, None, is_running=False), "vanished": True}


def _row(key: str, fact: dict[str, Any] | None, item: Any, *, is_running: bool) -> dict[str, Any]:
    """Return one item in full; without a result the members about it are null."""
    found = fact or {}
    status = found.get("status", TODO)
    seconds = found.get("seconds")
    return {
        "key": key,
        "status": RUNNING if is_running else status,
        "result": found.get("result"),
        "text": str(found.get("text", "")),
        "tries": int(found.get("tries", 0)),
        "took_s": None if seconds is None else float(seconds),
        "lane": found.get("lane"),
        "run": int(found.get("attempt", 0)),
        "at_ns": int(found.get("at_ns", 0)),
        "item": item,
    }
