"""Installed as the README says, under systemd 252 and 257: units, upgrade, user mode, removal."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.booted import pip_access
from tests.booted.machine import ENV, Machine, Result
from tests.booted.nspawn import Nspawn
from tests.waiting import until

Boot = Callable[[], Nspawn]
UNITS = ("ckptd.service", "ckptd.socket", "ckptd.slice", "ckptd-drain.service")
PIP_CONFIG = "/run/pip.conf"
LIB = "/usr/local/lib/ckptd"
FORK_RUNNER = "/usr/local/share/doc/ckptd/fork-runner.conf"


def submit(machine: Machine, *command: str, env: dict[str, str] | None = None) -> str:
    words = ["ckptctl", "submit", "-q", "--", *command]
    return machine.run(words, user="alice", env=env).out.strip()


def phase(machine: Machine, task: str, env: dict[str, str] | None = None) -> str:
    words = ["ckptctl", "status", task, "--all", "-o", "{phase}"]
    return machine.run(words, user="alice", env=env).out.strip()


def until_running(machine: Machine, *tasks: str) -> None:
    until(lambda: all(phase(machine, task) == "running" for task in tasks), 20)


def make(machine: Nspawn, verb: str) -> str:
    """Run `make` in the checkout inside, with the host's network and its way to packages."""
    env = ENV | {name: text for name, text in os.environ.items() if name.startswith("PIP_")}
    env.pop("PIP_FIND_LINKS", None)
    with pip_access.binds() as options:
        found = next(option for option in options if option.endswith(f":{PIP_CONFIG}"))
        merged = found.partition("=")[2].removesuffix(f":{PIP_CONFIG}")
        env["PIP_CONFIG_FILE"] = machine.put(PIP_CONFIG, Path(merged).read_text())
    machine.put("/etc/resolv.conf", Path("/etc/resolv.conf").read_text())
    if os.path.exists(pip_access.CERTIFICATES):
        env["PIP_CERT"] = machine.put("/run/ca.crt", Path(pip_access.CERTIFICATES).read_text())
    enter = ["nsenter", f"--target={machine.leader}", "--mount", "--pid", "--uts", "--ipc", "--"]
    done = subprocess.run(
        [*enter, "make", "-C", "/usr/src/ckptd", verb],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_installed_units_are_accepted_without_a_word(machine: Machine) -> None:
    # with their man pages, which systemd-analyze looks up
    for scope, who in (("--system", "root"), ("--user", "alice")):
        env = {"XDG_RUNTIME_DIR": "/tmp"}  # it only looks whether there is one
        done = machine.run(["systemd-analyze", "verify", scope, *UNITS], user=who, env=env)
        assert "ckptd" not in done.out + done.err


@pytest.mark.parametrize("where", ["online", "offline"])
def test_the_daemon_is_exposed_no_more_than_agreed(machine: Machine, where: str) -> None:
    words = ["systemd-analyze", "security", "--no-pager", "--threshold=15"]
    words += ["--offline=yes"] if where == "offline" else []
    unit = "/usr/local/lib/systemd/system/ckptd.service" if where == "offline" else "ckptd.service"
    done = machine.run([*words, unit], check=False)
    assert done.code == 0, done.out


def test_a_member_of_the_group_works_and_the_journal_tells_the_story(machine: Machine) -> None:
    done = machine.run(["ckptctl", "run", "--", "sh", "-c", "id -un; id -Gn"], user="alice")
    assert done.out.split() == ["alice", "alice", "ckptd"]
    assert machine.run(["ckptctl", "status"], user="mallory", check=False).code != 0
    story = machine.journal("-u", "ckptd")
    assert all(word in story for word in ("ready after", "submitted by uid 1000", "succeeded"))


def test_the_pages_and_completions_are_found(machine: Machine) -> None:
    machine.run(["man", "-w", "ckptd", "ckptctl", "ckpt", "ckptd.toml"])
    load = ". /usr/share/bash-completion/bash_completion; _completion_loader ckptctl"
    assert "_ckptctl" in machine.run(["bash", "-c", f"{load}; complete -p ckptctl"]).out
    assert machine.run(["journalctl", "--list-catalog"]).out.count("ckptd:") > 30


def test_reload_is_synchronous_and_a_bad_configuration_fails_it(machine: Machine) -> None:
    path = "/etc/ckptd/ckptd.toml"
    good = machine.get(path)
    machine.run(["systemctl", "reload", "ckptd"])
    machine.put(path, "[daemon]\nno_such_key = 1\n")
    assert machine.run(["systemctl", "reload", "ckptd"], check=False).code != 0
    machine.put(path, good)
    machine.run(["systemctl", "reload", "ckptd"])
    assert machine.show("ckptd", "ActiveState") == "active"


def test_stop_leaves_tasks_and_nothing_failed_and_the_slice_ends_them(machine: Machine) -> None:
    task = submit(machine, "sleep", "600")
    until_running(machine, task)
    unit = f"ckptd-task-{task}-1.service"

    machine.run(["systemctl", "stop", "ckptd"])
    assert (machine.show("ckptd", "Result"), machine.show(unit, "ActiveState")) == (
        "success",
        "active",
    )
    machine.run(["systemctl", "start", "ckptd"])
    assert phase(machine, task) == "running"

    machine.run(["systemctl", "stop", "ckptd.slice"])
    assert [machine.show(name, "ActiveState") for name in (unit, "ckptd", "ckptd-drain")] == [
        "inactive"
    ] * 3
    assert machine.failed_units() == []

    machine.run(["systemctl", "start", "ckptd"])  # interrupted, not failed: it starts again
    until_running(machine, task)
    machine.run(["ckptctl", "cancel", task], user="alice")


def test_the_end_of_the_slice_does_not_wake_a_daemon_that_was_stopped(machine: Machine) -> None:
    machine.run(["systemctl", "stop", "ckptd.service"])  # systemd starts no socket of a live one
    machine.run(["systemctl", "enable", "--now", "ckptd.socket", "ckptd.service"])
    machine.run(["systemctl", "stop", "ckptd.service"])
    machine.run(["systemctl", "stop", "ckptd.slice"])
    assert machine.show("ckptd", "ActiveState") == "inactive"
    assert machine.show("ckptd.slice", "ActiveState") == "inactive"

    machine.run(["ckptctl", "daemon", "ping"], user="alice")  # the socket starts it

    assert machine.show("ckptd", "ActiveState") == "active"
    machine.run(["systemctl", "disable", "--now", "ckptd.socket"])
    machine.run(["systemctl", "restart", "ckptd"])


def test_a_user_runs_a_daemon_of_their_own(machine: Machine) -> None:
    env = machine.user_env("alice")

    def user(*words: str) -> Result:
        return machine.run(["systemctl", "--user", *words], user="alice", env=env)

    user("enable", "--now", "ckptd")
    own = env | {"CKPTD_ENDPOINT": f"{env['XDG_RUNTIME_DIR']}/ckptd/ctl.sock"}
    task = submit(machine, "sleep", "600", env=own)
    until(lambda: phase(machine, task, own) == "running", 20)
    assert machine.exists("/home/alice/.local/state/ckptd/wal")

    user("restart", "ckptd")
    assert phase(machine, task, own) == "running"
    user("reload", "ckptd")
    user("stop", "ckptd.slice")
    listed = user("list-units", "--all", "--plain", "--no-legend", "ckptd*").out.splitlines()
    assert [line for line in listed if line.split()[2] != "inactive"] == []
    user("disable", "ckptd")


def test_the_fork_runner_works_below_systemd_with_its_drop_in(fresh_machine: Boot) -> None:
    machine = fresh_machine()
    machine.sh(
        f"install -D -m 644 {FORK_RUNNER} /etc/systemd/system/ckptd.service.d/fork-runner.conf; "
        "sed -i 's/^runner = .*/runner = \"fork\"/' /etc/ckptd/ckptd.toml; "
        "systemctl daemon-reload; systemctl restart ckptd"
    )
    assert machine.run(["ckptctl", "run", "--", "id", "-un"], user="alice").out.strip() == "alice"
    task = submit(machine, "sleep", "600")
    until_running(machine, task)
    machine.run(["systemctl", "restart", "ckptd"])
    assert phase(machine, task) == "running"


def test_an_upgrade_leaves_tasks_running_and_keeps_their_end(fresh_machine: Boot) -> None:
    machine = fresh_machine()
    go = "/tmp/go"
    ends_between = submit(machine, "sh", "-c", f"until [ -e {go} ]; do sleep 0.1; done; exit 7")
    runs_on = submit(machine, "sleep", "600")
    until_running(machine, ends_between, runs_on)
    before = machine.sh(f"readlink {LIB}/venv").strip()
    machine.sh("echo '# newer' >>/usr/src/ckptd/ckptd/protocol/version.py")

    assert "restart ckptd" in make(machine, "install")

    assert machine.sh(f"readlink {LIB}/venv").strip() != before
    assert before in machine.sh("tr '\\0' ' ' </proc/$(systemctl show -P MainPID ckptd)/cmdline")
    machine.run(["systemctl", "stop", "ckptd"])
    machine.put(go, "")
    unit = f"ckptd-task-{ends_between}-1.service"
    until(lambda: machine.show(unit, "ActiveState") != "active", 20)
    machine.run(["systemctl", "start", "ckptd"])
    until(lambda: phase(machine, ends_between) == "failed", 20)
    said = machine.run(["ckptctl", "explain", ends_between], user="alice").out
    assert "exit 7" in said
    assert phase(machine, runs_on) == "running"
    assert machine.sh("systemctl show -P MainPID ckptd") != "0"


def test_uninstall_takes_the_program_and_leaves_tasks_and_data(fresh_machine: Boot) -> None:
    machine = fresh_machine()
    task = submit(machine, "sleep", "600")
    until_running(machine, task)

    assert "are kept" in make(machine, "uninstall")

    code = "/usr/local/lib/ckptd"  # what the task runs by
    left = machine.sh(f"find /usr/local /etc/systemd -name '*ckpt*' -not -path '{code}*'").split()
    assert left == []
    assert machine.exists(code)
    assert machine.exists("/etc/ckptd/ckptd.toml")
    assert machine.exists("/var/lib/ckptd/wal")
    assert machine.show(f"ckptd-task-{task}-1.service", "ActiveState") == "active"
    assert machine.failed_units() == []

    machine.sh(f"systemctl stop ckptd-task-{task}-1.service")
    make(machine, "uninstall")
    assert not machine.exists(code)
