"""The audit: what happened, by the facts of the tasks, against what the daemon told.

It reads files only: the evidence beside the stage (`facts`, `*.jsonl`, `closing.json`). Nothing of
ckptd is imported, so that it cannot make the same mistake twice.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.torture import ends, works
from tests.torture.evidence import Attempt, Evidence, Fact, Told
from tests.torture.stage import role

_MEANS: Final = {
    "cancel": ("stop_intent", "moved"), "kill": ("stop_intent", "moved"), "hold": ("moved",),
    "pause": ("freeze_intent",), "resume": ("freeze_intent",), "release": ("moved",),
    "retry": ("reset",), "clean": ("removed",), "signal": ("signal_intent",),
    "checkpoint_now": ("checkpoint_asked",),
}  # fmt: skip
"""The events that show that a verb was carried out."""
_COUNTED: Final = {"retry", "clean", "signal", "hold", "release"}
"""Verbs of which each that is answered has an event of its own; the others may find it done."""


class Found(NamedTuple):
    """Figures, and everything that was violated."""

    figures: dict[str, Any]
    violations: list[str]


def audit(root: Path) -> Found:
    """Return what is wrong with a stage that has come to rest."""
    evidence = Evidence(root)
    by_work: dict[str, list[Fact]] = defaultdict(list)
    for fact in evidence.facts():
        by_work[fact.work].append(fact)
    violations = [*evidence.told.faults, *_acknowledged(evidence, by_work), *_removed(evidence)]
    for work, facts in by_work.items():
        if work in evidence.batches:
            continue
        kind = evidence.sent.get(work, "")
        violations += _one_work(work, kind, facts, evidence.told)
        violations += ends.of_work(work, kind, facts, evidence.told, evidence.strikes)
    violations += ends.of_signals(evidence.told, evidence.strikes)
    violations += [*_batches(evidence, by_work), *_steered(evidence), *_rest(evidence)]
    return Found(_figures(evidence, by_work), violations)


def _acknowledged(evidence: Evidence, by_work: dict[str, list[Fact]]) -> Iterator[str]:
    """Nothing acknowledged is missing; one work is one task; it ended as it had to."""
    told = evidence.told
    work_of: dict[int, str] = {}
    acked: dict[str, int] = {}
    for work, task in evidence.acked:
        if work_of.setdefault(task, work) != work:
            yield f"id {task} was acknowledged for {work_of[task]} and {work}"
        if acked.setdefault(work, task) != task:
            yield f"{work} was acknowledged as {acked[work]} and {task}"
        if task not in told.phase:
            yield f"{work}: acknowledged task {task} was never submitted"
    for work in evidence.sent.keys() - acked.keys():
        yield f"{work} was never answered"
    rows = {row["id"]: row["phase"] for row in evidence.closing["rows"]}
    since = evidence.closing["since"]  # the story when the rows were asked for
    for work, task in acked.items():
        phase = told.phase.get(task, "")
        if task not in told.removed and rows.get(task) != phase:
            yield f"{work}: task {task} is {rows.get(task)} by status, {phase} by its events"
        if told.removed.get(task, since + 1) <= since and task in rows:
            yield f"{work}: task {task} was removed and is there"
        yield from _final(work, task, evidence, phase)
        yield from _done(work, told.attempts[task], phase, by_work.get(work, []))


def _final(work: str, task: int, evidence: Evidence, phase: str) -> Iterator[str]:
    allowed = {"failed"} if evidence.sent[work] == "hopeless" else {"succeeded"}
    if task in evidence.told.steered:
        allowed |= {"cancelled"}
    if phase not in allowed:
        yield f"{work} ({evidence.sent[work]}): task {task} ended as {phase}"


def _done(work: str, attempts: dict[int, Attempt], phase: str, facts: list[Fact]) -> Iterator[str]:
    """What is told as done has come to its own end, by its last attempt and by its facts."""
    began = {fact.attempt for fact in facts}
    is_done = any((fact.what, fact.argument) == ("end", "0") for fact in facts)
    for number, one in attempts.items():  # its result is durable before its end is
        if (one.cause, one.code) == ("exit", 0) and number not in began and not is_done:
            yield f"{work}: attempt {number} is told as done, and never ran"
    if phase != "succeeded":
        return
    last = attempts[max(attempts)] if attempts else Attempt()
    if not is_done:
        yield f"{work}: succeeded, and it never came to its end"
    if (last.cause, last.code) != ("exit", 0):
        yield f"{work}: succeeded, and its last attempt is told as {last.cause} {last.code}"


def _removed(evidence: Evidence) -> Iterator[str]:
    """What ended is there until somebody cleans it, but where it is to be forgotten."""
    if evidence.closing["forgets"]:
        return
    cleaned = {task for one in evidence.steered if one["verb"] == "clean" for task in one["tasks"]}
    for task in sorted(evidence.told.removed.keys() - cleaned):
        yield f"task {task} was removed, and nobody asked for it"


def _one_work(work: str, kind: str, facts: list[Fact], told: Told) -> Iterator[str]:
    """Never two at once; one id; every item at least once, none again but the current one."""
    if len({fact.task for fact in facts}) != 1:
        yield f"{work} ran as tasks {sorted({fact.task for fact in facts})}"
    for fact in facts:
        if fact.what in {"overlap", "wrong"}:
            yield f"{work}, attempt {fact.attempt}: {fact.what} {fact.argument}"
    order = [fact.attempt for fact in facts]
    if order != sorted(order):
        yield f"{work}: an attempt went on after its successor began: {order}"
    starts = Counter(fact.attempt for fact in facts if fact.what == "start")
    yield from (f"{work}: attempt {n} began {c} times" for n, c in starts.items() if c > 1)
    if kind in works.LANES:
        yield from _repeats(work, kind, facts)
    if kind in works.TURNS:
        yield from _turns(work, kind, facts)
    yield from _lost_saves(work, kind, facts, told.attempts[facts[0].task])


def _repeats(work: str, kind: str, facts: list[Fact]) -> Iterator[str]:
    """None twice in one attempt, and none again but those that were the last of their lane."""
    lanes = works.LANES[kind]
    done: set[str] = set()
    recorded: set[str] = set()
    last: dict[str, str] = {}  # of each lane in this attempt
    begun: set[str] = set()
    attempt = 0
    for fact in facts:
        if fact.attempt != attempt:
            attempt, last, begun = fact.attempt, {}, set()
        if (fact.what, fact.argument) == ("end", "0"):
            recorded |= done
        if fact.what != "item":
            continue
        if fact.argument in begun:
            yield f"{work}: item {fact.argument} twice in attempt {attempt}"
        elif fact.argument in recorded:
            yield f"{work}: item {fact.argument} again in attempt {attempt}"
        if lanes == 1:  # what comes before it in line, and is not begun, was known as done
            recorded |= done - {fact.argument}
        elif fact.lane in last:
            recorded.add(last[fact.lane])
        last[fact.lane] = fact.argument
        begun.add(fact.argument)
        done.add(fact.argument)
    attempts = len({fact.attempt for fact in facts})
    repeats = sum(fact.what == "item" for fact in facts) - len(done)
    if repeats > lanes * (attempts - 1):
        yield f"{work}: {repeats} items again in {attempts} attempts"
    is_done = any((fact.what, fact.argument) == ("end", "0") for fact in facts)
    if is_done and len(done) != works.ITEMS[kind]:
        yield f"{work}: done with {len(done)} items of {works.ITEMS[kind]}"


def _turns(work: str, kind: str, facts: list[Fact]) -> Iterator[str]:
    """Turns come one after the other; a new attempt leaves none out."""
    attempt, before, reached = 0, -1, -1
    for fact in facts:
        if fact.what != "at":
            continue
        at = int(fact.argument)
        if fact.attempt != attempt:
            attempt, before = fact.attempt, min(at - 1, reached)
        if at != before + 1:
            yield f"{work}: attempt {attempt} is at {at} after {before}"
        before, reached = at, max(reached, at)
    is_done = any((fact.what, fact.argument) == ("end", "0") for fact in facts)
    if is_done and reached + 1 != works.TURNS[kind]:
        yield f"{work}: done at turn {reached + 1} of {works.TURNS[kind]}"


def _lost_saves(
    work: str, kind: str, facts: list[Fact], attempts: dict[int, Attempt]
) -> Iterator[str]:
    """Each attempt goes on at, or after, what the ones before it were told is saved.

    A plain rename is sealed by the daemon after the end: until then a loss of power takes it back.
    """
    saved = unsealed = attempt = 0
    boot = ""
    for fact in facts:
        if fact.attempt != attempt:
            attempt = fact.attempt
            was, boot = boot, attempts[attempt].boot if attempt in attempts else ""
            saved, unsealed = saved + (unsealed if was == boot else 0), 0
            at = next((f for f in facts if (f.attempt, f.what) == (attempt, "at")), None)
            if at and int(at.argument) < saved:
                yield f"{work}: attempt {attempt} began at {at.argument}, {saved} was saved"
        if fact.what == "saved":
            saved = max(saved, int(fact.argument))
        unsealed += (kind, fact.what, fact.argument) == ("mover", "end", "85")


def _steered(evidence: Evidence) -> Iterator[str]:
    """What was answered to a verb has happened by the daemon's own story, as often as answered."""
    heard = evidence.told.heard
    answered = Counter((one["verb"], task) for one in evidence.steered for task in one["tasks"])
    for (verb, task), count in answered.items():
        found = sum(heard[task, kind] for kind in _MEANS[verb])
        if found < (count if verb in _COUNTED else 1):
            yield f"{verb} of task {task} was answered {count} times, and nothing became of it"


def _batches(evidence: Evidence, by_work: dict[str, list[Fact]]) -> Iterator[str]:
    """Each batch comes to its end; an item has one result, and runs again after a kill at most."""
    hosts, items = _batch_strikes(evidence)
    told = evidence.told
    for name, is_finished in evidence.batches.items():
        results = evidence.closing["batches"].get(name, [])
        ran = Counter(fact.argument for fact in by_work.get(name, ()) if fact.what == "item")
        tasks = [task for task, key in told.key.items() if key.split(":")[1:2] == [name]]
        stops = max(0, sum(len(told.attempts[task]) for task in tasks) - 1)  # the last one ended it
        # Who ran the batch had so many items under way; any other process of it is one of them.
        cut = works.BATCH_JOBS * (hosts[name] + stops) + items[name]
        if not is_finished:
            yield f"batch {name} never came to its end"
        yield from _results(name, results, ran, cut)
        repeats = sum(ran.values()) - len(ran)
        if repeats > cut:
            yield (
                f"batch {name}: {repeats} repeats, {hosts[name]} kills of its host,"
                f" {items[name]} of items, {stops} stops"
            )


def _batch_strikes(evidence: Evidence) -> tuple[Counter[str], Counter[str]]:
    """Return how often each batch lost its host, and another process that works for it."""
    hosts: Counter[str] = Counter()
    items: Counter[str] = Counter()
    for one in evidence.strikes.all:
        name = one.get("work", "")
        if name in evidence.batches:
            whose = role(one)
            hosts[name] += whose == "batch"
            items[name] += whose not in {"batch", "client"}
    return hosts, items


def _results(
    name: str, results: list[dict[str, Any]], ran: Counter[str], cut: int
) -> Iterator[str]:
    keys = Counter(str(one["key"]) for one in results)
    if keys != Counter(str(item) for item in range(works.BATCH_ITEMS)):
        yield f"batch {name}: results of {sorted(keys.elements())}"
    for one in results:
        key = str(one["key"])
        if one["status"] == "pass" and (not ran[key] or int(one["result"]) != int(key) * 2):
            yield f"batch {name}: item {key} passed with {one['result']}"
        if one["status"] not in {"pass", "quarantined"}:
            yield f"batch {name}: item {key} came to {one['status']}, and it cannot fail by itself"
    quarantined = sum(one["status"] == "quarantined" for one in results)
    if quarantined > cut:
        yield f"batch {name}: {quarantined} items quarantined, and {cut} were cut short"


def _rest(evidence: Evidence) -> Iterator[str]:
    """Everything is whole and nothing is left."""
    closing = evidence.closing
    yield from (f"checkpoints of {task}: {said}" for task, said in closing["checkpoints"].items())
    if closing["wal"]["code"] != 0:
        yield f"the log does not verify: {closing['wal']['said']}"
    if closing["exit_code"] != 0:
        yield f"the daemon stopped with {closing['exit_code']}"
    for name in ("processes", "left"):
        yield from (f"left over: {one}" for one in closing.get(name, ()))
    known = {str(row["id"]) for row in closing["rows"]}
    for path in {*closing["files"], *closing["files_at_rest"]}:
        yield from _file(path, known)
    yield from (f"a socket of no task: {path}" for path in closing["run_files"] if "/" in path)


def _file(path: str, known: set[str]) -> Iterator[str]:
    """Judge one file of the state directory. Source: FORMAT.md, "The state directory"."""
    parts = path.split("/")
    if path.endswith((".tmp", ".new")) and path != "wal/spare.tmp":
        yield f"a temporary file is left: {path}"
    if parts[0] == "tasks" and len(parts) > 1 and parts[1] not in known:
        yield f"files of a task that is not there: {path}"
    if parts[0] == "output" and len(parts) > 1 and parts[1].partition(".")[0] not in known:
        yield f"output of a task that is not there: {path}"
    if parts[0] == "attempts" and parts[1:] not in ([], ["reign"]) and parts[1] != "spare":
        yield f"the record of an attempt that is over: {path}"
    # A SIGKILL cuts a long write(2) short between two pages; that was never acknowledged.
    if parts[0] == "quarantine" and len(parts) > 1 and ".wal.torn-" not in path:
        yield f"something was cut off or found bad: {path}"


def _figures(evidence: Evidence, by_work: dict[str, list[Fact]]) -> dict[str, Any]:
    told = evidence.told.attempts
    attempts = [one for task in told.values() for one in task.values()]
    hit = [
        evidence.strikes.hit(task, number, one, one.pid)
        for task, known in told.items() for number, one in known.items()
    ]  # fmt: skip
    facts = [fact for facts in by_work.values() for fact in facts]
    return {
        "tasks": len(evidence.acked),
        "attempts": len(attempts),
        "interrupted": sum(one.cause != "exit" for one in attempts),
        "struck_attempts": sum(hit),
        "steered_attempts": sum(one.is_touched for one in attempts),
        "facts": len(facts),
        "items": sum(fact.what == "item" for fact in facts),
        "verbs": dict(Counter(one["verb"] for one in evidence.steered if one["tasks"])),
        "causes": dict(Counter(one.cause for one in attempts)),
    }
