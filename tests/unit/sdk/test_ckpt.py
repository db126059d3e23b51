"""`ckpt` as a shell script uses it: every verb through a real process."""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from ckptd.sdk import ckpt
from ckptd.sdk.save import begin, save
from ckptd.storage import blobs, facts
from tests.task_world import CKPT, TASK, TaskWorld
from tests.waiting import until


@pytest.fixture
def world(tmp_path: Path) -> TaskWorld:
    return TaskWorld(tmp_path)


def test_outside_of_a_task_it_says_so_and_exits_64(world: TaskWorld) -> None:
    done = world.ckpt("done", "x", CKPTD_DIR="")

    assert done.returncode == 64
    assert "CKPTD_DIR is not set" in done.stderr


@pytest.mark.parametrize(
    "words",
    [[], ["fly"], ["step", "a"], ["step", "a", "--"], ["done"], ["set", "a"], ["item", "a"],
     ["item", "a", "good"], ["progress", "some"], ["save", "--state"], ["save", "--state", "{"],
     ["retry-after", "soon"], ["retry-after", "-1"], ["restore"], ["get"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_exits_64_and_records_nothing(world: TaskWorld, words: list[str]) -> None:
    assert world.ckpt(*words).returncode == 64
    assert not blobs_there(world)


def blobs_there(world: TaskWorld) -> bool:
    return bool(os.listdir(world.path("ckpt"))) or world.path("journal").exists()


def test_help_names_every_verb(world: TaskWorld) -> None:
    text = world.ckpt("help").stdout

    assert [verb for verb in ckpt.VERBS if f"  {verb}" not in text and verb != "stop"] == []


def test_a_step_runs_until_it_succeeds_and_then_never_again(world: TaskWorld) -> None:
    out = world.path("out")
    script = f"echo ran >> {out}; test -e {out}.ok"

    assert world.ckpt("step", "fetch", "--", "sh", "-c", script).returncode == 1
    assert world.ckpt("done", "fetch").returncode == 1
    Path(f"{out}.ok").touch()
    assert world.ckpt("step", "fetch", "--", "sh", "-c", script).returncode == 0
    world.begin()
    assert world.ckpt("step", "fetch", "--", "sh", "-c", script).returncode == 0

    assert out.read_text() == "ran\nran\n"
    assert world.ckpt("done", "fetch").returncode == 0


@pytest.mark.parametrize(
    ("command", "code"),
    [(["sh", "-c", "exit 75"], 75), (["sh", "-c", "kill -9 $$"], 137), (["nonexistent"], 127),
     (["/etc"], 126)],
)  # fmt: skip
def test_a_step_that_fails_gives_the_exit_code_a_shell_would(
    world: TaskWorld, command: list[str], code: int
) -> None:
    assert world.ckpt("step", "x", "--", *command).returncode == code


def test_a_step_marked_once_is_not_repeated_after_an_interruption(world: TaskWorld) -> None:
    world.record(facts.step_start("pay"))

    done = world.ckpt("step", "pay", "--once", "--", "true")

    assert done.returncode == 65
    assert "must not run twice" in done.stderr


def test_a_step_marked_once_that_fails_says_that_it_was_begun_and_how_to_go_on(
    world: TaskWorld,
) -> None:
    failed = world.ckpt("step", "pay now", "--once", "--", "sh", "-c", "exit 3")
    assert failed.returncode == 3
    assert "step 'pay now' failed with 3 and stays recorded as begun" in failed.stderr
    world.begin()
    again = world.ckpt("step", "pay now", "--once", "--", "true")
    assert again.returncode == 65
    for told in (failed.stderr, again.stderr):
        assert "`ckpt step 'pay now' -- true`" in told
        assert f"`ckptctl retry --from-step 'pay now' {TASK}`" in told

    assert world.ckpt("step", "pay now", "--", "true").returncode == 0  # as it was told
    assert world.ckpt("step", "pay now", "--once", "--", "false").returncode == 0


def test_a_step_of_an_item_is_not_sent_to_a_task_of_its_number(world: TaskWorld) -> None:
    failed = world.ckpt("step", "pay", "--once", "--", "false", CKPTD_ITEM_KEY="a")
    assert "run it without --once" in failed.stderr
    assert "ckptctl" not in failed.stderr


def test_values_survive_the_attempt(world: TaskWorld) -> None:
    world.ckpt("set", "name", "a b")
    world.ckpt("set", "from", "-", stdin="two\nlines\n")
    world.record(facts.set_value("json", {"n": [1]}))
    world.begin()

    assert world.ckpt("get", "name").stdout == "a b\n"
    assert world.ckpt("get", "from").stdout == "two\nlines\n"
    assert world.ckpt("get", "json").stdout == '{"n": [1]}\n'
    assert world.ckpt("get", "none").returncode == 1
    assert world.ckpt("get", "none", "else").stdout == "else\n"
    world.ckpt("unset", "name")
    assert world.ckpt("get", "name").returncode == 1


def test_items_are_listed_by_status(world: TaskWorld) -> None:
    world.ckpt("item", "a", "pass")
    world.ckpt("item", "b", "fail", "too", "big")
    world.ckpt("item", "c", "fail")
    world.ckpt("item", "c", "pass")

    assert world.ckpt("items").stdout == "a\tpass\t\nb\tfail\ttoo big\nc\tpass\t\n"
    assert world.ckpt("items", "--status", "fail", "--keys").stdout == "b\n"


def test_save_last_and_restore_go_together(world: TaskWorld, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("weights")
    assert world.ckpt("last").returncode == 1
    assert world.ckpt("restore", str(tmp_path / "out")).returncode == 1

    world.record(facts.step_done("fetch"), facts.set_value("k", 1))
    saved = world.ckpt("save", str(tmp_path / "model"), "--state", '{"n":7}', "--progress", "3/10")

    assert saved.stdout == "1\n"
    assert world.ckpt("last").stdout == f"{world.dir}/ckpt/00000001\n"
    assert world.ckpt("restore", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out" / "model").read_text() == "weights"
    manifest = json.loads(world.path("ckpt", "00000001", "MANIFEST.json").read_text())
    assert manifest["state"] == {"n": 7}
    assert manifest["progress"] == {"done": 3, "total": 10}
    assert (manifest["steps"], manifest["results"]) == (["fetch"], {"k": 1})
    assert (manifest["task"], manifest["attempt"], manifest["parent"]) == (12, 1, 0)


def restoring(world: TaskWorld, into: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*CKPT, "restore", str(into)], env=world.environ())


def waits_for_a_lock(pid: int) -> bool:
    return any(
        fields[1:3] == ["->", "FLOCK"] and fields[5] == str(pid)
        for fields in map(str.split, Path("/proc/locks").read_text().splitlines())
    )


def test_a_generation_does_not_vanish_by_quick_saves_while_it_is_restored(
    world: TaskWorld, tmp_path: Path
) -> None:
    names = [f"{n:03d}" for n in range(500)]
    for name in names:
        world.path("stage", name).write_text(name)
    header = {"task": 12, "attempt": 1}
    save(world.dir, [], header)
    out = tmp_path / "out"
    restore = restoring(world, out)
    try:
        until(lambda: out.exists() and os.listdir(out))
        restore.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, restore.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert len(os.listdir(out)) < len(names), "it was stopped before its end"

        with pytest.raises(BlockingIOError):
            begin(world.dir, [], 1, waits=False)
        assert blobs.prune(world.dir, world.uid, keep=1) == []
    finally:
        restore.send_signal(signal.SIGCONT)
    for _ in range(3):  # these wait
        save(world.dir, [], header)

    assert restore.wait() == 0
    assert {name: (out / name).read_text() for name in os.listdir(out)} == {n: n for n in names}


def test_a_restore_takes_its_turn_behind_a_save_and_gives_what_that_saved(
    world: TaskWorld, tmp_path: Path
) -> None:
    for text in ("old", "new"):
        world.path("stage", "x").write_text(text)
        saving = begin(world.dir, [], 1)
        if text == "old":
            saving.finish({"task": 12, "attempt": 1})
    restore = restoring(world, tmp_path / "out")
    until(lambda: waits_for_a_lock(restore.pid) or restore.poll() is not None)
    assert restore.returncode is None, "it waits"

    saving.finish({"task": 12, "attempt": 1})

    assert restore.wait() == 0
    assert (tmp_path / "out" / "x").read_text() == "new"


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["nothing"], "No such file or directory"),
        (["model/weights"], "Not a directory"),
        (["itself"], "Too many levels of symbolic links"),
        (["model", "other/model"], "both would be 'model'"),
        (["other/MANIFEST.json"], "the seal of a checkpoint has this name"),
    ],
)
def test_a_mistake_in_what_to_save_exits_64_and_keeps_the_checkpoint_before(
    world: TaskWorld, tmp_path: Path, names: list[str], told: str
) -> None:
    (tmp_path / "other").mkdir()
    for name in ("model", "other/model", "other/MANIFEST.json"):
        (tmp_path / name).write_text("weights")
    (tmp_path / "itself").symlink_to("itself")
    world.ckpt("save", str(tmp_path / "model"))

    done = world.ckpt("save", *(str(tmp_path / name) for name in names))

    assert (done.returncode, done.stdout) == (64, "")
    assert told in done.stderr
    assert world.newest().seq == 1
    assert os.listdir(world.path("ckpt")) == ["00000001"]


def test_asked_to_stop_or_to_save_or_neither(world: TaskWorld) -> None:
    control = world.path("control.json")
    assert world.ckpt("stop?").returncode == 1
    assert world.ckpt("wanted").returncode == 1

    control.write_text('{"stop":"shutdown","deadline":1760000000,"checkpoint":2}')

    assert world.ckpt("stop?").stdout == "shutdown\n"
    assert world.ckpt("wanted").returncode == 0
    until_clock_moved(control)
    world.ckpt("save", str(control))
    assert world.ckpt("wanted").returncode == 1


def until_clock_moved(control: Path) -> None:
    """Put the request a moment back: file times are as coarse as the kernel's tick."""
    found = control.stat()
    os.utime(control, ns=(found.st_atime_ns, found.st_mtime_ns - 20_000_000))


def test_resume_tells_a_first_attempt_from_a_later_one(world: TaskWorld) -> None:
    assert world.ckpt("resume").returncode == 1
    world.begin()
    assert world.ckpt("resume").returncode == 0


def test_notify_lines_reach_the_socket_and_nobody_waits_for_it(
    world: TaskWorld, tmp_path: Path
) -> None:
    path = str(tmp_path / "n.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(path)
        daemon.settimeout(10)
        world.ckpt("progress", "3/10", "half", "way", NOTIFY_SOCKET=path)
        assert daemon.recv(4096) == b"PROGRESS=3/10\nSTATUS=half way"
        world.ckpt("status", "a\nREADY=1", NOTIFY_SOCKET=path)
        assert daemon.recv(4096) == b"STATUS=a READY=1"
        world.ckpt("save", "/etc/hostname", NOTIFY_SOCKET=path)
        assert daemon.recv(4096) == b"CHECKPOINT=1"

    assert world.ckpt("progress", "4/10", NOTIFY_SOCKET=path).returncode == 0


def test_retry_after_is_what_the_daemon_reads(world: TaskWorld) -> None:
    assert world.ckpt("retry-after", "120", "api").returncode == 0

    assert 100 < world.mark().retry_after_s <= 120


def test_a_zombie_records_nothing_and_exits_75(world: TaskWorld) -> None:
    zombie = {"CKPTD_ATTEMPT": "1"}
    world.begin()

    assert world.ckpt("set", "a", "b", **zombie).returncode == 75
    assert world.ckpt("save", "/etc/hostname", **zombie).returncode == 75
    assert world.ckpt("pipe", stdin='{"op":"set","key":"a","value":1}\n', **zombie).returncode == 75
    assert not blobs_there(world)


def test_a_damaged_journal_exits_65_and_is_not_written_to(world: TaskWorld) -> None:
    for name in ("a", "b"):
        world.ckpt("step", name, "--", "true")
    path = world.journal_path()
    damaged = bytearray(path.read_bytes())
    damaged[60] ^= 4
    path.write_bytes(damaged)

    assert world.ckpt("done", "a").returncode == 65
    assert world.ckpt("set", "a", "b").returncode == 65
    assert path.read_bytes() == bytes(damaged)


# --- pipe ----------------------------------------------------------------------------------------


def test_pipe_answers_in_order_and_later_requests_see_earlier_ones(world: TaskWorld) -> None:
    answers = world.pipe(
        {"op": "hello", "protocol": 1},
        {"op": "step_start", "name": "a"},
        {"op": "step_query", "name": "a"},
        {"op": "step_done", "name": "a", "result": [1], "id": "x"},
        {"op": "step_query", "name": "a"},
        {"op": "set", "key": "k", "value": {"n": 1}},
        {"op": "get", "key": "k"},
        {"op": "delete", "key": "k"},
        {"op": "get", "key": "k"},
        {"op": "item", "key": "i", "status": "pass", "result": 9},
        {"op": "items_done"},
        {"op": "items_done", "keys": ["i", "j"], "results": True},
        {"op": "progress", "done": 1, "total": 2},
        {"op": "progress", "done": 1, "total": 2, "durable": True},
        {"op": "retry_after", "seconds": 5},
        {"op": "should_stop"},
    )

    assert all(answer["ok"] for answer in answers)
    assert {k: answers[0][k] for k in ("task", "attempt", "resume", "last", "seq")} == {
        "task": 12, "attempt": 1, "resume": False, "last": "", "seq": 0}  # fmt: skip
    assert [answer.get("seq") for answer in answers[1:]] == [
        2, None, 3, None, 4, None, 5, None, 6, None, None, None, 7, 8, None]  # fmt: skip
    assert answers[2] == {"ok": True, "done": False, "started": True}
    assert answers[3]["id"] == "x"
    assert answers[4] == {"ok": True, "done": True, "started": False, "result": [1]}
    assert answers[6]["value"] == {"n": 1}
    assert not answers[8]["found"]
    assert answers[10]["items"] == answers[11]["items"] == {"i": "pass"}
    assert answers[11]["results"] == {"i": 9}
    assert answers[15] == {"ok": True, "stop": None, "deadline": None, "checkpoint": False}


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ("junk", "bad_request"),
        ("[1]", "bad_request"),
        ('{"op":1}', "bad_request"),
        ('{"op":"fly"}', "unknown_op"),
        ('{"op":"hello","protocol":9}', "unknown_protocol"),
        ('{"op":"set","key":"k"}', "bad_request"),
        ('{"op":"set","key":7,"value":1}', "bad_request"),
        ('{"op":"set","key":"k","value":NaN}', "bad_request"),
        ('{"op":"item","key":"k","status":"good"}', "bad_request"),
        ('{"op":"step_start","name":""}', "bad_request"),
        ('{"op":"retry_after","seconds":"soon"}', "bad_request"),
        ('{"op":"checkpoint","files":"x"}', "bad_request"),
        ('{"op":"checkpoint","files":["/nonexistent"]}', "bad_request"),
        ("[" * 100_000, "bad_request"),
        ("x" * (1 << 21), "too_large"),
        ('{"op":"set","key":"k","value":"%s"}' % ("\u00e9" * 300_000), "too_large"),
    ],
    ids=lambda value: value[:40],
)
def test_pipe_refuses_one_request_and_goes_on(world: TaskWorld, request_: str, code: str) -> None:
    before, refused, after = world.pipe(
        {"op": "set", "key": "a", "value": 1}, request_, {"op": "set", "key": "b", "value": 2}
    )

    assert (before["ok"], after["ok"]) == (True, True)
    assert refused["error"]["code"] == code
    assert world.facts().values == {"a": 1, "b": 2}


def test_requests_that_lie_together_are_one_group(world: TaskWorld) -> None:
    world.record(facts.step_done("opens the file"))
    before = world.journal_path().stat().st_size

    world.pipe(*({"op": "item", "key": str(n), "status": "pass"} for n in range(100)))

    assert len(world.facts().items) == 100
    grown = world.journal_path().read_bytes()[before:]
    assert grown.count(b'[{"op":"item"') < 10


def test_more_requests_than_one_frame_takes_are_all_recorded(world: TaskWorld) -> None:
    answers = world.pipe(*({"op": "set", "key": str(n), "value": n} for n in range(2_500)))

    assert [answer["seq"] for answer in answers] == list(range(2, 2_502))
    assert len(world.facts().values) == 2_500


def test_a_line_without_its_end_is_no_request(world: TaskWorld) -> None:
    done = world.ckpt("pipe", stdin='{"op":"set","key":"a","value":1}\n{"op":"set","key":"b",')

    assert len(done.stdout.splitlines()) == 1
    assert world.facts().values == {"a": 1}


def test_pipe_saves_a_checkpoint_with_the_facts_before_it(world: TaskWorld, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")

    answers = world.pipe(
        {"op": "step_done", "name": "a"},
        {"op": "checkpoint", "files": [str(tmp_path / "f")], "state": {"n": 1}, "progress": [1, 2]},
    )

    assert answers[1] == {"ok": True, "seq": 1, "path": f"{world.dir}/ckpt/00000001"}
    manifest = json.loads(world.path("ckpt", "00000001", "MANIFEST.json").read_text())
    assert (manifest["steps"], manifest["state"]) == (["a"], {"n": 1})


def test_pipe_refuses_a_step_that_must_not_run_twice(world: TaskWorld) -> None:
    world.pipe({"op": "step_start", "name": "pay", "once": True})
    world.begin()

    (answer,) = world.pipe({"op": "step_start", "name": "pay", "once": True})

    assert answer["error"]["code"] == "step_interrupted"
