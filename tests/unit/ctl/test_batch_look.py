"""batch status, items, export and gc over ledgers made by hand, without a daemon."""

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptd.batch import place
from ckptd.storage import facts
from tests.unit.ctl.batches import done, journal, made, names_in, ran
from tests.unit.ctl.conftest import ctl

NOBODY = "ipc:///nonexistent/ctl.sock"
Look = Callable[..., tuple[int, str, str]]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CKPTD_BATCH_DIR", str(tmp_path / "batches"))
    return tmp_path / "batches"


@pytest.fixture
def look(root: Path) -> Look:
    return lambda *words, **more: ctl(NOBODY, "batch", *words, **more)


def document(said: tuple[int, str, str]) -> Any:
    assert said[0] == 0, said
    return json.loads(said[1])


def test_without_any_batch_there_is_nothing_and_that_is_fine(look: Look) -> None:
    assert look() == (0, "", "")
    assert document(look("-o", "json"))["batches"] == []


def test_status_counts_the_last_result_of_each_listed_item(look: Look) -> None:
    path = made("census", ["a", "b", "c", "d"])
    ran(path, done("a"), done("b", "fail"), done("gone"), end="")
    ran(path, done("b", "error", text="no such host"))
    (row,) = document(look("-o", "json"))["batches"]
    assert (row["state"], row["done"], row["total"], row["todo"]) == ("unfinished", 2, 4, 2)
    assert row["counts"] == {"pass": 1, "error": 1}
    assert [run["end"] for run in row["runs"]] == ["", "finished"]


def test_a_batch_without_anything_left_is_finished_and_check_tells_how(look: Look) -> None:
    ran(made("good", ["a"]), done("a"))
    ran(made("bad", ["a", "b"]), done("a"), done("b", "quarantined"))
    ran(made("half", ["a", "b"]), done("a"))
    assert [look("status", name, "--check")[0] for name in ("good", "bad", "half")] == [0, 1, 3]
    table = look()[1].splitlines()
    assert table[0].split()[:3] == ["NAME", "STATE", "DONE"]
    assert [line.split()[0] for line in table[1:]] == ["half", "bad", "good"]  # newest first
    assert "finished with errors" in table[2]


def test_what_was_asked_again_is_to_do_until_it_has_a_newer_result(look: Look) -> None:
    path = made("census", ["a", "b"])
    ran(path, done("a"), done("b", "error"))
    batch = place.load(path)
    batch.next = place.Next(base_run=place.newest_run(path), statuses=["error"])
    place.store(path, batch)
    assert document(look("-o", "json"))["batches"][0]["todo"] == 1
    ran(path, done("b", "error"))
    assert document(look("-o", "json"))["batches"][0]["todo"] == 0


def test_one_batch_in_detail_says_what_went_wrong_and_what_to_do(look: Look) -> None:
    path = made("census", ["host-a", "host-b", "host-c"])
    ran(
        path,
        done("host-a", "error", text="host-a: no route"),
        done("host-b", "error", text="host-b: no route"),
        facts.run_event("pause", why="rate_limit", scope="", seconds=5.0, until_ns=1),
        facts.run_event("resume", waited_s=65.0),
        end="interrupt",
    )
    text = look("status", "census")[1]
    assert look("show", "census")[1] == text
    assert "2 of 3 done (66%)" in text
    assert "error 2" in text
    assert "wc -c" in text
    assert "unfinished: interrupted" in text
    assert "1; 1m05s waited in all" in text
    assert "{}: no route" in text  # both are one kind of trouble, told once
    assert "to go on: ckptctl batch retry census" in text
    assert "those again: ckptctl batch retry census --errors" in text
    ran(path, done("host-c", "quarantined"))
    assert "retry census --status error,quarantined" in look("status", "census")[1]


def test_a_wrong_name_names_the_nearest(look: Look) -> None:
    made("nightly", ["a"])
    code, out, err = look("status", "nihgtly")
    assert (code, out) == (4, "")
    assert "no batch 'nihgtly'" in err
    assert "did you mean nightly?" in err
    assert look("items", "../nightly")[0] == 64


def test_a_batch_that_cannot_be_read_hides_no_other(look: Look, root: Path) -> None:
    ran(made("good", ["a"]), done("a"))
    (root / "torn").mkdir()
    (root / "torn" / "batch.json").write_text('{"format":1')
    rows = document(look("-o", "json"))["batches"]
    assert [(row["name"], row["state"]) for row in rows] == [
        ("torn", "unreadable"),
        ("good", "finished"),
    ]
    assert "cannot be read" in rows[0]["problem"]


def test_a_ledger_that_lost_what_it_promised_is_told_and_not_papered_over(look: Look) -> None:
    path = made("census", ["a", "b"])
    run = ran(path, done("a"), done("b"))
    data = bytearray(journal(path, run).read_bytes())
    data[60] ^= 0xFF
    journal(path, run).write_bytes(data)
    (row,) = document(look("-o", "json"))["batches"]
    assert row["state"] == "unreadable"
    assert look("export", "census")[0] == 65


# --- items --------------------------------------------------------------------------------------


def test_items_are_listed_in_their_order_with_what_they_came_to(look: Look) -> None:
    path = made("census", ["b", "a", "c"])
    ran(path, done("a", result={"n": 1}), done("b", "fail", text="exit 1"))
    rows = document(look("items", "census", "-o", "json"))["items"]
    assert [(row["key"], row["status"]) for row in rows] == [
        ("b", "fail"),
        ("a", "pass"),
        ("c", "todo"),
    ]
    assert rows[1]["result"] == {"n": 1}
    assert look("items", "census", "--todo", "-q")[1] == "c\n"
    assert look("items", "census", "--status", "fail,pass", "-q")[1] == "b\na\n"
    assert look("items", "census", "--key", "a", "-o", "{key} {took_s}")[1] == "a 0.25\n"


def test_items_in_a_table_show_the_text_or_the_result(look: Look) -> None:
    path = made("census", ["a", "b"])
    ran(path, done("a", result=[1, 2]), done("b", "error", text="went \x1b[31mwrong"))
    out = look("items", "census")[1]
    assert "[1,2]" in out
    assert "went \\x1b[31mwrong" in out  # what items print cannot steer the terminal


def test_a_wrong_status_names_the_nearest(look: Look) -> None:
    made("census", ["a"])
    code, _, err = look("items", "census", "--status", "eror")
    assert code == 64
    assert "did you mean error?" in err


# --- export -------------------------------------------------------------------------------------


def test_export_has_every_final_result_once_also_of_items_listed_no_more(look: Look) -> None:
    path = made("census", ["a", "b", "c"])
    ran(path, done("a", "error"), done("b"))
    ran(path, done("a", result="late"))
    made("census", ["a", "c"])
    lines = [json.loads(line) for line in look("export", "census")[1].splitlines()]
    assert [(line["key"], line["status"], line.get("vanished")) for line in lines] == [
        ("a", "pass", None),
        ("b", "pass", True),
    ]
    assert lines[0]["result"] == "late"
    assert lines[0]["run"] == 2
    assert lines[0]["ended_at"].endswith("Z")
    assert lines[0]["schema"] == "ckptd/v1"


def test_export_as_csv_has_a_column_for_each_field_of_the_items(look: Look) -> None:
    people = [{"id": 1, "name": "Ann, née B"}, {"id": 2, "name": 'the "other"\nline'}]
    path = made("people", people, {"format": "jsonl", "key": "id"})
    ran(path, done("1", result={"x": 1}), done("2", "fail"))
    rows = list(csv.DictReader(io.StringIO(look("export", "people", "-o", "csv")[1])))
    assert [row["item.name"] for row in rows] == ["Ann, née B", 'the "other"\nline']
    assert rows[0]["result"] == '{"x":1}'
    assert len(document(look("export", "people", "-o", "json"))["results"]) == 2
    assert len(list(csv.reader(io.StringIO(look("export", "people", "-o", "csv",
                                                "--status", "fail")[1])))) == 2  # fmt: skip


# --- gc -----------------------------------------------------------------------------------------


def test_an_empty_list_that_was_allowed_is_finished_and_gc_takes_it(look: Look, root: Path) -> None:
    run = look("run", "-n", "none", "-i", os.devnull, "--allow-empty", "--", "true")
    assert run[0] == 0, run
    assert "finished: 0 items" in run[2]
    (row,) = document(look("-o", "json"))["batches"]
    assert (row["state"], row["total"]) == ("finished", 0)

    (root / "none" / place.ITEMS_FILE).rename(root / "aside")  # lost is not empty
    code, _, err = look("gc", "none")
    assert (code, "none is kept: its list of items is gone" in err) == (1, True), err
    (root / "aside").rename(root / "none" / place.ITEMS_FILE)

    assert look("gc", "none")[:2] == (0, "none: removed\n")


@pytest.fixture
def three(root: Path) -> Path:
    ran(made("finished", ["a"]), done("a"))
    ran(made("half", ["a", "b"]), done("a"))
    made("new", ["a"])
    return root


def test_gc_removes_what_is_finished_and_old_and_nothing_else(look: Look, three: Path) -> None:
    assert document(look("gc", "-o", "json"))["removed"] == []  # younger than 30 days
    assert document(look("gc", "--older", "0", "--dry-run", "-o", "json"))["removed"] == [
        "finished"
    ]
    assert names_in(three) == {"finished", "half", "new"}
    assert look("gc", "--older", "0")[1] == "finished: removed\n"
    assert names_in(three) == {"half", "new"}


def test_gc_takes_an_unfinished_batch_by_name_and_force_alone(look: Look, three: Path) -> None:
    code, _, err = look("gc", "half")
    assert code == 1
    assert "half is kept: 1 item is to do (by its name and with --force it goes)" in err
    assert look("gc", "--force")[0] == 64
    assert look("gc", "half", "--force")[0] == 0
    assert names_in(three) == {"finished", "new"}


def test_gc_leaves_a_batch_at_work_alone_even_by_force(look: Look, three: Path) -> None:
    with place.locked(str(three / "finished"), "finished", task=7):
        code, _, err = look("gc", "finished", "--force")
    assert code == 1
    assert "finished is kept: it is running" in err
    assert "finished" in names_in(three)


def test_gc_finishes_what_a_killed_one_began(look: Look, three: Path) -> None:
    os.rename(three / "finished", three / ".removed-finished-1")
    assert look("gc", "--older", "0")[0] == 0
    assert names_in(three) == {"half", "new"}


def test_gc_clears_old_archives_and_keeps_their_batch(look: Look, root: Path) -> None:
    path = made("census", ["a", "b"])
    ran(path, done("a"))
    place_of_old = Path(path) / "archive" / "2"
    place_of_old.mkdir(parents=True)
    (place_of_old / "journal").mkdir()
    assert look("gc", "--older", "0")[1] == "census: archives removed\n"
    assert not place_of_old.exists()
    assert document(look("-o", "json"))["batches"][0]["done"] == 1
