"""Who runs the runner: the daemon, whose task it is, or a person at a terminal.

To the daemon it tells durable progress about once a second, and at the end how long to leave it
alone; from it come requests to stop. All of that is files of the runner's own task: no daemon is
asked or waited for. Without one, waiting and stopping are between us and the terminal.
Read next: `ckptd/sdk/surroundings.py`.
"""

import os
import signal
import time
from typing import Final

from ckptd.sdk.surroundings import NotATask, Surroundings
from ckptd.storage import facts
from ckptd.storage.facts import RETRY_AFTER_S_MAX
from ckptd.storage.journal import Fact, Journal

TOLD_EVERY_S: Final = 1.0
_LOOK_S: Final = 0.5
_SPARE_S: Final = 2.0  # of the daemon's deadline, for our own end


class Contact:
    """The way up; and the signals, which only set a flag and wake the loop."""

    def __init__(self) -> None:
        self._around = _around()
        self._journal: Journal | None = None
        self._told: tuple[float, float] = (-1.0, -1.0)
        self._told_s = 0.0
        self._looked_s = 0.0
        self._reason = ""
        self.interrupts = 0
        self.wake_fd, self._wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    @property
    def task(self) -> int:
        """Return the task that this runner is, 0 without a daemon."""
        return self._around.task if self._around else 0

    @property
    def is_under_daemon(self) -> bool:
        """Return whether somebody starts us again when we park."""
        return self._around is not None

    def listen(self) -> None:
        """Take signals from now on."""
        signal.set_wakeup_fd(self._wake_out, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._interrupted)
        signal.signal(signal.SIGTERM, self._terminated)
        signal.signal(signal.SIGHUP, self._terminated)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def _interrupted(self, *_: object) -> None:
        self.interrupts += 1

    def _terminated(self, *_: object) -> None:
        self._reason = self._reason or "terminated"

    def drain(self) -> None:
        """Empty the pipe that woke the loop."""
        try:
            while os.read(self.wake_fd, 4096):  # Bound: what lies in the pipe
                pass
        except BlockingIOError:
            return

    def stop_reason(self, now_s: float, *, looks_now: bool = False) -> str:
        """Return why to stop, "" while nobody asks for it."""
        if self.interrupts:
            return "interrupt"
        if self._around is not None and (looks_now or now_s - self._looked_s >= _LOOK_S):
            self._looked_s = now_s
            self._reason = self._around.stop_reason() or self._reason
        return self._reason

    def grace_s(self, usual_s: float) -> float:
        """Return how long items in flight may go on once we are asked to stop."""
        deadline = self._around.control().get("deadline") if self._around else None
        if not isinstance(deadline, int | float):
            return usual_s
        return max(0.0, min(usual_s, deadline - time.time() - _SPARE_S))

    def tell(self, done: int, total: int, text: str, now_s: float) -> None:
        """Tell how far, durably but no more than once a second.

        Durable: the progress, where it was written.
        """
        if self._around is None or (done, total) == self._told:
            return
        if now_s - self._told_s < TOLD_EVERY_S:
            return
        self.tell_now(done, total, text, now_s)

    def tell_now(self, done: int, total: int, text: str, now_s: float) -> None:
        """Tell how far, if that is news.

        Durable: the progress.
        """
        if self._around is None or (done, total) == self._told:
            return
        self._told, self._told_s = (done, total), now_s
        self._record(facts.progress_made(done, total, text))
        self._around.notify(f"PROGRESS={done}/{total}", f"STATUS={text}")

    def learnt(self, deaths: int) -> None:
        """Record how often runners died: knowing whom to isolate is progress, too.

        Durable: the number; the daemon then does not take this start for one without progress.
        """
        if deaths:
            self._record(facts.set_value("runner_deaths", deaths))

    def park(self, seconds: float, scope: str) -> None:
        """Ask to be started again, but not before.

        Durable: the wish.
        """
        self._record(facts.retry_after(min(seconds, RETRY_AFTER_S_MAX), scope))

    def status(self, text: str) -> None:
        """Say what is going on; nobody need listen."""
        if self._around is not None:
            self._around.notify(f"STATUS={text}")

    def _record(self, fact: Fact) -> None:
        around = self._around
        if around is None:
            return
        if self._journal is None:
            self._journal = Journal(around.dir, around.task, around.attempt, around.epoch)
        self._journal.append([fact])

    def close(self) -> None:
        """Close the files."""
        if self._journal is not None:
            self._journal.close()


def _around() -> Surroundings | None:
    try:
        return Surroundings()
    except NotATask:
        return None
