"""What judges State after a crash sees the damage that it is there for."""

import errno
import random
from pathlib import Path

import pytest
from msgspec.structs import replace

from ckptd.core.records import Phase
from ckptd.core.state import State
from tests.crashdisk.lives import EngineLife, Promise
from tests.fakes.engine_model import Reign, judge
from tests.fakes.memory_disk import MemoryDisk


def _lived(disk: MemoryDisk) -> Reign:
    """Return a reign in which some tasks have ended, and others have not."""
    dice, reign = random.Random(3), Reign(disk, 10**18)
    for _ in range(6):
        reign.turn(dice)
    assert reign.ended
    return reign


def _ended(reign: Reign) -> list[tuple[int, int, int]]:
    return [(*key, at_ns) for key, at_ns in reign.ended.items()]


def test_a_snapshot_that_fails_is_no_snapshot() -> None:
    disk = MemoryDisk()
    reign = _lived(disk)
    disk.fail("sync", ".snap.tmp", error=errno.EIO)
    with pytest.raises(AssertionError, match="SnapshotFailed"):
        reign.snapshot()


def test_what_lived_and_was_recovered_is_found_right() -> None:
    disk = MemoryDisk()
    ended = _ended(_lived(disk))
    judge(Reign(disk.crash(random.Random(1), 0.0), 2 * 10**18).engine.state, ended)


@pytest.mark.parametrize(
    "change",
    [{"phase": Phase.FAILED}, {"phase": Phase.QUEUED, "until_ns": 0}, {"until_ns": 1}],
)
def test_an_end_with_another_phase_or_time_is_found(change: dict[str, object]) -> None:
    reign = _lived(MemoryDisk())
    state = reign.engine.state
    (task, _), *_ = reign.ended
    _change(state, task, change)
    with pytest.raises(AssertionError, match=f"task {task}"):
        judge(state, _ended(reign))


@pytest.mark.parametrize("change", [{"cause": "signal"}, {"code": 1}, {"attempt": 7}])
def test_an_end_with_another_outcome_is_found(change: dict[str, object]) -> None:
    reign = _lived(MemoryDisk())
    state = reign.engine.state
    (task, _), *_ = reign.ended
    run = state.tasks.get(task).run  # type: ignore[union-attr]
    assert run is not None
    _change(state, task, {"run": replace(run, past=(replace(run.past[0], **change),))})
    with pytest.raises(AssertionError, match=f"task {task}"):
        judge(state, _ended(reign))


def _change(state: State, task: int, change: dict[str, object]) -> None:
    one = state.tasks.get(task)
    assert one is not None
    state.put(replace(one, **change))


def test_a_life_on_the_lying_disk_is_judged_by_the_ends_that_it_told(tmp_path: Path) -> None:
    told: list[Promise] = []
    EngineLife().live(tmp_path, random.Random(5), told.append)
    last = told[-1]
    EngineLife().check(tmp_path, last, last, works_on=True)
    task, attempt, ended_ns = last.ends[0]
    other = last._replace(ends=((task, attempt, ended_ns + 1),))
    with pytest.raises(AssertionError, match=f"task {task}"):
        EngineLife().check(tmp_path, other, other, works_on=True)
