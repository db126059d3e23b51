"""Who may talk to the daemon, whom tasks run as, and a daemon that is nobody special."""

import grp
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.daemon_fixture import ROOT, LiveDaemon, StartDaemon
from tests.raw_client import RawClient
from tests.waiting import until

NOBODY = 65_534
STRANGER = 54_321  # in no group and no password file
TIMEOUT_S = 60.0
ENDS_AT_GO = 'echo $$ > pid.tmp; mv pid.tmp pid; until [ -e go ]; do sleep 0.05; done; exit "$1"'
WHO_AM_I = 'id -u; id -g; id -G; stat -c %u:%a "$CKPTD_DIR"; touch "$CKPTD_DIR/stage/mine"'
IMPORTS = "import ckptctl.__main__, ckptd.daemon.main"


def identity(uid: int, groups: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return the options of Popen that make a process somebody else's; none where we are it."""
    if uid == os.geteuid():
        return {}
    return {"user": uid, "group": uid, "extra_groups": groups}


@cache
def python_path() -> str:
    return f"{ROOT}:{Path(zmq.__file__).parents[1]}"


@cache
def python_for(uid: int) -> str:
    """Return an interpreter that `uid` can run and that finds ckptd; skip where there is none."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
        try:
            done = subprocess.run(
                [python, "-c", IMPORTS],
                env={"PYTHONPATH": python_path()},
                cwd="/",
                capture_output=True,
                check=False,
                **identity(uid),
            )
        except OSError:
            continue
        if done.returncode == 0:
            return python
    pytest.skip(f"uid {uid} cannot run any Python {version} with ckptd and what it needs")


def ctl_as(
    daemon: LiveDaemon, uid: int, *args: str, groups: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run `ckptctl ARGS` as another user."""
    return subprocess.run(
        [python_for(uid), "-m", "ckptctl", *args],
        env={**daemon.env, "PYTHONPATH": python_path()},
        cwd=daemon.work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
        **identity(uid, groups),
    )


def said(daemon: LiveDaemon, uid: int, task: int) -> list[str]:
    """Return the lines that a task has printed, as a user gets them."""
    done = ctl_as(daemon, uid, "logs", str(task))
    assert done.returncode == 0, done
    return [line for line in done.stdout.splitlines() if not line.startswith("---")]


def group_of_nobody() -> str:
    try:
        return grp.getgrgid(pwd.getpwuid(NOBODY).pw_gid).gr_name
    except KeyError:
        pytest.skip(f"uid {NOBODY} or its group has no name here")


@pytest.fixture
def shared(start_daemon: StartDaemon) -> LiveDaemon:
    """A daemon of root's that the group of NOBODY may use."""
    return start_daemon(config=f'[ipc]\ngroup = "{group_of_nobody()}"\n')


@pytest.mark.root
def test_a_task_runs_as_who_submitted_it_with_exactly_that_users_groups(
    shared: LiveDaemon,
) -> None:
    borrowed = next(group.gr_gid for group in grp.getgrall() if group.gr_gid not in (0, NOBODY))
    command = ("submit", "-q", "--", "sh", "-c", WHO_AM_I)
    done = ctl_as(shared, NOBODY, *command, groups=(borrowed, 0))
    assert done.returncode == 0, done
    task = int(done.stdout)
    row = shared.wait_phase(task, "succeeded", "failed")
    uid, gid, groups, directory = said(shared, NOBODY, task)

    nobody = pwd.getpwuid(NOBODY)
    assert (uid, gid) == (str(NOBODY), str(NOBODY))
    assert sorted(map(int, groups.split())) == sorted(os.getgrouplist(nobody.pw_name, NOBODY))
    assert directory == f"{NOBODY}:700"
    assert row["phase"] == "succeeded", "it cannot write into its own directory"
    output = (shared.state / "output" / f"{task}.log").stat()
    assert (output.st_uid, output.st_mode & 0o777) == (NOBODY, 0o600)


@pytest.mark.root
def test_users_see_their_own_tasks_and_root_sees_all(shared: LiveDaemon) -> None:
    of_root = shared.submit("sh", "-c", "echo secret")
    of_nobody = int(ctl_as(shared, NOBODY, "submit", "-q", "--", "id", "-u").stdout)
    for task in (of_root, of_nobody):
        shared.wait_phase(task, "succeeded")

    for verb in ("logs", "show", "cancel", "clean"):
        denied = ctl_as(shared, NOBODY, verb, str(of_root))
        assert denied.returncode == 77, denied
        assert "secret" not in denied.stdout + denied.stderr
    seen = ctl_as(shared, NOBODY, "status", "--all", "-o", "json")
    assert [row["id"] for row in json.loads(seen.stdout)["tasks"]] == [of_nobody]
    told = ctl_as(shared, NOBODY, "daemon", "status", "-o", "json")
    assert json.loads(told.stdout)["daemon"]["totals"] == {"succeeded": 1}
    with RawClient(shared.endpoint) as root:
        assert {row["id"]: row["uid"] for row in root.rows()} == {of_root: 0, of_nobody: NOBODY}
    assert said(shared, 0, of_nobody) == [str(NOBODY)]


@pytest.mark.root
@pytest.mark.parametrize("mode", ["0660", "0666"], ids=["by the file", "by the handshake"])
def test_who_is_not_in_the_group_cannot_talk_to_the_daemon(
    start_daemon: StartDaemon, mode: str
) -> None:
    config = f'[ipc]\ngroup = "{group_of_nobody()}"\nmode = "{mode}"\n'
    daemon = start_daemon(config=config)
    for args in (("status",), ("submit", "--", "touch", "trespassed")):
        done = ctl_as(daemon, STRANGER, *args, "--timeout", "2")
        assert done.returncode in (2, 77), done
        assert done.stdout == ""
    assert ctl_as(daemon, NOBODY, "daemon", "ping").returncode == 0
    with RawClient(daemon.endpoint) as root:
        assert root.rows() == []
    assert not (daemon.work / "trespassed").exists()


class UserDaemon(LiveDaemon):
    """A daemon without root and without configuration: all it has is a home."""

    def __init__(self, uid: int) -> None:
        super().__init__()
        self.python, self.uid = python_for(uid), uid
        self.home, self.run = self.root / "home", self.root / "run" / "ckptd"
        self.state = self.home / "state" / "ckptd"
        for directory in (self.home, self.run.parent):
            directory.mkdir(mode=0o700)
            os.chown(directory, uid, uid if os.geteuid() == 0 else -1)
        self.endpoint = f"ipc://{self.run}/ctl.sock"
        self.env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": python_path(),
            "CKPTD_TEST_ROOT": str(self.root),
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(self.run.parent),
            "XDG_STATE_HOME": str(self.state.parent),
        }

    def _spawn(self, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        os.chown(env["NOTIFY_SOCKET"], self.uid, -1)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [self.python, "-m", "ckptd"],
                env={**self.env, **env},
                cwd=self.work,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **identity(self.uid),
            )

    def ctl(self, *args: str, **_: Any) -> subprocess.CompletedProcess[str]:
        done = ctl_as(self, self.uid, *args)
        assert done.returncode == 0, f"{done}\n{self.log.read_text()}"
        return done


@pytest.fixture
def of_nobody() -> Iterator[UserDaemon]:
    """A daemon of a plain user: of NOBODY where we are root, else of our own."""
    daemon = UserDaemon(os.geteuid() or NOBODY)
    daemon.start()
    yield daemon
    daemon.close()


def test_a_daemon_without_root_and_configuration_survives_its_own_death(
    of_nobody: UserDaemon,
) -> None:
    daemon = of_nobody
    task = daemon.submit("sh", "-c", ENDS_AT_GO, "sh", "7")
    pid = int(daemon.wait_file("pid"))
    until(lambda: daemon.row(task)["phase"] == "running")
    for _ in range(2):
        daemon.restart()
        row = daemon.row(task)
        assert (row["phase"], row["pid"], row["attempt"]) == ("running", pid, 1)
        assert Path(f"/proc/{pid}").stat().st_uid == daemon.uid
    (daemon.work / "go").touch()

    row = daemon.wait_phase(task, "succeeded", "failed")
    assert (row["phase"], row["code"], row["uid"]) == ("failed", 7, daemon.uid)
    assert (daemon.state / "FORMAT").stat().st_uid == daemon.uid
    who = daemon.submit("sh", "-c", WHO_AM_I)
    assert daemon.wait_phase(who, "succeeded", "failed")["phase"] == "succeeded"
    assert said(daemon, daemon.uid, who)[0] == str(daemon.uid)
