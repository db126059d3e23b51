"""What broke in the unit runner once, each test named after the damage."""

import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from jeepney import HeaderFields, Message

from ckptd.core.port import Sighting, Start
from ckptd.units.runner import UnitRunner
from ckptd.units.systemd import SYSTEMD
from tests.private_bus import Answer, PrivateBus
from tests.waiting import until

ANSWER_S = 10.0


class SlowSystemd:
    """Tells which units are loaded (none) when it is let; takes every order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_list = threading.Event()

    def answer(self, message: Message) -> Answer:
        member = message.header.fields[HeaderFields.member]
        self.asked.append(member)
        match member:
            case "ListUnitsByPatterns":
                assert self.may_list.wait(ANSWER_S)
                return "a(ssssssouso)", ([],)
            case "StartTransientUnit":
                for kind, value in dict(message.body[2]).values():
                    if kind == "h":  # where the task would write to
                        value.close()
                return "o", ("/org/freedesktop/systemd1/job/1",)
            case _:
                return "", ()


@pytest.fixture
def private(tmp_path: Path) -> Iterator[PrivateBus]:
    made = PrivateBus(tmp_path)
    made.start()
    yield made
    made.kill()


def a_start(task: int) -> Start:
    return Start(
        task=task, attempt=2, argv=("true",), env={}, cwd="/", uid=os.getuid(), gid=os.getgid(),
        stdin="", umask=0o022, memory_bytes=0, epoch=1, deadline_ns=0, fresh=False,
    )  # fmt: skip


def test_who_resumes_while_the_manager_is_asked_for_its_units_was_given_up_and_ran_twice(
    private: PrivateBus, tmp_path: Path
) -> None:
    systemd = SlowSystemd()
    service = private.service(SYSTEMD, systemd.answer)
    dirs = f"{tmp_path}/state", f"{tmp_path}/run"
    runner = UnitRunner(*dirs, bus_address=private.address, is_system=False)
    os.makedirs(f"{dirs[0]}/tasks/7/ckpt/1")  # something to look through before the start
    seen: list[Sighting] = []

    def has_asked(member: str) -> bool:
        seen.extend(runner.poll())
        return member in systemd.asked

    until(lambda: has_asked("ListUnitsByPatterns"))
    systemd.may_list.set()
    assert select.select([runner], [], [], ANSWER_S)[0], "the units were not told"
    runner.carry_out(a_start(7))

    until(lambda: has_asked("StartTransientUnit") or seen)
    assert not seen
    runner.close()
    service.close()
