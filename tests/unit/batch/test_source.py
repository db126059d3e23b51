"""From a list to items: what is a key, what is refused, and in which words."""

from pathlib import Path

import pytest

from ckptd.batch.refusal import Refused
from ckptd.batch.source import ITEM_BYTES_MAX, KEY_CHARS_MAX, Taken, take
from ckptd.batch.spec import Source


def of(tmp_path: Path, data: bytes, kind: str = "lines", key: str | None = None) -> Taken:
    (tmp_path / "list").write_bytes(data)
    return take(Source("file", path="list", format=kind, key=key), str(tmp_path))  # type: ignore[arg-type]


def refused(tmp_path: Path, data: bytes, kind: str = "lines", key: str | None = None) -> str:
    with pytest.raises(Refused) as caught:
        of(tmp_path, data, kind, key)
    return f"{caught.value}\n{caught.value.hint}"


def test_a_line_is_its_own_key_whatever_ends_it(tmp_path: Path) -> None:
    taken = of(tmp_path, "\ufeffa b\r\n\n  \nc/ü\nlast".encode())

    assert list(taken.items) == ["a b", "c/ü", "last"]
    assert [item.position for item in taken.items.values()] == [1, 2, 3]


def test_names_ended_by_nul_may_hold_newlines(tmp_path: Path) -> None:
    assert list(of(tmp_path, b"a\nb\0 \0c", "null").items) == ["a\nb", " ", "c"]


def test_json_has_the_same_key_however_it_is_written(tmp_path: Path) -> None:
    one = of(tmp_path, b'{"b": 1, "a": [2]}\n', "jsonl")
    other = of(tmp_path, b'\n {"a":[2],"b":1}', "jsonl")

    assert list(one.items) == list(other.items) == ['{"a":[2],"b":1}']


def test_a_field_can_be_the_key(tmp_path: Path) -> None:
    taken = of(tmp_path, b'{"id": 7, "x": 1}\n{"id": "8"}\n', "jsonl", "id")

    assert list(taken.items) == ["7", "8"]
    assert taken.items["7"].value == {"id": 7, "x": 1}


def test_a_row_of_csv_is_an_object_also_over_several_lines(tmp_path: Path) -> None:
    taken = of(tmp_path, b'name,text\na,"x,\ny"\n\nb,z\n', "csv", "name")

    assert taken.items["a"].value == {"name": "a", "text": "x,\ny"}
    assert list(taken.items) == ["a", "b"]


def test_a_long_key_keeps_its_begin_and_stays_unique(tmp_path: Path) -> None:
    one, other = list(of(tmp_path, b"a" * 600 + b"\n" + b"a" * 601).items)

    assert len(one) == len(other) == KEY_CHARS_MAX
    assert one.startswith("aaaa")
    assert one != other


def test_what_is_given_twice_is_one_item_and_is_told(tmp_path: Path) -> None:
    taken = of(tmp_path, b"a\nb\na\na\n")

    assert (list(taken.items), taken.duplicates) == (["a", "b"], 2)
    assert "2 lines repeat" in taken.warnings[0]
    assert "line 3" in taken.warnings[0]


def test_one_key_with_two_contents_is_refused_with_both_lines(tmp_path: Path) -> None:
    said = refused(tmp_path, b'{"id":1,"x":1}\n{"id":2}\n{"id":1,"x":2}\n', "jsonl", "id")

    assert "line 3 has the key '1' of line 1, but another content" in said
    assert "nothing was changed" in said


def test_a_directory_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is a directory") as caught:
        take(Source("file", path="."), str(tmp_path))
    assert "find . -type f" in caught.value.hint


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"gone\.txt: No such file"):
        take(Source("file", path="gone.txt"), str(tmp_path))


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (b"a\nb\0c\n", "lines", "line 2 holds a NUL byte (byte 2)"),
        (b"a\n\x7fELF\xfe\xff", "lines", "line 2 is no UTF-8 (byte 5 is 0xfe)"),
        (b"ok\0caf\xe9\0", "null", "line 2 is no UTF-8"),
        (b"{}\n{]\n", "jsonl", "line 2 is no JSON"),
        (b'{"a":' * 2000 + b"1" + b"}" * 2000, "jsonl", "line 1 is no JSON (nested"),
        (b'{"id":""}', "jsonl", "line 1 has an empty 'id'"),
        (b"5\n", "jsonl", "line 1 has no field 'id'"),
        (b'1\nnull\n"a"\n', "jsonl", "line 2 is null, which is no item"),
        (b'{"id":1}\nnull\n', "jsonl", "line 2 is null, which is no item"),
        (b'1\n""\n', "jsonl", "line 2 is an empty text, which is no item"),
        (b"a,b\n1,2\n1,2,3\n", "csv", "line 3 has 3 columns, the header has 2"),
        (b"a,a\n1,2\n", "csv", "line 1 is no header"),
        (b'a,b\n1,"2\n', "csv", "line 2 is no CSV"),
        (b'a,b\n1,2"x"\n1,"2"x\n', "csv", "line 3 is no CSV"),
    ],
)
def test_a_bad_line_is_refused_by_number_and_with_a_remedy(
    tmp_path: Path, data: bytes, kind: str, words: str
) -> None:
    key = "id" if (kind == "jsonl" and b"id" in data) or data == b"5\n" else None

    said = refused(tmp_path, data, kind, key)

    assert words in said
    assert "nothing was changed" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [(["a", "", "b"], "line 2 is an empty text"), ([None], "line 1 is null")],
)
def test_an_empty_word_is_refused_and_not_left_out(
    tmp_path: Path, words: list[str | None], told: str
) -> None:
    with pytest.raises(Refused, match=f"the items given: {told}, which is no item"):
        take(Source("lines", lines=words), str(tmp_path))


@pytest.mark.parametrize("kind", ["lines", "null", "jsonl", "csv"])
def test_a_line_of_a_hundred_megabytes_is_refused_before_it_is_read(
    tmp_path: Path, kind: str
) -> None:
    with (tmp_path / "list").open("wb") as file:
        file.write(b"head\nrow\n" if kind == "csv" else b"1\n")
        file.write(b"x" * (2 << 20))
        file.truncate(100 << 20)  # the rest is a hole
    source = Source("file", path="list", format=kind)  # type: ignore[arg-type]
    with pytest.raises(Refused, match=r"line \d is longer than 1,048,576 bytes") as caught:
        take(source, str(tmp_path))

    assert "put large data into a file" in caught.value.hint


def test_an_open_quote_does_not_swallow_the_file(tmp_path: Path) -> None:
    rows = b'a,b\n1,"' + b"x,y\n" * (ITEM_BYTES_MAX // 3)

    assert "line 2 begins a row of more than" in refused(tmp_path, rows, "csv")


def test_a_command_gives_items_and_its_failure_is_no_list(tmp_path: Path) -> None:
    good = Source("command", argv=["sh", "-c", "echo a; echo b"])
    bad = Source("command", argv=["sh", "-c", "echo a; exit 3"])

    assert list(take(good, str(tmp_path)).items) == ["a", "b"]
    with pytest.raises(Refused, match="the command exited with 3"):
        take(bad, str(tmp_path))
    with pytest.raises(Refused, match="No such file"):
        take(Source("command", argv=["no-such-program"]), str(tmp_path))
