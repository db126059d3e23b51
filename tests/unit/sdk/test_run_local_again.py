"""`run_local(again=True)`: what was interrupted is gone on with, what was done is done anew."""

from pathlib import Path
from typing import Any

import pytest

from ckptd.sdk import run_local


def test_again_resumes_what_was_interrupted_and_repeats_what_was_done(tmp_path: Path) -> None:
    ran: list[str] = []

    def function(ctx: Any, *, fails: bool) -> int:
        ctx.step("first", ran.append, "first")
        if fails:
            raise RuntimeError("on the way")
        ctx.step("second", ran.append, "second")
        return len(ran)

    def run(*, fails: bool = False, again: bool = True) -> Any:
        return run_local(function, tmp_path / "task", again=again, fails=fails)

    with pytest.raises(RuntimeError):
        run(fails=True)
    assert run() == 2  # went on
    assert run(again=False) == 2  # remembered
    assert run() == 4  # anew
    assert ran == ["first", "second"] * 2
    assert (tmp_path / "task" / "archive").is_dir()


def test_a_result_is_not_handed_out_for_other_input(tmp_path: Path) -> None:
    def function(ctx: Any, path: Any) -> str:
        ctx.checkpoint()
        return str(path)

    folder = tmp_path / "task"
    assert run_local(function, folder, path=Path("a.csv")) == "a.csv"
    assert run_local(function, folder, path="a.csv") == "a.csv"
    with pytest.raises(ValueError, match="not with the input that is given now"):
        run_local(function, folder, path="b.csv")
    assert run_local(function, folder, again=True, path="b.csv") == "b.csv"


def test_results_of_items_are_there_in_every_attempt(tmp_path: Path) -> None:
    def square(number: int) -> int:
        if number == 3:
            raise RuntimeError("no")
        return number**2

    def function(ctx: Any, *, upto: int) -> Any:
        ctx.items(range(upto), name="squares").run(square)
        ctx.record_item("other", "pass", b"raw")
        if upto < 5:
            raise RuntimeError("interrupted")
        return [ctx.item_results("squares"), ctx.item_results()]

    with pytest.raises(RuntimeError):
        run_local(function, tmp_path / "task", upto=3)
    named, whole = run_local(function, tmp_path / "task", upto=5)
    assert named == {"0": 0, "1": 1, "2": 4, "4": 16}
    assert whole["squares/2"] == 4
    assert whole["other"] == b"raw"
