"""A disk that fails costs no descriptor: whoever goes on has as many as before."""

import errno
import os
from pathlib import Path

import pytest

from ckptd.protocol.errors import CkptdError
from ckptd.storage import facts
from ckptd.storage.journal import sync_names
from ckptd.storage.taskdir import prepare
from ckptd.storage.untrusted import open_directory
from tests.fakes.log_model import SMALL, Writer, open_store
from tests.fakes.memory_disk import MemoryDisk
from tests.task_world import TaskWorld

STEPS = [("write", "spare.tmp"), ("sync", "spare.tmp"), ("rename", ".wal"), ("sync_dir", "/wal")]


def refused(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(("kind", "part"), STEPS)
def test_a_rotation_that_fails_closes_the_segment_that_it_did_not_begin(
    kind: str, part: str
) -> None:
    disk = MemoryDisk()
    writer = Writer(disk, segment_bytes=SMALL)
    while writer.wal.segment_room_bytes > 512:
        writer.append(1)
        writer.sync()
    before = len(disk.opened)
    disk.fail(kind, part)
    with pytest.raises(CkptdError, match="rotation"):
        writer.append(99)
    assert len(disk.opened) == before


@pytest.mark.parametrize(("kind", "part"), STEPS)
def test_a_reign_that_cannot_begin_closes_its_segment(kind: str, part: str) -> None:
    disk = MemoryDisk()
    writer = Writer(disk, segment_bytes=SMALL)
    writer.append(9)
    writer.close()
    store = open_store(disk)
    recovery = store.recover()
    before = len(disk.opened)
    disk.fail(kind, part)
    with pytest.raises(CkptdError):
        store.arm(recovery, epoch=9, boot_id="b" * 36, at_ns=1)
    assert len(disk.opened) == before


def test_a_journal_that_cannot_be_synced_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = TaskWorld(tmp_path)
    world.record(facts.step_done("a"))
    task_fd = open_directory(world.dir, world.uid)
    before = open_files()
    monkeypatch.setattr(os, "fdatasync", refused)
    with pytest.raises(OSError, match="Input/output error"):
        sync_names(task_fd, world.uid, world.attempt)
    assert open_files() == before
    os.close(task_fd)


def test_a_journal_that_is_closed_holds_no_descriptor(tmp_path: Path) -> None:
    world = TaskWorld(tmp_path)
    before = open_files()
    world.record(facts.step_done("a"))
    assert world.facts().steps
    world.record(facts.step_done("b"))
    assert open_files() == before


@pytest.mark.parametrize("other", [0, 1], ids=["its attempt.json", "its directory"])
def test_what_cannot_be_given_to_its_task_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: int
) -> None:
    """A quota of the task's user refuses it, for one."""
    before = open_files()
    monkeypatch.setattr(os, "fchown", refused)
    with pytest.raises(OSError, match="Input/output error"):
        prepare(str(tmp_path / "12"), 1, os.getuid() + other, os.getgid(), fresh=False)
    assert open_files() == before
