"""Make a checkpoint from inside the task: take, seal, publish, prune; valid at once.

    stage/, or copies of files, and what is carried on from the generation before
      -> ckpt/.leftover-new-4711/   and MANIFEST.json, synced
      -> rename -> ckpt/00000008/ -> sync of ckpt/ -> prune to two

All or nothing: before the rename the generation before is the newest, after the sync the new
one is, also after a loss of power. Savers of one task take turns by a lock on `ckpt/`; what a
zombie copied is refused at the rename, see `taskdir.fence`.
Stdlib only. Read next: `ckptd/storage/blobs.py`.
"""

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from ckptd.sdk.surroundings import Surroundings
from ckptd.storage.blobs import generations, newest_sealed, pruned
from ckptd.storage.copy import Intake, carry_on
from ckptd.storage.facts import read_durable
from ckptd.storage.journal import StaleAttempt
from ckptd.storage.manifest import EMPTY, TEMPORARY, Manifest, load, seal
from ckptd.storage.taskdir import (
    LEFTOVER,
    MANIFEST,
    attempt_of,
    fence,
    number_after,
    numbered,
    opened,
    sync_names,
    this_boot_id,
)
from ckptd.storage.untrusted import (
    Damaged,
    NotTrusted,
    is_empty,
    names_in,
    open_directory,
    remove_tree,
)

_COLLISIONS_MAX: Final = 10
_NOT_THERE: Final = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP))


class Saved(NamedTuple):
    """A checkpoint that is durable now."""

    seq: int
    path: str
    manifest: Manifest
    size_bytes: int = 0  # of all its files
    took_s: float = 0.0  # from `begin` to durable, waiting for an earlier save included


def save(
    task_dir: str, files: Sequence[str], header: dict[str, Any], carry: Sequence[str] = ()
) -> Saved:
    """Save files, or without any what lies in `stage/`, as the next generation.

    `header` is what the manifest says beside the files: task, attempt, epoch, state, progress,
    steps, results and so on (`manifest.EMPTY` lists them all); what else is in it is kept there.
    `carry` names files of the newest valid generation that are to be in this one as they are.

    Raises:
        ValueError: a file is not there, or two would have one name.
        StaleAttempt: a newer attempt exists. NotTrusted: not regular files, or too many.
        FileExistsError: a file to carry is also new. Damaged: it is not what was saved.
        OSError: the disk refuses; the generation before stays the newest.

    Durable: the whole checkpoint and its name.
    """
    return begin(task_dir, files, int(header.get("attempt", 0)), carry).finish(header)


def begin(
    task_dir: str,
    files: Sequence[str],
    attempt: int,
    carry: Sequence[str] = (),
    *,
    carry_from: str = "",
    waits: bool = True,
) -> "Saving":
    """Take what is to be saved, with the arguments and errors of `save`.

    `carry_from` names the generation to carry on from, where it is not the newest that looks
    valid: state that goes with its files must not come to lie beside older ones.

    When it returns, `stage/` is free for the next one, and the files may be changed. What is long,
    carrying on, syncing and hashing, is left to `finish`. One save of a task at a time: a second
    one waits here, or without `waits` raises BlockingIOError.

    Durable: nothing yet.
    """
    _check_named(files)
    return Saving(task_dir, files, attempt, carry, carry_from=carry_from, waits=waits)


def _check_named(files: Sequence[str]) -> None:
    """Raise ValueError for what whoever named the files can put right, and no disk."""
    named: dict[str, str] = {}
    for path in files:
        try:
            os.stat(path)
        except OSError as error:
            if error.errno in _NOT_THERE:
                raise ValueError(f"cannot save {path!r}: {error.strerror}") from error
            raise
        name = os.path.basename(os.path.abspath(path))
        if name in {MANIFEST, TEMPORARY}:
            raise ValueError(f"cannot save {path!r}: the seal of a checkpoint has this name")
        if name in named:
            raise ValueError(f"cannot save {named[name]!r} and {path!r}: both would be {name!r}")
        named[name] = path


class Saving:
    """A save under way, ended once by `finish` or `drop`, in whichever thread."""

    _is_over = True  # until it has the lock

    def __init__(
        self,
        task_dir: str,
        files: Sequence[str],
        attempt: int,
        carry: Sequence[str],
        *,
        carry_from: str,
        waits: bool,
    ) -> None:
        self._task_dir, self._attempt, self._uid = task_dir, attempt, os.getuid()
        self._pid = os.getpid()
        self._began_s = time.monotonic()
        self._name = f"{LEFTOVER}new-{os.getpid()}"
        self._number = ""  # once it is published
        self._is_staged = False
        self.saved: Saved | None = None  # once it is durable, whatever strikes after that
        self._carry, self._carry_from = carry, carry_from
        self._wanted: dict[str, Manifest] = {}  # to be carried on from `_old_fd`
        self._carried: dict[str, Manifest] = {}
        self._old_fd = -1
        with contextlib.suppress(FileExistsError):
            os.mkdir(f"{task_dir}/ckpt", 0o700)
        self._open = contextlib.ExitStack()
        self._task_fd, self._ckpt_fd = self._open.enter_context(opened(task_dir, self._uid))
        try:
            fcntl.flock(self._ckpt_fd, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            self._open.close()  # what lies there is of whoever holds the lock
            raise
        self._is_over = False
        # Not by closing alone: a child that was forked meanwhile keeps the open file.
        self._open.callback(fcntl.flock, self._ckpt_fd, fcntl.LOCK_UN)
        try:
            remove_tree(self._name, self._ckpt_fd)
            self._fill(files)
        except BaseException:
            self.drop()
            raise

    def finish(self, header: dict[str, Any]) -> Saved:
        """Seal and publish; return once it is durable. Raises as `save` does.

        Durable: the whole checkpoint and its name.
        """
        assert not self._is_over, "a save is finished once"
        self._is_over = True
        with self._open:
            try:
                saved = self._told(self._publish(header))
                sync_names(self._task_fd, self._ckpt_fd)
            except BaseException:
                self._take_back()
                raise
            self.saved = saved
            with contextlib.suppress(OSError, NotTrusted):  # saved is saved; the next one prunes
                pruned(self._task_fd, self._ckpt_fd, self._uid)
        return saved

    def _told(self, manifest: Manifest) -> Saved:
        seq = int(manifest["seq"])
        size_bytes = sum(int(entry["bytes"]) for entry in manifest["files"])
        took_s = time.monotonic() - self._began_s
        return Saved(seq, f"{self._task_dir}/ckpt/{seq:08d}", manifest, size_bytes, took_s)

    def __del__(self) -> None:
        """Give up what a signal's exception took away from whoever would have finished it."""
        if not self._is_over and os.getpid() == self._pid:
            self.drop()

    def drop(self) -> None:
        """Give it up, if it is not over; what was staged goes back, unless there is newer."""
        if not self._is_over:
            self._is_over = True
            with self._open:
                self._take_back()

    # --- taking --------------------------------------------------------------------------------

    def _fill(self, files: Sequence[str]) -> None:
        with _as_newest(self._task_fd, self._uid, self._attempt):
            if not files and not is_empty("stage", self._task_fd):
                # Crash: what was staged is lost, as it is when a task dies before it publishes.
                self._is_staged = True
                os.rename("stage", self._name, src_dir_fd=self._task_fd, dst_dir_fd=self._ckpt_fd)
                with contextlib.suppress(FileExistsError):  # a thread of the task was first
                    os.mkdir("stage", 0o700, dir_fd=self._task_fd)
            else:
                os.mkdir(self._name, 0o700, dir_fd=self._ckpt_fd)
        if files:
            new_fd = open_directory(self._name, self._uid, self._ckpt_fd)
            try:
                into = Intake(new_fd)
                for path in files:
                    into.take(path)
            finally:
                os.close(new_fd)

    def _find(self, names: Sequence[str]) -> None:
        """Find what is to be carried on. Who holds our lock keeps its generation from the prune."""
        last = self._carry_from or os.path.basename(newest_sealed(self._task_dir, self._uid)[1])
        if not last:
            raise FileNotFoundError(errno.ENOENT, "no checkpoint to carry it on from", names[0])
        try:
            self._old_fd = open_directory(last, self._uid, self._ckpt_fd)
        except FileNotFoundError as error:
            raise Damaged(f"checkpoint {last}, to carry {names[0]} on from, is gone") from error
        self._open.callback(os.close, self._old_fd)
        lying = {entry["name"]: entry for entry in load(self._old_fd, self._uid)["files"]}
        for name in names:
            if name not in lying:
                raise FileNotFoundError(errno.ENOENT, f"not in checkpoint {last}", name)
            self._wanted[name] = lying[name]

    def _take_back(self) -> None:
        """Leave nothing behind of a save that failed; what was staged goes back to the stage."""
        with contextlib.suppress(OSError):  # what cannot go back stays for the next prune
            if self._number:  # published, and its name may not be durable: it was not told
                os.rename(
                    self._number, self._name, src_dir_fd=self._ckpt_fd, dst_dir_fd=self._ckpt_fd
                )
            if self._is_staged:
                self._strip()
                with (
                    contextlib.suppress(StaleAttempt),
                    _as_newest(self._task_fd, self._uid, self._attempt),
                ):
                    _give_back(self._name, "stage", self._ckpt_fd, self._task_fd, self._uid)
            remove_tree(self._name, self._ckpt_fd)

    def _strip(self) -> None:
        """Take away what we put beside what was staged: a plain `mv` may publish it next."""
        for name in (*self._carried, MANIFEST, TEMPORARY):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._name}/{name}", dir_fd=self._ckpt_fd)

    # --- publishing ----------------------------------------------------------------------------

    def _publish(self, header: dict[str, Any]) -> Manifest:
        """Crash: a sealed generation without a number; the next save starts over."""
        ckpt_fd = self._ckpt_fd
        new_fd = open_directory(self._name, self._uid, ckpt_fd)
        try:
            if self._carry:
                self._find(self._carry)
            for name, entry in self._wanted.items():
                carry_on(self._old_fd, entry, self._uid, new_fd)
                self._carried[name] = entry
            for _ in range(_COLLISIONS_MAX):  # Bound: only a plain `mv` beside us takes a number
                own = {
                    "seq": number_after(ckpt_fd),
                    # An edit names what it was made of.
                    "parent": int(header.get("parent") or 0)
                    or max((number for number, _ in numbered(ckpt_fd)), default=0),
                    "at_ns": time.time_ns(),
                    "boot_id": this_boot_id(),
                }
                manifest = seal(new_fd, self._uid, {**EMPTY, **header, **own}, self._carried)
                with _as_newest(self._task_fd, self._uid, self._attempt):  # sealing took its time
                    number = f"{own['seq']:08d}"
                    if _renamed(self._name, number, ckpt_fd):
                        self._number = number
                        return manifest
        finally:
            os.close(new_fd)
        raise OSError(errno.EEXIST, "something else publishes checkpoints at the same time")


@contextlib.contextmanager
def _as_newest(task_fd: int, uid: int, attempt: int) -> Iterator[None]:
    """Take a step that only the newest attempt may take; none is prepared meanwhile.

    Raises:
        StaleAttempt: a newer attempt exists; what the stage holds, and the row, are its own.
    """
    fence(task_fd, waits=True)
    try:
        newest = attempt_of(task_fd, uid)[0]
        if newest > attempt:
            raise StaleAttempt(f"attempt {attempt} is over: attempt {newest} exists")
        yield
    finally:
        fcntl.flock(task_fd, fcntl.LOCK_UN)


def _give_back(name: str, into: str, from_fd: int, into_fd: int, uid: int) -> None:
    """Move a directory to where it was; what was made there anew meanwhile stays as it is."""
    try:
        os.rename(name, into, src_dir_fd=from_fd, dst_dir_fd=into_fd)  # over an empty one
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
            raise
    else:
        return
    old_fd, new_fd = open_directory(name, uid, from_fd), open_directory(into, uid, into_fd)
    try:
        for inner in names_in(old_fd):  # Bound: what one checkpoint may hold
            if stat.S_ISDIR(os.stat(inner, dir_fd=old_fd, follow_symlinks=False).st_mode):
                with contextlib.suppress(NotADirectoryError):
                    _give_back(inner, inner, old_fd, new_fd, uid)
            else:
                with contextlib.suppress(FileExistsError):  # a link replaces nothing
                    os.link(
                        inner, inner, src_dir_fd=old_fd, dst_dir_fd=new_fd, follow_symlinks=False
                    )
    finally:
        os.close(old_fd)
        os.close(new_fd)


def _renamed(name: str, number: str, ckpt_fd: int) -> bool:
    try:
        os.rename(name, number, src_dir_fd=ckpt_fd, dst_dir_fd=ckpt_fd)
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
            raise
        return False
    return True


def facts_for_header(steps: list[str], results: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint repeats of the journal, unless that is too much for it."""
    both = {"steps": steps, "results": results}
    return both if len(json.dumps(both)) <= 1 << 20 else {}


def _refuse_beside_sdk(task_dir: str) -> None:
    """Refuse to take the place of what an SDK saved: its state would be lost with the next start.

    The SDK itself does not come here. Damage is told by whoever resumes.
    """
    saved = generations(task_dir, os.getuid(), verify=False)
    newest = next((one.manifest for one in saved if one.valid), EMPTY)
    if newest.get("sdk_version"):
        raise ValueError(
            f"the checkpoints of this task are the SDK's, as {newest['seq']} is, with its state;"
            " save in its function, or start the task with --fresh if that is not what it runs now"
        )


def save_from(
    around: Surroundings,
    files: Sequence[str],
    state: Any,
    progress: tuple[float, float] | None,
) -> Saved:
    """Save with what the journal knows, and tell the daemon to look.

    Raises what `save` does, and ValueError beside an SDK.

    Durable: the whole checkpoint and its name.
    """
    _refuse_beside_sdk(around.dir)
    known = read_durable(around.dir, around.task, os.getuid(), around.attempt)
    done_total = progress and {"done": progress[0], "total": progress[1]}
    header = {
        "task": around.task,
        "attempt": around.attempt,
        "epoch": around.epoch,
        "state": state,
        "progress": done_total,
        **facts_for_header(sorted(known.steps), known.values),
    }
    saved = save(around.dir, files, header)
    lines = [f"PROGRESS={progress[0]:.15g}/{progress[1]:.15g}"] if progress else []
    around.notify("CHECKPOINT=1", *lines)
    return saved
