"""Signals to a running unit, and its pauses, while the service manager or its bus is away."""

import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jeepney import HeaderFields, Message

from ckptd.core.port import Deliver, Effect, Freeze, Sighting, StartSeen
from ckptd.units.bus import CALLS_IN_FLIGHT_MAX, DISCONNECTED, NO_REPLY, Reply
from ckptd.units.recorder import Began, Records
from ckptd.units.runner import UnitRunner
from ckptd.units.systemd import SYSTEMD, is_lost
from tests.private_bus import Answer, PrivateBus
from tests.waiting import until

BOOT = "8a0f2fb3-c19d-77e4-8a0f-2fb3c19d77e4"
UNIT = "ckptd-task-7-1.service"
NO_REPLY_ERROR = "org.freedesktop.DBus.Error.NoReply"
INVOCATION = "ab" * 16
TERM, KILL = signal.SIGTERM, signal.SIGKILL
STOP, CONT = ("all", int(signal.SIGSTOP)), ("all", int(signal.SIGCONT))


class OneUnit:
    """A systemd that runs one unit; its `signals` are those that got there: (whom, number)."""

    def __init__(self) -> None:
        self.signals: list[tuple[str, int]] = []
        self.is_deaf = False  # it reads a signal, does nothing, and does not answer
        self.is_mute = False  # it does it, and does not answer
        self.heard = threading.Event()
        self.main = 0
        self.subscribers = 0

    def answer(self, message: Message) -> Answer | None:
        fields, body = message.header.fields, message.body
        match fields[HeaderFields.member]:
            case "ListUnitsByPatterns":
                row = (UNIT, "", "loaded", "active", "running", "", "/a", 0, "", "/")
                return "a(ssssssouso)", ([row],)
            case "Get":
                return self._value(body[1])
            case "Subscribe":
                self.subscribers += 1
            case "KillUnit" if self.is_deaf:
                self.heard.set()
                return None
            case "KillUnit":
                self.signals.append((body[1], body[2]))
                return None if self.is_mute else ("", ())
        return "", ()

    def _value(self, name: str) -> Answer:
        values = {
            "LoadState": ("s", "loaded"),
            "ActiveState": ("s", "active"),
            "InvocationID": ("ay", bytes.fromhex(INVOCATION)),
            "ExecMainPID": ("u", self.main),
            "ExecMainStartTimestamp": ("t", 5),
            "Job": ("(uo)", (0, "/")),
        }
        if name not in values:
            return "!", ("org.freedesktop.DBus.Error.UnknownProperty", name)
        return "v", (values[name],)


class Bench:
    """A runner that has taken up attempt 1 of task 7; the bus and systemd come and go."""

    def __init__(self, directory: Path, main: int = 0) -> None:
        self.bus = PrivateBus(directory)
        self.bus.start()
        self.systemd = OneUnit()
        self.systemd.main = main or os.getpid()
        self.service = self.bus.service(SYSTEMD, self.systemd.answer)
        self._dirs = f"{directory}/state", f"{directory}/run"
        records = Records(*self._dirs, BOOT)
        records.make((7, 1))
        records.note_start((7, 1), Began(5, self.systemd.main, 0, INVOCATION))
        os.makedirs(f"{directory}/state/output")
        self.seen: list[Sighting] = []
        self.runner = self.make()

    def make(self) -> UnitRunner:
        address = self.bus.address
        self.runner = UnitRunner(*self._dirs, bus_address=address, is_system=False, boot_id=BOOT)
        self.runner.adopt(7, 1)
        return self.runner

    def is_running(self) -> None:
        self.turn_until(lambda: any(isinstance(one, StartSeen) for one in self.seen))

    def do(self, *effects: Effect) -> None:
        for effect in effects:
            self.runner.carry_out(effect)

    def turn_until(self, condition: Callable[[], object]) -> None:
        def is_so() -> bool:
            select.select([self.runner], [], [], 0.01)
            self.seen += self.runner.poll()
            return bool(condition())

        until(is_so, every_s=0.0)

    def got(self, *signals: tuple[str, int]) -> None:
        """Wait until systemd got these, and no others before."""
        self.turn_until(lambda: len(self.systemd.signals) >= len(signals))
        assert self.systemd.signals == [*signals]

    def systemd_goes(self) -> None:
        """It is executed anew: its name is gone, the connection to the bus stays."""
        self.service.close()

    def systemd_comes(self) -> None:
        self.service = self.bus.service(SYSTEMD, self.systemd.answer)

    def bus_goes(self) -> None:
        self.bus.kill()
        self.service.close()
        self.turn_until(lambda: not self.runner._manager.is_up)

    def bus_comes(self) -> None:
        self.bus.start()
        self.systemd_comes()

    def is_idle(self) -> bool:
        """All that was sent is answered, or known not to be."""
        return not self.runner._manager._bus._in_flight

    def is_refused(self) -> bool:
        """What was sent did not get there, and is known not to have."""
        one = self.runner._instances[7, 1]
        return bool(one.pending) and one.under_way is None

    def close(self) -> None:
        self.runner.close()
        self.service.close()
        self.bus.kill()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def deliver(number: int, *, tree: bool) -> Deliver:
    return Deliver(7, 1, number, tree)


@pytest.mark.parametrize(("number", "tree"), [(TERM, False), (KILL, True)])
def test_a_signal_was_lost_that_was_sent_while_systemd_was_executed_anew(
    bench: Bench, number: int, *, tree: bool
) -> None:
    bench.is_running()
    bench.systemd_goes()
    bench.do(deliver(number, tree=tree))
    bench.turn_until(bench.is_refused)
    bench.systemd_comes()

    bench.turn_until(lambda: ("all" if tree else "main", number) in bench.systemd.signals)


def test_signals_overtook_each_other_where_the_first_was_sent_again(bench: Bench) -> None:
    bench.is_running()
    bench.systemd_goes()
    bench.do(deliver(signal.SIGSTOP, tree=False))
    bench.turn_until(bench.is_refused)
    bench.systemd_comes()
    bench.do(deliver(signal.SIGCONT, tree=False))

    bench.got(("main", signal.SIGSTOP), ("main", signal.SIGCONT))


def test_a_stop_signal_came_twice_where_its_answer_was_lost(bench: Bench) -> None:
    bench.is_running()
    bench.systemd.is_mute = True
    bench.do(deliver(TERM, tree=False))
    bench.got(("main", TERM))
    bench.systemd_goes()
    bench.turn_until(bench.is_idle)
    bench.systemd.is_mute = False
    bench.systemd_comes()
    bench.do(deliver(signal.SIGUSR1, tree=False))

    bench.got(("main", TERM), ("main", signal.SIGUSR1))


@pytest.mark.parametrize(("number", "tree"), [(TERM, False), (KILL, True)])
def test_a_signal_was_dropped_behind_too_many_that_waited(
    bench: Bench, number: int, *, tree: bool
) -> None:
    bench.is_running()
    bench.systemd_goes()
    for _ in range(100):
        bench.do(deliver(signal.SIGUSR1, tree=False))
    bench.do(deliver(number, tree=tree))
    bench.turn_until(bench.is_refused)
    bench.systemd_comes()

    whole = [("all", int(KILL))]
    bench.got(*(whole if tree else [("main", int(signal.SIGUSR1)), ("main", number)]))


def test_of_signals_that_wait_the_last_word_of_a_stop_and_its_end_counts(bench: Bench) -> None:
    bench.is_running()
    bench.systemd_goes()
    for number in (signal.SIGSTOP, signal.SIGCONT, signal.SIGSTOP):
        bench.do(deliver(number, tree=False))
    bench.turn_until(bench.is_refused)
    bench.systemd_comes()

    bench.turn_until(lambda: bench.systemd.signals[-1:] == [("main", signal.SIGSTOP)])


def test_a_signal_behind_one_that_was_not_answered_was_lost_with_the_bus(bench: Bench) -> None:
    bench.is_running()
    bench.systemd.is_deaf = True
    bench.do(deliver(signal.SIGUSR1, tree=False), deliver(TERM, tree=False))
    bench.turn_until(bench.systemd.heard.is_set)
    bench.bus_goes()
    bench.systemd.is_deaf = False
    bench.bus_comes()

    bench.got(("main", TERM))


def test_a_signal_that_waited_for_room_on_the_bus_was_lost_with_it(bench: Bench) -> None:
    bench.is_running()
    bench.turn_until(bench.is_idle)
    bench.systemd.is_deaf = True
    for number in range(CALLS_IN_FLIGHT_MAX):
        bench.runner._manager.kill(f"other-{number}.service", "main", TERM, lambda _: None)
    bench.do(deliver(TERM, tree=False))
    bench.turn_until(bench.systemd.heard.is_set)
    bench.bus_goes()
    bench.systemd.is_deaf = False
    bench.bus_comes()

    bench.got(("main", TERM))


@pytest.mark.parametrize("whom", ["main", "all"])
def test_a_last_signal_that_systemd_had_read_when_its_bus_died_was_lost(
    bench: Bench, whom: str
) -> None:
    bench.is_running()
    bench.systemd.is_deaf = True
    bench.do(deliver(KILL, tree=whom == "all"))
    bench.turn_until(bench.systemd.heard.is_set)
    bench.bus_goes()
    bench.systemd.is_deaf = False
    bench.bus_comes()

    bench.turn_until(lambda: (whom, KILL) in bench.systemd.signals)


def test_a_kill_that_was_answered_is_sent_again_to_a_systemd_that_comes_back(
    bench: Bench,
) -> None:
    bench.is_running()
    bench.do(deliver(KILL, tree=True))
    bench.got(("all", KILL))
    bench.systemd_goes()
    bench.systemd_comes()

    bench.got(("all", KILL), ("all", KILL))


def test_nothing_goes_to_a_whole_unit_whose_end_is_being_recorded(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    bench = Bench(tmp_path, ended.pid)
    bench.is_running()
    bench.do(deliver(KILL, tree=True), Freeze(7, 1, frozen=True))
    bench.do(deliver(signal.SIGUSR1, tree=True), deliver(KILL, tree=True))
    bench.systemd_goes()
    bench.systemd_comes()
    bench.turn_until(lambda: bench.systemd.subscribers == 2)
    bench.turn_until(bench.is_idle)

    bench.do(deliver(TERM, tree=False))

    bench.got(("main", TERM))
    bench.close()


def test_a_kill_that_was_lost_is_not_sent_again_to_who_records_the_end(tmp_path: Path) -> None:
    main = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    bench = Bench(tmp_path, main.pid)
    bench.is_running()
    bench.systemd.is_mute = True
    bench.do(deliver(KILL, tree=True))
    bench.got(("all", KILL))
    main.communicate(b"")
    bench.turn_until(lambda: bench.runner._instances[7, 1].is_main_gone)
    bench.systemd_goes()
    bench.turn_until(bench.is_idle)
    bench.systemd.is_mute = False
    bench.systemd_comes()
    bench.turn_until(lambda: bench.systemd.subscribers == 2)
    bench.do(deliver(TERM, tree=False))

    bench.got(("all", KILL), ("main", TERM))
    bench.close()


def test_a_unit_that_was_resumed_while_the_bus_was_away_stayed_stopped_for_ever(
    bench: Bench,
) -> None:
    bench.is_running()
    bench.do(Freeze(7, 1, frozen=True))
    bench.got(STOP)
    bench.bus_goes()
    bench.do(Freeze(7, 1, frozen=False))
    bench.bus_comes()

    bench.got(STOP, CONT)


def test_a_unit_that_was_resumed_before_a_new_daemon_reached_systemd_stayed_stopped(
    bench: Bench,
) -> None:
    bench.do(Freeze(7, 1, frozen=True), Freeze(7, 1, frozen=False))

    bench.is_running()
    bench.got(CONT)


def test_a_resume_and_a_pause_that_waited_are_told_as_the_last_of_them(bench: Bench) -> None:
    bench.is_running()
    bench.systemd_goes()
    bench.do(Freeze(7, 1, frozen=True))
    bench.turn_until(lambda: bench.runner._instances[7, 1].wish)
    bench.do(Freeze(7, 1, frozen=False))
    bench.systemd_comes()

    bench.got(CONT)


def test_a_pause_that_nobody_answered_does_not_undo_the_resume_after_it(bench: Bench) -> None:
    bench.is_running()
    bench.systemd.is_deaf = True
    bench.do(Freeze(7, 1, frozen=True))
    bench.turn_until(bench.systemd.heard.is_set)
    bench.systemd.is_deaf = False
    bench.do(Freeze(7, 1, frozen=False))
    bench.got(CONT)

    bench.systemd_goes()
    bench.turn_until(bench.is_idle)
    bench.systemd_comes()
    bench.do(deliver(TERM, tree=False))

    bench.got(CONT, ("main", TERM))


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        ("", False),
        ("org.freedesktop.systemd1.NoSuchUnit", False),
        ("org.freedesktop.systemd1.NoSuchProcess", False),
        ("org.freedesktop.DBus.Error.InvalidArgs", False),
        ("org.freedesktop.DBus.Error.ServiceUnknown", True),
        (NO_REPLY_ERROR, True),
        (NO_REPLY, True),
        (DISCONNECTED, True),
        ("org.freedesktop.DBus.Error.Timeout", True),
    ],
)
def test_only_what_may_not_have_got_there_is_sent_again(error: str, *, is_so: bool) -> None:
    assert is_lost(Reply((), error)) == is_so
