"""Where a batch lies, and the two files that say what it is: `batch.json` and `items.jsonl`.

    ${CKPTD_BATCH_DIR:-${XDG_DATA_HOME:-~/.local/share}/ckptd/batches}/NAME/
        LOCK            held by whoever runs or changes the batch: {"pid":4711,"task":12}
        batch.json      id, config with digest, knobs, what the next run is about
        items.jsonl     {"key":"a.txt","item":"a.txt"} a line: the items as last submitted
        attempt.json    the newest run, as of a task: see storage/taskdir.py
        journal/        the ledger, a file for each run: see storage/journal.py
        items/<number>/ the private directory of an item that has no result yet
        logs/           what the items printed, a file for each lane

Both files are replaced as a whole. It knows no results: read next `ledger.py`.
"""

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Any, Final, NamedTuple

import msgspec

from ckptd.batch.refusal import BAD_DATA, CONFLICT, DENIED, NOT_FOUND, Refused
from ckptd.batch.spec import Config, Knobs, digest
from ckptd.home import home
from ckptd.storage.disk import append_all, sync_fd
from ckptd.storage.taskdir import newest_attempt
from ckptd.storage.untrusted import open_directory, replace_small

FORMAT: Final = 1
BATCH_FILE: Final = "batch.json"
ITEMS_FILE: Final = "items.jsonl"
LOCK_FILE: Final = "LOCK"
_BATCH_BYTES_MAX: Final = 16 << 20
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:@+=-]{0,127}")
_WRITTEN_BYTES: Final = 1 << 20
_LOCK_TRIES: Final = 30
_LOCK_AGAIN_S: Final = 0.01


class Item(NamedTuple):
    """One thing to work on: a text, or an object of JSONL or CSV."""

    key: str
    value: Any
    position: int  # in the order submitted, from 1

    @property
    def text(self) -> str:
        """Return the item as one word of a command line."""
        return self.value if isinstance(self.value, str) else canonical(self.value)


class Next(msgspec.Struct):
    """What the next run is about; results of runs up to `base_run` are the old ones."""

    base_run: int = 0
    statuses: list[str] = []
    only: list[str] = []


class Accepted(msgspec.Struct):
    """A change of config that somebody agreed to."""

    at_ns: int
    from_digest: str
    to_digest: str
    diff: list[str]


class Batch(msgspec.Struct):
    """What `batch.json` holds."""

    format: int
    id: int  # 63 bits, random: seeds the ledger, so that no other batch's file ever checks
    name: str
    created_ns: int
    config: Config
    digest: str
    knobs: Knobs
    next: Next
    accepted: list[Accepted] = []
    items: int = 0
    items_at_ns: int = 0


class Holder(NamedTuple):
    """Who holds the lock of a batch."""

    pid: int
    task: int | None


def canonical(value: Any) -> str:
    """Return JSON that is equal exactly where the values are."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def root(environ: Mapping[str, str] = os.environ) -> str:
    """Return the directory of all batches of this user."""
    if given := environ.get("CKPTD_BATCH_DIR"):
        return os.path.abspath(given)
    data = environ.get("XDG_DATA_HOME") or os.path.join(home(environ), ".local", "share")
    return os.path.join(data, "ckptd", "batches")


def path_of(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the directory of a batch by its name.

    Raises:
        Refused: not a name.
    """
    if not _NAME.fullmatch(name):
        raise Refused(
            f"{name!r} is no name for a batch",
            "letters, digits and . _ : @ + = -, at most 128, the first a letter or digit",
        )
    return os.path.join(root(environ), name)


def make(path: str) -> None:
    """Make the directory of a batch, private, and those above it.

    Durable: no; `store` syncs its name.
    """
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)


def load(path: str) -> Batch:
    """Return what a batch is.

    Raises:
        Refused: there is none, or what is there cannot be read.
    """
    found = load_or_none(path)
    if found is None:
        raise Refused(f"there is no batch in {path}", "`ckptctl batch` lists yours", code=NOT_FOUND)
    return found


def load_or_none(path: str) -> Batch | None:
    """Return what a batch is, None where there is none yet. Raises Refused for damage."""
    file = f"{path}/{BATCH_FILE}"
    try:
        with open(file, "rb") as opened:
            data = opened.read(_BATCH_BYTES_MAX)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as denied:
        raise Refused(f"{file}: {denied.strerror}; a batch belongs to its user", code=DENIED) from (
            denied
        )
    try:
        batch = msgspec.json.decode(data, type=Batch)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as bad:
        hint = "the ledger in journal/ is untouched; restore batch.json, or submit under a new name"
        raise Refused(f"{file} cannot be read: {bad}", hint, code=BAD_DATA) from bad
    if batch.format > FORMAT or digest(batch.config) != batch.digest:
        is_newer = batch.format > FORMAT
        why = "was changed by hand"
        if is_newer:
            why = f"was written by a newer ckptd: format {batch.format}; this one reads {FORMAT}"
        raise Refused(f"{file} {why}", "nothing was changed", code=BAD_DATA)
    return batch


def new_batch(name: str, config: Config, knobs: Knobs) -> Batch:
    """Return a batch that nobody has seen yet."""
    number = int.from_bytes(os.urandom(8)) >> 1 or 1
    now_ns = time.time_ns()
    return Batch(FORMAT, number, name, now_ns, config, digest(config), knobs, Next())


def store(path: str, batch: Batch) -> None:
    """Write `batch.json`.

    Durable: the whole file and its name.
    """
    fd = open_directory(path, os.getuid())
    try:
        replace_small(BATCH_FILE, msgspec.json.encode(batch), fd, os.getuid())
        sync_fd(fd)
        parent_fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            sync_fd(parent_fd)
        finally:
            os.close(parent_fd)
    finally:
        os.close(fd)


def newest_run(path: str) -> int:
    """Return the number of the newest run of a batch, or of an item; 0 before the first."""
    return newest_attempt(path, os.getuid())


def item_number(batch_id: int, key: str) -> int:
    """Return the number that an item is known by in paths and journals: 60 bits of a digest."""
    return int(sha256(f"{batch_id}\0{key}".encode()).hexdigest()[:15], 16)


# --- the list of items ---------------------------------------------------------------------------


def store_items(path: str, items: Iterable[Item]) -> None:
    """Write `items.jsonl`.

    Crash: `items.jsonl.new` is left, and written anew by the next call.
    Durable: the whole file and its name.
    """
    new = f"{path}/{ITEMS_FILE}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        buffered = bytearray()
        for item in items:
            buffered += canonical({"key": item.key, "item": item.value}).encode() + b"\n"
            if len(buffered) >= _WRITTEN_BYTES:
                append_all(fd, buffered)
                buffered.clear()
        append_all(fd, buffered)
        sync_fd(fd)
    finally:
        os.close(fd)
    os.rename(new, f"{path}/{ITEMS_FILE}")
    dir_fd = open_directory(path, os.getuid())
    try:
        sync_fd(dir_fd)
    finally:
        os.close(dir_fd)


def load_items(path: str) -> Iterator[Item]:
    """Yield the items as last submitted, in that order.

    Raises:
        Refused: a line cannot be read.
    """
    try:
        file = open(f"{path}/{ITEMS_FILE}", "rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        return
    with file:
        for position, line in enumerate(file, 1):
            try:
                found = json.loads(line)
                yield Item(found["key"], found["item"], position)
            except (ValueError, KeyError, TypeError) as bad:
                raise Refused(
                    f"{path}/{ITEMS_FILE}: line {position} cannot be read: {bad}",
                    "submit the items again; results are in the ledger and stay",
                    code=BAD_DATA,
                ) from bad


# --- the lock ------------------------------------------------------------------------------------


class Held(Exception):
    """Somebody else runs or changes this batch."""

    def __init__(self, name: str, holder: Holder) -> None:
        super().__init__(name)
        self.name = name
        self.holder = holder

    def refusal(self) -> Refused:
        """Return the same as an answer to who asked."""
        task = self.holder.task
        by = f"task {task}" if task else f"process {self.holder.pid}"
        stop = f"`ckptctl cancel {task}`" if task else f"`kill {self.holder.pid}`"
        return Refused(
            f"batch {self.name} is running: {by}",
            f"wait for it, or stop it with {stop}; results so far are kept",
            code=CONFLICT,
        )


@contextlib.contextmanager
def locked(path: str, name: str, task: int | None = None) -> Iterator[None]:
    """Hold the batch alone; given up by the kernel with the process.

    Raises:
        Held: somebody else has it.
    """
    file = f"{path}/{LOCK_FILE}"
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if not _lock(fd):
            raise Held(name, _holder_in(fd))
        if not os.path.samestat(os.fstat(fd), os.stat(file)):  # `gc` moved it away in between
            raise FileNotFoundError(f"{path} was removed at this moment")
        os.truncate(fd, 0)
        os.pwrite(fd, json.dumps({"pid": os.getpid(), "task": task}).encode(), 0)
        yield
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    """Return whether the lock is ours; who only looks at it (see `holder`) is waited out."""
    for _ in range(_LOCK_TRIES):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(_LOCK_AGAIN_S)
    return False


def holder(path: str) -> Holder | None:
    """Return who runs or changes the batch at this moment, None where nobody does."""
    try:
        fd = os.open(f"{path}/{LOCK_FILE}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder_in(fd)
    else:
        return None
    finally:
        os.close(fd)


def _holder_in(fd: int) -> Holder:
    try:
        found = json.loads(os.pread(fd, 4096, 0))
        return Holder(int(found["pid"]), found["task"])
    except (ValueError, KeyError, TypeError):
        return Holder(0, None)  # between its lock and its first write
