"""What must hold after a drill: from what was seen to checks that hold, do not, or are not proven.

A check passes by evidence alone: what was not seen is None. An end that says nothing about the
blow is no check but a Conflict. Read next: `drill.py` (who does the damage).
"""

import signal
from collections.abc import Iterable
from typing import Final

import msgspec

from ckptctl import drill_counts, units
from ckptctl.drill_watch import Story, is_pending
from ckptctl.saving import unsealed
from ckptd.protocol.errors import Conflict
from ckptd.protocol.messages import CheckpointRow, Event, TaskRow

_OTHERS: Final = frozenset({"cancel", "kill", "timeout", "deadline", "shutdown", "stopped"})
_NOT_BY_THE_DAEMON: Final = frozenset(  # a stop that the log gives the reason of, or the kernel
    {"cancel", "kill", "timeout", "deadline", "drill", "drill_oom", "oom"}
)
_UNTOLD: Final = frozenset({"lost", "reboot", "not_started"})  # nobody was there to see it


class Check(msgspec.Struct, frozen=True):
    """One thing that must hold; None: it was not seen in time, so nobody knows."""

    name: str
    holds: bool | None
    text: str


def check_hit(how: str, story: Story) -> None:
    """Raise Conflict where the attempt ended of something else than the blow."""
    if story.death is None:
        return
    task, cause = story.before.row.id, story.death.fields["cause"]
    if story.death.fields["verdict"]["phase"] == "succeeded":
        code = f"exit {story.death.fields['code']}"
        raise Conflict(
            f"task {task} was done before the blow ended it ({code}): nothing is proven",
            "one that leaves when it is asked to, and is not done, exits with 75"
            if how == "sigterm"
            else "",
        )
    _check_ended_later(story, story.death)
    if cause in _OTHERS:
        raise _ended_by_others(story, story.death)


def check_left_alone(story: Story) -> None:
    """Raise Conflict where one whose daemon was hit ended, and its end says nothing about that.

    An exit code may be the task's answer to a SIGTERM that came with its daemon's death: it is
    the task's own only where it was seen to live under the next daemon.
    """
    ended = story.death
    if ended is None:
        return
    _check_ended_later(story, ended)
    if ended.fields["cause"] in _NOT_BY_THE_DAEMON:
        raise _ended_by_others(story, ended)
    if ended.fields["cause"] == "exit" and not story.has_lived:
        raise Conflict(
            f"task {story.before.row.id} ended while its daemon was away (exit"
            f" {ended.fields['code']}): nothing tells whether by itself, so nothing is proven",
            "try again with a task that runs on",
        )


def _check_ended_later(story: Story, ended: Event) -> None:
    if ended.fields["ended_ns"] < story.hit_ns:
        raise Conflict(
            f"task {story.before.row.id} had ended before the blow ({how_it_ended(ended)}):"
            " nothing is proven"
        )


def _ended_by_others(story: Story, ended: Event) -> Conflict:
    task, cause = story.before.row.id, ended.fields["cause"]
    return Conflict(
        f"task {task} was ended by something else meanwhile ({cause}): nothing is proven",
        f"see: ckptctl explain {task}",
    )


def checks_of_task(how: str, story: Story, saved: Iterable[CheckpointRow]) -> list[Check]:
    """Return what must hold after the task was killed."""
    left = [_left(story)] if how == "sigterm" else []
    return [_cause(how, story), *left, _one_at_a_time(story), _resumed(story),
            _verified(story, saved), _goes_on(story)]  # fmt: skip


def checks_of_daemon(
    story: Story, row: TaskRow, epochs: tuple[int, int], saved: Iterable[CheckpointRow]
) -> list[Check]:
    """Return what must hold after the daemon was killed: the task has not noticed."""
    return [
        _reigns(story, row, epochs),
        _adopted(story, row),
        _no_second(story),
        _verified(story, saved),
        _goes_on(story),
    ]


def _reigns(story: Story, row: TaskRow, epochs: tuple[int, int]) -> Check:
    was, now = epochs
    if row.submitted_ns != story.before.row.submitted_ns:
        return Check("daemon", False, f"it has another log: its task {row.id} is not this one")
    return Check("daemon", now > was, f"a new reign over the same log: epoch {was}, now {now}")


def _adopted(story: Story, row: TaskRow) -> Check:
    """Check that the attempt lived on. A signal is never told as its own doing."""
    before, ended = story.before, story.death
    name = f"attempt {before.row.attempt}, pid {before.row.pid}"
    if ended is not None and ended.fields["cause"] == "exit":
        holds = True if story.has_lived else None
        text = "lived on, then ended by itself" if holds else "ended, nobody knows of what"
        return Check("adopted", holds, f"{name} {text}: {how_it_ended(ended)}")
    if ended is not None:
        return Check("adopted", False, f"{name} did not live on: {how_it_ended(ended)}")
    if not story.is_looked_at:
        return Check("adopted", None, f"{name}: the new daemon did not tell of it in time")
    if story.has_moved or (row.attempt, row.pid) != (before.row.attempt, before.row.pid):
        return Check("adopted", False, f"{name} is gone, and its end was not told")
    if not story.has_lived:
        return Check("adopted", None, f"{name} is told to run; it was neither seen nor heard")
    return Check("adopted", True, f"{name} lived on")


def _no_second(story: Story) -> Check:
    """Check that nobody was started beside an attempt that was left alone."""
    death, orders = story.death, story.intents
    if story.start is not None:
        return _one_at_a_time(story)
    if not orders:
        holds = True if story.is_looked_at else None
        return Check("fence", holds, "no second attempt was ordered" if holds else "not read")
    lsns = ", ".join(str(one.lsn) for one in orders)
    if death is None:
        return Check("fence", False, f"a second attempt was ordered beside it: LSN {lsns}")
    holds = len(orders) == 1 and death.lsn < orders[0].lsn
    text = f"a second attempt was ordered: LSN of the first one's end {death.lsn}, of the order"
    return Check("fence", holds, f"{text} {lsns}")


def _cause(how: str, story: Story) -> Check:
    ended = story.death
    if ended is None:
        return Check("cause", False, "its end was never told")
    cause, verdict = ended.fields["cause"], ended.fields["verdict"]
    wanted = {"kill9": "drill", "sigterm": "drill", "oom": "oom"}[how]
    is_free = verdict["failures"] == story.before.row.failures
    counted = "no failure counted" if is_free else "a failure was counted"
    phase = "" if verdict["phase"] == "queued" else f"; now {verdict['phase']}"
    is_told = cause == wanted or (how == "oom" and ended.fields["blame"] == "limit")  # a child
    holds = is_told and verdict["phase"] == "queued" and is_free
    return Check("cause", holds, f"{how_it_ended(ended)}; {counted}{phase}")


def _left(story: Story) -> Check:
    """Check that it left when it was told to: by itself, or by the stop signal."""
    ended = story.death
    if ended is None:
        return Check("left", False, "its end was never told")
    number, code = ended.fields["signal"], ended.fields["code"]
    if number == signal.SIGKILL and story.is_forced:
        grace = units.duration_text(story.grace_s)
        return Check("left", False, f"it had to be killed after its grace of {grace}")
    if number == signal.SIGKILL:
        return Check("left", None, "somebody else killed it before its grace was over")
    text = f"it was ended by {units.signal_name(number)}" if number else f"it left with exit {code}"
    return Check("left", True, text)


def how_it_ended(ended: Event) -> str:
    """Return the code or signal of an end, and what it is put down to."""
    fields = ended.fields
    number = fields["signal"]
    how = units.signal_name(number) if number else f"exit {fields['code']}"
    if not number and fields["cause"] in _UNTOLD:
        how = "no exit status"
    return f"{how}, recorded as {fields['cause']}"


def _one_at_a_time(story: Story) -> Check:
    """Check that the old attempt was over, on record and in truth, before the next was ordered."""
    death, start, before = story.death, story.start, story.before
    if start is None:
        return Check("fence", False, "no attempt began after it")
    if death is None:
        return Check("fence", False, f"attempt {start.attempt} began, and no end was told before")
    orders = [one for one in story.intents if one.attempt == start.attempt]
    in_order = len(orders) == 1 and death.lsn < orders[0].lsn < start.lsn
    in_order = in_order and all(death.lsn < one.lsn for one in story.intents)
    seen = f"pid {before.row.pid} {'was gone' if story.was_gone else 'still lived'}"
    is_seen = story.was_gone is not None
    gone = f"{seen} when attempt {start.attempt} ran" if is_seen else "its pid cannot be seen"
    lsns = ", ".join(str(one.lsn) for one in orders) or "none"
    text = f"{gone}; LSN of its end {death.lsn}, of the next order {lsns}"
    return Check("fence", story.was_gone if in_order else False, text)


def _resumed(story: Story) -> Check:
    newest = story.saved
    if story.start is None:
        return Check("checkpoint", False, f"nobody resumed; the newest is {newest}")
    used = int(story.start.fields["resumed_from"])
    if not newest and not used:
        has_journal = story.death is not None and story.death.fields["cursor"]
        anew = "it goes on from its journal" if has_journal else "it began anew"
        return Check("checkpoint", True, f"none was saved, {anew}")
    text = f"resumed from {used}, the newest was {newest}"
    if used < newest:
        return Check("checkpoint", False, text)
    began, base = drill_counts.fallen_back(story), story.base
    if began is not None and base is not None:
        said = f"though checkpoint {used} says {_count_text(base.done, base.total)}"
        text = f"it was at {_count_text(began, base.total)} again, {said}; {text}"
    elif not drill_counts.went_on(story):
        text = f"it was handed checkpoint {used}, the newest was {newest}; {_unseen(story)}"
    return Check("checkpoint", drill_counts.went_on(story), text)


def _unseen(story: Story) -> str:
    """Return why nobody knows whether it went on from what it was handed."""
    if story.handed is None:
        return "that was deleted before it was read; whether it went on, nobody saw"
    if story.base is None:
        return "whether it went on from there, nothing says"
    said = _count_text(story.base.done, story.base.total)
    return f"that says {said}; its own count was not seen to go on from there"


def _count_text(done: float, total: float) -> str:
    return "/".join(units.number_text(one) for one in (done, *((total,) if total else ())))


def _verified(story: Story, saved: Iterable[CheckpointRow]) -> Check:
    rows = list(saved)
    newest = max((row.seq for row in rows), default=0)
    if newest < story.saved and not story.is_finished:
        return Check("verify", False, f"checkpoint {story.saved} is gone; the newest is {newest}")
    late = unsealed(rows)
    bad = [str(row.seq) for row in rows if not row.valid and row.seq not in late]
    if bad:
        return Check("verify", False, f"bad: {', '.join(bad)}")
    if not rows:
        return Check("verify", True, "there are no checkpoints")
    read = len(rows) - len(late)
    count = "1 checkpoint" if read == 1 else f"{read} checkpoints"
    more = f"; {len(late)} not sealed yet" if late else ""
    return Check("verify", True if read else None, f"{count} read again, every byte{more}")


def _goes_on(story: Story) -> Check:
    if story.start is None and story.death is not None and is_pending(story.death):
        return Check("progress", None, "its next attempt was not seen to run in time")
    ended = story.end or (story.death if story.start is None else None)
    if ended is not None and not (is_pending(ended) and story.sign_ns):
        phase = ended.fields["verdict"]["phase"]
        return Check("progress", phase == "succeeded", f"{how_it_ended(ended)}; now {phase}")
    if story.sign_ns:
        return Check("progress", True, "it saved, or said that it got on")
    if not story.is_running:
        return Check("progress", None, "it was not seen to run in time")
    if not story.is_telling:
        return Check("progress", True, "it runs; it had not said how far it is")
    return Check("progress", None, "it runs; not seen to get on in time")
