"""What the runner says to a service manager and hears from it; booted ones are in tests/booted."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from jeepney import DBusAddress, HeaderFields, Message

from ckptd.runner.watch import Watch
from ckptd.units.bus import DISCONNECTED, Reply
from ckptd.units.systemd import (
    LOGIND,
    MANAGER,
    NO_SUCH_UNIT,
    SYSTEMD,
    SYSTEMD_PATH,
    Found,
    Listing,
    Manager,
    Row,
    unit_path,
)
from tests.private_bus import Answer, PrivateBus, turn_until

OURS, ABSENT = "ckptd-task-7-1.service", "ckptd-task-8-1.service"
EMITTER = DBusAddress(SYSTEMD_PATH, SYSTEMD, MANAGER)
UNKNOWN = "org.freedesktop.DBus.Error.UnknownProperty"
VALUES = {
    "org.freedesktop.systemd1.Unit": {
        "LoadState": ("s", "loaded"),
        "InvocationID": ("ay", bytes(range(16))),
    },
    "org.freedesktop.systemd1.Service": {"MainPID": ("u", 42)},
}


class Systemd:
    """Answers as systemd does, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[object, ...]]] = []

    def answer(self, message: Message) -> Answer:
        fields, body = message.header.fields, message.body
        member = fields[HeaderFields.member]
        self.asked.append((member, body))
        match member:
            case "Get" if fields[HeaderFields.path] == unit_path(ABSENT):
                return "v", (("s", "not-found") if body[1] == "LoadState" else ("u", 0),)
            case "Get":
                value = VALUES[body[0]].get(body[1])
                return ("v", (value,)) if value else ("!", (UNKNOWN, "unknown"))
            case "StartTransientUnit":
                return "o", ("/org/freedesktop/systemd1/job/1",)
            case "ListUnitsByPatterns":
                path = unit_path(OURS)
                row = (OURS, "a task", "loaded", "active", "running", "", path, 0, "", "/")
                return "a(ssssssouso)", ([row],)
            case "Inhibit":
                return "h", (os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC),)
            case _:
                return "", ()


class World:
    """A private bus with a systemd on it, and a manager that listens."""

    def __init__(self, private: PrivateBus, watch: Watch) -> None:
        self.private, self.watch, self.systemd = private, watch, Systemd()
        self.news: list[tuple[object, ...]] = []
        self.service = private.service(SYSTEMD, self.systemd.answer)
        self.manager = Manager(
            private.address,
            watch,
            on_up=lambda: self.news.append(("up",)),
            on_down=lambda: self.news.append(("down",)),
            on_job=lambda unit, result: self.news.append(("job", unit, result)),
            on_new_job=lambda unit: self.news.append(("new", unit)),
            on_reloaded=lambda: self.news.append(("reloaded",)),
            on_shutdown=lambda is_begun: self.news.append(("shutdown", is_begun)),
        )
        turn_until(watch, lambda: self.manager.is_up)

    def found(self, unit: str, *names: str) -> Found:
        got: list[Found] = []
        self.manager.get(unit, names, got.append)
        turn_until(self.watch, lambda: got)
        return got[0]

    def listing(self) -> Listing:
        got: list[Listing] = []
        self.manager.listing(got.append)
        turn_until(self.watch, lambda: got)
        return got[0]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    private, watch = PrivateBus(tmp_path), Watch()
    private.start()
    made = World(private, watch)
    yield made
    made.manager.close()
    made.service.close()
    private.kill()
    watch.close()


def test_it_subscribes_before_it_is_up(world: World) -> None:
    assert world.news == [("up",)]
    assert world.systemd.asked[0] == ("Subscribe", ())


def test_news_of_other_units_are_dropped(world: World) -> None:
    job = "/org/freedesktop/systemd1/job/1"
    for unit in ("ssh.service", OURS):
        world.service.emit(EMITTER, "JobNew", ("uos", (1, job, unit)))
        world.service.emit(EMITTER, "JobRemoved", ("uoss", (1, job, unit, "done")))
    world.service.emit(EMITTER, "JobRemoved", ("s", ("of another shape",)))
    world.service.emit(EMITTER, "Reloading", ("b", (True,)))
    world.service.emit(EMITTER, "Reloading", ("b", (False,)))
    turn_until(world.watch, lambda: ("reloaded",) in world.news)
    assert world.news == [("up",), ("new", OURS), ("job", OURS, "done"), ("reloaded",)]


def test_properties_come_together_and_unknown_ones_are_absent(world: World) -> None:
    found = world.found(OURS, "LoadState", "InvocationID", "MainPID", "MemoryPeak")
    assert found == Found(
        {"LoadState": "loaded", "InvocationID": bytes(range(16)).hex(), "MainPID": 42}
    )
    assert world.found(ABSENT, "LoadState", "MainPID") == Found({}, NO_SUCH_UNIT)
    assert world.listing() == Listing([Row(OURS, "loaded", "active", "running")])


def test_orders_reach_it_as_it_understands_them(world: World) -> None:
    got: list[Reply] = []
    properties = [("Description", ("s", "a task")), ("MemoryMax", ("t", 1 << 30))]
    world.manager.start(OURS, properties, got.append)
    world.manager.kill(OURS, "all", 15)
    world.manager.freeze(OURS, is_frozen=True)
    world.manager.freeze(OURS, is_frozen=False)
    world.manager.stop(OURS, got.append)
    world.manager.forget(OURS)
    turn_until(world.watch, lambda: len(got) == 2 and world.systemd.asked[-1][0] == "UnrefUnit")
    assert not any(reply.error for reply in got)
    assert world.systemd.asked[1:] == [
        ("StartTransientUnit", (OURS, "fail", properties, [])),
        ("KillUnit", (OURS, "all", 15)),
        ("FreezeUnit", (OURS,)),
        ("ThawUnit", (OURS,)),
        ("StopUnit", (OURS, "replace")),
        ("ResetFailedUnit", (OURS,)),
        ("UnrefUnit", (OURS,)),
    ]


def test_a_manager_that_comes_back_is_subscribed_to_again_and_that_is_told(world: World) -> None:
    world.service.close()
    world.service = world.private.service(SYSTEMD, world.systemd.answer)
    turn_until(world.watch, lambda: ("reloaded",) in world.news)
    assert [name for name, _ in world.systemd.asked] == ["Subscribe", "Subscribe"]
    assert ("down",) not in world.news, "the bus was there all the time"


def test_a_lost_bus_leaves_every_question_answered(world: World) -> None:
    found: list[Found] = []
    listings: list[Listing] = []
    locks: list[int] = []
    world.private.kill()
    world.manager.get(OURS, ["MainPID"], found.append)
    world.manager.listing(listings.append)
    world.manager.inhibit(locks.append)
    turn_until(world.watch, lambda: found and listings and locks)
    assert (found, listings, locks) == (
        [Found({}, DISCONNECTED)],
        [Listing([], DISCONNECTED)],
        [-1],
    )
    turn_until(world.watch, lambda: ("down",) in world.news)
    assert world.news == [("up",), ("down",)]


def test_a_shutdown_is_announced_and_can_be_held_up(world: World) -> None:
    logind = world.private.service(LOGIND, world.systemd.answer)
    locks: list[int] = []
    world.manager.inhibit(locks.append)
    turn_until(world.watch, lambda: locks)
    assert os.readlink(f"/proc/self/fd/{locks[0]}") == "/dev/null"
    os.close(locks[0])
    emitter = DBusAddress("/org/freedesktop/login1", LOGIND, f"{LOGIND}.Manager")
    logind.emit(emitter, "PrepareForShutdown", ("b", (True,)))
    turn_until(world.watch, lambda: ("shutdown", True) in world.news)
    logind.close()


def test_unit_names_become_object_paths_as_systemd_escapes_them() -> None:
    base = "/org/freedesktop/systemd1/unit/"
    assert unit_path(OURS) == f"{base}ckptd_2dtask_2d7_2d1_2eservice"
    assert unit_path("7a.service") == f"{base}_37a_2eservice"
    assert unit_path("ż_") == f"{base}_c5_bc_5f"
    assert unit_path("") == f"{base}_"
