"""Checkpoint generations: sealed or not, valid or not, and what a hostile task may try."""

import errno
import fcntl
import io
import json
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ckptd.sdk.save import begin, save
from ckptd.storage import blobs, facts
from ckptd.storage import manifest as seals
from ckptd.storage.copy import copy_out, write_tar
from ckptd.storage.journal import StaleAttempt
from ckptd.storage.manifest import digest_of
from ckptd.storage.taskdir import ATTEMPT_FILE
from ckptd.storage.untrusted import Damaged, NotTrusted
from tests.task_world import TaskWorld
from tests.waiting import until


@pytest.fixture
def world(tmp_path: Path) -> TaskWorld:
    return TaskWorld(tmp_path)


def saved(world: TaskWorld, **files: str) -> int:
    paths = []
    for name, text in files.items():
        path = world.path("..", "..", name)
        path.write_text(text)
        paths.append(str(path))
    header = {"task": 12, "attempt": world.attempt, "state": {"n": len(files)}}
    return save(world.dir, paths, header).seq


def numbers(world: TaskWorld) -> list[str]:
    return sorted(os.listdir(world.path("ckpt")))


# --- the plain life of a checkpoint --------------------------------------------------------------


def test_a_task_that_saved_nothing_has_nothing(world: TaskWorld) -> None:
    assert not blobs.has_anything(world.dir)
    assert world.newest() == blobs.Found()
    assert world.mark() == blobs.Mark()


def test_a_task_that_never_was_has_nothing(tmp_path: Path) -> None:
    assert not blobs.has_anything(str(tmp_path / "none"))
    assert blobs.newest_valid(str(tmp_path / "none"), os.getuid(), "x") == blobs.Found()


def test_published_and_sealed_is_what_the_next_attempt_resumes_from(world: TaskWorld) -> None:
    world.publish(1, a="one")
    world.publish(2, a="two")
    assert blobs.has_anything(world.dir)

    assert world.seal() == ["", ""]
    world.begin()
    found = world.newest()

    assert (found.seq, found.path, found.warning) == (2, f"{world.dir}/ckpt/2", "")


def test_what_the_daemon_had_no_time_to_seal_is_sealed_at_the_next_start(
    world: TaskWorld,
) -> None:
    world.publish(1, a="one")

    world.begin()

    assert world.newest().seq == 1
    assert world.path("ckpt", "1", "MANIFEST.json").exists()


def test_unsealed_across_a_restart_of_the_machine_is_not_trusted(world: TaskWorld) -> None:
    saved(world, a="sealed by the task")
    world.publish(5, a="may be empty now")
    attempt = json.dumps({"attempt": 1, "boot_id": "another boot"})
    world.path("attempt.json").write_text(attempt)

    world.begin()
    found = world.newest()

    assert found.seq == 1
    assert "5.unsynced" in found.warning
    assert world.path("ckpt", "5.unsynced", "a").exists()


@pytest.mark.parametrize("name", ["0", "000", "1234567890123", "+1", "1-0"])
def test_what_is_no_number_of_a_checkpoint_is_left_alone(world: TaskWorld, name: str) -> None:
    world.publish(name, a="x")

    assert world.seal() == []
    assert (world.newest(), world.mark().checkpoint) == (blobs.Found(), 0)
    assert os.listdir(world.path("ckpt", name)) == ["a"]


def test_what_was_synced_after_its_attempt_ended_is_sealed_in_any_boot(world: TaskWorld) -> None:
    world.publish(1, state="hours of work")

    found = blobs.mark(world.dir, 1, world.uid, "another boot", is_synced=True)

    assert (found.checkpoint, found.problem) == (1, "")
    assert blobs.newest_valid(world.dir, world.uid, "another boot").seq == 1


def test_adoption_after_a_restart_of_the_machine_seals_nothing_either(world: TaskWorld) -> None:
    published = world.publish(1, a="may be empty now")
    attempt = json.dumps({"attempt": 1, "boot_id": "another boot"})
    world.path("attempt.json").write_text(attempt)

    assert "not trusted" in world.seal()[0]
    assert world.mark().checkpoint == 0
    assert os.listdir(published) == ["a"]


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove", "add", "manifest", "no manifest"])
def test_a_damaged_newest_falls_back_is_told_and_kept(world: TaskWorld, damage: str) -> None:
    saved(world, a="first")
    saved(world, a="second")
    newest = world.path("ckpt", "00000002")
    hurt(newest, damage)

    found = world.newest()

    assert found.seq == 1 if damage != "no manifest" else found.seq == 2
    if found.seq == 1:
        assert "checkpoint 2 is damaged" in found.warning
        assert numbers(world) == ["00000001", "00000002.damaged"]
        assert world.newest().warning, "it is told again until something newer is valid"
        assert saved(world, a="third") == 3, "a number is not used twice by `save`"


def hurt(newest: Path, damage: str) -> None:
    match damage:
        case "flip":
            (newest / "a").write_text("sEcond")
        case "shorten":
            (newest / "a").write_text("sec")
        case "remove":
            (newest / "a").unlink()
        case "add":
            (newest / "b").write_text("who put me here")
        case "manifest":
            text = (newest / "MANIFEST.json").read_text()
            (newest / "MANIFEST.json").write_text(text.replace('"n": 1', '"n": 2'))
        case "no manifest":  # indistinguishable from published by level 1: sealed again
            (newest / "MANIFEST.json").unlink()


def test_no_valid_checkpoint_left_is_a_problem_and_never_a_silent_fresh_start(
    world: TaskWorld,
) -> None:
    saved(world, a="only")
    hurt(world.path("ckpt", "00000001"), "flip")

    for _ in range(2):
        found = world.newest()
        assert found.seq == 0
        assert "no valid checkpoint is left" in found.problem


def test_a_checkpoint_of_a_later_version_is_a_problem(world: TaskWorld) -> None:
    saved(world, a="old")
    saved(world, a="new")
    path = world.path("ckpt", "00000002", "MANIFEST.json")
    manifest = {**json.loads(path.read_text()), "format": 2}
    path.write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))

    assert "format 2" in world.newest().problem
    assert "format 2" in world.mark().problem


def test_fresh_archives_and_deletes_nothing(world: TaskWorld) -> None:
    saved(world, a="one")
    world.record(facts.step_done("s"))

    world.begin(fresh=True)

    assert world.newest() == blobs.Found()
    assert world.facts().count == 0
    assert world.path("archive", "2", "ckpt", "00000001", "a").exists()
    assert world.path("archive", "2", "journal", "000001.j").exists()


def test_a_fresh_start_that_is_repeated_archives_once(world: TaskWorld) -> None:
    saved(world, a="one")
    world.begin(fresh=True)
    world.attempt -= 1

    world.begin(fresh=True)

    assert world.path("archive", "2", "ckpt", "00000001", "a").exists()


def test_the_stage_is_empty_for_every_attempt(world: TaskWorld) -> None:
    world.path("stage", "half").write_text("x")
    world.path("stage", "deep").mkdir()

    world.begin()
    assert os.listdir(world.path("stage")) == []

    blobs.prune(world.dir, world.uid)
    assert not [name for name in os.listdir(world.dir) if name.startswith(".")]


def test_two_valid_generations_stay(world: TaskWorld) -> None:
    for number in range(1, 5):
        world.publish(number, a=str(number))
    world.seal()

    assert blobs.prune(world.dir, world.uid) == [2, 1]
    assert numbers(world) == ["3", "4"]


def test_no_more_are_sealed_than_are_kept(world: TaskWorld) -> None:
    for number in range(1, 5):
        world.publish(number, a=str(number))

    sealed = blobs.seal_pending(world.dir, world.uid, world.boot_id)

    assert sealed == [blobs.Sealed(4, ""), blobs.Sealed(3, "")]
    assert not world.path("ckpt", "2", "MANIFEST.json").exists()


def test_however_many_are_imported_or_edited_the_newest_of_the_task_itself_stays(
    world: TaskWorld,
) -> None:
    saved(world, a="1")
    saved(world, a="2")
    for origin in ({"imported_from": {}}, {"edited": 3}, {"edited": 4}):
        world.path("stage", "a").write_text("by hand")
        save(world.dir, [], {"attempt": 1, "provenance": origin})
    assert numbers(world) == ["00000002", "00000004", "00000005"]
    hurt(world.path("ckpt", "00000005"), "flip")
    hurt(world.path("ckpt", "00000004"), "flip")
    assert world.newest().seq == 2


def test_what_the_task_saves_after_an_import_takes_the_place_of_what_it_saved_before(
    world: TaskWorld,
) -> None:
    saved(world, a="1")
    world.path("stage", "a").write_text("by hand")
    save(world.dir, [], {"attempt": 1, "provenance": {"imported_from": {}}})
    saved(world, a="3")
    saved(world, a="4")
    assert numbers(world) == ["00000003", "00000004"]


def test_a_damaged_one_does_not_count_as_kept(world: TaskWorld) -> None:
    for number in range(1, 4):
        world.publish(number, a=str(number))
    world.seal()
    world.path("ckpt", "3", "a").unlink()

    assert blobs.prune(world.dir, world.uid) == []


def test_generations_say_what_is_wrong_with_each(world: TaskWorld) -> None:
    saved(world, a="first")
    saved(world, a="second")
    world.publish(9, a="unsealed")
    hurt(world.path("ckpt", "00000002"), "flip")

    found = blobs.generations(world.dir, world.uid, verify=True)

    assert [(one.seq, one.sealed, one.valid) for one in found] == [
        (9, False, False),
        (2, True, False),
        (1, True, True),
    ]
    assert found[1].fault == "a: the digest differs"


@pytest.mark.parametrize("when", ["before the look", "within the look"])
def test_one_that_is_deleted_while_they_are_listed_is_not_told_as_bad(
    world: TaskWorld, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    saved(world, a="first")
    saved(world, a="second")
    verified = seals.verify

    def let_it_go_first(*args: Any, **options: Any) -> None:
        number = args[2]["seq"]
        if (number, when) in ((2, "before the look"), (1, "within the look")):
            shutil.rmtree(world.path("ckpt", "00000001"))
        verified(*args, **options)

    monkeypatch.setattr(seals, "verify", let_it_go_first)
    found = blobs.generations(world.dir, world.uid, verify=True)

    assert [(one.seq, one.fault) for one in found] == [(2, "")]


def overtake(monkeypatch: pytest.MonkeyPatch, where: object, name: str, world: TaskWorld) -> None:
    """Let the task save twice just before the first call of `name`."""
    real, left = getattr(where, name), [("third", "fourth")]

    def late(*args: Any, **options: Any) -> Any:
        for text in left.pop() if left else ():
            saved(world, a=text)
        return real(*args, **options)

    monkeypatch.setattr(where, name, late)


@pytest.mark.parametrize("is_deep", [False, True])
def test_where_all_that_was_listed_is_gone_the_newer_ones_are_told(
    world: TaskWorld, monkeypatch: pytest.MonkeyPatch, *, is_deep: bool
) -> None:
    for text in ("first", "second"):
        saved(world, a=text)
    overtake(monkeypatch, blobs, "_look", world)
    found = blobs.generations(world.dir, world.uid, verify=is_deep)
    assert [(one.seq, one.valid) for one in found] == [(4, True), (3, True)]


def test_a_mark_that_is_overtaken_by_two_saves_takes_no_checkpoint_back(
    world: TaskWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("first", "second"):
        saved(world, a=text)
    overtake(monkeypatch, blobs, "_look", world)
    assert world.mark().checkpoint == 4


def test_a_tar_of_one_that_is_cleared_away_while_it_is_verified_is_gone_not_damaged(
    world: TaskWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("first", "second"):
        saved(world, a=text, b=text)
    overtake(monkeypatch, seals, "_read_digest", world)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint 2"):
        write_tar(world.dir, world.uid, 2, io.BytesIO())


# --- the cursor ----------------------------------------------------------------------------------


def test_saving_the_same_again_is_no_progress_and_anything_new_is(world: TaskWorld) -> None:
    seen = [world.mark().cursor]

    def gained() -> bool:
        seen.append(world.mark().cursor)
        return seen[-1] not in seen[:-1]

    saved(world, a="one")
    assert gained()
    saved(world, a="one")
    assert not gained()
    saved(world, a="two")
    assert gained()
    world.record(facts.step_done("s"))
    assert gained()
    world.record(facts.step_done("s"))
    assert not gained()
    world.record(facts.item_done("k", "error"))
    assert gained()
    world.record(facts.step_start("t"), facts.retry_after(1))
    assert not gained()
    world.begin()
    assert not gained()
    assert world.mark().checkpoint == 3


# --- saving --------------------------------------------------------------------------------------


def test_save_without_files_publishes_the_stage(world: TaskWorld) -> None:
    world.path("stage", "a").write_text("staged")

    assert saved(world) == 1
    assert world.path("ckpt", "00000001", "a").read_text() == "staged"
    assert os.listdir(world.path("stage")) == []


def test_a_save_that_fails_leaves_everything_as_it_was(world: TaskWorld) -> None:
    saved(world, a="one")
    world.path("stage", "link").symlink_to("/etc/passwd")
    before = numbers(world)

    with pytest.raises(NotTrusted):
        saved(world)
    with pytest.raises(ValueError, match="No such file"):
        save(world.dir, ["/nonexistent"], {"attempt": 1})

    assert numbers(world) == before
    assert os.listdir(world.path("stage")) == ["link"]


def test_a_manifest_that_nobody_would_read_again_is_not_written(world: TaskWorld) -> None:
    save(world.dir, [], {"attempt": 1})
    state = "x" * (seals.BYTES_MAX - 64)
    with pytest.raises(NotTrusted, match=f"more than {seals.BYTES_MAX}"):
        save(world.dir, [], {"attempt": 1, "state": state})
    assert (world.newest().seq, world.newest().warning) == (1, "")


def test_a_zombie_cannot_publish(world: TaskWorld) -> None:
    world.begin()

    with pytest.raises(StaleAttempt):
        save(world.dir, [], {"attempt": 1})
    assert numbers(world) == []


def test_a_save_waits_for_the_next_attempt_to_be_ready_and_is_refused_then(
    world: TaskWorld, tmp_path: Path
) -> None:
    (tmp_path / "later").mkdir()
    later = TaskWorld(tmp_path / "later")
    later.begin()
    fence = os.open(world.dir, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(fence, fcntl.LOCK_EX)  # as who makes attempt 2 ready
    with ThreadPoolExecutor(1) as pool:
        zombie = pool.submit(save, world.dir, [], {"attempt": 1})
        until(lambda: zombie.done() or is_waited_for(fence))
        shutil.copy(later.path(ATTEMPT_FILE), world.path(ATTEMPT_FILE))
        os.close(fence)
        with pytest.raises(StaleAttempt):
            zombie.result()
    assert numbers(world) == []


def is_waited_for(fd: int) -> bool:
    """Tell whether somebody waits for our lock. Source: proc_locks(5)."""
    inode = f":{os.fstat(fd).st_ino}"
    lines = Path("/proc/locks").read_text().splitlines()
    return any(" -> " in line and line.split()[6].endswith(inode) for line in lines)


def test_a_directory_is_saved_and_restored_with_what_is_in_it(
    world: TaskWorld, tmp_path: Path
) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "deep" / "w.bin").write_bytes(bytes(100_000))
    save(world.dir, [str(tmp_path / "model")], {"attempt": 1})

    assert copy_out(world.dir, world.uid, 1, str(tmp_path / "out")) == ["model/deep/w.bin"]
    assert (tmp_path / "out/model/deep/w.bin").read_bytes() == bytes(100_000)


def test_export_writes_a_tar_that_names_the_manifest_first(world: TaskWorld) -> None:
    saved(world, a="one")
    out = io.BytesIO()

    write_tar(world.dir, world.uid, 1, out)

    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        assert archive.getnames() == ["MANIFEST.json", "a"]
    hurt(world.path("ckpt", "00000001"), "flip")
    with pytest.raises(Damaged):
        write_tar(world.dir, world.uid, 1, io.BytesIO())


def test_restore_never_replaces_a_good_file_by_a_damaged_one(
    world: TaskWorld, tmp_path: Path
) -> None:
    saved(world, a="one")
    hurt(world.path("ckpt", "00000001"), "shorten")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("good")

    with pytest.raises(Damaged):
        copy_out(world.dir, world.uid, 1, str(tmp_path / "out"))

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert (tmp_path / "out" / "a").read_text() == "good"


# --- what only looks like a checkpoint -----------------------------------------------------------


def test_one_that_lost_the_end_of_a_file_does_not_count_as_kept(world: TaskWorld) -> None:
    for number in range(1, 4):
        world.publish(number, a=f"number {number}")
    world.seal()
    os.truncate(world.path("ckpt", "3", "a"), 3)

    assert blobs.prune(world.dir, world.uid) == []
    assert world.mark().checkpoint == 2, "and is no gain"


def test_an_old_checkpoint_under_a_new_number_is_not_taken_for_the_newest(world: TaskWorld) -> None:
    saved(world, a="first")
    saved(world, a="second")
    shutil.copytree(world.path("ckpt", "00000001"), world.path("ckpt", "00000009"))

    found = world.newest()

    assert found.seq == 2
    assert "that of checkpoint 1" in found.warning


def test_a_disk_that_cannot_read_the_only_checkpoint_now_is_trouble_and_no_verdict_on_it(
    world: TaskWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(world, a="only")

    def unreadable(_fd: int, _into: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as disk:
        disk.setattr(os, "readv", unreadable)
        with pytest.raises(OSError, match="no checkpoint can be read"):
            world.newest()

    found = world.newest()
    assert (found.seq, found.warning) == (1, "")


def test_of_what_was_set_aside_the_newest_two_are_kept_to_be_looked_at(world: TaskWorld) -> None:
    saved(world, a="good")
    for number in range(2, 6):
        world.publish(f"{number:08d}", a="bad")
        world.seal()
        hurt(world.path("ckpt", f"{number:08d}"), "flip")
        assert world.newest().seq == 1

    blobs.prune(world.dir, world.uid)

    assert numbers(world) == ["00000001", "00000004.damaged", "00000005.damaged"]


def test_nothing_is_pruned_from_under_a_save_that_is_under_way(world: TaskWorld) -> None:
    for number in range(1, 4):
        world.publish(number, a=str(number))
    world.seal()
    world.path("stage", "a").write_text("new")
    saving = begin(world.dir, [], world.attempt)

    assert blobs.prune(world.dir, world.uid) == []
    done = saving.finish({"attempt": world.attempt})

    assert Path(done.path, "a").read_text() == "new"


def test_a_sealed_checkpoint_names_the_one_before_it(world: TaskWorld) -> None:
    for number in (1, 2, 4):
        world.publish(number, a=str(number))
    world.seal()
    found = blobs.generations(world.dir, world.uid, verify=False)
    assert [one.manifest.get("parent") for one in found] == [2, 1, None]


@pytest.mark.parametrize("left_bytes", [1 << 20, 3 << 20])
def test_a_file_that_its_task_still_changes_is_not_sealed(
    world: TaskWorld, monkeypatch: pytest.MonkeyPatch, left_bytes: int
) -> None:
    file = world.publish(1, a="x" * (2 << 20)) / "a"
    real = os.readv

    def read_beside_the_task(fd: int, into: list[memoryview]) -> int:
        os.truncate(file, left_bytes)
        return real(fd, into)

    with monkeypatch.context() as beside:
        beside.setattr(os, "readv", read_beside_the_task)
        (said,) = world.seal()

    assert "changes while it is read" in said
    assert not (file.parent / "MANIFEST.json").exists()


def test_a_number_that_is_damaged_twice_is_set_aside_twice(world: TaskWorld) -> None:
    saved(world, a="good")
    for _ in range(2):
        world.publish("00000002", a="bad")
        world.seal()
        hurt(world.path("ckpt", "00000002"), "flip")
        found = world.newest()
        assert (found.seq, found.problem) == (1, "")
    assert numbers(world) == ["00000001", "00000002.damaged", "00000002.damaged-2"]
