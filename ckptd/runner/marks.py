"""When to look at what a task saved: on every hint, and once more before its end is told.

The looking is a job of the worker; here is only who waits for it. A task that never saved anything
costs two system calls at its end and no job.
Invariant: the last MarkSeen of an attempt comes before its EndSeen.
Bound: four looks a second for an attempt, however often it hints.
"""

import time
from collections.abc import Callable
from functools import partial

from ckptd.core.port import MarkSeen
from ckptd.runner.files import NOT_KNOWN, TaskFiles
from ckptd.runner.instance import Instance, Stage
from ckptd.runner.watch import Watch, Worker
from ckptd.storage.blobs import Mark

REST_S = 0.25


class Marks:
    """Looks that are under way and wanted, over all attempts; at most one at a time for each."""

    def __init__(
        self,
        files: TaskFiles,
        watch: Watch,
        worker: Worker,
        see: Callable[[MarkSeen], None],
        tell_end: Callable[[Instance], None],
    ) -> None:
        self._files = files
        self._watch = watch
        self._worker = worker
        self._see = see
        self._tell_end = tell_end

    def hinted(self, one: Instance) -> None:
        """Look soon: something may have been saved."""
        rest_s = one.rests_until_s - time.monotonic()
        if one.is_marking or one.stage >= Stage.ENDING:
            one.wants_mark = True
        elif rest_s <= 0:
            self._look(one)
        elif not one.wants_mark:
            one.wants_mark = True
            self._watch.after(rest_s, partial(self._rested, one))

    def _rested(self, one: Instance) -> None:
        if one.wants_mark and not one.is_marking and one.stage < Stage.ENDING:
            self._look(one)

    def caught_up(self, one: Instance) -> None:
        """Look, if anything was saved while nobody watched."""
        if self._is_touched(one):
            self.hinted(one)

    def finish(self, one: Instance) -> None:
        """Look a last time where that can make a difference, then have the end told."""
        if one.is_marking:
            one.wants_mark = True
        elif one.marked is None and not self._is_touched(one):
            self._tell_end(one)
        else:
            self._look(one)

    def _is_touched(self, one: Instance) -> bool:
        return one.published_ns == NOT_KNOWN or self._files.is_touched(*one.key, one.published_ns)

    def _look(self, one: Instance) -> None:
        one.is_marking, one.wants_mark = True, False
        told = {"is_synced": one.is_synced, "has_journal": one.has_journal}
        job = partial(self._files.mark, *one.key, one.uid, **told)
        is_last = one.end is not None
        self._worker.submit(one.task, job, lambda mark: self._looked(one, mark, is_last=is_last))

    def _looked(self, one: Instance, mark: Mark, *, is_last: bool) -> None:
        one.is_marking = False
        one.rests_until_s = time.monotonic() + REST_S
        one.has_journal |= mark.has_journal
        seen = MarkSeen(
            *one.key, mark.checkpoint, mark.checkpoint_ns, mark.cursor, mark.retry_after_s,
            mark.problem, mark.why, mark.gained_ns, mark.has_journal,
        )  # fmt: skip
        if seen != one.marked and (seen.cursor or seen.checkpoint or seen.problem):
            one.marked = seen
            self._see(seen)
        if is_last:
            self._tell_end(one)
        elif one.end is not None:
            self._look(one)
        elif one.wants_mark:
            one.wants_mark = False
            self.hinted(one)
