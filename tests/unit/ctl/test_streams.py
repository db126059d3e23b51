"""Real commands whose stdin, stdout or stderr is closed, full, left by its reader, or narrow."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.daemon_fixture import LiveDaemon, StartDaemon

NAME = "naïve-日本"
SAVE = (
    'echo "said {}"; echo x >"$CKPTD_DIR/stage/f"; "$0" -m ckptd.sdk.ckpt save --state "$1";'
    ' echo y >"$CKPTD_DIR/stage/f"; "$0" -m ckptd.sdk.ckpt save --state "$2"'
)
VERBS = [
    "--help", "--version", "status -o json", "show 1", "logs -f 1", "events -o jsonl",
    "wait 1 -o json", "checkpoint show 1", "checkpoint export 1 -", "batch status", "batch logs b",
    "batch export b -o csv", "batch run -n other --dry-run -- echo {} ::: a",
    "config check CONFIG", "wal verify --state LOG", "doctor", "submit --help",
]  # fmt: skip
SOME = [
    "status", "show 1 -o json", "checkpoint diff 1", "checkpoint export 1 -", "batch items b",
    "doctor",
]  # fmt: skip

REMOVED = "mkdir gone && cd gone && rmdir ../gone &&"


@pytest.fixture(scope="module")
def world() -> Iterator[LiveDaemon]:
    """A daemon with one task that is done and saved twice, and a batch; tests change neither."""
    daemon = LiveDaemon()
    try:
        daemon.start()
        states = ('{"part": "é日"}', '{"part": "ü"}')
        command = ("sh", "-c", SAVE.format(NAME), sys.executable, *states)
        daemon.submit(*command, options=["-n", NAME])
        daemon.ctl("wait", "1")
        daemon.ctl("batch", "run", "-n", "b", "--", "echo", "{}", ":::", "é", "日", "c")
        log = daemon.root / "log"
        copied = subprocess.run(["cp", "-r", daemon.state, log], check=False)
        assert copied.returncode == 0
        yield daemon
    finally:
        daemon.close()


def said(
    world: LiveDaemon,
    words: str,
    redirected: str = "",
    *,
    out: int = subprocess.PIPE,
    before: str = "",
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Run `ckptctl WORDS` with its streams as a shell redirects them."""
    places = {"CONFIG": str(world.config), "LOG": str(world.root / "log")}
    command = [sys.executable, "-m", "ckptctl", *(places.get(w, w) for w in words.split())]
    return subprocess.run(
        ["sh", "-c", f'{before} exec "$@" {redirected}', "sh", *command],
        env={**world.env, **env}, cwd=world.work, stdin=subprocess.DEVNULL, stdout=out,
        stderr=subprocess.PIPE, text=True, errors="replace", check=False, timeout=50,
    )  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_stdout_that_is_full_or_closed_is_74_and_says_so(world: LiveDaemon, verb: str) -> None:
    for redirected, why in ((">/dev/full", "No space left on device"), (">&-", "it is closed")):
        done = said(world, verb, redirected)

        assert (done.returncode, done.stdout) == (74, ""), done.stderr
        assert f"stdout cannot be written: {why}" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_a_reader_that_left_ends_it_without_a_word(world: LiveDaemon, verb: str) -> None:
    reads, writes = os.pipe()
    os.close(reads)

    done = said(world, verb, out=writes)

    os.close(writes)
    assert "Traceback" not in done.stderr
    assert "cannot be written" not in done.stderr
    assert done.returncode in (141, -13)  # what a shell shows as 141, too


@pytest.mark.parametrize("verb", SOME)
def test_a_stderr_that_is_full_or_closed_changes_nothing(world: LiveDaemon, verb: str) -> None:
    code = said(world, verb).returncode

    assert code == (1 if "diff" in verb else 0)
    assert said(world, verb, "2>&-").returncode == code
    assert said(world, verb, "2>/dev/full").returncode == code


@pytest.mark.parametrize("verb", ["status 99", "batch status none", "nosuch"])
def test_an_error_that_nobody_can_be_told_keeps_its_exit_code(world: LiveDaemon, verb: str) -> None:
    code = said(world, verb).returncode

    assert code in (4, 64)
    for redirected in ("2>&-", ">/dev/full 2>/dev/full"):
        assert said(world, verb, redirected).returncode == code


@pytest.mark.parametrize("verb", SOME)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_a_stream_cannot_spell_are_escaped(
    world: LiveDaemon, verb: str, encoding: str
) -> None:
    done = said(world, verb, PYTHONIOENCODING=encoding)

    assert (done.returncode, done.stderr) == (1 if "diff" in verb else 0, "")


def test_json_on_a_narrow_stream_reads_back_as_it_was(world: LiveDaemon) -> None:
    done = said(world, "status 1 -o json", PYTHONIOENCODING="ascii")

    assert done.stdout.isascii()
    assert json.loads(done.stdout)["tasks"][0]["name"] == NAME


def test_a_submit_whose_answer_is_lost_is_done_and_says_so(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()

    done = said(daemon, "submit -q --hold -- true", ">/dev/full")

    assert done.returncode == 74
    assert "No space left on device; accepted: task 1\n" in done.stderr
    assert "what was to be changed is changed all the same" in done.stderr
    assert daemon.row(1)["phase"] == "held"


def test_the_id_of_a_submit_that_waits_is_there_before_its_task_is_done(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon(env={"PYTHONUNBUFFERED": ""})
    process = daemon.spawn_ctl("submit", "--wait", "--", "sleep", "1000")
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"

    daemon.ctl("cancel", "1")

    assert process.wait(30) == 1


def test_an_error_about_stdout_is_json_where_that_was_asked_for(world: LiveDaemon) -> None:
    done = said(world, "status -o json", ">/dev/full")

    error = json.loads(done.stderr)["error"]
    assert (error["code"], error["exit_code"], error["retryable"]) == ("stream_broken", 74, False)


@pytest.mark.parametrize("verb", ["status -", "wait -", "checkpoint import 1 -",
                                  "submit --file -", "batch run -n c -i - -- echo {}"])  # fmt: skip
def test_a_closed_stdin_is_told_where_it_is_read(world: LiveDaemon, verb: str) -> None:
    done = said(world, verb, "<&-")

    assert (done.returncode, done.stdout) == (74, "")
    assert "stdin cannot be read: it is closed" in done.stderr


def test_a_pipe_that_another_made_non_blocking_loses_nothing(world: LiveDaemon) -> None:
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 4_096)  # less than it has to say
    with ThreadPoolExecutor() as pool, open(reads, "rb") as reader:
        heard = pool.submit(reader.read)
        done = said(world, "completion zsh", out=writes)
        os.close(writes)

        assert done.returncode == 0
        assert heard.result().decode() == said(world, "completion zsh").stdout


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_daemon_without_standard_streams_runs_and_its_files_hold_none_of_its_lines(
    start_daemon: StartDaemon, closed: str
) -> None:
    daemon = start_daemon(prefix=["sh", "-c", f'exec "$@" {closed}', "sh"])

    assert daemon.row(daemon.submit("true", options=["--hold"]))["phase"] == "held"
    if "&-" in closed:
        assert os.readlink(f"/proc/{daemon.pid}/fd/2") == os.devnull
    assert daemon.stop() == 0
    for file in (path for path in daemon.root.rglob("*") if path.is_file()):
        assert b"replayed to LSN" not in file.read_bytes()


@pytest.mark.parametrize(("words", "code"), [("--help", 74), ("--version", 74), ("--nope", 64)])
def test_the_daemon_s_own_words_on_a_broken_stdout_are_an_error(
    world: LiveDaemon, words: str, code: int
) -> None:
    for redirected in (">/dev/full", ">&-"):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, "-m", "ckptd", words],
            env=world.env, capture_output=True, text=True, check=False, timeout=50,
        )  # fmt: skip

        assert (done.returncode, done.stdout) == (code, "")
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "verb",
    ["status", "logs 1", "checkpoint export 1 -", "doctor", "batch status b", "wait 1",
     "batch run -n there -d / -- echo {} ::: a", "submit --hold -d / -- true"],
)  # fmt: skip
def test_what_needs_no_working_directory_works_in_one_that_was_removed(
    world: LiveDaemon, verb: str
) -> None:
    done = said(world, verb, before=REMOVED)

    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize(
    "verb",
    ["submit -- true", "run -- true", "batch run -n here -- echo {} ::: a", "submit -d sub -- true",
     "checkpoint export 1 x.tar", "checkpoint import 1 x.tar", "status --endpoint ctl.sock",
     "bench overhead --python a:b"],
)  # fmt: skip
def test_what_needs_the_working_directory_says_that_it_was_removed(
    world: LiveDaemon, verb: str
) -> None:
    done = said(world, verb, before=REMOVED)

    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("ckptctl: the directory that you are in was removed\n  hint: ")


@pytest.mark.parametrize("verb", ["logs -f TASK", "events -f --since 0", "run -- sleep 1000"])
def test_who_follows_ends_with_its_reader_though_nothing_more_comes(
    start_daemon: StartDaemon, verb: str
) -> None:
    daemon = start_daemon()
    task = daemon.submit("sh", "-c", "echo begun; exec sleep 1000")
    daemon.wait_phase(task, "running")
    process = daemon.spawn_ctl(*verb.replace("TASK", str(task)).split())
    assert process.stdout is not None
    assert process.stderr is not None
    assert (process.stderr if verb.startswith("run") else process.stdout).readline()

    process.stdout.close()

    assert process.wait(30) == 141
    assert daemon.row(task)["phase"] == "running"


def test_an_endpoint_that_is_no_utf_8_is_one_that_cannot_be_used(world: LiveDaemon) -> None:
    command = [sys.executable, "-m", "ckptctl", "--endpoint", b"/tmp/\xff", "status"]

    done = subprocess.run(command, env=world.env, capture_output=True, check=False, timeout=50)

    assert done.returncode == 64
    assert done.stderr.startswith(b"ckptctl: cannot use the endpoint ")


def test_a_batch_whose_words_nobody_reads_is_worked_off_all_the_same(world: LiveDaemon) -> None:
    reads, writes = os.pipe()
    os.close(reads)

    done = said(world, "batch run -n unread -- true {} ::: a b", "2>&1", out=writes)

    os.close(writes)
    assert done.returncode == 0
    assert "2 of 2 done" in said(world, "batch status unread").stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_file_of_tasks_on_stdin_is_utf_8_whatever_the_terminal_speaks(
    world: LiveDaemon, encoding: str
) -> None:
    tasks = f'[[task]]\nname = "{NAME}"\ncommand = ["true"]\nhold = true\n'
    command = [sys.executable, "-m", "ckptctl", "submit", "-q", "--file", "-"]

    done = subprocess.run(
        command, input=tasks.encode(), env={**world.env, "PYTHONIOENCODING": encoding},
        cwd=world.work, capture_output=True, check=False, timeout=50,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, b"")
    assert world.row(int(done.stdout))["name"] == NAME
