"""A store that is copied while its tasks run: the copy leaves them to the original."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon_fixture import LiveDaemon, is_alive
from tests.waiting import until

RUNS_UNTIL_GO = "echo $CKPTD_ATTEMPT >>ran; echo $$ >pid; until [ -e go ]; do sleep 0.05; done"


@pytest.fixture
def copy() -> Iterator[LiveDaemon]:
    """A daemon that is not started yet, for a copy of another's store."""
    made = LiveDaemon()
    yield made
    made.close()


def copied(daemon: LiveDaemon, copy: LiveDaemon) -> None:
    """Copy as `cp -a` does; the lock and the log are open in the original."""
    shutil.copytree(daemon.state, copy.state, symlinks=True)


def files(root: Path) -> dict[str, bytes]:
    paths = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def refusal(copy: LiveDaemon) -> str:
    """Start the copy, which is to refuse it, and return what it says."""
    with pytest.raises(AssertionError, match="daemon ended with 2"):
        copy.start()
    copy.process = None
    said = copy.log.read_text()
    copy.log.unlink()
    return said


def test_a_copy_does_not_start_while_the_originals_tasks_run_and_leaves_them_alone(
    daemon: LiveDaemon, copy: LiveDaemon
) -> None:
    task = daemon.submit("sh", "-c", RUNS_UNTIL_GO)
    pid = int(daemon.wait_file("pid"))
    daemon.wait_phase(task, "running")
    copied(daemon, copy)
    before = files(copy.state)

    for _ in range(2):
        said = refusal(copy)
        assert f"{copy.state} is a copy of a store whose tasks still run on this machine" in said
        assert f"task {task}, attempt 1 is pid {pid}; nothing was changed" in said
    daemon.kill9()  # nor does it take over what the original's death has left
    assert f"attempt 1 is pid {pid}" in refusal(copy)

    assert files(copy.state) == before
    assert is_alive(pid)
    daemon.start()
    (daemon.work / "go").touch()
    row = daemon.wait_phase(task, "succeeded", "failed")
    assert (row["phase"], row["attempt"]) == ("succeeded", 1)


def test_a_copy_goes_on_by_itself_once_the_originals_tasks_are_over(
    daemon: LiveDaemon, copy: LiveDaemon
) -> None:
    task = daemon.submit("sh", "-c", RUNS_UNTIL_GO)
    daemon.wait_file("pid")
    daemon.wait_phase(task, "running")
    copied(daemon, copy)
    (daemon.work / "go").touch()
    daemon.wait_phase(task, "succeeded")
    shim = daemon.detail(task)["attempts"][0]
    assert shim["cause"] == "exit"

    copy.start()  # the supervisor of its claim lives on, for the original's next task
    row = copy.wait_phase(task, "succeeded")

    assert row["attempt"] == 2
    first, _ = copy.detail(task)["attempts"]
    assert (first["cause"], first["text"]) == (
        "lost",
        "it ran in the store that this is a copy of",
    )
    assert (daemon.work / "ran").read_text().split() == ["1", "2"]


def test_a_copy_that_lacks_the_record_of_a_running_attempt_does_not_start_either(
    daemon: LiveDaemon, copy: LiveDaemon
) -> None:
    task = daemon.submit("sh", "-c", RUNS_UNTIL_GO)
    pid = daemon.wait_file("pid").strip()
    daemon.wait_phase(task, "running")
    copied(daemon, copy)
    (copy.state / "attempts" / f"{task}.1").unlink()  # copied before the start, the log after it
    assert f"attempt 1 is pid {pid}" in refusal(copy)


def test_a_store_that_was_moved_with_its_tasks_running_has_them_still(
    daemon: LiveDaemon, copy: LiveDaemon
) -> None:
    task = daemon.submit("sh", "-c", RUNS_UNTIL_GO)
    pid = int(daemon.wait_file("pid"))
    daemon.wait_phase(task, "running")
    daemon.kill9()
    daemon.state.rename(copy.state)
    copy.start()
    assert is_alive(pid)
    (daemon.work / "go").touch()
    row = copy.wait_phase(task, "succeeded", "failed")
    assert (row["phase"], row["attempt"], row["code"]) == ("succeeded", 1, 0)


def test_the_copy_of_a_stopped_store_is_the_same_store_again(
    daemon: LiveDaemon, copy: LiveDaemon
) -> None:
    done = daemon.submit("true")
    daemon.wait_phase(done, "succeeded")
    held = daemon.submit("true", options=["--hold"])
    assert daemon.stop() == 0
    copied(daemon, copy)
    shutil.rmtree(daemon.state)
    copy.start()
    assert copy.row(done)["phase"] == "succeeded"
    copy.ctl("release", str(held))
    copy.wait_phase(held, "succeeded")
    until(lambda: not list((copy.state / "attempts").glob("[0-9]*")))
