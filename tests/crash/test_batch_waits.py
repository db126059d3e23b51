"""A batch that must wait: rates, Retry-After, preflights, parking without a slot, being stopped."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from ckptd.batch import ledger
from ckptd.sdk.rate import Bucket
from ckptd.storage import taskdir
from tests.batch_world import BatchWorld
from tests.task_world import TaskWorld
from tests.waiting import until


@pytest.fixture
def world(tmp_path: Path) -> BatchWorld:
    return BatchWorld(tmp_path)


@pytest.fixture
def task(tmp_path: Path) -> TaskWorld:
    """Return the task that the runner is, as the daemon prepares it."""
    return TaskWorld(tmp_path)


def shell(script: str) -> list[str]:
    return ["sh", "-c", script, "sh"]


def under(task: TaskWorld) -> dict[str, str]:
    return {key: value for key, value in task.environ().items() if key.startswith("CKPTD_")}


def starts_s(world: BatchWorld) -> list[float]:
    return [float(word) for word in (world.work / "starts").read_text().split()]


STARTS = "date +%s.%N >>starts"
TOO_MANY = "ckpt retry-after 300 api && exit 75"


def test_a_rate_spaces_the_starts_over_all_workers(world: BatchWorld) -> None:
    items = [str(n) for n in range(8)]
    world.prepare(argv=shell(STARTS), items=items, rate="10/s", jobs=8)
    world.run()

    found = sorted(starts_s(world))
    assert found[-1] - found[0] >= 0.6
    assert "pause" not in world.events()


def test_a_limit_halves_how_many_run_at_once_and_successes_bring_them_back(
    world: BatchWorld,
) -> None:
    script = "test -e $1.met || { >$1.met; ckpt retry-after 0.3; exit 75; }"
    world.prepare(argv=shell(script), items=[str(n) for n in range(12)], jobs=4)
    world.run()

    assert set(world.statuses().values()) == {"pass"}
    assert world.results()["0"]["tries"] == 2


def test_under_the_daemon_a_batch_parks_and_gives_its_slot_back(
    world: BatchWorld, task: TaskWorld
) -> None:
    script = f"test -e free || {{ {TOO_MANY}; }}; echo $1"
    world.prepare(argv=shell(script), items=["a", "b"], jobs=2, scope="api")

    parked = world.run(code=75, **under(task))
    asked_s = task.mark().retry_after_s

    assert "batch b: parked: 2 items, 2 to do" in parked.stderr
    assert 280 < asked_s <= 330
    assert world.events() == ["begin", "pause", "end"]
    assert not world.facts().flying
    again = world.run(code=75, **under(task))  # started too early: the scope still waits
    assert again.stdout == ""
    (world.folder / "scopes" / "api").unlink()
    (world.work / "free").touch()
    task.begin()
    done = world.run(code=0, **under(task))

    assert sorted(done.stdout.split()) == ["a", "b"]
    assert task.facts().progress["done"] == 2
    waits = ledger.waits(world.facts())
    assert (waits.pause_count, waits.resume_count) == (2, 2)
    assert 0 < waits.total_wait_s < 30


def test_a_foreground_batch_waits_and_says_until_when(world: BatchWorld) -> None:
    script = "test -e met || { >met; ckpt retry-after 4; exit 75; }"
    world.prepare(argv=shell(script), items=["a"], park_after_s=0.5)

    done = world.run()

    assert "waits 0:0" in done.stderr
    assert "goes on after" in done.stderr
    assert world.events() == ["begin", "pause", "resume", "end"]
    assert ledger.waits(world.facts()).total_wait_s > 0


def test_a_wait_in_the_foreground_can_be_interrupted_and_refused(world: BatchWorld) -> None:
    world.prepare(argv=shell(TOO_MANY), items=["a"])
    assert "would have to wait" in world.run("--no-wait", code=2).stderr

    runner = world.start()
    until(lambda: world.events().count("pause") == 2)
    runner.send_signal(signal.SIGINT)
    said = runner.communicate(timeout=20)[1]

    assert runner.returncode == 130
    assert "interrupted: 1 item, 1 to do" in said
    assert not world.results()


def test_a_limit_of_one_batch_holds_the_other_of_the_scope(
    world: BatchWorld, tmp_path: Path
) -> None:
    world.prepare(argv=shell(TOO_MANY), items=["a"], scope="api")
    world.run("--no-wait", code=2)
    other = BatchWorld(tmp_path, "other")
    other.prepare(argv=shell(STARTS), items=["a"], scope="api")
    other.run("--no-wait", code=2)

    assert not (other.work / "starts").exists()


def test_functions_meet_limits_by_raising(world: BatchWorld) -> None:
    world.module(
        "import os\n"
        "from ckptd.sdk.outcomes import RateLimited, TransientError\n"
        "def work(item):\n"
        "    if os.path.exists(item): return item\n"
        "    open(item, 'w')\n"
        "    if item == 'a': raise RateLimited(retry_after=0.2, scope='other')\n"
        "    raise TransientError(retry_after=0.1)\n"
    )
    world.prepare(python="items:work", items=["a", "b"], jobs=2)
    world.run()

    assert set(world.statuses().values()) == {"pass"}
    assert (world.folder / "scopes" / "other").exists()


def test_a_function_that_parks_itself_gives_its_worker_to_others(world: BatchWorld) -> None:
    world.module(
        "import time\n"
        "def work(ctx, item):\n"
        "    if item == 'later': ctx.sleep_until(time.time() + 300)\n"
        "    return item\n"
    )
    world.prepare(python="items:work", items=["later", "a", "b"], jobs=1)
    world.run("--no-wait", code=2)

    assert world.statuses() == {"a": "pass", "b": "pass"}


def test_a_preflight_lets_go_waits_or_refuses(world: BatchWorld) -> None:
    script = "echo asked >>asked; test -e go && exit 0; test -e wait && { echo 300; exit 75; }"
    preflight = [*shell(f"{script}; echo no quota >&2; exit 9")]
    world.prepare(argv=shell(STARTS), items=["a", "b"], preflight=preflight, jobs=1)

    refused = world.run(code=1)
    assert "the preflight exited with 9: no quota" in refused.stderr
    (world.work / "wait").touch()
    world.run("--no-wait", code=2)
    assert not (world.work / "starts").exists()
    Bucket(f"batch-{batch_id(world):x}", str(world.folder / "scopes")).take(1)
    for path in (world.folder / "scopes").iterdir():
        path.unlink()
    (world.work / "go").touch()
    world.run()

    assert len(starts_s(world)) == 2
    assert (world.work / "asked").read_text().split() == ["asked"] * 3


def batch_id(world: BatchWorld) -> int:
    return int(json.loads((world.dir / "batch.json").read_text())["id"])


def test_a_preflight_is_asked_again_before_it_goes_on_after_a_wait(world: BatchWorld) -> None:
    script = "test -e met || { >met; ckpt retry-after 4; exit 75; }"
    preflight = shell("echo asked >>asked")
    world.prepare(argv=shell(script), items=["a"], preflight=preflight)
    world.run()

    assert (world.work / "asked").read_text().split() == ["asked"] * 2


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("return None", 0),
        ("return True", 0),
        ("return 300", 2),
        ("raise RateLimited(retry_after=300)", 2),
        ("raise ValueError('no')", 1),
        ("return False", 1),
    ],
)
def test_a_preflight_can_be_a_function(world: BatchWorld, body: str, code: int) -> None:
    text = f"from ckptd.sdk.outcomes import RateLimited\ndef may():\n    {body}\n"
    world.module(text, "quota")
    world.prepare(argv=["true"], items=["a"], preflight="quota:may")

    world.run("--no-wait", code=code)
    assert bool(world.results()) == (code == 0)


def test_items_that_are_never_ready_end_as_errors(world: BatchWorld) -> None:
    world.module(
        "from ckptd.sdk.outcomes import TransientError\n"
        "def work(item):\n"
        "    raise TransientError('busy', retry_after=0.001)\n"
    )
    world.prepare(python="items:work", items=["a"])
    world.run(code=1)

    assert world.results()["a"]["text"] == "still not, after 100 times: busy"


# --- being stopped -------------------------------------------------------------------------------


def test_ctrl_c_lets_items_in_flight_end_and_a_second_kills_them(world: BatchWorld) -> None:
    script = "echo $1 >>runs; until test -e free; do sleep 0.01; done"
    world.prepare(argv=shell(script), items=["a", "b", "c", "d"], jobs=2)
    runner = world.start()
    until(lambda: len(lines(world, "runs")) == 2)
    runner.send_signal(signal.SIGINT)
    until(lambda: list((world.dir / "items").glob("*/control.json")))
    (world.work / "free").touch()
    said = runner.communicate(timeout=20)[1]

    assert runner.returncode == 130
    assert "2 in flight may end within 10 s; Ctrl-C again ends them" in said
    assert set(world.statuses()) == {"a", "b"}
    (world.work / "free").unlink()
    runner = world.start()
    until(lambda: len(lines(world, "runs")) == 4)
    for count in (1, 2):
        runner.send_signal(signal.SIGINT)
        if count == 1:
            until(lambda: list((world.dir / "items").glob("*/control.json")))
    runner.communicate(timeout=20)
    assert runner.returncode == 130
    assert set(world.statuses()) == {"a", "b"}


def lines(world: BatchWorld, name: str) -> list[str]:
    path = world.work / name
    return path.read_text().split() if path.exists() else []


def test_an_item_sees_the_stop_and_what_outlasts_the_grace_is_ended(world: BatchWorld) -> None:
    script = (
        "echo $1 >>runs; test $1 = deaf && exec sleep 1000\nuntil ckpt stop?; do :; done; exit 75"
    )
    world.prepare(argv=shell(script), items=["deaf", "heeds"], jobs=2, grace_s=1.0)
    runner = world.start()
    until(lambda: len(lines(world, "runs")) == 2)
    runner.send_signal(signal.SIGTERM)
    said = runner.communicate(timeout=20)[1]

    assert runner.returncode == 75
    assert "2 in flight may end within 1 s" in said
    assert not world.results()
    assert world.events()[-1] == "end"


def test_a_stop_of_the_daemon_counts_no_item_that_it_took_along(
    world: BatchWorld, task: TaskWorld
) -> None:
    script = "test $1 = a && trap 'exit 1' TERM; echo $$ >>pids; while :; do sleep 0.05; done"
    world.prepare(argv=shell(script), items=["a", "b"], jobs=2)
    runner = world.start(**under(task))
    until(lambda: len(lines(world, "pids")) == 2)
    control = {"stop": "shutdown", "deadline": time.time() + 30, "checkpoint": 0}
    task.path("control.json").write_text(json.dumps(control))
    for pid in lines(world, "pids"):  # the whole tree at once, as a service manager does
        os.kill(int(pid), signal.SIGTERM)
    runner.send_signal(signal.SIGTERM)
    runner.communicate(timeout=20)

    assert runner.returncode == 75
    assert not world.results()
    assert not world.facts().flying


def test_progress_is_durable_for_the_daemon_while_it_runs(
    world: BatchWorld, task: TaskWorld
) -> None:
    world.prepare(argv=shell("test $1 = 3 && until test -e free; do sleep 0.01; done; true"),
                  items=["1", "2", "3"], jobs=1)  # fmt: skip
    runner = world.start(**under(task))
    until(lambda: task.facts().progress.get("done") == 2)
    before = task.mark().cursor
    (world.work / "free").touch()
    runner.communicate(timeout=20)

    assert runner.returncode == 0
    assert task.facts().progress["total"] == 3
    assert task.mark().cursor != before


def test_killed_runners_are_progress_to_the_daemon_so_that_poison_can_be_found(
    world: BatchWorld, task: TaskWorld
) -> None:
    world.prepare(argv=shell("echo $1 >>runs; sleep 1000"), items=["poison"])
    cursors = []
    for number in range(5):
        runner = world.start(**under(task))
        until(lambda number=number: len(lines(world, "runs")) > number)  # type: ignore[misc]
        runner.kill()
        runner.communicate(timeout=20)
        cursors.append(task.mark().cursor)
        task.begin()
    world.run(code=1, **under(task))

    assert len(set(cursors)) == len(cursors)
    assert world.statuses() == {"poison": "quarantined"}


def test_an_item_that_is_never_ready_does_not_keep_the_others_from_their_turn(
    world: BatchWorld,
) -> None:
    script = "test $1 = a && test ! -e free && exit 75; test $1 = c && touch free; exit 0"
    world.prepare(argv=shell(script), items=["a", "b", "c"], jobs=1)
    world.run()
    assert world.statuses() == {"a": "pass", "b": "pass", "c": "pass"}


def test_a_slow_rate_does_not_use_up_the_runs_that_a_ledger_holds(
    world: BatchWorld, task: TaskWorld
) -> None:
    world.prepare(argv=shell("echo $1"), items=["a", "b"], jobs=1, rate="2/s", park_after_s=0.1)
    assert "parked" in world.run(code=75, **under(task)).stderr  # while runs are plenty
    taskdir.prepare(str(world.dir), 5_000, os.getuid(), os.getgid(), fresh=False)
    task.begin()

    world.prepare("--only", "a", "--only", "b")  # both again
    done = world.run(code=0, **under(task))

    assert sorted(done.stdout.split()) == ["a", "b"]
