"""Files of tasks and attempts that State does not want any more, found once after a start.

Deleting follows a durable Removed, CheckpointsDropped or Ended; a daemon killed in between leaves
files behind, and the next one sweeps them up here, a few names per turn. Invariant: an id from
`next_id` on is not swept: its files cannot be there yet.
"""

import os
from collections.abc import Iterator

from ckptd.core.port import Delete, DropCheckpoints, Effect, Forget
from ckptd.core.records import ACTIVE
from ckptd.core.state import State, Task
from ckptd.protocol.ids import parse_attempt_name
from ckptd.storage.disk import Disk
from ckptd.storage.spent import is_left
from ckptd.units import recorder


def leftovers(state: State, state_dir: str) -> Iterator[Effect | None]:
    """Yield one item per name that lies there: an effect, or None for what is still known."""
    for folder, suffix in (("tasks", ""), ("output", ".log")):
        for name in _names(f"{state_dir}/{folder}"):
            stem = name.removesuffix(suffix)
            number = int(stem) if stem.isascii() and stem.isdigit() else 0
            task = state.tasks.get(number)
            gone = 0 < number < state.next_id and task is None
            yield Delete(number) if gone else _spent(task, f"{state_dir}/{folder}/{name}")
    attempts = (("attempts", parse_attempt_name), ("units", recorder.key_of))
    for folder, named in (*attempts, ("start", parse_attempt_name)):
        for name in _names(f"{state_dir}/{folder}"):
            found = named(name)
            yield Forget(*found) if found is not None and not _is_current(state, *found) else None


def _spent(task: Task | None, task_dir: str) -> Effect | None:
    """Return the deletion of checkpoints that are given up and still there."""
    run = task.run if task is not None else None
    if task is None or run is None or not run.dropped_ns or not is_left(task_dir):
        return None
    return DropCheckpoints(task.id, run.attempt)


def set_aside(state: State, state_dir: str, disk: Disk) -> int:
    """Move files of tasks that a salvage has lost to `quarantine/`; return how many.

    Their records are gone, so nobody can say that they may be deleted.

    Durable: no; what is moved back by a power cut is moved again, or swept when it is known.
    """
    moved = 0
    for folder, suffix in (("tasks", ""), ("output", ".log")):
        for name in list(_names(f"{state_dir}/{folder}")):
            stem = name.removesuffix(suffix)
            number = int(stem) if stem.isascii() and stem.isdigit() else 0
            if number and state.tasks.get(number) is None:
                disk.rename(
                    f"{state_dir}/{folder}/{name}", f"{state_dir}/quarantine/{folder}-{name}"
                )
                moved += 1
    return moved


def _is_current(state: State, number: int, attempt: int) -> bool:
    task = state.tasks.get(number)
    if task is None:
        return number >= state.next_id
    run = task.run
    return run is None or attempt > run.attempt or (attempt == run.attempt and task.phase in ACTIVE)


def _names(path: str) -> Iterator[str]:
    try:
        with os.scandir(path) as entries:
            for entry in entries:  # Bound: what lies in the directory
                yield entry.name
    except OSError:  # not there yet, or no descriptor left: the next start sweeps
        return
