"""Drive a task's function through one attempt: from what is stored to a result that is stored.

Here alone an exception becomes what the daemon is told: a wish to wait, a problem to look at.
Read next: `run.py` (below the daemon), `local.py` (without one).
"""

import threading
from typing import Any

from ckptd.sdk.context import SyncResumableContext
from ckptd.sdk.outcomes import (
    CorruptCheckpointError,
    RateLimited,
    StateVersionError,
    TransientError,
)
from ckptd.sdk.surroundings import Surroundings
from ckptd.sdk.values import decode, encode
from ckptd.sdk.waits import WARN_AFTER_S, limit_wait_s
from ckptd.sdk.work import Ports, Work, input_digest
from ckptd.storage import facts
from ckptd.storage.journal import Journal


def drive(work: Work, *, park_after_s: float) -> Any:
    """Call the task's function; return its result, which is durable then.

    Raises:
        StopRequested: asked to stop, or parked. TransientError: its wish to wait is durable.
        ValueError: it has a result already, of other input.
        Whatever else the function raises.

    Durable: the result.
    """
    if work.known.result:
        return _remembered(work)
    try:
        result = _called(work, park_after_s)
    except TransientError as error:
        if error.retry_after_s > 0:
            _tell_wait(work, error)
        raise
    work.settle()
    stored = encode(result, "the result of the task")
    work.record({**facts.result_made(stored), "input": input_digest(work.given)})
    return decode(stored)


def _remembered(work: Work) -> Any:
    """Return the result that an earlier attempt came to, from the same input."""
    if work.known.result.get("input", "") not in {"", input_digest(work.given)}:
        raise ValueError(
            f"the task in {work.around.dir} is done, and not with the input that is given now: "
            "use another directory, or again=True to start over"
        )
    return decode(work.known.result["value"])


def _tell_wait(work: Work, error: TransientError) -> None:
    """Durable: the wish to wait; and for a rate limit, that of all who share its scope."""
    scope = error.scope if isinstance(error, RateLimited) else ""
    if scope:
        limit_wait_s(scope, error.retry_after_s, None)
    wish_s = min(error.retry_after_s, facts.RETRY_AFTER_S_MAX)
    work.record(facts.retry_after(wish_s, scope))


def _called(work: Work, park_after_s: float) -> Any:
    function, given = work.task.function, work.given
    if work.task.is_async:
        from ckptd.sdk.aio import run_async  # noqa: PLC0415  (asyncio costs 50 ms)

        return run_async(work, park_after_s)
    ctx = SyncResumableContext(work, park_after_s=park_after_s)
    warning = threading.Timer(WARN_AFTER_S, ctx._warn_without_safe_point)
    warning.daemon = True
    warning.start()
    try:
        return function(ctx, **given)
    finally:
        warning.cancel()


def opened(around: Surroundings, task: Any, given: dict[str, Any], ports: Ports | None) -> Work:
    """Return the attempt's work; what cannot be gone on from is told to the daemon, too.

    Raises:
        StateVersionError, CorruptCheckpointError: with the problem durable in the journal.

    Durable: the problem.
    """
    try:
        return Work(around, task, given, ports)
    except StateVersionError as error:
        _tell_problem(around, str(error), "version")
        raise
    except CorruptCheckpointError as error:
        _tell_problem(around, str(error), "corrupt")
        raise


def _tell_problem(around: Surroundings, text: str, why: str) -> None:
    journal = Journal(around.dir, around.task, around.attempt, around.epoch)
    try:
        journal.append([facts.problem(text, why)])
    except Exception as error:  # noqa: BLE001 - the daemon finds a damaged journal by itself
        text = f"{text} (not recorded: {error})"
    finally:
        journal.close()
