"""What the doctor says: findings, one line each, with one line of what to do.

Read next: `place.py` (what is looked at), `__main__.py` (in which order).
"""

from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

from ckptd.doctor.place import Place

Level = Literal["ok", "warn", "bad"]
"""bad: ckptd does not work, or may lose something. warn: it works, and could be better."""


class Finding(msgspec.Struct, frozen=True):
    """One line: what was looked at, how it is, and what to do."""

    name: str
    level: Level
    text: str
    advice: str = ""


class Report(msgspec.Struct, frozen=True):
    """All findings, as `-o json` prints them."""

    schema: str
    fit: bool
    findings: tuple[Finding, ...]


Check = Callable[[Place], Iterator[Finding]]
"""Yields none where there is nothing to look at. Bound: a few seconds; it never raises."""


def ok(name: str, text: str) -> Finding:
    """Return that all is well."""
    return Finding(name, "ok", text)


def warn(name: str, text: str, advice: str) -> Finding:
    """Return what works, and could be better."""
    return Finding(name, "warn", text, advice)


def bad(name: str, text: str, advice: str) -> Finding:
    """Return what does not work, or may lose something."""
    return Finding(name, "bad", text, advice)
