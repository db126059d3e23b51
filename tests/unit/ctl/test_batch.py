"""batch submit, run, retry, wait as processes: a scripted daemon and real directories."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.batch import place
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadRequest
from tests.unit.ctl.batches import done, made, names_in, ran
from tests.unit.ctl.conftest import ROOT, Scripted, ctl, ctl_process
from tests.unit.ctl.rows import page, row
from tests.waiting import until

NOBODY = "ipc:///nonexistent/ctl.sock"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CKPTD_BATCH_DIR", str(tmp_path / "batches"))
    return tmp_path / "batches"


@pytest.fixture
def items(tmp_path: Path) -> str:
    (tmp_path / "items").write_text("a\nb\nc\n")
    return str(tmp_path / "items")


def test_submit_makes_the_batch_ready_and_submits_one_task(
    scripted: Scripted, root: Path, items: str
) -> None:
    daemon = scripted({"status": lambda _: page(), "submit": lambda _: m.Submitted((7,), (True,))})
    code, out, err = ctl(daemon.endpoint, "batch", "submit", "-n", "census", "-i", items, "true")
    assert (code, out) == (0, "7\n")
    assert "batch census: 3 items, 3 to do" in err
    asked = next(args for _, verb, args in daemon.requests if verb == "submit")
    assert isinstance(asked, m.Submit)
    (task,) = asked.tasks
    assert task.argv[-4:] == ("-m", "ckptd.batch", "run", str(root / "census"))
    assert task.labels == {"batch": "census"}
    assert asked.env["CKPTD_BATCH_DIR"] == str(root)
    assert place.load(str(root / "census")).config.argv == ["true"]
    line = ("batch", "submit", "-n", "other", "-i", items, "-o", "json", "true")
    document = json.loads(ctl(daemon.endpoint, *line)[1])
    assert (document["task"], document["batch"]["todo"]) == (7, 3)


def test_two_who_submit_at_once_ask_under_one_key_and_the_next_run_under_another(
    scripted: Scripted, root: Path, items: str
) -> None:
    ended: list[m.TaskRow] = []

    def status(asked: m.Message) -> m.TaskPage:
        assert isinstance(asked, m.Status)
        return page() if asked.select.phases else page(*ended)

    daemon = scripted({"status": status, "submit": lambda _: m.Submitted((7,), (True,))})
    for _ in range(2):
        ctl(daemon.endpoint, "batch", "submit", "-n", "census", "-i", items, "true")
    ended.append(row(7, "failed", name="batch:census"))
    ctl(daemon.endpoint, "batch", "retry", "census")
    asked = [args for _, verb, args in daemon.requests if verb == "submit"]
    first, second, third = (args.tasks[0].key for args in asked if isinstance(args, m.Submit))
    assert first == second != third


def test_the_same_again_while_it_is_under_way_is_the_same_task(
    scripted: Scripted, root: Path, items: str
) -> None:
    active = row(7, name="batch:census", labels={"batch": "census"})
    daemon = scripted({"status": lambda _: page(active)})
    made("census", ["a", "b", "c"], argv=["true"], cwd=str(Path.cwd()))
    line = ("batch", "submit", "-n", "census", "-i", items, "true")
    code, out, err = ctl(daemon.endpoint, *line)
    assert (code, out) == (0, "7\n")
    assert "task 7 is running with the same items already" in err
    assert not daemon.asked("submit")


def test_anything_else_while_it_is_under_way_is_a_conflict_that_names_the_task(
    scripted: Scripted, root: Path, items: str
) -> None:
    made("census", ["a", "b"], argv=["true"], cwd=str(Path.cwd()))
    before = (root / "census" / "items.jsonl").read_bytes()
    active = row(7, name="batch:census")
    daemon = scripted({"status": lambda _: page(active)})
    for more in ([], ["--retry-errors"], ["--fresh"]):
        line = ("batch", "submit", "-n", "census", *more, "-i", items, "true")
        code, out, err = ctl(daemon.endpoint, *line)
        assert (code, out) == (5, "")
        assert "task 7 is running" in err
        assert "ckptctl batch wait census" in err
    assert (root / "census" / "items.jsonl").read_bytes() == before


def test_a_shorter_list_while_it_is_under_way_is_a_conflict_too(
    scripted: Scripted, root: Path, items: str
) -> None:
    made("census", ["a", "b", "c", "d"], argv=["true"], cwd=str(Path.cwd()))
    daemon = scripted({"status": lambda _: page(row(7, name="batch:census"))})
    assert ctl(daemon.endpoint, "batch", "submit", "-n", "census", "-i", items, "true")[0] == 5


def test_a_batch_that_runs_in_a_terminal_is_no_task_of_the_daemon_s(
    scripted: Scripted, root: Path, items: str
) -> None:
    path = made("census", ["a", "b", "c"], argv=["true"], cwd=str(Path.cwd()))
    daemon = scripted({"status": lambda _: page()})
    with place.locked(path, "census"):
        code, _, err = ctl(daemon.endpoint, "batch", "submit", "-n", "census", "-i", items, "true")
        ran = ctl(NOBODY, "batch", "run", "-n", "census", "-i", items, "true")
    assert code == 5
    assert f"by process {os.getpid()}" in err
    assert ran == (5, "", err)  # no word of what there is to do goes before


def test_a_batch_whose_task_is_stuck_says_how_it_goes_on(
    scripted: Scripted, root: Path, items: str
) -> None:
    made("census", ["a"], argv=["true"], cwd=str(Path.cwd()))
    daemon = scripted({"status": lambda _: page(row(7, "quarantined", name="batch:census"))})
    code, _, err = ctl(daemon.endpoint, "batch", "retry", "census")
    assert code == 5
    assert "ckptctl release 7" in err


def test_a_changed_command_stops_with_a_diff_and_changes_nothing(
    scripted: Scripted, root: Path, items: str
) -> None:
    daemon = scripted({"status": lambda _: page(), "submit": lambda _: m.Submitted((7,), (True,))})
    line = ["batch", "submit", "-n", "census", "-i", items]
    assert ctl(daemon.endpoint, *line, "true")[0] == 0
    code, _, err = ctl(daemon.endpoint, *line, "false")
    assert code == 5
    assert '- argv: ["true"]' in err
    assert '+ argv: ["false"]' in err
    assert "--accept-config" in err
    assert place.load(str(root / "census")).config.argv == ["true"]
    assert ctl(daemon.endpoint, *line, "--accept-config", "false")[0] == 0
    assert place.load(str(root / "census")).config.argv == ["false"]


def test_without_a_daemon_a_submit_changes_nothing(root: Path, items: str) -> None:
    code, _, err = ctl(NOBODY, "batch", "submit", "-i", items, "true", "--answer-within", "1s")
    assert code == 2
    assert not root.exists()
    assert "ckptctl:" in err


def test_a_dry_run_tells_what_would_run_and_makes_nothing(root: Path, items: str) -> None:
    code, out, err = ctl(NOBODY, "batch", "submit", "-n", "x", "-i", items, "--dry-run", "true")
    assert (code, out) == (0, "a\nb\nc\n")
    assert "nothing was changed" in err
    assert not root.exists()
    line = ("batch", "run", "-n", "x", "-i", items, "--dry-run", "-o", "json", "true")
    assert json.loads(ctl(NOBODY, *line)[1])["batch"]["would_run"] == ["a", "b", "c"]


def test_items_that_run_again_are_told_apart_from_those_without_a_result(root: Path) -> None:
    path = made("census", ["a", "b", "c"], argv=["true"])
    ran(path, done("a"), done("b", "error"))
    line = ("batch", "retry", "census", "--here", "--dry-run")
    assert "census: 3 items, 2 done, 1 to do;" in ctl(NOBODY, *line)[2]
    assert "3 items, 2 done, 1 of them again, 1 to do;" in ctl(NOBODY, *line, "--errors")[2]
    ran(path, done("c"))
    assert "census: 3 items, 3 done, 1 of them again;" in ctl(NOBODY, *line, "--errors")[2]
    assert "census: 3 items, 3 done, 0 to do;" in ctl(NOBODY, *line)[2]


def test_items_come_through_a_pipe_unasked(root: Path) -> None:
    line = ("batch", "run", "-n", "x", "--dry-run", "true")
    assert ctl(NOBODY, *line, stdin="x y\nz\n")[1] == "x y\nz\n"
    code, _, err = ctl(NOBODY, *line, stdin="")
    assert code == 65
    assert "there are no items" in err


def test_nothing_left_to_do_is_said_and_no_task_is_made(
    scripted: Scripted, root: Path, items: str
) -> None:
    daemon = scripted({"status": lambda _: page()})
    path = made("census", ["a"])
    ran(path, done("a", "error"))
    code, out, err = ctl(daemon.endpoint, "batch", "retry", "census")
    assert (code, out) == (0, "")
    assert "nothing is left to do" in err
    assert ctl(daemon.endpoint, "batch", "retry", "census", "--wait")[0] == 1  # it has an error


def test_retry_goes_on_with_what_was_submitted(scripted: Scripted, root: Path) -> None:
    daemon = scripted({"status": lambda _: page(), "submit": lambda _: m.Submitted((9,), (True,))})
    path = made("census", ["a", "b"], jobs=3)
    ran(path, done("a", "error"), done("b"))
    assert ctl(daemon.endpoint, "batch", "retry", "census", "--errors", "-q")[1] == "9\n"
    batch = place.load(path)
    assert (batch.next.statuses, batch.knobs.jobs) == (["error"], 3)
    code, _, err = ctl(daemon.endpoint, "batch", "retry", "census", "--only", "c")
    assert code == 4
    assert "no item has the key 'c'" in err
    assert ctl(daemon.endpoint, "batch", "retry", "cesnus")[0] == 4
    assert names_in(root) == {"census"}


def test_waiting_for_a_batch_gives_its_exit_code(scripted: Scripted, root: Path) -> None:
    path = made("census", ["a", "b"])
    failed = row(7, "failed", name="batch:census", cause="exit", code=1)
    looks: list[int] = []

    def wait(_: m.Message) -> m.Waited:
        looks.append(1)
        if len(looks) == 1:
            return m.Waited(False, (row(7, name="batch:census"),))
        ran(path, done("a"), done("b", "fail"))
        return m.Waited(True, (failed,))

    active = row(7, name="batch:census")
    daemon = scripted({"status": lambda _: page(active), "wait": wait})
    code, out, err = ctl(daemon.endpoint, "batch", "wait", "census")
    assert (code, out) == (1, "")
    assert "2/2 done, pass 1, fail 1" in err
    assert ctl(daemon.endpoint, "batch", "wait", "census")[0] == 1  # at rest: at once


@pytest.mark.parametrize(
    "ended",
    [
        row(7, "cancelled", name="batch:census", cause="cancel"),
        row(7, "failed", name="batch:census", cause="exit", code=1),
        row(7, "failed", name="batch:census", cause="exit", code=130),
        row(7, "quarantined", name="batch:census", cause="lost"),
    ],
    ids=["cancelled", "stopped at its errors", "interrupted", "given up"],
)
def test_a_batch_that_ends_unfinished_gives_3_whenever_somebody_waits_for_it(
    scripted: Scripted, root: Path, items: str, ended: m.TaskRow
) -> None:
    active: list[m.TaskRow] = []
    daemon = scripted(
        {
            "status": lambda _: page(*active),
            "submit": lambda _: m.Submitted((7,), (True,)),
            "wait": lambda _: m.Waited(True, (ended,)),
        }
    )
    submit = ("batch", "submit", "-n", "census", "-i", items, "--wait", "true")
    assert ctl(daemon.endpoint, *submit)[0] == 3
    active.append(row(7, name="batch:census"))
    assert ctl(daemon.endpoint, "batch", "wait", "census")[0] == 3, "while it ran"
    active.clear()
    assert ctl(daemon.endpoint, "batch", "wait", "census")[0] == 3, "later"


@pytest.mark.parametrize("verb", ["wait", "submit --wait", "wait --cancel-on-interrupt"])
def test_ctrl_c_ends_the_waiting_alone_and_tells_how_to_look_again(
    scripted: Scripted, root: Path, items: str, verb: str
) -> None:
    made("census", ["a", "b", "c"], argv=["true"], cwd=str(Path.cwd()))
    active = row(7, name="batch:census", labels={"batch": "census"})
    daemon = scripted({
        "status": lambda _: page(active),
        "wait": lambda _: m.Waited(met=False, tasks=(active,)),
        "cancel": lambda _: m.Changed((m.TaskChange(7, "stopping"),)),
    })  # fmt: skip
    more = ["-n", "census", "-i", items, "true"] if verb.startswith("submit") else ["census"]
    with ctl_process(daemon.endpoint, "batch", *verb.split(), *more) as process:
        until(lambda: daemon.asked("wait"))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)

    assert process.returncode == 130
    if "cancel" in verb:
        assert err.endswith("ckptctl: batch census: task 7 is being cancelled\n")
        assert daemon.asked("cancel")
    else:
        assert err.endswith(
            "ckptctl: batch census goes on; how it is: ckptctl batch status census;"
            " to wait again: ckptctl batch wait census\n"
        )
        assert not daemon.asked("cancel")


def test_ctrl_c_clears_the_line_about_a_batch_that_no_daemon_runs(root: Path) -> None:
    path = made("census", ["a"])
    mine, theirs = pty.openpty()
    with place.locked(path, "census"), open(mine, "rb", buffering=0) as screen:
        process = subprocess.Popen(
            [sys.executable, "-m", "ckptctl", "batch", "wait", "census", "--cancel-on-interrupt"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        while b"0/1 done" not in shown:
            shown += screen.read(4_096)
        process.send_signal(signal.SIGINT)
        code = process.wait(30)
        shown = screen.read(4_096)

    assert code == 130
    cleared = b"\r\x1b[K"  # the line may have been drawn once more by then
    assert cleared + b"ckptctl: batch census goes on (no task of the daemon's runs it);" in shown


def test_a_misspelt_field_is_warned_of_before_anything_runs(root: Path, tmp_path: Path) -> None:
    (tmp_path / "users.jsonl").write_text('{"id":1,"name":"a"}\n')
    line = ("batch", "run", "-i", str(tmp_path / "users.jsonl"), "--dry-run", "--", "true")
    err = ctl(NOBODY, *line, "{idd}", "{id}", "{print $1}")[2]
    assert "{idd} in the command is no field of the items; they have: id, name" in err
    assert "print" not in err


def test_waiting_for_a_batch_that_runs_in_a_terminal_ends_with_its_runner(root: Path) -> None:
    path = made("census", ["a"])
    with place.locked(path, "census"):
        code, _, err = ctl(NOBODY, "batch", "wait", "census", "--timeout", "0")
        assert code == 124
        assert "census is not done in time" in err
        assert "to wait again: ckptctl batch wait census" in err
        process = ctl_process(NOBODY, "batch", "wait", "census")
        ran(path, done("a"))
        with pytest.raises(subprocess.TimeoutExpired):  # all is done, but it is still at work
            process.communicate(timeout=2)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "")
    assert "batch census: 1/1 done, pass 1" in err


def test_a_batch_that_no_daemon_ever_ran_is_waited_for_without_one(root: Path) -> None:
    path = made("census", ["a", "b"])
    wait = ("batch", "wait", "census")
    assert ctl(NOBODY, *wait)[0] == 2, "its task may wait in a daemon that is down"
    ran(path, done("a"))

    code, out, err = ctl(NOBODY, *wait)
    assert (code, out) == (3, "")
    assert "no daemon answers, and none ever ran batch census" in err
    assert "batch census: 1/2 done, pass 1" in err

    ran(path, end="", task=7)
    assert ctl(NOBODY, *wait)[0] == 2


def test_a_submit_that_the_daemon_refuses_tells_that_the_batch_stays(
    scripted: Scripted, root: Path, items: str
) -> None:
    no = BadRequest("environment of 2000000 bytes is over 1048576", "use --clean-env")
    daemon = scripted({"status": lambda _: page(), "submit": lambda _: no})

    code, out, err = ctl(daemon.endpoint, "batch", "submit", "-n", "census", "-i", items, "true")

    assert (code, out) == (64, "")
    assert "environment of 2000000 bytes" in err
    assert "batch census: 3 items, 3 to do; it stays, but no task was made to run it" in err
    assert names_in(root) == {"census"}
