"""The suite that every runner has to pass, in booted machines: units of PID 1, and of a user."""

import io
import re
import tarfile
from pathlib import Path

import _pytest
import pytest

from tests.booted.machine import Machine
from tests.booted.nspawn import Nspawn

ROOT = Path(__file__).resolve().parent.parent.parent
SITE = Path(_pytest.__file__).parent.parent
PURE = (
    "pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py.py",
    "pytest_timeout.py",
)  # fmt: skip
OURS = ("tests/__init__.py", "tests/waiting.py", "tests/conformance", "tests/fakes")
PYTHON = "/usr/local/lib/ckptd/venv/bin/ckptd-python"
FOUND_EXEMPT = {"the supervisor is the service manager: nobody kills it"}
PASSED_MIN = 17


def packed() -> bytes:
    """Return pytest, which is Python alone, and the suite, as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in PURE:
            tar.add(SITE / name, f"site/{name}", filter=_plain)
        for name in OURS:
            tar.add(ROOT / name, name, filter=_plain)
    return buffer.getvalue()


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    info.uid = info.gid = 0
    return None if "__pycache__" in info.name or "/lexers/_" in info.name else info


@pytest.mark.parametrize("user", ["root", "alice"])
def test_the_unit_runner_does_what_every_runner_owes(machine: Nspawn, user: str) -> None:
    machine.sh("mkdir -p /opt/conformance && chmod 755 /opt/conformance")
    machine.run(["tar", "-x", "-C", "/opt/conformance"], stdin=packed())
    env = {"PYTHONPATH": "/opt/conformance:/opt/conformance/site", "PYTHONDONTWRITEBYTECODE": "1"}
    env |= machine.user_env(user) if user != "root" else {}
    said = suite(machine, user, env)
    assert re.search(r"^\d+ passed", said, re.MULTILINE), said
    passed = int(said.rpartition(" passed")[0].split()[-1])
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", said, re.MULTILINE)
    assert set(skipped) <= FOUND_EXEMPT
    assert passed >= PASSED_MIN


def suite(machine: Machine, user: str, env: dict[str, str]) -> str:
    options = ["-q", "-rs", "--noconftest", "-c", "/dev/null", "--rootdir", "/opt/conformance",
               "-p", "pytest_timeout", "--timeout", "60", "-p", "no:cacheprovider",
               "-k", "unit"]  # fmt: skip
    command = [PYTHON, "-m", "pytest", *options, "/opt/conformance/tests/conformance"]
    done = machine.run(command, user=user, env=env, check=False, timeout_s=240)
    assert done.code == 0, done.out[-6_000:] + done.err[-2_000:]
    return done.out
