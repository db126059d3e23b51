"""What a task was told is saved or recorded is there after a power cut that keeps nothing else."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.sdk.save import save
from ckptd.storage import blobs, facts, manifest
from ckptd.storage.lost import has_journal
from tests.fakes.durable_image import DurableImage
from tests.task_world import TASK, TaskWorld

HEADER = {"task": TASK, "attempt": 1}


@pytest.fixture
def world(tmp_path: Path) -> TaskWorld:
    (tmp_path / "disk").mkdir()
    return TaskWorld(tmp_path / "disk")


@pytest.fixture
def image(world: TaskWorld, monkeypatch: pytest.MonkeyPatch) -> Iterator[DurableImage]:
    """Listen from here on; the task is made ready, and that is durable."""
    found = DurableImage(Path(world.dir).parent.parent, monkeypatch)
    yield found
    found.close()


def staged(world: TaskWorld, text: str) -> None:
    world.path("stage", "state").write_text(text)


def test_what_was_never_synced_is_gone(world: TaskWorld, image: DurableImage) -> None:
    staged(world, "one")
    image.cut()
    assert not world.path("stage", "state").exists()


def test_a_recorded_step_is_there(world: TaskWorld, image: DurableImage) -> None:
    journal = world.journal()
    for name in ("a", "b"):
        journal.append([facts.step_done(name)])
        image.cut()
        assert list(world.facts().steps)[-1] == name
        journal = world.journal()


def test_facts_that_rode_along_are_there_with_the_next_that_was_synced(
    world: TaskWorld, image: DurableImage
) -> None:
    journal = world.journal()
    journal.append([facts.set_value("rides", 1)], is_synced=False)
    journal.append([facts.step_done("a")])
    journal.append([facts.set_value("rides", 2)], is_synced=False)
    image.cut()
    assert world.facts().values == {"rides": 1}


def test_the_first_fact_of_every_attempt_is_there(world: TaskWorld, image: DurableImage) -> None:
    for name in ("a", "b"):
        world.record(facts.step_done(name))
        image.cut()
        assert name in world.facts().steps
        world.begin()


def test_a_journal_that_the_daemon_counted_is_there_though_its_fact_was_not_promised(
    world: TaskWorld, image: DurableImage
) -> None:
    world.journal().append([facts.set_value("rides", 1)], is_synced=False)
    assert has_journal(world.dir, world.uid)
    image.cut()
    assert world.journal_path().exists()


@pytest.mark.parametrize("size", [3, manifest._LARGE_BYTES])
def test_a_save_that_returned_is_there_and_whole(
    world: TaskWorld, image: DurableImage, size: int
) -> None:
    for number in (1, 2):
        staged(world, str(number) * size)
        assert save(world.dir, [], HEADER).seq == number
        image.cut()
        found = world.newest()
        assert (found.seq, found.problem, found.warning) == (number, "", "")
        assert Path(found.path, "state").read_text() == str(number) * size


def test_a_checkpoint_that_the_daemon_sealed_is_there(
    world: TaskWorld, image: DurableImage
) -> None:
    world.publish(1, state="one")
    assert world.seal() == [""]
    image.cut()
    (one,) = blobs.generations(world.dir, world.uid, verify=True)
    assert (one.seq, one.sealed, one.valid) == (1, True, True)


def test_the_checkpoint_before_stays_until_the_new_one_is_durable(
    world: TaskWorld, image: DurableImage, tmp_path: Path
) -> None:
    """The power goes before any of the syncs, and removals reach the disk at once."""
    for number in (1, 2):
        staged(world, str(number))
        save(world.dir, [], HEADER)
    found: list[int] = []

    def look() -> None:
        image.write_to(tmp_path / "after", forgets=True)
        left = f"{tmp_path}/after/tasks/{TASK}"
        found.append(blobs.newest_valid(left, world.uid, world.boot_id).seq)

    image.before_sync = look
    staged(world, "3")
    save(world.dir, [], HEADER)
    assert set(found) == {2, 3}
