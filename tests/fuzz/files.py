"""Targets of files that tasks write: journals, exit records, manifests, sources of items.

Oracle of a damaged journal: its facts are the first ones of those that were written, at least as
many as a frame that still stands had promised, or it is refused. A manifest that names what is
not there, or is not what it says, is refused.
"""

import contextlib
import functools
import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path

from ckptd.batch.refusal import Refused
from ckptd.batch.source import take
from ckptd.batch.spec import Source, parse
from ckptd.runner.attempt import End, Found, checked, sealed
from ckptd.runner.instance import began_of, exit_of
from ckptd.storage import blobs, frame, manifest
from ckptd.storage.facts import Facts, item_done, set_value, step_done
from ckptd.storage.journal import Fact, Journal, JournalDamaged, read
from ckptd.storage.untrusted import Damaged, NotTrusted, open_directory
from tests.fuzz.target import DEEP, LIGHT, Script, Target, damaged

UID = os.getuid()
TASK = 12
_ONE_MORE = set_value("after", {"n": 1})
_GROWN_BYTES_MAX = 4 << 10  # by one small fact, and the opening


@functools.cache
def _place() -> Path:
    """Return a task's directory in memory, as the daemon prepares it; it lives with the process."""
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    folder = Path(tempfile.mkdtemp(prefix="ck-fuzz-", dir=base))
    blobs.prepare(str(folder / str(TASK)), 1, UID, os.getgid(), fresh=False)
    return folder / str(TASK)


def forget() -> None:
    """Remove what the targets of this process have made."""
    if _place.cache_info().currsize:
        shutil.rmtree(_place().parent, ignore_errors=True)
        _place.cache_clear()
        _journal.cache_clear()


@functools.cache
def _journal() -> tuple[bytes, tuple[Fact, ...]]:
    """Return a journal of some frames, and its facts."""
    journal = Journal(str(_place()), TASK, 1, epoch=1)
    for number in range(8):
        journal.append([step_done(f"step {number}", {"n": number}), set_value("a", number)])
    journal.append([item_done(f"item {number}", "pass", number) for number in range(20)])
    journal.close()
    facts = tuple(fact for _, fact in read(str(_place()), TASK, UID, 1))
    return (_place() / "journal" / "000001.j").read_bytes(), facts


def run_journal(data: bytes) -> None:
    """Damage a journal anywhere; read it, then append to it and read it again."""
    whole, facts = _journal()
    changed = damaged(whole, Script(data))
    path = _place() / "journal" / "000001.j"
    path.write_bytes(changed)
    least = promised(whole, changed)
    try:
        found = [fact for _, fact in read(str(_place()), TASK, UID, 1)]
    except (JournalDamaged, NotTrusted):
        return
    assert found == list(facts[: len(found)]), "facts that nobody wrote, or in another order"
    assert len(found) >= least, f"{len(found)} facts, {least} were promised"
    _append_to(path, found)


def _append_to(path: Path, found: list[Fact]) -> None:
    """Record one fact more: it stands behind those that were found, and nothing else has grown."""
    journal = Journal(str(_place()), TASK, 1, epoch=2)
    size_bytes = path.stat().st_size
    last = journal.append([_ONE_MORE])
    journal.close()
    again = [fact for _, fact in read(str(_place()), TASK, UID, 1)]
    opening = 0 if found else 1  # of a file in which nothing was left
    assert again[opening : opening + len(found)] == found, "what was found"
    assert again[-1] == {**_ONE_MORE, "at_ns": again[-1]["at_ns"]}, "what was appended"
    assert last == len(again) == len(found) + opening + 1, "nothing else"
    assert path.stat().st_size <= size_bytes + _GROWN_BYTES_MAX, "it has grown"


def promised(whole: bytes, changed: bytes) -> int:
    """Return how many facts the frames that still stand in their place had promised."""
    most, offset, view = 0, 0, memoryview(whole)
    while head := frame.peek(view, offset):  # Bound: the file
        if not head.size or head.kind != frame.NOTE:
            break
        if changed[offset : offset + head.size] == whole[offset : offset + head.size]:
            most = max(most, head.durable_lsn)
        offset += head.size
    return most


def script_seeds() -> list[bytes]:
    """Return scripts: each kind of edit at some places."""
    return [bytes([kind, 0, at, 0, 33, 7]) for kind in range(6) for at in (0, 1, 2, 3)]


def run_facts(data: bytes) -> None:
    """Take in facts that stand in frames which check: nothing may be raised, all is counted."""
    facts = Facts()
    for number, line in enumerate(data.split(b"\n")):
        try:
            fact = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(fact, dict):
            facts.take(number + 1, fact)
    problem, why = facts.problem_of(1)
    assert bool(problem) == bool(why), "a problem says what it is about"
    assert 0 <= facts.retry_after_s(1) <= 86_400, "a wait has a bound"


def fact_seeds() -> list[bytes]:
    """Return every kind of fact."""
    some = [step_done("a", 1), set_value("k", [1]), item_done("i", "pass", None, "text")]
    more = [
        {"op": "open", "format": 1, "task": 12, "attempt": 1},
        {"op": "progress", "done": 1, "total": 2, "text": ""},
        {"op": "retry_after", "seconds": 5, "scope": "", "at_ns": 1},
        {"op": "problem", "text": "no", "why": "version"},
        {"op": "run", "event": "end"},
        {"op": "checkpoint", "seq": 3},
        {"op": "result", "value": {}},
        {"op": "step_reset", "name": "a"},
    ]
    return [b"\n".join(json.dumps(fact).encode() for fact in [*some, *more])]


def run_exit(data: bytes) -> None:
    """Read a record of an attempt: each part is whole, or not there."""
    found = Found(data)
    for part in (found.claim, found.start, found.exit):
        assert part is None or checked(sealed(part)) == part
        began_of(part)
        exit_of(part)
    began_of(data)
    exit_of(data)
    line = End("exit", code=7, text="why").line(1, 2)
    changed = damaged(line, Script(data))
    got = checked(changed)
    if got is not None and changed[: len(line)] != line:
        length = got.rstrip(b"\n")
        assert zlib.crc32(got) == int(changed[len(length) + 1 : len(length) + 9], 16)


def exit_seeds() -> list[bytes]:
    """Return a whole record."""
    block = sealed(b'{"claim":1}').ljust(512, b"\0") + sealed(b'{"start":1}').ljust(512, b"\0")
    return [block + End("signal", signal=9).line(1, 1), b"\0\0\0\1\5", b"\1\0\0\2\1AAAA"]


def run_manifest(data: bytes) -> None:
    """Read a manifest that anybody may have written, beside one file that it may name."""
    script = Script(data)
    is_summed, text = script.byte() % 2, script.rest()
    folder = _place() / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / "file").write_bytes(b"content")
    if is_summed:
        with contextlib.suppress(ValueError, RecursionError):
            given = json.loads(text)
            if isinstance(given, dict):
                given["digest"] = manifest.digest_of(given)
                text = json.dumps(given).encode()
    (folder / "MANIFEST.json").write_bytes(text)
    fd = open_directory(str(folder), UID)
    try:
        found = manifest.load(fd, UID)
        manifest.verify(fd, UID, found, is_deep=True)
    except (Damaged, NotTrusted, manifest.TooNew):
        return
    finally:
        os.close(fd)
    (entry,) = found["files"]
    right = manifest.sha256(b"content").hexdigest()
    assert (entry["name"], entry["sha256"]) == ("file", right), "a manifest of another content"


def manifest_seeds() -> list[bytes]:
    """Return a manifest that checks."""
    digest = manifest.sha256(b"content").hexdigest()
    files = [{"name": "file", "bytes": 7, "sha256": digest}]
    good = {**manifest.EMPTY, "format": 1, "seq": 1, "at_ns": 5, "boot_id": "b", "files": files}
    good["digest"] = manifest.digest_of(good)
    return [b"\0" + json.dumps(good).encode(), b"\1" + json.dumps(good).encode(), b"\1{}"]


_FORMATS = ("lines", "jsonl", "csv", "null")


def run_source(data: bytes) -> None:
    """Read items from a file of any content, in any format."""
    script = Script(data)
    kind, key = _FORMATS[script.byte() % 4], (None, "id", "")[script.byte() % 3]
    path = _place() / "items"
    path.write_bytes(script.rest())
    source = Source(from_="file", path=str(path), format=kind, key=key)  # type: ignore[arg-type]
    with contextlib.suppress(Refused):
        taken = take(source, "/")
        assert all(taken.items), "an item has a key"


def source_seeds() -> list[bytes]:
    """Return a source of each format."""
    return [
        b"\0\0a\nb\n",
        b'\1\1{"id":1}\n{"id":"2"}\n',
        b'\2\1id,x\n1,"a ""b"" c"\n2,"two\nlines"\n',
        b"\3\0a\0b\0",
    ]


def run_spec(data: bytes) -> None:
    """Take a batch's spec apart."""
    with contextlib.suppress(ValueError, RecursionError):
        given = json.loads(data)
        with contextlib.suppress(Refused):
            spec = parse(given, None, None)
            assert spec.knobs.workers > 0, "somebody works"


def spec_seeds() -> list[bytes]:
    """Return specs with every member."""
    whole = {
        "argv": ["echo", "{}"], "items": {"from": "lines", "lines": ["a", 1]}, "jobs": 2,
        "rate": "5/m", "max_errors": "10%", "retries": 3, "on_exit": {"3": "skipped"},
        "timeout_s": 1.5, "capture": "all", "limit": 3, "shuffle": True, "seed": 4,
    }  # fmt: skip
    return [json.dumps(whole).encode(), b'{"python":"a:b","mode":"async"}']


TARGETS = (
    Target("journal", run_journal, script_seeds, 256, DEEP),
    Target("facts", run_facts, fact_seeds),
    Target("exit", run_exit, exit_seeds),
    Target("manifest", run_manifest, manifest_seeds),
    Target("source", run_source, source_seeds),
    Target("spec", run_spec, spec_seeds, weight=LIGHT),
)
