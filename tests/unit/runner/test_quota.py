"""Limits beside memory: what is written to the kernel's files, and what is owned up to."""

from pathlib import Path

import pytest

from ckptd.runner.quota import Quota, not_held, usable

ALL = frozenset({"cpu", "pids", "io"})
FRESH = {"cpu.max": "", "pids.max": "", "io.weight": ""}


@pytest.fixture
def group(tmp_path: Path) -> Path:
    for name in FRESH:
        (tmp_path / name).touch()
    return tmp_path


def content(group: Path) -> dict[str, str]:
    return {name: (group / name).read_text() for name in FRESH}


def test_a_group_without_limits_is_left_as_it_is(group: Path) -> None:
    assert not Quota(str(group), ALL).set(0.0, 0, 0)
    assert content(group) == FRESH


def test_limits_are_written_as_the_kernel_reads_them(group: Path) -> None:
    assert not Quota(str(group), ALL).set(1.5, 100, 50)
    assert content(group) == {
        "cpu.max": "150000 100000", "pids.max": "100", "io.weight": "default 50",
    }  # fmt: skip


def test_the_next_attempt_does_not_inherit_the_limits_of_the_one_before(group: Path) -> None:
    quota = Quota(str(group), ALL)
    quota.set(1.5, 100, 50)
    for name in FRESH:  # a file of the kernel's has no rest behind what is written
        (group / name).write_text("")
    quota.set(0.0, 0, 0)
    assert content(group) == {
        "cpu.max": "max 100000", "pids.max": "max", "io.weight": "default 100",
    }  # fmt: skip


def test_less_than_the_kernel_takes_becomes_the_least_that_it_takes(group: Path) -> None:
    Quota(str(group), ALL).set(0.001, 0, 0)
    assert content(group)["cpu.max"] == "1000 100000"


def test_a_file_that_does_not_take_its_limit_is_named(group: Path) -> None:
    (group / "pids.max").unlink()
    assert Quota(str(group), ALL).set(0.0, 9, 0) == "pids.max"


def test_what_no_controller_holds_is_not_tried_and_named_by_its_option(group: Path) -> None:
    assert not Quota(str(group), frozenset()).set(1.5, 100, 50)
    assert content(group) == FRESH
    wanted = (1 << 30, 1.5, 100, 50)
    assert (
        not_held(frozenset(), has_memory=False, limits=wanted)
        == "memory, cpus, tasks-max, io-weight"
    )
    assert not_held(frozenset({"cpu"}), has_memory=True, limits=wanted) == "tasks-max, io-weight"
    assert not not_held(ALL, has_memory=True, limits=wanted)
    assert not not_held(frozenset(), has_memory=False, limits=(0, 0.0, 0, 0))


def test_a_controller_without_its_file_holds_nothing(group: Path) -> None:
    (group / "io.weight").unlink()
    assert usable(str(group), ["memory", "cpu", "pids", "io"]) == {"memory", "cpu", "pids"}
