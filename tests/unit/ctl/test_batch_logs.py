"""batch logs over files as the runner leaves them; batch gc as a person at a terminal meets it."""

from pathlib import Path

import pytest

from ckptd.batch import place
from ckptd.protocol import messages as m
from tests.unit.ctl.batches import done, made, names_in, ran
from tests.unit.ctl.conftest import Scripted, ctl, ctl_on_terminal, ctl_process
from tests.unit.ctl.rows import page, row
from tests.waiting import until

NOBODY = "ipc:///nonexistent/ctl.sock"


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CKPTD_BATCH_DIR", str(tmp_path / "batches"))
    folder = Path(made("census", ["a", "b", "c"])) / "logs"
    folder.mkdir()
    (folder / "lane-00.log.1").write_text("--- a: error, try 1 of run 1, 0.1 s\nold\n")
    (folder / "lane-00.log").write_text(
        "--- a: pass, try 1 of run 2, 0.1 s\none\ntwo\n--- aa: pass, try 1 of run 2, 0.1 s\nother\n"
    )
    (folder / "lane-01.log").write_text("--- b: pass, try 1 of run 2, 0.1 s\n\x00\xff\n", "latin-1")
    return folder


def test_logs_are_printed_lane_after_lane_the_older_file_first(logs: Path) -> None:
    code, out, _ = ctl(NOBODY, "batch", "logs", "census", "--key", "a")
    assert code == 0
    assert out.splitlines() == [
        "--- a: error, try 1 of run 1, 0.1 s", "old",
        "--- a: pass, try 1 of run 2, 0.1 s", "one", "two",
    ]  # fmt: skip
    (logs / "lane-01.log").write_text("b\n")
    lines = ctl(NOBODY, "batch", "logs", "census")[1].splitlines()
    assert [line for line in lines if "---" not in line] == ["old", "one", "two", "other", "b"]
    out = ctl(NOBODY, "batch", "logs", "census", "-n", "1")[1]
    assert out == "==> lane-00.log <==\nother\n==> lane-01.log <==\nb\n"


def test_an_item_that_printed_nothing_is_told_so(logs: Path) -> None:
    code, _, err = ctl(NOBODY, "batch", "logs", "census", "--key", "c")
    assert code == 4
    assert "nothing of an item 'c'" in err
    assert ctl(NOBODY, "batch", "logs", "cencus")[0] == 4


@pytest.mark.parametrize("other", [("-f",), ("-n", "3")])
def test_the_output_of_one_item_is_neither_followed_nor_cut(
    logs: Path, other: tuple[str, ...]
) -> None:
    code, out, err = ctl(NOBODY, "batch", "logs", logs.parent.name, "--key", "a", *other)
    assert (code, out) == (64, "")
    assert "leave one out: ckptctl batch logs census --key a" in err


def test_following_goes_on_into_a_new_file_until_the_runner_is_gone(logs: Path) -> None:
    (logs / "lane-01.log").unlink()
    lane = logs / "lane-00.log"
    with place.locked(str(logs.parent), "census"):
        process = ctl_process(NOBODY, "batch", "logs", "-f", "census")
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(7)]
        assert lines[-1] == "other\n"
        with lane.open("a") as file:
            file.write("late\n")
        assert process.stdout.readline() == "late\n"
        with lane.open("a") as file:
            file.write("last of the old\n")
        lane.rename(f"{lane}.1")
        lane.write_text("first of the new\n")
        assert process.stdout.readline() == "last of the old\n"
        assert process.stdout.readline() == "first of the new\n"
        with lane.open("a") as file:
            file.write("the end\n")
    out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("the end\n", "", 0)


def test_following_a_held_batch_says_so_and_goes_on_until_its_task_is_over(
    logs: Path, scripted: Scripted
) -> None:
    states = {"now": row(7, "held", name="batch:census", labels={"batch": "census"})}

    def waited(_: m.Message) -> m.Waited:
        return m.Waited(states["now"].phase == "succeeded", (states["now"],))

    daemon = scripted({"status": lambda _: page(states["now"]), "wait": waited})
    process = ctl_process(daemon.endpoint, "batch", "logs", "-f", "-n", "0", "census")
    assert process.stderr is not None
    assert process.stdout is not None
    assert process.stderr.readline() == (
        "ckptctl: batch census: task 7 is held; to let it go on: ckptctl release 7\n"
    )
    states["now"] = row(7, "waiting", reason="rate_limit", until_ns=1, name="batch:census")
    assert process.stderr.readline() == (
        "ckptctl: batch census: task 7 is waiting: rate limit, now; why: ckptctl explain 7\n"
    )
    states["now"] = row(7, "running", name="batch:census")
    heads = [process.stdout.readline() for _ in range(2)]
    assert heads == ["==> lane-00.log <==\n", "==> lane-01.log <==\n"]
    with place.locked(str(logs.parent), "census"), (logs / "lane-02.log").open("w") as file:
        file.write("at last\n")
    assert process.stdout.readline() == "at last\n"
    states["now"] = row(7, "succeeded", name="batch:census")
    out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("", "", 0)


def test_following_ends_with_the_runner_where_the_daemon_is_away(
    logs: Path, scripted: Scripted
) -> None:
    task = row(7, "running", name="batch:census", labels={"batch": "census"})
    script = {"status": lambda _: page(task), "wait": lambda _: m.Waited(False, (task,))}
    daemon = scripted(script)
    with place.locked(str(logs.parent), "census"):
        line = ("batch", "logs", "-f", "-n", "0", "census", "--answer-within", "1s")
        process = ctl_process(daemon.endpoint, *line)
        assert process.stdout is not None
        assert process.stderr is not None
        heads = [process.stdout.readline() for _ in range(2)]
        assert heads == ["==> lane-00.log <==\n", "==> lane-01.log <==\n"]
        daemon.close()
        assert "until the runner ends comes all the same" in process.stderr.readline()
        with (logs / "lane-01.log").open("a") as file:
            file.write("at last\n")
        assert process.stdout.readline() == "at last\n"
    out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("", "", 0)


def test_following_a_batch_that_nobody_runs_says_what_would(logs: Path) -> None:
    code, _, err = ctl(NOBODY, "batch", "logs", "-f", "-n", "0", logs.parent.name)
    assert code == 0
    assert "nobody runs batch census now, it is new; to go on: ckptctl batch retry census" in err


def test_following_ends_with_its_reader_though_nothing_more_comes(logs: Path) -> None:
    (logs / "lane-01.log").unlink()
    line = (NOBODY, "batch", "logs", "census", "-f")
    with place.locked(str(logs.parent), "census"), ctl_process(*line) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("--- a")
        process.stdout.close()
        assert process.wait(30) == 141
        assert process.stderr.read() == ""


def test_gc_asks_a_person_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_BATCH_DIR", str(tmp_path))
    ran(made("census", ["a"]), done("a"))
    code, shown = ctl_on_terminal(NOBODY, "batch", "gc", "census", typed="n\n")
    assert code == 64
    assert "remove 1 batch (" in shown
    assert "nothing was removed" in shown
    assert names_in(tmp_path) == {"census"}
    code, shown = ctl_on_terminal(NOBODY, "batch", "gc", "census", typed="y\n")
    assert code == 0
    until(lambda: not names_in(tmp_path))
