"""The seal of a checkpoint: MANIFEST.json says what must be there, digest by digest.

    {"format":1,"seq":7,"task":12,"attempt":3,"epoch":4,"at_ns":1760000000000000000,"parent":6,
     "state_version":1,"progress":{"done":700,"total":1000},"steps":["fetch"],"current_step":"fold",
     "state":{"offset":700},"results":{},"pause_count":0,"resume_count":2,"wait_s":0.0,
     "boot_id":"0b9c...","files":[{"name":"model.bin","bytes":1048576,"sha256":"9f86..."}],
     "digest":"2c26..."}

Invariant: a directory with a manifest that checks is complete: its files were synced before the
manifest was written, the manifest was synced before it got its name. `digest` is the SHA-256 of
the rest as JSON with sorted keys and no spaces. Stdlib only. Read next: `blobs.py`.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from ckptd.storage.disk import sync_fd
from ckptd.storage.taskdir import MANIFEST
from ckptd.storage.untrusted import (
    FILES_MAX,
    Damaged,
    Leaf,
    NotTrusted,
    is_fit,
    is_passing,
    open_regular,
    parse_json,
    read_small,
    refuse_deep,
    replace_small,
    walk,
)

if TYPE_CHECKING:
    from _hashlib import HASH

FORMAT: Final = 1
TEMPORARY: Final = f"{MANIFEST}.tmp"
BYTES_MAX: Final = 4 << 20
HASHED_BYTES_MAX: Final = 1 << 40  # in one checkpoint; minutes of reading
HOLE_BYTES_MAX: Final = 64 << 20
_PACKED_MAX: Final = 16  # a file system that compresses may store so many bytes in one
_CHUNK_BYTES: Final = 1 << 20
_LARGE_BYTES: Final = 16 << 20  # from here on a thread is cheap
_CONTENT: Final = (
    "files", "state", "state_version", "steps", "current_step", "results", "cursors"
)  # fmt: skip

Manifest = dict[str, Any]
EMPTY: Final[Manifest] = {
    "task": 0,
    "attempt": 0,
    "epoch": 0,
    "parent": 0,
    "state_version": 0,
    "progress": None,
    "steps": [],
    "current_step": "",
    "state": None,
    "results": {},
    "pause_count": 0,
    "resume_count": 0,
    "wait_s": 0.0,
}

_NONE: Final[Mapping[str, Manifest]] = MappingProxyType({})
_TYPES: Final[Manifest] = {**EMPTY, "seq": 0, "at_ns": 0, "boot_id": ""}


class TooNew(Exception):
    """Written by a later version; must not be taken for "nothing there"."""


def sha256(data: bytes = b"") -> "HASH":
    """Return a running SHA-256. With hashlib come 3.7 MB of OpenSSL: only who hashes loads it."""
    import hashlib  # noqa: PLC0415

    return hashlib.sha256(data)


def canonical(value: Any) -> bytes:
    """Return the one JSON form that digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest_of(manifest: Manifest) -> str:
    """Return the digest over everything but the digest itself."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return sha256(canonical(rest)).hexdigest()


def content_digest(manifest: Manifest) -> str:
    """Return a digest of what was saved alone, equal for the same work saved twice."""
    return sha256(
        canonical({key: manifest[key] for key in _CONTENT if key in manifest})
    ).hexdigest()


def seal(
    dir_fd: int, uid: int, header: Manifest, known: Mapping[str, Manifest] = _NONE
) -> Manifest:
    """Sync and digest every file below, then write the manifest: from here on it is valid.

    `known` has entries of files that `copy.carry_on` put there: synced, not read again.

    Raises:
        NotTrusted: something in it is not a regular file of `uid`, or a bound is passed.
        OSError: the disk refuses (full, failing).

    Durable: all files, their directories and the manifest; not yet the directory's own name.
    """
    files: list[Manifest] = []
    left_bytes = HASHED_BYTES_MAX
    for leaf in walk(dir_fd, uid):
        if not _is_own(leaf):
            files.append(_sealed(leaf, uid, left_bytes, known.get(leaf.path)))
            left_bytes -= files[-1].get("bytes", 0)
    if len(files) > FILES_MAX:
        raise NotTrusted(f"more than {FILES_MAX} files in one checkpoint")
    manifest = {**header, "format": FORMAT, "files": [entry for entry in files if entry]}
    manifest["digest"] = digest_of(manifest)
    try:
        refuse_deep(manifest)
    except ValueError as error:
        raise NotTrusted(f"the manifest is {error}") from error
    data = json.dumps(manifest, indent=1).encode() + b"\n"
    if len(data) > BYTES_MAX:
        raise NotTrusted(f"the manifest takes {len(data)} bytes, more than {BYTES_MAX}")
    replace_small(MANIFEST, data, dir_fd, uid)
    sync_fd(dir_fd)
    return manifest


def _is_own(leaf: Leaf) -> bool:
    return leaf.path in {MANIFEST, TEMPORARY, ""}


def _sealed(leaf: Leaf, uid: int, left_bytes: int, known: Manifest | None) -> Manifest:
    if not leaf.name:
        sync_fd(leaf.parent_fd)
        return {}
    fd = open_regular(leaf.name, uid, leaf.parent_fd)
    try:
        size = os.fstat(fd).st_size
        if known is not None and known["bytes"] == size <= left_bytes:
            sync_fd(fd)
            return known
        with _syncing(fd, size):
            size, sha256 = _read_digest(fd, leaf.path, left_bytes)
    finally:
        os.close(fd)
    return {"name": leaf.path, "bytes": size, "sha256": sha256}


@contextlib.contextmanager
def _syncing(fd: int, size: int) -> Iterator[None]:
    """Sync a file; a large one while the block reads it: neither waits for the other, or the GIL.

    Durable: its content, at the end of the block.
    """
    if size < _LARGE_BYTES:
        sync_fd(fd)
        yield
        return
    import threading  # noqa: PLC0415 - most checkpoints are small

    failures: list[OSError] = []

    def sync() -> None:
        try:
            sync_fd(fd)
        except OSError as error:
            failures.append(error)

    beside = threading.Thread(target=sync, name="sync")
    try:
        beside.start()
    except RuntimeError:  # no more threads are allowed here
        sync()
    try:
        yield
    finally:
        if beside.ident is not None:
            beside.join()
    if failures:
        raise failures[0]


def _read_digest(fd: int, path: str, left_bytes: int) -> tuple[int, str]:
    found = os.fstat(fd)
    size = found.st_size
    refuse_hole(found, path)
    refuse_too_much(size, left_bytes)
    running, done = sha256(), 0
    room = memoryview(bytearray(min(_CHUNK_BYTES, size + 1)))
    while count := os.readv(fd, [room]):  # Bound: stops when the file outgrows its size
        running.update(room[:count])
        done += count
        if done > size:
            break
    if done != size:
        raise NotTrusted(f"{path} changes while it is read")
    return size, running.hexdigest()


def refuse_hole(found: os.stat_result, path: str) -> None:
    """Raise NotTrusted for a file that is mostly a hole.

    Bound: that costs its maker nothing and would keep us reading for days.
    """
    size, on_disk = found.st_size, 512 * found.st_blocks
    if size > _PACKED_MAX * on_disk + HOLE_BYTES_MAX:
        raise NotTrusted(f"{path} is mostly a hole: {size} bytes long, {on_disk} on disk")


def refuse_too_much(size: int, left_bytes: int) -> None:
    """Raise NotTrusted where a file is one too many for its checkpoint."""
    if size > left_bytes:
        raise NotTrusted(f"more than {HASHED_BYTES_MAX} bytes in one checkpoint")


def load(dir_fd: int, uid: int) -> Manifest:
    """Return a manifest whose own digest checks; its files are not looked at yet.

    Raises:
        FileNotFoundError: not sealed.
        Damaged: it does not check.
        TooNew: a later version wrote it.
    """
    try:
        manifest = parse_json(read_small(MANIFEST, uid, dir_fd, BYTES_MAX))
    except (NotTrusted, ValueError) as error:
        raise Damaged(f"{MANIFEST}: {error}") from error
    if not isinstance(manifest, dict):
        raise Damaged(f"{MANIFEST} is not an object")
    version = manifest.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise TooNew(
            f"{MANIFEST} was written by a newer ckptd: format {version}; this one reads {FORMAT}"
        )
    if version != FORMAT or manifest.get("digest") != digest_of(manifest):
        raise Damaged(f"{MANIFEST}: the digest differs")
    wrong = [key for key, like in _TYPES.items() if not _is_like(manifest.get(key, like), like)]
    if wrong or not _is_file_list(manifest.get("files")):
        raise Damaged(f"{MANIFEST}: {', '.join(wrong) or 'files'} cannot be read")
    return manifest


def _is_like(value: object, like: object) -> bool:
    """Return whether a value has the type that readers count on; a digest proves no good will."""
    if like is None:
        return True
    if isinstance(like, int):
        return isinstance(value, int) and 0 <= value < 1 << 63
    return isinstance(value, int | float if isinstance(like, float) else type(like))


def _is_file_list(files: object) -> bool:
    return isinstance(files, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and is_fit(entry["name"])
        for entry in files
    )


def is_brought_in(manifest: Manifest) -> bool:
    """Tell whether a person made it from outside, by `import` or `edit`, and not the task."""
    origin = manifest.get("provenance")
    return isinstance(origin, dict) and not origin.keys().isdisjoint(("imported_from", "edited"))


def verify(dir_fd: int, uid: int, manifest: Manifest, *, is_deep: bool) -> None:
    """Compare the files with the manifest: names and sizes, and when deep also every digest.

    Raises:
        Damaged: the first difference found.
        OSError: the machine has trouble; nothing is known.
    """
    left_bytes = HASHED_BYTES_MAX
    missing = {entry["name"]: entry for entry in manifest["files"]}
    try:
        for leaf in walk(dir_fd, uid):
            if leaf.name and not _is_own(leaf):
                entry = missing.pop(leaf.path, None)
                left_bytes -= _compare(leaf, uid, entry, left_bytes if is_deep else None)
    except (NotTrusted, OSError) as error:
        if is_passing(error):
            raise
        raise Damaged(str(error)) from error
    for name in missing:
        raise Damaged(f"{name} is missing")


def _compare(leaf: Leaf, uid: int, entry: Manifest | None, left_bytes: int | None) -> int:
    """Return the size; without `left_bytes` no digest is compared."""
    if entry is None:
        raise Damaged(f"{leaf.path} is not in the manifest")
    fd = open_regular(leaf.name, uid, leaf.parent_fd)
    try:
        size = os.fstat(fd).st_size
        if size != entry.get("bytes"):
            raise Damaged(f"{leaf.path} has {size} bytes, expected {entry.get('bytes')}")
        if left_bytes is None:
            return size
        if _read_digest(fd, leaf.path, left_bytes)[1] != entry.get("sha256"):
            raise Damaged(f"{leaf.path}: the digest differs")
    finally:
        os.close(fd)
    return size
