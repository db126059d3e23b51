"""What in a store tells that a unit of another one, which it is a copy of, still runs."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.core.port import EndSeen, Sighting
from ckptd.runner import cgroup
from ckptd.runner.original import Living
from ckptd.units.original import living_unit
from ckptd.units.recorder import Began, Records
from ckptd.units.runner import UnitRunner
from tests.waiting import until

BOOT = "8a0f2fb3-c19d-77e4-8a0f-2fb3c19d77e4"
OTHER_BOOT = "0123abcd-c19d-77e4-8a0f-2fb3c19d77e4"
KEY = (4711, 2)
ENDED = "ended result=success code=exited status=0 inv=ab12 stopping=0\n"


@pytest.fixture
def pid() -> Iterator[int]:
    """A process in a control group that is named as the unit of KEY is."""
    roots = cgroup.discover(f"test-original-{os.getpid()}")
    root = roots.unified or roots.memory or roots.freezer
    if not root:
        pytest.skip("no control groups can be made here")
    group = Path(root) / "ckptd-task-4711-2.service"
    group.mkdir()
    process = subprocess.Popen(["sleep", "1000"])
    (group / "cgroup.procs").write_text(str(process.pid))
    yield process.pid
    process.kill()
    process.wait()
    until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()
    for made in {roots.unified, roots.memory, roots.freezer} - {""}:
        os.rmdir(made)


def store_with_unit(root: Path, boot: str = BOOT) -> Path:
    Records(f"{root}/first", f"{root}/run", boot).make(KEY)
    return root / "first"


def copied(store: Path) -> str:
    return str(shutil.copytree(store, store.parent / "second"))


def test_a_unit_that_runs_is_its_own_stores_and_not_the_copys(tmp_path: Path, pid: int) -> None:
    first = store_with_unit(tmp_path)
    second = copied(first)
    assert living_unit(str(first), BOOT) is None
    assert living_unit(second, BOOT) == Living(*KEY, pid)
    assert living_unit(second, OTHER_BOOT) is None


@pytest.mark.parametrize("line", [ENDED, "refused\n"])
def test_a_unit_that_is_over_by_its_record_keeps_no_copy_from_starting(
    tmp_path: Path, pid: int, line: str
) -> None:
    first = store_with_unit(tmp_path)
    (record,) = (first / "units").iterdir()
    record.write_text(line)
    assert pid
    assert living_unit(copied(first), BOOT) is None


def test_a_record_that_cannot_be_read_is_not_taken_for_an_end(tmp_path: Path, pid: int) -> None:
    second = copied(store_with_unit(tmp_path))
    (record,) = Path(f"{second}/units").iterdir()
    kept = record.rename(tmp_path / "kept")
    record.symlink_to(kept)  # as a farm of links has it; what is below units/ is never followed
    assert living_unit(second, BOOT) == Living(*KEY, pid)


def test_a_store_of_units_that_is_moved_is_no_copy(tmp_path: Path, pid: int) -> None:
    first = store_with_unit(tmp_path)
    first.rename(tmp_path / "moved")
    assert pid
    assert living_unit(f"{tmp_path}/moved", BOOT) is None


def test_a_record_by_a_version_that_did_not_say_where_it_was_made_is_ours(
    tmp_path: Path, pid: int
) -> None:
    first = store_with_unit(tmp_path)
    (record,) = (first / "units").iterdir()
    record.rename(record.with_name(record.name[:-8]))
    second = copied(first)
    assert pid
    assert living_unit(second, BOOT) is None
    assert Records(second, f"{tmp_path}/run", BOOT).gone(KEY) is None


def test_what_has_no_process_keeps_no_copy_from_starting(tmp_path: Path) -> None:
    assert living_unit(str(tmp_path), BOOT) is None
    assert living_unit(copied(store_with_unit(tmp_path)), BOOT) is None


def test_a_runner_on_a_copy_follows_no_unit_of_the_originals(tmp_path: Path) -> None:
    first = store_with_unit(tmp_path)
    Records(str(first), f"{tmp_path}/run", BOOT).note_start(KEY, Began(5, 65, 3, "ab12"))
    runner = UnitRunner(
        copied(first), f"{tmp_path}/run",
        bus_address=f"unix:path={tmp_path}/no-bus", is_system=False, boot_id=BOOT,
    )  # fmt: skip
    seen: list[Sighting] = []

    runner.adopt(*KEY)  # no manager is asked: there is no bus to ask it by

    until(lambda: seen.extend(runner.poll()) or seen)
    runner.close()
    (end,) = seen
    assert isinstance(end, EndSeen)
    assert (end.cause, end.text) == ("lost", "it ran in the store that this is a copy of")
