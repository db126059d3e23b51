"""Which items the next run is about, and in which order: pure, from list, ledger and wishes.

An item with any result is done, whatever the result: "completed means attempted". A wish
(`--retry-errors`, `--only`) makes results of runs up to `base_run` count as old; what such an
item came to since then is new, so a run that was killed half-way carries on where it was and
starts nothing over. Read next: `runner.py`.
"""

import difflib
import math
import random
from collections.abc import Iterable
from typing import Final, NamedTuple

from ckptd.batch.place import Batch, Item
from ckptd.batch.refusal import NOT_FOUND, Refused
from ckptd.batch.spec import Knobs, parse_max_errors
from ckptd.storage.facts import STATUSES, Facts

BAD: Final = frozenset(("fail", "error", "quarantined"))
_SHOWN: Final = 3


class Chosen(NamedTuple):
    """What a run is about."""

    todo: list[Item]  # in the order to hand out; cut off at the limit
    left: int  # would run, too, were it not for the limit
    selected: int  # todo, and what this selection has brought about already
    bad: int  # of those, how many ended badly


def choose(batch: Batch, items: Iterable[Item], known: Facts) -> Chosen:
    """Return the items to run and what was done of the same selection before."""
    wish, only = batch.next, set(batch.next.only)
    todo: list[Item] = []
    done_now = bad_now = 0
    for item in items:
        if only and item.key not in only:
            continue
        result = known.items.get(item.key)
        if result is None:
            todo.append(item)
        elif int(result["attempt"]) > wish.base_run:
            done_now += 1
            bad_now += result["status"] in BAD
        elif only or result["status"] in wish.statuses:
            todo.append(item)
    selected = len(todo) + done_now
    if batch.knobs.shuffle:
        seed = batch.id if batch.knobs.seed is None else batch.knobs.seed
        random.Random(seed).shuffle(todo)  # noqa: S311 (an order, no secret)
    limit = batch.knobs.limit
    room = max(0, limit - done_now) if limit else len(todo)
    return Chosen(todo[:room], len(todo) - min(room, len(todo)), selected, bad_now)


def errors_allowed(knobs: Knobs, selected: int) -> float:
    """Return how many bad ends a run may have; one more stops it."""
    number, is_percent = parse_max_errors(knobs.max_errors)
    if number < 0:
        return math.inf
    return number / 100 * selected if is_percent else number


def check_statuses(statuses: Iterable[str]) -> list[str]:
    """Return statuses to be retried, each once.

    Raises:
        Refused: not one of STATUSES.
    """
    found = list(dict.fromkeys(statuses))
    for status in found:
        if status not in STATUSES:
            raise Refused(f"unknown status {status!r}", f"known: {', '.join(STATUSES)}")
    return found


def check_only(only: Iterable[str], keys: Iterable[str]) -> list[str]:
    """Return keys that are in the list.

    Raises:
        Refused: one is not; the nearest that are get named.
    """
    found, known = list(dict.fromkeys(only)), set(keys)
    for key in found:
        if key not in known:
            near = (
                difflib.get_close_matches(key, known, _SHOWN, 0.6) if len(known) < 100_000 else []
            )
            hint = f"did you mean: {', '.join(near)}" if near else "see: ckptctl batch items NAME"
            raise Refused(f"no item has the key {key!r}", hint, code=NOT_FOUND)
    return found
