"""The log's records as a story for people: one journal line for what an admin would ask about.

Told after the commit, never before: the log is the truth, the journal tells of it. A record waits
until the loop has nothing better to do, so that telling costs no client a microsecond; a crash
may take the last lines with it, never a record.
"""

from collections.abc import Iterable

from ckptd.core.explain import ending
from ckptd.core.records import (
    Answered,
    AnyRecord,
    Ended,
    EnvStored,
    GroupChanged,
    Marked,
    Moved,
    Phase,
    Removed,
    Reset,
    Started,
    StopIntent,
    Submitted,
)
from ckptd.core.state import State, Task
from ckptd.daemon.journal import DEBUG, INFO, WARNING, Field, Journal, Kind

_CRITICAL = 2
UNTOLD_MAX = 4_096
_LOST = frozenset({"lost", "reboot"})


class Story:
    """Tells records."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._untold: list[tuple[int, AnyRecord]] = []

    def hear(self, records: Iterable[tuple[int, AnyRecord]]) -> None:
        """Remember durable records, to be told later."""
        self._untold += records

    @property
    def is_long(self) -> bool:
        """Tell whether so much is untold that it must not wait any longer."""
        return len(self._untold) > UNTOLD_MAX

    def tell_all(self, state: State) -> None:
        """Tell what is untold; many submits in a row are one line."""
        untold, self._untold = self._untold, []
        submits: list[tuple[int, Submitted]] = []
        for lsn, record in untold:
            if isinstance(record, Submitted):
                submits.append((lsn, record))
            elif not isinstance(record, Answered | EnvStored):
                self._tell_submits(state, submits)
                self._tell(state, lsn, record)
        self._tell_submits(state, submits)

    def _tell_submits(self, state: State, submits: list[tuple[int, Submitted]]) -> None:
        if not submits:
            return
        lsn, last = submits[-1]
        text = f"task {last.task} submitted: {_name(state, last.task)}"
        if len(submits) > 1:
            first = submits[0][1].task
            text = f"{len(submits)} tasks submitted, {first} to {last.task}"
        self._line(Kind.TASK_SUBMITTED, text, lsn, last.task, uid=last.uid)
        submits.clear()

    def _tell(self, state: State, lsn: int, record: AnyRecord) -> None:
        """Tell one durable record, where it is worth a line."""
        match record:
            case Started():
                self._started(lsn, record)
            case Ended():
                self._ended(state, lsn, record)
            case Marked():
                text = f"task {record.task} saved checkpoint {record.checkpoint}"
                self._line(
                    Kind.CHECKPOINT_FOUND, text, lsn, record.task, DEBUG, attempt=record.attempt
                )
            case Moved() | Reset() | StopIntent():
                self._changed(lsn, record)
            case Removed():
                text = f"task {record.task} forgotten"
                self._line(Kind.TASK_REMOVED, text, lsn, record.task, DEBUG)
            case GroupChanged():
                text = f"group {record.name}: parallel {record.parallel}"
                text += ", paused" if record.paused else ""
                self._journal.event(Kind.GROUP_CHANGED, text, INFO, lsn=lsn, group=record.name)
            case _:
                pass

    def _started(self, lsn: int, record: Started) -> None:
        text = f"task {record.task} started, attempt {record.attempt}, pid {record.pid}"
        if record.resumed_from:
            text += f", resumed from checkpoint {record.resumed_from}"
        self._line(Kind.TASK_STARTED, text, lsn, record.task, attempt=record.attempt)
        if record.warning:
            warning = f"task {record.task}: {record.warning}"
            self._line(Kind.CHECKPOINT_CORRUPT, warning, lsn, record.task, WARNING)

    def _ended(self, state: State, lsn: int, record: Ended) -> None:
        task, verdict = state.tasks.get(record.task), record.verdict
        past = task.run.past[-1] if task is not None and task.run and task.run.past else None
        text = f"task {record.task} attempt {record.attempt}: {ending(past) if past else ''}"
        kind, priority = Kind.TASK_ENDED, INFO
        if verdict.phase is Phase.QUARANTINED:
            kind, priority = Kind.TASK_QUARANTINED, _CRITICAL
        elif verdict.phase is Phase.BLOCKED:
            kind, priority = Kind.TASK_BLOCKED, WARNING
        elif record.cause in _LOST:
            kind, priority = Kind.ATTEMPT_LOST, WARNING
        elif verdict.phase in (Phase.WAITING, Phase.QUEUED):
            kind = Kind.TASK_RETRYING
        elif verdict.phase is Phase.FAILED:
            priority = WARNING
        text += f" -> {verdict.phase.word}" + (f" ({verdict.reason})" if verdict.reason else "")
        self._line(
            kind,
            text,
            lsn,
            record.task,
            priority,
            attempt=record.attempt,
            cause=record.cause,
            duration_us=(record.ended_ns - record.started_ns) // 1_000,
        )

    def _changed(self, lsn: int, record: Moved | Reset | StopIntent) -> None:
        text, priority = f"task {record.task} is to run again", INFO
        if isinstance(record, Moved):
            text = f"task {record.task} is {record.phase.word}"
            text += f" ({record.reason})" if record.reason else ""
            priority = DEBUG if record.phase is Phase.QUEUED else INFO
        elif isinstance(record, StopIntent):
            step = ("asked to save", "stop signal", "SIGKILL")[record.rung]
            text = f"task {record.task} stops ({record.why}): {step}"
        self._line(Kind.TASK_CHANGED, text, lsn, record.task, priority)

    def _line(
        self, kind: Kind, text: str, lsn: int, task: int, priority: int = INFO, **fields: Field
    ) -> None:
        self._journal.event(kind, text, priority, task_id=task, lsn=lsn, **fields)


def _name(state: State, number: int) -> str:
    task: Task | None = state.tasks.get(number)
    return task.unpacked().name if task is not None else "?"
