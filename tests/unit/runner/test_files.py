"""The machine's trouble while a task's files are looked at: waited out, never held against it."""

import errno
import subprocess
from collections.abc import Iterator

import pytest

from ckptd.core.retry import SPAWN_TRANSIENT
from tests.unit.runner.test_fork import Bench

SAVE_ON_A_FULL_DISK = """
cd $CKPTD_DIR; echo hours of work >stage/n; mv stage ckpt/1
cat /dev/zero >fat 2>/dev/null; exit 75
"""


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    tasks = made.state / "tasks"
    order = ["mount", "-t", "tmpfs", "-o", "size=200k,mode=711", "tmpfs", str(tasks)]
    is_mounted = not subprocess.run(order, capture_output=True, check=False).returncode
    try:
        if not is_mounted:
            pytest.skip("cannot mount a tmpfs")
        yield made
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(tasks)], check=True)
        made.close()


def test_an_attempt_on_a_full_disk_waits_and_goes_on_from_what_was_saved(bench: Bench) -> None:
    assert bench.shell(SAVE_ON_A_FULL_DISK).code == 75
    refused = bench.shell("echo ran", attempt=2)
    (bench.state / "tasks/1/fat").unlink()
    bench.shell("cat $CKPTD_LAST/n", attempt=3)

    assert (refused.cause, refused.code) == ("spawn_error", errno.ENOSPC)
    assert refused.code in SPAWN_TRANSIENT
    assert bench.said() == ["hours of work"]
