"""Who dies next, and how: at any moment, in company, or just before a chosen system call."""

import random
from collections import Counter
from typing import Any, Final

from tests.daemon_fixture import kill_quietly
from tests.torture.marked import CALLS, Marked
from tests.torture.stage import Stage, identity, role

_WITHIN_S: Final = 1.5
_MARKS: Final = {  # the calls at which a kill can hurt
    "daemon": ("sync", "write", "rename", "unlink", "open", "link", "send", "lock"),
    "shim": ("fork", "sync", "rename", "link", "open", "write", "exec", "unlink", "exit", "lock"),
    "parent": ("fork", "send", "open"),
    "task": ("sync", "rename", "write", "open", "exec", "fork", "unlink", "exit", "lock"),
    "batch": ("sync", "write", "fork", "rename", "open", "unlink", "lock"),
}
_WAYS: Final = {"daemon": 6, "one": 6, "several": 4, "marked": 8, "daemon and some": 3, "power": 1}

_OF_DAEMON: Final = {"daemon", "daemon and some", "power"}


class Striker:
    """Draws and carries out strikes; counts what it did."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage = stage
        self.chance = random.Random(f"{seed} strikes")
        self.counts: Counter[str] = Counter()
        self.kills = 0
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

    def _draw(self, number: int) -> list[int]:
        there = sorted(set(self.stage.processes()) - self._spared)
        return self.chance.sample(there, min(number, len(there)))

    def _kill(self, victims: list[int], how: str) -> None:
        for pid in victims:
            self._note(pid, identity(pid), how)
            if self.stage.daemon.process is not None and pid == self.stage.daemon.pid:
                self.stage.kill_daemon()
            else:
                kill_quietly(pid)
        self.counts[how] += 1

    def _note(self, pid: int, who: dict[str, Any], how: str) -> None:
        self.stage.note("strikes", {"pid": pid, **who, "how": how})
        self.kills += 1

    def _marked(self) -> None:
        """Kill one of a kind before its nth call of a kind."""
        kind = self.chance.choice(list(_MARKS))
        there = {pid: identity(pid) for pid in sorted(self.stage.processes())}
        of_kind = [
            pid for pid, who in there.items() if role(who) == kind and pid not in self._spared
        ]
        if not of_kind:
            return
        pid = self.chance.choice(of_kind)
        call = self.chance.choice(_MARKS[kind])
        nth = self.chance.choice((1, 1, 2, 3, 5, 8))
        assert call in CALLS
        try:
            with Marked(pid) as process:
                if not process.run_to_call(call, nth, _WITHIN_S):
                    self.counts[f"{kind} never came to {call}"] += 1
                    return
                self._note(pid, there[pid], f"{kind} before {call}")
                process.kill()
        except (ProcessLookupError, ChildProcessError, PermissionError):
            return  # it ended before it could be traced
        except TimeoutError:  # it is frozen, and would be left in the hands of nobody
            self._kill([pid], "frozen")
            return
        self.counts[f"{kind} before {call}"] += 1
        self._reaped(pid)

    def _reaped(self, pid: int) -> None:
        """Forget a daemon that the tracer has reaped."""
        daemon = self.stage.daemon
        if daemon.process is not None and daemon.process.pid == pid:
            daemon.process.returncode = -9
            daemon.process = None
