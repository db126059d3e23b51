"""`python -m tests.golden`: open all that older versions left; writes build/figures/golden.json."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

from tests import figures

HERE = Path(__file__).resolve().parent
TESTS = (
    "tests/crash/test_compatibility.py",
    "tests/unit/core/test_golden_records.py",
    "tests/unit/storage/test_golden.py",
    "tests/unit/storage/test_task_golden.py",
)


def main() -> int:
    """Run the tests, count what was opened; 0 if nothing was refused or changed."""
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", *TESTS)
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=figures.ROOT)
    sys.stdout.write(done.stdout)
    with tarfile.open(HERE / "whole_1.tar.xz") as archive:
        members = sum(member.isfile() for member in archive.getmembers())
    directories = [path for path in HERE.glob("*format_1/**/*") if path.is_file()]
    records = [line for path in HERE.glob("records_*.txt") for line in path.open()]
    failed = re.findall(r"^(?:FAILED|ERROR) ", done.stdout, re.MULTILINE)
    found = {
        "violations": len(failed) or int(done.returncode != 0),
        "files": members + len(directories),
        "records": len(records),
        "skipped": len(re.findall(r"^SKIPPED ", done.stdout, re.MULTILINE)),
    }
    figures.write("golden", found, command="python -m tests.golden")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
