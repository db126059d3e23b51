"""Roles by group and tasks for others, with a user database of the test's own.

The daemon runs in a mount namespace in which its /etc/passwd and /etc/group are files that the
test writes: the machine's own stay as they are.
"""

import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.test_identity import (
    NOBODY,
    UserDaemon,
    ctl_as,
    identity,
    of_nobody,
    python_for,
    python_path,
    said,
)
from tests.daemon_fixture import LiveDaemon, StartDaemon
from tests.raw_client import RawClient, RefusedError
from tests.waiting import until

__all__ = ["of_nobody"]  # the fixture

WATCH, JOBS, OPS, NONE = 61_001, 61_002, 61_003, 61_004
PEOPLE = {"watch": WATCH, "jobs": JOBS, "ops": OPS, "none": NONE}
GROUP = 61_000  # may connect
ACCESS = '[access]\nread = ["watch"]\nsubmit = ["jobs"]\nadmin = ["ops"]\n'
DENIED = 77
FOREVER = ("sh", "-c", "echo secret; sleep 600")
ASKS = """
import sys
from tests.raw_client import RawClient, RefusedError
with RawClient(sys.argv[1]) as client:
    try:
        client.ask("status")
        print("yes", flush=True)
        while True:
            client.ask("wait", {"select": {"all": True}, "hold_s": 0.1})
    except RefusedError as refused:
        print(refused.error["code"])
"""

pytestmark = pytest.mark.root
Start = Callable[[str], LiveDaemon]


def user_database(root: Path, *members: str) -> None:
    """Write passwd and group: everybody has a group of their own name, `members` may connect."""
    passwd = [f"{name}:x:{uid}:{uid}::/:/bin/sh\n" for name, uid in PEOPLE.items()]
    groups = [f"{name}:x:{uid}:\n" for name, uid in PEOPLE.items()]
    groups += [f"ckptd-test:x:{GROUP}:{','.join(members or PEOPLE)}\n"]
    Path(root, "passwd").write_text(Path("/etc/passwd").read_text() + "".join(passwd))
    Path(root, "group").write_text(Path("/etc/group").read_text() + "".join(groups))


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    user_database(tmp_path)
    return tmp_path


@pytest.fixture
def start(start_daemon: StartDaemon, etc: Path) -> Start:
    """Start a daemon of root's that everybody in PEOPLE may connect to."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare(1) from util-linux")
    mounts = "".join(f"mount --bind {etc}/{name} /etc/{name} && " for name in ("passwd", "group"))
    prefix = ["unshare", "--mount", "sh", "-c", mounts + 'exec "$@"', "sh"]
    if subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("cannot make a mount namespace here")

    def started(access: str) -> LiveDaemon:
        config = f'[ipc]\ngroup = "ckptd-test"\nmode = "0666"\n{access}'
        return start_daemon(config=config, prefix=prefix)

    return started


def code_of(daemon: LiveDaemon, uid: int, *args: str) -> int:
    return ctl_as(daemon, uid, *args).returncode


def test_each_role_may_do_what_it_is_for_and_nothing_more(start: Start) -> None:
    daemon = start(ACCESS)
    of_root = daemon.submit(*FOREVER, options=("-E", "TOKEN=s3cret"))
    of_jobs = int(ctl_as(daemon, JOBS, "submit", "-q", "--", *FOREVER).stdout)
    for task in (of_root, of_jobs):
        daemon.wait_phase(task, "running")

    seen = json.loads(ctl_as(daemon, WATCH, "status", "--all", "-o", "json").stdout)
    assert {row["id"] for row in seen["tasks"]} == {of_root, of_jobs}
    shown = ctl_as(daemon, WATCH, "show", str(of_root), "-o", "json")
    assert (shown.returncode, "s3cret" in shown.stdout) == (0, False)
    assert code_of(daemon, WATCH, "events", "--since", "0") == 0
    for words in (
        ("logs", str(of_root)),
        ("show", "--env", str(of_root)),
        ("cancel", str(of_root)),
        ("submit", "--", "true"),
        ("daemon", "reload"),
    ):
        done = ctl_as(daemon, WATCH, *words)
        assert done.returncode == DENIED, done
        assert "secret" not in done.stdout + done.stderr

    seen = json.loads(ctl_as(daemon, JOBS, "status", "--all", "-o", "json").stdout)
    assert {row["id"] for row in seen["tasks"]} == {of_jobs}
    assert code_of(daemon, JOBS, "cancel", str(of_root)) == DENIED
    assert code_of(daemon, JOBS, "daemon", "shutdown") == DENIED

    refused = ctl_as(daemon, NONE, "status")
    assert refused.returncode == DENIED
    assert "jobs (submit); watch (read)" in refused.stderr
    assert "roles: none" in ctl_as(daemon, NONE, "daemon", "ping").stdout

    assert code_of(daemon, OPS, "daemon", "reload") == 0
    assert code_of(daemon, OPS, "group", "add", "big") == 0
    assert "secret" in said(daemon, OPS, of_jobs)
    assert code_of(daemon, OPS, "cancel", str(of_root), str(of_jobs)) == 0
    daemon.wait_phase(of_root, "cancelled")
    daemon.wait_phase(of_jobs, "cancelled")
    of_ops = int(ctl_as(daemon, OPS, "submit", "-q", "--", "id", "-u").stdout)
    assert daemon.wait_phase(of_ops, "succeeded")["uid"] == OPS
    assert said(daemon, OPS, of_ops) == [str(OPS)]


def test_a_reload_gives_and_takes_roles_at_once(start: Start) -> None:
    daemon = start("")  # whoever may connect may submit
    assert code_of(daemon, NONE, "submit", "--", "true") == 0
    assert code_of(daemon, OPS, "daemon", "reload") == DENIED
    daemon.config.write_text(daemon.config.read_text() + ACCESS)
    told = daemon.ctl("daemon", "reload").stdout
    assert "access.submit: in force now" in told
    assert code_of(daemon, NONE, "submit", "--", "true") == DENIED
    assert code_of(daemon, OPS, "daemon", "reload") == 0
    daemon.config.write_text(daemon.config.read_text().replace('"ops"', '"nosuch"'))
    assert code_of(daemon, OPS, "daemon", "reload") == 0
    assert code_of(daemon, OPS, "daemon", "reload") == DENIED
    assert "unknown groups: nosuch" in daemon.log.read_text()


def test_who_is_taken_out_of_a_group_loses_the_right_over_an_open_connection_too(
    start: Start, etc: Path
) -> None:
    daemon = start("")
    assert code_of(daemon, JOBS, "submit", "--", "sleep", "600") == 0
    with subprocess.Popen(
        [python_for(JOBS), "-c", ASKS, daemon.endpoint],
        env={**daemon.env, "PYTHONPATH": python_path()},
        cwd=daemon.work,
        stdout=subprocess.PIPE,
        text=True,
        **identity(JOBS),
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "yes\n"
        user_database(etc, "watch", "ops")
        assert client.stdout.readline() == "denied\n"  # Bound: the test's own time limit
    assert code_of(daemon, WATCH, "status") == 0


# --- for others ---------------------------------------------------------------------------------


def test_root_submits_for_a_user_who_then_owns_the_task(start: Start) -> None:
    daemon = start(f"{ACCESS}submit_as = true\n")
    nobody = pwd.getpwuid(NOBODY)
    script = 'id -u; id -g; id -G; echo "$HOME $USER"; echo "<$TOKEN>"; sleep 600'
    options = ("--as", nobody.pw_name, "-d", "/")
    daemon.env["TOKEN"] = "of root, for nobody's eyes"
    task = daemon.submit("sh", "-c", script, options=options)
    daemon.wait_phase(task, "running")
    lines = until(lambda: len(found := said(daemon, 0, task)) == 5 and found)
    assert lines
    assert lines[:2] == [str(nobody.pw_uid), str(nobody.pw_gid)]
    assert set(map(int, lines[2].split())) == set(os.getgrouplist(nobody.pw_name, nobody.pw_gid))
    assert lines[3:] == [f"{nobody.pw_dir} {nobody.pw_name}", "<>"]
    assert (daemon.state / "tasks" / str(task)).stat().st_uid == NOBODY

    of_jobs = daemon.submit(*FOREVER, options=("--as", str(JOBS), "-d", "/", "-k", "nightly"))
    daemon.restart()
    assert daemon.wait_phase(of_jobs, "running")["uid"] == JOBS
    seen = json.loads(ctl_as(daemon, JOBS, "status", "key:nightly", "-o", "json").stdout)
    assert [row["id"] for row in seen["tasks"]] == [of_jobs]
    assert code_of(daemon, JOBS, "cancel", str(of_jobs)) == 0
    daemon.wait_phase(of_jobs, "cancelled")


def test_nobody_else_submits_for_a_user_and_no_gid_is_taken_from_a_request(start: Start) -> None:
    daemon = start(f"{ACCESS}submit_as = true\n")
    for uid in (JOBS, OPS, WATCH):
        for other in ("0", str(NOBODY)):
            done = ctl_as(daemon, uid, "submit", "--as", other, "--", "true")
            assert done.returncode == DENIED, done
    assert ctl_as(daemon, JOBS, "submit", "--as", str(JOBS), "--", "true").returncode == 0
    unknown = daemon.ctl("submit", "--as", "54321", "--", "true", check=False)
    assert (unknown.returncode, "no user with uid 54321" in unknown.stderr) == (DENIED, True)
    misspelt = daemon.ctl("submit", "--as", "no-such-user", "--", "true", check=False)
    assert (misspelt.returncode, "there is no user" in misspelt.stderr) == (64, True)
    with RawClient(daemon.endpoint) as root:
        for more in ({"uid": JOBS, "gid": 0}, {"uid": -1}, {"uid": 2**32 - 1}, {"uid": "jobs"}):
            with pytest.raises(RefusedError, match="bad_request"):
                root.ask("submit", {"tasks": [{"argv": ["true"], **more}]})
        assert [row["uid"] for row in root.rows()] == [JOBS]


def test_root_tasks_and_submitting_for_others_can_be_switched_off(start: Start) -> None:
    daemon = start(f"{ACCESS}root_tasks = false\n")
    for words, why in (
        (("submit", "--", "true"), "run as root"),
        (("submit", "--as", str(JOBS), "--", "true"), "submit_as = true"),
    ):
        done = daemon.ctl(*words, check=False)
        assert (done.returncode, why in done.stderr) == (DENIED, True), done
    task = int(ctl_as(daemon, JOBS, "submit", "-q", "--", "true").stdout)
    assert daemon.wait_phase(task, "succeeded")["uid"] == JOBS


def test_a_users_own_daemon_runs_nothing_as_anybody_else(of_nobody: UserDaemon) -> None:
    daemon = of_nobody
    for uid in (0, JOBS):
        done = ctl_as(daemon, daemon.uid, "submit", "--as", str(uid), "--", "true")
        assert done.returncode == DENIED
        assert f"runs everything as uid {daemon.uid}" in done.stderr
    assert "roles: read, submit, admin" in daemon.ctl("daemon", "ping").stdout
    done = ctl_as(daemon, 0, "submit", "--", "true")
    assert done.returncode == DENIED, done
