"""Census of Python's own standard library: a long job that survives any kind of death.

Every .py file is parsed; per module: functions, classes, lines, cyclomatic complexity, digest.
This is a plain command: standard library only, nothing of ckptd is imported. It runs by hand
(`python examples/census.py --out census.json`) just as well as under the daemon:

    ckptctl submit -- python examples/census.py --out census.json

How it survives, in files of its private directory CKPTD_DIR (level 1 of the contract):

    results.jsonl        one line per module, synced before the next module is begun, so that at
                         most the current one is repeated: {"module": "abc", ...} CRC32
    ckpt/00000007/       a checkpoint, every --every modules: filled in stage/, then renamed, so
      position.json      that it is there whole or not at all: how far results.jsonl is known good

A resumed run trusts results.jsonl up to the position of CKPTD_LAST, checks the few lines behind
it one by one, cuts a torn last line, and goes on with the first module that has no result.
"""

import argparse
import ast
import hashlib
import json
import os
import socket
import sys
import sysconfig
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any, TextIO

BRANCHES = (
    ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert,
    ast.comprehension, ast.match_case,
)  # fmt: skip
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


class Results:
    """The results that are durable: an append-only file of checked lines."""

    def __init__(self, path: Path, good_bytes: int) -> None:
        """Read back what is there; bytes after the last whole line are cut off."""
        self.rows: dict[str, dict[str, Any]] = {}
        self.cut_bytes = 0
        self.checked_one_by_one = 0
        self._file = path.open("a+b")
        sync_directory(path.parent)  # the name itself must survive as well
        self._read_back(good_bytes)

    def _read_back(self, good_bytes: int) -> None:
        self._file.seek(0)
        end = 0
        for line in self._file:
            body, _, crc = line.rpartition(b" ")
            whole = line.endswith(b"\n") and crc.strip() == b"%08x" % zlib.crc32(body)
            if not whole:
                break
            self.checked_one_by_one += end >= good_bytes
            row = json.loads(body)
            self.rows[row["module"]] = row
            end += len(line)
        if end < good_bytes:  # not a torn tail: these bytes were synced once
            print(f"results.jsonl is damaged at byte {end} of {good_bytes}", file=sys.stderr)
            sys.exit(os.EX_DATAERR)
        self.cut_bytes = self.size - end
        if self.cut_bytes:
            self._file.truncate(end)
            os.fsync(self._file.fileno())

    def add(self, row: dict[str, Any]) -> None:
        """Make one result durable; it survives everything once this returns."""
        body = json.dumps(row, sort_keys=True).encode()
        self._file.write(b"%s %08x\n" % (body, zlib.crc32(body)))
        self._file.flush()
        os.fdatasync(self._file.fileno())
        self.rows[row["module"]] = row

    @property
    def size(self) -> int:
        """Bytes that are durable."""
        return os.fstat(self._file.fileno()).st_size


class Progress:
    """Tells the daemon, where there is one, how far we are; nobody waits for an answer."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def say(self, *lines: str) -> None:
        """Send lines such as PROGRESS=3/10; lossy by nature, never in the way."""
        if self._address:
            try:
                self._socket.sendto("\n".join(lines).encode(), self._address)
            except OSError:  # the daemon is away, or busy: the files hold the truth
                return


def measure(path: Path, module: str) -> dict[str, Any]:
    """Return what the census wants to know about one module."""
    source = path.read_bytes()
    row: dict[str, Any] = {"module": module, "sha256": hashlib.sha256(source).hexdigest()}
    row["lines"] = len(source.splitlines())
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError) as bad:  # old grammars and the like: counted, not hidden
        return {**row, "unparsable": type(bad).__name__}
    row["functions"] = sum(isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) for n in nodes)
    row["classes"] = sum(isinstance(node, ast.ClassDef) for node in nodes)
    row["complexity"] = (
        1
        + sum(isinstance(node, BRANCHES) for node in nodes)
        + sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    )
    return row


def modules(root: Path) -> list[str]:
    """Return the relative paths of all modules, in an order that never changes."""
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(path.as_posix() for path in found if not SKIPPED & set(path.parts))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(directory: Path, position: dict[str, int]) -> None:
    """Publish a checkpoint: fill stage/, sync, rename. What is in ckpt/ is whole."""
    stage, published = directory / "stage", directory / "ckpt"
    stage.mkdir(exist_ok=True)
    published.mkdir(exist_ok=True)
    with (stage / "position.json").open("w") as file:
        json.dump(position, file)
        file.flush()
        os.fsync(file.fileno())
    number = 1 + max((int(name) for name in os.listdir(published) if name.isdigit()), default=0)
    stage.rename(published / f"{number:08d}")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def last_position() -> dict[str, int]:
    """Return the position of the newest valid checkpoint, or the beginning."""
    last = os.environ.get("CKPTD_LAST", "")
    if not last:
        return {"modules": 0, "bytes": 0}
    position = json.loads((Path(last) / "position.json").read_text())
    return {"modules": int(position["modules"]), "bytes": int(position["bytes"])}


def take(todo: list[str], root: Path, results: Results, options: argparse.Namespace) -> None:
    """Measure every module that has no result yet, one after the other."""
    directory = Path(options.directory)
    progress = Progress()
    attempt = os.environ.get("CKPTD_ATTEMPT", "1")
    touched = open(options.touched or os.devnull, "a", buffering=1)  # noqa: SIM115
    for number, module in enumerate(todo, 1):  # Bound: the list was made before
        if module in results.rows:
            continue
        touched.write(f"{attempt} {module}\n")  # the side effect: how often was it begun?
        began = time.monotonic()
        row = measure(root / module, module)
        time.sleep(max(0.0, options.pace / 1000 - (time.monotonic() - began)))
        results.add(row)
        if number % options.every == 0:
            publish(directory, {"modules": number, "bytes": results.size})
            progress.say("CHECKPOINT=1")
        progress.say(f"PROGRESS={number}/{len(todo)}", f"STATUS={module}")


def report(results: Results, out: str, to: TextIO) -> None:
    """Write the final result, sorted, and a summary."""
    rows = [results.rows[module] for module in sorted(results.rows)]
    sums = {
        key: sum(row.get(key, 0) for row in rows)
        for key in ("lines", "functions", "classes", "complexity")
    }
    write_whole(Path(out), json.dumps({"total": sums, "modules": rows}, indent=1) + "\n")
    summary = ", ".join(f"{count:,} {key}" for key, count in sums.items())
    print(f"{len(rows)} modules: {summary}", file=to)


def main() -> None:
    """Take the census, from the beginning or from where the last attempt got."""
    parser = argparse.ArgumentParser(description="Census of Python's standard library.")
    parser.add_argument("--root", default=sysconfig.get_path("stdlib"), help="where to look")
    parser.add_argument("--out", default="census.json", help="the result")
    parser.add_argument("--touched", default="", help="log every module that is begun")
    parser.add_argument("--items", type=int, default=0, help="so many modules only; 0: all")
    parser.add_argument("--pace", type=float, default=0, help="at least so many ms per module")
    parser.add_argument("--every", type=int, default=10, help="modules between checkpoints")
    options = parser.parse_args()
    root = Path(options.root)
    todo = modules(root)[: options.items or None]
    with tempfile.TemporaryDirectory() as scratch:  # only used where there is no daemon
        options.directory = os.environ.get("CKPTD_DIR") or scratch
        position = last_position()
        results = Results(Path(options.directory, "results.jsonl"), position["bytes"])
        print(
            f"{len(results.rows)} of {len(todo)} modules are done: {position['modules']} by the"
            f" checkpoint, {results.checked_one_by_one} after it; {results.cut_bytes} bytes cut",
            flush=True,
        )
        take(todo, root, results, options)
        report(results, options.out, sys.stdout)


if __name__ == "__main__":
    main()
