"""The work of a run in pieces, each for a process of its own."""

import gzip
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ckptd.protocol.errors import CkptdError
from tests import figures
from tests.crashdisk import matrix
from tests.crashdisk.cuts import Broken, Place, play
from tests.crashdisk.device import told
from tests.crashdisk.filesystem import KINDS, made
from tests.crashdisk.lives import LIVES, Life, LogLife, Unsynced

MOMENTS_MAX = 1_000
KEPT = figures.ROOT / "build" / "crashdisk"
LIVES_BY_NAME = {life.name: life for life in LIVES}


class Job(NamedTuple):
    """Some work for one process: a life by its seed, or the fault matrix."""

    fs: str
    life: str  # "": the matrix
    seed: str
    moments: int = MOMENTS_MAX
    deaf: str = ""  # the syncs that the log goes without; "all": that any life goes without
    is_stubborn: bool = False  # in the matrix: a sync that fails is tried again
    stall_s: float = 0.0


class Done(NamedTuple):
    """What came of it."""

    job: Job
    states: Counter[str]
    broken: str
    took_s: float


def run(job: Job) -> Done:
    """Do a job in this process, which has mounts of its own."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ck-disk-", ignore_cleanup_errors=True) as folder:
        kind, top = KINDS[job.fs], Path(folder, "top")
        top.mkdir()
        place = Place(kind, made(kind, Path(folder)), Path(folder, "node"), top)
        broken = ""
        try:
            _play(place, job)
        except Broken as error:
            broken = str(error)
            if not job.deaf and not job.is_stubborn:
                _keep(job, error)
    return Done(job, place.states, broken, time.monotonic() - began)


def _play(place: Place, job: Job) -> None:
    if job.life:
        play(place, _life(job), job.seed, job.moments)
        return
    seen_by = matrix.Stubborn if job.is_stubborn else matrix.Watched
    for fault in matrix.FAULTS:
        for step in matrix.STEPS:
            try:
                matrix.cell(place, fault, step, job.stall_s, seen_by)
            except (AssertionError, CkptdError, OSError, TimeoutError) as error:
                raise Broken(f"{fault} x {step} on {job.fs}: {error!r}") from error


def _life(job: Job) -> Life:
    if job.deaf == "all":
        return Unsynced(LIVES_BY_NAME[job.life])
    return LogLife(job.deaf) if job.deaf else LIVES_BY_NAME[job.life]


def again(job: Job) -> str:
    """Return the line that does a job again."""
    start = f"python -m tests.crashdisk --fs {job.fs}"
    if job.life:
        return f"{start} --life {job.life} --only {job.seed} --moments {job.moments}"
    return f"{start} --matrix --stall {job.stall_s}"


def _keep(job: Job, broken: Broken) -> None:
    """Write down what broke, the tape, and the disk as recovery found it, to be mounted."""
    KEPT.mkdir(parents=True, exist_ok=True)
    stem = f"{job.fs}-{job.seed}"
    (KEPT / f"{stem}.txt").write_text(f"{broken}\nagain: {again(job)}\n")
    (KEPT / f"{stem}.tape").write_text("".join(f"{line}\n" for line in told(broken.tape)))
    if broken.disk:
        disk = broken.disk.read(0, len(broken.disk.image))
        (KEPT / f"{stem}.image.gz").write_bytes(gzip.compress(disk, 1))
