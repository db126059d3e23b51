"""What the log knows of a task's files and is not there: told where it is lost, and only there."""

import shutil
from pathlib import Path

import pytest

from ckptd.sdk.save import save
from ckptd.storage import blobs, facts
from ckptd.storage.lost import JOURNAL_IS_GONE, NOTHING, Known, compared, has_journal
from tests.task_world import TASK, TaskWorld

GONE = "checkpoint 1 is gone, and no older one is there"


@pytest.fixture
def world(tmp_path: Path) -> TaskWorld:
    return TaskWorld(tmp_path)


def saved(world: TaskWorld, text: str = "state") -> Known:
    """Save a checkpoint; return what the log knows once the daemon has looked."""
    world.path("stage", "n").write_text(text)
    save(world.dir, [], {"task": TASK, "attempt": world.attempt})
    return known(world)


def known(world: TaskWorld) -> Known:
    return Known(world.mark().checkpoint, has_journal(world.dir, world.uid))


def found(world: TaskWorld, before: Known) -> blobs.Found:
    """Begin the next attempt and return what it finds."""
    world.begin()
    return compared(world.dir, world.uid, world.newest(), before)


def test_what_is_there_is_found_without_a_word(world: TaskWorld) -> None:
    world.record(facts.step_done("pay"))
    before = saved(world)
    assert found(world, before) == (1, f"{world.dir}/ckpt/00000001", "", "", True, None)


@pytest.mark.parametrize("what", [".", "ckpt", "ckpt/00000001"])
def test_a_checkpoint_that_is_gone_is_a_problem_however_it_went(
    world: TaskWorld, what: str
) -> None:
    before = saved(world)
    shutil.rmtree(world.path(what))
    assert found(world, before).problem == GONE


def test_where_an_older_one_is_left_a_warning_says_which_is_gone(world: TaskWorld) -> None:
    saved(world)
    before = saved(world, "more")
    shutil.rmtree(world.path("ckpt", "00000002"))
    one = found(world, before)
    assert (one.seq, one.warning, one.problem) == (1, "checkpoint 2 is gone, resumed from 1", "")


def test_one_that_is_set_aside_is_told_once_and_is_not_gone(world: TaskWorld) -> None:
    saved(world)
    before = saved(world, "more")
    world.path("ckpt", "00000002", "n").write_text("bad!")
    first, second = found(world, before), found(world, before)
    for one in (first, second):
        assert (one.seq, one.problem) == (1, "")
        assert "kept as 00000002.damaged" in one.warning
        assert "gone" not in one.warning


def test_what_a_loss_of_power_has_emptied_is_not_gone(world: TaskWorld) -> None:
    before = saved(world)
    world.publish(2, n="not sealed")
    world.path("attempt.json").write_text('{"attempt":1,"boot_id":"another"}'.ljust(128))
    one = found(world, before)
    assert (one.seq, one.problem) == (1, "")
    assert "kept as 2.unsynced" in one.warning


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_journal_that_is_gone_is_a_problem_where_one_was_known(
    world: TaskWorld, *, is_saved: bool
) -> None:
    world.record(facts.step_done("pay"))
    before = saved(world) if is_saved else known(world)
    shutil.rmtree(world.path("journal"))
    assert found(world, before).problem == JOURNAL_IS_GONE


def test_a_journal_in_which_all_was_taken_back_is_no_lost_one(world: TaskWorld) -> None:
    world.record(facts.set_value("a", 1))
    before = known(world)
    world.record(facts.delete_value("a"))
    assert found(world, before).problem == ""


def test_a_task_that_recorded_nothing_misses_no_journal(world: TaskWorld) -> None:
    assert found(world, saved(world)).problem == ""
    assert found(world, NOTHING).problem == ""


def test_a_checkpoint_that_is_brought_in_under_the_same_number_lets_the_task_go_on(
    world: TaskWorld,
) -> None:
    """What a person imports is the first one again where nothing is left, and may be any state."""
    before = saved(world)
    shutil.rmtree(world.dir)
    assert found(world, before).problem == GONE
    saved(world, "another state")

    one = found(world, before)

    assert (one.seq, one.problem) == (1, "")


def test_what_was_put_back_is_gone_on_from(world: TaskWorld, tmp_path: Path) -> None:
    world.record(facts.step_done("pay"))
    before = saved(world)
    shutil.copytree(world.dir, tmp_path / "kept")
    shutil.rmtree(world.dir)
    assert found(world, before).problem == GONE
    shutil.copytree(tmp_path / "kept", world.dir, dirs_exist_ok=True)
    one = found(world, before)
    assert (one.seq, one.warning, one.problem) == (1, "", "")
