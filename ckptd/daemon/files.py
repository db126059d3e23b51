"""What the daemon reads of a task's files for clients: output and checkpoints. Never writes.

Invariant: a task's own directory is hostile; `storage/untrusted.py` opens what stands in it.
"""

import json
import math
import os
import stat
from typing import Any

from ckptd.protocol import messages as m
from ckptd.protocol.errors import Busy, NotFound
from ckptd.storage import blobs, journal
from ckptd.storage.untrusted import Damaged, NotTrusted

# Invariant: whatever the task did to its own output, opening it neither waits nor follows.
_NUMBERS_MAX = 32
_NUMBER_CHARS_MAX = 64
_ATTEMPTS_ALL = (1 << 31) - 1
_OUTPUT = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Files:
    """The files below one state directory."""

    def __init__(self, state_dir: str) -> None:
        self.state_dir = state_dir

    def output(self, asked: m.Output, *, over: bool) -> m.OutputChunk:
        """Return a piece of a task's output; an output that is not there yet is empty."""
        path = os.path.join(self.state_dir, "output", f"{asked.task}.log")
        try:
            fd = os.open(path, _OUTPUT)
        except FileNotFoundError:
            return m.OutputChunk(b"", 0, 0, over)
        except BlockingIOError as leased:  # the task owns the file and may hold a lease on it
            raise Busy(f"the output of task {asked.task} is locked by the task") from leased
        except OSError as bad:
            raise NotFound(f"the output of task {asked.task} cannot be read: {bad}") from bad
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise NotFound(f"the output of task {asked.task} is no regular file any more")
            size = status.st_size
            first = max(0, size + asked.offset) if asked.offset < 0 else min(asked.offset, size)
            data = os.pread(fd, asked.limit, first)
        finally:
            os.close(fd)
        return m.OutputChunk(data, first, size, over and first + len(data) >= size)

    def checkpoints(
        self, task: int, uid: int, *, verify: bool, result: bool = False
    ) -> m.CheckpointList:
        """Return the generations of a task, newest first. With `verify` every byte is read.

        With `result` also what the whole task came to, as its journals have it.
        """
        directory = os.path.join(self.state_dir, "tasks", str(task))
        found = blobs.generations(directory, uid, verify=verify)
        rows = [self._row(generation) for generation in found]
        made = _result(directory, task, uid) if result else ""
        return m.CheckpointList(tuple(sorted(rows, key=lambda row: -row.seq)), made)

    def _row(self, generation: blobs.Generation) -> m.CheckpointRow:
        manifest = generation.manifest
        return m.CheckpointRow(
            seq=generation.seq,
            valid=generation.valid,
            sealed=generation.sealed,
            at_ns=manifest.get("at_ns", 0),
            attempt=manifest.get("attempt", 0),
            bytes=sum(part["bytes"] for part in manifest.get("files", ())),
            files=tuple(part["name"] for part in manifest.get("files", ())),
            digest=manifest.get("digest", ""),
            problem=generation.fault,
            path=generation.path,
            numbers=numbers_of(manifest),
            progress=progress_of(manifest),
        )


def numbers_of(manifest: dict[str, Any]) -> dict[str, float | str]:
    """Return what a saver says of its saving; what is no number or short word is left out."""
    said = manifest.get("numbers")
    if not isinstance(said, dict):
        return {}
    fit = {_word(name): _number(value) for name, value in said.items()}
    found = {name: value for name, value in fit.items() if value is not None}
    return dict(list(found.items())[:_NUMBERS_MAX])


def progress_of(manifest: dict[str, Any]) -> m.Progress | None:
    """Return how far a checkpoint says it is; None where it says no number."""
    try:
        said = manifest["progress"]
        done, total = float(said["done"]), float(said["total"] or 0)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    is_number = math.isfinite(done) and math.isfinite(total)
    return m.Progress(done, total, at_ns=manifest.get("at_ns", 0)) if is_number else None


def _number(value: object) -> float | str | None:
    if isinstance(value, str):
        return _word(value)
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:
        return None


def _word(text: str) -> str:
    return text[:_NUMBER_CHARS_MAX].encode(errors="replace").decode()


def _result(directory: str, task: int, uid: int) -> str:
    """Return the JSON of the last result there is; "" without one, or where it cannot be read."""
    made: dict[str, Any] = {}
    try:
        for _, fact in journal.read(directory, task, uid, _ATTEMPTS_ALL):
            if fact.get("op") == "result":
                made = fact
            elif fact.get("op") == "step_reset":  # a part of the work is to be done anew
                made = {}
    except (Damaged, NotTrusted, OSError):  # the next look at what it saved tells that
        return ""
    if "value" not in made:
        return ""
    text = json.dumps(made["value"], ensure_ascii=False)
    return text if _is_utf8(text) else json.dumps(made["value"])


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair, as "\ud800" in JSON
        return False
    return True
