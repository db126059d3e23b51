"""Record files are recycled, and never while they still are an attempt's."""

import errno
import os
from contextlib import closing
from pathlib import Path

import pytest

from ckptd.runner.attempt import Holder, Record, place_of
from ckptd.runner.claims import Claims
from ckptd.runner.instance import began_of


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    return Claims(str(tmp_path), "boot")


def claimed_by_another(claims: Claims, tmp_path: Path) -> None:
    """Let a supervisor take attempt 1 of task 2, in whatever record file it is given."""
    attempts = f"{tmp_path}/attempts"
    spare = f"{claims.reign}.{claims.take_spare()}"
    holder = Holder("boot", 4_711, 99)
    with closing(Record(attempts, place_of(attempts, 2, 1), spare, holder.claim)) as record:
        assert record.take()


def is_refused(claims: Claims) -> bool:
    found = claims.read(1, 1)
    claim = began_of(found.claim) if found else None
    return claim is not None and claim.is_refusal


def test_an_attempt_that_was_refused_stays_refused_whoever_starts_next(
    claims: Claims, tmp_path: Path
) -> None:
    claims.refuse(1, 1)
    claimed_by_another(claims, tmp_path)
    assert is_refused(claims)


def test_a_record_whose_name_cannot_be_taken_away_is_not_used_again(
    claims: Claims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    claims.refuse(1, 1)
    with monkeypatch.context() as disk:
        disk.setattr(os, "unlink", failing)
        claims.forget(1, 1)
    claimed_by_another(claims, tmp_path)
    assert is_refused(claims)
