"""Two back ends at once: who is asked of an attempt. The units' service manager is away here."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.core.port import Deliver, EndSeen, Forget, Runner, Sighting
from ckptd.runner.fork import ForkRunner
from ckptd.units.either import Either, has_forked, has_units
from ckptd.units.recorder import Began, Records
from ckptd.units.runner import UnitRunner
from tests.waiting import until

BOOT = "8a0f2fb3-c19d-77e4-8a0f-2fb3c19d77e4"
OTHER_BOOT = "0123abcd-c19d-77e4-8a0f-2fb3c19d77e4"


@pytest.fixture
def dirs(tmp_path: Path) -> tuple[str, str]:
    return f"{tmp_path}/state", f"{tmp_path}/run"


@pytest.fixture
def either(dirs: tuple[str, str]) -> Iterator[Either]:
    made = an_either(dirs)
    yield made
    made.close()


def an_either(dirs: tuple[str, str]) -> Either:
    address = f"unix:path={dirs[1]}/no-bus"
    units = UnitRunner(*dirs, bus_address=address, is_system=False, boot_id=BOOT)
    return Either(units, ForkRunner(*dirs, has_cgroups=False, boot_id=BOOT), prefers_units=True)


def end_of(runner: Runner, task: int) -> EndSeen:
    seen: list[Sighting] = []

    def found() -> EndSeen | None:
        seen.extend(runner.poll())
        return next((one for one in seen if isinstance(one, EndSeen) and one.task == task), None)

    end = until(found, every_s=0.001)
    assert end is not None
    return end


def test_its_name_is_that_of_the_preferred_one(either: Either) -> None:
    assert (either.name, either.cgroup) == ("unit", "ckptd.slice")


def test_an_attempt_with_a_unit_record_is_told_as_that_says(dirs: tuple[str, str]) -> None:
    path = Records(*dirs, BOOT).make((7, 1))
    Path(path).write_text("ended result=exit-code code=exited status=3\n")
    either = an_either(dirs)
    either.adopt(7, 1)
    end = end_of(either, 7)
    assert (end.cause, end.code) == ("exit", 3)
    assert not either.is_adopting
    either.close()


def test_a_unit_of_another_boot_is_known_to_be_over_without_a_manager(
    dirs: tuple[str, str],
) -> None:
    Records(*dirs, OTHER_BOOT).make((7, 1))
    either = an_either(dirs)
    either.adopt(7, 1)
    assert end_of(either, 7).cause == "reboot"
    either.close()


def test_a_unit_of_this_boot_waits_for_the_manager(dirs: tuple[str, str]) -> None:
    records = Records(*dirs, BOOT)
    records.make((7, 1))
    records.note_start((7, 1), Began(at_ns=5, pid=65, resumed_from=0, invocation="ab"))
    either = an_either(dirs)
    either.adopt(7, 1)
    either.adopt(8, 1)  # unknown to both: turns the loop
    assert end_of(either, 8).cause == "not_started"
    assert either.is_adopting
    either.close()


def test_what_is_forgotten_is_forgotten_by_both(dirs: tuple[str, str]) -> None:
    Records(*dirs, OTHER_BOOT).make((7, 1))
    either = an_either(dirs)
    either.adopt(7, 1)
    end_of(either, 7)
    either.carry_out(Forget(7, 1))
    either.carry_out(Deliver(7, 1, 15, tree=False))
    assert os.listdir(f"{dirs[0]}/units") == []
    either.close()


def test_units_of_this_boot_alone_may_still_run(dirs: tuple[str, str]) -> None:
    assert not has_units(*dirs, BOOT)
    Records(*dirs, OTHER_BOOT).make((7, 1))
    assert not has_units(*dirs, BOOT)
    Records(*dirs, BOOT).make((8, 1))
    assert has_units(*dirs, BOOT)


def test_only_attempts_tell_of_a_fork_runner(dirs: tuple[str, str]) -> None:
    assert not has_forked(dirs[0])
    os.makedirs(f"{dirs[0]}/attempts/lost+found")
    assert not has_forked(dirs[0])
    os.makedirs(f"{dirs[0]}/attempts/7.1")
    assert has_forked(dirs[0])
