"""`prepare`: what a submit makes of a batch, and what it refuses without a change."""

import fcntl
import json
from pathlib import Path

import pytest

from tests.batch_world import BatchWorld

ECHO = ["echo", "{}"]


@pytest.fixture
def world(tmp_path: Path) -> BatchWorld:
    return BatchWorld(tmp_path)


def bytes_of(world: BatchWorld) -> dict[str, bytes]:
    return {
        path.relative_to(world.dir).as_posix(): path.read_bytes()
        for path in world.dir.rglob("*")
        if path.is_file() and path.name != "LOCK"
    }


def test_a_new_batch_tells_what_it_holds(world: BatchWorld) -> None:
    said = world.prepare(argv=ECHO, items=["a", "b", "a"], jobs=3)

    assert said["dir"] == str(world.dir)
    assert {key: said[key] for key in ("items", "new", "known", "duplicates", "done", "todo")} == {
        "items": 2,
        "new": 2,
        "known": 0,
        "duplicates": 1,
        "done": 0,
        "todo": 2,
    }
    assert said["jobs"] == 3
    assert said["running_task"] is None
    assert world.dir.stat().st_mode & 0o777 == 0o700


def test_a_list_that_was_sorted_and_extended_runs_only_what_is_new(world: BatchWorld) -> None:
    world.prepare(argv=ECHO, items=["c", "a", "b"], jobs=1)
    world.run()

    said = world.prepare(items=["a", "b", "c", "d"])
    ran = world.run().stdout

    assert (said["new"], said["known"], said["done"], said["todo"]) == (1, 3, 3, 1)
    assert ran == "d\n"


def test_items_that_vanished_are_told_and_kept(world: BatchWorld) -> None:
    world.prepare(argv=ECHO, items=["a", "b"])
    world.run()

    said = world.prepare(items=["b"])

    assert said["vanished"] == 1
    assert "no longer in the list" in said["warnings"][0]
    assert set(world.statuses()) == {"a", "b"}


def test_a_changed_config_stops_with_a_diff_until_it_is_accepted(world: BatchWorld) -> None:
    world.prepare(argv=ECHO, items=["a", "b"])
    world.run()
    before = bytes_of(world)

    said = world.prepare(argv=["echo", "new", "{}"], items=["a", "b", "c"], code=5)["said"]

    assert '- argv: ["echo", "{}"]' in said
    assert '+ argv: ["echo", "new", "{}"]' in said
    assert "--accept-config" in said
    assert bytes_of(world) == before
    world.prepare("--accept-config", argv=["echo", "new", "{}"], items=["a", "b", "c"])
    assert world.run().stdout == "new c\n"
    change = [run for run in world.facts().runs if run["event"] == "config"]
    assert len(change) == 1
    assert change[0]["diff"][0] == '- argv: ["echo", "{}"]'


def test_knobs_are_no_config(world: BatchWorld) -> None:
    world.prepare(argv=ECHO, items=["a"], jobs=1)

    world.prepare(argv=ECHO, items=["a"], jobs=4, rate="10/s", limit=3, shuffle=True)


def test_fresh_archives_and_begins_anew(world: BatchWorld) -> None:
    world.prepare(argv=ECHO, items=["a", "b"])
    world.run()

    said = world.prepare("--fresh", argv=["echo", "x", "{}"], items=["a", "b"])

    assert (said["done"], said["todo"]) == (0, 2)
    assert sorted(world.run().stdout.split()) == ["a", "b", "x", "x"]
    assert len(list(world.dir.glob("archive/*/journal/*.j"))) == 1


def test_a_dry_run_lists_and_changes_nothing(world: BatchWorld) -> None:
    assert world.prepare("--dry-run", argv=ECHO, items=["a", "b"])["would_run"] == ["a", "b"]
    assert not world.dir.exists()
    world.prepare(argv=ECHO, items=["a", "b"])
    world.run()
    before = bytes_of(world)

    assert world.prepare("--dry-run", items=["a", "z"])["would_run"] == ["z"]
    assert world.run("--dry-run").stdout == ""
    assert bytes_of(world) == before


def test_an_empty_list_is_refused_unless_it_may_be(world: BatchWorld) -> None:
    (world.work / "empty").touch()
    source = {"from": "file", "path": "empty"}

    assert "there are no items" in world.prepare(argv=ECHO, items=source, code=65)["said"]
    assert not world.dir.exists()
    assert world.prepare("--allow-empty", argv=ECHO, items=source)["items"] == 0
    world.run()


def test_items_come_from_stdin_beside_a_spec_in_words(world: BatchWorld) -> None:
    spec = json.dumps({"argv": ECHO, "items": {"from": "stdin"}})

    done = world.call("prepare", "b", "--spec", spec, stdin="a\nb\n")

    assert json.loads(done.stdout)["items"] == 2


def test_a_function_that_is_not_there_is_refused_with_what_is(world: BatchWorld) -> None:
    world.module("def work(item): ...\n")
    world.module("import nothing_like_it\n", "broken")

    nope = world.prepare(python="items:nope", items=["a"], code=64)["said"]
    broken = world.prepare(python="broken:work", items=["a"], code=64)["said"]
    missing = world.prepare(python="gone:work", items=["a"], code=64)["said"]

    assert "'items' has no 'nope'; it has: work" in nope
    assert "No module named 'nothing_like_it'" in broken
    assert "there is no module 'gone'" in missing
    assert not world.dir.exists()


def test_a_program_that_is_not_there_is_refused(world: BatchWorld) -> None:
    said = world.prepare(argv=["no-such-program"], items=["a"], code=64)["said"]

    assert "'no-such-program' is not there" in said


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({}, "either a command or a function"),
        ({"argv": ECHO, "python": "a:b"}, "either a command or a function"),
        ({"argv": ECHO, "speed": 3}, "unknown field `speed`"),
        ({"argv": ECHO, "jobs": 100_000}, "-j 100000 is out of range"),
        ({"argv": ECHO, "rate": "fast"}, "--rate 'fast' is no rate"),
        ({"argv": ECHO, "max_errors": "110%"}, "--max-errors '110%'"),
        ({"argv": ECHO, "on_exit": {"two": "fail"}}, "'two' is no exit code"),
        ({"argv": ECHO, "on_exit": {"2": "maybe"}}, "Invalid enum value 'maybe'"),
        ({"argv": ECHO, "mode": "threads"}, "--mode threads is for functions"),
        ({"argv": ECHO, "scope": "../x"}, "--scope '../x'"),
        ({"argv": ECHO, "cwd": "/no/such"}, "/no/such is not there"),
        ({"python": "no colon"}, "module:function"),
    ],
)
def test_an_unfit_spec_is_refused_by_name(
    world: BatchWorld, spec: dict[str, object], words: str
) -> None:
    assert words in world.prepare(items=["a"], code=64, **spec)["said"]
    assert not world.dir.exists()


def test_a_name_that_leads_elsewhere_is_refused(world: BatchWorld) -> None:
    for name in ("../b", "a/b", ".hidden", "", "x" * 200):
        done = world.call("prepare", name, "--spec", "{}")
        assert done.returncode == 64
        assert "is no name for a batch" in done.stderr


def test_a_batch_at_work_is_left_alone(world: BatchWorld) -> None:
    world.prepare(argv=ECHO, items=["a"])
    before = bytes_of(world)
    with (world.dir / "LOCK").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps({"pid": 4711, "task": 12}).ljust(200))
        lock.flush()

        same = world.prepare(argv=ECHO, items=["a"])
        other = world.prepare(argv=ECHO, items=["a", "b"], code=5)["said"]

    assert same["running_task"] == 12
    assert "is running: task 12" in other
    assert bytes_of(world) == before


def test_a_key_that_is_not_there_is_refused_with_the_nearest(world: BatchWorld) -> None:
    world.prepare(argv=ECHO, items=["alpha", "beta"])

    assert "did you mean: alpha" in world.prepare("--only", "alhpa", code=4)["said"]


def test_a_batch_file_changed_by_hand_is_refused(world: BatchWorld) -> None:
    world.prepare(argv=ECHO, items=["a"])
    path = world.dir / "batch.json"
    path.write_text(path.read_text().replace('"echo"', '"cat"'))

    assert "was changed by hand" in world.prepare(code=65)["said"]
    assert "was changed by hand" in world.run(code=65).stderr


def test_an_interpreter_that_cannot_even_read_the_host_is_told_as_old(world: BatchWorld) -> None:
    old = world.work / "python2"
    old.write_text(
        "#!/bin/sh\n"
        'printf \'  File "%s", line 1\\nSyntaxError: invalid syntax\\n\' "$1" >&2; exit 1'
    )
    old.chmod(0o755)
    told = world.prepare(python="os:stat", items=["a"], interpreter=str(old), code=64)
    assert "python2 is an old Python; a batch needs 3.11 or newer" in told["said"]
