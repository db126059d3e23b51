"""Who dies next, and how: at any moment, in company, or just before or after a chosen call."""

import contextlib
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from tests.daemon_fixture import ROOT, kill_quietly
from tests.torture.clients import Story
from tests.torture.marked import IS_POSSIBLE, below
from tests.torture.marks import Marks
from tests.torture.stage import Stage, identity, role
from tests.waiting import until

_WITHIN_S: Final = 4.0
_BORN_WITHIN_S: Final = 7.0  # a daemon that has to start first
_HEARD_S: Final = 10.0
_SHIMS_MAX, _FAMILIES_MAX, _BATCHES_MAX = 3, 5, 2  # that are traced at once
_OF_DAEMON_SHARE: Final = 0.4
_LIVES: Final = 3  # of daemons that are killed one after the other
_NTH: Final = (1, 1, 1, 2, 3, 4)
_WAYS: Final = {"daemon": 6, "one": 6, "several": 4, "marked": 24, "daemon and some": 3, "power": 1}

_OF_DAEMON: Final = {"daemon", "daemon and some", "power"}


class Striker:
    """Draws and carries out strikes; counts what it did."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage = stage
        self.chance = random.Random(f"{seed} strikes")
        self.counts: Counter[str] = Counter()
        self.kills = 0
        self.marks = Marks(self.chance)
        self._spared: set[int] = set()

    def strike(self, *, spares_daemon: bool = False) -> None:
        """Kill somebody; leave a running daemon behind."""
        self.stage.revive()
        self._spared = {self.stage.daemon.pid} if spares_daemon else set[int]()
        way = self.chance.choices(list(_WAYS), list(_WAYS.values()))[0]
        if spares_daemon and way in _OF_DAEMON:
            way = "several"
        match way:
            case "daemon":
                self._kill([self.stage.daemon.pid], way)
            case "one":
                self._kill(self._draw(1), way)
            case "several":
                self._kill(self._draw(self.chance.randint(2, 12)), way)
            case "daemon and some":
                some = self._draw(self.chance.randint(1, 6))
                self._kill([*some, self.stage.daemon.pid], way)
            case "marked":
                self._marked()
            case _:
                self.kills += self.stage.power_loss()
                self.counts["power"] += 1
        self.stage.revive()

    def await_daemon(self, story: Story) -> None:
        """Return once the daemon that was started last is heard of, or after a while."""
        self.stage.revive()
        pid = self.stage.daemon.pid
        with contextlib.suppress(TimeoutError):
            until(lambda: story.reign_pid == pid, _HEARD_S, every_s=0.02)

    def _draw(self, number: int) -> list[int]:
        there = sorted(set(self.stage.processes()) - self._spared)
        return self.chance.sample(there, min(number, len(there)))

    def _kill(self, victims: list[int], how: str) -> None:
        for pid in victims:
            self._note(pid, identity(pid), how)
            self.kills += 1
            if self.stage.daemon.process is not None and pid == self.stage.daemon.pid:
                self.stage.kill_daemon()
            else:
                kill_quietly(pid)
        self.counts[how] += 1

    def _note(self, pid: int, who: dict[str, Any], how: str) -> None:
        self.stage.note_strike(pid, who, how)

    def _marked(self) -> None:
        """Kill at marks: some daemons one after the other, or tasks while the daemon lives."""
        if not IS_POSSIBLE:
            return
        is_of_daemon = not self._spared and self.chance.random() < _OF_DAEMON_SHARE
        chosen = [*self._servants(is_of_daemon=is_of_daemon)]
        tracers = [self._tracer(pid, self.marks.aims(parts)) for pid, parts in chosen]
        for life in range(_LIVES if is_of_daemon else 0):
            pid = self.stage.daemon.pid
            within_s = _BORN_WITHIN_S if life else _WITHIN_S
            if self._take(self._tracer(pid, self.marks.aims(("daemon",)), within_s)):
                self.stage.kill_daemon()  # it may still be dying
            else:
                self._kill([pid], "daemon")
            self.stage.revive()  # the next one is traced from its first moments
        for tracer in tracers:
            self._take(tracer)

    def _servants(self, *, is_of_daemon: bool) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Yield whom to trace beside the daemon, and as what; nobody twice: one has one tracer."""
        for pid in self._of("parent")[:1]:
            yield pid, ("parent",)
        busy = self._busy()
        for pid in busy[:_SHIMS_MAX]:  # without a daemon it ends after the attempt that it is in
            yield pid, ("shim before exit",) if is_of_daemon else ("shim",)
        if is_of_daemon:
            return
        for pid in busy[_SHIMS_MAX:][:_FAMILIES_MAX]:
            yield pid, ("task", "batch")
        batches = [pid for pid in self._of("batch") if not identity(pid).get("task")]
        for pid in batches[:_BATCHES_MAX]:
            yield pid, ("task", "batch")

    def _take(self, tracer: subprocess.Popen[str]) -> int:
        """Wait for a tracer and write down what it did; return how many it killed."""
        told = [json.loads(line) for line in tracer.communicate()[0].splitlines()]
        victims = [one for one in told if "pid" in one]
        for one in victims:
            self.stage.note("strikes", one)
            self.marks.met[one["how"]] += 1
        for one in told:
            self.marks.vain.update(one.get("tried", ()))
        self.kills += len(victims)
        self.counts["marked"] += len(victims)
        return len(victims)

    def _of(self, kind: str) -> list[int]:
        return [pid for pid in sorted(self.stage.processes()) if role(identity(pid)) == kind]

    def _busy(self) -> list[int]:
        """Return the supervisors in any order, but those that have a task first."""
        shims = self._of("shim")
        self.chance.shuffle(shims)
        return sorted(shims, key=lambda pid: not any(below(pid)))

    def _tracer(
        self, pid: int, aims: list[str], within_s: float = _WITHIN_S
    ) -> subprocess.Popen[str]:
        nth = str(self.chance.choice(_NTH))
        line = [sys.executable, "-m", "tests.torture.marked", str(within_s), nth, str(pid), *aims]
        return subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.PIPE)
