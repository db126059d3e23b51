"""Exit statuses as the daemon told them, against how the attempts ended by their own facts."""

from collections.abc import Iterator
from signal import SIGKILL
from typing import Final

from tests.torture import works
from tests.torture.evidence import Attempt, Fact, Strikes, Told

_DELIVERED_NS: Final = 2_000_000_000  # a signal has arrived by then
_REVIVED_NS: Final = 10_000_000_000  # a daemon that was killed has a successor by then
_ENOUGH: Final = 10  # signals, so that none of them may miss its mark by chance


def of_work(work: str, kind: str, facts: list[Fact], told: Told, strikes: Strikes) -> Iterator[str]:
    """Yield what is untrue of the ends of one task."""
    ends = {fact.attempt: int(fact.argument) for fact in facts if fact.what == "end"}
    pids = {fact.attempt: fact.pid for fact in facts}
    task = facts[0].task
    for number, one in told.attempts[task].items():
        where = f"{work} ({kind}), task {task}, attempt {number}"
        if number not in pids and one.is_ended:
            yield from _unseen(where, one, is_hit=strikes.hit(task, number, one, one.pid))
    for number, pid in pids.items():
        found = told.attempts[task].get(number)
        where = f"{work} ({kind}), task {task}, attempt {number}"
        if found is None or not found.is_ended:
            yield f"{where}: ran, and no end was ever told"
            continue
        if found.pid and found.pid != pid:
            yield f"{where}: told as pid {found.pid}, was {pid}"
        is_hit = strikes.hit(task, number, found, pid)
        yield from _exit(where, found, ends.get(number), is_hit=is_hit, kind=kind)
        yield from _cause(where, found, strikes, is_hit=is_hit)


def of_signals(told: Told, strikes: Strikes) -> Iterator[str]:
    """Yield where SIGKILL was answered, and nobody died of it.

    Most tasks are over soon, and a daemon may be killed before it sends what it has promised: so
    one alone shows something only if its task lived on for long, and so did the daemon.
    """
    asked = arrived = 0
    for task, attempts in told.attempts.items():
        for number, one in attempts.items():
            if not one.is_signalled or not one.is_ended:
                continue
            asked += 1
            is_hit = strikes.hit(task, number, one, one.pid)
            arrived += (one.cause, one.signal) == ("signal", SIGKILL) and not is_hit
            if one.cause == "exit" and _has_outlived(one, told.starts_ns):
                yield f"task {task}, attempt {number}: SIGKILL was answered, {_as_told(one)}"
    if asked >= _ENOUGH and not arrived:
        yield f"SIGKILL of {asked} attempts was answered, and none died of it"


def _has_outlived(one: Attempt, starts_ns: list[int]) -> bool:
    """Tell whether an attempt went on long after its signal, under the daemon that had it sent."""
    until_ns = one.over_ns + _REVIVED_NS
    if any(one.signalled_ns < at_ns <= until_ns for at_ns in starts_ns):
        return False
    return one.over_ns > one.signalled_ns + _DELIVERED_NS


def _as_told(one: Attempt) -> str:
    return f"told as {one.cause} {one.code} {one.signal}"


def _unseen(where: str, one: Attempt, *, is_hit: bool) -> Iterator[str]:
    """Judge an attempt that never came to its first fact.

    Done at once is in order where an earlier one came to its end; see `audit`.
    """
    is_in_order = one.cause == "not_started" or (one.cause, one.code) == ("exit", 0)
    if not (is_in_order or is_hit or one.is_touched):
        yield f"{where}: never began, {_as_told(one)}, and nobody had touched it"


def _exit(where: str, one: Attempt, code: int | None, *, is_hit: bool, kind: str) -> Iterator[str]:
    """Judge what was told as the task's own end. A stop may come between its word and its end."""
    if one.cause != "exit":
        return
    if code is None and one.code == 0:
        yield f"{where}: {_as_told(one)}, and it never came to its end"
    if is_hit or one.is_touched:
        return
    if code is None:
        yield f"{where}: {_as_told(one)}, without an end of its own"
    elif code != one.code:
        yield f"{where}: {_as_told(one)}, left with {code}"
    elif code not in works.CODES.get(kind, {0}):
        yield f"{where}: left with {code}, and nobody had touched it"


def _cause(where: str, one: Attempt, strikes: Strikes, *, is_hit: bool) -> Iterator[str]:
    """Every cause but the own exit needs somebody who brought it about."""
    match one.cause:
        case "exit":
            has_reason = True
        case "signal":
            has_reason = is_hit or one.is_signalled
        case "cancel" | "kill":
            has_reason = one.is_stopped
        case "lost":
            has_reason = strikes.hit_supervisor(one)
        case "reboot":
            has_reason = one.boot != one.ended_under
        case "not_started":
            yield f"{where}: ran, {_as_told(one)}"
            return
        case _:  # nothing here has limits of time or memory
            has_reason = False
    if not has_reason:
        yield f"{where}: {_as_told(one)}, and nobody had touched it"
    if one.cause == "signal" and one.signal != SIGKILL:
        yield f"{where}: {_as_told(one)}, and strikes are by SIGKILL alone"
