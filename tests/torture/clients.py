"""Those who talk to the daemon: some hand work in, some steer it, one writes down what it tells.

Each is a thread with a socket and a chance of its own. What a client was told is evidence, too:
`acked` (a work and its id), `steered` (a verb that was answered), `events` (the daemon's story).
"""

import random
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any, Final

from tests.raw_client import RawClient, RefusedError
from tests.torture import works
from tests.torture.stage import Stage
from tests.waiting import let_pass

_ANSWER_S: Final = 2.0
_LOOKS: Final = ("events", "status")
_BACKLOG_MAX: Final = 150
_BATCH_S: Final = 60.0
PENDING: Final = ("held", "queued", "waiting", "starting", "running", "paused", "stopping")
AT_REST: Final = ("succeeded", "failed", "cancelled", "quarantined", "blocked")


class Caller:
    """Asks until there is an answer, over any number of deaths of the daemon."""

    def __init__(self, stage: Stage, stop: threading.Event) -> None:
        self.stage = stage
        self.stop = stop
        self.client = RawClient(stage.daemon.endpoint)

    def ask(self, verb: str, args: dict[str, Any], request: str = "") -> Any:
        """Return the result; the same request is repeated under the same id."""
        request = request or secrets.token_hex(8)
        while not self.stop.is_set():  # Bound: `stop` is set when time is up
            self.client.send(verb, args, request)
            reply = self.client.receive(request, _ANSWER_S)
            if reply is None:
                continue
            if reply["ok"]:
                self.stage.changes += verb not in _LOOKS
                return reply["result"]
            if not reply["error"]["retryable"]:
                raise RefusedError(reply["error"])
            let_pass(0.05)
        raise TimeoutError("time is up")

    def die(self) -> None:
        """Be killed: the socket is closed with whatever was on its way, a new client begins."""
        self.close()
        self.client = RawClient(self.stage.daemon.endpoint)

    def close(self) -> None:
        """Close the socket."""
        self.client.socket.close()


class Story:
    """What the daemon told so far, by one follower that must miss nothing."""

    def __init__(self, stage: Stage, stop: threading.Event) -> None:
        self.caller = Caller(stage, stop)
        self.phase: dict[int, str] = {}
        self.removed: set[int] = set()
        self.ended = 0
        self.since = 0
        self.reign_pid = 0  # of the last daemon that is known to serve
        self.faults: list[str] = []

    def follow(self) -> None:
        """Take down every event until the stage is left."""
        with closing(self.caller):
            while not self.caller.stop.is_set():  # Bound: `stop`
                asked = {"since": self.since, "limit": 1000, "hold_s": 1.0}
                try:
                    page = self.caller.ask("events", asked)
                except TimeoutError:
                    return
                except RefusedError as gone:
                    self.faults.append(f"events since {self.since}: {gone}")
                    return
                for event in page["events"]:
                    self._take(event)
                self.since = max(self.since, page["next"])

    def _take(self, event: dict[str, Any]) -> None:
        event["fields"].pop("spec", None)  # the same for every task of a kind
        self.caller.stage.note("events", event)
        if event["lsn"] <= self.since:
            self.faults.append(f"event {event['lsn']} came after {self.since}")
        self.since = event["lsn"]
        phase = phase_after(event)
        if event["type"] == "removed":
            self.phase.pop(event["task"], None)
            self.removed.add(event["task"])
        elif phase:
            self.phase[event["task"]] = phase
        self.ended += event["type"] == "ended"
        if event["type"] == "daemon_started":
            self.reign_pid = event["fields"]["pid"]

    def backlog(self) -> int:
        """Return how many tasks are not at rest."""
        return sum(phase in PENDING for phase in list(self.phase.values()))


def phase_after(event: dict[str, Any]) -> str:
    """Return the phase that an event puts its task in, "" where it changes none."""
    fields = event["fields"]
    match event["type"]:
        case "submitted" | "moved":
            return str(fields["phase"])
        case "ended":
            return str(fields["verdict"]["phase"])
        case "reset":
            return "queued"
        case "start_intent":
            return "starting"
        case "started":
            return "running"
        case "stop_intent":
            return "stopping"
        case "freeze_intent":
            return "paused" if fields["frozen"] else "running"
        case _:
            return ""


class Numbers:
    """Numbers of works, each given once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.given = 0

    def take(self, count: int) -> list[int]:
        """Return the next numbers."""
        with self._lock:
            first = self.given + 1
            self.given += count
        return list(range(first, first + count))


class Submitter:
    """Hands work in, at full speed while the daemon keeps up; dies before some of the answers."""

    def __init__(self, caller: Caller, numbers: Numbers, story: Story, seed: str) -> None:
        self.caller, self.numbers, self.story = caller, numbers, story
        self.chance = random.Random(seed)
        self.cwd = str(caller.stage.daemon.work)

    def work(self, is_over: Callable[[], bool]) -> None:
        """Submit until it is over; what was begun is repeated until it is answered."""
        while not is_over():  # Bound: `is_over`
            if self.story.backlog() > _BACKLOG_MAX:
                let_pass(0.02)
                continue
            try:
                self._submit()
            except TimeoutError:
                return

    def _submit(self) -> None:
        numbers = self.numbers.take(self.chance.choice((1, 1, 1, 5, 20)))
        is_keyed = self.chance.random() < 0.7
        kinds = [works.draw(self.chance, is_fast=self.caller.stage.forgets) for _ in numbers]
        tasks = [
            works.spec(number, kind, self.cwd, is_keyed=is_keyed)
            for number, kind in zip(numbers, kinds, strict=True)
        ]
        env = {name: self.caller.stage.daemon.env[name] for name in ("PATH", "EVIDENCE")}
        env["PYTHONPATH"] = self.caller.stage.daemon.env["PYTHONPATH"]
        args = {"tasks": tasks, "env": env}
        request = secrets.token_hex(8)
        while self.chance.random() < 0.15:  # Bound: by chance, six times in a row once in 10^5
            self.caller.client.send("submit", args, request)
            let_pass(self.chance.choice((0.0, 0.002, 0.02)))
            self.caller.die()
            if is_keyed and self.chance.random() < 0.5:
                request = secrets.token_hex(8)  # a client that has forgotten all but its keys
        for number, kind in zip(numbers, kinds, strict=True):
            self.caller.stage.note("sent", {"work": number, "kind": kind})
        ids = self.caller.ask("submit", args, request)["ids"]
        for number, task in zip(numbers, ids, strict=True):
            self.caller.stage.note("acked", {"work": number, "task": task})


class Operator:
    """Steers: pauses, resumes, cancels, kills, retries, holds, releases, cleans."""

    _VERBS: Final = (
        ("pause", ("running",), 4), ("resume", ("paused",), 6), ("cancel", PENDING, 2),
        ("kill", PENDING, 1), ("retry", ("cancelled", "failed"), 3), ("clean", AT_REST, 3),
        ("hold", ("queued", "waiting"), 1), ("release", ("held",), 4),
        ("checkpoint_now", ("running",), 2), ("signal", ("running",), 1),
    )  # fmt: skip

    def __init__(self, caller: Caller, story: Story, seed: str) -> None:
        self.caller, self.story = caller, story
        self.chance = random.Random(seed)

    def work(self, is_over: Callable[[], bool]) -> None:
        """Steer until it is over."""
        while not is_over():  # Bound: `is_over`
            let_pass(self.chance.uniform(0.02, 0.2))
            verb, phases, _ = self.chance.choices(self._VERBS, [row[2] for row in self._VERBS])[0]
            fit = [task for task, phase in list(self.story.phase.items()) if phase in phases]
            if not fit:
                continue
            some = self.chance.sample(fit, min(len(fit), self.chance.choice((1, 1, 2, 5))))
            args: dict[str, Any] = {"select": {"ids": some}}
            if verb == "signal":
                args |= {"signal": 9, "tree": self.chance.random() < 0.5}
            try:
                self.steer(verb, args)
            except TimeoutError:
                return

    def steer(self, verb: str, args: dict[str, Any]) -> None:
        """Ask for it and write down what was answered; a refusal is an answer."""
        try:
            told = self.caller.ask(verb, args)
        except RefusedError as refused:
            told = {"tasks": [], "refused": str(refused)}
        done = [one["id"] for one in told["tasks"] if not one.get("error")]
        self.caller.stage.note("steered", {"verb": verb, "tasks": done, "told": told})


class Batches:
    """Works batches off: as tasks of the daemon, and in the foreground without it."""

    def __init__(self, caller: Caller, numbers: Numbers, seed: str) -> None:
        self.caller, self.numbers = caller, numbers
        self.chance = random.Random(seed)
        self.finished = 0

    def work(self, is_over: Callable[[], bool]) -> None:
        """Run one batch after the other; each to its end, however often it is killed."""
        while not is_over():  # Bound: `is_over`
            (number,) = self.numbers.take(1)
            name = f"w{number}"
            how = self.chance.choice(("command", "function"))
            where = self.chance.choice(("run", "submit"))
            self.caller.stage.note("batches", {"name": name, "how": how, "where": where})
            if not self._to_its_end(name, how, where):
                return
            self.finished += 1
            self.caller.stage.note("batches", {"name": name, "finished": True})

    def _to_its_end(self, name: str, how: str, where: str) -> bool:
        command = ["--python", "tests.torture.jobs:double", "--interpreter", sys.executable]
        if how == "command":
            line = 'echo "$WORK 0 0 $$ item $0" >>"$EVIDENCE/facts"; echo $(($0 * 2))'
            command = ["sh", "-c", line]
        items = [str(item) for item in range(works.BATCH_ITEMS)]
        words = [f"-j{works.BATCH_JOBS}", "-n", name, "-q", *command, ":::", *items]
        stay = ["--wait"] if where == "submit" else []
        while not self.caller.stop.is_set():  # Bound: `stop`
            self._call(name, "batch", where, *stay, *words)
            if self._call(name, "batch", "status", "--check", name) in {0, 1}:
                return True
        return False

    def _begun(self, work: str, *words: str) -> subprocess.Popen[str]:
        """Begin a client, once there is power."""
        stage = self.caller.stage
        with stage.power:
            return subprocess.Popen(
                [sys.executable, "-m", "ckptctl", *words],
                env={**stage.daemon.env, "WORK": work}, cwd=stage.daemon.work, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def _call(self, work: str, *words: str) -> int:
        with self._begun(work, *words) as client:
            try:
                said = client.communicate(timeout=_BATCH_S)[0]
            except subprocess.TimeoutExpired:
                client.kill()
                said = client.communicate()[0]
        told = {"work": work, "code": client.returncode, "said": said[-500:]}
        self.caller.stage.note("clients", told)
        return client.returncode
