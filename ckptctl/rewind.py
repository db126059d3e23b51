"""`retry --from-step NAME TASK`: take a step and all that came after it back, before the retry.

`python -m ckptd.offline.checkpoint rewind` does it, as whoever calls: files belong to their task's
user. Crash: taken back, not retried yet; the same line again does the rest.
Read next: `change.py`, `ckptd/offline/rewind.py`.
"""

from ckptctl import offline, selectors
from ckptctl.call import Call
from ckptctl.words import clean
from ckptd.protocol.errors import BadRequest, Conflict
from ckptd.protocol.messages import Selector, Show, TaskDetails, TaskRow

_DUE_AGAIN = ("backoff", "transient", "rate_limit")  # waits that a retry cuts short
_TOLD_MAX = 20


def rewound(call: Call, step: str) -> Selector:
    """Take the steps of the one selected task back, tell which; return it, to be retried.

    Raises:
        BadRequest: more than one task, or --fresh as well. Conflict: it is not at rest.
        NotFound: it never did such a step; nothing was changed.
    """
    if call.args.fresh:
        raise BadRequest("--fresh forgets every step, --from-step some: give one of them")
    select = Selector(ids=(call.one_id(call.select()),))
    (detail,) = call.ask("show", Show(select), TaskDetails).tasks
    row = detail.row
    _refuse_unfit(row)
    made = offline.ask("rewind", detail.directory, str(row.id), str(row.attempt), step)
    names = [clean(name) for name in made["steps"]]
    more = f" and {len(names) - _TOLD_MAX} more" if len(names) > _TOLD_MAX else ""
    plural = "step" if len(names) == 1 else "steps"
    told = ", ".join(names[:_TOLD_MAX])
    call.note(f"task {row.id}: {len(names)} {plural} will run again: {told}{more}")
    return select


def _refuse_unfit(row: TaskRow) -> None:
    """Refuse what the daemon would not retry, before anything is changed."""
    if row.phase in selectors.ACTIVE:
        text = f"task {row.id} is {row.phase}: its steps are its own while an attempt lives"
        raise Conflict(text, f"ckptctl cancel {row.id}, then this again")
    if row.phase in ("queued", "held") or (row.phase == "waiting" and row.reason not in _DUE_AGAIN):
        waits = f", {row.reason}" if row.reason else ""
        text = f"task {row.id} has not ended ({row.phase}{waits}): it cannot be retried"
        raise Conflict(text, f"ckptctl explain {row.id}")
