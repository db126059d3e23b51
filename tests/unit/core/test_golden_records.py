"""The bytes of released records stay readable for ever, and mean the same."""

from typing import get_args

import msgspec
import pytest

from ckptd.core.records import AnyRecord, Spec, Submitted
from tests.golden import make_records_1_appended as appended
from tests.golden.make_records_1 import FILE, RECORDS, encoded

GOLDEN = FILE.read_text().split()
APPENDED = appended.FILE.read_text().split()
_decoder = msgspec.msgpack.Decoder(AnyRecord)


def test_there_is_an_example_of_every_record() -> None:
    assert {type(record) for record in RECORDS + appended.RECORDS} == set(get_args(AnyRecord))


@pytest.mark.parametrize(
    ("line", "record"),
    [*zip(GOLDEN + APPENDED, RECORDS + appended.RECORDS, strict=True)],
    ids=lambda x: type(x).__name__,
)
def test_a_record_of_format_1_reads_as_what_it_was(line: str, record: AnyRecord) -> None:
    assert _decoder.decode(bytes.fromhex(line)) == record


def test_records_are_written_as_format_1_has_them_and_fields_only_appended() -> None:
    for now, then in zip(encoded() + appended.encoded(), GOLDEN + APPENDED, strict=True):
        new, old = (msgspec.msgpack.decode(bytes.fromhex(line)) for line in (now, then))
        assert new[: len(old)] == old


def test_a_spec_keeps_what_was_asked_of_limits() -> None:
    (submitted,) = (record for record in appended.RECORDS if isinstance(record, Submitted))
    spec = msgspec.msgpack.decode(_spec_of(APPENDED[0]), type=Spec)
    assert spec == msgspec.msgpack.decode(submitted.spec, type=Spec)
    assert (spec.cpus, spec.nice, spec.on_oom) == (1.5, 10, "retry:x2,max=16G")


def _spec_of(line: str) -> msgspec.Raw:
    record = _decoder.decode(bytes.fromhex(line))
    assert isinstance(record, Submitted)
    return record.spec


def test_a_record_that_nobody_knows_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="99"):
        _decoder.decode(msgspec.msgpack.encode([99, 1]))
