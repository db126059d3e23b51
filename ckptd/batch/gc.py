"""`gc`: finished batches that nobody touched for a while, and old archives, are removed.

    python -m ckptd.batch gc [--older=SECONDS] [--archives] [--force] [--dry-run] [NAME...]
    {"removed":["ping-3f9a1c"],"archives":["nightly"],"kept":{"census":"it runs"},"bytes":8192}

Invariant: a batch at work is never removed, an unfinished one only by name and with `--force`.
Crash: a directory is renamed to `.removed-...` first, while it is locked; what a gc that died
left of it is deleted by the next one. Read next: `report.py`.
"""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ckptd.batch import place
from ckptd.batch.refusal import Refused, count
from ckptd.batch.report import Asked, archives, bytes_of, names, summary_or_none
from ckptd.storage.disk import sync_fd

_REMOVED: Final = ".removed-"
_OPTIONS: Final = ("older", "archives", "force", "dry-run")


def gc(words: Sequence[str]) -> int:
    """Remove what may go; print what it was and what stays."""
    asked = Asked(words, _OPTIONS)
    try:
        older_s = float(asked.last("older", "0"))
    except ValueError as bad:
        raise Refused(f"--older: not a number of seconds: {asked.last('older')!r}") from bad
    if asked.has("force") and not asked.names:
        raise Refused("--force is for batches that are named")
    before_ns = time.time_ns() - int(older_s * 1e9)
    found: dict[str, Any] = {"removed": [], "archives": [], "kept": {}, "bytes": 0}
    for name in asked.names or names():
        one = summary_or_none(name, is_named=bool(asked.names))
        if one is None:
            continue
        why = _kept_by(one, asked, before_ns) or _goes(one, asked, before_ns, found)
        if why:
            found["kept"][name] = why
            _archives_go(one, before_ns, found, is_dry=asked.has("dry-run"))
    if not asked.has("dry-run"):
        _clear_leftovers()
    sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
    sys.stdout.buffer.flush()
    return 0


def _kept_by(one: dict[str, Any], asked: Asked, before_ns: int) -> str:
    """Return why a batch stays, "" where it may go."""
    if asked.has("archives"):
        return "only archives are asked for"
    if one.get("lock_pid"):
        return "it is running"
    if asked.has("force"):
        return ""
    if problem := one.get("problem"):
        return f"it cannot be read: {problem}"
    why = f"{count(one['todo'], 'item is', 'items are')} to do" if one["todo"] else ""
    if not os.path.lexists(os.path.join(one["dir"], place.ITEMS_FILE)):
        why = "its list of items is gone"
    if why:
        return f"{why} (by its name and with --force it goes)"
    if one["changed_ns"] > before_ns:
        return "it changed not long ago"
    return ""


def _goes(one: dict[str, Any], asked: Asked, before_ns: int, found: dict[str, Any]) -> str:
    """Remove a batch; return why it stays, "" where it is gone.

    It was judged unlocked: somebody may have given it more to do since.
    """
    name, path = one["name"], one["dir"]
    size = bytes_of(path)
    if not asked.has("dry-run"):
        try:
            with place.locked(path, name):
                now = summary_or_none(name, is_named=False) or one
                if why := _kept_by({**now, "lock_pid": 0}, asked, before_ns):
                    return why
                aside = os.path.join(os.path.dirname(path), f"{_REMOVED}{name}-{time.time_ns()}")
                os.rename(path, aside)
                _sync_directory(os.path.dirname(path))
        except place.Held:
            return "it is running"
        except FileNotFoundError:
            return ""  # somebody else removes it
        shutil.rmtree(aside, ignore_errors=True)
    found["removed"].append(name)
    found["bytes"] += size
    return ""


def _archives_go(
    one: dict[str, Any], before_ns: int, found: dict[str, Any], *, is_dry: bool
) -> None:
    """Remove what `--fresh` put away long enough ago; the batch itself stays."""
    old = [path for path in archives(one["dir"]) if os.lstat(path).st_mtime_ns <= before_ns]
    for path in old:
        found["bytes"] += bytes_of(path)
        if not is_dry:
            aside = os.path.join(place.root(), f"{_REMOVED}{time.time_ns()}")
            os.rename(path, aside)
            shutil.rmtree(aside, ignore_errors=True)
    if old:
        found["archives"].append(one["name"])


def _clear_leftovers() -> None:
    """Delete what an earlier gc renamed and did not come to delete."""
    try:
        left = [name for name in os.listdir(place.root()) if name.startswith(_REMOVED)]
    except FileNotFoundError:
        return
    for name in left:
        shutil.rmtree(os.path.join(place.root(), name), ignore_errors=True)


def _sync_directory(path: str) -> None:
    """Durable: the names in a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_fd(fd)
    finally:
        os.close(fd)
