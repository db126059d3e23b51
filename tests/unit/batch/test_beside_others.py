"""What is told of batches while somebody else removes, archives or turns over what is read."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ckptd.batch import __main__ as tool
from ckptd.batch import gc, ledger, logs, report
from ckptd.storage import facts
from tests.batch_world import BatchWorld
from tests.waiting import until


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTD_BATCH_DIR", str(tmp_path / "batches"))


@pytest.fixture
def world(tmp_path: Path) -> BatchWorld:
    """A batch that is done."""
    made = BatchWorld(tmp_path, "b")
    made.prepare(items=["1"], argv=["echo", "said"], cwd="/")
    made.run()
    return made


def told(capfd: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    capfd.readouterr()
    assert tool.main(list(words)) == 0
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


@pytest.mark.parametrize("verb", ["report", "gc"])
@pytest.mark.parametrize("step", ["before it is looked at", "while it is looked at"])
def test_a_batch_that_is_removed_while_they_are_listed_hides_no_other(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    step: str,
    verb: str,
) -> None:
    for name in ("aa", "bb", "cc"):
        BatchWorld(tmp_path, name).prepare(items=["1"], argv=["true"], cwd="/")
    where: Any = report if step == "before it is looked at" else ledger
    call = "summary" if where is report else "read"
    looked = getattr(where, call)

    def late(*args: Any, **options: Any) -> Any:
        if "bb" in str(args[0]):
            shutil.rmtree(tmp_path / "batches" / "bb", ignore_errors=True)
        return looked(*args, **options)

    monkeypatch.setattr(where, call, late)
    found = told(capfd, verb)
    names = [one["name"] for one in found] if verb == "report" else list(found[0]["kept"])
    assert names == ["aa", "cc"]


@pytest.mark.parametrize("words", [(), ("b",)])
def test_gc_keeps_a_batch_that_got_more_to_do_after_it_was_judged(
    world: BatchWorld,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: tuple[str, ...],
) -> None:
    measured = gc.bytes_of

    def late(path: str) -> int:
        world.prepare(items=["1", "2"], argv=["echo", "said"], cwd="/")
        return measured(path)

    monkeypatch.setattr(gc, "bytes_of", late)
    (found,) = told(capfd, "gc", *words)
    assert found["removed"] == []
    assert "1 item is to do" in found["kept"]["b"]
    (found,) = told(capfd, "gc", "--force", "b")
    assert found["removed"] == ["b"]
    assert not world.dir.exists()


def test_an_export_beside_a_fresh_start_reads_what_is_there_then(
    world: BatchWorld, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    read, left = facts.read_facts, ["what was recorded goes once it was read"]

    def late(*args: Any, **options: Any) -> Any:
        found = read(*args, **options)
        if left:
            left.clear()
            world.prepare("--fresh", items=["1"], argv=["true"], cwd="/")
        return found

    monkeypatch.setattr(facts, "read_facts", late)
    assert told(capfd, "export", "b") == []


@pytest.mark.parametrize("verb", ["report", "items"])
def test_what_a_run_had_not_done_yet_is_never_told_of_a_batch_at_rest(
    world: BatchWorld, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], verb: str
) -> None:
    wait = ["sh", "-c", "touch began; until test -e go; do sleep 0.01; done"]
    world.prepare("--fresh", items=["1"], argv=wait, cwd=str(world.work))
    running = world.start()
    until((world.work / "began").exists)
    read = ledger.read

    def late(*args: Any, **options: Any) -> Any:
        found = read(*args, **options)
        (world.work / "go").touch()
        running.communicate(timeout=30)
        return found

    monkeypatch.setattr(ledger, "read", late)
    (told_then,) = told(capfd, verb, "b")
    (told_later,) = told(capfd, verb, "b")

    if verb == "report":
        assert (told_then["lock_pid"], told_then["todo"]) == (running.pid, 1)
        assert (told_later["lock_pid"], told_later["todo"]) == (0, 0)
    else:
        assert (told_then["status"], told_later["status"]) == ("running", "pass")


@pytest.mark.parametrize("words", [("b",), ("b", "--key=1")])
def test_a_lane_that_is_turned_over_while_it_is_read_is_printed_whole(
    world: BatchWorld,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: tuple[str, ...],
) -> None:
    (lane,) = (world.dir / "logs").iterdir()
    text = lane.read_text()
    Path(f"{lane}.1").write_text(text.replace("said", "of long ago"))
    listed = logs._lanes

    def late(path: str) -> list[str]:
        found = listed(path)
        os.rename(lane, f"{lane}.1")
        return found

    monkeypatch.setattr(logs, "_lanes", late)
    capfd.readouterr()
    assert tool.main(["logs", *words]) == 0
    assert capfd.readouterr().out == text
