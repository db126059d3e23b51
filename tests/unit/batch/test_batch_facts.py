"""What the facts of a batch add up to: who is in flight, what a run came to."""

from pathlib import Path

from ckptd.batch import ledger
from ckptd.storage import facts
from tests.task_world import TaskWorld


def test_an_item_is_in_flight_until_it_has_an_outcome(tmp_path: Path) -> None:
    world = TaskWorld(tmp_path)
    world.record(facts.item_start("a", lane=1), facts.item_start("b"))
    world.record(facts.item_done("a", "pass", seconds=0.5))
    world.begin()

    found = world.facts()

    assert set(found.flying) == {"b"}
    assert found.flying["b"]["attempt"] == 1
    assert found.items["a"]["seconds"] == 0.5
    assert not found.problem


def test_a_run_that_ends_in_order_leaves_nothing_in_flight(tmp_path: Path) -> None:
    world = TaskWorld(tmp_path)
    world.record(facts.run_event("begin"), facts.item_start("a"))
    world.record(facts.run_event("end", why="stopped"))

    assert not world.facts().flying
    assert [run["event"] for run in world.facts().runs] == ["begin", "end"]


def test_a_start_is_no_progress(tmp_path: Path) -> None:
    world = TaskWorld(tmp_path)
    world.record(facts.run_event("begin"))
    before = world.mark().cursor
    world.record(facts.item_start("a"))

    assert world.mark().cursor == before
    world.record(facts.item_done("a", "pass"))
    assert world.mark().cursor != before


def test_every_run_has_a_number_of_its_own_or_its_fence_would_fence_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "batch")
    assert [ledger.begin(path) for _ in range(3)] == [1, 2, 3]
    assert ledger.begin(path, fresh=True) == 4
