"""`ckptctl retry --from-step` as a process, over a task's real files; the daemon is scripted."""

import msgspec
import pytest

from ckptd.daemon.files import Files
from ckptd.protocol import messages as m
from ckptd.sdk.steps import job_key
from ckptd.storage import facts
from tests.task_world import TASK, TaskWorld
from tests.unit.ctl.conftest import Scripted, ctl
from tests.unit.ctl.rows import detail, row


class Desk:
    """A task that did three steps and came to something, and the command line."""

    def __init__(self, world: TaskWorld, scripted: Scripted) -> None:
        self.world, self.phase, self.reason, self.attempt = world, "failed", "", 1
        self.retried: list[m.Message] = []
        self.endpoint = scripted({"show": self._shown, "retry": self._retry}).endpoint

    def _shown(self, _: m.Message) -> m.TaskDetails:
        one = detail(row(TASK, phase=self.phase, reason=self.reason, attempt=self.attempt))
        return m.TaskDetails((msgspec.structs.replace(one, directory=self.world.dir),))

    def _retry(self, asked: m.Message) -> m.Changed:
        self.retried.append(asked)
        return m.Changed((m.TaskChange(TASK, "queued"),))

    def retry(self, step: str, *more: str) -> tuple[int, str, str]:
        return ctl(self.endpoint, "retry", "--from-step", step, str(TASK), *more)

    def done(self) -> list[str]:
        return sorted(self.world.facts().steps)


@pytest.fixture
def world(short_dir: object) -> TaskWorld:
    world = TaskWorld(short_dir)  # type: ignore[arg-type]
    for name in ("fetch", "clean", "load"):
        world.record(facts.step_done(name, name.upper()))
    world.record(facts.set_value("rows", 3), facts.result_made({"rows": 3}))
    return world


@pytest.fixture
def desk(world: TaskWorld, scripted: Scripted) -> Desk:
    return Desk(world, scripted)


def test_a_step_and_all_after_it_count_as_not_done_and_the_task_is_retried(desk: Desk) -> None:
    code, out, err = desk.retry("clean")
    assert (code, out) == (0, "task 12: queued again\n")
    assert err == "ckptctl: task 12: 2 steps will run again: clean, load\n"
    assert desk.retried == [m.Retry(m.Selector(ids=(TASK,)))]
    assert desk.done() == ["fetch"]
    assert desk.world.facts().values == {"rows": 3}


def test_what_the_task_came_to_is_taken_back_with_a_step(desk: Desk) -> None:
    files, uid = Files(str(desk.world.path("..", "..").resolve())), desk.world.uid
    before = desk.world.mark().cursor
    assert files.checkpoints(TASK, uid, verify=False, result=True).result == '{"rows": 3}'
    desk.retry("load")
    assert files.checkpoints(TASK, uid, verify=False, result=True).result == ""
    assert not desk.world.facts().result
    taken_back = desk.world.mark().cursor
    assert taken_back not in {"", before}

    desk.world.begin()
    desk.world.record(facts.step_done("load", "LOAD"))
    assert desk.world.mark().cursor not in {before, taken_back}
    desk.world.record(facts.result_made({"rows": 3}))
    assert desk.world.mark().cursor == before, "the same again is no progress"


def test_the_order_is_that_of_the_last_completion_over_all_attempts(desk: Desk) -> None:
    desk.world.begin()
    desk.world.record(facts.step_reset("fetch"))
    desk.world.record(facts.step_done("fetch"))
    desk.attempt = 2
    assert "1 step will run again: fetch" in desk.retry("fetch")[2]
    assert desk.done() == ["clean", "load"]


def test_the_same_line_again_does_the_same(desk: Desk) -> None:
    desk.retry("clean")
    code, _, err = desk.retry("clean")
    assert (code, len(desk.retried)) == (0, 2)
    assert "1 step will run again: clean" in err
    assert desk.retry("load")[0] == 0
    assert desk.done() == ["fetch"]


def test_an_interrupted_step_that_must_not_run_twice_and_its_job_are_forgotten(desk: Desk) -> None:
    desk.world.record(facts.step_start("pay"), facts.set_value(job_key("pay"), "job-7"))
    assert "pay" in desk.world.facts().started
    assert "2 steps will run again: load, pay" in desk.retry("load")[2]
    known = desk.world.facts()
    assert not known.started
    assert known.values == {"rows": 3}


@pytest.mark.parametrize(
    ("step", "hint"),
    [("claen", "its steps are: clean, fetch, load"), ("x", "its steps are: fetch, clean, load")],
)
def test_an_unknown_step_is_told_with_those_there_are_and_changes_nothing(
    desk: Desk, step: str, hint: str
) -> None:
    before = desk.world.journal_path().read_bytes()
    code, _, err = desk.retry(step)
    assert code == 4
    assert f"no step '{step}' was done by the task" in err
    assert hint in err
    assert desk.world.journal_path().read_bytes() == before
    assert not desk.retried


@pytest.mark.parametrize(
    ("phase", "reason", "part"),
    [
        ("running", "", "its steps are its own"), ("paused", "", "ckptctl cancel 12"),
        ("queued", "", "has not ended (queued)"), ("waiting", "at", "(waiting, at)"),
    ],
)  # fmt: skip
def test_a_task_that_is_not_at_rest_is_left_alone(
    desk: Desk, phase: str, reason: str, part: str
) -> None:
    desk.phase, desk.reason = phase, reason
    code, _, err = desk.retry("clean")
    assert code == 5
    assert part in err
    assert desk.done() == ["clean", "fetch", "load"]
    assert not desk.retried


def test_an_attempt_that_began_meanwhile_keeps_its_steps(desk: Desk) -> None:
    desk.phase, desk.reason = "waiting", "backoff"
    desk.world.begin()
    code, _, err = desk.retry("clean")
    assert code == 5
    assert "attempt 1 is over: attempt 2 exists: it was started meanwhile" in err
    assert desk.done() == ["clean", "fetch", "load"]


def test_fresh_and_from_step_contradict_each_other(desk: Desk) -> None:
    code, _, err = desk.retry("clean", "--fresh")
    assert code == 64
    assert "give one of them" in err
    assert not desk.retried


def test_a_task_that_never_ran_has_no_steps(desk: Desk) -> None:
    desk.world.dir += "0"
    code, _, err = desk.retry("clean")
    assert code == 4
    assert "it has recorded no steps" in err


def test_a_thousand_steps_are_taken_back_in_groups(desk: Desk) -> None:
    for first in range(0, 2_500, 500):
        desk.world.record(*(facts.step_done(f"part-{n}") for n in range(first, first + 500)))
    assert "2502 steps will run again: clean, load, part-0" in desk.retry("clean")[2]
    assert desk.done() == ["fetch"]
