"""A task's output file is the task's own, and what is done to it must not stop the daemon."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.runner import output

LEASES = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)  # asked to let go of it
fcntl.fcntl(os.open(sys.argv[1], os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)
print("leased", flush=True)
sys.stdin.read()
"""


def test_an_output_that_its_user_has_leased_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "7.log"
    path.touch()
    with subprocess.Popen(
        [sys.executable, "-c", LEASES, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdout is not None
        if user.stdout.readline() != b"leased\n":
            pytest.skip("this file system has no leases")
        with pytest.raises(BlockingIOError):
            output.opened(str(path), -1, -1)


def test_a_task_finds_its_output_as_any_program_does(tmp_path: Path) -> None:
    fd = output.opened(str(tmp_path / "7.log"), -1, -1)
    assert os.get_blocking(fd)
    os.close(fd)


NOBODY = 65_534


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A small file system of its own, half of it for root alone where it is an ext4."""
    image, mount = tmp_path / "image", tmp_path / "disk"
    mount.mkdir()
    orders = [["mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "tmpfs", str(mount)]]
    if request.param == "ext4":
        with image.open("wb") as file:
            file.truncate(8 << 20)
        orders = [
            ["mkfs.ext4", "-q", "-m", "50", "-O", "^has_journal", str(image)],
            ["mount", "-o", "loop", str(image), str(mount)],
        ]
    for order in orders:
        try:
            subprocess.run(order, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs root and {request.param}: {error}")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def fill(path: Path) -> None:
    """Take every byte that our user can have."""
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 12)):  # Bound: the disk is small
            continue


@pytest.mark.root
@pytest.mark.parametrize("disk", ["tmpfs"], indirect=True)
def test_a_disk_is_full_where_it_takes_no_byte_though_the_last_line_finds_room(disk: Path) -> None:
    log = disk / "7.log"
    log.write_text("short\n")
    assert not output.is_full(str(log), -1)
    fill(disk / "balloon")
    assert output.is_full(str(log), -1)
    fd = output.opened(str(log), -1, -1)
    said = output.ending("exit", 1, 0, output.FULL, blame="disk", is_oom=False)
    output.write_end(fd, 1, 0, said)
    os.close(fd)
    assert log.read_text().endswith("exit code 1 (the disk of its output was full) ---\n")
    assert sorted(os.listdir(disk)) == ["7.log", "balloon"]


@pytest.mark.root
@pytest.mark.parametrize("disk", ["ext4"], indirect=True)
def test_what_is_left_for_root_alone_is_no_room_for_the_tasks_of_others(disk: Path) -> None:
    log = disk / "7.log"
    log.touch()
    assert not output.is_full(str(log), NOBODY)
    left_bytes = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    (disk / "balloon").write_bytes(bytes(left_bytes))
    assert output.is_full(str(log), NOBODY)
    assert not output.is_full(str(log), 0)
    fill(disk / "more")
    assert output.is_full(str(log), 0)


def test_a_disk_that_cannot_be_asked_is_not_full(tmp_path: Path) -> None:
    assert not output.is_full(str(tmp_path / "gone" / "7.log"), -1)
