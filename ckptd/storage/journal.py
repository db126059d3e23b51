"""A task's journal: one file of frames per attempt, appended under a lock, read as hostile input.

    journal/000003.j   the frames of `frame.py`, kind NOTE, payload a JSON list of facts:
    [{"op":"open","format":1,"task":12,"attempt":3,"at_ns":1760000000000000000},
     {"op":"step_done","name":"fetch","result":null,"version":1,"at_ns":1760000000000000001}]
    00 00 00 ...       room: zeros for the frames to come, once a process appends many

One file per attempt, so that a zombie of attempt 2 cannot write into the file of attempt 3; it is
refused as soon as attempt 3 was prepared. Many processes of one attempt may append in turn.
Invariant: a fact counts once its frame checks in its place in the chain; torn means not done.
Invariant: `append` returns after the sync; the lock is held over it, so a frame never promises
durability of what its writer did not know to be synced.
Stdlib only; it does not know what facts mean: read next `facts.py`, `scan.py` (how it is read).
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
from ckptd.storage.scan import TORN_BYTES_MAX, Bounds, JournalDamaged, Place, Scan, behind
from ckptd.storage.taskdir import ATTEMPT_FILE, attempt_of, attempt_of_journal, journal_name
from ckptd.storage.untrusted import (
    JSON_DEPTH_MAX,
    NotTrusted,
    names_in,
    open_directory,
    open_regular,
    parse_json,
    refuse_deep,
)

__all__ = [
    "TASK",
    "Bounds",
    "Fact",
    "Journal",
    "JournalDamaged",
    "StaleAttempt",
    "TooLarge",
    "read",
    "sync_names",
]

FORMAT: Final = 1
FACTS_PER_FRAME_MAX: Final = 1_000
FACT_BYTES_MAX: Final = 1 << 20  # larger things belong into a file of a checkpoint
FILE_BYTES_MAX: Final = 256 << 20  # half a million items and more; a batch has its own bounds
ALL_BYTES_MAX: Final = 512 << 20  # over all attempts; bounds what one reading costs
TASK: Final = Bounds(FILE_BYTES_MAX, ALL_BYTES_MAX)
ATTEMPTS_MAX: Final = 10_000
UNSYNCED_BYTES_MAX: Final = 1 << 20  # far below what the reader takes for a torn tail
ROOM_BYTES_MAX: Final = 256 << 10
_ROOM_FROM_BYTES: Final = 4 << 10  # what is smaller stays small
_ROOM_AFTER_APPENDS: Final = 4  # a process that appends once and ends makes none
_ROOM_AGAIN_APPENDS: Final = 1_000  # where the disk had no space for it
_PAYLOAD_BYTES_MAX: Final = 4 << 20

Fact = dict[str, Any]

_encode = json.JSONEncoder(separators=(",", ":")).encode


class StaleAttempt(Exception):
    """A newer attempt of this task was prepared: this one must stop and may not write."""


class TooLarge(Exception):
    """A fact or the whole journal would pass its bound; nothing was written."""


class Journal:
    """The journal of one attempt, open for appending; usable by one thread at a time."""

    def __init__(
        self, task_dir: str, task: int, attempt: int, epoch: int, *, bounds: Bounds = TASK
    ) -> None:
        self.task_dir = task_dir
        self.task = task
        self.attempt = attempt
        self.bounds = bounds
        self._uid = os.getuid()
        self._pid = os.getpid()
        self._task_fd = open_directory(task_dir, self._uid)
        self._fd = -1
        self._seed = _seed(task, attempt)
        self._chain = frame.Chain(self._seed, epoch & 0xFFFFFFFF)
        self._before_bytes = 0  # of the attempts before, which nobody appends to any more
        self._has_looked = False  # at the file as it was found
        self._has_name = False  # the file's name is known to be durable
        self._end_bytes = 0  # behind the last frame
        self._synced_bytes = 0  # behind the last one that is known to be durable
        self._room_end = 0  # zeros lie from the end to here, as far as we know
        self._appends_to_room = _ROOM_AFTER_APPENDS  # so many more before room is made
        self._has_made_room = False
        self._next_lsn = 1
        self._durable_lsn = 0
        self._vouched: tuple[int, int] | None = None
        self._failure: OSError | None = None

    def append(self, facts: list[Fact], *, is_synced: bool = True) -> int:
        """Append facts as one group; return the number of the last one.

        Without `is_synced`, they outlive the process, and are durable with the next synced append.

        Raises:
            StaleAttempt: a newer attempt exists; it finds the facts or not. TooLarge: a bound.
            OSError: the disk refuses. JournalDamaged: it does not check, or a sync failed before.

        Durable: all of `facts`, if `is_synced`, and everything before them in this file.
        """
        if self._failure:
            raise JournalDamaged(f"a sync failed before ({self._failure}); nothing may follow")
        if os.getpid() != self._pid:
            self._open_as_child()
        self._refuse_if_stale()
        if self._fd < 0:
            self._fd = self._opened()
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            last = self._append_locked(facts, is_synced=is_synced)
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        # Invariant: what is told as done, a newer attempt finds: it was not yet prepared now.
        self._refuse_if_stale()
        return last

    def _open_as_child(self) -> None:
        """Begin anew after fork(2): a lock on the parent's open file does not keep the parent out.

        What the parent knew was perhaps half said, by a thread that is not here.
        """
        inherited = (self._fd, self._task_fd)
        epoch = self._chain.epoch
        own = Journal(self.task_dir, self.task, self.attempt, epoch, bounds=self.bounds)
        vars(self).update(vars(own))
        for fd in inherited:
            if fd >= 0:
                os.close(fd)

    def _append_locked(self, facts: list[Fact], *, is_synced: bool) -> int:
        """Invariant: a frame promises what was synced before it, not what rides unsynced."""
        self._catch_up()
        payload, count = self._payload(facts)
        before = Place(self._end_bytes, self._next_lsn, self._chain.crc)
        try:
            self._append_frame(payload, count, is_synced=is_synced)
        except OSError:
            raise
        except BaseException:
            # A signal's exception (a time limit, Ctrl-C) struck between two lines: the frame is
            # there, or torn, or not. Whoever appends next looks at the file itself.
            self._end_bytes, self._next_lsn, self._chain.crc = before
            self._has_looked = False
            raise
        return self._next_lsn - 1

    def _append_frame(self, payload: bytes, count: int, *, is_synced: bool) -> None:
        """Durable: the frame, if `is_synced`."""
        crc_before = self._chain.crc
        data = self._chain.encode(payload, self._next_lsn, self._durable_lsn, count, frame.NOTE)
        try:
            self._write(data)
        except OSError:
            self._chain.crc = crc_before
            raise
        self._end_bytes += len(data)
        self._next_lsn += count
        self._appends_to_room -= 1
        if is_synced or self._end_bytes - self._synced_bytes > UNSYNCED_BYTES_MAX:
            try:
                self._sync()
            except OSError:
                try:  # noqa: SIM105 - no call before it: a signal's exception would strike there
                    os.ftruncate(self._fd, self._synced_bytes)
                except OSError:
                    pass
                raise

    def _write(self, data: bytes) -> None:
        """Write a frame, and room behind it where the one before is used up.

        A frame in room changes no metadata, so its sync waits for one write instead of two. Frame
        and room are one write, and the sync that follows is the frame's own.
        Crash: part of a frame, or part of the room, is there: torn, not done; whoever appends next
        cuts it off. A disk without space for room may have space for the frame.
        """
        room_bytes = self._room_bytes(len(data))
        if room_bytes:
            try:
                write_all(self._fd, data + bytes(room_bytes), self._end_bytes)
            except OSError:
                self._cut()
                self._appends_to_room = _ROOM_AGAIN_APPENDS
            else:
                self._room_end = self._end_bytes + len(data) + room_bytes
                self._has_made_room = True
                return
        try:
            write_all(self._fd, data, self._end_bytes)
        except OSError:
            self._cut()
            raise

    def _room_bytes(self, frame_bytes: int) -> int:
        """Return how much room to make behind the next frame; a file at most doubles by it."""
        end_bytes = self._end_bytes + frame_bytes
        if end_bytes <= self._room_end or self._appends_to_room > 0:
            return 0
        if end_bytes < _ROOM_FROM_BYTES:
            return 0
        room_end = (end_bytes + min(end_bytes, ROOM_BYTES_MAX)) & ~(_ROOM_FROM_BYTES - 1)
        is_within = self._before_bytes + room_end <= self.bounds.all_bytes
        return room_end - end_bytes if is_within and room_end <= self.bounds.file_bytes else 0

    def _cut(self) -> None:
        """Cut off what lies behind the last frame, room or torn."""
        os.ftruncate(self._fd, self._end_bytes)
        self._room_end = self._end_bytes

    def _sync(self) -> None:
        """Invariant: a failed sync is never repeated: not done, and everything after is refused.

        Durable: the file up to its last frame, and its name.
        """
        try:
            sync_data_fd(self._fd)
            if not self._has_name:
                sync_names(self._task_fd, self._uid, self.attempt - 1)
                self._has_name = True
        except OSError as error:
            self._failure = error  # no call: a signal that came during the sync would strike there
            raise
        self._durable_lsn = self._next_lsn - 1
        self._synced_bytes = self._end_bytes

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
            return os.open(journal_name(self.attempt), flags, 0o600, dir_fd=journal_fd)
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
        if self._has_looked:
            is_written, is_end = behind(self._fd, self._end_bytes)
            if is_end:  # whoever made the room has cut it off
                self._room_end = self._end_bytes
            if not is_written:
                return
        place = Place(self._end_bytes, self._next_lsn, self._chain.crc)
        scan = Scan(self._fd, self._seed, self.bounds.file_bytes, place)
        for _ in scan.payloads():  # Bound: the file, `bounds.file_bytes`
            pass
        self._end_bytes, self._next_lsn, self._chain.crc = scan.end_bytes, scan.next_lsn, scan.crc
        self._has_name = self._has_name or scan.promised_lsn > 0
        size = os.fstat(self._fd).st_size
        self._room_end = size
        if scan.is_torn or size > scan.end_bytes + TORN_BYTES_MAX:
            self._cut()
        if size:
            self._sync()
        self._has_looked = True

    def _payload(self, facts: list[Fact]) -> tuple[bytes, int]:
        """Invariant: what `read` refuses is refused here, before it is promised durable."""
        at_ns = time.time_ns()
        group = [{**fact, "at_ns": at_ns} for fact in facts]
        if self._next_lsn == 1:
            opening = {"op": "open", "format": FORMAT, "task": self.task, "attempt": self.attempt}
            group.insert(0, {**opening, "at_ns": at_ns})
        payload = _encoded(group)
        if len(group) > FACTS_PER_FRAME_MAX + 1 or len(payload) > _PAYLOAD_BYTES_MAX:
            raise TooLarge(f"{len(group)} facts with {len(payload)} bytes are too many at once")
        end_bytes = self._end_bytes + frame.frame_bytes(len(payload))
        if end_bytes > self.bounds.file_bytes:
            raise TooLarge(
                f"the journal of attempt {self.attempt} has {self.bounds.file_bytes} bytes"
            )
        if self._before_bytes + end_bytes > self.bounds.all_bytes:
            raise TooLarge(f"the journals of all attempts have {self.bounds.all_bytes} bytes")
        return payload, len(group)

    def close(self) -> None:
        """Close the files; room that was made and not used is given back.

        What was appended unsynced stays so: it outlives this process, not a loss of power.
        """
        if self._has_made_room and not self._failure and os.getpid() == self._pid:
            with contextlib.suppress(OSError):
                self._give_room_back()
        for fd in (self._fd, self._task_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._task_fd = -1

    def _give_room_back(self) -> None:
        """Cut the room off, unless others append to it: it is theirs then."""
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not behind(self._fd, self._end_bytes).is_written:
            self._cut()


def _encoded(group: list[Fact]) -> bytes:
    """Return facts as they stand in a frame.

    Raises:
        TooLarge: one of them is longer, or nested deeper, than is read again.
    """
    try:
        payload = _encode(group).encode()
        if payload.count(b"[") + payload.count(b"{") >= JSON_DEPTH_MAX:  # it may be too deep, then
            refuse_deep(group)
    except (ValueError, RecursionError) as error:
        raise TooLarge(f"a fact is nested too deeply ({error}); save it as a file") from error
    if len(payload) > FACT_BYTES_MAX and max(len(_encode(fact)) for fact in group) > FACT_BYTES_MAX:
        raise TooLarge(f"a fact takes more than {FACT_BYTES_MAX} bytes; save it as a file")
    return payload


def _seed(task: int, attempt: int) -> int:
    return crc32(f"ckptd journal {task}.{attempt}".encode())


def _files(journal_fd: int) -> list[tuple[int, str]]:
    """Return (attempt, name) of every journal, oldest first."""
    found = [
        (attempt, name)
        for name in names_in(journal_fd)
        if (attempt := attempt_of_journal(name)) is not None
    ]
    if len(found) > ATTEMPTS_MAX:
        raise JournalDamaged(f"{len(found)} journals, more than {ATTEMPTS_MAX}")
    return sorted(found)


def sync_names(task_fd: int, uid: int, attempt_max: int) -> None:
    """Make durable what `read` found: its writer may have been killed before its sync.

    Whoever acts on it, or hands it on as done, must not see it vanish in a later power loss.

    Durable: the names from the task's directory down, and all of the attempts up to one.
    """
    journal_fd = open_directory("journal", uid, task_fd)
    try:
        for attempt, name in _files(journal_fd):
            if attempt <= attempt_max:
                with contextlib.suppress(NotTrusted):
                    fd = open_regular(name, uid, journal_fd)
                    try:
                        sync_data_fd(fd)
                    finally:
                        os.close(fd)
        sync_fd(journal_fd)
    finally:
        os.close(journal_fd)
    sync_fd(task_fd)


def read(
    task_dir: str, task: int, owner_uid: int, attempt_max: int, *, bounds: Bounds = TASK
) -> Iterator[tuple[int, Fact]]:
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
    left_bytes = bounds.all_bytes
    try:
        for attempt, name in _files(journal_fd):
            if attempt <= attempt_max:
                left_bytes -= os.stat(name, dir_fd=journal_fd, follow_symlinks=False).st_size
                if left_bytes < 0:
                    raise JournalDamaged(f"the journals are larger than {bounds.all_bytes} bytes")
                fd = open_regular(name, owner_uid, journal_fd)
                for payload in _payloads_of(fd, name, _seed(task, attempt), bounds.file_bytes):
                    for fact in _facts_of(payload, name):
                        yield attempt, fact
    finally:
        os.close(journal_fd)


def _payloads_of(fd: int, name: str, seed: int, bytes_max: int) -> Iterator[bytes]:
    try:
        yield from Scan(fd, seed, bytes_max).payloads()
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
