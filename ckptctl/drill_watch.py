"""What a drill sees, and what it makes of it: from events of the log to checks that hold or not.

The evidence is the daemon's durable record (LSNs order it) and, where it can be seen, /proc.
Times are of one clock, the machine's. Read next: `drill.py` (who does the damage).
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from ckptctl import units
from ckptctl.saving import unsealed
from ckptd.protocol.errors import Conflict
from ckptd.protocol.messages import CheckpointRow, Event, TaskRow

SECOND_NS: Final = 1_000_000_000
_OTHERS: Final = frozenset({"cancel", "kill", "timeout", "deadline", "shutdown", "stopped"})
_SLACK_NS: Final = 1_000_000  # what a time told in seconds may be off
_TICKS: Final = 19  # field 22 of /proc/PID/stat, counted behind the name


class Before(msgspec.Struct, frozen=True):
    """Where the task was when it was hit."""

    row: TaskRow
    lsn: int
    ticks: int  # start time of its process; 0: it cannot be seen from here


class Check(msgspec.Struct, frozen=True):
    """One thing that must hold; None: it was not seen in time, so nobody knows."""

    name: str
    holds: bool | None
    text: str


class Story:
    """What happened to the task since, in the order of the log."""

    def __init__(self, before: Before, hit_ns: int, *, is_hit: bool = True) -> None:
        self.before = before
        self.hit_ns = hit_ns
        self.is_hit = is_hit  # False: its daemon is, and the very attempt goes on
        said = before.row.progress
        self.reached = said.done if said is not None else 0.0
        self.stood = said.done if said is not None and not is_hit else None  # what it goes on from
        self.saved = before.row.checkpoint  # the newest of the attempt that was hit
        self.saved_ns = before.row.checkpoint_ns
        self.death: Event | None = None  # the end of the attempt that was hit
        self.intents: list[Event] = []
        self.start: Event | None = None  # of the attempt that goes on
        self.was_gone = True  # the old process, when the new one began
        self.is_gone = False  # the process of an attempt that was left alone
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
                case "marked":
                    self._marked(event)
                case "ended" if self._goes_on(event.attempt) and not self.end:
                    self.end = event

    def look(self, row: TaskRow, now_ns: int) -> None:
        """Take in what the task says of itself; it is not in the log."""
        self.is_gone = self.before.ticks > 0 and not is_process(
            self.before.row.pid, self.before.ticks
        )
        said = row.progress
        if said is None:
            return
        if self._goes_on(row.attempt):
            self._says(said.done, said.at_ns or now_ns)
        elif self.start is None:  # it works on until the blow ends it
            self.reached = max(self.reached, said.done)

    def _says(self, done: float, at_ns: int) -> None:
        """Take in how far it says it is: where it begins again is no sign that it gets on."""
        if self.is_hit and done >= self.reached:
            self.back_ns = _earlier(self.back_ns, at_ns)
        if self.stood is None or done < self.stood:
            self.stood = done
        elif done > self.stood:
            self.sign_ns = _earlier(self.sign_ns, at_ns)

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

    def _marked(self, event: Event) -> None:
        """Take in what it made durable; of one left alone only what it saved after the blow."""
        saved, saved_ns = int(event.fields["checkpoint"]), int(event.fields["checkpoint_ns"])
        if not self._goes_on(event.attempt):
            if self.start is None:
                self.saved, self.saved_ns = saved, saved_ns
            return
        if not self.is_hit and saved_ns <= self.hit_ns:
            return  # seen only now: what its journal held before the blow, too
        self.sign_ns = _earlier(self.sign_ns, event.at_ns)
        if self.before.row.progress is None and saved >= self.saved:
            self.back_ns = _earlier(self.back_ns, event.at_ns)

    @property
    def is_telling(self) -> bool:
        """Tell whether it can be seen to get on: it says how far it is, or saves all it keeps.

        A journal is not followed, a save may have been asked for by somebody, and of a task that
        was left alone it proves no more.
        """
        row = self.before.row
        if row.progress is not None:
            return True
        saves = bool(row.checkpoint) and row.checkpoint_ns >= row.started_ns
        return self.is_hit and saves and not self.kept_since(self.saved_ns)

    @property
    def is_over(self) -> bool:
        """Tell whether there is nothing more to wait for, once somebody goes on."""
        over = self.end or (self.death if self.start is None else None)
        if over is not None and not _is_pending(over):
            return True
        if not self.is_hit and self.is_gone and self.death is None:
            return False  # its end is still to be told
        is_back = bool(self.back_ns) or not self.saved or not self.is_hit
        return not self.is_telling or (bool(self.sign_ns) and is_back)


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
    if cause in _OTHERS:
        raise Conflict(
            f"task {task} was ended by something else meanwhile ({cause}): nothing is proven",
            f"see: ckptctl explain {task}",
        )


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
    is_same = row.attempt == before.attempt and row.pid == before.pid and not story.is_gone
    if not is_same:
        text = f"attempt {before.attempt}, pid {before.pid} is gone, and its end was not told"
    if ended is not None:
        text = f"attempt {before.attempt} ended by itself: {how_it_ended(ended)}"
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
    phase = "" if verdict["phase"] == "queued" else f"; now {verdict['phase']}"
    is_told = cause == wanted or (how == "oom" and ended.fields["blame"] == "limit")  # a child
    holds = is_told and verdict["phase"] == "queued" and is_free
    return Check("cause", holds, f"{how_it_ended(ended)}; {counted}{phase}")


def how_it_ended(ended: Event) -> str:
    """Return the code or signal of an end, and what it is put down to."""
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
    newest = story.saved
    if story.start is None:
        return Check("checkpoint", False, f"nobody resumed; the newest is {newest}")
    used = int(story.start.fields["resumed_from"])
    if not newest and not used:
        has_journal = story.death is not None and story.death.fields["cursor"]
        anew = "it goes on from its journal" if has_journal else "it began anew"
        return Check("checkpoint", True, f"none was saved, {anew}")
    return Check("checkpoint", used >= newest, f"resumed from {used}, the newest was {newest}")


def _verified(saved: Iterable[CheckpointRow]) -> Check:
    rows = list(saved)
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
    ended = story.end or (story.death if story.start is None else None)
    if ended is not None and not (_is_pending(ended) and story.sign_ns):
        phase = ended.fields["verdict"]["phase"]
        return Check("progress", phase == "succeeded", f"{how_it_ended(ended)}; now {phase}")
    if story.sign_ns:
        return Check("progress", True, "it saved, or said that it got on")
    if not story.is_telling:
        return Check("progress", True, "it runs; it had not said how far it is")
    return Check("progress", None, "it runs; not seen to get on in time")


# --- figures ------------------------------------------------------------------------------------


def figures(story: Story) -> dict[str, float | None]:
    """Return what it cost, in seconds: work lost, and the times from the death on."""
    death, start, hit_ns = story.death, story.start, story.hit_ns
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
