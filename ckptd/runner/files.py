"""What the runner does with a task's own files: make ready, mark, control, delete.

They are hostile input; `storage/untrusted.py` is how they are touched. What may read or delete
gigabytes says "for the worker" and is never called on the loop.
"""

import contextlib
import errno
import os
from functools import partial

import msgspec

from ckptd.core.port import Control, Start
from ckptd.storage import blobs, lost
from ckptd.storage.blobs import Found, Mark
from ckptd.storage.lost import NOTHING, Known, compared
from ckptd.storage.spent import delete_spent
from ckptd.storage.taskdir import CONTROL
from ckptd.storage.untrusted import (
    NotTrusted,
    is_passing,
    open_directory,
    remove_tree,
    replace_small,
)

NOT_KNOWN = -1


class TaskFiles:
    """The directory and the output of every task."""

    def __init__(self, state_dir: str, boot_id: str) -> None:
        self.tasks_dir = f"{state_dir}/tasks"
        self.output_dir = f"{state_dir}/output"
        self._boot_id = boot_id
        for path, mode in ((self.tasks_dir, 0o711), (self.output_dir, 0o700)):
            os.makedirs(path, exist_ok=True)
            os.chmod(path, mode)

    def directory(self, task: int) -> str:
        """Return what the task knows as CKPTD_DIR."""
        return f"{self.tasks_dir}/{task}"

    def output(self, task: int) -> str:
        """Return the file that holds all that the task printed, over all its attempts."""
        return f"{self.output_dir}/{task}.log"

    def owner(self, task: int) -> int:
        """Return whose task it is, by its directory; ourselves where there is none."""
        try:
            return os.lstat(self.directory(task)).st_uid
        except OSError:
            return os.geteuid()

    # --- before the start ---------------------------------------------------------------------

    def prepare(self, start: Start) -> int:
        """Make the directory ready; return when `ckpt/` changed last, for `is_touched`.

        Raises:
            OSError, NotTrusted: it cannot be made ready.

        Durable: nothing; the start that follows is in the log already.
        """
        directory = self.directory(start.task)
        gid = start.gid if os.geteuid() == 0 else -1
        blobs.prepare(directory, start.attempt, start.uid, gid, fresh=start.fresh)
        return os.lstat(f"{directory}/ckpt").st_mtime_ns

    def has_saved(self, task: int) -> bool:
        """Return whether there may be a checkpoint to resume from."""
        return blobs.has_anything(self.directory(task))

    def checkpoint_to_resume(self, task: int, uid: int, known: Known = NOTHING) -> Found:
        """Return the newest valid checkpoint; trouble is its `problem` or `passing`.

        So is that what is `known` to be there is gone. For the worker. Durable: what it returns.
        """
        directory = self.directory(task)
        try:
            found = blobs.newest_valid(directory, uid, self._boot_id)
            return compared(directory, uid, found, known)
        except Exception as error:  # noqa: BLE001  (whatever a task's files make a reader raise)
            if isinstance(error, OSError) and is_passing(error):
                return Found(passing=error)
            if isinstance(error, MemoryError):
                return Found(passing=OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
            return Found(problem=f"checkpoints cannot be read: {error}")

    # --- while it runs and at its end -----------------------------------------------------------

    def is_touched(self, task: int, attempt: int, published_ns: int) -> bool:
        """Return whether the attempt published or recorded anything: two system calls."""
        directory = self.directory(task)
        try:
            is_same = os.lstat(f"{directory}/ckpt").st_mtime_ns == published_ns
        except OSError:
            return True
        return not is_same or os.path.lexists(f"{directory}/journal/{attempt:06d}.j")

    def mark(
        self,
        task: int,
        attempt: int,
        uid: int,
        *,
        is_synced: bool = False,
        has_journal: bool = False,
    ) -> Mark:
        """Seal what was published, tell how far it has come, drop the oldest. For the worker.

        `is_synced`: all that the attempt wrote was synced at its end, be it in an earlier boot.
        `has_journal`: an earlier look said so.

        Empty where the machine has trouble that passes: what was told before still holds.

        Durable: what it returns.
        """
        directory = self.directory(task)
        try:
            found = blobs.mark(directory, attempt, uid, self._boot_id, is_synced=is_synced)
            is_there = lost.has_journal(directory, uid, is_known=has_journal)
            found = found._replace(has_journal=is_there)
            blobs.prune(directory, uid)
        except Exception as error:  # noqa: BLE001  (whatever a task's files make a reader raise)
            if is_passing(error):
                return Mark()
            return Mark(problem=f"checkpoints cannot be read: {error}")
        return found

    def write_control(self, control: Control, uid: int) -> None:
        """Replace control.json: {"stop":"cancel","deadline":1790000000.5,"checkpoint":0}.

        Durable: nothing; a task that outlives the machine does not exist.
        """
        asked = {
            "stop": control.stop or None,
            "deadline": control.deadline_ns / 1e9 if control.deadline_ns else None,
            "checkpoint": control.checkpoint,
        }
        with contextlib.suppress(OSError, NotTrusted):  # the task's own doing: it hears signals
            fd = open_directory(self.directory(control.task), uid)
            try:
                data = msgspec.json.encode(asked) + b"\n"
                replace_small(CONTROL, data, fd, uid, is_synced=False)
            finally:
                os.close(fd)

    # --- when it is over ------------------------------------------------------------------------

    def drop_checkpoints(self, task: int, attempt: int) -> None:
        """Delete the checkpoints of a task that succeeded with `attempt`. For the worker.

        Durable: nothing; what is left is found by the sweep of the next daemon.
        """
        with contextlib.suppress(OSError, NotTrusted):
            delete_spent(self.directory(task), attempt, self.owner(task))

    # --- when it is forgotten -------------------------------------------------------------------

    def deletion(self, task: int) -> "partial[None]":
        """Return the job that deletes all of a task. For the worker.

        Durable: nothing; what comes back after a power loss belongs to no task.
        """
        return partial(self._delete, task)

    def _delete(self, task: int) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.output(task))
        with contextlib.suppress(OSError, NotTrusted):  # what stays is swept up later
            fd = os.open(self.tasks_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                remove_tree(str(task), fd)
            finally:
                os.close(fd)
