"""The marks: system calls at which a kill can hurt, how often each was met, which to aim at next.

A mark reads `KIND before CALL` or `KIND after CALL`.
"""

import random
from collections import Counter
from typing import Final

_CALLS: Final = {  # all of these classes that are made while there is work, counted over a run
    "daemon": ("sync", "write", "rename", "link", "unlink", "open", "lock", "fork", "send"),
    "shim": ("sync", "write", "link", "unlink", "open", "fork", "exit", "send"),
    "parent": ("fork",),
    "task": (
        "sync", "write", "rename", "unlink", "open", "lock", "fork", "exec", "exit", "send",
    ),
    "batch": (
        "sync", "write", "rename", "unlink", "open", "lock", "fork", "exec", "exit", "send",
    ),
}  # fmt: skip
MARKS: Final = tuple(
    f"{kind} {when} {call}"
    for kind, calls in _CALLS.items()
    for call in calls
    for when in ("before", "after")
    if (when, call) != ("after", "exit")
)
ALONE: Final = frozenset({"shim before exit"})
"""Aimed at only where it is asked for: while the daemon lives no supervisor ends."""
RARE: Final = frozenset({"daemon before link", "daemon after link"})
"""Made only where somebody was killed within a moment of it: three times in a minute, or never."""
VAIN_MAX: Final = 60
_LEAST: Final = 0.7


class Marks:
    """What was aimed at, and what was met."""

    def __init__(self, chance: random.Random) -> None:
        self.met: Counter[str] = Counter()
        self.vain: Counter[str] = Counter()  # by mark: there was somebody, and did not come to it
        self._chance = chance

    def aims(self, parts: tuple[str, ...]) -> list[str]:
        """Return the marks to kill at next, of those that begin so: the least met, or any half."""
        known = [mark for mark in MARKS if mark.startswith(parts)]
        if len(parts[0].split()) == 1:
            known = [mark for mark in known if mark not in ALONE]
        if self._chance.random() < _LEAST:
            least = min(self.met[mark] for mark in known)
            return [mark for mark in known if self.met[mark] == least]
        return self._chance.sample(known, (len(known) + 1) // 2)

    def told(self) -> dict[str, dict[str, int]]:
        """Return for each mark how often somebody was killed there, and how often nobody came."""
        return {mark: {"met": self.met[mark], "vain": self.vain[mark]} for mark in MARKS}

    def missed(self) -> list[str]:
        """Return the marks at which nobody was killed."""
        return [mark for mark in MARKS if not self.met[mark]]

    def unreachable(self) -> list[str]:
        """Return what is wrong with the marks: a run that is long enough meets each of them."""
        return [
            f"unreachable: {mark}, aimed at in vain {self.vain[mark]} times"
            for mark in self.missed()
            if self.vain[mark] >= VAIN_MAX and mark not in RARE
        ]
