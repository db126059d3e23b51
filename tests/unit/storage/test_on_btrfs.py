"""What btrfs does otherwise: blocks are shared, and an open directory shows no later names."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.sdk.save import save
from ckptd.storage import blobs
from ckptd.storage.spent import delete_spent
from ckptd.storage.untrusted import Damaged, names_in, remove_tree
from tests.task_world import TaskWorld

pytestmark = pytest.mark.root
HEADER = {"attempt": 1}
LARGE_BYTES = 20 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(256 << 20)
    for order in (["mkfs.btrfs", "-q", str(image)], ["mount", "-o", "loop", str(image), str(disk)]):
        try:
            subprocess.run(order, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs root and btrfs: {error}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def world(disk: Path) -> TaskWorld:
    return TaskWorld(disk)


def free_bytes(disk: Path) -> int:
    subprocess.run(["sync", "--file-system", str(disk)], check=True)  # not sync(2): see FailingDisk
    return os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize


def faults(world: TaskWorld) -> dict[int, str]:
    return {one.seq: one.fault for one in blobs.generations(world.dir, world.uid, verify=True)}


def test_a_large_file_is_carried_on_without_a_copy_and_one_bad_write_hits_one_generation(
    world: TaskWorld, disk: Path
) -> None:
    world.path("stage", "weights").write_bytes(os.urandom(LARGE_BYTES))
    save(world.dir, [], HEADER)
    before = free_bytes(disk)

    save(world.dir, [], HEADER, carry=["weights"])

    assert before - free_bytes(disk) < LARGE_BYTES // 4
    with world.path("ckpt", "00000002", "weights").open("r+b") as file:
        file.write(b"bad")
    assert faults(world) == {1: "", 2: "weights: the digest differs"}
    with pytest.raises(Damaged, match="weights: the digest differs"):
        save(world.dir, [], HEADER, carry=["weights"])


def test_a_large_file_is_saved_without_a_copy(world: TaskWorld, disk: Path) -> None:
    (disk / "weights").write_bytes(os.urandom(LARGE_BYTES))
    before = free_bytes(disk)

    save(world.dir, [str(disk / "weights")], HEADER)

    assert before - free_bytes(disk) < LARGE_BYTES // 4


def test_names_that_came_after_a_directory_was_opened_are_seen(disk: Path) -> None:
    fd = os.open(disk, os.O_RDONLY)
    assert names_in(fd) == []
    (disk / "later").touch()

    assert names_in(fd) == ["later"]

    os.close(fd)


def test_a_deep_tree_is_deleted(disk: Path) -> None:
    (disk / "tree" / "a" / "b" / "c").mkdir(parents=True)
    for path in ("tree/x", "tree/a/x", "tree/a/b/x", "tree/a/b/c/x"):
        (disk / path).touch()
    fd = os.open(disk, os.O_RDONLY)

    remove_tree("tree", fd)

    os.close(fd)
    assert os.listdir(disk) == []


def test_what_is_spent_and_what_is_pruned_goes_in_one_pass(world: TaskWorld) -> None:
    for number in range(1, 5):
        world.path("stage", "deep").mkdir()
        world.publish(number, state=str(number))
        world.seal()
    assert blobs.prune(world.dir, world.uid) == [2, 1]
    assert sorted(os.listdir(world.path("ckpt"))) == ["3", "4"]

    assert delete_spent(world.dir, 1, world.uid)

    assert sorted(os.listdir(world.dir)) == ["attempt.json", "stage"]
