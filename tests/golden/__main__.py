"""`python -m tests.golden`: open all that older versions left; writes build/figures/golden.json.

A test that is skipped has opened nothing: it counts as a violation. Exit code 1: there is one.
"""

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from tests import figures

HERE = Path(__file__).resolve().parent
TESTS = (
    "tests/crash/test_compatibility.py",
    "tests/unit/core/test_golden_records.py",
    "tests/unit/storage/test_golden.py",
    "tests/unit/storage/test_task_golden.py",
)


def main() -> int:
    """Run the tests, count what is kept; 0 if all was opened, and nothing refused or changed."""
    figures.begin("golden")
    found = {**told_by(TESTS), **_kept()}
    figures.write("golden", found, command="python -m tests.golden")
    return 1 if found["violations"] else 0


def told_by(tests: Sequence[str]) -> dict[str, Any]:
    """Run these tests; return how many ran, were skipped, and did not hold."""
    with tempfile.TemporaryDirectory(prefix="ck-golden-") as folder:
        report = Path(folder, "report.xml")
        command = (sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:randomly")
        done = subprocess.run(
            (*command, f"--junitxml={report}", *tests), check=False, cwd=figures.ROOT
        )
        suites = ET.parse(report).iter("testsuite") if report.exists() else ()
        count = {"tests": 0, "skipped": 0, "failures": 0, "errors": 0}
        for suite in suites:
            for name in count:
                count[name] += int(suite.get(name, 0))
    bad = count["failures"] + count["errors"] + count["skipped"]
    return {
        "violations": bad or int(done.returncode != 0),
        "tests": count["tests"] - count["skipped"],
        "skipped": count["skipped"],
    }


def _kept() -> dict[str, int]:
    """Return what is kept for ever in these directories, whoever opens it."""
    with tarfile.open(HERE / "whole_1.tar.xz") as archive:
        members = sum(member.isfile() for member in archive.getmembers())
    directories = [path for path in HERE.glob("*format_1/**/*") if path.is_file()]
    records = [line for path in HERE.glob("records_*.txt") for line in path.open()]
    return {"files_kept": members + len(directories), "records": len(records)}


if __name__ == "__main__":
    sys.exit(main())
