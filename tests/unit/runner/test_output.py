"""A task's output file is the task's own, and what is done to it must not stop the daemon."""

import os
import subprocess
import sys
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
