"""How the batch part says no: one exception, a text, a hint, an exit code.

    ckptd batch: items.txt: line 3 holds a NUL byte: this is no text
      for names from `find -print0` say --format null; nothing was changed

Codes are those of `ckptd/protocol/errors.py` where they fit. Read next: `__main__.py`.
"""

import sys
from typing import Final, TextIO

FAILED: Final = 1
TRANSIENT: Final = 2
NOT_FOUND: Final = 4
CONFLICT: Final = 5
USAGE: Final = 64
BAD_DATA: Final = 65
LOST: Final = 74
PARKED: Final = 75
DENIED: Final = 77
INTERRUPTED: Final = 130


class Refused(Exception):
    """What was asked cannot be done; everything is as it was before."""

    def __init__(self, text: str, hint: str = "", *, code: int = USAGE) -> None:
        super().__init__(text)
        self.hint = hint
        self.code = code


def tell(refused: Refused, to: TextIO | None = None) -> int:
    """Print the text on one line and the hint below it; return the exit code."""
    out = to or sys.stderr
    print(f"ckptd batch: {refused}", file=out)
    for line in refused.hint.splitlines():
        print(f"  {line}", file=out)
    return refused.code


def count(number: int, one: str, many: str = "") -> str:
    """Return `1 item`, `3 items`, `1,500 items`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
