"""What a task may use, and what becomes of one that wanted more."""

import subprocess

import msgspec
import pytest

from ckptd.core import image
from ckptd.core.explain import explain
from ckptd.core.port import Start
from ckptd.core.query import View, show
from ckptd.core.records import Phase, Spec
from ckptd.core.state import Run
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadRequest
from ckptd.protocol.limits import ARGV_BYTES_MAX, ENV_BYTES_MAX
from tests.unit.core.world import ME, ROOT, World

GIB = 1 << 30


def ids(*numbers: int) -> m.Selector:
    return m.Selector(ids=numbers)


def limit_of(world: World, number: int) -> int:
    return world.task(number).unpacked().memory_bytes


def told(world: World, number: int) -> str:
    return explain(world.state, world.task(number), world.now, world.policy)


def oom(world: World, number: int, *, blame: str = "limit", code: int = 0) -> None:
    world.begins(number)
    world.ends(number, "oom", code=code, signal=9, blame=blame)


def detail(world: World, number: int) -> m.TaskDetail:
    view = View(world.state, world.observed, ME, world.now, world.policy)
    return show(view, m.Show(ids(number)), "/state").tasks[0]


# --- limits ---------------------------------------------------------------------------------


def test_the_runner_is_told_every_limit() -> None:
    world = World()
    world.submit(
        "make", name="build", memory_bytes=GIB, cpus=1.5, tasks_max=100, io_weight=50, nice=10,
        stop_signal=2, grace_s=20.0,
    )  # fmt: skip
    (start,) = world.ordered(Start)
    assert isinstance(start, Start)
    assert (start.name, start.memory_bytes, start.cpus) == ("build", GIB, 1.5)
    assert (start.tasks_max, start.io_weight, start.nice) == (100, 50, 10)
    assert start.stop_signal == 2
    assert start.stop_s > 20.0  # to save, and then the grace


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"memory_bytes": 512}, "a memory limit of 512 bytes is below 4194304"),
        ({"cpus": 0.001}, "cpus 0.001 is below 0.01"),
        ({"nice": -5}, "nice -5 is for tasks that run as root"),
        ({"on_oom": "retry"}, "on_oom: 'retry' needs a factor"),
        ({"on_oom": "retry:x2,max=2G"}, "multiplies a memory limit, and there is none"),
        ({"on_oom": "retry:x2,max=2G", "memory_bytes": 3 * GIB}, "is below the memory limit"),
    ],
)
def test_limits_that_cannot_be_are_refused(asked: dict[str, object], complaint: str) -> None:
    with pytest.raises(BadRequest, match=complaint):
        World().submit(**asked)


@pytest.mark.parametrize("letter", ["x", "é"])
def test_an_environment_may_be_as_large_as_its_bound_and_no_larger(letter: str) -> None:
    some = {f"V{number}": letter * (60_000 // len(letter.encode())) for number in range(17)}
    room = ENV_BYTES_MAX - sum(len(f"{name}={value}".encode()) + 1 for name, value in some.items())
    rest = "x" * (room - len("A=\0"))
    assert World().submit(env={**some, "A": rest})
    with pytest.raises(BadRequest, match=f"environment of {ENV_BYTES_MAX + 1} bytes"):
        World().submit(env={**some, "A": rest + "x"})


@pytest.mark.parametrize("letter", ["x", "é"])
def test_a_word_or_variable_may_be_as_long_as_execve_takes_and_no_longer(letter: str) -> None:
    long = letter * ((ARGV_BYTES_MAX - 2) // len(letter.encode()))
    pad = "x" * (ARGV_BYTES_MAX - 1 - len(long.encode()))
    assert World().submit("true", long + pad)
    subprocess.run(["true", long + pad], check=True)
    for refused in (("true", long + pad + "x"), ("true", long + pad + letter)):
        with pytest.raises(BadRequest, match="is over"):
            World().submit(*refused)
        with pytest.raises(OSError, match="too long"):
            subprocess.run(refused, check=True)
    variable = long.encode()[len("A=") :].decode() + pad
    assert World().submit(env={"A": variable})
    with pytest.raises(BadRequest, match="'A' has 131073 bytes"):
        World().submit(env={"A": variable + "x"})


def test_a_task_of_roots_may_go_before_others() -> None:
    world = World()
    assert world.phase(world.submit(caller=ROOT, nice=-5)) is Phase.STARTING


def test_limits_of_a_waiting_task_can_be_changed_and_taken_away() -> None:
    world = World()
    number = world.submit(hold=True, memory_bytes=GIB, cpus=2.0, nice=3)
    world.ask(m.Edit(ids(number), memory_bytes=4 * GIB, cpus=0.0, on_oom="hold"))
    spec = world.task(number).unpacked()
    assert (spec.memory_bytes, spec.cpus, spec.nice) == (4 * GIB, 0.0, 3)
    assert spec.on_oom == "hold"
    answer = world.ask(m.Edit(ids(number), nice=-1))
    assert isinstance(answer, m.Changed)
    assert answer.tasks[0].error is not None
    assert world.task(number).unpacked().nice == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"memory_bytes": 2 * GIB}, {"cpus": 0.5}, {"tasks_max": 7}, {"io_weight": 900},
        {"nice": 19}, {"on_oom": "fail"},
    ],
)  # fmt: skip
def test_each_limit_can_be_changed_on_its_own(changed: dict[str, int | float | str]) -> None:
    world = World()
    before = {"memory_bytes": GIB, "cpus": 2.0, "tasks_max": 5, "io_weight": 50, "nice": 3}
    number = world.submit(hold=True, on_oom="hold", **before)  # type: ignore[arg-type]
    world.ask(m.Edit(ids(number), **changed))  # type: ignore[arg-type]
    spec = msgspec.structs.asdict(world.task(number).unpacked())
    asked = {"on_oom": "hold", **before, **changed}
    assert {name: spec[name] for name in asked} == asked


def test_a_default_of_the_daemon_does_not_stand_in_the_way_of_an_edit() -> None:
    world = World()
    world.policy = msgspec.structs.replace(world.policy, on_oom="retry:x2,max=2G")
    number = world.submit(hold=True)
    answer = world.ask(m.Edit(ids(number), nice=1))
    assert isinstance(answer, m.Changed)
    assert answer.tasks[0].error is None


# --- out of memory --------------------------------------------------------------------------


def test_without_a_policy_it_is_a_failure_like_any_other() -> None:
    world = World()
    number = world.submit(memory_bytes=GIB)
    oom(world, number)
    assert world.phase(number) is Phase.FAILED
    again = world.submit(memory_bytes=GIB, retries=3)
    oom(world, again)
    assert world.phase(again) is Phase.WAITING


def test_a_growing_limit_is_tried_at_once_and_counts_no_failure_until_its_bound() -> None:
    world = World()
    number = world.submit(memory_bytes=2 * GIB, on_oom="retry:x2,max=6G")
    limits = []
    for _ in range(2):
        oom(world, number)
        assert world.phase(number) is Phase.STARTING
        limits.append(limit_of(world, number))
    assert limits == [4 * GIB, 6 * GIB]
    starts = world.ordered(Start)
    assert [start.memory_bytes for start in starts] == [2 * GIB, 4 * GIB, 6 * GIB]  # type: ignore[union-attr]
    run = world.task(number).run
    assert run is not None
    assert (run.failures, run.crashes) == (0, 0)
    oom(world, number)
    assert world.phase(number) is Phase.FAILED
    assert limit_of(world, number) == 6 * GIB


def test_a_task_that_waits_for_its_turn_with_a_larger_limit_says_so() -> None:
    world = World(slots=1)
    number = world.submit(memory_bytes=2 * GIB, on_oom="retry:x2,max=6G")
    world.submit(priority=9)
    oom(world, number)
    assert world.phase(number) is Phase.QUEUED
    assert "goes on with a memory limit of 4,096 MiB" in told(world, number)


def test_the_attempts_of_a_growing_limit_are_bounded_all_the_same() -> None:
    world = World(attempts_max=3)
    number = world.submit(memory_bytes=GIB, on_oom="retry:x1.1,max=900T")
    for _ in range(3):
        oom(world, number)
    assert world.phase(number) is Phase.QUARANTINED


def test_fail_is_final_whatever_retries_are_left() -> None:
    world = World()
    number = world.submit(memory_bytes=GIB, on_oom="fail", retries=9)
    oom(world, number)
    assert (world.phase(number), world.task(number).reason) == (Phase.FAILED, "oom")


def test_hold_waits_for_a_person_who_raises_the_limit() -> None:
    world = World()
    number = world.submit(memory_bytes=GIB, on_oom="hold")
    oom(world, number)
    assert (world.phase(number), world.task(number).reason) == (Phase.HELD, "oom")
    assert f"ckptctl edit {number} --memory" in told(world, number)
    world.ask(m.Edit(ids(number), memory_bytes=8 * GIB))
    world.ask(m.Release(ids(number)))
    assert world.phase(number) is Phase.STARTING
    assert world.ordered(Start)[-1].memory_bytes == 8 * GIB  # type: ignore[union-attr]


def test_a_victim_of_the_host_is_tried_again_later_whatever_its_policy_says() -> None:
    world = World()
    number = world.submit(memory_bytes=GIB, on_oom="fail")
    oom(world, number, blame="host")
    assert (world.phase(number), world.task(number).reason) == (Phase.WAITING, "transient")
    run = world.task(number).run
    assert run is not None
    assert (run.failures, run.interruptions) == (0, 1)
    assert limit_of(world, number) == GIB


def test_a_host_that_never_has_memory_ends_in_quarantine() -> None:
    world = World(interruptions_max=2)
    number = world.submit()
    for _ in range(3):
        oom(world, number, blame="host")
        world.pass_time(1_000)
    assert world.phase(number) is Phase.QUARANTINED


def test_a_plain_failure_after_the_limit_killed_a_child_grows_the_limit_too() -> None:
    world = World()
    number = world.submit("make", memory_bytes=GIB, on_oom="retry:x2,max=4G")
    world.begins(number)
    world.ends(number, code=2, blame="limit")
    assert limit_of(world, number) == 2 * GIB
    world.begins(number)
    world.ends(number, code=65, blame="limit")  # a code that says: no retry makes it better
    assert world.phase(number) is Phase.FAILED


def test_whose_memory_ran_out_and_who_paid_for_it_is_told_apart() -> None:
    texts = []
    for blame, code in (("limit", 0), ("limit", 137), ("host", 0), ("", 0)):
        world = World()
        number = world.submit(memory_bytes=GIB)
        oom(world, number, blame=blame, code=code)
        texts.append(told(world, number).split("Last attempt: ")[1])
    assert "went over its memory limit: its main process was killed" in texts[0]
    assert "a child process was killed" in texts[1]
    assert "the task itself exited with 137" in texts[1]
    assert "because the host ran out of memory, not at its own limit" in texts[2]
    assert len(set(texts)) == 4


@pytest.mark.parametrize(("code", "shown"), [(0, None), (137, 137)])
def test_an_oom_has_an_exit_code_only_where_the_main_process_exited(
    code: int, shown: int | None
) -> None:
    world = World()
    number = world.submit(memory_bytes=GIB)
    oom(world, number, code=code)
    assert detail(world, number).row.code == shown
    assert detail(world, number).attempts[0].code == shown


# --- the machine and the unit ---------------------------------------------------------------


def test_a_task_that_the_machine_stopped_goes_on_even_if_it_said_it_was_done() -> None:
    world = World()
    number = world.submit()
    for _ in range(5):
        world.begins(number)
        world.state.clean = False
        world.ends(number, "shutdown", code=0)
    assert world.phase(number) is Phase.STARTING
    run = world.task(number).run
    assert run is not None
    assert (run.failures, run.interruptions, run.host_deaths) == (0, 5, 0)


def test_a_task_whose_unit_was_stopped_by_hand_is_cancelled() -> None:
    world = World()
    number = world.submit(retries=9)
    world.begins(number)
    world.ends(number, "stopped", signal=15)
    assert (world.phase(number), world.task(number).reason) == (Phase.CANCELLED, "stopped")
    assert "systemctl stop" in told(world, number)


def test_our_own_stop_is_told_as_ours_even_where_the_unit_was_stopped() -> None:
    world = World()
    number = world.submit()
    world.begins(number)
    world.ask(m.Cancel(ids(number)))
    world.ends(number, "shutdown", signal=15)
    run = world.task(number).run
    assert run is not None
    assert run.past[-1].cause == "cancel"
    assert world.phase(number) is Phase.CANCELLED


# --- invocations ----------------------------------------------------------------------------


def test_show_names_the_unit_of_each_attempt() -> None:
    world = World()
    number = world.submit(retries=5)
    world.begins(number, invocation="a" * 32)
    assert detail(world, number).unit == f"ckptd-task-{number}-1.service"
    world.ends(number, code=1)
    world.pass_time(10)
    assert detail(world, number).unit == ""  # the second attempt has not begun
    assert detail(world, number).attempts[0].invocation == "a" * 32
    world.begins(number, invocation="b" * 32)
    assert detail(world, number).invocation == "b" * 32


def test_a_snapshot_keeps_limits_and_invocations_and_one_of_before_still_reads() -> None:
    world = World()
    number = world.submit(cpus=1.5, on_oom="hold")
    world.begins(number, invocation="a" * 32)
    task = image.load(image.chunks(world.state)).tasks.get(number)
    assert task == world.task(number)

    old = msgspec.to_builtins(Run(3, 1, warning="old", patience_from=2))[:-1]
    assert msgspec.convert(old, Run) == Run(3, 1, warning="old", patience_from=2)


def test_a_spec_without_limits_takes_no_more_room_than_before() -> None:
    assert msgspec.to_builtins(Spec(("true",))) == {"argv": ("true",)}
