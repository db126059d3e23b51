"""One run: the stage, the traffic, the strikes, the quiet after it, the evidence, the audit."""

import contextlib
import json
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from tests.figures import commit, write
from tests.torture import audit, closing
from tests.torture.clients import Batches, Caller, Numbers, Operator, Story, Submitter
from tests.torture.samples import Growth, Sampler, growth
from tests.torture.stage import Stage
from tests.torture.strikes import Striker
from tests.waiting import let_pass

_SUBMITTERS, _OPERATORS, _BATCHES = 2, 2, 2
_EVERY_S: Final = {False: 1.5, True: 4.0}
_PATIENCE: Final = 0.8  # so often the daemon may serve before the next strike
_QUIET_S: Final = 300.0
_TOLD_MAX: Final = 50
_LEAST_PER_S: Final = {
    "struck": 0.03,
    "tasks": 1.0,
    "facts": 2.0,
    "struck_attempts": 0.01,
    "batches": 0.01,
}
"""A tenth, or less, of what a run on two cores comes to."""
RUN: Final = "run.json"


Kind = Literal["torture", "soak", "calm"]
"""All are killed and all is kept; a soak; a soak in which one daemon lives all the time."""


class Options(NamedTuple):
    """What a run is asked for."""

    seconds: float
    seed: int
    kind: Kind = "torture"

    @property
    def is_soak(self) -> bool:
        """Tell whether what ended is forgotten and all sizes are watched."""
        return self.kind != "torture"

    def command(self) -> str:
        """Return the line that does the same again."""
        kind = f" --{self.kind}" if self.is_soak else ""
        return f"python -m tests.torture{kind} --seconds {self.seconds:g} --seed {self.seed}"


class Traffic:
    """All clients at work."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage = stage
        self.stop, self.over = threading.Event(), threading.Event()
        self.numbers = Numbers()
        self.story = Story(stage, self.stop)
        self.batches: list[Batches] = []
        self._threads: list[threading.Thread] = []
        self._follower = threading.Thread(target=self.story.follow, daemon=True)
        self._seed = seed
        self.crashed: list[str] = []

    def begin(self) -> None:
        """Let everybody in."""
        self._follower.start()
        for number in range(_SUBMITTERS):
            self._let_in(Submitter(self._caller(), self.numbers, self.story, self._name(number)))
        for number in range(_OPERATORS):
            self._let_in(Operator(self._caller(), self.story, self._name(10 + number)))
        for number in range(_BATCHES):
            self.batches.append(Batches(self._caller(), self.numbers, self._name(20 + number)))
            self._let_in(self.batches[-1])

    def _caller(self) -> Caller:
        return Caller(self.stage, self.stop)

    def _name(self, number: int) -> str:
        return f"{self._seed} client {number}"

    def _let_in(self, client: Submitter | Operator | Batches) -> None:
        def guarded() -> None:
            try:
                with contextlib.closing(client.caller):
                    client.work(self.over.is_set)
            except Exception as error:  # noqa: BLE001 - it is told at the end, and is a violation
                self.crashed.append(f"a client gave up: {error!r}")

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        self._threads.append(thread)

    def settle(self) -> list[str]:
        """Let nobody begin anything; lead what is under way to its end. Return what never ended."""
        self.over.set()
        operator = Operator(self._caller(), self.story, "the last one")
        with contextlib.closing(operator.caller):
            self._lead_to_rest(operator)
        late = {task: one for task, one in self.story.phase.items() if one in closing.UNDER_WAY}
        return [f"task {task} is {phase} for ever" for task, phase in sorted(late.items())]

    def _lead_to_rest(self, operator: Operator) -> None:
        deadline = time.monotonic() + _QUIET_S
        while time.monotonic() < deadline:  # Bound: the deadline
            self.stage.revive()
            _lead(operator, self.story)
            busy = [thread for thread in self._threads if thread.is_alive()]
            if not busy and not self.story.backlog() and self._is_up_to_date(operator):
                break
            let_pass(0.3)

    def _is_up_to_date(self, operator: Operator) -> bool:
        since = self.story.since
        return not operator.caller.ask("events", {"since": since, "limit": 1})["events"]

    def end(self) -> None:
        """Close the last sockets."""
        self.stop.set()
        self._follower.join(10.0)


def _lead(operator: Operator, story: Story) -> None:
    for verb, phase in (("resume", "paused"), ("release", "held"), ("release", "quarantined")):
        some = [task for task, one in list(story.phase.items()) if one == phase][:100]
        if some:
            operator.steer(verb, {"select": {"ids": some}})


class Outcome(NamedTuple):
    """What a run came to, and where its stage lies."""

    name: str
    command: str
    figures: dict[str, Any]
    violations: list[str]
    root: Path


def run(options: Options) -> Outcome:
    """Torture and audit; the stage is left for whoever asked."""
    stage = Stage(forgets=options.is_soak)
    traffic = Traffic(stage, options.seed)
    striker = Striker(stage, options.seed)
    sampler = Sampler(stage, traffic.story, is_calm=options.kind == "calm")
    print(f"{options.command()}\nstage: {stage.root}", flush=True)
    began = time.monotonic()
    try:
        stage.start()
        traffic.begin()
        _torture(options, traffic.story, striker, sampler)
        took_s = time.monotonic() - began
        violations = traffic.settle() + traffic.story.faults + traffic.crashed
        settled_s = time.monotonic() - began - took_s
        seen = closing.collect(stage, traffic.story.since)
        traffic.end()
        closing.bring_down(stage, seen)
    finally:
        traffic.end()
        stage.clear()
    grown = growth(sampler.samples, took_s) if options.is_soak else Growth({}, [])
    done = {
        "name": options.kind,
        "command": options.command(),
        "violations": violations + stage.deaths + grown.violations + striker.marks.unreachable(),
        "figures": {
            "commit": commit(),
            "seed": options.seed,
            "seconds": round(took_s, 1),
            "settled_s": round(settled_s, 1),
            "kills": striker.kills,
            "strikes": dict(sorted(striker.counts.items())),
            "marks": striker.marks.told(),
            "marks_missed": striker.marks.missed(),
            "daemon_starts": stage.starts,
            "boots": stage.boots,
            "batches": sum(one.finished for one in traffic.batches),
            **grown.figures,
        },
    }
    (stage.evidence / RUN).write_text(json.dumps(done, indent=1) + "\n")
    return judged(stage.root)


def judged(root: Path) -> Outcome:
    """Audit a stage that has come to rest; also one that was kept, by a better audit."""
    done = json.loads((root / "evidence" / RUN).read_text())
    found = audit.audit(root)
    figures = done["figures"] | found.figures | {"audited_at": commit()}
    figures["struck"] = sum(figures["strikes"].values())
    figures["submits_per_s"] = round(figures["tasks"] / figures["seconds"], 1)
    violations = [*done["violations"], *found.violations, *_too_little(figures)]
    return Outcome(done["name"], done["command"], figures, violations, root)


def _too_little(figures: dict[str, Any]) -> Iterator[str]:
    """A run in which little happened shows little."""
    for name, per_s in _LEAST_PER_S.items():
        least = int(per_s * figures["seconds"])
        if figures[name] < least:
            yield f"only {figures[name]} {name} in {figures['seconds']} s, less than {least}"


def _torture(options: Options, story: Story, striker: Striker, sampler: Sampler) -> None:
    chance = random.Random(f"{options.seed} moments")
    deadline = time.monotonic() + options.seconds
    every_s = _EVERY_S[options.is_soak]
    while time.monotonic() < deadline:  # Bound: the deadline
        if chance.random() < _PATIENCE:
            striker.await_daemon(story)
        let_pass(chance.uniform(0.0, 2 * every_s))
        if options.is_soak:
            sampler.sample_if_due()
        striker.strike(spares_daemon=options.is_soak and sampler.is_calm())


def told(outcome: Outcome, *, keeps: bool) -> int:
    """Write the figures, print what was violated; 0 where nothing was."""
    figures = {**outcome.figures, "violations": len(outcome.violations)}
    place = write(outcome.name, figures, command=outcome.command)
    for one in outcome.violations[:_TOLD_MAX]:
        print(f"VIOLATION: {one}")
    print(f"{outcome.name}: {place.read_text()}")
    if outcome.violations or keeps:
        print(f"kept: {outcome.root}\nagain: {outcome.command}", file=sys.stderr)
    else:
        shutil.rmtree(outcome.root)
    return 1 if outcome.violations else 0
