"""Damage that batches once took, each named after it; what hostile items and bad luck did."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from zlib import crc32

import pytest

from ckptd.batch import ledger, place, report
from ckptd.batch import prepare as preparing
from ckptd.batch.refusal import Refused
from ckptd.sdk.rate import Bucket
from ckptd.storage.facts import item_done
from tests.batch_world import BATCH, BatchWorld
from tests.waiting import until


@pytest.fixture
def world(tmp_path: Path) -> BatchWorld:
    return BatchWorld(tmp_path)


def shell(script: str) -> list[str]:
    return ["sh", "-c", script, "sh"]


def test_a_nul_in_a_field_is_an_error_of_its_item_and_no_end_of_the_batch(
    world: BatchWorld,
) -> None:
    items = [{"a": "x\0y"}, {"a": "fine"}]
    world.prepare(argv=["echo", "{a}"], items=items, jobs=1)

    done = world.run(code=1)

    assert sorted(world.statuses().values()) == ["error", "pass"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("made", ["mkfifo", "mkdir"])
def test_an_item_that_puts_something_else_where_its_output_was_harms_nobody(
    world: BatchWorld, made: str
) -> None:
    script = f'[ $1 = b ] || {{ rm "$CKPTD_DIR/out"; {made} "$CKPTD_DIR/out"; exit 85; }}'
    world.prepare(argv=shell(script), items=["a", "b"], jobs=1)

    world.run(code=1)

    assert world.statuses() == {"a": "error", "b": "pass"}


def test_a_stop_outlives_an_item_that_replaced_its_directory(world: BatchWorld) -> None:
    script = 'rm -rf "$CKPTD_DIR"; touch "$CKPTD_DIR"; touch gone; exec sleep 0.3'
    world.prepare(argv=shell(script), items=["a"])
    running = world.start()
    until((world.work / "gone").exists)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=30)[1]

    assert running.returncode == 75, said
    assert "Traceback" not in said
    assert "takes nothing more" not in said


@pytest.mark.parametrize("seconds", ["float('nan')", "float('inf')", "1e18", "-5.0"])
def test_no_wait_that_a_function_asks_for_ends_the_runner(world: BatchWorld, seconds: str) -> None:
    world.module(
        "import os\nfrom ckptd.sdk.outcomes import RateLimited\n"
        "def work(item):\n"
        "    if not os.path.exists('asked'):\n"
        "        open('asked', 'w').close()\n"
        f"        raise RateLimited(retry_after={seconds})\n"
    )
    world.prepare(python="items:work", items=["a"])

    done = world.run("--no-wait", code=None)

    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr


def test_a_scope_that_is_too_long_for_a_file_does_not_end_the_runner(world: BatchWorld) -> None:
    world.module(
        "import os\nfrom ckptd.sdk.outcomes import RateLimited\n"
        "def work(item):\n"
        "    if not os.path.exists('asked'):\n"
        "        open('asked', 'w').close()\n"
        "        raise RateLimited(retry_after=0.01, scope='\\u20ac' * 100)\n"
    )
    world.prepare(python="items:work", items=["a"])
    world.run()


def test_a_coroutine_that_holds_its_loop_is_timed_out_with_its_process(world: BatchWorld) -> None:
    world.module(
        "import time\nasync def work(item):\n    if item == 'a':\n        time.sleep(1000)\n"
    )
    world.prepare(python="items:work", items=["a"], timeout_s=0.2)

    world.run(code=1)

    assert world.results()["a"]["text"] == "timed out after 0.2 s"


def test_half_a_surrogate_in_one_result_hides_no_other(world: BatchWorld) -> None:
    world.module(
        "def work(item):\n"
        "    if item == 'a':\n        return '\\ud800'\n"
        "    if item == 'b':\n        raise ValueError('\\udcff')\n"
        "    return item\n"
    )
    world.prepare(python="items:work", items=["a", "b", "c"])
    world.run(code=1)

    done = world.call("export", "b")

    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["key"]: row["status"] for row in rows} == {"a": "error", "b": "error", "c": "pass"}


def test_half_a_surrogate_in_captured_json_is_an_error_of_its_item(world: BatchWorld) -> None:
    script = "printf '\"\\\\ud800\"'"
    world.prepare(argv=shell(script), items=["a"], capture="json")
    world.run(code=1)
    assert world.call("export", "b").returncode == 0


def test_a_preflight_that_says_more_than_a_pipe_holds_is_heard(world: BatchWorld) -> None:
    says = ["sh", "-c", "head -c 200000 /dev/zero; test -e asked && exit 0; touch asked; exit 75"]
    world.prepare(argv=["true"], items=["a"], preflight=says)
    world.run("--no-wait", code=2)
    scopes = world.folder / "scopes"
    for path in scopes.iterdir():
        path.unlink()
    world.run()


def test_a_preflight_that_says_much_is_heard_to_its_last_line(world: BatchWorld) -> None:
    says = ["sh", "-c", "head -c 200000 /dev/zero; echo; echo the account is closed; exit 1"]
    world.prepare(argv=["true"], items=["a"], preflight=says)
    assert "the account is closed" in world.run(code=1).stderr


def test_a_host_that_says_json_of_a_wrong_shape_is_ended_and_its_item_judged(
    world: BatchWorld,
) -> None:
    world.module(
        "import os\n"
        "def work(item):\n"
        "    if item == 'a':\n"
        "        for fd in range(3, 64):\n"
        "            try:\n"
        "                os.write(fd, b'{\"n\": []}\\n' + b'[' * 100000 + b'\\n')\n"
        "            except OSError:\n"
        "                pass\n"
        "        import time; time.sleep(1000)\n"
    )
    world.prepare(python="items:work", mode="process", jobs=1, items=["a", "b"])

    world.run(code=1)

    assert world.statuses() == {"a": "quarantined", "b": "pass"}


def test_closed_standard_files_neither_end_a_run_nor_get_into_its_own_files(
    world: BatchWorld,
) -> None:
    world.prepare(argv=shell("echo to out; echo to err >&2"), items=["a"])
    closing = 'exec 0<&- 1>&- 2>&-; exec "$@"'
    command = [*shell(closing), *BATCH, "run", str(world.dir)]

    done = subprocess.run(command, cwd=world.work, env=world.env, check=False, timeout=50)

    assert done.returncode == 0
    assert world.statuses() == {"a": "pass"}
    assert "to " not in (world.dir / "LOCK").read_text()


def test_who_only_looks_keeps_no_runner_from_its_lock(world: BatchWorld) -> None:
    world.prepare(argv=["true"], items=["a"])
    fd = os.open(world.dir / "LOCK", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)  # as `holder` does, for a moment
    waiting = threading.Timer(0.05, os.close, (fd,))
    waiting.start()
    try:
        with place.locked(str(world.dir), "b"):
            pass
    finally:
        waiting.join()


def test_a_submit_at_the_same_moment_gives_no_batch_a_second_id(
    world: BatchWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"argv": ["true"], "items": {"from": "lines", "lines": ["a", "b"]}}
    monkeypatch.setenv("CKPTD_BATCH_DIR", str(world.folder / "batches"))
    monkeypatch.chdir(world.work)
    others: list[int] = []
    make = place.make

    def after_another(path: str) -> None:
        if not others:  # between our look and our lock another one submits, and runs it all
            others.append(1)
            world.prepare(argv=given["argv"], items=["a", "b"])
            world.run()
        make(path)

    monkeypatch.setattr(place, "make", after_another)
    report = preparing.prepare("b", given, preparing.Wishes())

    assert (report["done"], report["todo"]) == (2, 0)
    assert "nothing to run" in world.run().stderr


def test_a_run_that_the_disk_ended_blames_no_item(world: BatchWorld) -> None:
    limit = "import os,resource,sys;resource.setrlimit(resource.RLIMIT_FSIZE,(4000,4000));"
    command = [sys.executable, "-c", limit + "os.execvp(sys.argv[1],sys.argv[1:])"]
    noise = shell("head -c 1500 /dev/zero")  # six times as long in JSON: too long for the disk
    world.prepare(argv=noise, items=["a"], capture="all")
    for _ in range(5):
        done = subprocess.run(
            [*command, *BATCH, "run", str(world.dir)],
            cwd=world.work,
            env=world.env,
            check=False,
            capture_output=True,
            timeout=50,
        )
        assert done.returncode == 2, done.stderr
        assert world.facts().runs[-1]["why"] == "trouble"

    assert world.statuses() == {}


def test_a_clock_that_was_a_year_ahead_blocks_no_scope_for_a_year(tmp_path: Path) -> None:
    bucket = Bucket("api", str(tmp_path))
    bucket.block(60)
    ahead_ns = time.time_ns() + 365 * 86_400 * 10**9
    body = json.dumps({"tat_ns": 0, "blocked_ns": ahead_ns}).encode().ljust(119)
    (tmp_path / "api").write_bytes(b"%s%08x\n" % (body, crc32(body)))

    assert bucket.wait_s() == 0.0
    assert bucket.take(1.0) == 0.0


def test_a_host_killed_while_it_imports_ends_no_batch(world: BatchWorld) -> None:
    world.module(
        "import os, signal\n"
        "if os.path.exists('strike'):\n"
        "    os.unlink('strike')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "def work(item):\n"
        "    if item == 'a' and not os.path.exists('struck'):\n"
        "        open('struck', 'w').close()\n"
        "        open('strike', 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    world.prepare(python="items:work", mode="process", jobs=1, items=["a", "b", "c"])

    world.run()

    assert set(world.statuses().values()) == {"pass"}


def test_a_module_whose_import_kills_its_process_is_given_up(world: BatchWorld) -> None:
    world.module("def work(item): return 1\n")
    world.prepare(python="items:work", items=["a"])
    world.module("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert "while its module was imported" in world.run(code=1).stderr


@pytest.mark.parametrize("damage", [b'{"name":"\xff"}', b'{"x":' + b"[" * 100_000])
def test_a_batch_file_that_is_no_text_is_refused_by_its_path(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / place.BATCH_FILE).write_bytes(damage)
    with pytest.raises(Refused, match=place.BATCH_FILE):
        place.load(str(tmp_path))


@pytest.mark.parametrize("name", ["journal/999999999999.j", "journal/0100", "attempt.json"])
def test_results_are_found_again_whatever_number_lies_beside_them(
    world: BatchWorld, name: str
) -> None:
    """The run took the number after it, and wrote a ledger that nobody reads."""
    world.prepare(argv=["true"], items=["a"])
    (world.dir / "journal").mkdir()
    (world.dir / name).write_text('{"attempt":999999999999,"boot_id":"b"}')
    world.run()
    assert world.statuses() == {"a": "pass"}
    assert [path.name for path in (world.dir / "journal").glob("*1.j")] == ["000001.j"]


@pytest.mark.parametrize(
    "strange",
    [
        {"status": "flaky"},
        {"status": ["pass"]},
        {"tries": None},
        {"text": "\ud800"},
        {"seconds": "x"},
    ],
)
def test_a_result_of_a_later_version_is_refused_and_hides_no_other_batch(
    world: BatchWorld, monkeypatch: pytest.MonkeyPatch, strange: dict[str, object]
) -> None:
    world.prepare(argv=["true"], items=["a"])
    batch = place.load(str(world.dir))
    later = ledger.Ledger(str(world.dir), batch, ledger.begin(str(world.dir)))
    later.append([{**item_done("a", "pass", tries=1), **strange}])
    later.close()

    with pytest.raises(Refused, match="cannot be read"):
        ledger.read(str(world.dir), batch)
    monkeypatch.setenv("CKPTD_BATCH_DIR", str(world.dir.parent))
    assert "cannot be read" in report.summary(world.name)["problem"]
