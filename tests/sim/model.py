"""The judge: what must be true of what clients are told, given what really happened.

It knows nothing of the daemon: no record, no State, no policy. It hears what clients sent and were
answered (as plain JSON values), what the machine's world did, and what a client sees after each
recovery. What a request may have done is bounded by when it was sent and when it was answered.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.sim.asked import NEVER, STARTERS, Asked, hold, may_have
from tests.sim.attendance import TOLD_LATE_NS, Attendance
from tests.sim.steering import Steering

FINISHED = frozenset({"succeeded", "failed", "cancelled", "quarantined", "blocked"})
ACTIVE = frozenset({"starting", "running", "paused", "stopping"})
OWN_STOPS = frozenset({"cancel", "kill", "timeout", "deadline", "shutdown"})
PERMANENT = frozenset({64, 65, 66, 67, 68, 70, 72, 73, 76, 77, 78, 126, 127})
CLEANERS = frozenset({"clean"})


@dataclass
class Instance:
    """One attempt, as it really went."""

    attempt: int
    since: int  # the end of the instance before: it may have been ordered from then on
    began: int
    cause: str = ""  # "": it runs
    code: int = 0
    signal: int = 0
    ended: int = NEVER
    is_known: bool = True  # False: its end went with the power
    was_told: bool = False  # somebody was told that it runs
    told: int = NEVER  # when somebody was told first how it ended: nothing changes that later
    was_signalled: bool = False
    was_told_to_stop: bool = False
    is_excused: bool = False  # the disk of its output was full: a failure counts for nothing
    began_ns: int = 0  # of time that really passed, here and below
    ended_ns: int = 0
    reign: int = 0  # in which it began
    last_reign: int = 0  # in which it ended


@dataclass
class Job:
    """One task, as it really went."""

    instances: list[Instance] = field(default_factory=list)
    saved: int = 0
    checkpoint: int = 0
    fresh: bool = False  # its checkpoints were given up since its last instance


def _named(args: dict[str, Any], specs: Iterable[dict[str, Any]]) -> list[int]:
    """Return the tasks that a request names."""
    needs = [need["task"] for spec in specs for need in spec.get("after", ())]
    return [*args.get("select", {}).get("ids", ()), *needs]


class Model:
    """All that was said and done, in order; `now` counts events."""

    def __init__(self, parallel: int, *, keeps_all: bool) -> None:
        self.now = 0
        self._parallel = parallel  # tasks at once, until somebody changes that
        self._keeps_all = keeps_all  # ended tasks are not forgotten by themselves
        self.has_doubles = False  # the network makes copies of its own
        self._issued: dict[str, bytes] = {}  # results as they left the daemon, before the network
        self.asked: dict[str, Asked] = {}
        self.submitted: dict[str, dict[str, Any]] = {}  # unique -> spec
        self.submit_of: dict[str, Asked] = {}  # unique -> its request
        self.unique_of: dict[int, str] = {}  # id -> unique, for ever
        self.id_of: dict[str, int] = {}
        self.acknowledged: set[int] = set()
        self.jobs: dict[int, Job] = {}
        self.succeeded: set[int] = set()
        self.checks = 0
        self.elapsed_ns: Callable[[], int] = lambda: 0
        self.attendance = Attendance()
        self.steering = Steering(self.asked, parallel)
        self._reign_began = 0

    # --- what clients say and hear ----------------------------------------------------------------

    def sent(self, request: str, verb: str, args: dict[str, Any], uniques: list[str]) -> None:
        """A client sends a mutating request for the first time."""
        self.now += 1
        one = self.asked[request] = Asked(request, verb, args, self.now)
        for unique, spec in zip(uniques, args.get("tasks", ()), strict=False):
            self.submitted[unique] = spec
            self.submit_of[unique] = one

    def resent(self, request: str) -> None:
        """The client did not hear and sends it again."""
        if request in self.asked:
            self.asked[request].copies += 1

    def issued(self, request: str, wire: bytes, *, is_ok: bool) -> None:
        """The daemon answers a mutating request: once carried out, the same answer for ever."""
        one = self.asked.get(request)
        if one is None or one.verb == "shutdown":
            return
        first = self._issued.get(request)
        hold(
            first is None or (is_ok and wire == first),
            f"{one.verb} {request} was carried out, and answered anew",
        )
        if is_ok and first is None:
            self._issued[request] = wire
            self.now += 1
            one.issued, one.issued_ns, one.given = self.now, self.elapsed_ns(), json.loads(wire)
            self.steering.issued(one)

    def refused(self, request: str, code: str, *, is_full: bool, is_stopping: bool) -> None:
        """The daemon refuses a mutating request: the climate, or the request itself, is why."""
        one = self.asked.get(request)
        if one is None:
            return
        specs = one.args.get("tasks", ()) if one.verb == "submit" else ()
        causes = {
            "disk_full": is_full,
            "shutting_down": is_stopping or any(a.verb == "shutdown" for a in self.asked.values()),
            "not_found": any(self._may_be_unknown(task) for task in _named(one.args, specs)),
            "conflict": any(self._is_key_of_another(spec) for spec in specs),
            "bad_request": any(spec.get("deadline_ns") for spec in specs),  # it may have passed
        }
        hold(causes.get(code, False), f"{one.verb} {request} was refused as {code}: nothing is why")

    def _may_be_unknown(self, task: int) -> bool:
        return task not in self.unique_of or self._may_be_forgotten(task)

    def _is_key_of_another(self, spec: dict[str, Any]) -> bool:
        """Tell whether its key was submitted with another spec."""
        key = spec.get("key")
        return bool(key) and any(
            one.get("key") == key and one != spec for one in self.submitted.values()
        )

    def answered(self, request: str, wire: bytes, result: dict[str, Any] | None) -> None:
        """A reply arrived; None: the daemon refused. A second reply must be the same."""
        self.now += 1
        one = self.asked.get(request)
        if one is None:
            return
        if one.result is not None:  # what was refused left nothing behind and may come again
            hold(
                result is None or wire == one.wire,
                f"{one.verb} {request} was answered twice, differently",
            )
            return
        if result is None:
            one.is_refused = one.copies == 1 and not self.has_doubles
            return
        one.answered = min(one.answered, self.now)
        one.is_refused, one.result, one.wire = False, result, wire
        if one.verb == "submit":
            self._accepted(one, result)

    def _accepted(self, one: Asked, result: dict[str, Any]) -> None:
        specs = one.args["tasks"]
        hold(len(specs) == len(result["ids"]), f"ids {result['ids']} for {len(specs)} tasks")
        for spec, number, is_new in zip(specs, result["ids"], result["created"], strict=True):
            if is_new:
                self._names(number, spec["argv"][1])
            else:
                known = self.submitted.get(self.unique_of.get(number, ""), {})
                hold(
                    number not in self.unique_of or known.get("key") == spec["key"],
                    f"key {spec['key']!r} was answered with task {number}, which has another",
                )
            self.acknowledged.add(number)

    def _names(self, number: int, unique: str) -> None:
        """An id belongs to one submitted task, and a submitted task has one id, for ever."""
        hold(unique in self.submitted, f"task {number} ({unique}) was never submitted")
        if number in self.unique_of:
            known = self.unique_of[number]
            hold(known == unique, f"id {number} was given to {known} and to {unique}")
            return
        self.unique_of[number] = unique
        first = self.id_of.setdefault(unique, number)
        is_keyed = bool(self.submitted[unique].get("key"))
        again = is_keyed and self._may_be_forgotten(first)
        hold(first == number or again, f"{unique} was accepted twice: as {first} and as {number}")
        self.id_of[unique] = number

    def _spec(self, task: int) -> dict[str, Any]:
        return self.submitted.get(self.unique_of.get(task, ""), {})

    def _may_be_forgotten(self, task: int) -> bool:
        """Tell whether somebody wanted that, or it ended long ago and there is no room for it."""
        if self._may_have(task, CLEANERS, 0):
            return True
        instances = self.jobs.get(task, Job()).instances
        has_ended = bool(instances) and bool(instances[-1].cause)
        may_have_ended = has_ended or bool(self._spec(task).get("deadline_ns"))
        is_over = may_have_ended or self._may_have(task, frozenset({"cancel", "kill", "drop"}), 0)
        return is_over and not self._keeps_all

    def _may_have(self, task: int, verbs: frozenset[str], since: int, until: int = NEVER) -> bool:
        """Tell whether a request of these verbs may have changed the task between the two."""
        return may_have(self.asked.values(), task, verbs, since, until)

    # --- what really happens ----------------------------------------------------------------------

    def begun(self, task: int, attempt: int, done: int) -> None:
        """The main process of an attempt starts to work, with so many items done before."""
        self.now += 1
        job = self.jobs.setdefault(task, Job())
        for one in job.instances:
            hold(one.cause != "", f"task {task}: {attempt} starts while {one.attempt} runs")
            hold(one.attempt < attempt, f"task {task}: attempt {attempt} after {one.attempt}")
        self._check_wanted(task, attempt, job)
        self._check_parallel()
        self.steering.check_start(task, self._spec(task), self.elapsed_ns())
        want = 0 if job.fresh else job.saved
        hold(done == want, f"task {task}.{attempt} resumes at item {done}, saved were {want}")
        job.fresh = False
        since = job.instances[-1].ended if job.instances else 0
        now_ns, reign = self.elapsed_ns(), self.attendance.reigns
        one = Instance(attempt, since, self.now, began_ns=now_ns, reign=reign)
        job.instances.append(one)

    def _check_wanted(self, task: int, attempt: int, job: Job) -> None:
        """Nothing that is over for good, or that was cancelled, starts again by itself."""
        for one in job.instances:
            if self._is_final(task, job, one):
                hold(
                    self._may_have(task, STARTERS, one.began),
                    f"task {task} was over with attempt {one.attempt}; {attempt} starts",
                )
        for request in self.asked.values():
            if request.verb in {"cancel", "kill"} and request.result is not None:
                if not request.has_put(task, "cancelled"):
                    continue
                hold(
                    self._may_have(task, STARTERS, request.sent),
                    f"task {task}: {request.verb} {request.request} was acknowledged, it starts",
                )

    def _check_parallel(self) -> None:
        """No more run at once than the group may ever have been set to."""
        asked = (one.args.get("parallel") for one in self.asked.values() if one.verb == "group_set")
        limit = max((parallel for parallel in asked if parallel), default=0)
        alive = sum(any(not one.cause for one in job.instances) for job in self.jobs.values())
        limit = max(limit, self._parallel)
        hold(alive < limit, f"{alive} tasks run and one more starts: {limit} may")

    def _is_final(self, task: int, job: Job, one: Instance) -> bool:
        """Tell whether nobody but a person may start the task after this end."""
        if self._spec(task).get("on_exit"):
            return one.cause == "exit" and one.code == 0 and self._is_undisturbed(task, one)
        is_plain = one.cause == "exit" and self._is_undisturbed(task, one)
        is_settled = one.code == 0 or (one.code in PERMANENT and not one.is_excused)
        return (is_plain and is_settled) or self._is_patience_over(task, job, one)

    def _is_patience_over(self, task: int, job: Job, last: Instance) -> bool:
        """Tell whether the failures that were allowed are used up, since a person said "again"."""
        retries = self._spec(task).get("retries")
        if retries is None:
            return False
        since = max(
            (min(one.answered, self.now) for one in self.asked.values()
             if one.verb in STARTERS and one.sent < last.ended and one.may_concern(task)),
            default=0,
        )  # fmt: skip
        failures = sum(
            one.began > since
            and one.is_known
            and not one.is_excused
            and self._is_undisturbed(task, one)
            and ((one.cause == "exit" and one.code == 1) or one.cause == "signal")
            for one in job.instances
            if one.attempt <= last.attempt
        )
        return failures > retries

    def _is_undisturbed(self, task: int, one: Instance) -> bool:
        """Tell whether certainly no stop of ours had to do with an end."""
        spec = self._spec(task)
        if one.was_signalled or spec.get("timeout_s") or spec.get("deadline_ns"):
            return False
        stops = frozenset({"cancel", "kill", "signal"})
        is_asked = self._may_have(task, stops, one.since, one.told)
        return not is_asked and not self._may_shut_down(one)

    def _may_shut_down(self, one: Instance) -> bool:
        """Tell whether a shutdown that stops tasks may have come before an end was known."""
        return any(
            asked.verb == "shutdown"
            and asked.args.get("tasks", "keep") != "keep"
            and asked.sent < one.told
            for asked in self.asked.values()
        )

    def did(self, task: int, attempt: int, item: int) -> None:
        """An item of a task is done; no item that a checkpoint covers is done again."""
        self.now += 1
        job = self.jobs[task]
        hold(item > job.saved, f"task {task}.{attempt} repeats item {item}, saved: {job.saved}")
        self._check_timeout(task, self._last(task, attempt))

    def _check_timeout(self, task: int, one: Instance) -> None:
        """Nothing runs on for long when its time is over, but where it was told to stop."""
        timeout_s = self._spec(task).get("timeout_s")
        if not timeout_s or one.was_signalled or one.was_told_to_stop:
            return
        self.checks += 1
        is_late = self.attendance.must_have_stopped(
            timeout_s, one.began_ns, one.reign, self.elapsed_ns()
        )
        hold(not is_late, f"task {task}.{one.attempt} runs on after its {timeout_s} s")

    def saved(self, task: int, attempt: int, checkpoint: int, items: int) -> None:
        self.now += 1
        job = self.jobs[task]
        hold(job.instances[-1].attempt == attempt, f"an old instance of task {task} saves")
        job.saved, job.checkpoint = items, checkpoint

    def _last(self, task: int, attempt: int) -> Instance:
        found = [one for one in self.jobs[task].instances if one.attempt == attempt]
        return found[-1]

    def ended(
        self, task: int, attempt: int, cause: str, code: int, signal: int, blame: str = ""
    ) -> None:
        self.now += 1
        one = self._last(task, attempt)
        self._check_timeout(task, one)
        one.is_excused = blame == "disk"
        one.cause, one.code, one.signal, one.ended = cause, code, signal, self.now
        one.ended_ns, one.last_reign = self.elapsed_ns(), self.attendance.reigns

    def vanished(self, task: int, attempt: int) -> None:
        """The power went while it ran."""
        self.ended(task, attempt, "reboot", 0, 0)
        self._last(task, attempt).is_known = False

    def signalled(self, task: int, attempt: int, signal: int) -> None:
        self.now += 1
        self.steering.delivered(task, signal)
        for one in self.jobs.get(task, Job()).instances:
            if one.attempt == attempt:
                one.was_signalled = True

    def told_to_stop(self, task: int, attempt: int) -> None:
        """Its control file says so."""
        for one in self.jobs.get(task, Job()).instances:
            if one.attempt == attempt:
                one.was_told_to_stop = True

    # --- what the daemon orders -------------------------------------------------------------------

    def forgotten(self, task: int, attempt: int) -> None:
        self.now += 1
        for one in self.jobs.get(task, Job()).instances:
            hold(one.attempt != attempt or one.cause != "", f"{task}.{attempt} is dropped alive")

    def deleted(self, task: int) -> None:
        self.now += 1
        job = self.jobs.get(task, Job())
        hold(all(one.cause for one in job.instances), f"task {task} is deleted while it runs")
        hold(self._may_be_forgotten(task), f"nobody wants task {task} deleted")

    def dropped(self, task: int, why: str) -> None:
        """The checkpoints of a task are given up by order."""
        self.now += 1
        if task not in self.jobs:
            return
        job = self.jobs[task]
        fresh = any(
            one.verb == "retry" and one.args.get("fresh") and one.may_concern(task)
            for one in self.asked.values()
        )
        last = job.instances[-1]
        over = last.cause == "exit" and last.code == 0
        hold(fresh or over, f"the checkpoints of task {task} are dropped: {why}")
        job.saved, job.fresh = 0, True

    def check_intent(self, task: int, attempt: int, durable: int) -> None:
        """`durable`: the newest attempt of the task that a power cut now would leave in the log."""
        self.checks += 1
        hold(durable >= attempt, f"{task}.{attempt} starts, durable is the intent of {durable}")

    # --- what clients see -------------------------------------------------------------------------

    def seen(self, rows: list[dict[str, Any]], asked_at: int) -> None:
        """Rows of status, wait or show, asked for at `asked_at`."""
        for row in rows:
            self.checks += 1
            self._names(row["id"], row["argv"][1])
            hold(
                row["argv"] == list(self.submitted[row["argv"][1]]["argv"]),
                f"task {row['id']} has the command {row['argv']}",
            )
            self._check_phase(row, asked_at)
            if row["cause"]:
                last = row["attempt"] - (row["phase"] in ACTIVE)
                self.check_end(row["id"], last, (row["cause"], row["code"], row["signal"]))

    def _check_phase(self, row: dict[str, Any], asked_at: int) -> None:
        task = row["id"]
        instances = self.jobs.get(task, Job()).instances
        last = next((one for one in instances if one.attempt == row["attempt"]), None)
        if row["phase"] == "succeeded":
            hold(
                last is not None and (last.cause, last.code) == ("exit", 0),
                f"task {task} is told as succeeded, attempt {row['attempt']} did not end well",
            )
        if row["phase"] in {"failed", "quarantined"} and last is not None:
            hold(
                (last.cause, last.code) != ("exit", 0)
                or not self._is_undisturbed(task, last)
                or self._may_have(task, STARTERS, last.since),
                f"task {task} is told as {row['phase']}, attempt {row['attempt']} ended well",
            )
        if row["phase"] in {"running", "paused"}:
            hold(
                last is not None,
                f"task {task} is told as {row['phase']}, attempt {row['attempt']} never began",
            )
            assert last is not None
            last.was_told = True
        self._check_cancel(task, row["phase"], asked_at)
        first = self._spec(task).get("priority", 0)
        self.steering.check_row(row, NEVER if last is None else last.began, first, asked_at)

    def _check_cancel(self, task: int, phase: str, asked_at: int) -> None:
        for request in self.asked.values():
            if request.verb not in {"cancel", "kill"} or request.answered >= asked_at:
                continue
            if request.result is None:
                continue
            ends = request.has_put(task, "cancelled")
            if not ends and not request.has_put(task, "stopping"):
                continue
            hold(
                phase == "cancelled"
                or (phase == "stopping" and not ends)
                or self._may_have(task, STARTERS, request.sent),
                f"task {task}: {request.verb} {request.request} was acknowledged, it is {phase}",
            )

    def check_end(self, task: int, attempt: int, told: tuple[str, int | None, int | None]) -> None:
        """What is told of an end is what happened; where nobody could know, that is told."""
        self.checks += 1
        cause, code, signal = told
        found = [one for one in self.jobs.get(task, Job()).instances if one.attempt == attempt]
        name = f"task {task}.{attempt} is told as {cause} {code} {signal}"
        if not found:
            hold(cause == "not_started", f"{name}, but it never began")
            return
        one = found[0]
        hold(one.cause != "", f"{name}, but it runs")
        one.told = min(one.told, self.now)
        if not one.is_known:
            hold(cause in {"reboot", "not_started"}, f"{name}, but its end went with the power")
            hold(cause == "reboot" or not one.was_told, f"{name}, but it was told as running")
            return
        if cause in OWN_STOPS:
            hold(one.cause in {"exit", "signal"}, f"{name}, but it ended by {one.cause}")
            hold(self._may_have_stopped(task, cause, one), f"{name}, but nobody wanted that")
        else:
            hold(cause == one.cause, f"{name}, but it ended by {one.cause}")
        if one.cause in {"exit", "spawn_error"}:
            hold(code == one.code, f"{name}, but its code was {one.code}")
        if one.cause in {"signal", "oom"}:
            hold(signal == one.signal, f"{name}, but its signal was {one.signal}")

    def _may_have_stopped(self, task: int, cause: str, one: Instance) -> bool:
        spec = self._spec(task)
        if cause == "timeout":
            return self._may_have_timed_out(spec.get("timeout_s", 0.0), one)
        if cause == "deadline":
            return bool(spec.get("deadline_ns"))
        if cause == "shutdown":
            return self._may_shut_down(one)
        return self._may_have(task, frozenset({"cancel", "kill"}), one.since, one.told)

    def _may_have_timed_out(self, timeout_s: float, one: Instance) -> bool:
        """A clock that is set fires no timeout, unless nobody was there to see it.

        Set between a start and the news of it, it may: the news carries the clock of before.
        """
        is_unseen = self.attendance.was_set_unseen(one.began_ns, is_adopted=False)
        if one.reign != one.last_reign or is_unseen:
            return timeout_s > 0
        return 0 < timeout_s * 1e9 <= one.ended_ns - one.began_ns + TOLD_LATE_NS

    def begins_to_reign(self) -> None:
        """A daemon starts."""
        self.attendance.begins()
        self._reign_began = self.now

    def turn_is_over(self) -> list[Asked]:
        """The daemon has lived through a turn; return what it has answered in it."""
        return self.steering.turn_is_over(self._reign_began)

    def recovered(self, rows: list[dict[str, Any]]) -> None:
        """All tasks, as the first client after a recovery sees them."""
        self.now += 1
        here = {row["id"] for row in rows}
        for task in self.acknowledged - here:
            hold(self._may_be_forgotten(task), f"task {task} was acknowledged and is lost")
        self.seen(rows, self.now)

    def details(self, details: list[dict[str, Any]]) -> None:
        """What `show` tells of every attempt."""
        for detail in details:
            for row in detail["attempts"]:
                told = (row["cause"], row["code"], row["signal"])
                self.check_end(detail["row"]["id"], row["attempt"], told)

    def finished(self, rows: list[dict[str, Any]]) -> None:
        """All faults are over for long: everything that can end has ended."""
        for row in rows:
            hold(row["phase"] in FINISHED, f"task {row['id']} is {row['phase']} for ever")
