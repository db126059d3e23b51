"""`prepare`: make a batch, or bring it up to date with a new submit; runs nothing.

    {"name":"lint","dir":".../lint","items":340,"new":12,"known":328,"vanished":0,"duplicates":0,
     "done":328,"todo":12,"again":0,"running_task":null,"running_pid":null,"jobs":8,"warnings":[]}

Items and spec are read and checked first; only then anything is written: the list, then
`batch.json`. Invariant: a refusal leaves the batch as it was.
Read next: `source.py`, `choose.py`.
"""

import os
import sys
import time
from typing import Any, NamedTuple

from msgspec.structs import replace

from ckptd.batch import itemdir, ledger, place, source, spec
from ckptd.batch.choose import check_only, check_statuses, choose
from ckptd.batch.command import check_program, fields_of, unknown_fields
from ckptd.batch.functions import check_function
from ckptd.batch.place import Accepted, Batch, Item, Next
from ckptd.batch.refusal import BAD_DATA, CONFLICT, Refused, count
from ckptd.batch.spec import Spec
from ckptd.storage.facts import Facts
from ckptd.storage.untrusted import open_directory, remove_tree

_LISTED_MAX = 10_000
_TRIES_MAX = 5


class Wishes(NamedTuple):
    """What is asked of this submit beside its spec."""

    accepts_config: bool = False
    is_fresh: bool = False
    allows_empty: bool = False
    is_dry: bool = False
    statuses: tuple[str, ...] = ()
    only: tuple[str, ...] = ()


class _Before(NamedTuple):
    """The batch as it stands."""

    batch: Batch | None
    items: dict[str, Item]
    known: Facts
    run: int


def prepare(name: str, given: Any, wishes: Wishes) -> dict[str, Any]:
    """Return what the batch holds afterwards, as the caller prints it.

    Raises:
        Refused: and nothing was changed.

    Durable: all of it.
    """
    sources = _Sources()
    for _ in range(_TRIES_MAX):
        report = _tried(name, given, wishes, sources)
        if report is not None:
            return report
    raise Refused(f"batch {name} is submitted or run by others all the time", code=CONFLICT)


class _Sources:
    """The source, read once: stdin cannot be read twice."""

    def __init__(self) -> None:
        self._taken: source.Taken | None = None

    def take(self, given: spec.Source) -> source.Taken:
        self._taken = self._taken or source.take(given, _here())
        return self._taken


def _here() -> str:
    """Return the directory that we are in; one that was removed has no name any more."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return os.curdir


def _tried(name: str, given: Any, wishes: Wishes, sources: _Sources) -> dict[str, Any] | None:
    """Return the report; None where somebody else changed the batch between our look and lock.

    Written over, its id would be another, and every result under the old one would be lost.
    """
    path = place.path_of(name)
    before = _look(path, wishes)
    wanted = spec.parse(
        given,
        before.batch.config if before.batch else None,
        before.batch.knobs if before.batch else None,
    )
    _settle_cwd(wanted, before.batch)
    _look_at_program(name, path, wanted)
    items, taken = _items_of(wanted, before, wishes, sources)
    batch = _merged(name, wanted, before, wishes, list(items))
    batch.items = len(items)
    report = _report(path, batch, items, before, taken)
    if wishes.is_dry:
        chosen = choose(batch, items.values(), before.known)
        return report | {"would_run": [item.key for item in chosen.todo[:_LISTED_MAX]]}
    place.make(path)
    try:
        with place.locked(path, name):
            is_same = place.load_or_none(path) == before.batch
            if not (is_same and place.newest_run(path) == before.run):
                return None
            _write(path, batch, items, before, wishes)
    except place.Held as held:
        if not _is_same(batch, items, before, wishes):
            raise held.refusal() from None
        report |= {"running_task": held.holder.task, "running_pid": held.holder.pid}
    return report


def _look(path: str, wishes: Wishes) -> _Before:
    run = place.newest_run(path)
    batch = place.load_or_none(path)
    if batch is None:
        return _Before(None, {}, Facts(), run)
    items = {item.key: item for item in place.load_items(path)}
    known = Facts() if wishes.is_fresh else ledger.read(path, batch)
    return _Before(batch, items, known, run)


def _settle_cwd(wanted: Spec, before: Batch | None) -> None:
    config = wanted.config
    if not config.cwd:
        config.cwd = before.config.cwd if before else os.getcwd()
    config.cwd = os.path.abspath(config.cwd)
    if not os.path.isdir(config.cwd):
        raise Refused(f"the working directory {config.cwd} is not there", "nothing was changed")


def _look_at_program(name: str, path: str, wanted: Spec) -> None:
    """Refuse a program or a function that is not there, before anything is submitted."""
    env = itemdir.base_environment(path, name, os.environ)
    del env[itemdir.RUN_VARIABLE]  # this look is no part of a run: see itemdir.py
    if wanted.config.argv:
        check_program(wanted.config, env)
    else:
        check_function(wanted.config, wanted.knobs.interpreter or sys.executable, env)


def _items_of(
    wanted: Spec, before: _Before, wishes: Wishes, sources: _Sources
) -> tuple[dict[str, Item], source.Taken | None]:
    if wanted.source is None:
        if before.batch is None:
            raise Refused("no items given", "--items FILE, --items - or --items-from 'COMMAND'")
        return before.items, None
    taken = sources.take(wanted.source)
    if not taken.items and not wishes.allows_empty:
        raise Refused(
            "there are no items: the source is empty",
            "if that can happen, say --allow-empty; nothing was changed",
            code=BAD_DATA,
        )
    return taken.items, taken


def _merged(name: str, wanted: Spec, before: _Before, wishes: Wishes, keys: list[str]) -> Batch:
    old = before.batch
    if old is None:
        batch = place.new_batch(name, wanted.config, wanted.knobs)
    else:
        batch = replace(
            old,
            config=wanted.config,
            digest=spec.digest(wanted.config),
            knobs=wanted.knobs,
            accepted=list(old.accepted),
        )
        if batch.digest != old.digest and not wishes.is_fresh:
            _accept(old, batch, wishes)
    batch.next = Next(
        base_run=before.run,
        statuses=check_statuses(wishes.statuses),
        only=check_only(wishes.only, keys),
    )
    return batch


def _accept(old: Batch, new: Batch, wishes: Wishes) -> None:
    changes = spec.diff(old.config, new.config)
    if not wishes.accepts_config:
        raise Refused(
            f"the config of batch {old.name} changed; its results are of the old one",
            "\n".join(
                [
                    *changes,
                    "--accept-config keeps the results and goes on with the new config,",
                    "--fresh archives them and starts anew, another --name leaves both alone;",
                    "nothing was changed",
                ]
            ),
            code=CONFLICT,
        )
    new.accepted.append(Accepted(time.time_ns(), old.digest, new.digest, changes))


def _is_same(batch: Batch, items: dict[str, Item], before: _Before, wishes: Wishes) -> bool:
    """Return whether this submit asks for no more than what is running already."""
    old = before.batch
    asks = wishes.is_fresh or wishes.statuses or wishes.only
    return (
        not asks
        and old is not None
        and old.digest == batch.digest
        and items.keys() == before.items.keys()
    )


def _write(
    path: str, batch: Batch, items: dict[str, Item], before: _Before, wishes: Wishes
) -> None:
    """Crash: list new, `batch.json` old: the next run takes the new list, as it would later.

    Durable: all of it.
    """
    if wishes.is_fresh and before.batch is not None:
        batch.next.base_run = ledger.begin(path, fresh=True)
        fd = open_directory(path, os.getuid())
        try:
            remove_tree("items", fd)
        finally:
            os.close(fd)
    if items is not before.items:
        place.store_items(path, items.values())
        batch.items_at_ns = time.time_ns()
    place.store(path, batch)


def _report(
    path: str,
    batch: Batch,
    items: dict[str, Item],
    before: _Before,
    taken: source.Taken | None,
) -> dict[str, Any]:
    results = before.known.items
    new = sum(key not in before.items and key not in results for key in items)
    vanished = sum(key not in items for key in before.items)
    chosen = choose(batch, items.values(), before.known)
    warnings = list(taken.warnings) if taken else []
    fields = fields_of(items.values())
    for name in unknown_fields(batch.config.argv, fields):
        have = ", ".join(sorted(fields)[:8])
        warnings.append(f"{{{name}}} in the command is no field of the items; they have: {have}")
    if vanished:
        gone = count(vanished, "item is", "items are")
        warnings.append(f"{gone} no longer in the list; what was done of them is kept")
    changed = sum(
        item.value != before.items[key].value
        for key, item in items.items()
        if key in before.items and key in results
    )
    if changed:
        have = count(changed, "item has", "items have")
        warnings.append(f"{have} another content under a known key; done is done (see --only KEY)")
    return {
        "name": batch.name,
        "dir": path,
        "items": len(items),
        "new": new,
        "known": len(items) - new,
        "vanished": vanished,
        "duplicates": taken.duplicates if taken else 0,
        "done": sum(key in results for key in items),
        "todo": len(chosen.todo),
        "again": sum(item.key in results for item in chosen.todo),
        "running_task": None,
        "running_pid": None,
        "jobs": batch.knobs.workers,
        "warnings": warnings,
    }
