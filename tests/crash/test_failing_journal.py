"""A journal on a disk that fails at a sync: what was not durable is taken back, nothing follows."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.storage import facts
from ckptd.storage.journal import JournalDamaged
from tests.fakes.failing_device import FailingDisk
from tests.task_world import TaskWorld

DISK_BYTES = 32 << 20


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[FailingDisk]:
    """A real ext4 on a device that fails when told to."""
    try:
        disk = FailingDisk(tmp_path, DISK_BYTES)
    except OSError as bad:
        pytest.skip(f"cannot serve and mount a disk (FUSE, loop, ext4): {bad.strerror}")
    yield disk
    disk.close()


def test_a_failed_sync_takes_back_what_rode_unsynced_as_well(failing_disk: FailingDisk) -> None:
    world = TaskWorld(failing_disk.directory)
    journal = world.journal()
    for number in range(60):
        journal.append([facts.item_done(str(number), "pass")])
    failing_disk.settle()
    journal.append([facts.step_done("rides")], is_synced=False)
    failing_disk.device.fail("write", count=1)

    with pytest.raises(OSError, match="Input/output"):
        journal.append([facts.step_done("fails")])

    with pytest.raises(JournalDamaged, match="sync failed before"):
        journal.append([facts.step_done("follows")])
    assert not world.facts().steps
    assert len(world.facts().items) == 60
    journal.close()
    world.record(facts.step_done("of another process"))
    assert list(world.facts().steps) == ["of another process"]
