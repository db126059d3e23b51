"""Waits that outlive the process: parking, and limits that are shared with others.

A wait of more than ten seconds gives the slot back: state saved, a durable `retry_after`, exit 75;
the daemon starts the task again when it is due, also after a reboot. Read next: `rate.py`.
"""

import time
from typing import Final

from ckptd.sdk.rate import Bucket, parse_rate, parse_retry_after
from ckptd.sdk.work import Draft, Work
from ckptd.storage import facts
from ckptd.storage.journal import Fact

PARK_AFTER_S: Final = 10.0
WARN_AFTER_S: Final = 60.0  # a task that could not be resumed by then hears of it
LOOK_EVERY_S: Final = 1.0  # at the control file while waiting; SIGTERM ends a wait at once


def limit_wait_s(scope: str, retry_after: float | str | None, rate: str | None) -> float:
    """Return how long to wait for a scope, after telling it what is known.

    Durable: the limit that `retry_after` sets.
    """
    bucket = Bucket(scope)
    if retry_after is not None:
        bucket.block(parse_retry_after(str(retry_after), time.time()))
    if rate is not None:
        return bucket.take(parse_rate(rate))
    return bucket.wait_s()


def parking_draft(work: Work) -> Draft:
    """Return the checkpoint to save before the process ends for a wait."""
    return work.draft(reason="park", parked_at_ns=time.time_ns(), pause_count=work.pauses + 1)


def parking_fact(until_s: float, scope: str) -> Fact:
    """Return the wish to be started again; longer waits than a day are parked again."""
    left_s = min(max(0.0, until_s - time.time()), facts.RETRY_AFTER_S_MAX)
    return facts.retry_after(left_s, scope)
