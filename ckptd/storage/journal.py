"""A task's journal: one file of frames per attempt, appended under a lock, read as hostile input.

    journal/000003.j   the frames of `frame.py`, kind NOTE, payload a JSON list of facts:
    [{"op":"open","format":1,"task":12,"attempt":3,"at_ns":1760000000000000000},
     {"op":"step_done","name":"fetch","result":null,"version":1,"at_ns":1760000000000000001}]

One file per attempt, so that a zombie of attempt 2 cannot write into the file of attempt 3; it is
refused as soon as attempt 3 was prepared. Many processes of one attempt may append in turn.
Invariant: a fact counts once its frame checks in its place in the chain; torn means not done.
Invariant: `append` returns after the sync; the lock is held over it, so a frame never promises
durability of what its writer did not know to be synced.
Stdlib only; it does not know what facts mean: read next `facts.py`.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from typing import Any, Final
from zlib import crc32

from ckptd.storage import frame
from ckptd.storage.disk import sync_data_fd, sync_fd, write_all
from ckptd.storage.taskdir import ATTEMPT_FILE, attempt_of
from ckptd.storage.untrusted import (
    Damaged,
    NotTrusted,
    names_in,
    open_directory,
    open_regular,
    parse_json,
    refuse_deep,
)

FORMAT: Final = 1
FACTS_PER_FRAME_MAX: Final = 1_000
FACT_BYTES_MAX: Final = 1 << 20  # larger things belong into a file of a checkpoint
FILE_BYTES_MAX: Final = 256 << 20  # half a million items and more; a batch has its own ledger
ALL_BYTES_MAX: Final = 512 << 20  # over all attempts; bounds what one reading costs
ATTEMPTS_MAX: Final = 10_000
_CHUNK_BYTES: Final = 1 << 20
_PAYLOAD_BYTES_MAX: Final = 4 << 20
_TORN_BYTES_MAX: Final = 2 * frame.PAYLOAD_BYTES_MAX  # what one interrupted append can leave
_PROMISE_BYTES_MAX: Final = 4 * _TORN_BYTES_MAX  # checked behind the end; frames do not overlap

Fact = dict[str, Any]


class JournalDamaged(Damaged):
    """A fact that was promised durable does not check, or a bound is passed."""


class StaleAttempt(Exception):
    """A newer attempt of this task was prepared: this one must stop and may not write."""


class TooLarge(Exception):
    """A fact or the whole journal would pass its bound; nothing was written."""


class Journal:
    """The journal of one attempt, open for appending; usable by one thread at a time."""

    def __init__(self, task_dir: str, task: int, attempt: int, epoch: int) -> None:
        self.task_dir = task_dir
        self.task = task
        self.attempt = attempt
        self._uid = os.getuid()
        self._task_fd = open_directory(task_dir, self._uid)
        self._fd = -1
        self._seed = _seed(task, attempt)
        self._chain = frame.Chain(self._seed, epoch & 0xFFFFFFFF)
        self._before_bytes = 0  # of the attempts before, which nobody appends to any more
        self._end_bytes = 0
        self._next_lsn = 1
        self._durable_lsn = 0
        self._vouched: tuple[int, int] | None = None
        self._failure = ""

    def append(self, facts: list[Fact]) -> int:
        """Append facts as one group; return the number of the last one.

        Raises:
            StaleAttempt: a newer attempt exists. TooLarge: a bound. OSError: the disk refuses.
            JournalDamaged: what is there does not check; or an earlier sync failed.

        Durable: all of `facts`, and everything before them in this file.
        """
        if self._failure:
            raise JournalDamaged(f"a sync failed before ({self._failure}); nothing may follow")
        self._refuse_if_stale()
        if self._fd < 0:
            self._fd = self._opened()
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            return self._append_locked(facts)
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _append_locked(self, facts: list[Fact]) -> int:
        self._catch_up()
        is_first = self._next_lsn == 1
        payload, count = self._payload(facts, is_first=is_first)
        durable_lsn, crc_before = self._durable_lsn, self._chain.crc
        data = self._chain.encode(payload, self._next_lsn, durable_lsn, count, frame.NOTE)
        try:
            write_all(self._fd, data, self._end_bytes)
        except OSError:
            # Crash: part of a frame is torn, not done; whoever appends next cuts it off.
            self._chain.crc = crc_before
            os.ftruncate(self._fd, self._end_bytes)
            raise
        self._sync(is_first=is_first)
        self._end_bytes += len(data)
        self._next_lsn += count
        self._durable_lsn = self._next_lsn - 1
        return self._durable_lsn

    def _sync(self, *, is_first: bool) -> None:
        """Invariant: a failed sync is never repeated; the frame is taken back, the rest refused.

        Durable: the file, and when it is new also its name.
        """
        try:
            sync_data_fd(self._fd)
            if is_first:
                self._sync_names()
        except OSError as error:
            self._failure = str(error)
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end_bytes)
            raise

    def _sync_names(self) -> None:
        """Durable: the names from the task's directory down, and all of earlier attempts.

        An earlier attempt may have been killed between write and sync; what it wrote has been
        read as done by now, so it must not vanish in a later power loss.
        """
        journal_fd = open_directory("journal", self._uid, self._task_fd)
        try:
            for attempt, name in _files(journal_fd):
                if attempt < self.attempt:
                    with contextlib.suppress(NotTrusted):
                        fd = open_regular(name, self._uid, journal_fd)
                        sync_data_fd(fd)
                        os.close(fd)
            sync_fd(journal_fd)
        finally:
            os.close(journal_fd)
        sync_fd(self._task_fd)

    def _refuse_if_stale(self) -> None:
        try:
            found = os.stat(ATTEMPT_FILE, dir_fd=self._task_fd, follow_symlinks=False)
        except FileNotFoundError:
            return  # no daemon: a run on its own
        seen = (found.st_ino, found.st_mtime_ns)
        if seen == self._vouched:
            return
        newest = attempt_of(self._task_fd, self._uid)[0]
        if newest > self.attempt:
            raise StaleAttempt(
                f"attempt {self.attempt} of task {self.task} is over: attempt {newest} exists"
            )
        self._vouched = seen

    def _opened(self) -> int:
        with contextlib.suppress(FileExistsError):
            os.mkdir("journal", 0o700, dir_fd=self._task_fd)
        journal_fd = open_directory("journal", self._uid, self._task_fd)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._before_bytes = self._counted_before(journal_fd)
            return os.open(file_name(self.attempt), flags, 0o600, dir_fd=journal_fd)
        finally:
            os.close(journal_fd)

    def _counted_before(self, journal_fd: int) -> int:
        before = [name for attempt, name in _files(journal_fd) if attempt < self.attempt]
        if len(before) >= ATTEMPTS_MAX:
            raise TooLarge(f"{len(before)} attempts before have journals, as many as can be read")
        sizes = (os.stat(name, dir_fd=journal_fd, follow_symlinks=False) for name in before)
        return sum(found.st_size for found in sizes)

    def _catch_up(self) -> None:
        """Take in what other processes of this attempt appended; cut off a torn tail.

        Durable: what was taken in. Its writer may have been killed before its sync; where it was
        not, nothing is dirty and the sync is cheap. So the next frame can promise all of it.
        """
        size = os.fstat(self._fd).st_size
        if size == self._end_bytes:
            return
        scan = Scan(self._fd, self._seed, self._end_bytes, self._next_lsn, self._chain.crc)
        for _ in scan.payloads():  # Bound: the file, FILE_BYTES_MAX
            pass
        self._end_bytes, self._next_lsn = scan.end_bytes, scan.next_lsn
        self._chain.crc = scan.crc
        if size > self._end_bytes:
            os.ftruncate(self._fd, self._end_bytes)
        sync_data_fd(self._fd)
        self._durable_lsn = self._next_lsn - 1

    def _payload(self, facts: list[Fact], *, is_first: bool) -> tuple[bytes, int]:
        """Invariant: what `read` refuses is refused here, before it is promised durable."""
        now_ns = time.time_ns()
        opening = {"op": "open", "format": FORMAT, "task": self.task, "attempt": self.attempt}
        group = [{**fact, "at_ns": now_ns} for fact in ([opening, *facts] if is_first else facts)]
        try:
            refuse_deep(group)
        except ValueError as error:
            raise TooLarge(f"a fact is {error}; save it as a file") from error
        parts = [json.dumps(fact, separators=(",", ":")).encode() for fact in group]
        payload = b"[" + b",".join(parts) + b"]"
        if max(map(len, parts)) > FACT_BYTES_MAX:
            raise TooLarge(f"a fact takes more than {FACT_BYTES_MAX} bytes; save it as a file")
        if len(parts) > FACTS_PER_FRAME_MAX + 1 or len(payload) > _PAYLOAD_BYTES_MAX:
            raise TooLarge(f"{len(parts)} facts with {len(payload)} bytes are too many at once")
        end_bytes = self._end_bytes + frame.frame_bytes(len(payload))
        if end_bytes > FILE_BYTES_MAX:
            raise TooLarge(f"the journal of attempt {self.attempt} has {FILE_BYTES_MAX} bytes")
        if self._before_bytes + end_bytes > ALL_BYTES_MAX:
            raise TooLarge(f"the journals of all attempts have {ALL_BYTES_MAX} bytes")
        return payload, len(parts)

    def close(self) -> None:
        """Close the files; nothing is left to be written."""
        for fd in (self._fd, self._task_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._task_fd = -1


class Scan:
    """One pass over the frames of a file, from a known place in the chain to the last good one."""

    def __init__(
        self, fd: int, seed: int, end_bytes: int = 0, next_lsn: int = 1, crc: int = 0
    ) -> None:
        self.end_bytes = end_bytes  # of the last frame that checks in its place
        self.next_lsn = next_lsn
        self.crc = crc
        self._fd = fd
        self._seed = seed
        self._data = b""
        self._data_at = end_bytes

    def payloads(self) -> Iterator[bytes]:
        """Yield the payload of every frame in the chain; what follows must be torn, or nothing.

        Raises:
            JournalDamaged: a later frame promises what does not check, or the file is too large.
        """
        while True:  # Bound: every turn passes a frame; FILE_BYTES_MAX
            head = self._head()
            if head is None:
                break
            offset = self.end_bytes - self._data_at
            payload = frame.payload_of(memoryview(self._data), offset, head)
            self.end_bytes += head.size
            self.next_lsn += head.records
            self.crc = head.crc
            if self.end_bytes > FILE_BYTES_MAX:
                raise JournalDamaged(f"the journal is larger than {FILE_BYTES_MAX} bytes")
            yield payload
        self._check_tail()

    def _head(self) -> frame.Head | None:
        for needed in (frame.HEADER_BYTES, _TORN_BYTES_MAX):
            if len(self._data) - (self.end_bytes - self._data_at) < needed:
                self._fill(needed)
            head = frame.decode(memoryview(self._data), self.end_bytes - self._data_at, self._seed)
            if head is not None:
                break
        else:
            return None
        is_ours = head.kind == frame.NOTE and head.records > 0
        return head if is_ours and frame.is_next(head, self.next_lsn, self.crc) else None

    def _fill(self, needed: int) -> None:
        kept = self._data[self.end_bytes - self._data_at :]
        more = os.pread(self._fd, max(needed, _CHUNK_BYTES), self.end_bytes + len(kept))
        self._data, self._data_at = kept + more, self.end_bytes

    def _check_tail(self) -> None:
        """Tell torn from damaged: had a later frame promised what is missing here?"""
        rest = memoryview(os.pread(self._fd, _TORN_BYTES_MAX, self.end_bytes))
        head = frame.decode(rest, 0, self._seed)
        if head is not None and frame.is_next(head, self.next_lsn, self.crc):
            return  # appended while we read: a later look will see it
        left_bytes = _PROMISE_BYTES_MAX
        for at in range(0, frame.written_end(rest, 0), 8):  # Bound: _TORN_BYTES_MAX
            size = self._promising_bytes(rest, at)
            left_bytes -= size
            if left_bytes < 0:
                raise JournalDamaged(f"what follows byte {self.end_bytes} is no torn append")
            if size and frame.decode(rest, at, self._seed) is not None:
                raise JournalDamaged(
                    f"fact {self.next_lsn} at byte {self.end_bytes} does not check, though byte "
                    f"{self.end_bytes + at} says that it was durable"
                )

    def _promising_bytes(self, rest: memoryview, at: int) -> int:
        """Return the size of what may be a frame that promises what is missing here, else 0."""
        if at + frame.HEADER_BYTES > len(rest) or rest[at + 30] != frame.NOTE or rest[at + 31]:
            return 0
        head = frame.peek(rest, at)
        if head is None or head.durable_lsn < self.next_lsn or head.reserved:
            return 0
        return head.size if head.length <= frame.PAYLOAD_BYTES_MAX else 0


def file_name(attempt: int) -> str:
    """Return the name of an attempt's journal in `journal/`."""
    return f"{attempt:06d}.j"


def _seed(task: int, attempt: int) -> int:
    return crc32(f"ckptd journal {task}.{attempt}".encode())


def _files(journal_fd: int) -> list[tuple[int, str]]:
    """Return (attempt, name) of every journal, oldest first."""
    found = []
    for name in names_in(journal_fd):
        stem, dot, suffix = name.partition(".")
        if dot and suffix == "j" and stem.isascii() and stem.isdigit() and len(stem) <= 9:
            found.append((int(stem), name))
    if len(found) > ATTEMPTS_MAX:
        raise JournalDamaged(f"{len(found)} journals, more than {ATTEMPTS_MAX}")
    return sorted(found)


def read(task_dir: str, task: int, owner_uid: int, attempt_max: int) -> Iterator[tuple[int, Fact]]:
    """Yield (attempt, fact) of all journals up to an attempt, in order; changes nothing.

    Raises:
        JournalDamaged: promised facts do not check. NotTrusted: not a regular file of the owner.
    """
    try:
        task_fd = open_directory(task_dir, owner_uid)
    except FileNotFoundError:
        return
    try:
        journal_fd = open_directory("journal", owner_uid, task_fd)
    except FileNotFoundError:
        return
    finally:
        os.close(task_fd)
    left_bytes = ALL_BYTES_MAX
    try:
        for attempt, name in _files(journal_fd):
            if attempt <= attempt_max:
                left_bytes -= os.stat(name, dir_fd=journal_fd, follow_symlinks=False).st_size
                if left_bytes < 0:
                    raise JournalDamaged(f"the journals are larger than {ALL_BYTES_MAX} bytes")
                for payload in _payloads_of(name, journal_fd, owner_uid, _seed(task, attempt)):
                    for fact in _facts_of(payload, name):
                        yield attempt, fact
    finally:
        os.close(journal_fd)


def _payloads_of(name: str, journal_fd: int, uid: int, seed: int) -> Iterator[bytes]:
    fd = open_regular(name, uid, journal_fd)
    try:
        yield from Scan(fd, seed).payloads()
    except JournalDamaged as error:
        raise JournalDamaged(f"journal/{name}: {error}") from error
    finally:
        os.close(fd)


def _facts_of(payload: bytes, name: str) -> list[Fact]:
    try:
        facts = parse_json(payload)
    except ValueError as error:
        raise JournalDamaged(f"journal/{name}: a frame that checks holds no JSON") from error
    if not isinstance(facts, list) or not all(isinstance(fact, dict) for fact in facts):
        raise JournalDamaged(f"journal/{name}: a frame holds no list of facts")
    return facts
