"""What the doctor makes of what systemd says: properties as `systemctl show` prints them.

A `systemctl` of the test's own answers from files, one for each unit.
"""

import os
from pathlib import Path

import msgspec
import pytest

from ckptd.doctor import disk, journald, place, services
from ckptd.doctor.finding import Check, Finding
from ckptd.doctor.log import Log
from ckptd.doctor.place import Heard, Place, Systemd
from ckptd.host import config, paths
from ckptd.protocol.messages import Pong
from ckptd.storage.disk import RealDisk

GOOD = {
    "Type": "notify",
    "NotifyAccess": "main",
    "Restart": "always",
    "WatchdogUSec": "30s",
    "MainPID": "0",
    "FileDescriptorStoreMax": "512",
    "Result": "success",
    "NRestarts": "0",
    "ExecMainStatus": "0",
    "ExecStart": "{ path=/nowhere/ckptd ; argv[]=/nowhere/ckptd ; ignore_errors=no }",
    "OOMPolicy": "continue",
    "StandardOutput": "journal",
    "StandardError": "inherit",
    "LogRateLimitIntervalUSec": "1s",
    "LogRateLimitBurst": "100000",
    "KillMode": "mixed",
    "LoadState": "loaded",
    "ActiveState": "active",
    "SubState": "running",
    "FragmentPath": "/etc/systemd/system/ckptd.service",
    "DropInPaths": "",
    "UnitFileState": "enabled",
    "NeedDaemonReload": "no",
}
SYSTEMCTL = """#!/bin/sh
for unit; do :; done
cat "${0%/*}/$unit"
"""


class Booted:
    """A machine's systemd, as far as the doctor asks it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.program("systemctl", SYSTEMCTL)
        self.has("ckptd.service", **GOOD)
        self.has(
            "ckptd.socket", LoadState="loaded", ActiveState="inactive", UnitFileState="disabled"
        )
        self.has("ckptd.slice", ActiveState="active", MemoryMax="infinity", TasksMax="100")
        self.has("ckptd-drain.service", LoadState="loaded", ActiveState="active")

    def program(self, name: str, text: str) -> Path:
        path = self._directory / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def has(self, unit: str, **properties: str) -> None:
        text = "".join(f"{name}={value}\n" for name, value in properties.items())
        (self._directory / unit).write_text(text)

    def service(self, **changed: str) -> None:
        self.has("ckptd.service", **{**GOOD, **changed})

    def place(self) -> Place:
        run = str(self._directory / "run")
        at = paths.Paths(state=str(self._directory), run=run, socket=f"{run}/ctl.sock")
        systemd = Systemd(is_system=True, booted=str(self._directory))
        return Place(True, config.Config(), "", None, at, systemd, Heard(), Log(at.state))

    def found(self, check: Check) -> dict[str, Finding]:
        """Return the findings that are not well, by name; the last where there are many."""
        return {each.name: each for each in check(self.place()) if each.level != "ok"}


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Booted:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Booted(tmp_path)


def test_units_as_they_are_shipped_leave_nothing_to_do(systemd: Booted) -> None:
    for check in (services.service, services.others, services.watchdog):
        assert systemd.found(check) == {}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("Type", "simple", "a start is over before it is"),
        ("Restart", "no", "a daemon that dies stays dead"),
        ("FileDescriptorStoreMax", "0", "refused during a restart"),
        ("OOMPolicy", "stop", "one killed child ends the daemon"),
    ],
)
def test_a_unit_of_another_making_is_told_from_ours(
    systemd: Booted, name: str, value: str, says: str
) -> None:
    systemd.service(**{name: value})
    assert says in systemd.found(services.service)["unit settings"].text


def test_a_unit_that_systemd_has_not_read_yet_is_told(systemd: Booted) -> None:
    systemd.service(NeedDaemonReload="yes")
    assert "changed on disk" in systemd.found(services.service)["unit file"].text


@pytest.mark.parametrize(
    ("code", "advice"), [("78", "ckptctl config check"), ("65", "ckptctl wal verify")]
)
def test_a_daemon_that_could_not_start_is_bad_and_its_exit_says_what_to_do(
    systemd: Booted, code: str, advice: str
) -> None:
    systemd.service(
        ActiveState="failed", SubState="failed", Result="exit-code", ExecMainStatus=code
    )
    found = systemd.found(services.service)["ckptd.service"]
    assert (found.level, advice in found.advice) == ("bad", True)


def test_a_daemon_of_another_version_than_the_unit_starts_is_told(systemd: Booted) -> None:
    installed = systemd.program("ckptd", "#!/bin/sh\necho ckptd 9.9.9\n")
    systemd.service(MainPID="4711", ExecStart=f"{{ path={installed} ; argv[]={installed} }}")
    pong = Pong("0.0.1", 1, 4711, 0, 1)
    place = msgspec.structs.replace(systemd.place(), heard=Heard(pong))
    found = {each.name: each for each in services.service(place)}["unit version"]
    assert found.text == "the unit starts ckptd 9.9.9, but 0.0.1 runs"


def test_a_service_that_is_not_enabled_or_restarts_by_itself_is_told(systemd: Booted) -> None:
    systemd.service(UnitFileState="disabled", NRestarts="3")
    found = systemd.found(services.service)
    assert found["boot"].advice == "systemctl enable ckptd"
    assert "3 x" in found["restarts"].text


def test_a_machine_without_the_unit_is_told_once(systemd: Booted) -> None:
    systemd.has("ckptd.service", LoadState="not-found", ActiveState="inactive")
    assert list(systemd.found(services.service)) == ["ckptd.service"]
    assert systemd.found(services.others) == {}


def test_tasks_that_nobody_asks_to_save_at_shutdown_are_told(systemd: Booted) -> None:
    systemd.has("ckptd-drain.service", LoadState="loaded", ActiveState="inactive")
    systemd.has("ckptd.slice", ActiveState="inactive")
    found = systemd.found(services.others)
    assert found["shutdown"].advice == "systemctl start ckptd-drain"
    assert "slow" in found["ckptd.slice"].text


def test_a_socket_that_listens_elsewhere_is_bad(systemd: Booted) -> None:
    systemd.has("ckptd.socket", ActiveState="active", Listen="/run/other (Stream)")
    found = systemd.found(services.others)["ckptd.socket"]
    assert (found.level, "/run/other" in found.text) == ("bad", True)


def test_a_daemon_behind_its_socket_sleeps_and_is_not_asked(systemd: Booted) -> None:
    systemd.has("ckptd.socket", LoadState="loaded", ActiveState="active", UnitFileState="enabled")
    systemd.service(ActiveState="inactive", SubState="dead")
    place = systemd.place()
    assert place.systemd.is_asleep
    assert [each.level for each in services.service(place)] == ["ok", "ok"]


@pytest.mark.parametrize("value", ["0", "infinity", ""])
def test_a_unit_without_a_watchdog_is_told(systemd: Booted, value: str) -> None:
    systemd.service(WatchdogUSec=value)
    assert "watchdog" in systemd.found(services.watchdog)


def test_a_rate_limit_of_zero_is_none_of_ours(systemd: Booted) -> None:
    systemd.service(LogRateLimitBurst="0")
    assert "0 does nothing" in systemd.found(journald.rate)["journal rate"].advice


def test_a_service_manager_that_does_not_answer_is_no_crash(systemd: Booted) -> None:
    place = systemd.place()
    silent = Systemd(is_system=True, booted="/nowhere")
    place = msgspec.structs.replace(place, systemd=silent)
    for check in (*services.CHECKS, *journald.CHECKS):
        assert all(each.level == "ok" for each in check(place))


def test_a_service_manager_that_is_silent_is_waited_for_once(
    systemd: Booted, tmp_path: Path
) -> None:
    systemd.program("systemctl", f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\nexit 1\n')
    place = systemd.place()
    for check in (services.service, services.others, services.watchdog, journald.rate):
        assert list(check(place)) == []
    assert len((tmp_path / "asked").read_text().splitlines()) == 1


def test_a_unit_that_holds_the_store_and_answers_nobody_is_restarted_by_systemd(
    systemd: Booted, tmp_path: Path
) -> None:
    held = RealDisk().lock(f"{tmp_path}/LOCK")
    systemd.service(MainPID=str(os.getpid()))
    (of_unit,) = systemd.found(disk.lock).values()
    systemd.service(MainPID="0")
    (other,) = systemd.found(disk.lock).values()
    held.close()
    assert (of_unit.name, of_unit.level) == (other.name, other.level) == ("lock", "warn")
    assert of_unit.advice == "systemctl restart ckptd; tasks live on"
    assert f"who is it? ps -fp {os.getpid()};" in other.advice


def test_a_holder_that_nobody_can_name_is_not_taken_for_the_unit(
    systemd: Booted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose kernel shows no locks of processes outside."""
    monkeypatch.setattr(place, "holder_of", lambda _: 0)
    held = RealDisk().lock(f"{tmp_path}/LOCK")
    systemd.service(MainPID="0")
    (found,) = systemd.found(disk.lock).values()
    held.close()
    assert found.text == f"{tmp_path}/LOCK is held, but no daemon answers"
    assert f"who is it? fuser -v {tmp_path}/LOCK; a daemon: `kill -HUP PID`" in found.advice
