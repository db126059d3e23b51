"""The log's records as a story for people: one journal line for what an admin would ask about.

Told after the commit, never before: the log is the truth, the journal tells of it. A record waits
until the loop has nothing better to do, so that telling costs no client a microsecond; a crash
may take the last lines with it, never a record. What a task writes itself comes between its lines
where the task asked for that (`echo.py`). Every field is in docs/JOURNAL.md.
"""

from collections.abc import Iterable

from ckptd.core.explain import UNSEEN, ending, lasting
from ckptd.core.port import UNLIMITED
from ckptd.core.records import (
    DRILL_OOM,
    Answered,
    AnyRecord,
    CheckpointsDropped,
    Edited,
    Ended,
    EnvStored,
    FreezeIntent,
    GroupChanged,
    GroupRemoved,
    Marked,
    Moved,
    Phase,
    Removed,
    Reset,
    SignalIntent,
    Started,
    StopIntent,
    Submitted,
)
from ckptd.core.state import Past, State, Task
from ckptd.daemon.echo import Echo
from ckptd.host.journal import CRITICAL, DEBUG, INFO, WARNING, Field, Journal, Kind
from ckptd.protocol.ids import unit_name

UNTOLD_MAX = 4_096
LISTED_MAX = 512  # in one line: journald takes no entry with more than 1,024 fields
BULK_LINES_MAX = 8
SHOWN_MAX = 20
AT_ONCE_S = 0.05
AGAIN_S = 0.1  # between two tries while journald takes nothing
_RUNGS = ("asked to save", "sent its stop signal", "killed with all its processes")


class Story:
    """Tells records."""

    def __init__(self, journal: Journal, echo: Echo) -> None:
        self._journal = journal
        self.echo = echo
        self._untold: list[tuple[int, AnyRecord]] = []
        self._is_behind = False  # journald is yet to take lines

    def hear(self, records: Iterable[tuple[int, AnyRecord]]) -> None:
        """Remember durable records, to be told later."""
        self._untold += records

    @property
    def is_long(self) -> bool:
        """Tell whether so much is untold that it must not wait any longer."""
        return len(self._untold) > UNTOLD_MAX

    def tell_all(self, state: State) -> None:
        """Tell what is untold; many submits in a row are one line."""
        self._journal.flush()
        untold, self._untold = self._untold, []
        submits: list[tuple[int, Submitted]] = []
        for lsn, record in untold:
            if isinstance(record, Submitted):
                if submits and submits[-1][1].uid != record.uid:
                    self._submitted(state, submits)
                submits.append((lsn, record))
            elif not isinstance(record, Answered | EnvStored):
                self._submitted(state, submits)
                self._tell(state, lsn, record)
        self._submitted(state, submits)
        self._is_behind = not self._journal.flush()  # our own lines first
        self.echo.pump()

    def timeout_s(self, longest_s: float) -> float:
        """Return when there is something to tell though nothing happens; -1 for never."""
        soonest_s = self.echo.timeout_s(longest_s)
        if not self._is_behind:
            return soonest_s
        return AGAIN_S if soonest_s < 0 else min(soonest_s, AGAIN_S)

    def close(self, state: State) -> None:
        """Tell the rest."""
        self.tell_all(state)
        self.echo.close()

    def adopted(self, state: State, since_ns: int) -> None:
        """Tell which attempts of before `since_ns` live on; call it once their fate is known."""
        found = [
            (task, task.run)
            for number in sorted(state.active)
            if (task := state.tasks.get(number)) is not None
            and task.run is not None
            and 0 < task.run.started_ns < since_ns
        ]
        ids = [task.id for task, _ in found]
        if len(found) == 1:
            task, run = found[0]
            text = f"task {task.id}, attempt {run.attempt} lived on and is adopted"
            unit = unit_name(task.id, run.attempt) if run.invocation else ""
            self._line(
                Kind.ATTEMPT_ADOPTED, text, state.lsn, task.id, task.phase,
                attempt=run.attempt, uid=task.uid, unit=unit,
            )  # fmt: skip
        elif found:
            text = f"{len(ids)} tasks lived on and are adopted: {_shown(ids)}"
            self._journal.event(
                Kind.ATTEMPT_ADOPTED, text, INFO, task_id=_listed(ids), lsn=state.lsn,
                count=len(ids), first=ids[0], last=ids[-1],
            )  # fmt: skip

    # --- tasks --------------------------------------------------------------------------------

    def _submitted(self, state: State, submits: list[tuple[int, Submitted]]) -> None:
        """Tell submits of one user in a row; each is found by its id, up to a bound."""
        if not submits:
            return
        lsn, last = submits[-1]
        if len(submits) == 1:
            text = f"task {last.task} submitted by uid {last.uid}: {_name(state, last.task)}"
            text += _entry(last)
            self._line(Kind.TASK_SUBMITTED, text, lsn, last.task, last.phase, uid=last.uid)
        else:
            ids = [record.task for _, record in submits]
            for number in range(BULK_LINES_MAX):
                cut = len(ids) if number == BULK_LINES_MAX - 1 else LISTED_MAX
                self._bulk(lsn, last.uid, ids[:cut])
                ids = ids[cut:]
                if not ids:
                    break
        submits.clear()

    def _bulk(self, lsn: int, uid: int, ids: list[int]) -> None:
        text = f"{len(ids)} tasks submitted by uid {uid}: {ids[0]} to {ids[-1]}"
        self._journal.event(
            Kind.TASK_SUBMITTED, text, INFO, task_id=_listed(ids), lsn=lsn, uid=uid,
            count=len(ids), first=ids[0], last=ids[-1],
        )  # fmt: skip

    def _tell(self, state: State, lsn: int, record: AnyRecord) -> None:
        """Tell one durable record, where it is worth a line."""
        match record:
            case Started():
                self._started(state, lsn, record)
            case Ended():
                self._ended(state, lsn, record)
            case Marked():
                text = f"task {record.task} saved checkpoint {record.checkpoint}"
                self._line(
                    Kind.CHECKPOINT_FOUND, text, lsn, record.task, Phase.RUNNING, DEBUG,
                    attempt=record.attempt,
                )  # fmt: skip
            case Moved():
                self._moved(state, lsn, record)
            case StopIntent() | FreezeIntent() | SignalIntent():
                self._acted(lsn, record)
            case Reset() | Edited():
                text = "was edited" if isinstance(record, Edited) else "is to run again"
                text += " from nothing" if isinstance(record, Reset) and record.fresh else ""
                self._line(Kind.TASK_CHANGED, f"task {record.task} {text}", lsn, record.task)
            case Removed():
                text = f"task {record.task} forgotten, its files are deleted"
                self._line(Kind.TASK_REMOVED, text, lsn, record.task, priority=DEBUG)
            case CheckpointsDropped():
                text = f"task {record.task} succeeded a while ago, its checkpoints are deleted"
                self._line(Kind.TASK_CHANGED, text, lsn, record.task, priority=DEBUG)
            case GroupChanged():
                text = f"group {record.name}: {record.parallel or 'as many as processors'} at once"
                text += ", paused" if record.paused else ""
                self._journal.event(Kind.GROUP_CHANGED, text, INFO, lsn=lsn, group=record.name)
            case GroupRemoved():
                text = f"group {record.name} removed"
                self._journal.event(Kind.GROUP_CHANGED, text, INFO, lsn=lsn, group=record.name)
            case _:
                pass

    def _started(self, state: State, lsn: int, record: Started) -> None:
        task = state.tasks.get(record.task)
        text = f"task {record.task}, attempt {record.attempt} started: {_name(state, record.task)}"
        text += f", pid {record.pid}" if record.pid else ""
        if record.resumed_from:
            text += f", resumed from checkpoint {record.resumed_from}"
        self._line(
            Kind.TASK_STARTED, text, lsn, record.task, Phase.RUNNING, attempt=record.attempt,
            uid=task.uid if task else "", unit=_unit(record, record.invocation),
        )  # fmt: skip
        if record.warning:
            warning = f"task {record.task}, attempt {record.attempt}: {record.warning}"
            is_limit = record.warning.startswith(UNLIMITED)
            kind, priority = (
                (Kind.NOTE, WARNING) if is_limit else (Kind.CHECKPOINT_CORRUPT, CRITICAL)
            )
            self._line(
                kind, warning, lsn, record.task, Phase.RUNNING, priority, attempt=record.attempt
            )
        if task is not None:
            self.echo.follow(task, record.attempt, record.invocation)

    def _ended(self, state: State, lsn: int, record: Ended) -> None:
        self.echo.finish(record.task, record.attempt)
        task, verdict = state.tasks.get(record.task), record.verdict
        past = _past(task, record.attempt)
        how = ending(past) if past is not None else f"ended ({record.cause})"
        kind, priority = Kind.TASK_ENDED, INFO
        if verdict.phase is Phase.QUARANTINED:
            kind, priority = Kind.TASK_QUARANTINED, CRITICAL
        elif verdict.phase is Phase.BLOCKED:
            kind, priority = Kind.TASK_BLOCKED, WARNING
        elif record.cause in UNSEEN:
            kind, priority = Kind.ATTEMPT_LOST, WARNING
        elif verdict.phase in (Phase.WAITING, Phase.QUEUED):
            kind = Kind.TASK_RETRYING
        elif verdict.phase is Phase.FAILED:
            priority = WARNING
        self._line(
            kind,
            f"task {record.task}, attempt {record.attempt} {how}: {_outlook(record)}",
            lsn,
            record.task,
            verdict.phase,
            priority,
            attempt=record.attempt,
            cause=record.cause,
            duration_us=max(0, record.ended_ns - record.started_ns) // 1_000,
            uid=task.uid if task else "",
            unit=_unit(record, past.invocation if past is not None else ""),
            errno=record.code if record.cause == "spawn_error" else "",
        )

    def _moved(self, state: State, lsn: int, record: Moved) -> None:
        """Tell of a task that changed its phase without running; that its turn comes is no news."""
        text = f"task {record.task} is {record.phase.word}"
        text += f": {record.reason}" if record.reason else ""
        task = state.tasks.get(record.task)
        priority = DEBUG if record.phase in (Phase.QUEUED, Phase.WAITING) else INFO
        kind = Kind.TASK_BLOCKED if record.phase is Phase.BLOCKED else Kind.TASK_CHANGED
        uid = task.uid if task else ""
        self._line(kind, text, lsn, record.task, record.phase, priority, uid=uid)

    def _acted(self, lsn: int, record: StopIntent | FreezeIntent | SignalIntent) -> None:
        """Tell what is done to a running attempt."""
        phase, by = None, getattr(record, "by", -1)
        if isinstance(record, StopIntent):
            is_starved = record.why == DRILL_OOM and record.rung == 1
            said = "gets no memory any more" if is_starved else _RUNGS[record.rung]
            text, phase = f"{said} ({record.why})", Phase.STOPPING
        elif isinstance(record, FreezeIntent):
            text = "frozen" if record.frozen else "goes on"
            phase = Phase.PAUSED if record.frozen else Phase.RUNNING
        else:
            text = f"sent signal {record.signal}" + (" (all its processes)" if record.tree else "")
        said = f" by uid {by}" if by >= 0 else ""
        self._line(
            Kind.TASK_CHANGED, f"task {record.task}, attempt {record.attempt} {text}{said}", lsn,
            record.task, phase, attempt=record.attempt, cause=getattr(record, "why", ""),
        )  # fmt: skip

    def _line(
        self,
        kind: Kind,
        text: str,
        lsn: int,
        task: int,
        phase: Phase | None = None,
        priority: int = INFO,
        **fields: Field,
    ) -> None:
        word = phase.word if phase is not None else ""
        self._journal.event(kind, text, priority, task_id=task, lsn=lsn, phase=word, **fields)


def _listed(ids: list[int]) -> tuple[int, ...]:
    """Return what `journalctl CKPTD_TASK_ID=` finds a line of many tasks by."""
    return tuple(ids if len(ids) <= LISTED_MAX else [*ids[: LISTED_MAX - 1], ids[-1]])


def _shown(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:SHOWN_MAX])) + (", ..." if len(ids) > SHOWN_MAX else "")


def _name(state: State, number: int) -> str:
    """Return what a person called it; never the arguments, which may hold secrets."""
    task: Task | None = state.tasks.get(number)
    if task is None:
        return "?"
    name = task.unpacked().name
    return name if name.isprintable() else ascii(name)[1:-1]


def _entry(record: Submitted) -> str:
    """Return where an accepted task is, unless it just waits for its turn."""
    if record.phase is Phase.WAITING and record.reason == "after":
        return ", starts after " + ", ".join(str(need.task) for need in record.needs[:20])
    if record.phase is Phase.WAITING:
        return f", starts in {lasting((record.until_ns - record.at_ns) / 1e9)}"
    if record.phase is Phase.QUEUED:
        return ""
    return f", {record.phase.word}" + (f": {record.reason}" if record.reason else "")


def _outlook(record: Ended) -> str:
    """Return what becomes of the task now."""
    verdict = record.verdict
    left_s = (verdict.until_ns - record.at_ns) / 1e9
    after = f"in {lasting(left_s)}" if left_s >= AT_ONCE_S else "at once"
    match verdict.phase, verdict.reason:
        case Phase.WAITING, "backoff":
            return f"tries again {after}, after failure {verdict.failures}"
        case Phase.WAITING, reason:
            return f"goes on {after} ({reason}), no failure is counted"
        case Phase.QUEUED, "oom":
            return f"starts again with a limit of {record.memory_bytes} bytes"
        case Phase.QUEUED, _:
            return "starts again"
        case phase, reason:
            return phase.word + (f", {reason}" if reason not in ("", "cancel", "kill") else "")


def _unit(record: Started | Ended, invocation: str) -> str:
    return unit_name(record.task, record.attempt) if invocation else ""


def _past(task: Task | None, attempt: int) -> Past | None:
    past = task.run.past if task is not None and task.run is not None else ()
    return next((one for one in past if one.attempt == attempt), None)
