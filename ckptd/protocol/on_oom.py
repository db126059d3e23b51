"""What is to become of a task that hits its own memory limit: the words for it, and their meaning.

    count                   a failure like any other: `retries` decides
    fail                    failed at once, whatever retries are left
    hold                    held, for a person to raise the limit and release it
    retry:x2,max=16G        again at once with twice the limit, up to 16 GiB; no failure is counted

One parser for clients, configuration and daemon, so that all of them refuse the same.
"""

import re
from typing import Final

import msgspec

FACTOR_MIN: Final = 1.1  # below it the same end comes again and again
FACTOR_MAX: Final = 100.0
BYTES_MAX: Final = 1 << 62
EXAMPLES: Final = "examples: retry:x2,max=16G fail hold count"
_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_RETRY: Final = re.compile(r"retry:x(\d+(?:\.\d+)?),max=(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?")


class OnOom(msgspec.Struct, frozen=True, gc=False):
    """What to do; `factor` and `max_bytes` are those of `retry`."""

    action: str  # count, fail, hold, retry
    factor: float = 0.0
    max_bytes: int = 0

    def next_bytes(self, limit_bytes: int) -> int:
        """Return the limit of the next attempt: `limit_bytes` itself where it does not grow."""
        if self.action != "retry":
            return limit_bytes
        return max(limit_bytes, min(self.max_bytes, int(limit_bytes * self.factor)))


def parse_on_oom(text: str) -> OnOom:
    """Return the meaning of a text, "" being `count`. Raises ValueError, with what is wrong."""
    if text in ("", "count", "fail", "hold"):
        return OnOom(text or "count")
    if text.partition(":")[0] != "retry":
        raise ValueError(f"{text[:80]!r} is none of count, fail, hold, retry:xF,max=SIZE")
    found = _RETRY.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:80]!r} needs a factor and a largest limit, retry:xF,max=SIZE")
    factor, most = float(found[1]), float(found[2]) * _UNITS[found[3]]
    if not FACTOR_MIN <= factor <= FACTOR_MAX:
        raise ValueError(f"the factor {found[1]} is not from {FACTOR_MIN} to {FACTOR_MAX:g}")
    if not 1 <= most < BYTES_MAX:
        raise ValueError(f"max={found[2]}{found[3]} is not from 1 byte to 4 EiB")
    return OnOom("retry", factor, int(most))
