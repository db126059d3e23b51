"""Who dies next, and how: at any moment, in company, or just before a chosen system call."""

import contextlib
import random
import subprocess
import sys
from collections import Counter
from typing import Any, Final

from tests.daemon_fixture import ROOT, kill_quietly
from tests.torture.clients import Story
from tests.torture.marked import CHILD, IS_POSSIBLE
from tests.torture.stage import Stage, identity, role
from tests.waiting import until

_WITHIN_S: Final = 2.5
_AT_ONCE: Final = 3  # processes of a kind that are waited for
_HEARD_S: Final = 10.0
_TRIES_MAX: Final = 100  # to meet a mark, some by 1 in 20; one that is never met is none
_MARKS: Final = {  # the calls at which a kill can hurt, and that come often enough to be met
    "daemon": ("sync", "write", "unlink", "open", "send"),
    "shim": ("fork", "write", "link", "sync", "send", "open"),
    "parent": ("fork",),
    "task": tuple(
        CHILD + call for call in ("exec", "sync", "rename", "write", "open", "fork", "lock", "exit")
    ),
    # It forks in its first moments, before a tracer is there. As a task it is met at child-fork.
    "batch": ("sync", "write", "open"),
}
_ONCE: Final = {f"{CHILD}exec", f"{CHILD}exit"}
_BY: Final = {"task": "shim"}
"""Short lives are traced from their birth: as children of whoever will fork them."""
_WAYS: Final = {"daemon": 6, "one": 6, "several": 4, "marked": 14, "daemon and some": 3, "power": 1}

_OF_DAEMON: Final = {"daemon", "daemon and some", "power"}


class Striker:
    """Draws and carries out strikes; counts what it did."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage = stage
        self.chance = random.Random(f"{seed} strikes")
        self.counts: Counter[str] = Counter()
        self.kills = 0
        self.tried: Counter[tuple[str, str]] = Counter()
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
        """Kill before chosen calls, one for each kind of process: those hit least so far."""
        if not IS_POSSIBLE:
            return
        there = {pid: identity(pid) for pid in sorted(self.stage.processes())}
        tracers, taken = [], set(self._spared)
        for kind in self.chance.sample(list(_MARKS), len(_MARKS)):
            of = _BY.get(kind, kind)
            free = there.keys() - taken  # a process has one tracer
            pids = [pid for pid in sorted(free) if role(there[pid]) == of]
            chances = self.chance.sample(_MARKS[kind], len(_MARKS[kind]))
            call = min(chances, key=lambda one: self._hits(kind, one))
            self.tried[kind, call] += bool(pids)
            for pid in self._likely(pids, there):
                how = f"{kind} before {call}"
                taken.add(pid)
                tracers.append((how, pid, self._tracer(pid, call)))
        for how, pid, tracer in tracers:
            victim = int(tracer.communicate()[0] or 0)
            if victim:
                self._note(victim, there[pid] if victim == pid else {}, how)
                self.kills += 1
                self.counts[how] += 1

    def _hits(self, kind: str, call: str) -> tuple[int, int]:
        """Return how often such a mark was hit, and tried."""
        return self.counts[f"{kind} before {call}"], self.tried[kind, call]

    def _likely(self, pids: list[int], there: dict[int, dict[str, Any]]) -> list[int]:
        """Draw some, of those that make every kind of call where there are any."""
        own = [pid for pid in pids if "ckptd" in there[pid].get("line", "")] or pids
        half = (len(own) + 1) // 2  # the rest is for another kind that is traced by these
        return self.chance.sample(own, min(half, _AT_ONCE))

    def _tracer(self, pid: int, call: str) -> subprocess.Popen[bytes]:
        nth = 1 if call in _ONCE else self.chance.choice((1, 1, 1, 2, 3, 4))
        words = [str(pid), call, str(nth), str(_WITHIN_S)]
        line = [sys.executable, "-m", "tests.torture.marked", *words]
        return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE)

    def missed(self, tries: int = 0) -> list[str]:
        """Return the marks at which nobody was killed, though it was tried so often."""
        known = [(kind, call) for kind, calls in _MARKS.items() for call in calls]
        return [
            f"{kind} before {call}"
            for kind, call in known
            if not self.counts[f"{kind} before {call}"] and self.tried[kind, call] >= tries
        ]

    def unreachable(self) -> list[str]:
        """Return what is wrong with the marks: a run that is long enough meets each of them."""
        return [f"tried {_TRIES_MAX} times, never met: {one}" for one in self.missed(_TRIES_MAX)]
