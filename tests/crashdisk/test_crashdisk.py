"""The lying disk in short: some hundred states below ext4, the fault matrix, and what must bite."""

import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.crashdisk.__main__ import asked_for, command_of
from tests.crashdisk.device import OVERLAYS, UNTORN, Write, survivors
from tests.crashdisk.filesystem import KINDS, missing, move_apart
from tests.crashdisk.jobs import Job, run
from tests.crashdisk.lives import LIVES
from tests.crashdisk.matrix import FAULTS, STEPS, stays_refused
from tests.fakes.log_model import Writer
from tests.fakes.memory_disk import MemoryDisk
from tests.figures import ROOT

EXT4 = KINDS["ext4"]
MOMENTS = 30
needs_ext4 = pytest.mark.skipif(bool(missing(EXT4)), reason=missing(EXT4) or "ext4 is there")


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """One process with mounts of its own, so that nothing stays mounted whatever happens."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=move_apart) as made:
        yield made


@needs_ext4
@pytest.mark.parametrize("life", [life.name for life in LIVES])
def test_no_cut_of_the_power_breaks_a_promise_on_ext4(pool: ProcessPoolExecutor, life: str) -> None:
    done = pool.submit(run, Job("ext4", life, f"{life}-0", MOMENTS)).result()
    assert not done.broken, done.broken
    assert done.states.total() >= MOMENTS


@needs_ext4
def test_no_fault_of_the_disk_at_any_step_loses_what_was_acknowledged(
    pool: ProcessPoolExecutor,
) -> None:
    done = pool.submit(run, Job("ext4", "", "matrix")).result()
    assert not done.broken, done.broken
    outcomes = {key.partition(":")[0]: key.partition(": ")[2] for key in done.states}
    assert len(outcomes) == len(FAULTS) * len(STEPS)
    for fault in ("write", "flush"):
        assert outcomes[f"{fault} x append"] == outcomes[f"{fault} x rotate"] == "WalFailed"
    assert outcomes["full x append"] == "DiskFull"
    assert {outcomes[f"stall x {step}"] for step in STEPS} == {"waited, then done"}


@needs_ext4
def test_a_sync_that_is_tried_again_is_found_out(pool: ProcessPoolExecutor) -> None:
    done = pool.submit(run, Job("ext4", "", "matrix", is_stubborn=True)).result()
    assert "a sync that failed was tried again" in done.broken


def test_a_log_that_goes_on_once_the_disk_is_well_again_is_found_out() -> None:
    with pytest.raises(AssertionError, match="went on after it failed: append"):
        stays_refused(Writer(MemoryDisk()))


@needs_ext4
@pytest.mark.parametrize("life", [life.name for life in LIVES])
def test_work_of_any_kind_that_goes_without_syncs_is_found_out(
    pool: ProcessPoolExecutor, life: str
) -> None:
    done = pool.submit(run, Job("ext4", life, f"{life}-0", deaf="all")).result()
    assert "kept none; promised" in done.broken


@needs_ext4
@pytest.mark.parametrize("deaf", ["data", "names", "snapshot"])
def test_a_log_that_goes_without_a_sync_is_found_out_on_ext4(
    pool: ProcessPoolExecutor, deaf: str
) -> None:
    done = pool.submit(run, Job("ext4", "log", "log-0", deaf=deaf)).result()
    assert "promised" in done.broken


def test_what_was_asked_for_and_is_missing_fails_the_run(tmp_path: Path) -> None:
    without = {"PATH": str(tmp_path)}  # no mkfs of any kind
    command = [sys.executable, "-m", "tests.crashdisk", "--fs", "xfs", "--matrix"]
    done = subprocess.run(command, cwd=ROOT, env=without, check=False, capture_output=True)
    assert (done.returncode, done.stdout.split(b":")[:2]) == (1, [b"xfs", b" SKIPPED"])


@pytest.mark.parametrize("more", ["", " --moments 7 --stall 0.5"])
def test_the_line_that_is_written_down_asks_for_the_same_again(more: str) -> None:
    line = f"python -m tests.crashdisk --states 50 --fs xfs --seed 3{more}"
    assert command_of(asked_for(line.split()[3:])) == line


def test_what_cannot_be_torn_is_not_counted_as_torn() -> None:
    assert "torn" not in UNTORN
    assert len(UNTORN) == len(OVERLAYS)


def test_what_survives_is_nothing_all_or_a_part_torn_by_sectors_only_in_file_data() -> None:
    dice = random.Random(1)
    volatile = [Write(0, b"a" * 4096), Write(8192, b"b" * 8192)]
    assert survivors(volatile, "none", dice, set()) == []
    assert survivors(volatile, "all", dice, set()) == volatile
    sizes: dict[int, set[int]] = {0: set(), 2: set(), 3: set()}
    for _ in range(50):
        for write in survivors(volatile, "torn", dice, {2}):
            sizes[write.offset // 4096].add(len(write.data))
    assert sizes == {0: {4096}, 2: {512}, 3: {4096}}
