"""State and log together on a disk that forgets: what was acknowledged is there, once, for ever."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.engine_model import Reign
from tests.fakes.memory_disk import MemoryDisk


@given(st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_whatever_the_disk_forgets_nothing_acknowledged_is_lost_and_no_id_comes_twice(
    seed: int,
) -> None:
    dice = random.Random(seed)
    disk, acked, at_ns = MemoryDisk(seed=seed), set[int](), 10**18
    started: set[tuple[int, int]] = set()
    for _ in range(4):
        reign = Reign(disk, at_ns)
        known = {task.id for task in reign.engine.state.tasks.ascending(0)}
        assert acked <= known, f"lost: {acked - known}"
        for _ in range(dice.randint(1, 12)):
            reign.turn(dice)
            if dice.random() < 0.1:
                reign.snapshot()
        assert not acked & reign.acked, "an id was given twice"
        acked |= reign.acked
        new = set(reign.ordered)
        assert not started & new, "an attempt was ordered twice"
        started |= new
        at_ns = reign.at_ns
        disk = disk.crash(dice, keep=dice.random())


@given(st.integers(0, 1 << 32))
@settings(max_examples=20, deadline=None)
def test_an_effect_is_ordered_only_after_its_intent_survived(seed: int) -> None:
    dice = random.Random(seed)
    disk = MemoryDisk(seed=seed)
    reign = Reign(disk, 10**18)
    for _ in range(6):
        reign.turn(dice)
    later = Reign(disk.crash(dice, keep=0.0), 10**18)
    attempts = {
        task.id: task.run.attempt
        for task in later.engine.state.tasks.ascending(0)
        if task.run is not None
    }
    for task, attempt in reign.ordered:
        assert attempts[task] >= attempt
