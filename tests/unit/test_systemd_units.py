"""The units: systemd itself accepts them, and they keep the promises that the code relies on."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.daemon.ending import STOPPING_FLAG
from ckptd.door.guard import DESCRIPTORS_MIN
from ckptd.host import paths
from ckptd.protocol.errors import BadConfig, BadRequest, Corrupt
from install.payload import UNITS, render
from install.places import places

ROOT = Path(__file__).resolve().parents[2]
SYSTEMD = ROOT / "systemd"
NEEDS_ANALYZE = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="needs systemd-analyze"
)
EXPOSURE_TENTHS_MAX = 15


def rendered(scope: str, unit: str, prefix: str = "/usr/local") -> str:
    is_user = scope == "user"
    text = (SYSTEMD / ("user" if is_user else ".") / unit).read_text()
    return render(text, places({"PREFIX": prefix}, 0), is_user=is_user)


def directives(text: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


def written(scope: str, directory: Path) -> None:
    for name in UNITS:
        # verify wants the programs to be there: here it is Python
        text = re.sub(r"/usr/local/bin/ckpt\w+", sys.executable, rendered(scope, name))
        (directory / name).write_text(text)


@NEEDS_ANALYZE
@pytest.mark.parametrize("scope", ["system", "user"])
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_accepts_the_unit_without_a_word(tmp_path: Path, scope: str, unit: str) -> None:
    written(scope, tmp_path)
    done = subprocess.run(
        ["systemd-analyze", "verify", f"--{scope}", "--man=no", str(tmp_path / unit)],
        capture_output=True,
        text=True,
        check=False,
        env={"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)},
    )
    said = [line for line in done.stderr.splitlines() if "ckptd" in line]
    assert (done.returncode, said) == (0, [])


@NEEDS_ANALYZE
def test_the_daemon_is_exposed_no_more_than_agreed(tmp_path: Path) -> None:
    written("system", tmp_path)
    limit = [f"--threshold={EXPOSURE_TENTHS_MAX}", "--offline=yes", "--json=short"]
    command = ["systemd-analyze", "security", *limit, str(tmp_path / "ckptd.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = json.loads(done.stdout or "[]")
    assert done.returncode == 0, [row for row in rows if row["set"] is False]


@pytest.mark.parametrize("scope", ["system", "user"])
def test_what_a_restart_cannot_mend_is_not_restarted(scope: str) -> None:
    unit = directives(rendered(scope, "ckptd.service"))
    final = set(unit["RestartPreventExitStatus"].split())
    assert final == {str(error.exit_code) for error in (BadConfig, BadRequest, Corrupt)}
    assert (unit["Restart"], unit["StartLimitIntervalSec"]) == ("always", "0")


@pytest.mark.parametrize("scope", ["system", "user"])
def test_the_unit_says_nothing_that_systemd_252_misunderstands(scope: str) -> None:
    unit = directives(rendered(scope, "ckptd.service"))
    assert unit["Type"] == "notify"
    assert not {"RestartSteps", "RestartMaxDelaySec", "FileDescriptorStorePreserve"} & unit.keys()
    # a socket unit shares the directory: without this each stop would delete its socket
    assert unit["RuntimeDirectoryPreserve"] == "yes"


def test_the_unit_grants_the_descriptors_that_the_guard_needs() -> None:
    hard = int(directives(rendered("system", "ckptd.service"))["LimitNOFILE"].partition(":")[2])
    assert hard >= DESCRIPTORS_MIN


def test_unit_and_daemon_agree_on_the_directories_and_the_socket() -> None:
    unit = directives(rendered("system", "ckptd.service"))
    own = paths.resolve(0, {})
    assert f"/var/lib/{unit['StateDirectory']}" == own.state
    assert f"/run/{unit['RuntimeDirectory']}" == own.run
    assert directives(rendered("system", "ckptd.socket"))["ListenStream"] == own.socket
    user = paths.resolve(1000, {"XDG_RUNTIME_DIR": "/run/user/1000"})
    theirs = directives(rendered("user", "ckptd.socket"))["ListenStream"]
    assert theirs.replace("%t", "/run/user/1000") == user.socket


@pytest.mark.parametrize("scope", ["system", "user"])
def test_drain_asks_a_living_daemon_only_and_raises_its_flag_first(scope: str) -> None:
    text = rendered(scope, "ckptd-drain.service")
    flag, question = re.findall(r"^ExecStop=(.*(?:\n  .*)?)", text, re.MULTILINE)
    assert flag == f"-/bin/touch %t/ckptd/{STOPPING_FLAG}"
    assert f"systemctl --{scope} is-active --quiet ckptd.service &&" in question
    assert "/usr/local/bin/ckptctl daemon shutdown --tasks=checkpoint --wait" in question
    assert directives(text)["After"] == "ckptd.service"


def test_commands_in_units_follow_the_prefix() -> None:
    for scope in ("system", "user"):
        for name in UNITS:
            text = rendered(scope, name, prefix="/opt/tools")
            assert not re.search(r"@\w+@", text), name
            assert "/usr/local" not in text
    unit = directives(rendered("system", "ckptd.service", prefix="/opt/tools"))
    assert unit["ExecStart"] == "/opt/tools/bin/ckptd"


def test_another_configuration_directory_is_told_to_the_daemon() -> None:
    where = places({"SYSCONFDIR": "/usr/local/etc"}, 0)
    unit = directives(render((SYSTEMD / "ckptd.service").read_text(), where))
    assert unit["ExecStart"].endswith("/ckptd --config /usr/local/etc/ckptd/ckptd.toml")


def test_the_drop_in_for_the_fork_runner_takes_the_whole_sandbox_away() -> None:
    text = rendered("system", "ckptd.service")
    sandbox = text.partition("# --- sandbox")[2].partition("[Install]")[0]
    undone = directives((SYSTEMD / "fork-runner.conf").read_text())
    is_moot_for_root = {"RemoveIPC"}
    assert set(directives(sandbox)) - undone.keys() == is_moot_for_root
    assert (undone["KillMode"], undone["Delegate"]) == ("process", "yes")


def test_the_drop_in_for_a_users_fork_runner_takes_that_sandbox_away() -> None:
    text = rendered("user", "ckptd.service")
    sandbox = text.partition("# No sandbox of mounts")[2].partition("[Install]")[0]
    undone = directives((SYSTEMD / "user/fork-runner.conf").read_text())
    assert set(directives(sandbox)) <= undone.keys()
    assert undone["TasksMax"] == "infinity"


def test_the_directories_that_tasks_pass_through_are_made_passable() -> None:
    text = (SYSTEMD / "tmpfiles.conf").read_text()
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    state = paths.resolve(0, {}).state
    assert lines == [["d", path, "0711", "root", "root", "-"] for path in (state, f"{state}/tasks")]


@pytest.mark.skipif(not shutil.which("systemd-sysusers"), reason="needs systemd-sysusers")
def test_systemd_makes_the_group_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    line = (SYSTEMD / "sysusers.conf").read_text().splitlines()[-1]
    command = ["systemd-sysusers", f"--root={tmp_path}", "--inline", line]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "etc/group").read_text().startswith("ckptd:")
