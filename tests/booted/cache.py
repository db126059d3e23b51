"""What is built once and kept between runs: root trees, installed layers, kernels, disk images.

Everything lies in one directory outside the checkout (`CKPTD_TEST_ROOTS`, or ckptd-tests in the
user's cache) under a name that carries a digest of what it was made from. A thing is built aside
and renamed, so a half-built one is never used; a lock per name lets runs share the directory.
Removing the directory is always safe while no test runs.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

KEPT_PER_KIND = 3  # of installed layers and images: a few states of the sources

_in_use: dict[str, int] = {}  # the shared locks of this process, held to its end
_failed: dict[str, "Missing"] = {}  # what could not be built is not tried again in this run


class Missing(Exception):
    """A booted test cannot run here; the text says what is missing and how to get it."""


def cache_dir() -> Path:
    """Return the directory of the kept things; made if need be."""
    chosen = os.environ.get("CKPTD_TEST_ROOTS")
    if chosen:
        path = Path(chosen)
    else:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        path = Path(home) / "ckptd-tests"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def cached(kind: str, digest: str, build: Callable[[Path], None]) -> Path:
    """Return the thing `kind-digest`, made by `build(path)` if it is not there yet.

    Raises:
        Missing: It could not be built, now or earlier in this run.
    """
    name = f"{kind}-{digest}"
    if name in _failed:
        raise _failed[name]
    _hold(name)
    path = cache_dir() / name
    with _lock(f"{name}.build"):
        if not path.exists():
            part = cache_dir() / f"{name}.part"
            _remove(part)
            try:
                build(part)
            except Missing as missing:
                _remove(part)
                _failed[name] = missing
                raise
            part.rename(path)
    os.utime(path)
    return path


def prune(kind: str) -> None:
    """Remove all but the newest things of a kind; never one that a run still uses."""
    kept = [path for path in cache_dir().glob(f"{kind}-*") if path.suffix != ".part"]
    for path in sorted(kept, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT_PER_KIND:]:
        with _lock_file(f"{path.name}.use") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            _remove(path)


def digest_of(parts: Iterable[bytes]) -> str:
    """Return a short digest of the parts, for names."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()[:16]


def require(*programs: str, package: str) -> None:
    """Say which Debian package to install if a program is not there.

    Raises:
        Missing: A program is not in PATH.
    """
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent = [program for program in programs if shutil.which(program, path=path) is None]
    if absent:
        raise Missing(f"{', '.join(absent)} not found: apt install {package}")


def new_log(name: str) -> Path:
    """Return an empty file for what the build of a thing says."""
    logs = cache_dir() / "logs"
    logs.mkdir(exist_ok=True)
    log = logs / f"{name}.log"
    log.write_bytes(b"")
    return log


def build_step(command: list[str], log: Path, what: str, **options: object) -> None:
    """Run one step of a build with its output in `log`; bounded to ten minutes.

    Raises:
        Missing: It failed; the text has the last lines of the log.
    """
    with log.open("ab") as out:
        try:
            done = subprocess.run(  # type: ignore[call-overload]
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=600,
                check=False,
                **options,
            )
        except subprocess.TimeoutExpired:
            raise Missing(f"{what}: not done in 600 s, see {log}") from None
    if done.returncode:
        last = " | ".join(log.read_text(errors="replace").splitlines()[-6:])
        raise Missing(f"{what}: exit {done.returncode}, see {log}: {last}")


@contextmanager
def _lock(name: str) -> Iterator[None]:
    with _lock_file(name) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock_file(name: str) -> IO[bytes]:
    locks = cache_dir() / "locks"
    locks.mkdir(exist_ok=True)
    return (locks / name).open("ab")


def _hold(name: str) -> None:
    if name not in _in_use:
        with _lock_file(f"{name}.use") as file:
            descriptor = os.dup(file.fileno())
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        _in_use[name] = descriptor


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
