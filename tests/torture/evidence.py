"""What lies beside a stage: the facts of the tasks, the daemon's story, who was killed and when.

It reads files only: `facts`, `*.jsonl`, `closing.json`. Nothing of ckptd is imported, so that an
audit cannot make the same mistake twice.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.torture.clients import AT_REST, phase_after

_AROUND_NS: Final = 1_000_000_000
"""Between a kill and the note of it; pids come again after minutes."""

_SUPERVISORS: Final = ("ckptd-shim", "ckptd-parent", None)  # None: gone before it could be asked


class Fact(NamedTuple):
    """One line that a task wrote."""

    work: str
    task: int
    attempt: int
    pid: int
    what: str
    argument: str
    lane: str = ""  # whose items come one after the other, "" where only one is under way at all


class Attempt:
    """What the daemon told of one attempt."""

    __slots__ = (
        "began_ns", "boot", "cause", "code", "ended_ns", "ended_under", "is_ended", "is_stopped",
        "over_ns", "pid", "shim", "signal", "signalled_ns",
    )  # fmt: skip

    def __init__(self) -> None:
        self.began_ns = self.ended_ns = 0
        self.over_ns = 0  # when it really ended: `ended_ns` is when that was known
        self.signalled_ns = 0  # by a verb of a client, for the first time; 0: never
        self.pid = 0
        self.shim = 0
        self.boot = self.ended_under = ""  # the boot it ran under, and that of whoever told its end
        self.is_ended = False
        self.is_stopped = False  # by a verb of a client
        self.cause = ""
        self.code = 0
        self.signal = 0

    @property
    def is_signalled(self) -> bool:
        """Tell whether a client's verb has sent it a signal, as the daemon says."""
        return bool(self.signalled_ns)

    @property
    def is_touched(self) -> bool:
        """Tell whether a client's verb may have changed its end."""
        return self.is_stopped or self.is_signalled


class Told:
    """The daemon's story: tasks and attempts."""

    def __init__(self, events: Iterator[dict[str, Any]]) -> None:
        self.phase: dict[int, str] = {}
        self.key: dict[int, str] = {}
        self._by_key: dict[str, int] = {}
        self.removed: dict[int, int] = {}  # task -> LSN
        self.steered: set[int] = set()
        self.heard: Counter[tuple[int, str]] = Counter()
        self.attempts: dict[int, dict[int, Attempt]] = defaultdict(dict)
        self.faults: list[str] = []
        self.starts_ns: list[int] = []  # of daemons
        self._boot = ""
        for event in events:
            self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        task, kind, fields = event["task"], event["type"], event["fields"]
        self.heard[task, kind] += 1
        if kind == "daemon_started":
            self._boot = fields["boot_id"]
            self.starts_ns.append(event["at_ns"])
        if kind == "submitted":
            if task in self.phase or task in self.removed:
                self.faults.append(f"id {task} was given twice")
            self._named(task, fields["key"])
        if kind == "removed":
            if self.phase.get(task) not in AT_REST:
                self.faults.append(f"task {task} was removed while it was {self.phase.get(task)}")
            self.removed[task] = event["lsn"]
        if kind in {"stop_intent", "reset", "moved"}:
            self.steered.add(task)
        phase = phase_after(event)
        if phase:
            self.phase[task] = phase
        if event["attempt"]:
            self._of_attempt(event)

    def _named(self, task: int, key: str) -> None:
        """A key names one task for as long as that is remembered."""
        self.key[task] = key
        before = self._by_key.get(key)
        if key and before is not None and before not in self.removed:
            self.faults.append(f"key {key} names tasks {before} and {task}")
        self._by_key[key] = task

    def _of_attempt(self, event: dict[str, Any]) -> None:
        one = self.attempts[event["task"]].setdefault(event["attempt"], Attempt())
        fields = event["fields"]
        match event["type"]:
            case "start_intent":
                one.began_ns = event["at_ns"]
            case "started":
                one.pid, one.shim = fields["pid"], fields["shim"]["pid"]
                one.boot = fields["shim"]["boot_id"]
            case "ended":
                if one.is_ended:
                    where = f"task {event['task']}, attempt {event['attempt']}"
                    self.faults.append(f"{where}: its end was told twice")
                one.is_ended, one.ended_ns, one.ended_under = True, event["at_ns"], self._boot
                one.over_ns = fields["ended_ns"]
                one.cause, one.code, one.signal = fields["cause"], fields["code"], fields["signal"]
            case "stop_intent":
                one.is_stopped = True
            case "signal_intent":
                one.signalled_ns = one.signalled_ns or event["at_ns"]
            case _:
                return


class Strikes:
    """Who was killed by us, so that an end that is not the task's own has its reason.

    A pid alone says nothing: the kernel gives each of them again every few minutes. And one
    supervisor has many attempts, one after the other. So a strike counts by the attempt that the
    environment of its victim names, or by its victim and its moment.
    """

    def __init__(self, lines: Iterator[dict[str, Any]]) -> None:
        self.all = list(lines)
        self._attempts = {(one["task"], one["attempt"]) for one in self.all if one.get("task")}
        self._moments: dict[int, list[int]] = defaultdict(list)
        for one in self.all:
            self._moments[one["pid"]].append(one["at_ns"])
        self._supervisors = [one["at_ns"] for one in self.all if one.get("name") in _SUPERVISORS]

    def hit(self, task: int, number: int, one: Attempt, pid: int) -> bool:
        """Tell whether any process of an attempt was killed while it was under way."""
        if (task, number) in self._attempts or self.hit_supervisor(one):
            return True
        return any(_is_within(at_ns, one) for at_ns in self._moments.get(pid, ()))

    def hit_supervisor(self, one: Attempt) -> bool:
        """Tell whether the shim of an attempt was killed, or whoever was to become it."""
        # Where its start was never told, who was killed cannot be looked up.
        moments = self._moments.get(one.shim, []) if one.shim else self._supervisors
        return any(_is_within(at_ns, one) for at_ns in moments)


def _is_within(at_ns: int, one: Attempt) -> bool:
    return one.began_ns - _AROUND_NS <= at_ns <= one.ended_ns + _AROUND_NS


class Evidence:
    """All that lies beside a stage."""

    def __init__(self, root: Path) -> None:
        self.place = root / "evidence"
        self.sent = {f"w{one['work']}": one["kind"] for one in self.lines("sent")}
        self.acked = [(f"w{one['work']}", one["task"]) for one in self.lines("acked")]
        self.strikes = Strikes(self.lines("strikes"))
        self.batches = {one["name"]: bool(one.get("finished")) for one in self.lines("batches")}
        self.told = Told(self.lines("events"))
        self.steered = list(self.lines("steered"))
        self.closing = json.loads((self.place / "closing.json").read_text())

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the lines of one file."""
        path = self.place / f"{name}.jsonl"
        if path.exists():
            with path.open() as file:
                for line in file:
                    yield json.loads(line)

    def facts(self) -> Iterator[Fact]:
        """Yield every fact, in the order in which they were written."""
        with (self.place / "facts").open() as file:
            for line in file:
                work, task, attempt, pid, what, *rest = line.split()
                told, _, lane = " ".join(rest).partition(" lane ")
                yield Fact(work, int(task), int(attempt), int(pid), what, told, lane)
