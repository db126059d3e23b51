"""Saving from inside the task: no copy of what is staged, carrying on, in whichever thread."""

import fcntl
import os
import resource
import subprocess
import tempfile
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from ckptd.sdk.save import Saving, begin, save
from ckptd.storage import blobs, facts
from ckptd.storage.copy import Intake
from ckptd.storage.manifest import HOLE_BYTES_MAX, load, seal
from ckptd.storage.untrusted import Damaged, NotTrusted
from tests.task_world import TaskWorld

HEADER = {"attempt": 1}
LARGE_BYTES = 20 << 20


@pytest.fixture
def world(tmp_path: Path) -> TaskWorld:
    return TaskWorld(tmp_path)


def stage(world: TaskWorld, **files: str) -> None:
    for name, text in files.items():
        world.path("stage", name).write_text(text)


def staged(world: TaskWorld) -> list[str]:
    return sorted(os.listdir(world.path("stage")))


def numbers(world: TaskWorld) -> list[str]:
    return sorted(os.listdir(world.path("ckpt")))


def manifest(world: TaskWorld, name: str) -> dict[str, dict[str, object]]:
    fd = os.open(world.path("ckpt", name), os.O_RDONLY)
    try:
        return {entry["name"]: entry for entry in load(fd, world.uid)["files"]}
    finally:
        os.close(fd)


def faults(world: TaskWorld) -> dict[int, str]:
    return {one.seq: one.fault for one in blobs.generations(world.dir, world.uid, verify=True)}


# --- what is staged -------------------------------------------------------------------------------


def test_what_was_staged_is_published_as_it_is_and_not_copied(world: TaskWorld) -> None:
    path = world.path("stage", "weights")
    path.write_bytes(os.urandom(1 << 20) * (LARGE_BYTES >> 20))
    inode, digest = path.stat().st_ino, sha256(path.read_bytes()).hexdigest()

    saved = save(world.dir, [], HEADER)

    assert Path(saved.path, "weights").stat().st_ino == inode
    assert manifest(world, "00000001")["weights"]["sha256"] == digest
    assert saved.size_bytes == LARGE_BYTES
    assert saved.took_s > 0
    assert world.newest().seq == 1


def test_members_that_the_manifest_does_not_know_are_kept_and_sealed(world: TaskWorld) -> None:
    mine = {"numbers": {"cost_s": 0.5}, "task_name": "train", "task_version": 3, "state": {"n": 1}}

    saved = save(world.dir, [], {**HEADER, **mine, "seq": 99})

    assert {key: saved.manifest[key] for key in mine} == mine
    assert (saved.seq, saved.manifest["parent"]) == (1, 0), "these are ours"
    assert faults(world) == {1: ""}


def test_a_save_that_failed_leaves_the_stage_as_it_was(world: TaskWorld) -> None:
    stage(world, a="1")
    deep = world.path("stage", *("d" * 10))
    deep.mkdir(parents=True)

    with pytest.raises(NotTrusted, match="deep"):
        save(world.dir, [], HEADER)

    assert staged(world) == ["a", "d"]
    assert numbers(world) == []


# --- what is copied -------------------------------------------------------------------------------


def made(folder: Path, count: int = 1) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"f{number:05}").touch()
    return folder


def refused(world: TaskWorld, path: Path, why: str) -> None:
    with pytest.raises(NotTrusted, match=why):
        save(world.dir, [str(path)], HEADER)
    assert numbers(world) == [], "nothing is left behind"


def test_a_link_back_into_what_is_saved_is_refused_before_it_is_copied_again(
    world: TaskWorld, tmp_path: Path
) -> None:
    data = made(tmp_path / "data", 1_500)  # eight times as much would be too many files
    (data / "again").symlink_to(data)
    refused(world, data, r"data/again holds itself")


def test_a_link_that_leads_nowhere_is_told_as_that(world: TaskWorld, tmp_path: Path) -> None:
    (made(tmp_path / "data") / "gone").symlink_to("nothing")
    refused(world, tmp_path / "data", "data/gone leads nowhere: No such file")


def test_the_directory_that_the_checkpoint_lies_in_is_not_copied_into_itself(
    world: TaskWorld,
) -> None:
    refused(world, Path(world.dir), r"/ckpt/\.leftover-new-\d+ holds itself")


def test_more_files_than_a_checkpoint_may_hold_are_refused_at_the_first_one_too_many() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        world, data = TaskWorld(Path(name)), made(Path(name, "data"))
        (data / "link").symlink_to(made(Path(name, "many"), 10_000))
        (data / "then").symlink_to("/dev/null")  # never looked at
        refused(world, data, "more than 10000 files")


def test_what_is_too_deep_is_refused_before_it_is_copied(world: TaskWorld, tmp_path: Path) -> None:
    deep = made(tmp_path / "deep")
    (deep.joinpath(*"12345678") / "last").mkdir(parents=True)
    (deep / "x").symlink_to("/dev/null")  # never looked at
    refused(world, deep, "more than 8 directories deep")


def test_what_is_just_deep_enough_is_saved(world: TaskWorld, tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    last = deep.joinpath(*"234567", "8")
    last.mkdir(parents=True)
    (last / "x").write_text("x")

    saved = save(world.dir, [str(deep)], HEADER)

    assert [entry["name"] for entry in saved.manifest["files"]] == ["deep/2/3/4/5/6/7/8/x"]
    assert faults(world) == {1: ""}


def test_a_hole_that_has_no_room_when_it_is_copied_is_refused_before(tmp_path: Path) -> None:
    hole = made(tmp_path / "hole")
    os.truncate(hole / "f00000", 1 << 40)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        refused(TaskWorld(Path(name)), hole, r"hole/f00000 is mostly a hole")


def test_what_is_full_once_it_is_copied_is_saved_whatever_its_source_takes_on_disk(
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    source.touch()
    os.truncate(source, HOLE_BYTES_MAX + (1 << 20))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        world = TaskWorld(Path(name))
        save(world.dir, [str(source)], HEADER)
        assert len(numbers(world)) == 1


def test_a_file_that_vanishes_before_it_is_copied_is_no_breach_of_a_rule(tmp_path: Path) -> None:
    """A temporary file in a directory that is saved: the next save may go well."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(FileNotFoundError):
            Intake(fd).take(str(tmp_path / "gone"))
    finally:
        os.close(fd)


def test_a_disk_without_room_for_a_file_is_not_filled_up_first(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    order = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(order, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        world = TaskWorld(disk)
        (tmp_path / "large").write_bytes(b"x" * LARGE_BYTES)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # EFBIG, if any is copied
        with pytest.raises(OSError, match="No space left on device"):
            save(world.dir, [str(tmp_path / "large")], HEADER)
        assert numbers(world) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


# --- what is carried on ---------------------------------------------------------------------------


def test_a_file_that_did_not_change_is_carried_on_with_its_digest(world: TaskWorld) -> None:
    world.path("stage", "model").mkdir()
    stage(world, state="1")
    world.path("stage", "model", "w.bin").write_bytes(b"w" * 70_000)
    save(world.dir, [], HEADER)
    before = manifest(world, "00000001")["model/w.bin"]
    stage(world, state="2")

    save(world.dir, [], HEADER, carry=["model/w.bin"])

    assert manifest(world, "00000002")["model/w.bin"] == before
    assert world.path("ckpt", "00000002", "model", "w.bin").read_bytes() == b"w" * 70_000
    assert world.path("ckpt", "00000002", "state").read_text() == "2"
    assert faults(world) == {1: "", 2: ""}


def test_one_bad_write_never_damages_both_generations(world: TaskWorld) -> None:
    stage(world, weights="w" * 1_000)
    save(world.dir, [], HEADER)
    save(world.dir, [], HEADER, carry=["weights"])
    assert world.path("ckpt", "00000001", "weights").stat().st_nlink == 1

    with world.path("ckpt", "00000002", "weights").open("r+") as file:
        file.write("x")

    assert faults(world) == {1: "", 2: "weights: the digest differs"}
    world.begin()
    assert world.newest().seq == 1


def test_what_was_changed_after_its_seal_is_not_carried_on_as_good(world: TaskWorld) -> None:
    stage(world, weights="w" * 1_000)
    save(world.dir, [], HEADER)
    with world.path("ckpt", "00000001", "weights").open("r+") as file:
        file.write("x")
    stage(world, state="2")

    with pytest.raises(Damaged, match="weights: the digest differs"):
        save(world.dir, [], HEADER, carry=["weights"])

    assert staged(world) == ["state"]
    assert numbers(world) == ["00000001"]


@pytest.mark.parametrize("saved_before", [True, False])
def test_what_is_not_there_cannot_be_carried_on(world: TaskWorld, *, saved_before: bool) -> None:
    if saved_before:
        stage(world, state="1")
        save(world.dir, [], HEADER)
    stage(world, state="2")

    with pytest.raises(FileNotFoundError, match=r"checkpoint.*weights"):
        save(world.dir, [], HEADER, carry=["weights"])

    assert staged(world) == ["state"]


def test_a_new_file_is_never_replaced_by_an_old_one(world: TaskWorld) -> None:
    stage(world, other="1", weights="old")
    save(world.dir, [], HEADER)
    stage(world, weights="new")

    with pytest.raises(FileExistsError):
        save(world.dir, [], HEADER, carry=["other", "weights"])

    assert staged(world) == ["weights"]
    assert world.path("stage", "weights").read_text() == "new"


def test_a_name_that_leads_elsewhere_is_not_carried_on(world: TaskWorld) -> None:
    stage(world, state="1")
    save(world.dir, [], HEADER)

    with pytest.raises(FileNotFoundError):
        save(world.dir, [], HEADER, carry=["../../attempt.json"])


# --- in the background ----------------------------------------------------------------------------


def is_locked(world: TaskWorld) -> bool:
    fd = os.open(world.path("ckpt"), os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def test_the_stage_is_free_once_a_save_has_begun(world: TaskWorld) -> None:
    stage(world, state="1")
    saving = begin(world.dir, [], 1)
    stage(world, state="2")
    assert is_locked(world), "one at a time"

    assert saving.finish(HEADER).seq == 1

    assert not is_locked(world)
    assert world.path("ckpt", "00000001", "state").read_text() == "1"
    assert staged(world) == ["state"]
    assert save(world.dir, [], HEADER).seq == 2


def test_what_is_carried_on_is_known_at_the_beginning_and_copied_at_the_end(
    world: TaskWorld,
) -> None:
    stage(world, weights="w", state="1")
    save(world.dir, [], HEADER)
    stage(world, state="2")

    saving = begin(world.dir, [], 1, carry=["weights"])

    assert not list(world.path("ckpt").glob(".leftover-*/weights"))
    assert blobs.prune(world.dir, world.uid) == [], "who saves keeps what it carries on"
    assert saving.finish(HEADER).size_bytes == 2
    assert faults(world) == {1: "", 2: ""}


def test_a_save_finishes_in_one_thread_while_facts_are_appended_in_another(
    world: TaskWorld,
) -> None:
    journal = world.journal()
    seqs: list[int] = []

    def finish(saving: Saving) -> None:
        seqs.append(saving.finish(HEADER).seq)

    recorded = 0
    for number in range(1, 6):
        world.path("stage", "weights").write_bytes(os.urandom(LARGE_BYTES // 4))
        thread = threading.Thread(target=finish, args=(begin(world.dir, [], 1),))
        thread.start()
        while thread.is_alive() or recorded < number * 5:  # Bound: the save ends
            journal.append([facts.item_done(str(recorded), "pass")])
            recorded += 1
        thread.join()

    assert seqs == [1, 2, 3, 4, 5]
    assert len(world.facts().items) == recorded
    assert faults(world) == {4: "", 5: ""}


def test_a_save_that_is_dropped_gives_the_stage_back(world: TaskWorld) -> None:
    stage(world, state="1")
    saving = begin(world.dir, [], 1)

    saving.drop()
    saving.drop()

    assert staged(world) == ["state"]
    assert not is_locked(world)
    assert numbers(world) == []


def test_a_dropped_save_takes_the_place_of_nothing_newer(world: TaskWorld) -> None:
    stage(world, state="1")
    saving = begin(world.dir, [], 1)
    stage(world, state="2")

    saving.drop()

    assert world.path("stage", "state").read_text() == "2"
    assert save(world.dir, [], HEADER).seq == 1
    assert numbers(world) == ["00000001"], "what could not go back is pruned"


def test_a_checkpoint_that_a_shell_published_meanwhile_under_the_same_number_stays(
    world: TaskWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seal_beside_a_shell(*args: Any) -> dict[str, Any]:
        shells = world.path("ckpt", "00000001")
        if not shells.exists():
            shells.mkdir()
            (shells / "its").write_text("own")
        return seal(*args)

    stage(world, mine="own")
    with monkeypatch.context() as beside:
        beside.setattr("ckptd.sdk.save.seal", seal_beside_a_shell)
        saved = save(world.dir, [], HEADER)
    assert saved.seq == 2
    assert os.listdir(world.path("ckpt", "00000001")) == ["its"]
    assert world.newest().seq == 2
