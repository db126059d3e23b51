"""How fast: the rate, how many at once, and the waits that a rate limit brings.

A limit that was hit halves how many run at once, once for each wait; a success window later one
more may run, up to the jobs asked for. (Source: AIMD, Chiu and Jain 1989.) Waits lie in the
bucket of the scope, so other batches and tasks wait as well, and so does this one after a reboot.
Without a scope a batch has a bucket of its own. Read next: `ckptd/sdk/rate.py`.
"""

import contextlib
import random
from typing import Final

from ckptd.batch.place import Batch
from ckptd.batch.spec import parse_rate
from ckptd.sdk.rate import Bucket

TRANSIENT_S: Final = 1.0  # first wait where nobody said how long; doubles
TRANSIENT_S_MAX: Final = 60.0
_DOUBLINGS_MAX: Final = 10
_JITTER: Final = 0.1
_LOOK_S: Final = 0.2  # a scope that others may block is looked at this often while nothing starts


class Pace:
    """When the next item may start, and how many at once."""

    def __init__(self, batch: Batch, now_s: float) -> None:
        """Open the bucket.

        Raises:
            OSError: the directory of scopes cannot be used.
        """
        knobs = batch.knobs
        self.jobs = knobs.workers
        self.limit = self.jobs  # how many may run at once now
        self.scope = knobs.scope or f"batch-{batch.id:x}"
        self._is_shared = bool(knobs.scope)
        self._rate = parse_rate(knobs.rate)
        self._bucket = Bucket(self.scope)
        self._until_s = now_s + self._bucket.wait_s()  # monotonic
        self._limited_s = self._until_s  # the same, the rate's own spacing aside
        self._looked_s = 0.0
        self._in_a_row = 0  # limits hit without a success between
        self._successes = 0
        self.why = "rate_limit"

    @property
    def warning(self) -> str:
        """Return what was wrong with the scope's file, if anything."""
        return self._bucket.warning

    def wait_s(self, now_s: float) -> float:
        """Return for how long nothing may start, as far as is known without taking anything."""
        if self._is_shared and now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            self._limited(self._bucket.wait_s(), now_s)
        return max(0.0, self._until_s - now_s)

    def take(self, now_s: float) -> float:
        """Take the right to start one item and return 0; or return the wait in seconds."""
        wait_s = self.wait_s(now_s)
        if not wait_s and self._rate:
            wait_s = self._bucket.take(self._rate)
            self._until_s = max(self._until_s, now_s + wait_s)
        return wait_s

    def hit(self, retry_after_s: float, scope: str, now_s: float) -> float:
        """Take note of a limit that an item met; return the wait that follows.

        Durable: a wait of over a second.
        """
        is_first = not self._until_s > now_s
        if is_first:
            self.limit = max(1, self.limit // 2)
            self._in_a_row += 1
        self._successes = 0
        self.why = "rate_limit" if retry_after_s else "transient"
        doublings = min(self._in_a_row - 1, _DOUBLINGS_MAX)
        wait_s = retry_after_s or min(TRANSIENT_S * 2.0**doublings, TRANSIENT_S_MAX)
        wait_s *= 1 + random.random() * _JITTER  # noqa: S311 (no secret)
        self._bucket.block(wait_s)
        if scope and scope != self.scope:
            with contextlib.suppress(ValueError, OSError):  # a name that the item made up
                Bucket(scope).block(wait_s)
        self._limited(wait_s, now_s)
        return wait_s

    def hold(self, seconds: float, why: str, now_s: float) -> None:
        """Let nothing start for some seconds: a preflight said so."""
        self.why = why
        self._bucket.block(seconds)
        self._limited(seconds, now_s)

    def is_limited(self, now_s: float) -> bool:
        """Return whether it is more than the rate that keeps the next item back."""
        return self._limited_s > now_s

    def _limited(self, seconds: float, now_s: float) -> None:
        self._until_s = max(self._until_s, now_s + seconds)
        self._limited_s = max(self._limited_s, now_s + seconds)

    def succeeded(self) -> None:
        """Take note of an item that met no limit."""
        self._in_a_row = 0
        if self.limit < self.jobs:
            self._successes += 1
            if self._successes >= self.limit:
                self._successes = 0
                self.limit += 1
