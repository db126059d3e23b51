"""FORMAT.md is true: its tables, its bytes and its bounds are those of the code and the goldens."""

import inspect
import re
import struct
from zlib import crc32

import pytest

from ckptd.batch import ledger
from ckptd.runner import attempt
from ckptd.storage import facts, frame, journal, manifest, scan, segment
from ckptd.storage.untrusted import JSON_DEPTH_MAX
from tests.golden.make_format_1 import make
from tests.unit.protocol.tables import FORMAT, REGION, REGIONS, regenerated

TEXT = FORMAT.read_text()
PROSE = " ".join(TEXT.split())
CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
DUMPS = {
    "## Header block": "wal/00000000000000000031-0000000007.wal",
    "## Frame": "wal/00000000000000000001-0000000007.wal",
    "## Snapshot": "snap/00000000000000000045.snap",
}


def section(title: str) -> str:
    start = TEXT.index(title)
    return TEXT[start : TEXT.find("\n## ", start + 1)]


def rows(title: str) -> list[list[str]]:
    found = re.findall(r"^\| (\d+ \|.*) \|$", section(title), re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in found]


def layout(title: str) -> tuple[list[str], list[int], str]:
    """Names and offsets of the fields of a table, and their types in words of `struct`."""
    fields = rows(title)
    names, offsets = [row[1] for row in fields], [int(row[0]) for row in fields]
    kinds = [CODES.get(row[2]) or f"{row[2].split()[0]}s" for row in fields]
    ends = [struct.calcsize("<" + "".join(kinds[:n])) for n in range(len(kinds))]
    assert offsets == ends, f"{title}: the offsets do not follow from the types"
    return names, offsets, "".join(kinds)


def test_its_records_are_those_of_the_code() -> None:
    assert {name for _, name, _ in REGION.findall(TEXT)} == set(REGIONS[FORMAT])
    assert regenerated(FORMAT) == TEXT, "run: python -m tests.unit.protocol.tables"


def test_its_header_block_is_the_one_that_is_written() -> None:
    names, offsets, kinds = layout("## Header block")
    assert names == [*segment.Block._fields, "zero", "crc32"]
    assert kinds == f"{segment._BLOCK.format[1:]}3964sI"
    assert offsets[-1] + 4 == segment.BLOCK_BYTES


def test_its_frame_is_the_one_that_is_written() -> None:
    names, _, kinds = layout("## Frame")
    said = {"crc": "crc32", "records": "count"}
    assert names == [said.get(name, name) for name in frame.Head._fields]
    assert f"<{kinds}" == frame._HEAD.format
    named = dict(re.findall(r"(\d+) ([A-Z]+)", rows("## Frame")[names.index("kind")][3]))
    assert {int(n): getattr(frame, word) for n, word in named.items()} == {
        kind: kind for kind in frame.KINDS
    }
    most, chunk = frame.PAYLOAD_BYTES_MAX >> 20, frame.CHUNK_BYTES_MAX >> 20
    assert f"at most {most} MiB, of a CHUNK {chunk} MiB" in section("## Frame")


@pytest.mark.parametrize(("title", "file"), DUMPS.items())
def test_its_dumps_are_bytes_of_the_golden(title: str, file: str) -> None:
    data = make()[file]
    dumps = re.findall(
        r"^    ([0-9a-f]{8}): ((?:[0-9a-f]{4} )*[0-9a-f]{4})", section(title), re.MULTILINE
    )
    assert len(dumps) >= 5
    for offset, words in dumps:
        shown = bytes.fromhex(words)
        assert data[int(offset, 16) :][: len(shown)] == shown, f"{title}, {offset}"


def test_its_crc_by_hand_is_right() -> None:
    by_hand = re.search(r"`crc32\(data\[(\w+):(\w+)\].*fromhex\(\"(\w+)\".* is `(\w+)`", TEXT)
    assert by_hand
    start, end, store, crc = by_hand.groups()
    data = make()[DUMPS["## Frame"]]
    assert crc32(data[int(start, 16) : int(end, 16)], crc32(bytes.fromhex(store))) == int(crc, 16)


def test_its_example_of_a_format_file_is_the_golden() -> None:
    (example,) = re.findall(r'^    (\{"format".*"crc32":"\w+"\})\\n$', TEXT, re.MULTILINE)
    assert f"{example}\n".encode() == make()["FORMAT"]


def test_it_names_every_fact_of_a_journal() -> None:
    listed = re.search(r"The first fact of every file is `(open)`.*?ops are `(.*?)`", PROSE)
    assert listed
    known = re.findall(r'case ((?:"\w+"(?: \| )?)+)', inspect.getsource(facts.Standing._know))
    ops = {op for case in known for op in re.findall(r"\w+", case)}
    assert {listed[1], *listed[2].split()} == ops
    assert f"a `format` above {journal.FORMAT} is a problem" in PROSE


def test_its_bounds_of_a_journal_are_those_of_the_code() -> None:
    mib, gib = 1 << 20, 1 << 30
    assert (
        f"Bounds: {journal.FACT_BYTES_MAX // mib} MiB a fact,"
        f" a value nested {JSON_DEPTH_MAX - 3} deep,"
        f" {journal.FACTS_PER_FRAME_MAX:,} facts a frame, {journal.FILE_BYTES_MAX // mib} MiB a"
        f" file, {journal.ATTEMPTS_MAX:,} files, {journal.ALL_BYTES_MAX // mib} MiB over all"
        f" attempts (a batch's ledger: {ledger.BOUNDS.file_bytes // gib} GiB and"
        f" {ledger.BOUNDS.all_bytes // gib} GiB)"
    ) in PROSE
    assert f"UTF-8, at most {journal._PAYLOAD_BYTES_MAX // mib} MiB" in PROSE
    assert f"at the latest after {journal.UNSYNCED_BYTES_MAX // mib} MiB" in PROSE
    assert f"at most {journal.ROOM_BYTES_MAX >> 10} KiB" in PROSE
    assert f"A file below {journal._ROOM_FROM_BYTES >> 10} KiB has none" in PROSE
    assert f"unless within {scan.TORN_BYTES_MAX // mib} MiB a later frame" in PROSE
    assert f"more than {scan._PROMISE_BYTES_MAX // mib} MiB of frames" in PROSE


def test_a_value_may_be_nested_as_deep_as_it_says() -> None:
    deepest: object = 1
    for _ in range(JSON_DEPTH_MAX - 3):
        deepest = [deepest]
    journal._encoded([facts.set_value("a", deepest)])
    with pytest.raises(journal.TooLarge):
        journal._encoded([facts.set_value("a", [deepest])])


def test_its_example_of_a_manifest_has_every_member() -> None:
    (example,) = re.findall(
        r'^    (\{"format":1,"seq".*?"digest":"\.\.\."\})', TEXT, re.MULTILINE | re.DOTALL
    )
    members = set(re.findall(r'"(\w+)":', example))
    own = {"format", "seq", "at_ns", "boot_id", "files", "digest", "name", "bytes", "sha256"}
    assert set(manifest.EMPTY) | own <= members
    assert f"(at most {manifest.BYTES_MAX >> 20} MiB)" in PROSE


def test_its_parts_of_an_attempt_lie_where_they_are_written() -> None:
    parts = [(int(offset), int(size), name.split(":")[0]) for offset, size, name, _ in
             rows("## Attempts of the fork runner")]  # fmt: skip
    start, end, whole = attempt._START_AT, attempt._EXIT_AT, attempt.RECORD_BYTES
    assert parts == [(0, start, "claim"), (start, end - start, "start"), (end, whole - end, "exit")]
