"""What the machine itself can do, measured in the same run: every figure is a ratio to these."""

import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECORD_BYTES = 200
SYNC_ROUNDS = 2_000
SPAWN_ROUNDS = 500


def sync_s(directory: Path) -> float:
    """Return the p50 of one 200-byte append and fdatasync on a file that is written already."""
    path = directory / "sync.ref"
    record = b"x" * RECORD_BYTES
    with path.open("w+b", buffering=0) as file:
        file.write(bytes(SYNC_ROUNDS * RECORD_BYTES))
        os.fsync(file.fileno())
        file.seek(0)
        took = []
        for _ in range(SYNC_ROUNDS):
            began = time.perf_counter()
            file.write(record)
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - began)
    path.unlink()
    return statistics.median(took)


def sqlite_per_s(directory: Path) -> float:
    """Return commits per second of SQLite, WAL and FULL, one row per commit."""
    path = directory / "sqlite.ref"
    base = sqlite3.connect(path, isolation_level=None)
    base.execute("pragma journal_mode = wal")
    base.execute("pragma synchronous = full")
    base.execute("create table task (id integer primary key, spec text)")
    spec = "x" * RECORD_BYTES
    began = time.perf_counter()
    for _ in range(SYNC_ROUNDS):
        base.execute("insert into task (spec) values (?)", (spec,))
    took_s = time.perf_counter() - began
    base.close()
    for file in directory.glob("sqlite.ref*"):
        file.unlink()
    return SYNC_ROUNDS / took_s


def spawn_per_s() -> float:
    """Return how often a bare loop starts /bin/true and waits for it, per second."""
    began = time.perf_counter()
    for _ in range(SPAWN_ROUNDS):
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
    return SPAWN_ROUNDS / (time.perf_counter() - began)


def new_file_s(directory: Path) -> float:
    """Return the p50 of making a file; it says how fresh the file system is (see `sweep`)."""
    place = Path(tempfile.mkdtemp(prefix="new-files-", dir=directory))
    took = []
    for number in range(100):
        began = time.perf_counter()
        os.close(os.open(place / str(number), os.O_CREAT | os.O_WRONLY))
        took.append(time.perf_counter() - began)
    shutil.rmtree(place)
    return statistics.median(took)


def interpreter_s() -> float:
    """Return the p50 of starting and ending a bare Python."""
    took = []
    for _ in range(15):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", ""], check=True)
        took.append(time.perf_counter() - began)
    return statistics.median(took)
