"""The audit: what happened, by the facts of the tasks, against what the daemon told.

It reads files only: the evidence beside the stage (`facts`, `*.jsonl`, `closing.json`). Nothing of
ckptd is imported, so that it cannot make the same mistake twice.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL
from typing import Any, Final, NamedTuple

from tests.torture import works
from tests.torture.clients import phase_after

_MEANS: Final = {
    "cancel": ("stop_intent", "moved"), "kill": ("stop_intent", "moved"), "hold": ("moved",),
    "pause": ("freeze_intent",), "resume": ("freeze_intent",), "release": ("moved",),
    "retry": ("reset",), "clean": ("removed",), "signal": ("signal_intent",),
    "checkpoint_now": ("checkpoint_asked",),
}  # fmt: skip
"""The events that show that a verb was carried out."""


class Found(NamedTuple):
    """Figures, and everything that was violated."""

    figures: dict[str, Any]
    violations: list[str]


class Fact(NamedTuple):
    """One line that a task wrote."""

    work: str
    task: int
    attempt: int
    pid: int
    what: str
    argument: str


class Attempt:
    """What the daemon told of one attempt."""

    __slots__ = ("boot", "cause", "code", "is_ended", "is_touched", "pid", "shim", "signal")

    def __init__(self) -> None:
        self.pid = 0
        self.shim = 0
        self.boot = ""
        self.is_ended = False
        self.is_touched = False  # by a verb of a client: stopped, signalled, frozen
        self.cause = ""
        self.code = 0
        self.signal = 0


class Told:
    """The daemon's story: tasks and attempts."""

    def __init__(self, events: Iterator[dict[str, Any]]) -> None:
        self.phase: dict[int, str] = {}
        self.key: dict[int, str] = {}
        self._by_key: dict[str, int] = {}
        self.removed: set[int] = set()
        self.steered: set[int] = set()
        self.heard: set[tuple[int, str]] = set()
        self.attempts: dict[int, dict[int, Attempt]] = defaultdict(dict)
        self.faults: list[str] = []
        for event in events:
            self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        task, kind, fields = event["task"], event["type"], event["fields"]
        self.heard.add((task, kind))
        if kind == "submitted":
            if task in self.phase or task in self.removed:
                self.faults.append(f"id {task} was given twice")
            self._named(task, fields["key"])
        if kind == "removed":
            self.removed.add(task)
        if kind in {"stop_intent", "reset", "moved"}:
            self.steered.add(task)
        phase = phase_after(event)
        if phase:
            self.phase[task] = phase
        if event["attempt"] and kind != "start_intent":
            self._of_attempt(event)

    def _named(self, task: int, key: str) -> None:
        """A key names one task for as long as that is remembered."""
        self.key[task] = key
        before = self._by_key.get(key)
        if key and before is not None and before not in self.removed:
            self.faults.append(f"key {key} names tasks {before} and {task}")
        self._by_key[key] = task

    def _of_attempt(self, event: dict[str, Any]) -> None:
        known = self.attempts[event["task"]]
        one = known.setdefault(event["attempt"], Attempt())
        fields = event["fields"]
        match event["type"]:
            case "started":
                one.pid, one.shim = fields["pid"], fields["shim"]["pid"]
                one.boot = fields["shim"]["boot_id"]
            case "ended":
                if one.is_ended:
                    where = f"task {event['task']}, attempt {event['attempt']}"
                    self.faults.append(f"{where}: its end was told twice")
                one.is_ended = True
                one.cause, one.code, one.signal = fields["cause"], fields["code"], fields["signal"]
            case "stop_intent" | "signal_intent":
                one.is_touched = True
            case _:
                return


class Evidence:
    """All that lies beside a stage."""

    def __init__(self, root: Path) -> None:
        self.place = root / "evidence"
        self.sent = {f"w{one['work']}": one["kind"] for one in self.lines("sent")}
        self.acked = [(f"w{one['work']}", one["task"]) for one in self.lines("acked")]
        self.strikes = list(self.lines("strikes"))
        self.batches = {one["name"]: bool(one.get("finished")) for one in self.lines("batches")}
        self.told = Told(self.lines("events"))
        self.steered = list(self.lines("steered"))
        self.closing = json.loads((self.place / "closing.json").read_text())

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the lines of one file."""
        path = self.place / f"{name}.jsonl"
        if path.exists():
            with path.open() as file:
                for line in file:
                    yield json.loads(line)

    def facts(self) -> Iterator[Fact]:
        """Yield every fact, in the order in which they were written."""
        with (self.place / "facts").open() as file:
            for line in file:
                work, task, attempt, pid, what, *rest = line.split()
                yield Fact(work, int(task), int(attempt), int(pid), what, " ".join(rest))


def audit(root: Path) -> Found:
    """Return what is wrong with a stage that has come to rest."""
    evidence = Evidence(root)
    by_work: dict[str, list[Fact]] = defaultdict(list)
    for fact in evidence.facts():
        by_work[fact.work].append(fact)
    violations = [*evidence.told.faults, *_acknowledged(evidence, by_work)]
    struck = _struck(evidence)
    for work, facts in by_work.items():
        if work in evidence.batches:
            continue
        kind = evidence.sent.get(work, "")
        violations += _one_work(work, kind, facts, evidence.told)
        violations += _ends(work, kind, facts, evidence.told, struck)
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
    for work, task in acked.items():
        phase = told.phase.get(task, "")
        if task not in told.removed and rows.get(task) != phase:
            yield f"{work}: task {task} is {rows.get(task)} by status, {phase} by its events"
        if task in told.removed and task in rows:
            yield f"{work}: task {task} was removed and is there"
        yield from _final(work, task, evidence, phase)
        facts = by_work.get(work, [])
        began = {fact.attempt for fact in facts}
        is_done = any((fact.what, fact.argument) == ("end", "0") for fact in facts)
        for number, one in told.attempts[task].items():  # its result is durable before its end is
            if (one.cause, one.code) == ("exit", 0) and number not in began and not is_done:
                yield f"{work}: task {task}, attempt {number} is told as done, and never ran"


def _final(work: str, task: int, evidence: Evidence, phase: str) -> Iterator[str]:
    allowed = {"failed"} if evidence.sent[work] == "hopeless" else {"succeeded"}
    if task in evidence.told.steered:
        allowed |= {"cancelled"}
    if phase not in allowed:
        yield f"{work} ({evidence.sent[work]}): task {task} ended as {phase}"


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
    yield from _lost_saves(work, kind, facts, told.attempts[facts[0].task])


def _repeats(work: str, kind: str, facts: list[Fact]) -> Iterator[str]:
    lanes = works.LANES[kind]
    done: set[str] = set()
    current: list[str] = []  # what the attempt before may have had under way
    begun: list[str] = []
    attempt = 0
    for fact in facts:
        if fact.attempt != attempt:
            attempt, current, begun = fact.attempt, (begun or current), []
        if fact.what == "item":
            if fact.argument in begun:
                yield f"{work}: item {fact.argument} twice in attempt {attempt}"
            if fact.argument in done and lanes == 1 and fact.argument != current[-1]:
                yield f"{work}: item {fact.argument} again in attempt {attempt}"
            begun.append(fact.argument)
            done.add(fact.argument)
    attempts = len({fact.attempt for fact in facts})
    repeats = sum(fact.what == "item" for fact in facts) - len(done)
    if repeats > lanes * (attempts - 1):
        yield f"{work}: {repeats} items again in {attempts} attempts"
    is_done = any((fact.what, fact.argument) == ("end", "0") for fact in facts)
    if is_done and len(done) != works.ITEMS[kind]:
        yield f"{work}: done with {len(done)} items of {works.ITEMS[kind]}"


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


def _struck(evidence: Evidence) -> set[tuple[int, int]]:
    """Return the attempts in which any process was killed by us, and all pids that were."""
    found = {(one["task"], one["attempt"]) for one in evidence.strikes if one.get("task")}
    return found | {(0, one["pid"]) for one in evidence.strikes}


def _ends(
    work: str, kind: str, facts: list[Fact], told: Told, struck: set[tuple[int, int]]
) -> Iterator[str]:
    """Exit statuses as told are as they happened."""
    ends: dict[int, int] = {}
    pids: dict[int, int] = {}
    for fact in facts:
        pids[fact.attempt] = fact.pid
        if fact.what == "end":
            ends[fact.attempt] = int(fact.argument)
    task = facts[0].task
    for number, pid in pids.items():
        one = told.attempts[task].get(number)
        where = f"{work} ({kind}), task {task}, attempt {number}"
        if one is None or not one.is_ended:
            yield f"{where}: ran, and no end was ever told"
            continue
        if one.pid and one.pid != pid:
            yield f"{where}: told as pid {one.pid}, was {pid}"
        # Whoever killed a supervisor whose start was never told cannot be looked up.
        is_hit = one.is_touched or (one.cause == "lost" and not one.shim)
        is_hit |= bool({(task, number), (0, pid), (0, one.shim)} & struck)
        yield from _one_end(where, one, ends.get(number), is_hit=is_hit, kind=kind)


def _one_end(
    where: str, one: Attempt, code: int | None, *, is_hit: bool, kind: str
) -> Iterator[str]:
    as_told = f"told as {one.cause} {one.code} {one.signal}"
    if one.cause == "not_started":
        yield f"{where}: ran, {as_told}"
    if one.cause == "exit":
        if code is None and one.code == 0:
            yield f"{where}: {as_told}, and it never came to its end"
        if code is not None and code != one.code and not is_hit:
            yield f"{where}: {as_told}, left with {code}"
        if code is None and not is_hit:
            yield f"{where}: {as_told}, without an end of its own"
        if code is not None and code not in works.CODES.get(kind, {0}) and not is_hit:
            yield f"{where}: left with {code}, and nobody had touched it"
    elif not is_hit:
        yield f"{where}: {as_told}, and nobody had touched it"
    if one.cause == "signal" and one.signal != SIGKILL and not one.is_touched:
        yield f"{where}: {as_told}, and strikes are by SIGKILL alone"


def _steered(evidence: Evidence) -> Iterator[str]:
    """What was answered to a verb has happened by the daemon's own story."""
    heard = evidence.told.heard
    for one in evidence.steered:
        for task in one["tasks"]:
            if not any((task, kind) in heard for kind in _MEANS[one["verb"]]):
                yield f"{one['verb']} of task {task} was answered, and nothing became of it"


def _batches(evidence: Evidence, by_work: dict[str, list[Fact]]) -> Iterator[str]:
    """Each batch comes to its end; an item has one result, and runs again after a kill at most."""
    hits = Counter(one.get("work") for one in evidence.strikes)
    told = evidence.told
    for name, is_finished in evidence.batches.items():
        results = evidence.closing["batches"].get(name, [])
        ran = Counter(fact.argument for fact in by_work.get(name, ()) if fact.what == "item")
        tasks = [task for task, key in told.key.items() if key.split(":")[1:2] == [name]]
        stops = max(0, sum(len(told.attempts[task]) for task in tasks) - 1)  # the last one ended it
        if not is_finished:
            yield f"batch {name} never came to its end"
        yield from _results(name, results, ran, is_hit=bool(hits[name] or stops))
        repeats = sum(ran.values()) - len(ran)
        if repeats > works.BATCH_JOBS * (hits[name] + stops):
            yield f"batch {name}: {repeats} repeats, {hits[name]} kills, {stops} stops"


def _results(
    name: str, results: list[dict[str, Any]], ran: Counter[str], *, is_hit: bool
) -> Iterator[str]:
    keys = Counter(str(one["key"]) for one in results)
    if keys != Counter(str(item) for item in range(works.BATCH_ITEMS)):
        yield f"batch {name}: results of {sorted(keys.elements())}"
    for one in results:
        key = str(one["key"])
        if one["status"] == "pass" and (not ran[key] or int(one["result"]) != int(key) * 2):
            yield f"batch {name}: item {key} passed with {one['result']}"
        if one["status"] != "pass" and not (is_hit and one["status"] == "quarantined"):
            yield f"batch {name}: item {key} came to {one['status']}, and it cannot fail by itself"


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
    for path in closing["files"]:
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
    if parts[0] == "quarantine" and len(parts) > 1:
        yield f"something was cut off or found bad: {path}"


def _figures(evidence: Evidence, by_work: dict[str, list[Fact]]) -> dict[str, Any]:
    attempts = [one for task in evidence.told.attempts.values() for one in task.values()]
    facts = [fact for facts in by_work.values() for fact in facts]
    return {
        "tasks": len(evidence.acked),
        "attempts": len(attempts),
        "interrupted": sum(one.cause != "exit" for one in attempts),
        "facts": len(facts),
        "items": sum(fact.what == "item" for fact in facts),
        "verbs": dict(Counter(one["verb"] for one in evidence.steered if one["tasks"])),
        "causes": dict(Counter(one.cause for one in attempts)),
    }
