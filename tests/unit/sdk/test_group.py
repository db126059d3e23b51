"""Many threads, one journal: grouped, complete, and nobody pays for another's trouble."""

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from ckptd.sdk import CheckpointTooLarge, LeaseLost, run_local
from ckptd.sdk.group import Appends, Recorder
from ckptd.sdk.surroundings import Surroundings
from ckptd.sdk.work import Ports
from ckptd.storage import facts
from ckptd.storage.journal import FACTS_PER_FRAME_MAX, Fact, Journal, StaleAttempt
from ckptd.storage.taskdir import prepare
from tests.waiting import until

THREADS = 8


class Counted:
    """A journal that counts its appends, and holds the first one until it is let go."""

    def __init__(self, real: Appends, *, is_held: bool = False) -> None:
        self.real = real
        self.groups: list[int] = []
        self.is_free = threading.Event()
        if not is_held:
            self.is_free.set()

    def append(self, facts: list[Fact]) -> int:
        self.groups.append(len(facts))
        self.is_free.wait(30)
        return self.real.append(facts)

    def close(self) -> None:
        self.real.close()


def ready(path: Path, attempt: int = 1) -> Journal:
    path.mkdir(exist_ok=True)
    prepare(str(path), attempt, os.getuid(), os.getgid(), fresh=False)
    return Journal(str(path), 0, attempt, 0)


def known(path: Path) -> facts.Facts:
    return facts.read_facts(str(path), 0, os.getuid(), 99)


def in_threads(call: Callable[[int], None], count: int = THREADS) -> list[threading.Thread]:
    started = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for one in started:
        one.start()
    return started


def test_threads_that_record_meanwhile_share_one_append(tmp_path: Path) -> None:
    journal = Counted(ready(tmp_path / "t"), is_held=True)
    recorder = Recorder(journal)
    recorded: list[int] = []

    def record(number: int) -> None:
        recorder.record([facts.set_value(f"k{number}", number)])
        recorded.append(number)

    first = in_threads(record, 1)
    until(lambda: journal.groups)
    rest = in_threads(lambda number: record(number + 1), THREADS)
    until(lambda: len(recorder._queue) == THREADS)
    assert not recorded, "nobody returns before the sync"
    journal.is_free.set()
    for one in first + rest:
        one.join(10)

    assert journal.groups == [1, THREADS]
    assert sorted(recorded) == list(range(THREADS + 1))
    assert known(tmp_path / "t").values == {f"k{n}": n for n in range(THREADS + 1)}


def test_many_threads_and_many_records_make_fewer_appends_than_calls(tmp_path: Path) -> None:
    journal = Counted(ready(tmp_path / "t"))
    recorder = Recorder(journal)

    def record(number: int) -> None:
        for serial in range(40):
            recorder.record([facts.set_value(f"{number}-{serial}", serial)])

    for one in in_threads(record):
        one.join(30)

    assert len(known(tmp_path / "t").values) == THREADS * 40
    assert len(journal.groups) < THREADS * 40


def test_a_fact_that_is_too_large_costs_the_others_nothing(tmp_path: Path) -> None:
    def function(ctx: Any) -> list[str]:
        failed: list[str] = []

        def record(number: int) -> None:
            value = "x" * (2 << 20 if number == 3 else 10)
            try:
                ctx.set_intermediate_result(f"k{number}", value)
            except CheckpointTooLarge:
                failed.append(f"k{number}")

        gate = threading.Thread(target=ctx.set_intermediate_result, args=("first", 1))
        gate.start()
        until(lambda: journals[0].groups)
        threads = in_threads(record)
        until(lambda: len(ctx._work.recorder._queue) == THREADS)
        journals[0].is_free.set()
        for one in [gate, *threads]:
            one.join(10)
        return failed

    journals: list[Counted] = []

    def counted(around: Surroundings) -> Appends:
        journals.append(Counted(Ports().journal(around), is_held=True))
        return journals[0]

    assert run_local(function, tmp_path / "t", ports=Ports(journal=counted)) == ["k3"]

    found = known(tmp_path / "t").values
    assert sorted(found) == sorted(["first", *(f"k{n}" for n in range(THREADS) if n != 3)])
    assert journals[0].groups[:2] == [1, THREADS]


def test_one_call_with_more_facts_than_a_frame_takes_is_refused_whole(tmp_path: Path) -> None:
    journal = ready(tmp_path / "t")
    recorder = Recorder(journal)
    many = [facts.set_value(f"{n}", n) for n in range(FACTS_PER_FRAME_MAX + 2)]

    with pytest.raises(Exception, match="too many at once"):
        recorder.record(many)
    recorder.record([facts.set_value("after", 1)])

    assert known(tmp_path / "t").values == {"after": 1}


def test_all_threads_of_a_zombie_learn_that_the_lease_is_lost(tmp_path: Path) -> None:
    def function(ctx: Any) -> Any:
        prepare(ctx.directory, ctx.attempt + 1, os.getuid(), os.getgid(), fresh=False)
        lost: list[int] = []

        def record(number: int) -> None:
            try:
                ctx.set_intermediate_result(f"{number}", number)
            except LeaseLost:
                lost.append(number)

        for one in in_threads(record):
            one.join(10)
        assert sorted(lost) == list(range(THREADS))
        ctx.record_item("k", "pass")

    with pytest.raises(LeaseLost, match="attempt 2 exists"):
        run_local(function, tmp_path / "t")

    assert known(tmp_path / "t").count == 0


def test_after_a_stale_append_the_recorder_goes_on_refusing(tmp_path: Path) -> None:
    recorder = Recorder(ready(tmp_path / "t"))
    ready(tmp_path / "t", 2)

    for _ in range(3):
        with pytest.raises(StaleAttempt):
            recorder.record([facts.set_value("k", 1)])


class Struck(Exception):
    """What a signal's handler raises, wherever the main thread is just then."""


def test_an_exception_of_a_signal_strikes_anywhere_and_costs_no_recorded_fact(
    tmp_path: Path,
) -> None:
    recorder = Recorder(ready(tmp_path / "t"))
    recorded: list[str] = []
    is_armed = struck = 0
    is_over = threading.Event()

    def strike(number: int, frame: FrameType | None) -> None:
        nonlocal is_armed, struck
        if is_armed:
            is_armed, struck = 0, struck + 1
            raise Struck

    def beside(thread: int) -> None:
        serial = 0
        while not is_over.is_set():
            recorder.record([facts.set_value(f"{thread}-{serial}", serial)])
            recorded.append(f"{thread}-{serial}")
            serial += 1

    before = signal.signal(signal.SIGALRM, strike)
    outer_s = signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)[0]
    threads = in_threads(beside, 2)
    gc.disable()  # a collection runs callbacks of the test tools, which the blow must not hit
    try:
        for number in range(1500):
            try:
                is_armed = 1
                recorder.record([facts.set_value(f"main-{number}", number)])
                is_armed = 0
                recorded.append(f"main-{number}")
            except Struck:
                continue
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, outer_s)
        gc.enable()
        is_over.set()
        for one in threads:
            one.join(10)

    assert not any(one.is_alive() for one in threads), "somebody waits for a writer who left"
    assert struck > 20
    found = known(tmp_path / "t").values
    assert [key for key in recorded if key not in found] == []


class Stepped:
    """A journal that takes a step of the test within each of its appends, before it is durable."""

    def __init__(self, real: Appends, *steps: Callable[[], object]) -> None:
        self.real = real
        self.steps = list(steps)
        self.groups: list[int] = []

    def append(self, facts: list[Fact]) -> int:
        self.groups.append(len(facts))
        if self.steps:
            self.steps.pop(0)()
        return self.real.append(facts)

    def close(self) -> None:
        self.real.close()


def test_whoever_waits_for_a_writer_is_not_woken_before_it_is_durable(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    def look() -> None:
        seen.extend((one.is_settled, one.gate.locked()) for one in recorder._group)

    steps = (lambda: until(lambda: len(recorder._queue) == 3), look)
    journal = Stepped(ready(tmp_path / "t"), *steps)
    recorder = Recorder(journal)
    for one in in_threads(lambda n: recorder.record([facts.set_value(f"{n}", n)]), 4):
        one.join(10)

    assert seen == [(False, True)] * 3
    assert journal.groups == [1, 3]
    assert len(known(tmp_path / "t").values) == 4


def test_nobody_waits_for_one_who_was_struck_and_left(tmp_path: Path) -> None:
    """The main thread rides in a group, Ctrl-C takes it away, and then the writer has no memory."""
    has_left = threading.Event()

    def strike_and_fail() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        has_left.wait(10)
        raise MemoryError

    def struck(number: int, frame: FrameType | None) -> None:
        raise Struck

    steps = (lambda: until(lambda: len(recorder._queue) == 3), strike_and_fail)
    recorder = Recorder(Stepped(ready(tmp_path / "t"), *steps))

    def record(name: str, before: int) -> None:
        until(lambda: len(recorder._queue) == before)
        with contextlib.suppress(MemoryError):
            recorder.record([facts.set_value(name, 1)])

    def begin(name: str, before: int) -> threading.Thread:
        one = threading.Thread(target=record, args=(name, before), daemon=True)
        one.start()
        return one

    was = signal.signal(signal.SIGUSR1, struck)
    try:
        threads = [begin("first", 0)]
        until(lambda: recorder._group)
        threads += [begin("writer", 0)]
        until(lambda: len(recorder._queue) == 1)
        threads += [begin("last", 2)]
        with pytest.raises(Struck):
            recorder.record([facts.set_value("struck", 1)])
    finally:
        has_left.set()
        signal.signal(signal.SIGUSR1, was)
    for one in threads:
        one.join(10)

    assert not any(one.is_alive() for one in threads)
    assert sorted(known(tmp_path / "t").values) == ["first", "last"]


class StruckGate:
    """A gate that is opened just as a signal's exception strikes who opens it."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.is_struck = False

    def locked(self) -> bool:
        return bool(self.real.locked())

    def release(self) -> None:
        self.real.release()
        if not self.is_struck:
            self.is_struck = True
            raise Struck


class SlowLock:
    """A lock that takes a step of the test once somebody who was struck let it go."""

    def __init__(self, step: Callable[[], object]) -> None:
        self.lock = threading.Lock()
        self.step = step

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.lock.release()
        if kind is not None:
            self.step()


def test_a_writer_that_was_woken_as_its_forerunner_was_struck_wakes_its_riders(
    tmp_path: Path,
) -> None:
    has_left = threading.Event()

    def hand_on_badly() -> None:
        until(lambda: len(recorder._queue) == 2)
        heir: Any = recorder._queue[0]
        heir.gate = StruckGate(heir.gate)

    journal = Stepped(ready(tmp_path / "t"), hand_on_badly, lambda: has_left.wait(10))
    recorder = Recorder(journal)
    lock: Any = SlowLock(lambda: until(lambda: len(journal.groups) == 2))
    recorder._lock = lock

    def record(name: str) -> threading.Thread:
        facts_ = [facts.set_value(name, 1)]
        one = threading.Thread(target=recorder.record, args=(facts_,), daemon=True)
        one.start()
        return one

    def follow() -> None:
        until(lambda: journal.groups)
        threads.extend(record(name) for name in ("heir", "rider"))

    threads: list[threading.Thread] = []
    follower = threading.Thread(target=follow)
    follower.start()
    with pytest.raises(Struck):
        recorder.record([facts.set_value("struck", 1)])
    has_left.set()
    for one in [follower, *threads]:
        one.join(10)

    assert not any(one.is_alive() for one in threads)
    assert sorted(known(tmp_path / "t").values) == ["heir", "rider", "struck"]
