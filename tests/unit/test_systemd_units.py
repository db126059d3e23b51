"""The units: systemd itself accepts them, and they keep the promises that the code relies on."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.daemon import paths
from ckptd.daemon.guard import DESCRIPTORS_MIN
from ckptd.protocol.errors import BadConfig, BadRequest, Corrupt

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "systemd"


def directives(unit: str) -> dict[str, str]:
    text = (UNITS / unit).read_text()
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", ["ckptd.service", "ckptd.socket"])
def test_systemd_accepts_the_unit_without_a_word(tmp_path: Path, unit: str) -> None:
    for path in UNITS.iterdir():
        # verify wants the program to be there: here it is Python
        text = re.sub(r"/usr/bin/ckpt\w+", sys.executable, path.read_text())
        (tmp_path / path.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if "ckptd" in line]
    assert (done.returncode, said) == (0, [])


def test_tasks_outlive_the_daemon_and_what_a_restart_cannot_mend_is_not_restarted() -> None:
    unit = directives("ckptd.service")
    assert (unit["KillMode"], unit["Delegate"], unit["Restart"]) == ("process", "yes", "always")
    final = set(unit["RestartPreventExitStatus"].split())
    assert final == {str(error.exit_code) for error in (BadConfig, BadRequest, Corrupt)}


def test_the_unit_grants_the_descriptors_that_the_guard_needs() -> None:
    hard = int(directives("ckptd.service")["LimitNOFILE"].partition(":")[2])
    assert hard >= DESCRIPTORS_MIN


def test_unit_and_daemon_agree_on_the_directories_and_the_socket() -> None:
    unit, listening = directives("ckptd.service"), directives("ckptd.socket")
    own = paths.resolve(0, {})
    assert f"/var/lib/{unit['StateDirectory']}" == own.state
    assert f"/run/{unit['RuntimeDirectory']}" == own.run
    assert listening["ListenStream"] == own.socket
    assert unit["RuntimeDirectoryPreserve"] == "yes"
