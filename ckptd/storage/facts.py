"""What the facts in a task's journals add up to, over all attempts, in order.

    op            fields                                 meaning
    open          format task attempt                    first of every file
    step_start    name version                           begun; not done yet
    step_done     name version result                    completed, for ever
    step_reset    name                                   not completed any more: run it again; what
                                                         the whole task came to goes with it
    set, delete   key value                              an intermediate result
    item_start    key                                    in flight; not durable by itself
    item          key status result text                 outcome of one item; the last one holds
    run           event                                  what became of a run of a batch
    progress      done total text                        how far, as the task counts it
    checkpoint    seq                                    a generation was published
    retry_after   seconds scope                          "start me again, but not before"
    problem       text why                               "do not start me again; look first"
    result        value                                  what the whole task came to

The three facts of a batch carry more members, see `ckptd/batch/ledger.py`.
An op that is not in this table was written by a later version: it is a problem, never skipped, for
as long as the journal is there. A `problem` fact counts for the attempt that recorded it alone:
once a person has looked, mended the code and released the task, it goes on.
Stdlib only; what it reads it does not judge. Read next: `blobs.py:mark`.
"""

import json
import math
import os
import time
from typing import Any, Final

from ckptd.storage.journal import FORMAT, TASK, Bounds, Fact, read, sync_names
from ckptd.storage.untrusted import open_directory

STATUSES: Final = ("pass", "fail", "error", "skipped", "quarantined")
RETRY_AFTER_S_MAX: Final = 86_400.0  # longer waits are the business of `--at`
WHYS: Final = ("checkpoint", "version", "corrupt")  # what a problem may be about
SECRET: Final = "ckptd:secret"  # noqa: S105 - the name of a value, not the value
NAME_CHARS_MAX: Final = 1_024
_TEXT_CHARS_MAX: Final = 500
_GAINS: Final = frozenset({"step_done", "set", "item", "progress", "result"})


def step_start(name: str, version: int = 1) -> Fact:
    """Return the fact that a step begins; needed only where it must not run twice."""
    return {"op": "step_start", "name": _checked(name, "a step's name"), "version": version}


def step_done(name: str, result: Any = None, version: int = 1) -> Fact:
    """Return the fact that a step is completed, with what it came to."""
    checked = _checked(name, "a step's name")
    return {"op": "step_done", "name": checked, "version": version, "result": result}


def step_reset(name: str) -> Fact:
    """Return the fact that a step counts as not completed: what it built upon was done anew."""
    return {"op": "step_reset", "name": _checked(name, "a step's name")}


def set_value(key: str, value: Any) -> Fact:
    """Return the fact that an intermediate result has a value."""
    return {"op": "set", "key": _checked(key, "a key"), "value": value}


def delete_value(key: str) -> Fact:
    """Return the fact that an intermediate result is gone."""
    return {"op": "delete", "key": _checked(key, "a key")}


def item_start(key: str, **more: Any) -> Fact:
    """Return the fact that an item is in flight; it rides with others and gains nothing itself."""
    return {"op": "item_start", "key": _checked(key, "an item's key"), **more}


def item_done(key: str, status: str, result: Any = None, text: str = "", **more: Any) -> Fact:
    """Return the fact that an item came out with one of STATUSES."""
    if status not in STATUSES:
        raise ValueError(f"unknown status {status!r}; known: {', '.join(STATUSES)}")
    fact: Fact = {"op": "item", "key": _checked(key, "an item's key"), "status": status, **more}
    if result is not None:
        fact["result"] = result
    return {**fact, "text": text} if text else fact


def run_event(event: str, **more: Any) -> Fact:
    """Return what became of a run of a batch: `begin`, `pause`, `resume`, `config`, `end`."""
    return {"op": "run", "event": _checked(event, "an event"), **more}


def progress_made(done: float, total: float, text: str = "") -> Fact:
    """Return the fact of having come so far."""
    if not (0 <= done < math.inf and 0 <= total < math.inf):
        raise ValueError(f"progress {done}/{total} is out of range")
    return {"op": "progress", "done": done, "total": total, "text": text}


def retry_after(seconds: float, scope: str = "") -> Fact:
    """Return the wish not to be started again before some seconds have passed."""
    if not 0 <= seconds <= RETRY_AFTER_S_MAX:
        raise ValueError(f"{seconds} s is out of range; at most {RETRY_AFTER_S_MAX:.0f} s")
    return {"op": "retry_after", "seconds": seconds, "scope": scope}


def problem(text: str, why: str = "checkpoint") -> Fact:
    """Return the request not to be started again before a person has looked; `why`: of WHYS."""
    if why not in WHYS:
        raise ValueError(f"unknown reason {why!r}; known: {', '.join(WHYS)}")
    return {"op": "problem", "text": text[:_TEXT_CHARS_MAX], "why": why}


def result_made(value: Any) -> Fact:
    """Return the fact that the whole task came to a value; the last one holds."""
    return {"op": "result", "value": value}


def _checked(name: str, what: str) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARS_MAX:
        raise ValueError(f"{what} is a text of 1 to {NAME_CHARS_MAX} characters")
    return name


def _is_newer(fact: Fact) -> bool:
    version = fact.get("format")
    return fact.get("op") == "open" and isinstance(version, int) and version > FORMAT


class Standing:
    """What counts for the daemon: a wish to wait, a problem to stop at. Base of the full view."""

    def __init__(self) -> None:
        self.count = 0
        self.gained_ns = 0  # when something was last recorded that is not done again
        self.problem = ""
        self._retry: tuple[int, int, float] = (0, 0, 0.0)  # attempt, at_ns, seconds
        self._asked: tuple[int, str, str] = (0, "", "")  # attempt, text, why

    def take(self, attempt: int, fact: Fact) -> None:
        """Take one fact in; what cannot be understood becomes a problem, never an exception."""
        self.count += 1
        try:
            is_known = self._know(attempt, fact)
            if fact["op"] in _GAINS:
                self.gained_ns = max(self.gained_ns, int(fact.get("at_ns") or 0))
        except (KeyError, TypeError, ValueError, OverflowError):
            is_known = False
        if not is_known and not self.problem and _is_newer(fact):
            text = f"was written by a newer ckptd: format {fact['format']}; this one reads {FORMAT}"
            self.problem = f"the journal of attempt {attempt} {text}"
        elif not is_known and not self.problem:
            shown = json.dumps(fact)[:_TEXT_CHARS_MAX]
            self.problem = f"the journal of attempt {attempt} holds what cannot be read: {shown}"

    def _know(self, attempt: int, fact: Fact) -> bool:
        match fact["op"]:
            case "open":
                return int(fact["format"]) <= FORMAT
            case "retry_after":
                self._retry = (attempt, int(fact["at_ns"]), float(fact["seconds"]))
            case "problem":
                if self._asked[0] != attempt:  # the first one is what started the trouble
                    why = str(fact.get("why", WHYS[0]))
                    text = str(fact["text"])[:_TEXT_CHARS_MAX] or "a problem without a word"
                    self._asked = (attempt, text, why if why in WHYS else WHYS[0])
            case "result":
                self.gained("result", "", [fact["value"]])
            case "step_done":
                self.gained("step", str(fact["name"]), [fact.get("result"), fact.get("version")])
            case "step_reset":
                self.gained("step", str(fact["name"]), None)
                self.gained("result", "", None)
            case "set":
                self.gained("value", str(fact["key"]), fact["value"])
            case "delete":
                self.gained("value", str(fact["key"]), None)
            case "item":
                self.gained("item", str(fact["key"]), [fact["status"], fact.get("result")])
            case "progress":
                self.gained("progress", "", [float(fact["done"]), float(fact["total"])])
            case "step_start" | "checkpoint" | "item_start" | "run":
                pass
            case _:
                return False
        return True

    def gained(self, kind: str, key: str, value: Any) -> None:
        """Take note of something that is worth not repeating."""

    def problem_of(self, attempt: int) -> tuple[str, str]:
        """Return what keeps this attempt from being followed by another, and why; ("", "")."""
        if self.problem:
            return self.problem, "corrupt"
        asked_by, text, why = self._asked
        return (text, why) if asked_by == attempt else ("", "")

    def retry_after_s(self, attempt: int) -> float:
        """Return what is left of the wait that this attempt asked for, 0 if it did not."""
        asked_by, at_ns, seconds = self._retry
        if asked_by != attempt or not seconds > 0:
            return 0.0
        left_s = seconds - (time.time_ns() - at_ns) / 1e9
        return max(0.0, min(left_s, seconds, RETRY_AFTER_S_MAX))


class Facts(Standing):
    """The full view, for the task itself: steps, values and items by name."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, Fact] = {}
        self.started: dict[str, Fact] = {}
        self.values: dict[str, Any] = {}
        self.items: dict[str, Fact] = {}
        self.flying: dict[str, Fact] = {}  # started, no outcome, and its run had no orderly end
        self.runs: list[Fact] = []
        self.progress: Fact = {}
        self.checkpoint = 0
        self.result: Fact = {}  # {"value": ...} once the whole task came to something

    @property
    def has_any(self) -> bool:
        """Return whether there is anything that need not be done again."""
        return bool(self.steps or self.values or self.items or self.progress or self.result)

    def _know(self, attempt: int, fact: Fact) -> bool:
        if not super()._know(attempt, fact):
            return False
        match fact["op"]:
            case "step_start":
                self.started[str(fact["name"])] = fact
            case "step_done":
                self.started.pop(str(fact["name"]), None)
                self.steps[str(fact["name"])] = fact
            case "step_reset":
                self.steps.pop(str(fact["name"]), None)
                self.started.pop(str(fact["name"]), None)
                self.result = {}  # of work of which a part is to be done anew
            case "set" if fact["key"] == SECRET:  # keys made with the first one are out there
                self.values.setdefault(SECRET, fact["value"])
            case "set":
                self.values[str(fact["key"])] = fact["value"]
            case "delete":
                self.values.pop(str(fact["key"]), None)
            case "item_start":
                self.flying[str(fact["key"])] = {**fact, "attempt": attempt}
            case "item":
                self.flying.pop(str(fact["key"]), None)
                self.items[str(fact["key"])] = {**fact, "attempt": attempt}
            case "run":
                if str(fact["event"]) == "end":
                    self.flying.clear()  # whoever ends in order takes its items down in order
                self.runs.append({**fact, "attempt": attempt})
            case "progress":
                self.progress = fact
            case "result":
                self.result = fact
            case "checkpoint":
                self.checkpoint = max(self.checkpoint, int(fact["seq"]))
            case _:
                pass  # what Standing knows is enough
        return True


def read_facts(
    task_dir: str, task: int, owner_uid: int, attempt_max: int, *, bounds: Bounds = TASK
) -> Facts:
    """Return what all attempts up to `attempt_max` recorded; raises what `journal.read` raises."""
    facts = Facts()
    for attempt, fact in read(task_dir, task, owner_uid, attempt_max, bounds=bounds):
        facts.take(attempt, fact)
    return facts


def read_durable(
    task_dir: str, task: int, owner_uid: int, attempt_max: int, *, bounds: Bounds = TASK
) -> Facts:
    """Return what `read_facts` does, for whoever acts on it or hands it on as done.

    Durable: what it returns; its writer may have been killed before its sync.
    """
    facts = read_facts(task_dir, task, owner_uid, attempt_max, bounds=bounds)
    if facts.count:
        task_fd = open_directory(task_dir, owner_uid)
        try:
            sync_names(task_fd, owner_uid, attempt_max)
        finally:
            os.close(task_fd)
    return facts
