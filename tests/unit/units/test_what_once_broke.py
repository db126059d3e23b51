"""What broke in the unit runner once, each test named after the damage."""

import errno
import os
import resource
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from jeepney import HeaderFields, Message

from ckptd.core.port import Control, Deliver, EndSeen, Sighting, Start
from ckptd.runner.fork import ForkRunner
from ckptd.units.either import Either
from ckptd.units.recorder import Began, Records
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


def test_a_kill_before_the_record_of_a_unit_is_made_was_lost(tmp_path: Path) -> None:
    dirs = f"{tmp_path}/state", f"{tmp_path}/run"
    os.makedirs(f"{dirs[0]}/tasks/7/ckpt/1")  # read whole before the record is made
    units = UnitRunner(*dirs, bus_address=f"unix:path={tmp_path}/no-bus", is_system=False)
    either = Either(units, ForkRunner(*dirs, has_cgroups=False), prefers_units=True)
    either.carry_out(a_start(7))

    either.carry_out(Control(7, 2, "kill", 0, 1))
    either.carry_out(Deliver(7, 2, 9, tree=True))

    ends: list[EndSeen] = []
    until(lambda: ends.extend(s for s in either.poll() if isinstance(s, EndSeen)) or ends)
    assert (ends[0].cause, ends[0].text) == ("not_started", "killed before it started")
    assert os.path.exists(f"{dirs[0]}/tasks/7/control.json")
    either.close()


# --- shortages ------------------------------------------------------------------------------------


@contextmanager
def one_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(int(name) for name in os.listdir("/proc/self/fd")) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_want_of_a_descriptor_to_hand_over_failed_a_start_for_good(
    private: PrivateBus, tmp_path: Path
) -> None:
    systemd = SlowSystemd()
    service = private.service(SYSTEMD, systemd.answer)
    dirs = f"{tmp_path}/state", f"{tmp_path}/run"
    runner = UnitRunner(*dirs, bus_address=private.address, is_system=False)
    ends: list[EndSeen] = []

    def turn() -> None:
        ends.extend(seen for seen in runner.poll() if isinstance(seen, EndSeen))

    until(lambda: (turn(), "ListUnitsByPatterns" in systemd.asked)[1])
    runner.carry_out(a_start(7))  # all is prepared, it waits for the manager
    with one_descriptor_left():  # for its output; none for the duplicate that is sent
        systemd.may_list.set()
        until(lambda: (turn(), ends)[1])

    assert (ends[0].cause, ends[0].code) == ("spawn_error", errno.EMFILE)
    runner.close()
    service.close()


def test_every_line_that_found_no_room_cost_the_daemon_a_descriptor(tmp_path: Path) -> None:
    records = Records(f"{tmp_path}/state", f"{tmp_path}/run", "boot")
    records.make((7, 2))
    before = os.listdir("/proc/self/fd")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        records.note_start((7, 2), Began(5, 65, 0, "ab12"))
        records.refuse((7, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert records.read((7, 2)).began is None
    assert os.listdir("/proc/self/fd") == before
