"""The bytes of released records stay readable for ever, and mean the same."""

from typing import get_args

import msgspec
import pytest

from ckptd.core.records import AnyRecord
from tests.golden.make_records_1 import FILE, RECORDS, encoded

GOLDEN = FILE.read_text().split()
_decoder = msgspec.msgpack.Decoder(AnyRecord)


def test_there_is_an_example_of_every_record() -> None:
    assert {type(record) for record in RECORDS} == set(get_args(AnyRecord))


@pytest.mark.parametrize(
    ("line", "record"), [*zip(GOLDEN, RECORDS, strict=True)], ids=lambda x: type(x).__name__
)
def test_a_record_of_format_1_reads_as_what_it_was(line: str, record: AnyRecord) -> None:
    assert _decoder.decode(bytes.fromhex(line)) == record


def test_records_are_written_as_format_1_has_them() -> None:
    assert encoded() == GOLDEN


def test_a_record_that_nobody_knows_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="99"):
        _decoder.decode(msgspec.msgpack.encode([99, 1]))
