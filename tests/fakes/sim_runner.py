"""SimRunner: the Runner port over a machine in memory, deterministic and crashable.

The *machine* (`SimMachine`) is what outlives a daemon: processes, exit records, checkpoints, the
boot. A `SimRunner` is one daemon's view of it; throw it away without `close` and make another one
to crash the daemon. Time and chance come from outside: `now_ns` is set by the test, what happens
next is decided by `advance` (every attempt one step on) or by `step` (one seeded random event).

What a command does is told by a script, a function from Start to `Plan`; `default_script` knows
the few real commands that the conformance suite runs.
"""

import errno
import os
import random
import shlex
from collections import deque
from collections.abc import Callable
from enum import Enum

import msgspec

from ckptd.core.port import (
    Control,
    Delete,
    Deliver,
    DropCheckpoints,
    Effect,
    EndSeen,
    Forget,
    Freeze,
    Identity,
    MarkSeen,
    Sighting,
    Start,
    StartSeen,
    TelemetrySeen,
)

SIGKILL, SIGTERM, SIGSTOP, SIGCONT = 9, 15, 19, 18
HARMLESS = frozenset({17, 18, 23, 28})  # CHLD CONT URG WINCH: ignored by default


class Plan(msgspec.Struct, frozen=True):
    """How an attempt ends if nobody interferes; cause "" never ends by itself."""

    cause: str = ""
    code: int = 0
    signal: int = 0
    ignores: tuple[int, ...] = ()  # signals that the task lives through
    text: str = ""


Script = Callable[[Start], Plan]


def default_script(start: Start) -> Plan:
    """Understand true, false, sleep, `sh -c 'exit N'`, `sh -c 'kill -N $$'` and missing files."""
    words = list(start.argv)
    if words[:2] == ["sh", "-c"]:
        words = shlex.split(words[2])
    name = os.path.basename(words[0])
    if words[0].startswith("/") and not os.path.exists(words[0]):
        return Plan("spawn_error", errno.ENOENT, text=f"cannot execute {words[0]}")
    if not os.path.isdir(start.cwd):
        return Plan("spawn_error", errno.ENOENT, text=f"cannot enter {start.cwd}")
    if name == "exit":
        return Plan("exit", int(words[1]))
    if name == "kill":
        return Plan("signal", signal=int(words[1].lstrip("-")))
    if name == "sleep":
        return Plan()
    return Plan("exit", 1 if name == "false" else 0)


class Step(Enum):
    """Where an attempt of the machine is."""

    ORDERED = "ordered"
    RUNNING = "running"
    ENDED = "ended"


class SimAttempt:
    """One attempt on the machine: claim, main process and exit record in one."""

    def __init__(self, start: Start, plan: Plan, reign: int) -> None:
        self.start = start
        self.plan = plan
        self.reign = reign
        self.step = Step.ORDERED
        self.shim: Identity | None = None
        self.pid = 0
        self.started_ns = 0
        self.resumed_from = 0
        self.is_frozen = False
        self.pending: list[int] = []
        self.end: EndSeen | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.start.task, self.start.attempt


class SimMachine:
    """Everything that survives the daemon."""

    def __init__(self, script: Script = default_script, *, seed: int = 0) -> None:
        self.script = script
        self.random = random.Random(seed)
        self.now_ns = 1_000_000_000
        self.boots = 1
        self.attempts: dict[tuple[int, int], SimAttempt] = {}
        self.refused: set[tuple[int, int]] = set()  # claimed by a daemon: will never run
        self.checkpoints: dict[int, tuple[int, int]] = {}  # task -> (number, at_ns)
        self.retry_after_s: dict[int, float] = {}
        self.problems: dict[int, str] = {}
        self.controls: dict[int, Control] = {}
        self.begun: list[tuple[int, int]] = []  # every main process there ever was, in order
        self.viewer: SimRunner | None = None
        self._reigns = 0
        self._last_pid = 1_000

    @property
    def boot_id(self) -> str:
        return f"boot-{self.boots}"

    def alive(self) -> list[SimAttempt]:
        """Return the attempts whose main process exists, by name."""
        running = [one for one in self.attempts.values() if one.step is Step.RUNNING]
        return sorted(running, key=lambda one: one.key)

    # --- what happens on the machine ----------------------------------------------------------

    def advance(self) -> None:
        """Move every attempt one step on: ordered ones start, planned ends come."""
        for one in list(self.attempts.values()):
            if one.step is Step.ORDERED:
                self.begin(one)
            elif one.step is Step.RUNNING and one.plan.cause and not one.is_frozen:
                self.finish(*one.key, **msgspec.structs.asdict(one.plan))

    def step(self) -> None:
        """Let one random thing happen to one random attempt."""
        ordered = [one for one in self.attempts.values() if one.step is Step.ORDERED]
        chosen = sorted([*ordered, *self.alive()], key=lambda one: one.key)
        if not chosen:
            return
        one = self.random.choice(chosen)
        if one.step is Step.ORDERED:
            self.begin(one)
            return
        what = self.random.randrange(6)
        if what == 0:
            self.publish(*one.key)
        elif what == 1:
            self.kill_supervisor(*one.key)
        elif what == 2:
            self.finish(*one.key, "signal", signal=SIGKILL)
        elif not one.is_frozen:
            self.finish(*one.key, "exit", code=self.random.choice([0, 0, 1, 75, 85]))

    def begin(self, one: SimAttempt) -> None:
        """Start the main process; an order of an earlier daemon is void."""
        if one.reign != self._reigns:
            return
        assert one.key not in self.refused, f"{one.key} was refused and starts all the same"
        assert all(other.start.task != one.start.task for other in self.alive()), (
            f"two instances of task {one.start.task} at once"
        )
        self.begun.append(one.key)
        self._last_pid += 2
        one.shim = Identity(self.boot_id, self._last_pid, self.now_ns // 10_000_000)
        one.pid = self._last_pid + 1
        one.started_ns = self.now_ns
        one.resumed_from = self.checkpoints.get(one.start.task, (0, 0))[0]
        one.step = Step.RUNNING
        self._tell_start(one)
        self.signal_pending(one)

    def signal_pending(self, one: SimAttempt) -> None:
        """Deliver what was kept back, as long as there is somebody to get it."""
        pending, one.pending = one.pending, []
        for number in pending:
            if one.step is Step.RUNNING:
                self.signal(one, number)

    def finish(
        self,
        task: int,
        attempt: int,
        cause: str = "exit",
        code: int = 0,
        signal: int = 0,
        text: str = "",
        **_: object,
    ) -> None:
        """End a running attempt: record first, then the daemon, if there is one."""
        one = self.attempts[task, attempt]
        assert one.step is Step.RUNNING, f"{one.key} is not running"
        one.step = Step.ENDED
        one.end = EndSeen(
            task, attempt, cause, code, signal, started_ns=one.started_ns,
            ended_ns=self.now_ns, text=text,
        )  # fmt: skip
        self._tell_end(one)

    def kill_supervisor(self, task: int, attempt: int) -> None:
        """SIGKILL the supervisor: its tree dies with it, no exit code is known."""
        self.finish(task, attempt, "lost")

    def signal(self, one: SimAttempt, number: int) -> None:
        """Do to a main process what the kernel would do."""
        if number == SIGSTOP:
            one.is_frozen = True
        elif number == SIGCONT:
            one.is_frozen = False
        elif number == SIGKILL:
            self.finish(*one.key, "signal", signal=number)
        elif one.is_frozen:
            one.pending.append(number)
        elif number not in HARMLESS and number not in one.plan.ignores:
            self.finish(*one.key, "signal", signal=number)

    def publish(self, task: int, attempt: int) -> int:
        """Have the task save a checkpoint; return its number."""
        number = self.checkpoints.get(task, (0, 0))[0] + 1
        self.checkpoints[task] = (number, self.now_ns)
        if self.viewer is not None and (task, attempt) in self.viewer.known:
            self.viewer.see(self.mark(task, attempt))
        return number

    def say(self, task: int, attempt: int, done: float, total: float, text: str = "") -> None:
        """Have the task send a notify line; nobody listens where there is no daemon."""
        if self.viewer is not None and (task, attempt) in self.viewer.known:
            self.viewer.see(TelemetrySeen(task, attempt, done, total, text, self.now_ns))

    def crash_daemon(self) -> None:
        """The daemon is gone; orders that no supervisor has read yet will not be carried out."""
        self.viewer = None

    def reboot(self) -> None:
        """Cut the power: nothing runs, nothing that ran left a record, checkpoints stay."""
        self.viewer = None
        self.boots += 1
        for one in self.attempts.values():
            if one.step is Step.RUNNING:
                one.step = Step.ENDED
                one.end = EndSeen(*one.key, "reboot", started_ns=one.started_ns)

    # --- seen by runners ------------------------------------------------------------------------

    def reign(self, viewer: "SimRunner") -> int:
        self.viewer = viewer
        self._reigns += 1
        return self._reigns

    def mark(self, task: int, attempt: int) -> MarkSeen:
        number, at_ns = self.checkpoints.get(task, (0, 0))
        retry_after_s = self.retry_after_s.get(task, 0.0)
        cursor = f"c{number}" if number else ""
        problem = self.problems.get(task, "")
        return MarkSeen(task, attempt, number, at_ns, cursor, retry_after_s, problem)

    def _tell_start(self, one: SimAttempt) -> None:
        if self.viewer is not None and one.key in self.viewer.known:
            self.viewer.see_start(one)

    def _tell_end(self, one: SimAttempt) -> None:
        if self.viewer is not None and one.key in self.viewer.known:
            self.viewer.see_end(one)


class SimRunner:
    """One daemon's runner over a machine. Making it ends the reign of the one before."""

    name = "sim"
    cgroup = "none"

    def __init__(self, machine: SimMachine, *, is_automatic: bool = False) -> None:
        self.machine = machine
        self.is_automatic = is_automatic  # every poll advances the machine
        self.known: set[tuple[int, int]] = set()
        self.effects: list[Effect] = []  # everything that was ordered
        self._seen: deque[Sighting] = deque()
        self._marked: dict[tuple[int, int], MarkSeen] = {}
        self._adopting: set[tuple[int, int]] = set()
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._reign = machine.reign(self)

    @property
    def is_adopting(self) -> bool:
        return bool(self._adopting)

    def fileno(self) -> int:
        return self._news

    def close(self) -> None:
        if self.machine.viewer is self:
            self.machine.viewer = None
        os.close(self._news)

    def poll(self) -> list[Sighting]:
        if self.is_automatic:
            self.machine.advance()
        count = min(len(self._seen), 1_000)
        seen = [self._seen.popleft() for _ in range(count)]
        told = (one for one in seen if isinstance(one, StartSeen | EndSeen))
        self._adopting.difference_update((one.task, one.attempt) for one in told)
        if not self._seen:
            self._hush()
        return seen

    def adopt(self, task: int, attempt: int) -> None:
        key = (task, attempt)
        if key in self.known:
            return
        self.known.add(key)
        self._adopting.add(key)
        one = self.machine.attempts.get(key)
        if one is None or one.step is Step.ORDERED:
            self.machine.attempts.pop(key, None)
            self.machine.refused.add(key)
            self.see(EndSeen(*key, "not_started", ended_ns=self.machine.now_ns))
            return
        if one.step is Step.ENDED:
            self.see_end(one)
        else:
            self.see_start(one)

    def carry_out(self, effect: Effect) -> None:
        self.effects.append(effect)
        machine = self.machine
        match effect:
            case Start():
                self._start(effect)
            case Deliver() if one := self._running(effect.task, effect.attempt):
                machine.signal(one, effect.signal)
            case Freeze() if one := self._running(effect.task, effect.attempt):
                self._freeze(one, frozen=effect.frozen)
            case Control() if one := self._running(effect.task, effect.attempt):
                machine.controls[effect.task] = effect
                if effect.stop:
                    self._freeze(one, frozen=False)
            case Forget(task=task, attempt=attempt):
                machine.attempts.pop((task, attempt), None)
                machine.refused.discard((task, attempt))
                self.known.discard((task, attempt))
            case Delete(task=task):
                machine.checkpoints.pop(task, None)
                machine.controls.pop(task, None)
            case DropCheckpoints(task=task):
                machine.checkpoints.pop(task, None)
            case _:  # asked of an attempt that is over: done already
                pending = machine.attempts.get((effect.task, effect.attempt))
                if isinstance(effect, Deliver) and pending and pending.step is Step.ORDERED:
                    pending.pending.append(effect.signal)

    def _start(self, start: Start) -> None:
        key = (start.task, start.attempt)
        if key in self.known:
            return
        self.known.add(key)
        if start.fresh:
            self.machine.checkpoints.pop(start.task, None)
        there = self.machine.checkpoints.get(start.task, (0, 0))[0]
        assert start.checkpoint <= there, f"{key} is to find {start.checkpoint}, there is {there}"
        if problem := self.machine.problems.get(start.task):
            self.machine.refused.add(key)
            self.see(self.machine.mark(*key))
            self.see(EndSeen(*key, "not_started", ended_ns=self.machine.now_ns, text=problem))
        elif key not in self.machine.attempts:
            plan = self.machine.script(start)
            self.machine.attempts[key] = SimAttempt(start, plan, self._reign)

    def _running(self, task: int, attempt: int) -> SimAttempt | None:
        one = self.machine.attempts.get((task, attempt))
        return one if one is not None and one.step is Step.RUNNING else None

    def _freeze(self, one: SimAttempt, *, frozen: bool) -> None:
        one.is_frozen = frozen
        if not frozen:
            self.machine.signal_pending(one)

    def see_start(self, one: SimAttempt) -> None:
        assert one.shim is not None
        self.see(StartSeen(*one.key, one.shim, one.pid, one.started_ns, one.resumed_from))

    def see_end(self, one: SimAttempt) -> None:
        assert one.end is not None
        mark = self.machine.mark(*one.key)
        if mark.cursor or mark.problem:
            self.see(mark)
        self.see(one.end)

    def see(self, sighting: Sighting) -> None:
        if isinstance(sighting, MarkSeen):
            key = (sighting.task, sighting.attempt)
            if self._marked.get(key) == sighting:
                return
            self._marked[key] = sighting
        self._seen.append(sighting)
        os.eventfd_write(self._news, 1)

    def _hush(self) -> None:
        try:
            os.eventfd_read(self._news)
        except BlockingIOError:
            return
