"""What clients asked for, and when it may have taken effect: between two moments, if at all."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

NEVER = 1 << 62
STARTERS = frozenset({"retry", "release", "resume"})


class Violation(AssertionError):
    """A promise is broken."""


def hold(is_true: bool, what: str) -> None:  # noqa: FBT001 - it reads as the promise
    if not is_true:
        raise Violation(what)


@dataclass
class Asked:
    """One mutating request: it takes effect, if at all, between its two moments."""

    request: str
    verb: str
    args: dict[str, Any]
    sent: int
    answered: int = NEVER
    issued: int = NEVER  # when the daemon answered, heard or not: it has taken effect by then
    issued_ns: int = NEVER  # likewise, of time that really passed
    given: dict[str, Any] | None = None  # what it answered
    result: dict[str, Any] | None = None
    is_refused: bool = False
    copies: int = 1  # sent so far: a refused request may be carried out by a later copy
    wire: bytes = b""

    def may_concern(self, task: int) -> bool:
        """Tell whether it may have changed the task."""
        if self.is_refused:
            return False
        if self.given is None:
            ids = self.args.get("select", {}).get("ids")
            return not ids or task in ids
        return any(row["id"] == task for row in self.changed())

    def has_put(self, task: int, phase: str) -> bool:
        """Tell whether it was answered that the task is in that phase by it."""
        return any((row["id"], row["phase"]) == (task, phase) for row in self.changed())

    def changed(self) -> list[dict[str, Any]]:
        """Return the tasks that it was answered for without an error."""
        rows = self.given.get("tasks", ()) if self.given is not None else ()
        return [row for row in rows if row.get("error") is None]


def may_have(
    asked: Iterable[Asked], task: int, verbs: frozenset[str], since: int, until: int = NEVER
) -> bool:
    """Tell whether a request of these verbs may have changed the task between the two."""
    return any(
        one.verb in verbs and one.answered > since and one.sent < until and one.may_concern(task)
        for one in asked
    )


def standing(writes: list[Asked], seen_at: int) -> tuple[list[Asked], bool]:
    """Return which of these may have been the last one, for who looks from then on.

    And whether it may be that none of them has taken effect yet. One that was carried out before
    another was sent, which was itself carried out before the look, is no more to be seen.
    """
    done = [one for one in writes if one.issued < seen_at]
    last = max((one.sent for one in done), default=-1)
    return [one for one in writes if one.issued > last], not done
