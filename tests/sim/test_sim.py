"""The simulation holds for the code as it is, is the same for the same seed, and it bites."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ckptd.core import plan
from ckptd.core.decide import Case, decide
from ckptd.core.outcome import _Judge
from ckptd.core.port import EndSeen, Sighting
from ckptd.core.records import AnyRecord, Phase, SignalIntent, StopIntent, Verdict
from ckptd.core.state import State, Task
from ckptd.daemon.engine import Engine
from ckptd.protocol import messages as m
from ckptd.protocol.errors import DiskFull, Internal, NotFound
from tests.fakes.memory_disk import Directory, Inode
from tests.fakes.sim_runner import SimMachine, SimRunner, Step
from tests.sim.asked import Violation
from tests.sim.crash_states import Broken
from tests.sim.faults import Climate
from tests.sim.jobs import JobMachine
from tests.sim.life import Life
from tests.sim.network import Weather

SEEDS = range(1, 13)
LIVES_TO_FIND = 10
Mistake = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_life_keeps_every_promise(seed: int) -> None:
    life = Life(seed)
    life.run()
    assert life.model.checks > 0


def test_a_seed_is_one_life_also_in_another_process_with_other_hashes() -> None:
    here = Life(13).run()
    assert Life(13).run() == here
    told = subprocess.run(
        (sys.executable, "-m", "tests.sim", "--seed", "13"),
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert f"hash {here}" in told


def deaf_sync(patch: pytest.MonkeyPatch) -> None:
    """The disk says that it has synced, and has not."""
    patch.setattr(Inode, "sync", lambda _: None)


def deaf_directory(patch: pytest.MonkeyPatch) -> None:
    """The disk says that it has synced names, and has not."""
    patch.setattr(Directory, "sync", lambda _: None)


def hasty(patch: pytest.MonkeyPatch) -> None:
    """Answers and orders leave before what they say is durable."""
    commit = Engine.commit

    def late_commit(engine: Engine) -> bool:
        staged, engine._staged = engine._staged, []
        engine._kept = getattr(engine, "_kept", []) + staged
        if len(engine._kept) < 12:
            return False
        engine._staged, engine._kept = engine._kept, []
        return commit(engine)

    patch.setattr(Engine, "commit", late_commit)


def unfenced(patch: pytest.MonkeyPatch) -> None:
    """An order of a dead daemon runs though the next one has told that it did not."""
    adopt = SimRunner.adopt

    def adopt_without_claim(runner: SimRunner, task: int, attempt: int) -> None:
        jobs: JobMachine = runner.machine
        order = jobs.attempts.get((task, attempt))
        adopt(runner, task, attempt)
        if order is not None and order.step is Step.ORDERED:
            jobs.agenda.after(5, lambda: jobs.model.begun(task, attempt, 0))

    patch.setattr(SimRunner, "adopt", adopt_without_claim)


def twice(patch: pytest.MonkeyPatch) -> None:
    """A runner that carries an order out two times."""
    begin = SimMachine.begin

    def begin_again(machine: JobMachine, one: object) -> None:
        begin(machine, one)
        machine.agenda.after(0.5, lambda: machine.model.begun(*one.key, machine.items[one.key]))

    patch.setattr(SimMachine, "begin", begin_again)


def forgetful(patch: pytest.MonkeyPatch) -> None:
    """The daemon does not remember what it has answered."""
    patch.setattr(State, "remember", lambda *_: None)


def flattering(patch: pytest.MonkeyPatch) -> None:
    """Every exit code is read as 0."""
    see = Engine.see

    def see_no_code(engine: Engine, seen: Sighting, now: object) -> None:
        if isinstance(seen, EndSeen) and seen.cause == "exit":
            seen = EndSeen(seen.task, seen.attempt, "exit", ended_ns=seen.ended_ns)
        see(engine, seen, now)

    patch.setattr(Engine, "see", see_no_code)


def restless(patch: pytest.MonkeyPatch) -> None:
    """A job that is done is started again."""
    verdict = _Judge.verdict

    def again(judge: _Judge, ended_ns: int) -> Verdict:
        found = verdict(judge, ended_ns)
        return judge._next(Phase.QUEUED, "") if found.phase is Phase.SUCCEEDED else found

    patch.setattr(_Judge, "verdict", again)


def praising(patch: pytest.MonkeyPatch) -> None:
    """A job that failed is told as done, with the code that it left with."""
    verdict = _Judge.verdict

    def praise(judge: _Judge, ended_ns: int) -> Verdict:
        found = verdict(judge, ended_ns)
        return judge._next(Phase.SUCCEEDED, "") if found.phase is Phase.FAILED else found

    patch.setattr(_Judge, "verdict", praise)


def harsh(patch: pytest.MonkeyPatch) -> None:
    """A job that is done is told as failed."""
    verdict = _Judge.verdict

    def scold(judge: _Judge, ended_ns: int) -> Verdict:
        found = verdict(judge, ended_ns)
        return judge._next(Phase.FAILED, "") if found.phase is Phase.SUCCEEDED else found

    patch.setattr(_Judge, "verdict", scold)


def resigning(patch: pytest.MonkeyPatch) -> None:
    """A daemon that gives up once though its disk is sound."""
    commit, reigns = Engine.commit, [True]

    def resign(engine: Engine) -> bool:
        if engine.state.next_id > 8 and reigns:
            reigns.clear()
            raise Internal("no more")
        return commit(engine)

    patch.setattr(Engine, "commit", resign)


def unrecorded_stop(patch: pytest.MonkeyPatch) -> None:
    """A task is stopped before the log says so for good."""
    commit = Engine.commit

    def lazy(engine: Engine) -> bool:
        if not any(isinstance(record, StopIntent) for _, record in engine.turn_records):
            return commit(engine)
        wal, sync = engine.wal, engine.wal.sync
        wal.sync = lambda: wal.durable_lsn  # type: ignore[method-assign]
        try:
            return commit(engine)
        finally:
            wal.sync = sync  # type: ignore[method-assign]

    patch.setattr(Engine, "commit", lazy)


def deaf_to_cancel(patch: pytest.MonkeyPatch) -> None:
    """What was cancelled while it ran is judged like any other end."""
    verdict = _Judge.verdict

    def unaware(judge: _Judge, ended_ns: int) -> Verdict:
        found = verdict(judge, ended_ns)
        return judge._next(Phase.QUEUED, "") if found.phase is Phase.CANCELLED else found

    patch.setattr(_Judge, "verdict", unaware)


def overlooking(patch: pytest.MonkeyPatch) -> None:
    """That a task was killed is seen by nobody, so that it is waited for without end."""
    see = Engine.see

    def see_no_signal(engine: Engine, seen: Sighting, now: object) -> None:
        if not (isinstance(seen, EndSeen) and seen.cause == "signal"):
            see(engine, seen, now)

    patch.setattr(Engine, "see", see_no_signal)


def refusing(patch: pytest.MonkeyPatch) -> None:
    """Every submit is refused, as if the disk were full."""

    def refuse(*_: object, **__: object) -> None:
        raise DiskFull("no room")

    patch.setattr(Engine, "admit", refuse)


def unwilling(patch: pytest.MonkeyPatch) -> None:
    """Whatever is asked, it is answered that there is no such task."""

    def find_none(*_: object) -> None:
        raise NotFound("no task")

    patch.setattr("ckptd.daemon.requests.decide", find_none)


def answered_only(command: type[m.Message]) -> Mistake:
    """Return a daemon that answers such commands and does nothing of it."""

    def forget(patch: pytest.MonkeyPatch) -> None:
        def decide_nothing(case: Case, asked: m.Message) -> tuple[list[AnyRecord], m.Answer]:
            records, answer = decide(case, asked)
            return ([] if isinstance(asked, command) else records), answer

        patch.setattr("ckptd.daemon.requests.decide", decide_nothing)

    forget.__doc__ = f"{command.__name__} is answered, and not recorded."
    return forget


def timeless(patch: pytest.MonkeyPatch) -> None:
    """No timeout is ever over."""
    due = plan._due

    def due_but_timeouts(case: Case, observed: plan.Observed, task: Task) -> list[AnyRecord]:
        found = due(case, observed, task)
        return [one for one in found if getattr(one, "why", "") != "timeout"]

    patch.setattr(plan, "_due", due_but_timeouts)


def mute(patch: pytest.MonkeyPatch) -> None:
    """Signals are answered and recorded, and not sent."""

    def effects_but_signals(*seen: Any) -> list[Any]:
        *before, news = seen
        return plan.effects(*before, [one for one in news if not isinstance(one, SignalIntent)])

    patch.setattr("ckptd.daemon.engine.effects", effects_but_signals)


DEADLY = Climate(
    busy_s=60, people=4, acts=50, pause_s=0.5, segment_bytes=16 << 10,
    snapshot_every_bytes=16 << 10, finished_max=100_000, checkpoints_age_s=86_400.0,
    reign_edges=60, cut_short=1.0, power=0.0, keep=-1.0,
    weather=Weather(), delay_s=1.0, looks=0.0, trouble_s=5.0, kinds=("kill",),
)  # fmt: skip
"""Nothing happens but that daemons are killed while their orders are on their way."""
CALM = replace(DEADLY, people=1, acts=20, cut_short=0.0, kinds=())
"""No fault at all: jobs fail by themselves."""
LIVELY = replace(CALM, people=4, acts=50)
"""The same, and many who steer."""


@pytest.mark.parametrize(
    ("mistake", "climate"),
    [
        (deaf_sync, None), (deaf_directory, None), (hasty, None), (unfenced, DEADLY),
        (twice, None), (forgetful, None), (flattering, None), (restless, None),
        (deaf_to_cancel, None), (overlooking, CALM), (praising, CALM), (harsh, CALM),
        (resigning, CALM), (unrecorded_stop, CALM), (refusing, CALM), (refusing, None),
        (unwilling, CALM), (timeless, None), (mute, None),
        *((answered_only(one), LIVELY) for one in (m.Hold, m.Pause, m.Resume)),
        *((answered_only(one), None) for one in (m.Edit, m.GroupSet)),
    ],
)  # fmt: skip
def test_a_seeded_mistake_is_found_within_few_lives(
    mistake: Mistake, climate: Climate | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    for seed in range(1, 1 + LIVES_TO_FIND):
        try:
            Life(seed, climate=climate).run()
        except (Violation, Broken):
            return
    pytest.fail(f"{mistake.__doc__} Nobody noticed in {LIVES_TO_FIND} lives.")


def test_lives_in_which_many_steer_keep_every_promise() -> None:
    carried_out: set[str] = set()
    for seed in range(1, 7):
        life = Life(seed, climate=LIVELY)
        life.run()
        carried_out |= {one.verb for one in life.model.asked.values() if one.changed()}
    assert carried_out >= {"hold", "release", "pause", "resume", "edit", "signal"}
