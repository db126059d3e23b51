"""The output of tasks that asked for it, told to journald line by line as its file grows.

The file stays the truth (`ckptctl logs`); this is the copy that `journalctl CKPTD_TASK_ID=7` shows,
whichever runner appends to it. Nothing is lost while it waits: what a task says faster than it may
tell, and what journald does not take, follows later. Only what lies too far behind is left out,
counted and told of. The position is kept in RUN_DIR/told, so that after a SIGKILL of the daemon at
most the lines of a second are told twice and none is missing.
Bound: LINES_PER_PUMP lines a turn, ten looks a second; a task that does not ask costs nothing, a
silent one no wake-up. Read next: `story.py` (who calls this), docs/JOURNAL.md.
"""

import contextlib
import os
import select
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from ckptd.core.state import State, Task
from ckptd.daemon.tail import Tail
from ckptd.host.clock import Clock
from ckptd.host.journal import INFO, WARNING, Field, Journal, JournaldSink, Kind, head
from ckptd.protocol.codec import UNREADABLE
from ckptd.protocol.ids import attempt_name, parse_attempt_name, unit_name
from ckptd.runner import linux

LINES_PER_PUMP: Final = 256
SPACING_NS: Final = 100_000_000  # between two looks at what grows
HURRY_NS: Final = 10_000_000  # ... while more is waiting than one look may tell
REFUSED_NS_MAX: Final = 5_000_000_000  # between two tries while journald takes nothing
SAVE_NS: Final = 1_000_000_000  # between two writes of the positions
AFTER_END_NS: Final = 10_000_000_000  # for what is left at the end of an attempt
IDENTIFIER_CHARS: Final = 64
TOLD_NAME: Final = "told"

_positions: Final = msgspec.json.Decoder(dict[str, int])


class Echo:
    """Every output that is being told."""

    def __init__(
        self,
        state_dir: str,
        run_dir: str,
        sink: JournaldSink,
        journal: Journal,
        clock: Clock,
        lines_per_s: Callable[[], int],
    ) -> None:
        self._output_dir = os.path.join(state_dir, "output")
        self._told_path = os.path.join(run_dir, TOLD_NAME)
        self._sink, self._journal, self._clock = sink, journal, clock
        self._lines_per_s = lines_per_s
        self._tails: dict[tuple[int, int], Tail] = {}
        self._by_watch: dict[int, Tail] = {}
        self._busy: deque[Tail] = deque()
        self._inotify = -1  # made for the first task that asks
        self._poll = select.epoll()
        self._look_ns = 0  # when to look again; 0: when the kernel reports growth
        self._save_ns = 0  # when to write the positions down; 0: when there are news
        self._refused_ns = 0  # what is waited after the next refusal
        self._is_moved = False  # since the positions were written
        self._is_mute = False
        self.lines_told = 0
        self.bytes_skipped = 0

    def fileno(self) -> int:
        """Return what is readable when there is something to `pump`."""
        return self._poll.fileno()

    def timeout_s(self, longest_s: float) -> float:
        """Return when to `pump` though nothing is readable: `longest_s` (-1: never) or sooner."""
        due = [at_ns for at_ns in (self._look_ns, self._save_ns) if at_ns]
        if not due:
            return longest_s
        left_s = max(0, min(due) - self._clock.mono_ns() + 999_999) / 1e9
        return left_s if longest_s < 0 else min(left_s, longest_s)

    def stats(self) -> dict[str, float]:
        """Return what was counted since the start."""
        return {"output_lines": self.lines_told, "output_skipped_bytes": self.bytes_skipped}

    # --- who is told of -----------------------------------------------------------------------

    def resume(self, state: State) -> None:
        """Take up what the daemon before this one was telling."""
        told = self._saved()
        for number in state.active:
            task = state.tasks.get(number)
            if task is not None and task.run is not None and task.run.shim is not None:
                at = told.pop((number, task.run.attempt), -1)
                self.follow(task, task.run.attempt, task.run.invocation, position=at)
        for (number, attempt), at in told.items():  # ended before all of it was told
            task = state.tasks.get(number)
            if task is not None and (task.run is None or attempt <= task.run.attempt):
                self.follow(task, attempt, "", position=at)
                self.finish(number, attempt)

    def follow(self, task: Task, attempt: int, invocation: str, *, position: int = -1) -> None:
        """Tell the output of an attempt, where the task asked for that; -1: from its beginning."""
        # The packed spec leaves defaults out: no need to read it for those who did not ask.
        if b"journal" not in task.spec or (task.id, attempt) in self._tails:
            return
        spec = task.unpacked()
        if not spec.journal:
            return
        if not self._sink.is_there():
            self._tell_mute(task.id)
            return
        fields: dict[str, Field] = {"task_id": task.id, "attempt": attempt, "uid": task.uid}
        fields |= {"unit": unit_name(task.id, attempt) if invocation else "", "stream": "output"}
        entry = head(Kind.TASK_OUTPUT, _identifier(spec.name), INFO, fields)
        try:
            path = os.path.join(self._output_dir, f"{task.id}.log")
            tail = Tail(path, task.id, attempt, entry, position)
        except OSError as bad:
            text = f"task {task.id}: its output cannot be told: {bad}"
            self._journal.note(text, WARNING, task_id=task.id, attempt=attempt)
            return
        self._tails[task.id, attempt] = tail
        self._watch(tail)
        self._wake(tail)

    def finish(self, task: int, attempt: int) -> None:
        """Tell what is left of an attempt that ended, the last line included, and let go of it."""
        tail = self._tails.get((task, attempt))
        if tail is None:
            return
        tail.ends_by_ns = self._clock.mono_ns() + AFTER_END_NS
        self._unwatch(tail)
        if tail.is_busy:
            self._busy.remove(tail)
        tail.is_busy = True
        self._busy.appendleft(tail)
        self._tell(1, self._clock.mono_ns())

    def _tell_mute(self, task: int) -> None:
        if not self._is_mute:
            self._is_mute = True
            text = f"there is no journald here: the output of task {task} stays in its file"
            self._journal.note(text, WARNING, task_id=task)

    # --- watching -----------------------------------------------------------------------------

    def _watch(self, tail: Tail) -> None:
        """Hear of writes; where the kernel has no watch left, all is told at the end."""
        try:
            if self._inotify < 0:
                self._inotify = linux.inotify()
                self._poll.register(self._inotify, select.EPOLLIN)
            tail.watch = linux.watch_growth(self._inotify, tail.file)
        except OSError as bad:
            text = f"task {tail.task}: its output is told at its end: {bad}"
            self._journal.note(text, WARNING, task_id=tail.task, attempt=tail.attempt)
            return
        self._by_watch[tail.watch] = tail

    def _unwatch(self, tail: Tail) -> None:
        if tail.watch >= 0 and self._by_watch.get(tail.watch) is tail:
            del self._by_watch[tail.watch]
            linux.unwatch(self._inotify, tail.watch)
        tail.watch = -1

    def _listen(self, *, is_on: bool) -> None:
        """Let growth wake the loop, or not: between two looks it need not."""
        if self._inotify >= 0:
            self._poll.modify(self._inotify, select.EPOLLIN if is_on else 0)

    # --- telling ------------------------------------------------------------------------------

    def pump(self) -> None:
        """Tell what has grown, within the bounds of one turn."""
        now_ns = self._clock.mono_ns()
        if now_ns >= self._save_ns:
            self._save(now_ns)
        if now_ns < self._look_ns or not (self._tails or self._look_ns):
            return
        for number, _ in linux.arrivals(self._inotify) if self._inotify >= 0 else ():
            if number in self._by_watch:
                self._wake(self._by_watch[number])
        has_looked = bool(self._busy)
        self._tell(len(self._busy), now_ns)
        if self._is_moved and not self._save_ns:
            self._save_ns = now_ns + SAVE_NS
        self._rest(now_ns, has_looked=has_looked)

    def _wake(self, tail: Tail) -> None:
        if not tail.is_busy:
            tail.is_busy = True
            self._busy.append(tail)

    def _tell(self, count: int, now_ns: int) -> None:
        """Let the first `count` of those with something to say have their turn, in a circle."""
        left, per_s = LINES_PER_PUMP, self._lines_per_s()
        for _ in range(count):
            if left <= 0:
                return
            tail = self._busy.popleft()
            self._skip(tail, now_ns)
            told, was_taken = tail.tell(self._sink, min(left, tail.allowance(per_s, now_ns)))
            self.lines_told += told
            self._is_moved = self._is_moved or told > 0
            left -= told
            if not was_taken:
                # A short queue that was filled is soon empty again; one that stands takes its time.
                longer_ns = min(REFUSED_NS_MAX, 2 * self._refused_ns or SPACING_NS)
                self._refused_ns = HURRY_NS if told else longer_ns
                self._busy.append(tail)
                return
            self._refused_ns = 0
            tail.is_busy = not tail.is_read_out()
            if tail.is_busy:
                self._busy.append(tail)
            elif tail.ends_by_ns:
                self._drop(tail)

    def _skip(self, tail: Tail, now_ns: int) -> None:
        """Leave out what lies too far behind, and say so."""
        count = tail.skip(is_late=0 < tail.ends_by_ns <= now_ns)
        if count:
            self.bytes_skipped += count
            text = f"task {tail.task}: {count} bytes of its output are not in the journal"
            text += f"; `ckptctl logs {tail.task}` has them"
            self._journal.event(
                Kind.OUTPUT_SKIPPED, text, WARNING,
                task_id=tail.task, attempt=tail.attempt, bytes=count,
            )  # fmt: skip

    def _rest(self, now_ns: int, *, has_looked: bool) -> None:
        """Choose when to look again: by the clock while there is something to do, or by growth."""
        pause_ns = SPACING_NS
        if self._refused_ns:
            pause_ns = self._refused_ns
        elif any(tail.may_go_on for tail in self._busy):
            pause_ns = HURRY_NS
        is_due = bool(self._busy) or has_looked
        self._look_ns = now_ns + pause_ns if is_due else 0
        self._listen(is_on=not is_due)

    def _drop(self, tail: Tail) -> None:
        self._unwatch(tail)
        tail.close()
        del self._tails[tail.task, tail.attempt]
        self._is_moved = True

    # --- the position ---------------------------------------------------------------------------

    def _save(self, now_ns: int) -> None:
        """Write the positions down, at most once a second."""
        self._save_ns = now_ns + SAVE_NS if self._is_moved else 0
        if self._is_moved:
            self._write()

    def _write(self) -> None:
        """Durable: no, it is for the death of a process; a reboot ends every attempt anyway."""
        self._is_moved = False
        told = {attempt_name(*key): tail.position for key, tail in self._tails.items()}
        aside = f"{self._told_path}.new"
        with contextlib.suppress(OSError):  # lines that are told twice then
            fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(msgspec.json.encode(told))
            os.replace(aside, self._told_path)

    def _saved(self) -> dict[tuple[int, int], int]:
        try:
            with open(self._told_path, "rb") as file:
                found = _positions.decode(file.read())
        except (OSError, *UNREADABLE):  # none, or of a full disk: begin with the attempt
            return {}
        named = ((parse_attempt_name(name), at) for name, at in found.items())
        return {key: at for key, at in named if key is not None and at >= 0}

    def close(self) -> None:
        """Keep the positions for the next daemon."""
        self._write()
        for tail in list(self._tails.values()):
            self._drop(tail)
        if self._inotify >= 0:
            os.close(self._inotify)
        self._poll.close()
        self._sink.close()


def _identifier(name: str) -> str:
    """Return what stands before each line. Not the bare name: root's daemon lends it no trust."""
    shown = "".join(char if char.isprintable() and char != " " else "_" for char in name)
    return f"ckptd/{shown[:IDENTIFIER_CHARS]}"
