"""What one run of CI tries: the mistakes of the promises, and a part of all, drawn by the commit.

Invariant: each mutant is in exactly one of the N parts K/N, so that the parts make a whole run.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, Self

from tests.mutants.mutant import ROOT, Mutant

PAGE = ROOT / "docs" / "reliability.md"
EACH_S = 6.0  # of a mutant and its killers twice, two at a time: 4.7 s on two quiet cores
BEGIN_S = 20.0
_PROMISE = re.compile(r"^\| \d+ \| \*\*.*\| ([^|]+) \|$", re.MULTILINE)


class Part(NamedTuple):
    """Part K of N, from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        """Return it as it is asked for."""
        return f"{self.number}/{self.count}"

    @classmethod
    def parsed(cls, text: str) -> Self:
        """Return what `3/8` means. Raises ValueError."""
        number, count = (int(word) for word in text.split("/"))
        if not 1 <= number <= count:
            raise ValueError(f"there is no part {text}")
        return cls(number, count)

    @classmethod
    def drawn(cls, commit: str, count: int) -> Self:
        """Return the part of this commit: any of them, and for one commit always the same."""
        return cls(int(commit, 16) % count + 1, count)

    def of(self, mutants: Sequence[Mutant]) -> list[Mutant]:
        """Return what is in this part."""
        return [one for at, one in enumerate(mutants) if at % self.count == self.number - 1]


def promised(page: str) -> list[str]:
    """Return the ids that the table of the promises names."""
    return [one for cell in _PROMISE.findall(page) for one in re.findall(r"`([^`]+)`", cell)]


def count_within(seconds: float, mutants: int, first: int) -> int:
    """Return the least number of parts of which one fits, beside `first` others, into a time.

    0: not even the smallest part does.
    """
    room = int((seconds - BEGIN_S) / EACH_S) - first
    return -(-mutants // room) if room > 0 else 0
