"""The rig itself: what was not opened is told, and is no success."""

from pathlib import Path

from tests.golden.__main__ import told_by

_TESTS = """
import pytest

def test_it_opens():
    pass

@pytest.mark.skipif(True, reason="needs root")
def test_it_is_left_out():
    raise AssertionError
"""


def test_a_test_that_was_skipped_is_a_violation(tmp_path: Path) -> None:
    path = tmp_path / "test_it.py"
    path.write_text(_TESTS)
    assert told_by([f"{path}::test_it_opens"]) == {"violations": 0, "tests": 1, "skipped": 0}
    assert told_by([str(path)]) == {"violations": 1, "tests": 1, "skipped": 1}


def test_where_no_test_ran_nothing_held(tmp_path: Path) -> None:
    assert told_by([str(tmp_path)])["violations"] == 1
