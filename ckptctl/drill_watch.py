"""What a drill sees, and what it makes of it: from events of the log to checks that hold or not.

The evidence is the daemon's durable record (LSNs order it) and, where it can be seen, /proc.
Times are of one clock, the machine's. Read next: `drill.py` (who does the damage).
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from ckptctl import units
from ckptd.protocol.messages import CheckpointRow, Event, TaskRow

SECOND_NS: Final = 1_000_000_000
_SLACK_NS: Final = 1_000_000  # what a time told in seconds may be off
_TICKS: Final = 19  # field 22 of /proc/PID/stat, counted behind the name


class Before(msgspec.Struct, frozen=True):
    """Where the task was when it was hit."""

    row: TaskRow
    lsn: int
    ticks: int  # start time of its process; 0: it cannot be seen from here

    @property
    def says_how_far(self) -> bool:
        """Tell whether it can be seen that it gets on: it saves, or says how far it is."""
        return bool(self.row.checkpoint) or self.row.progress is not None


class Check(msgspec.Struct, frozen=True):
    """One thing that must hold."""

    name: str
    holds: bool
    text: str


class Story:
    """What happened to the task since, in the order of the log."""

    def __init__(self, before: Before, *, is_hit: bool = True) -> None:
        self.before = before
        self.is_hit = is_hit  # False: its daemon is, and the very attempt goes on
        self.reached = before.row.progress.done if before.row.progress is not None else 0.0
        self.death: Event | None = None  # the end of the attempt that was hit
        self.intents: list[Event] = []
        self.start: Event | None = None  # of the attempt that goes on
        self.was_gone = True  # the old process, when the new one began
        self.sign_ns = 0  # the first progress since
        self.back_ns = 0  # it is as far as it was
        self.end: Event | None = None  # of the attempt that goes on

    def hear(self, events: Iterable[Event]) -> None:
        """Take in what the log says."""
        for event in events:
            if event.lsn <= self.before.lsn:
                continue
            match event.type:
                case "ended" if event.attempt == self.before.row.attempt and not self.death:
                    self.death = event
                case "start_intent":
                    self.intents.append(event)
                case "started" if event.attempt > self.before.row.attempt and not self.start:
                    self.start = event
                    self.was_gone = not is_process(self.before.row.pid, self.before.ticks)
                case "marked" if self._goes_on(event.attempt):
                    self._moves(event.at_ns, reaches=event.fields["checkpoint"])
                case "ended" if self._goes_on(event.attempt) and not self.end:
                    self.end = event

    def look(self, row: TaskRow, now_ns: int) -> None:
        """Take in what the task says of itself; it is not in the log."""
        said = row.progress
        if said is None:
            return
        if not self._goes_on(row.attempt):
            if self.start is None:  # it works on until the blow ends it
                self.reached = max(self.reached, said.done)
            return
        if self.start is None and said.done <= self.reached:
            return  # the very attempt: what it said before is no sign
        self.sign_ns = _earlier(self.sign_ns, said.at_ns or now_ns)
        if said.done >= self.reached:
            self.back_ns = _earlier(self.back_ns, said.at_ns or now_ns)

    def kept_since(self, at_ns: int) -> bool:
        """Tell whether the attempt that was hit kept more than what was saved then: a journal."""
        if self.death is None:
            return False
        fields = self.death.fields
        kept_ns = fields["ended_ns"] - int(fields["lost_s"] * SECOND_NS)
        return bool(kept_ns > max(at_ns, fields["started_ns"]) + _SLACK_NS)

    def _goes_on(self, attempt: int) -> bool:
        """Tell whether this is the attempt that has to go on: the next one, or one left alone."""
        if self.start is not None:
            return attempt >= self.start.attempt
        return not self.is_hit and self.death is None

    def _moves(self, at_ns: int, *, reaches: int) -> None:
        self.sign_ns = _earlier(self.sign_ns, at_ns)
        if self.before.row.progress is None and reaches >= self.before.row.checkpoint:
            self.back_ns = _earlier(self.back_ns, at_ns)

    @property
    def is_over(self) -> bool:
        """Tell whether there is nothing more to wait for, once somebody goes on."""
        over = self.end or (self.death if self.start is None else None)
        if over is not None and not _is_pending(over):
            return True
        is_back = bool(self.back_ns) or not self.before.row.checkpoint
        return not self.before.says_how_far or (bool(self.sign_ns) and is_back)


def _is_pending(ended: Event) -> bool:
    return ended.fields["verdict"]["phase"] in ("queued", "waiting")


def _earlier(first_ns: int, other_ns: int) -> int:
    return min(first_ns, other_ns) if first_ns else other_ns


def look_at(pid: int) -> int:
    """Return the start time of a process in ticks, 0 where there is none, or none to be seen."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[_TICKS])


def is_process(pid: int, ticks: int) -> bool:
    """Tell whether exactly this process is alive."""
    return ticks > 0 and look_at(pid) == ticks


def memory_of(pid: int) -> int:
    """Return the bytes that only a kill gives back of a process's own group; -1: it has none."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            paths = [line.rstrip("\n").partition("::")[2] for line in file]
        path = next(filter(None, paths), "")
        with open(f"/sys/fs/cgroup{path}/memory.stat", encoding="ascii") as file:
            stat = dict(line.split() for line in file)
    except (OSError, ValueError):
        return -1
    return int(stat.get("anon", -1))


# --- what must hold -----------------------------------------------------------------------------


def checks_of_task(how: str, story: Story, saved: Iterable[CheckpointRow]) -> list[Check]:
    """Return what must hold after the task was killed."""
    return [_cause(how, story), _one_at_a_time(story), _resumed(story), _verified(saved),
            _goes_on(story)]  # fmt: skip


def checks_of_daemon(
    story: Story, row: TaskRow, epochs: tuple[int, int], saved: Iterable[CheckpointRow]
) -> list[Check]:
    """Return what must hold after the daemon was killed: the task has not noticed."""
    was, now = epochs
    before = story.before.row
    ended = story.death
    text = f"attempt {before.attempt}, pid {before.pid} lived on"
    is_same = row.attempt == before.attempt and row.pid == before.pid
    if ended is not None:
        text = f"attempt {before.attempt} ended by itself: {_how_it_ended(ended)}"
        is_same = ended.fields["cause"] in ("exit", "signal")
    return [
        Check("daemon", now > was, f"a new reign over the same log: epoch {was}, now {now}"),
        Check("adopted", is_same, text),
        Check("fence", not story.intents or ended is not None, "no second attempt was started"),
        _verified(saved),
        _goes_on(story),
    ]


def _cause(how: str, story: Story) -> Check:
    ended = story.death
    if ended is None:
        return Check("cause", False, "its end was never told")
    cause, verdict = ended.fields["cause"], ended.fields["verdict"]
    wanted = {"kill9": "drill", "sigterm": "drill", "oom": "oom"}[how]
    is_free = verdict["failures"] == story.before.row.failures
    counted = "no failure counted" if is_free else "a failure was counted"
    is_told = cause == wanted or (how == "oom" and ended.fields["blame"] == "limit")  # a child
    holds = is_told and verdict["phase"] == "queued" and is_free
    return Check("cause", holds, f"{_how_it_ended(ended)}; {counted}")


def _how_it_ended(ended: Event) -> str:
    fields = ended.fields
    number = fields["signal"]
    how = units.signal_name(number) if number else f"exit {fields['code']}"
    return f"{how}, recorded as {fields['cause']}"


def _one_at_a_time(story: Story) -> Check:
    """Check that the old attempt was over, on record and in truth, before the next was ordered."""
    death, start, before = story.death, story.start, story.before
    if death is None or start is None:
        return Check("fence", False, "no attempt began after it")
    orders = [one for one in story.intents if one.attempt == start.attempt]
    in_order = len(orders) == 1 and death.lsn < orders[0].lsn < start.lsn
    seen = f"pid {before.row.pid} {'was gone' if story.was_gone else 'still lived'}"
    gone = f"{seen} when attempt {start.attempt} ran" if before.ticks else "its pid cannot be seen"
    lsns = ", ".join(str(one.lsn) for one in orders) or "none"
    text = f"{gone}; LSN of its end {death.lsn}, of the next order {lsns}"
    return Check("fence", in_order and story.was_gone, text)


def _resumed(story: Story) -> Check:
    newest = story.before.row.checkpoint
    used = int(story.start.fields["resumed_from"]) if story.start is not None else 0
    if not newest and not used:
        anew = "it goes on from its journal" if story.kept_since(0) else "it began anew"
        return Check("checkpoint", story.start is not None, f"none was saved, {anew}")
    return Check("checkpoint", used >= newest, f"resumed from {used}, the newest was {newest}")


def _verified(saved: Iterable[CheckpointRow]) -> Check:
    rows = list(saved)
    bad = [str(row.seq) for row in rows if not row.valid]
    text = f"bad: {', '.join(bad)}" if bad else f"{len(rows)} checkpoints read again, every byte"
    return Check("verify", not bad, text if rows else "there are no checkpoints")


def _goes_on(story: Story) -> Check:
    ended = story.end or (story.death if story.start is None else None)
    if ended is not None and not (_is_pending(ended) and story.sign_ns):
        phase = ended.fields["verdict"]["phase"]
        return Check("progress", phase == "succeeded", f"{_how_it_ended(ended)}; now {phase}")
    if not story.before.says_how_far:
        return Check("progress", True, "it runs; it neither saves nor says how far it is")
    said = "it saved, or said that it got on" if story.sign_ns else "none was seen in time"
    return Check("progress", bool(story.sign_ns), said)


# --- figures ------------------------------------------------------------------------------------


def figures(story: Story, hit_ns: int) -> dict[str, float | None]:
    """Return what it cost, in seconds: work lost, and the times from the death on."""
    death, start = story.death, story.start
    from_ns = death.fields["ended_ns"] if start is not None and death is not None else hit_ns

    def since(at_ns: int) -> float | None:
        return max(0.0, (at_ns - from_ns) / SECOND_NS) if at_ns else None

    ended_ns = story.end.fields["ended_ns"] if story.end is not None else 0
    died_ns = death.fields["ended_ns"] if death is not None else 0
    return {
        "lost_s": death.fields["lost_s"] if death is not None else 0.0,
        "ended_s": max(0.0, (died_ns - hit_ns) / SECOND_NS) if died_ns else None,
        "restart_s": since(start.at_ns if start is not None else 0),
        "progress_s": since(story.sign_ns or ended_ns),
        "back_s": since(story.back_ns or ended_ns),
    }
