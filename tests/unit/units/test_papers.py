"""What the daemon writes and sees in a unit's place when the unit has ended."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.core.port import EndSeen
from ckptd.runner import output
from ckptd.runner.environment import Place
from ckptd.units.papers import Papers
from ckptd.units.recorder import Records


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that is soon full."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "tmpfs", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs: {made.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.root
def test_the_exit_of_a_unit_is_blamed_on_the_disk_of_its_output_while_that_is_full(
    disk: Path,
) -> None:
    records = Records(f"{disk}/state", f"{disk}/run", "8a0f2fb3-0000-0000-0000-000000000000")
    papers = Papers(f"{disk}/state", f"{disk}/run", records, is_system=True)
    (disk / "7.log").write_text("short\n")
    place = Place(str(disk), str(disk / "7.log"), "")

    def closed(code: int, blame: str = "") -> tuple[str, str]:
        end = papers.close_output(place, EndSeen(7, 1, "exit", code, blame=blame), 0)
        return end.blame, end.text

    assert closed(1) == ("", "")
    with (disk / "balloon").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 12)):  # Bound: the disk is small
            continue
    assert closed(1) == ("disk", "the disk of its output was full")
    assert closed(0) == ("", "")
    assert closed(2, "limit") == ("limit", "")


def test_the_disk_is_looked_at_as_the_user_of_the_task_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a file system keeps for root is no room for others; a user's manager is one of them."""
    asked: list[int] = []
    monkeypatch.setattr(output, "is_full", lambda _path, uid: bool(asked.append(uid)))
    records = Records(
        f"{tmp_path}/state", f"{tmp_path}/run", "8a0f2fb3-0000-0000-0000-000000000000"
    )
    for is_system in (True, False):
        papers = Papers(f"{tmp_path}/state", f"{tmp_path}/run", records, is_system=is_system)
        place = Place(str(tmp_path), f"{tmp_path}/7.log", "")
        papers.close_output(place, EndSeen(7, 1, "exit", 1), 4711)
    assert asked == [4711, -1]
