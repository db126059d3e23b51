"""When the service manager hears READY=1: log replayed, socket bound, every adopted attempt told.

Requests are served before that, because each promise holds already: State is that of the log, what
is acknowledged is durable, and no attempt can be started twice (`plan.adoption`). What READY adds
is for those who depend on us: what `status` shows of tasks of an earlier daemon is true by then.
More time is asked for at progress only, so that an adoption that is stuck ends in a restart.
Read next: `housekeeping.py`, `notify.py`.
"""

from collections.abc import Sequence

from ckptd.core.port import EndSeen, Runner, Sighting, StartSeen
from ckptd.host.clock import Clock
from ckptd.host.notify import Notify

STEP_S = 30.0  # the manager gives this much more time for every sign of progress
STEP_NS = 1_000_000_000  # between two signs


class Progress:
    """Says how far the start has come, at most once a second."""

    def __init__(self, notify: Notify, clock: Clock) -> None:
        self._notify, self._clock = notify, clock
        self._due_ns = 0

    def say(self, text: str) -> None:
        """Say what comes next, without asking for time."""
        self._notify.status(text)

    def tell(self, text: str) -> None:
        """Tell one step that was made: call it only then."""
        mono_ns = self._clock.mono_ns()
        if mono_ns >= self._due_ns:
            self._due_ns = mono_ns + STEP_NS
            self._notify.extend_timeout(STEP_S)
            self._notify.status(text)


class Readiness:
    """Counts the adopted attempts that are told; `runner.is_adopting` has the last word."""

    def __init__(
        self, runner: Runner, progress: Progress, adopted: Sequence[tuple[int, int]]
    ) -> None:
        self.is_ready = False
        self._runner, self._progress = runner, progress
        self._left = set(adopted)
        self._count = len(adopted)
        self._is_silent = False  # nothing was seen in this turn: all that is known is applied
        if adopted:
            progress.say(self._line())

    def hear(self, seen: Sequence[Sighting]) -> None:
        """Take in what one turn saw."""
        if self.is_ready:
            return
        self._is_silent = not seen
        before = len(self._left)
        for each in seen:
            if isinstance(each, StartSeen | EndSeen):
                self._left.discard((each.task, each.attempt))
        if len(self._left) < before:
            self._progress.tell(self._line())

    def _line(self) -> str:
        return f"adopting {self._count - len(self._left)} of {self._count} tasks"

    @property
    def is_due(self) -> bool:
        """Tell whether nothing is left to wait for; what was not heard by then is in this turn."""
        return not self.is_ready and not self._runner.is_adopting

    def look(self) -> bool:
        """Tell, once, that the daemon is ready. Call it after the commit."""
        if not self.is_due or (self._left and not self._is_silent):
            return False
        self.is_ready = True
        self._left.clear()
        return True
