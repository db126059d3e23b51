"""The rows of the table in design 13: each is a figure, what it is a ratio of, and its goal."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench import references
from bench.rig import Clients, Rig, quantile, rig, tmpfs
from ckptd.core import image
from ckptd.core.apply import apply
from ckptd.core.records import Phase, Spec, Submitted
from ckptd.core.state import State
from ckptd.storage import blobs, facts
from ckptd.storage.journal import Journal

HELD = {"tasks": [{"argv": ["/bin/true"], "hold": True}]}
TRUE = {"argv": ["/bin/true"]}
BULK = 10_000
MANY = 100_000
LIVE_TASKS = 1_000_000
ROUNDS = 3


class Figure(NamedTuple):
    """One line of the table. `goal` is a bound on `value`: at most (<=) or at least (>=)."""

    what: str
    value: float
    unit: str
    sense: str
    goal: float
    beside: str  # the reference, or what else is worth knowing

    @property
    def is_met(self) -> bool:
        """Tell whether the goal is reached."""
        return self.value <= self.goal if self.sense == "<=" else self.value >= self.goal


class Speeds(NamedTuple):
    """The best of some rounds that took turns, so that a noisy moment spoils nobody's figure."""

    sync_s: float
    ping_s: float
    submit_s: float
    sqlite_per_s: float
    by_8_per_s: float
    by_64_per_s: float
    unsynced_per_s: float


def _speeds(base: str, free: str) -> Speeds:
    """Measure all that `submits` compares.

    `free` is a tmpfs, where the same daemon syncs for free; without one the reference is `ping`,
    which does less and is harder to reach.
    """
    rounds: list[Speeds] = []
    with rig(base) as synced, rig(free or base) as unsynced:
        for _ in range(ROUNDS):
            one, many = Clients(synced.endpoint, 1), Clients(unsynced.endpoint, 64)
            one.latencies_s("ping", {}, 300)  # warm
            rounds.append(
                Speeds(
                    -references.sync_s(Path(base)),
                    -quantile(one.latencies_s("ping", {}, 1_000), 0.5),
                    -quantile(one.latencies_s("submit", HELD, 1_000), 0.5),
                    references.sqlite_per_s(Path(base)),
                    _saturated(synced, 8),
                    _saturated(synced, 64),
                    _saturated(unsynced, 64) if free else many.per_second("ping", {}, 10_000),
                )
            )
            one.close()
            many.close()
    return Speeds(*(abs(max(column)) for column in zip(*rounds, strict=True)))


def submits(base: str) -> list[Figure]:
    """Measure durable submits of one, eight and 64 clients."""
    free = tmpfs()
    best = _speeds(base, free)
    floor_s = best.ping_s + best.sync_s
    called = "same daemon, syncs free on a tmpfs" if free else "ping, which does less"
    return [
        Figure(
            "durable submits, saturated", best.by_64_per_s / best.unsynced_per_s, "x", ">=", 0.92,
            f"{best.by_64_per_s:,.0f}/s of {best.unsynced_per_s:,.0f}/s ({called})",
        ),
        Figure(
            "one client, p50 of a submit", best.submit_s / floor_s, "x", "<=", 1.15,
            f"{best.submit_s * 1e6:.0f} us of {best.ping_s * 1e6:.0f} us trip"
            f" + {best.sync_s * 1e6:.0f} us sync",
        ),
        Figure(
            "8 clients", best.by_8_per_s * best.sync_s, "x", ">=", 2.5,
            f"{best.by_8_per_s:,.0f}/s of {1 / best.sync_s:,.0f}/s bare syncs"
            " (about beanstalkd -f0)",
        ),
        Figure(
            "64 clients", best.by_64_per_s / best.sqlite_per_s, "x", ">=", 8,
            f"of {best.sqlite_per_s:,.0f}/s SQLite WAL FULL",
        ),
    ]  # fmt: skip


def _saturated(one: Rig, count: int) -> float:
    """Return durable submits per second of so many clients."""
    clients = Clients(one.endpoint, count)
    clients.per_second("submit", HELD, 1_000)  # warm
    rate = clients.per_second("submit", HELD, 10_000)
    clients.close()
    return rate


def starts(base: str) -> list[Figure]:
    """Measure how soon a task starts and how many short ones get through."""
    spawn, new_file_s = references.spawn_per_s(), references.new_file_s(Path(base))
    with rig(base) as one:
        clients = Clients(one.endpoint, 1)
        clients.ask("group_set", {"name": "default", "parallel": 8})
        took = sorted(_start_s(clients) for _ in range(200))
        began = time.perf_counter()
        ids = clients.ask("submit", {"tasks": [TRUE] * 1_000})["ids"]
        while not clients.ask("wait", {"select": {"ids": ids}})["met"]:  # Bound: ask times out
            continue
        rate = 1_000 / (time.perf_counter() - began)
        clients.close()
    p50_s, p99_s = quantile(took, 0.5), quantile(took, 0.99)
    return [
        Figure("submit to start, p50", p50_s * 1e3, "ms", "<=", 3,
               f"{p50_s * spawn:.1f} x one posix_spawn and wait"),
        Figure("submit to start, p99", p99_s * 1e3, "ms", "<=", 10, "of 200, idle daemon"),
        Figure("1,000 x /bin/true, 8 at once", rate, "/s", ">=", 1_000,
               f"{rate / spawn:.2f} x a bare posix_spawn loop ({spawn:,.0f}/s);"
               f" a new file costs {new_file_s * 1e6:.0f} us here"),
    ]  # fmt: skip


def _start_s(clients: Clients) -> float:
    began_ns = time.time_ns()
    ids = clients.ask("submit", {"tasks": [TRUE]})["ids"]
    row: dict[str, Any] = clients.ask("wait", {"select": {"ids": ids}})["tasks"][0]
    return float(row["started_ns"] - began_ns) / 1e9


def sizes(base: str) -> list[Figure]:
    """Measure bulk submits, memory, a full queue, and the way back after kill -9."""
    with rig(base) as fresh:
        pass
    with rig(base) as one:
        empty_bytes = one.resident_bytes()
        clients = Clients(one.endpoint, 1)
        clients.ask("group_set", {"name": "default", "paused": True})
        clients.latencies_s("submit", HELD, 300)
        at_0_s = quantile(clients.latencies_s("submit", HELD, 1_000), 0.5)
        frames = [clients.frame("submit", {"tasks": [TRUE] * BULK}) for _ in range(MANY // BULK)]
        began = time.perf_counter()
        for frame in frames:
            clients.sockets[0].send(frame)
        for _ in frames:
            clients.sockets[0].recv()
        bulk = MANY / (time.perf_counter() - began)
        full_bytes = one.resident_bytes()
        at_many_s = quantile(clients.latencies_s("submit", HELD, 1_000), 0.5)
        one.kill()
        replay_s = _replay_s(one) - _replay_s(fresh)
        ready_s = one.start()
        again_bytes = one.resident_bytes()
        status_s = _status_s(one)
        clients.close()
    bare_s = references.interpreter_s()
    per_task = (again_bytes - empty_bytes) / MANY
    return [
        Figure("bulk submit, one client", bulk / 1e3, "k/s", ">=", 200, f"{BULK:,} a request"),
        Figure("n-th submit, 100 k queued", at_many_s / at_0_s, "x", "<=", 1.1,
               f"{at_many_s * 1e6:.0f} us of {at_0_s * 1e6:.0f} us on an empty queue"),
        Figure("replay", MANY / replay_s / 1e6, "M/s", ">=", 2.5,
               "records a second, by `ckptctl wal replay` against that of an empty log"),
        Figure("ready after kill -9, 100 k", ready_s, "s", "<=", 0.25,
               f"of it {bare_s:.2f} s for a bare interpreter"),
        Figure("memory, empty", empty_bytes / 1e6, "MB", "<=", 25, ""),
        Figure("memory, 100 k queued", again_bytes / 1e6, "MB", "<=", 75,
               f"{per_task:,.0f} B a task after a restart; {full_bytes / 1e6:.0f} MB before it"),
        Figure("ckptctl status", status_s * 1e3, "ms", "<=", 80,
               f"{status_s / bare_s:.1f} x a bare interpreter; 100 k tasks queued"),
    ]  # fmt: skip


def _replay_s(one: Rig) -> float:
    state = str(one.root / "state")
    return _run_s([sys.executable, "-m", "ckptctl", "wal", "replay", "--state", state])


def _status_s(one: Rig) -> float:
    """Return what a person waits for: on a terminal, where `status` is a digest."""
    theirs, ours = os.openpty()
    try:
        command = [sys.executable, "-m", "ckptctl", "--endpoint", one.endpoint, "status"]
        return _run_s(command, ours, lambda: os.read(theirs, 1 << 20))
    finally:
        os.close(ours)
        os.close(theirs)


def _run_s(
    command: list[str],
    stdout: int = subprocess.DEVNULL,
    drain: Callable[[], object] = lambda: None,
) -> float:
    """Return the p50 of running a command."""
    took = []
    for _ in range(15):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=stdout, stderr=subprocess.DEVNULL)
        drain()
        took.append(time.perf_counter() - began)
    return quantile(sorted(took), 0.5)


def idle(base: str) -> list[Figure]:
    """Measure what a daemon costs that has nothing to do."""
    seconds = 10.0
    with rig(base) as one:
        time.sleep(2.0)  # what follows a start is over
        cpu_s, wakeups = one.cpu_and_wakeups()
        time.sleep(seconds)
        cpu_then_s, wakeups_then = one.cpu_and_wakeups()
    rate = (wakeups_then - wakeups) / seconds
    return [
        Figure("idle, CPU", 100 * (cpu_then_s - cpu_s) / seconds, "%", "<=", 0.1, ""),
        Figure("idle, wakeups", rate, "/s", "<=", 1, "all threads"),
    ]


def slices(base: str) -> list[Figure]:
    """Measure in-process what a snapshot costs one turn, and what a durable fact costs a task."""
    state = State(indexed=False)
    spec = msgspec.Raw(
        msgspec.msgpack.encode(Spec(("python", "job.py"), cwd="/home/me", name="job"))
    )
    for number in range(1, LIVE_TASKS + 1):
        made = Submitted(number, 1, 0, "default", 0, b"", Phase.QUEUED, "", 0, 0, "", (), spec)
        apply(state, number, made)
    state.index()
    longest_s, began = 0.0, time.perf_counter()
    for _ in image.chunks(state):
        longest_s = max(longest_s, time.perf_counter() - began)
        began = time.perf_counter()
    sync_s = references.sync_s(Path(base))
    with tempfile.TemporaryDirectory(dir=base) as directory:
        task_dir = f"{directory}/1"
        blobs.prepare(task_dir, 1, os.getuid(), os.getgid(), fresh=False)
        journal = Journal(task_dir, 1, 1, 1)
        took = []
        for number in range(1_000):
            began = time.perf_counter()
            journal.append([facts.item_done(f"item-{number}", "pass")])
            took.append(time.perf_counter() - began)
    fact_s = quantile(sorted(took), 0.5)
    return [
        Figure("snapshot, longest slice", longest_s * 1e3, "ms", "<=", 1,
               f"{LIVE_TASKS:,} tasks; the loop goes on between slices"),
        Figure("durable item result", fact_s / sync_s, "x", "<=", 1.3,
               f"{fact_s * 1e6:.0f} us of {sync_s * 1e6:.0f} us for one sync"),
    ]  # fmt: skip
