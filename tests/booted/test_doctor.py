"""`ckptctl doctor` on booted machines, as installed: true for root, a member, a stranger."""

import json

import pytest

from tests.booted.machine import Machine
from tests.booted.nspawn import Nspawn
from tests.booted.vm import Vm
from tests.waiting import until

pytestmark = pytest.mark.timeout(180)
# What an nspawn machine on this host lacks whatever ckptd does: its kernel and disk are the host's.
OF_THE_HOST = {"limits", "clock", "out of memory", "state directory", "sync", "pressure", "memory"}

Findings = dict[str, dict[str, str]]


def examine(machine: Machine, user: str = "root", *words: str) -> tuple[int, Findings]:
    done = machine.run(["ckptctl", "doctor", "-o", "json", *words], user=user, check=False)
    assert done.code in {0, 1}, done.err
    return done.code, {each["name"]: each for each in json.loads(done.out)["findings"]}


def ill(found: Findings) -> Findings:
    """Return what is not well and no fault of the host."""
    return {
        name: each
        for name, each in found.items()
        if each["level"] != "ok" and name not in OF_THE_HOST
    }


def test_an_installed_machine_has_nothing_to_do_for_root(machine: Nspawn) -> None:
    code, found = examine(machine)
    assert ill(found) == {}
    assert code == 0
    assert found["runner"]["text"].startswith("unit in force")
    assert "asks every task to save" in found["shutdown"]["text"]
    assert "journalctl -x says" in found["journal catalog"]["text"]


def test_the_table_fits_eighty_columns(machine: Nspawn) -> None:
    lines = machine.sh("COLUMNS=80 ckptctl doctor").splitlines()
    assert {"Daemon", "systemd", "Journal", "Machine", "Disk"} <= set(lines)
    assert not [line for line in lines if len(line) > 80]


def test_a_member_is_told_its_roles_and_a_stranger_how_to_become_one(machine: Nspawn) -> None:
    code, found = examine(machine, "alice")
    assert (code, found["your roles"]["text"]) == (0, "uid 1000: submit")
    assert set(ill(found)) <= {"journal"}  # the system's lines are not everybody's
    code, found = examine(machine, "mallory")
    assert (code, found["daemon"]["level"]) == (1, "bad")
    assert found["daemon"]["advice"] == "as root: usermod -aG ckptd mallory; then log in anew"


def test_looking_at_a_daemon_that_sleeps_does_not_wake_it(machine: Nspawn) -> None:
    machine.sh("systemctl stop ckptd; systemctl start ckptd.socket")
    for user in ("root", "alice"):
        _, found = examine(machine, user)
        assert found["daemon"]["level"] == "ok"
        assert "sleeps" in found["daemon"]["text"]
    assert machine.sh("systemctl is-active ckptd || true").strip() == "inactive"
    machine.sh("systemctl stop ckptd.socket; systemctl start ckptd")


def test_a_daemon_that_hangs_is_told_and_looked_at_in_seconds(machine: Nspawn) -> None:
    machine.sh("systemctl kill --signal=STOP --kill-whom=main ckptd")
    try:
        code, found = examine(machine)
        assert (code, found["daemon"]["level"]) == (1, "bad")
        assert "does not answer" in found["daemon"]["text"]
    finally:
        machine.sh("systemctl kill --signal=CONT --kill-whom=main ckptd")


def test_drop_ins_that_take_promises_away_are_named(machine: Nspawn) -> None:
    drop_in = "/run/systemd/system/ckptd.service.d/loose.conf"
    text = r"[Service]\nWatchdogSec=0\nLogRateLimitBurst=0\nProtectSystem=no\nProtectHome=no"
    machine.sh(f"mkdir -p $(dirname {drop_in}); printf '{text}\n' >{drop_in}")
    # 252 does not see that there is a drop-in now, but a touch of the unit it does.
    machine.sh("touch $(systemctl show -p FragmentPath --value ckptd.service)")
    assert "changed on disk" in examine(machine)[1]["unit file"]["text"]
    machine.sh("systemctl daemon-reload; systemctl restart ckptd")
    found = ill(examine(machine)[1])
    assert {"watchdog", "journal rate", "sandbox"} <= set(found)
    machine.sh(f"rm {drop_in}; systemctl daemon-reload; systemctl restart ckptd")
    assert "sandbox" not in ill(examine(machine)[1])


def test_a_configuration_that_refuses_the_start_is_found(machine: Nspawn) -> None:
    machine.sh("cp -a /etc/ckptd/ckptd.toml /run/kept.toml; echo 'x = 1' >/etc/ckptd/ckptd.toml")
    machine.sh("systemctl restart ckptd || true")
    code, found = examine(machine)
    assert (code, found["configuration"]["level"]) == (1, "bad")
    assert found["ckptd.service"]["level"] == "bad"
    assert "config check" in found["ckptd.service"]["advice"]
    machine.sh("cp -a /run/kept.toml /etc/ckptd/ckptd.toml; systemctl restart ckptd")


def test_a_user_without_a_bus_of_their_own_is_told_what_to_install(machine: Nspawn) -> None:
    machine.sh("systemctl start user@1000")
    until(lambda: machine.run(["test", "-d", "/run/user/1000/systemd"], check=False).code == 0, 20)
    _, found = examine(machine, "alice", "--user")
    assert found["who may connect"]["text"] == "you and root"
    has_bus = machine.run(["test", "-S", "/run/user/1000/bus"], check=False).code == 0
    assert found["runner"]["level"] == ("ok" if has_bus else "warn")
    assert has_bus or "dbus-user-session" in found["bus"]["advice"]
    assert found["logout"]["advice"] == "loginctl enable-linger"


def test_on_a_kernel_of_its_own_limits_are_held_and_the_daemon_goes_last(vm: Vm) -> None:
    code, found = examine(vm)
    assert ill(found) == {}
    assert code == 0
    for name in ("limits", "out of memory", "pressure", "state directory", "sync"):
        assert found[name]["level"] == "ok", found[name]
