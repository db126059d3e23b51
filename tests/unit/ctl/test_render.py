import csv
import json

import pytest

from ckptctl import render
from ckptctl.picture import Picture, task_listing
from ckptctl.render import Style, fit, listing_lines, make_style, shorten, text_width
from ckptd.protocol.errors import BadRequest
from ckptd.protocol.messages import TaskRow
from tests.unit.ctl.rows import NOW_NS, SECOND_NS, row

TASKS = (
    row(7, until_ns=0, argv=("sh", "-c", "echo a,b; true")),
    row(12, phase="failed", cause="exit", code=3, ended_ns=NOW_NS - SECOND_NS, name="nightly"),
)


def lines(style: Style, *rows: TaskRow) -> list[str]:
    picture = Picture(list(rows or TASKS), {"running": 1, "failed": 1})
    return list(listing_lines(task_listing(picture, NOW_NS), style))


def test_a_table_has_a_header_and_a_line_for_each_task() -> None:
    head, running, failed = lines(Style())
    assert head.split()[:3] == ["ID", "NAME", "STATE"]
    assert running.split()[:3] == ["7", "census", "running"]
    assert "failed: exit 3" in failed
    assert head.index("STATE") == failed.index("failed:")


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_a_table_fits_the_terminal(width: int) -> None:
    long = row(123456, name="n" * 50, argv=("x" * 300,), group="g" * 60)
    assert all(text_width(line) <= max(width, 78) for line in lines(Style(width=width), long))


def test_json_has_a_schema_utc_times_numbers_and_nulls() -> None:
    document = json.loads("\n".join(lines(Style("json"))))
    assert document["schema"] == "ckptd/v1"
    assert document["totals"] == {"running": 1, "failed": 1}
    first, second = document["tasks"]
    assert first["submitted_at"] == "2027-01-15T07:59:00.000000Z"
    assert first["ended_at"] is None
    assert first["code"] is None
    assert second["code"] == 3
    assert not [name for name in first if name.endswith("_ns")]


def test_jsonl_is_one_document_a_line() -> None:
    assert [json.loads(line)["id"] for line in lines(Style("jsonl"))] == [7, 12]


def test_csv_can_be_read_back() -> None:
    style = Style("csv", columns=("id", "argv", "state", "ended_at", "command"))
    read = list(csv.DictReader(lines(style)))
    assert [one["id"] for one in read] == ["7", "12"]
    assert json.loads(read[0]["argv"]) == ["sh", "-c", "echo a,b; true"]
    assert read[0]["ended_at"] == ""
    assert read[1]["state"] == "failed: exit 3"


def test_tsv_keeps_tabs_and_line_breaks_out() -> None:
    style = Style("tsv", columns=("id", "name"), has_headers=False)
    assert lines(style, row(7, name="a\tb\nc")) == ["7\ta\\tb\\nc"]


def test_names_and_quiet_give_what_other_commands_take() -> None:
    assert lines(Style("name")) == lines(Style(is_quiet=True)) == ["7", "12"]


def test_a_template_names_columns_and_fields() -> None:
    assert lines(make_style("{id} {state} {code}")) == ["7 running ", "12 failed: exit 3 3"]
    assert lines(make_style("template={name:>8}|{phase}"))[0] == "  census|running"
    with pytest.raises(BadRequest, match="no column 'phsae'") as caught:
        lines(make_style("{phsae}"))
    assert "phase" in caught.value.hint


def test_columns_choose_and_order() -> None:
    assert lines(Style(columns=("phase", "id")))[0].split() == ["PHASE", "ID"]
    with pytest.raises(BadRequest, match="no column 'nmae'"):
        lines(Style(columns=("nmae",)))


def test_color_is_only_painted_where_wanted() -> None:
    assert "\x1b[" not in "".join(lines(Style()))
    assert "\x1b[31mfailed: exit 3" in "".join(lines(Style(has_color=True)))


def test_the_column_with_most_to_spare_gives_way_first() -> None:
    assert fit([10, 50, 5], [5, 10, 0], 49) == [10, 30, 5]
    assert fit([10, 50, 5], [5, 10, 0], 0) == [10, 50, 5]
    assert fit([10, 50, 5], [5, 10, 0], 5) == [5, 10, 5]


def test_wide_characters_count_two_cells() -> None:
    assert text_width("日本") == 4
    assert shorten("日本語", 5) == "日本…"
    assert shorten("abc", 3) == "abc"


def test_unknown_formats_name_the_nearest() -> None:
    with pytest.raises(BadRequest) as caught:
        make_style("jsn")
    assert caught.value.hint == "did you mean json?"


def test_an_empty_list_is_valid_in_every_format() -> None:
    nothing = Picture([], {})
    for form in render.FORMATS:
        style = Style(form, template="{id}")
        out = "\n".join(listing_lines(task_listing(nothing, NOW_NS), style))
        assert out == "" or json.loads(out)["tasks"] == []
