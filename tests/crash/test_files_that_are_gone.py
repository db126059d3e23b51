"""Files of a task that are gone though the log knows of them: a real daemon is never silent.

`--retries 1` has each task tried twice; the first attempt waits for a file, so that what it saved
is known to the daemon before it is taken away.
"""

import shutil
from pathlib import Path

import pytest

from tests.daemon_fixture import LiveDaemon
from tests.waiting import until

PAYS = "ckpt step pay --once -- sh -c 'echo paid >>paid'"
SAVES = "echo $CKPTD_ATTEMPT >n; ckpt save n"
WAITS = "while [ ! -e go ]; do sleep 0.05; done"
SAYS = "echo $CKPTD_ATTEMPT from $CKPTD_SEQ >>tries"


def begun(daemon: LiveDaemon, *does: str, checkpoint: int) -> int:
    """Return a task whose first attempt has done all that and is known to have done it."""
    script = "; ".join((SAYS, *does, WAITS, "test $CKPTD_ATTEMPT -gt 1"))
    options = ("--retries", "1", "--backoff", "0.1s")
    task = daemon.submit("sh", "-c", script, options=options)
    until(lambda: daemon.row(task)["checkpoint"] == checkpoint, 20.0)
    return task


def goes_on(daemon: LiveDaemon) -> None:
    (daemon.work / "go").touch()


def lines(daemon: LiveDaemon, name: str) -> list[str]:
    return (daemon.work / name).read_text().splitlines()


def files(daemon: LiveDaemon, task: int) -> Path:
    return daemon.state / "tasks" / str(task)


@pytest.mark.parametrize("what", ["", "ckpt"])
def test_a_task_whose_saved_files_are_gone_is_blocked_and_pays_nothing_twice(
    daemon: LiveDaemon, what: str
) -> None:
    task = begun(daemon, PAYS, SAVES, checkpoint=1)
    shutil.rmtree(files(daemon, task) / what)
    goes_on(daemon)

    assert daemon.wait_phase(task, "blocked")["reason"] == "checkpoint"
    told = " ".join(daemon.ctl("explain", str(task)).stdout.split())
    assert "checkpoint 1 is gone" in told
    assert f"retry --fresh {task}" in told
    assert "checkpoint 1 is gone" in " ".join(daemon.ctl("show", str(task)).stdout.split())
    assert lines(daemon, "tries") == ["1 from 0"]
    assert lines(daemon, "paid") == ["paid"]


def test_what_is_gone_stays_known_over_releases_and_restarts_until_it_is_put_back(
    daemon: LiveDaemon, tmp_path: Path
) -> None:
    task = begun(daemon, PAYS, SAVES, checkpoint=1)
    shutil.copytree(files(daemon, task), tmp_path / "kept")
    shutil.rmtree(files(daemon, task))
    goes_on(daemon)
    daemon.wait_phase(task, "blocked")
    daemon.ctl("release", str(task))
    until(lambda: daemon.row(task)["attempt"] == 3, 20.0)
    daemon.wait_phase(task, "blocked")
    daemon.kill9()
    daemon.start()
    daemon.ctl("retry", str(task))
    until(lambda: daemon.row(task)["attempt"] == 4, 20.0)
    daemon.wait_phase(task, "blocked")
    assert lines(daemon, "tries") == ["1 from 0"]

    shutil.copytree(tmp_path / "kept", files(daemon, task), dirs_exist_ok=True)
    daemon.ctl("release", str(task))
    until(lambda: daemon.row(task)["attempt"] == 5, 20.0)

    daemon.wait_phase(task, "succeeded")
    assert lines(daemon, "tries") == ["1 from 0", "5 from 1"]
    assert lines(daemon, "paid") == ["paid"]


def test_a_person_who_says_fresh_has_it_start_from_nothing(daemon: LiveDaemon) -> None:
    task = begun(daemon, SAVES, checkpoint=1)
    shutil.rmtree(files(daemon, task))
    goes_on(daemon)
    daemon.wait_phase(task, "blocked")

    daemon.ctl("retry", "--fresh", str(task))

    until(lambda: daemon.row(task)["attempt"] == 3, 20.0)
    daemon.wait_phase(task, "succeeded")
    assert lines(daemon, "tries") == ["1 from 0", "3 from 0"]


def test_a_journal_that_is_gone_blocks_its_task_too(daemon: LiveDaemon) -> None:
    task = begun(daemon, PAYS, SAVES, checkpoint=1)
    shutil.rmtree(files(daemon, task) / "journal")
    goes_on(daemon)

    daemon.wait_phase(task, "blocked")

    assert "its journal is gone" in " ".join(daemon.ctl("explain", str(task)).stdout.split())
    assert lines(daemon, "paid") == ["paid"]


@pytest.mark.parametrize("is_over", [False, True])
def test_a_journal_that_is_taken_away_while_no_daemon_runs_blocks_its_task_though_it_saved_since(
    daemon: LiveDaemon, *, is_over: bool
) -> None:
    """What is left has progress of its own, and no daemon saw both."""
    once = "while [ ! -e more ]; do sleep 0.05; done"
    task = begun(daemon, PAYS, SAVES, once, SAVES, "touch saved", checkpoint=1)
    daemon.kill9()
    shutil.rmtree(files(daemon, task) / "journal")
    (daemon.work / "more").touch()
    until((daemon.work / "saved").exists, 20.0)
    if is_over:
        goes_on(daemon)
    daemon.start()
    goes_on(daemon)

    assert daemon.wait_phase(task, "blocked")["reason"] == "checkpoint"

    assert "its journal is gone" in " ".join(daemon.ctl("explain", str(task)).stdout.split())
    assert lines(daemon, "paid") == ["paid"]


def test_a_checkpoint_that_a_person_brings_in_stands_for_the_journal_too(
    daemon: LiveDaemon,
) -> None:
    task = begun(daemon, PAYS, SAVES, checkpoint=1)
    daemon.ctl("checkpoint", "export", str(task), str(daemon.work / "kept"))
    shutil.rmtree(files(daemon, task))
    goes_on(daemon)
    daemon.wait_phase(task, "blocked")

    daemon.ctl("checkpoint", "import", str(task), str(daemon.work / "kept"))
    daemon.ctl("release", str(task))

    daemon.wait_phase(task, "succeeded")
    assert lines(daemon, "tries") == ["1 from 0", "3 from 1"]


def test_an_older_checkpoint_is_gone_on_from_with_a_warning(daemon: LiveDaemon) -> None:
    task = begun(daemon, SAVES, SAVES, checkpoint=2)
    shutil.rmtree(files(daemon, task) / "ckpt/00000002")
    goes_on(daemon)

    daemon.wait_phase(task, "succeeded")

    assert lines(daemon, "tries") == ["1 from 0", "2 from 1"]
    told = daemon.ctl("events", "--task", str(task), "--type", "started", "-o", "jsonl").stdout
    assert "checkpoint 2 is gone, resumed from 1" in told
