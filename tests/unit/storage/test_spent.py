"""Deleting the checkpoints of what succeeded: all of them, none of a later attempt, any crash."""

import os
import shutil
from pathlib import Path

import pytest

from ckptd.storage import facts
from ckptd.storage.spent import delete_spent, is_left
from ckptd.storage.taskdir import fence
from tests.task_world import TaskWorld


@pytest.fixture
def world(tmp_path: Path) -> TaskWorld:
    world = TaskWorld(tmp_path)
    world.record(facts.step_done("a"))
    for number in (1, 2):
        world.publish(number, weights="w" * 1_000, state=str(number))
    world.seal()
    world.path("stage", "half").write_text("h")
    return world


def names(world: TaskWorld) -> list[str]:
    return sorted(os.listdir(world.dir))


def test_checkpoints_and_stage_go_and_the_journal_stays(world: TaskWorld) -> None:
    assert is_left(world.dir)

    assert delete_spent(world.dir, 1, world.uid)

    assert not is_left(world.dir)
    assert names(world) == ["attempt.json", "journal"]
    assert list(world.facts().steps) == ["a"]


def test_done_twice_is_done_once(world: TaskWorld) -> None:
    for _ in range(2):
        assert delete_spent(world.dir, 1, world.uid)
    shutil.rmtree(world.dir)
    assert delete_spent(world.dir, 1, world.uid)


def test_what_a_later_attempt_has_is_not_touched(world: TaskWorld) -> None:
    world.begin(fresh=True)
    world.publish(1, state="new")

    assert not delete_spent(world.dir, 1, world.uid)

    assert world.newest().seq == 1
    assert world.path("archive", "2", "ckpt", "1").exists()


def test_who_holds_the_fence_is_not_waited_for(world: TaskWorld) -> None:
    fd = os.open(world.dir, os.O_RDONLY)
    fence(fd, waits=True)

    assert not delete_spent(world.dir, 1, world.uid)
    assert is_left(world.dir)

    os.close(fd)
    assert delete_spent(world.dir, 1, world.uid)


def test_a_deletion_that_was_killed_at_any_point_is_finished_by_the_next(world: TaskWorld) -> None:
    world.path("ckpt", "2").rename(world.path("ckpt", ".leftover-2-77"))
    world.path("stage").rename(world.path(".leftover-stage-77"))
    shutil.rmtree(world.path("ckpt", ".leftover-2-77", "weights"), ignore_errors=True)
    assert is_left(world.dir)

    assert delete_spent(world.dir, 1, world.uid)

    assert names(world) == ["attempt.json", "journal"]


def test_the_next_attempt_finds_a_directory_made_ready(world: TaskWorld) -> None:
    delete_spent(world.dir, 1, world.uid)

    world.begin(fresh=True)

    assert world.facts().count == 0
    world.publish(1, state="new")
    assert world.seal() == [""]


def test_a_link_in_the_place_of_checkpoints_is_not_followed(
    world: TaskWorld, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "1").write_text("precious")
    shutil.rmtree(world.path("ckpt"))
    world.path("ckpt").symlink_to(tmp_path / "mine")

    with pytest.raises(Exception, match="not a directory"):
        delete_spent(world.dir, 1, world.uid)

    assert (tmp_path / "mine" / "1").read_text() == "precious"
