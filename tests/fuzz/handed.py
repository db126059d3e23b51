"""Targets of what people hand over, and of a batch's files: an export, `batch.json`, its items.

Oracle of an import: what is published checks and says where it came from; else one of the exit
codes that are documented, with a reason. Either way nothing lies about, inside or outside.
"""

import contextlib
import io
import json
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Final

import msgspec

from ckptd.batch import place
from ckptd.batch.refusal import Refused
from ckptd.batch.spec import parse
from ckptd.offline import checkpoint
from ckptd.storage import manifest
from ckptd.storage.untrusted import open_directory
from tests.fuzz.target import DEEP, Target

_SHM: Final = "/dev/shm" if os.path.isdir("/dev/shm") else None
_CODES: Final = {0, 65, 77}  # done; does not check; a name that no file can have


def _manifest(content: bytes, name: str) -> bytes:
    files = [{"name": name, "bytes": len(content), "sha256": manifest.sha256(content).hexdigest()}]
    whole = {**manifest.EMPTY, "format": 1, "seq": 3, "task": 7, "at_ns": 5, "boot_id": "b"}
    whole |= {"attempt": 1, "state": {"part": 7}, "results": {"k": 1}, "files": files}
    return json.dumps({**whole, "digest": manifest.digest_of(whole)}).encode()


def _tar(members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w|", format=kind, bufsize=512) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue().rstrip(b"\0") + bytes(512)


def run_import(data: bytes) -> None:
    """Import a tar of anybody's making into a task."""
    with tempfile.TemporaryDirectory(dir=_SHM, prefix="ck-fuzz-") as folder:
        source, task_dir = Path(folder, "it.tar"), Path(folder, "12")
        source.write_bytes(data)
        said, told = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
            code = checkpoint.main(["import", str(task_dir), "12", "1", str(source)])
        assert code in _CODES, f"exit {code}: {told.getvalue()}"
        assert bool(told.getvalue()) == bool(code), "a refusal has a reason"
        assert {path.name for path in Path(folder).iterdir()} <= {"it.tar", "12"}, "it got out"
        left = {path.name for path in task_dir.iterdir()} if task_dir.is_dir() else set()
        assert not any(name.startswith(".leftover") for name in left), f"left behind: {left}"
        published = sorted((task_dir / "ckpt").glob("*"))
        assert bool(published) == (code == 0), f"exit {code}, published: {published}"
        for path in published:
            _check(path)


def _check(path: Path) -> None:
    fd = open_directory(str(path), os.getuid())
    try:
        found = manifest.load(fd, os.getuid())
        manifest.verify(fd, os.getuid(), found, is_deep=True)
    finally:
        os.close(fd)
    assert "imported_from" in found["provenance"], "where it came from"


def import_seeds() -> list[bytes]:
    """Return tars of each flavour, good ones and such that name a way out."""
    good = [("MANIFEST.json", _manifest(b"content", "a/b")), ("a/b", b"content")]
    kinds = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
    odd = ["../b", "/b", "a\0b", "x" * 300, "a/" * 90 + "b", "\udcff", "MANIFEST.json", "a//b"]
    ways = [[("MANIFEST.json", _manifest(b"x", name)), (name, b"x")] for name in odd]
    seeds = [_tar(good, kind) for kind in kinds]
    for way in ways:
        with contextlib.suppress(UnicodeError, ValueError):
            seeds.append(_tar(way, tarfile.PAX_FORMAT))
    return [*seeds, _tar([("a/b", b"content")]), b""]


def run_batch(data: bytes) -> None:
    """Read a batch's own files; what is taken is what was stored."""
    with tempfile.TemporaryDirectory(dir=_SHM, prefix="ck-fuzz-") as folder:
        for name in (place.BATCH_FILE, place.ITEMS_FILE):
            Path(folder, name).write_bytes(data)
        with contextlib.suppress(Refused):
            batch = place.load(folder)
            place.store(folder, batch)
            assert place.load(folder) == batch, "a batch survives being stored"
        with contextlib.suppress(Refused):
            for item in place.load_items(folder):
                assert item.position, "an item has its place"


def batch_seeds() -> list[bytes]:
    """Return a batch as it is stored, and items."""
    spec = parse({"argv": ["echo", "{}"], "items": {"from": "lines", "lines": ["a"]}}, None, None)
    whole = place.new_batch("b", spec.config, spec.knobs)
    return [msgspec.json.encode(whole), b'{"key":"a","item":"a"}\n{"key":"1","item":{"id":1}}\n']


TARGETS = (
    Target("import", run_import, import_seeds, 8_192, DEEP),
    Target("batch", run_batch, batch_seeds),
)
