"""What a drill sees: from events of the log and looks at the task to what came of it, and when.

The evidence is the daemon's durable record (LSNs order it) and, where it can be seen, /proc.
Times are of one clock, the machine's. Read next: `drill_checks.py` (what must hold).
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from ckptd.protocol.messages import CheckpointRow, Event, Progress, TaskRow

SECOND_NS: Final = 1_000_000_000
_SLACK_NS: Final = 1_000_000  # what a time told in seconds may be off
_LAST_RUNG: Final = 2  # of a stop: SIGKILL of the whole tree
_TICKS: Final = 19  # field 22 of /proc/PID/stat, counted behind the name


class Before(msgspec.Struct, frozen=True):
    """Where the task was when it was hit."""

    row: TaskRow
    lsn: int
    ticks: int  # start time of its process; 0: it cannot be seen from here


class Noted(msgspec.Struct, frozen=True):
    """What a checkpoint said when it was listed: by now it may be deleted."""

    attempt: int
    progress: Progress | None


class Story:
    """What happened to the task since, in the order of the log."""

    def __init__(self, before: Before, hit_ns: int, *, is_hit: bool = True) -> None:
        self.before = before
        self.hit_ns = hit_ns
        self.struck_ns = hit_ns  # what is later than this is surely later than the blow
        self.is_hit = is_hit  # False: its daemon is, and the very attempt goes on
        said = before.row.progress
        self.reached = said.done if said is not None else 0.0
        self.stood = said.done if said is not None and not is_hit else None  # what it goes on from
        self.saved = before.row.checkpoint  # the newest of the attempt that was hit
        self.saved_ns = before.row.checkpoint_ns
        self.death: Event | None = None  # the end of the attempt that was hit
        self.is_forced = False  # SIGKILL was the last rung of its stop
        self.grace_s = 0.0
        self.intents: list[Event] = []
        self.start: Event | None = None  # of the attempt that goes on
        self.noted: dict[int, Noted] = {}  # the valid checkpoints that were seen
        self.tells: list[Progress] = []  # what it says then, as far as it was seen
        self.has_saved = False
        self.was_gone: bool | None = None  # the old process, when the new one began
        self.is_looked_at = False  # since the blow
        self.has_lived = False  # the very process, seen or heard since its daemon's death
        self.has_moved = False  # it is not where it was left, and its end is still to be told
        self.is_running = False  # the attempt that goes on
        self._has_marked = False
        self._told_ns = 0
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
                case "stop_intent" if event.attempt == self.before.row.attempt:
                    self.is_forced = event.fields["rung"] == _LAST_RUNG
                    self.grace_s = event.fields["grace_s"]
                case "start_intent":
                    self.intents.append(event)
                case "started" if event.attempt > self.before.row.attempt and not self.start:
                    self.start = event
                    self.was_gone = not self._lives() if self.before.ticks else None
                case "marked":
                    self._marked(event)
                case "ended" if self._goes_on(event.attempt) and not self.end:
                    self.end = event

    def look(self, row: TaskRow, now_ns: int) -> None:
        """Take in what the task says of itself; it is not in the log."""
        before, lives = self.before, self._lives()
        self.is_looked_at = True
        self.has_lived = self.has_lived or lives
        is_same = (row.attempt, row.pid) == (before.row.attempt, before.row.pid)
        is_there = is_same and (lives or not before.ticks)
        self.has_moved = not (self.is_hit or self.death or self.start or is_there)
        is_up = row.phase == "running" and self._goes_on(row.attempt)
        self.is_running = is_up and not self.has_moved
        said = row.progress
        if said is None:
            return
        if self._goes_on(row.attempt):
            self._says(said.done, said.at_ns or now_ns)
            if self._is_the_new_one(row.attempt) and said.at_ns != self._told_ns:
                self._told_ns = said.at_ns
                self.tells.append(said)
        elif self.start is None:  # it works on until the blow ends it
            self.reached = max(self.reached, said.done)

    def note(self, rows: Iterable[CheckpointRow]) -> None:
        """Take in what lies there now: a task that saves has the older ones deleted."""
        self.noted |= {row.seq: Noted(row.attempt, row.progress) for row in rows if row.valid}

    @property
    def is_to_note(self) -> bool:
        """Tell whether what lies there may be evidence: at the next look it may be gone."""
        return self.start is None or (self.has_saved and self._first_own is None)

    @property
    def handed(self) -> Noted | None:
        """Return the checkpoint that the new attempt has to go on from; None: none, or not seen."""
        return self.noted.get(self.handed_seq)

    @property
    def handed_seq(self) -> int:
        """Return its number, 0 for none."""
        return int(self.start.fields["resumed_from"]) if self.start is not None else 0

    @property
    def base(self) -> Progress | None:
        """Return how far that one says it is."""
        return self.handed.progress if self.handed is not None else None

    @property
    def first_saved(self) -> Progress | None:
        """Return how far the oldest of the new attempt's own says it is."""
        return self._first_own.progress if self._first_own is not None else None

    @property
    def _first_own(self) -> Noted | None:
        own = [seq for seq, one in self.noted.items() if self._is_the_new_one(one.attempt)]
        return self.noted[min(own)] if own else None

    def _lives(self) -> bool:
        return is_process(self.before.row.pid, self.before.ticks)

    def _says(self, done: float, at_ns: int) -> None:
        """Take in how far it says it is: where it begins again is no sign that it gets on."""
        if not self.is_hit and at_ns <= self.struck_ns:
            return
        self.has_lived = self.has_lived or self.start is None  # the new daemon heard it itself
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

    def _is_the_new_one(self, attempt: int) -> bool:
        return self.start is not None and attempt == self.start.attempt

    def _marked(self, event: Event) -> None:
        """Take in what it made durable; of one left alone only what it saved after the blow."""
        saved, saved_ns = int(event.fields["checkpoint"]), int(event.fields["checkpoint_ns"])
        if not self._goes_on(event.attempt):
            if self.start is None:
                self.saved, self.saved_ns = saved, saved_ns
            return
        if self._is_of_before(event, saved_ns):
            return
        if self._is_the_new_one(event.attempt):
            self.has_saved = self.has_saved or saved > self.handed_seq
        self.sign_ns = _earlier(self.sign_ns, event.at_ns)

    def _is_of_before(self, event: Event, saved_ns: int) -> bool:
        """Tell whether one left alone may have done this before the blow, though it is told now.

        The first mark of the new daemon may be of what lay there: it is sealed only by then.
        """
        if self.is_hit or self.start is not None:
            return False
        is_old = event.at_ns <= self.struck_ns
        is_first = not is_old and not self._has_marked
        self._has_marked = self._has_marked or is_first
        return is_old or is_first or saved_ns <= self.struck_ns

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
        if self.death is not None and self.start is None:
            return not is_pending(self.death)
        if self.end is not None and not is_pending(self.end):
            return True
        if self.has_moved:
            return False
        if not self.is_telling:
            return self.is_running or self.end is not None
        says_where = self.is_hit and bool(self.saved) and self.before.row.progress is not None
        return bool(self.sign_ns) and (bool(self.back_ns) or not says_where)

    @property
    def is_finished(self) -> bool:
        """Tell whether it ended for good: nobody needs its checkpoints any more."""
        over = self.end or (self.death if self.start is None else None)
        return over is not None and not is_pending(over)


def is_pending(ended: Event) -> bool:
    """Tell whether another attempt is to follow."""
    return ended.fields["verdict"]["phase"] in ("queued", "waiting")


def _is_done(ended: Event) -> bool:
    return bool(ended.fields["verdict"]["phase"] == "succeeded")


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


# --- figures ------------------------------------------------------------------------------------


def figures(story: Story) -> dict[str, float | None]:
    """Return what it cost, in seconds: work lost, and the times from the death on."""
    death, start, hit_ns = story.death, story.start, story.hit_ns
    from_ns = death.fields["ended_ns"] if start is not None and death is not None else hit_ns

    def since(at_ns: int) -> float | None:
        return max(0.0, (at_ns - from_ns) / SECOND_NS) if at_ns else None

    ended_ns = story.end.fields["ended_ns"] if story.end is not None and _is_done(story.end) else 0
    died_ns = death.fields["ended_ns"] if death is not None else 0
    return {
        "lost_s": death.fields["lost_s"] if death is not None else 0.0,
        "ended_s": max(0.0, (died_ns - hit_ns) / SECOND_NS) if died_ns else None,
        "restart_s": since(start.at_ns if start is not None else 0),
        "progress_s": since(story.sign_ns or ended_ns),
        "back_s": since(story.back_ns or ended_ns),
    }
