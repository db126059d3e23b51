"""`run`: what items come out with, what is captured, retried, limited and stopped."""

import json
from pathlib import Path

import pytest

from tests.batch_world import BatchWorld


@pytest.fixture
def world(tmp_path: Path) -> BatchWorld:
    return BatchWorld(tmp_path)


def shell(script: str) -> list[str]:
    return ["sh", "-c", script, "sh"]


def test_exit_codes_of_a_command_are_statuses(world: BatchWorld) -> None:
    on_exit = {"2": "skipped", "3": "quarantined"}
    world.prepare(argv=shell("exit $1"), items=["0", "1", "2", "3", "4"], on_exit=on_exit, jobs=2)

    done = world.run(code=1)

    assert world.statuses() == {
        "0": "pass",
        "1": "fail",
        "2": "skipped",
        "3": "quarantined",
        "4": "error",
    }
    assert world.results()["4"]["text"] == "exit 4"
    assert "5 items, 1 pass, 1 fail, 1 error, 1 skipped, 1 quarantined" in done.stderr


def test_a_plain_exit_2_is_an_error_of_the_item(world: BatchWorld) -> None:
    world.prepare(argv=shell("echo bad option >&2; exit 2"), items=["a"])
    world.run(code=1)

    assert world.results()["a"]["status"] == "error"
    assert world.results()["a"]["text"] == "exit 2: bad option"


def test_words_take_the_item_its_key_its_place_and_its_fields(world: BatchWorld) -> None:
    items = [{"id": 1, "name": "x y"}, {"id": 2, "name": "z"}]
    source = {"from": "lines", "lines": items, "format": "jsonl", "key": "id"}
    world.prepare(argv=["echo", "{N}:{key}", "{name}", "{other}", "{ }"], items=source, jobs=1)

    assert world.run().stdout == "1:1 x y {other} { }\n2:2 z {other} { }\n"


def test_without_a_placeholder_the_item_is_the_last_word(world: BatchWorld) -> None:
    world.prepare(argv=["echo", "-n", "<"], items=["a b"])

    assert world.run().stdout == "< a b\n"


def test_an_item_without_the_field_is_an_error_of_its_own(world: BatchWorld) -> None:
    source = {"from": "lines", "lines": [{"a": "1"}, {"b": "2"}], "format": "jsonl"}
    world.prepare(argv=["echo", "{a}"], items=source)
    world.run(code=1)

    assert sorted(world.statuses().values()) == ["error", "pass"]
    assert world.results()['{"b":"2"}']["text"] == "the item has no field 'a'"


@pytest.mark.parametrize(
    ("capture", "script", "result"),
    [
        ("last", "echo one; echo two; echo", "two"),
        ("all", "echo one; echo two", "one\ntwo\n"),
        ("json", "echo '{\"n\":[1,2]}'", {"n": [1, 2]}),
        ("none", "echo one", None),
    ],
)
def test_what_is_captured_is_the_result(
    world: BatchWorld, capture: str, script: str, result: object
) -> None:
    world.prepare(argv=shell(script), items=["a"], capture=capture)
    world.run()

    assert world.results()["a"].get("result") == result


def test_a_result_that_cannot_be_kept_is_an_error_and_the_rest_is_unharmed(
    world: BatchWorld,
) -> None:
    script = "case $1 in a) head -c 300000 /dev/zero;; b) head -c 100000 /dev/zero;; *) echo;; esac"
    world.prepare(argv=shell(script), items=["a", "b", "c"], capture="all", jobs=1)
    world.run(code=1)

    assert world.statuses() == {"a": "error", "b": "error", "c": "pass"}
    assert "at most 262,144 are kept" in world.results()["a"]["text"]


def test_output_is_grouped_by_item_and_logged_by_lane(world: BatchWorld) -> None:
    script = "echo begin $1; sleep 0.0$1; echo end $1; echo told $1 >&2"
    world.prepare(argv=shell(script), items=["3", "2", "1", "4"], jobs=4)

    done = world.run()
    world.run()
    lines = done.stdout.splitlines()
    logs = "".join(path.read_text() for path in (world.dir / "logs").iterdir())

    assert sorted(zip(lines[::2], lines[1::2], strict=True)) == [
        (f"begin {n}", f"end {n}") for n in "1234"
    ]
    assert logs.count("--- ") == 4
    assert "--- 3: pass, try 1 of run 1" in logs
    assert "told 4\n" in logs


def test_functions_return_raise_skip_and_quarantine(world: BatchWorld) -> None:
    world.module(
        "from ckptd.sdk.outcomes import PermanentError, QuarantineItem, SkipItem\n"
        "def work(item):\n"
        "    print('at', item)\n"
        "    match item:\n"
        "        case 'skip': raise SkipItem('not today')\n"
        "        case 'poison': raise QuarantineItem('never again')\n"
        "        case 'permanent': raise PermanentError('gone')\n"
        "        case 'assert': assert item == 'x', 'differs'\n"
        "        case 'raise': raise ValueError('bad value')\n"
        "        case 'set': return {1, 2}\n"
        "        case 'nan': return float('nan')\n"
        "        case 'large': return 'x' * 300_000\n"
        "        case 'exit': raise SystemExit(3)\n"
        "        case _: return {'item': item}\n"
    )
    names = ["ok", "skip", "poison", "permanent", "assert", "raise", "set", "nan", "large", "exit"]
    world.prepare(python="items:work", items=names, jobs=2)

    done = world.run(code=1)
    found = world.results()

    assert {key: fact["status"] for key, fact in found.items()} == {
        "ok": "pass",
        "skip": "skipped",
        "poison": "quarantined",
        "permanent": "fail",
        "assert": "fail",
        "raise": "error",
        "set": "error",
        "nan": "error",
        "large": "error",
        "exit": "error",
    }
    assert found["ok"]["result"] == {"item": "ok"}
    assert found["raise"]["text"] == "ValueError: bad value (items.py:9)"
    assert "holds a set" in found["set"]["text"]
    assert "at most 262,144" in found["large"]["text"]
    assert done.stdout.count("at ") == len(names)


@pytest.mark.parametrize("mode", ["process", "threads", "async"])
def test_every_mode_runs_items_side_by_side(world: BatchWorld, mode: str) -> None:
    world.module(
        "import asyncio, os, threading\n"
        "barrier = threading.Barrier(3)\n"
        "here = []\n"
        "def threads(item):\n"
        "    barrier.wait(20)\n"
        "    return os.getpid()\n"
        "def process(item):\n"
        "    return os.getpid()\n"
        "gate = None\n"
        "async def loop(item):\n"
        "    here.append(item)\n"
        "    while len(here) < 3: await asyncio.sleep(0.001)\n"
        "    return os.getpid()\n"
    )
    name = {"process": "process", "threads": "threads", "async": "loop"}[mode]
    world.prepare(python=f"items:{name}", mode=mode, items=["a", "b", "c"], jobs=3)
    world.run()

    hosts = {fact["result"] for fact in world.results().values()}
    assert len(hosts) == 1 or mode == "process"


def test_a_plain_function_is_no_coroutine(world: BatchWorld) -> None:
    world.module("def work(item): ...\n")
    world.prepare(python="items:work", mode="async", items=["a"])

    assert "no coroutine function" in world.run(code=1).stderr
    assert not world.results()


def test_a_function_with_ctx_goes_on_inside_its_item(world: BatchWorld) -> None:
    world.module(
        "import os, pathlib\n"
        "def step():\n"
        "    pathlib.Path('steps').open('a').write('s')\n"
        "    return 7\n"
        "def work(ctx, item):\n"
        "    first = ctx.step('first', step)\n"
        "    if not os.path.exists('crashed'):\n"
        "        pathlib.Path('crashed').touch()\n"
        "        os._exit(1)\n"
        "    return first\n"
    )
    world.prepare(python="items:work", items=["a"])
    world.run()

    assert world.results()["a"]["result"] == 7
    assert (world.work / "steps").read_text() == "s"
    assert list((world.dir / "items").iterdir()) == []


def test_a_command_goes_on_inside_its_item_by_ckpt(world: BatchWorld) -> None:
    script = "ckpt step one -- sh -c 'echo s >>steps' && test -e again || { >again; exit 85; }"
    world.prepare(argv=shell(script), items=["a"])
    world.run()

    assert world.statuses() == {"a": "pass"}
    assert world.results()["a"]["tries"] == 2
    assert (world.work / "steps").read_text() == "s\n"


def test_exit_85_without_anything_new_ends_as_an_error(world: BatchWorld) -> None:
    world.prepare(argv=shell("echo x >>runs; exit 85"), items=["a"])
    world.run(code=1)

    assert "nothing new was saved" in world.results()["a"]["text"]
    assert len((world.work / "runs").read_text().split()) == 3


def test_errors_are_forgiven_as_often_as_was_said(world: BatchWorld) -> None:
    script = "echo $1 >>runs; test $(grep -c $1 runs) = 3"
    world.prepare(argv=shell(script), items=["a"], retries=2, on_exit={"1": "error"}, jobs=1)
    world.run()

    assert world.results()["a"]["tries"] == 3


def test_an_item_that_takes_too_long_is_ended_with_its_children(world: BatchWorld) -> None:
    world.prepare(argv=shell("sleep 100 & sleep 100"), items=["a", "b"], timeout_s=0.2, jobs=2)
    world.run(code=1)

    assert world.results()["a"]["text"] == "timed out after 0.2 s"
    assert set(world.statuses().values()) == {"error"}


def test_a_function_that_takes_too_long_harms_no_other(world: BatchWorld) -> None:
    world.module(
        "import time\n"
        "def work(item):\n"
        "    time.sleep(100 if item == 'slow' else 0.2)\n"
        "    return item\n"
    )
    world.prepare(python="items:work", items=["slow", "a", "b", "c"], timeout_s=1.5, jobs=2)
    world.run(code=1)

    assert world.statuses() == {"slow": "error", "a": "pass", "b": "pass", "c": "pass"}


def test_a_coroutine_that_takes_too_long_is_cancelled_alone(world: BatchWorld) -> None:
    world.module(
        "import asyncio, os\n"
        "async def work(item):\n"
        "    await asyncio.sleep(100 if item == 'slow' else 0.2)\n"
        "    return os.getpid()\n"
    )
    world.prepare(python="items:work", items=["slow", "a", "b", "c"], timeout_s=1.5, jobs=2)
    world.run(code=1)

    found = world.results()
    assert found["slow"]["text"] == "timed out after 1.5 s"
    assert len({found[key]["result"] for key in "abc"}) == 1  # their process was left alone
    assert {found[key]["tries"] for key in "abc"} == {1}


def test_a_coroutine_with_ctx_has_its_steps(world: BatchWorld) -> None:
    world.module(
        "import os, pathlib\n"
        "def first():\n"
        "    pathlib.Path('steps').open('a').write('s')\n"
        "    return 7\n"
        "async def work(ctx, item):\n"
        "    found = await ctx.step('first', first)\n"
        "    if not os.path.exists('crashed'):\n"
        "        pathlib.Path('crashed').touch()\n"
        "        os._exit(1)\n"
        "    return found\n"
    )
    world.prepare(python="items:work", items=["a"], jobs=2)
    world.run()

    assert world.results()["a"]["result"] == 7
    assert (world.work / "steps").read_text() == "s"


def test_what_a_module_prints_or_leaves_running_does_not_disturb(world: BatchWorld) -> None:
    world.module(
        "import os, sys, threading, time\n"
        "print('module speaks')\n"
        "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "def work(item):\n"
        "    print('err', item, file=sys.stderr)\n"
        "    os.write(1, b'raw\\n')\n"
        "    return item\n"
    )
    world.prepare(python="items:work", items=["a", "b"], jobs=2)
    done = world.run()

    assert set(world.statuses().values()) == {"pass"}
    assert done.stdout.count("raw") == 2
    assert done.stdout.count("err ") == 2


def test_a_module_that_ends_its_process_is_told_and_not_tried_for_ever(world: BatchWorld) -> None:
    world.module("def work(item):\n    return item\n")
    world.prepare(python="items:work", items=["a"])
    world.module("import os\nos._exit(3)\n")

    said = world.run(code=1).stderr

    assert "the process ended while its module was imported (exited with 3)" in said
    assert not world.results()


def test_errors_and_failures_are_retried_on_demand_and_results_superseded(
    world: BatchWorld,
) -> None:
    script = "echo $1 >>runs; test -e mended && exit 0; exit $1"
    world.prepare(argv=shell(script), items=["0", "1", "3"], jobs=1)
    world.run(code=1)
    world.run(code=1)  # completed means attempted: nothing runs again by itself
    (world.work / "mended").touch()

    assert world.prepare("--retry-errors")["todo"] == 1
    world.run(code=1)
    assert world.statuses() == {"0": "pass", "1": "fail", "3": "pass"}
    assert world.prepare("--retry-failed")["todo"] == 1
    world.run()
    assert world.statuses() == {"0": "pass", "1": "pass", "3": "pass"}
    assert (world.work / "runs").read_text().split() == ["0", "1", "3", "3", "1"]


def test_only_runs_what_is_named_done_or_not(world: BatchWorld) -> None:
    world.prepare(argv=["echo"], items=["a", "b", "c"], jobs=1)
    world.prepare("--only", "b")
    assert world.run().stdout == "b\n"
    assert world.run().stdout == "a\nc\n"  # the wish was for one run
    world.prepare("--only", "b", "--only", "c")

    assert sorted(world.run().stdout.split()) == ["b", "c"]


def test_a_limit_leaves_the_rest_for_later_and_that_is_not_finished(world: BatchWorld) -> None:
    world.prepare(argv=["echo"], items=["a", "b", "c", "d", "e"], limit=2, jobs=1)

    assert world.run(code=2).stdout == "a\nb\n"
    assert world.run(code=2).stdout == ""  # the limit is that of the submit
    said = world.run("--limit", "1", code=2).stderr
    assert "stopped at --limit: 5 items, 3 pass, 2 to do" in said
    world.prepare(limit=2)
    assert world.run(code=0).stdout.split()[-1] == "e"  # what it allows was all that was left


@pytest.mark.parametrize("argv", [["false"], ["sh", "-c", "exit 9"]])
def test_errors_are_told_by_the_exit_code_once_a_limit_leaves_nothing(
    world: BatchWorld, argv: list[str]
) -> None:
    world.prepare(argv=argv, items=["a", "b"], limit=1)
    world.run(code=2)
    world.prepare(limit=1)
    world.run(code=1)


def test_a_line_that_would_do_the_same_again_for_ever_does_not_say_that_it_goes_on(
    world: BatchWorld,
) -> None:
    world.prepare(argv=["false"], items=["a", "b"])
    world.run(code=1)
    for _ in range(2):
        world.prepare("--retry-failed", limit=1)
        world.run(code=1)
    world.prepare("--only", "a", "--only", "b", limit=1)
    world.run(code=1)


def test_a_limit_on_what_failed_before_goes_on_as_long_as_it_gets_better(
    world: BatchWorld,
) -> None:
    world.prepare(argv=["sh", "-c", "test -e ok"], items=["a", "b"])
    world.run(code=1)
    (world.work / "ok").touch()
    world.prepare("--retry-failed", limit=1)
    world.run(code=1)
    world.prepare("--retry-failed", limit=1)
    world.run(code=0)


def test_too_many_errors_stop_it_and_leave_the_rest(world: BatchWorld) -> None:
    items = [str(n) for n in range(40)]
    world.prepare(argv=["false"], items=items, max_errors="5", jobs=1)

    done = world.run(code=1)

    assert len(world.results()) == 6
    assert "more than --max-errors" in done.stderr
    assert "34 to do" in done.stderr
    world.prepare(max_errors="20%")
    world.run(code=1)
    assert len(world.results()) == 6 + 7


def test_shuffle_is_repeatable_by_its_seed(world: BatchWorld, tmp_path: Path) -> None:
    items = [str(n) for n in range(20)]
    orders = []
    for name in ("one", "two"):
        other = BatchWorld(tmp_path, name)
        other.prepare(argv=["echo"], items=items, shuffle=True, seed=7, jobs=1)
        orders.append(other.run().stdout.split())

    assert orders[0] == orders[1] != items
    assert sorted(orders[0]) == sorted(items)


def test_an_item_prefers_the_lane_it_had(world: BatchWorld) -> None:
    world.prepare(argv=shell("echo $CKPTD_LANE; exit 3"), items=["a", "b", "c"], jobs=3)
    world.run(code=1)
    before = {key: fact["lane"] for key, fact in world.results().items()}
    world.prepare("--only", "c")
    world.run(code=1)

    assert world.results()["c"]["lane"] == before["c"]
    assert sorted(before.values()) == [0, 1, 2]


def test_an_item_too_long_for_a_command_line_is_an_error_of_its_own(world: BatchWorld) -> None:
    world.prepare(argv=["echo"], items=["x" * 500_000, "b"], jobs=1)
    world.run(code=1)

    assert sorted(world.statuses().values()) == ["error", "pass"]
    long = next(fact for key, fact in world.results().items() if key != "b")
    assert "Argument list too long" in long["text"]


def test_an_item_finds_the_contract_of_a_task_and_not_that_of_the_batch(world: BatchWorld) -> None:
    script = "test -d $CKPTD_DIR/stage && echo $CKPTD_ITEM_KEY $CKPTD_ATTEMPT ${NOTIFY_SOCKET-no}"
    world.prepare(argv=shell(script), items=["a"])

    assert world.run(NOTIFY_SOCKET="/nowhere").stdout == "a 1 no\n"


def test_a_summary_says_what_ran_and_what_is_left(world: BatchWorld) -> None:
    world.prepare(argv=["true"], items=["a", "b"])

    assert "batch b: finished: 2 items, 2 pass; ran 2 in " in world.run().stderr
    assert "nothing to run" in world.run().stderr


def test_a_batch_that_is_not_there_is_named(world: BatchWorld) -> None:
    assert "there is no batch in" in world.run(code=4).stderr
    usage = world.call("run")
    assert usage.returncode == 64
    assert json.dumps(usage.stderr).startswith('"ckptd batch: run:')
