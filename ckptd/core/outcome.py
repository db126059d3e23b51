"""What a sighting means: from what the runner saw to the records that say so.

The verdict on an end (done, try again, when, or give up) is worked out here once and stored as
values, so that a changed policy never changes an old replay. Read next: `plan.py`, `retry.py`.
"""

from msgspec.structs import replace

from ckptd.core import retry
from ckptd.core.policy import Now, Policy
from ckptd.core.port import DISK, EndSeen, MarkSeen, StartSeen
from ckptd.core.records import (
    ACTIVE,
    DRILL_OOM,
    PENDING,
    AnyRecord,
    Ended,
    Marked,
    Phase,
    Started,
    Verdict,
)
from ckptd.core.state import Run, State, Stop, Task
from ckptd.protocol.on_oom import parse_on_oom


def started(state: State, seen: StartSeen) -> list[AnyRecord]:
    """Return the record of a start, or nothing where it is already known or of another attempt."""
    task = state.tasks.get(seen.task)
    if task is None or task.run is None or task.phase not in ACTIVE:
        return []
    if task.run.attempt != seen.attempt or task.run.shim is not None:
        return []
    return [
        Started(
            seen.task,
            seen.attempt,
            seen.at_ns,
            seen.shim,
            seen.pid,
            seen.resumed_from,
            seen.warning,
            seen.invocation,
        )
    ]


def marked(state: State, seen: MarkSeen, now: Now) -> list[AnyRecord]:
    """Return the record of durable progress, or nothing where nothing changed.

    A problem alone says nothing of what was saved. And in an attempt the checkpoint only grows:
    one that is lost under it stays known, so that the next start tells of it. So does a journal.
    """
    task = state.tasks.get(seen.task)
    if task is None or task.run is None or task.phase not in ACTIVE:
        return []
    run = task.run
    if run.attempt != seen.attempt or not _tells(seen, run):
        return []
    newest = max(seen.checkpoint, run.checkpoint)
    if (run.cursor, run.checkpoint, run.has_journal) == (seen.cursor, newest, seen.has_journal):
        return []
    return [
        Marked(
            seen.task, seen.attempt, now.at_ns, newest, seen.checkpoint_ns, seen.cursor,
            seen.has_journal,
        )
    ]  # fmt: skip


def _tells(mark: MarkSeen, run: Run) -> bool:
    """Tell whether a cursor counts: one without the journal that was there tells of no progress."""
    return bool(mark.cursor) and (mark.has_journal or not run.has_journal)


def ended(
    state: State, seen: EndSeen, mark: MarkSeen | None, now: Now, policy: Policy
) -> list[AnyRecord]:
    """Return the record of an end with its verdict, or nothing where the attempt is not ours.

    `mark` is the last word of the task's files about this attempt, where there is one.
    """
    task = state.tasks.get(seen.task)
    if task is None or task.run is None or task.phase not in ACTIVE:
        return []
    run = task.run
    if run.attempt != seen.attempt:
        return []
    if seen.cause == "not_started" and run.shim is not None:
        # It ran: we have its start. Its claim went with the power, so the machine went down.
        seen = replace(seen, cause="reboot", started_ns=run.started_ns)
    if mark is not None and _tells(mark, run):
        run = replace(run, cursor=mark.cursor, checkpoint_ns=mark.checkpoint_ns)
    started_ns = seen.started_ns or run.started_ns or run.intent_ns
    ended_ns = max(seen.ended_ns or now.at_ns, started_ns)
    judge = _Judge(state, task, run, seen, mark, now, policy)
    verdict = judge.verdict(ended_ns)
    cause = run.stop.why if run.stop is not None and seen.cause in _BY_STOP else seen.cause
    lost_s = 0.0
    if verdict.phase in PENDING and seen.cause != "not_started":
        kept_ns = max(run.checkpoint_ns, mark.gained_ns if mark is not None else 0)
        lost_s = max(0, ended_ns - max(started_ns, kept_ns)) / 1e9
    return [
        Ended(
            task=seen.task,
            attempt=seen.attempt,
            at_ns=now.at_ns,
            cause=cause,
            code=seen.code,
            signal=seen.signal,
            core=seen.core,
            started_ns=started_ns,
            ended_ns=ended_ns,
            cpu_s=seen.cpu_s,
            rss_bytes=seen.rss_bytes,
            lost_s=lost_s,
            cursor=run.cursor,
            text=mark.problem if mark is not None and mark.problem else seen.text,
            verdict=verdict,
            blame=seen.blame,
            memory_bytes=judge.memory_bytes,
        )
    ]


_ASKED_S_MIN = 1.0  # a shorter wish is a loop
_BY_STOP = frozenset({"exit", "signal", "shutdown", "stopped"})  # may be our own stop's doing


class _Judge:
    """One end under judgement; the counters are those after it."""

    def __init__(  # noqa: PLR0913, PLR0917 - everything that the verdict may look at
        self,
        state: State,
        task: Task,
        run: Run,
        seen: EndSeen,
        mark: MarkSeen | None,
        now: Now,
        policy: Policy,
    ) -> None:
        self.state, self.task, self.run, self.seen = state, task, run, seen
        self.mark, self.now, self.policy = mark, now, policy
        self.spec = task.unpacked()
        self.progressed = run.cursor != run.base
        self.failures = run.failures
        self.memory_bytes = 0  # the limit from now on, where it changes
        # Progress since the start proves that the task gets on: the patience counters start anew.
        self.interruptions = 0 if self.progressed else run.interruptions
        self.stalls = 0 if self.progressed else run.stalls
        self.crashes = 0 if self.progressed else run.crashes
        self.host_deaths = 0 if self.progressed else run.host_deaths

    def verdict(self, ended_ns: int) -> Verdict:
        """Return the verdict; `ended_ns` is when the end really happened."""
        self.ended_ns = min(ended_ns, self.now.at_ns)
        stop = self.run.stop
        if stop is not None and stop.why in ("cancel", "kill"):
            return self._next(Phase.CANCELLED, stop.why)
        if self.seen.cause == "stopped" and stop is None:
            return self._next(Phase.CANCELLED, "stopped")
        is_full = self.seen.blame == DISK
        meaning = retry.exit_class(self.seen.code, self.spec.on_exit, is_full=is_full)
        is_done = self.seen.cause == "exit" and meaning == retry.OK
        if is_done and (stop is None or stop.rung == 0 or self._is_starved(stop)):
            return self._next(Phase.SUCCEEDED, "")  # done, before any signal was sent
        if self.mark is not None and self.mark.problem:
            return self._next(Phase.BLOCKED, self.mark.why or "checkpoint")
        if stop is not None:
            return self._stopped(stop.why)
        was_child = self.seen.cause == "exit" and meaning == retry.RETRY  # make(1): exit code 2
        if self.seen.cause == "oom" or (self.seen.blame and was_child and not is_full):
            return self._out_of_memory()
        match self.seen.cause:
            case "exit":
                return self._exited(meaning)
            case "signal":
                return self._failed(crash=self.seen.signal in retry.CRASH_SIGNALS)
            case "spawn_error" if self.seen.code in retry.SPAWN_TRANSIENT:
                return self._transient()
            case "spawn_error":
                self.failures += 1
                return self._next(Phase.FAILED, "cannot start")
            case "not_started":
                return self._next(Phase.QUEUED, "")
            case "shutdown":
                return self._interrupted(host_death=False)
            case _:  # lost, reboot
                return self._interrupted(host_death=True)

    def _is_starved(self, stop: Stop) -> bool:
        """Tell whether memory was taken away, and nothing else was done: nobody was killed."""
        return stop.why == DRILL_OOM and stop.rung == 1 and not self.seen.blame

    def _stopped(self, why: str) -> Verdict:
        if why == "deadline":
            self.failures += 1
            return self._next(Phase.FAILED, "deadline")
        if why == "timeout":
            return self._failed(crash=False)
        return self._interrupted(host_death=False)  # shutdown, drill

    def _exited(self, meaning: str) -> Verdict:
        if meaning == retry.FAIL:
            self.failures += 1
            return self._next(Phase.FAILED, "permanent")
        if meaning == retry.TRANSIENT and self._is_mistyped():
            self.failures += 1
            return self._next(Phase.FAILED, "usage error")
        if meaning == retry.TRANSIENT:
            return self._transient()
        if meaning == retry.AGAIN:
            self.stalls += not self.progressed
            if self.stalls >= self.policy.stalls_max:
                return self._next(Phase.QUARANTINED, "checkpointed without progress")
            return self._next(Phase.QUEUED, "")
        return self._failed(crash=False)

    def _is_mistyped(self) -> bool:
        """Return whether exit 2, though it means "try again" here, only says that a line is wrong.

        Source: argparse, getopt(1), bash and a missing Python script all exit with 2.
        """
        tried = (one for one in self.run.past if one.attempt > self.run.patience_from)
        before = list(tried)[1 - retry.USAGE_TIMES :]
        asked_s = self.mark.retry_after_s if self.mark is not None else 0.0
        if self.progressed or asked_s or len(before) < retry.USAGE_TIMES - 1:
            return False
        began_ns = self.seen.started_ns or self.run.started_ns
        ends = [(self.seen.cause, self.seen.blame, self.seen.code, began_ns, self.ended_ns)]
        ends += [(one.cause, one.blame, one.code, one.started_ns, one.ended_ns) for one in before]
        return all(
            (*how, code) == ("exit", "", retry.USAGE_CODE) and to - at < retry.USAGE_S_MAX * 1e9
            for *how, code, at, to in ends
        )

    def _failed(self, *, crash: bool) -> Verdict:
        self.failures += 1
        self.stalls += 1
        self.crashes += crash
        limit = self.spec.max_failures
        if self.failures >= limit if limit else not self.progressed:
            return self._next(Phase.FAILED, "")
        if crash and self.crashes >= self.policy.crashes_max:
            return self._next(Phase.QUARANTINED, "crashes at the same place")
        if self.stalls >= self.policy.stalls_max:
            return self._next(Phase.QUARANTINED, "fails without progress")
        # A failure after progress starts the delays anew.
        delay_ns = retry.backoff_ns(
            self.stalls, self.spec.backoff_s, self.spec.backoff_max_s, self._jitter()
        )
        return self._next(Phase.WAITING, "backoff", self.ended_ns + delay_ns)

    def _out_of_memory(self) -> Verdict:
        """Judge what the kernel's OOM killer did: to the main process, or to a child of it.

        A limit that grows is no failure: Bound: `max_bytes`, at which it counts as one.
        """
        if self.seen.blame == "host":
            return self._transient()
        wanted = parse_on_oom(self.spec.on_oom)
        if self.seen.blame == "limit" and wanted.action != "count":
            limit_bytes = self.spec.memory_bytes
            grown_bytes = wanted.next_bytes(limit_bytes)
            if grown_bytes > limit_bytes > 0:
                self.memory_bytes = grown_bytes
                return self._next(Phase.QUEUED, "oom")
            if wanted.action == "hold":
                return self._next(Phase.HELD, "oom")
            if wanted.action == "fail":
                self.failures += 1
                return self._next(Phase.FAILED, "oom")
        return self._failed(crash=self.seen.cause == "oom")

    def _transient(self) -> Verdict:
        asked_s = self.mark.retry_after_s if self.mark is not None else 0.0
        # A wait that the task asked for costs nobody anything, however often: it is not counted.
        self.interruptions += asked_s < _ASKED_S_MIN
        if self.interruptions > self.policy.interruptions_max:
            return self._next(Phase.QUARANTINED, "too many interruptions")
        if asked_s:
            floor_ns = int(min(asked_s, self.policy.retry_after_max_s) * 1e9)
            spread_ns = int(self._jitter() * floor_ns / 10)
            return self._next(Phase.WAITING, "rate_limit", self.ended_ns + floor_ns + spread_ns)
        delay_ns = retry.backoff_ns(
            self.interruptions,
            self.policy.transient_backoff_s,
            self.policy.transient_backoff_max_s,
            self._jitter(),
        )
        return self._next(Phase.WAITING, "transient", self.ended_ns + delay_ns)

    def _interrupted(self, *, host_death: bool) -> Verdict:
        self.interruptions += 1
        died_with_us = host_death and not (self.seen.cause == "reboot" and self.state.clean)
        self.host_deaths += died_with_us
        if self.host_deaths >= self.policy.host_deaths_max and died_with_us:
            return self._next(Phase.QUARANTINED, "died with the daemon or host again")
        if self.interruptions > self.policy.interruptions_max:
            return self._next(Phase.QUARANTINED, "too many interruptions")
        return self._next(Phase.QUEUED, "")

    def _jitter(self) -> float:
        return retry.jitter(self.now.seed, self.task.id, self.run.attempt)

    def _next(self, phase: Phase, reason: str, until_ns: int = 0) -> Verdict:
        tried = self.run.attempt - self.run.patience_from
        if reason != "rate_limit" and phase in PENDING and tried >= self.policy.attempts_max:
            phase, reason, until_ns = Phase.QUARANTINED, "too many attempts", 0
        return Verdict(
            phase,
            reason,
            until_ns,
            self.failures,
            self.interruptions,
            self.stalls,
            self.crashes,
            self.host_deaths,
        )
