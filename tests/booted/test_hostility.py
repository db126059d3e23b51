"""Users who mean harm, on machines as installed: nothing leaks or breaks, root follows nobody.

Alice and bob may both submit; mallory may not even connect.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.booted.machine import Machine
from tests.booted.nspawn import Nspawn
from tests.waiting import until

CONNECTIONS = 8_000
WORK = "/tmp/hostility"  # everybody's
SECRET = "wolpertinger"  # must not be found where it does not belong
BOB = ["setpriv", "--reuid=1001", "--regid=1001", "--init-groups"]


@pytest.fixture(autouse=True)
def workplace(machine: Nspawn) -> Iterator[None]:
    machine.sh(f"mkdir -p {WORK}; chmod 1777 {WORK}; ckptctl group set default --parallel 20")
    before = machine.show("ckptd", "MainPID")
    yield
    assert machine.show("ckptd", "MainPID") == before, "the daemon died"
    machine.sh(f"ckptctl kill --all --yes; ckptctl wait --all; rm -rf {WORK}; true")


def submit(machine: Machine, *words: str) -> int:
    """Submit as alice, in /; return the id."""
    command = ["env", "-C", "/", "ckptctl", "submit", "-q", *words]
    return int(machine.run(command, user="alice").out)


def shown(machine: Machine, task: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(machine.sh(f"ckptctl show {task} -o json"))["tasks"][0]
    return found


def phase(machine: Machine, task: int) -> str:
    return str(shown(machine, task)["row"]["phase"])


def until_written(machine: Machine, path: str) -> bytes:
    until(lambda: machine.exists(path), 30)
    return machine.get(path)


# --- links ------------------------------------------------------------------------------------

VICTIM = "/srv/victim"
TRAPS = f"""#!/bin/sh
# replaces all of its own directory by links to what is root's, then waits
trap 'exit 75' TERM
cd "$CKPTD_DIR"; mkdir -p ckpt/1 ckpt/2 stage
for inside in ckpt/1 ckpt/2 stage; do
  ln -s {VICTIM}/file $inside/soft; ln -s {VICTIM} $inside/tree; ln {VICTIM}/file $inside/hard
done
ln -s {VICTIM} ckpt/3; ln -s {VICTIM}/file ckpt/4; ln -s {VICTIM}/file manifest
for entry in *; do
  case $((n = n + 1)) in 1|2) ;; *) mv "$entry" "$entry.old"; ln -s {VICTIM} "$entry";; esac
done 2>/dev/null
ls -R . >{WORK}/laid
while :; do sleep 0.1; done
"""


def test_links_in_a_users_directory_lead_root_nowhere(machine: Nspawn) -> None:
    look = f"cd {VICTIM}; find . -printf '%p %y %s %m %U:%G %T@\\n'; sha256sum file"
    machine.sh(f"mkdir -p {VICTIM}; echo {SECRET} >{VICTIM}/file; chmod 600 {VICTIM}/file")
    machine.put(f"{WORK}/traps", TRAPS, mode=0o755)
    before = machine.sh(look)
    task = submit(machine, "--retries", "2", "--backoff", "0.1s", "--", f"{WORK}/traps")
    until_written(machine, f"{WORK}/laid")

    told = ""
    for verb in ("checkpoint now", "checkpoint ls", "checkpoint verify", "checkpoint show", "show",
                 "logs", "explain", f"checkpoint export --to {WORK}/out"):  # fmt: skip
        words, _, option = verb.partition(" --")
        script = f"ckptctl {words} {task} {option and '--' + option} --answer-within 30s"
        told += machine.sh(f"timeout 60 {script} 2>&1 </dev/null", user="alice", check=False)
    machine.sh(f"ckptctl signal TERM {task}")
    until(lambda: shown(machine, task)["row"]["attempt"] > 1, 30)
    machine.sh(
        "systemctl kill -s KILL ckptd-task-*; ckptctl cancel --all --yes; ckptctl wait --all; true"
    )
    machine.sh(f"ckptctl clean {task} --yes")
    until(lambda: not machine.exists(f"/var/lib/ckptd/tasks/{task}"), 30)

    assert machine.sh(look) == before
    assert SECRET not in told + machine.journal("-u", "ckptd")
    assert SECRET not in machine.sh(f"find {WORK} -user alice -type f -exec cat {{}} +")


def test_nobody_but_root_puts_anything_where_the_daemon_opens_it(machine: Nspawn) -> None:
    task = submit(machine, "--", "sleep", "1000")
    until(lambda: phase(machine, task) == "running", 30)
    for user, own in (
        ("alice", {f"/var/lib/ckptd/start/{task}.1"}),
        ("bob", set()),
        ("mallory", set()),
    ):
        found = machine.run(
            ["find", "/run/ckptd", "/var/lib/ckptd", "-not", "-type", "s", "-writable",
             "-not", "-path", f"/var/lib/ckptd/tasks/{task}*"], user=user, check=False,
        ).out.split()  # fmt: skip
        assert set(found) <= own
        for path in (f"/var/lib/ckptd/start/{task}.1", "/run/ckptd/ctl.sock"):
            assert machine.run(["ln", "-sfT", "/etc/shadow", path], user=user, check=False).code


# --- words ------------------------------------------------------------------------------------

WORDS = (
    "%h", "%%", "%i %u", "a\nb\n", "'", '"', "'\"'", "$$", "$HOME", "${HOME}", "$(id)", "`id`",
    "\\", "\\x41", "\\\n", "", " ", "\t", ";", "*", "~", "-", "--", "@-+!:|", "\x01\x7f\x1b[2J",
    "\r", "é→", "x" * 5_000, "#", "!", "=", "&>",
)  # fmt: skip


def test_every_argument_arrives_as_it_was(machine: Nspawn) -> None:
    program = machine.put(
        f"{WORK}/@-+! %h $$ 'q'\"\n\\p",
        "#!/usr/bin/env python3\nimport os, sys\n"
        f'open("{WORK}/words.new", "w").write("\\n".join(os.fsencode(w).hex() for w in sys.argv))\n'
        f'os.rename("{WORK}/words.new", "{WORK}/words")\n',
        mode=0o755,
    )
    submit(machine, "--", program, *WORDS)
    arrived = until_written(machine, f"{WORK}/words").decode().split("\n")
    assert [bytes.fromhex(word) for word in arrived] == [os.fsencode(w) for w in (program, *WORDS)]


def test_what_no_request_can_carry_is_refused_in_a_line_of_words(machine: Nspawn) -> None:
    for words in (("--", "echo", "\udcff"), ("-E", "A=\udcff", "--", "true")):
        command = ["env", "-C", "/", "ckptctl", "submit", *words]
        said = machine.run(command, user="alice", check=False)
        assert (said.code, said.out) == (64, "")
        assert "only UTF-8 can be handed over" in said.err
        assert "Traceback" not in said.err


def test_an_environment_arrives_and_is_seen_and_used_by_nobody_else(machine: Nspawn) -> None:
    given = {
        "SECRET": SECRET,
        "NEWLINES": f"a\nb={SECRET}\n",
        "BASH_FUNC_x%%": f"() {{ echo {SECRET}; }}",
        "odd.name": "'$$'%h",
        "LD_PRELOAD": f"{WORK}/{SECRET}.so",
        "LD_DEBUG": "files",  # every process that gets this writes a file of its own
        "LD_DEBUG_OUTPUT": f"{WORK}/ld",
    }
    script = f"cat /proc/$$/environ >{WORK}/env.new; mv {WORK}/env.new {WORK}/env; exec sleep 1000"
    options = [word for name, value in given.items() for word in ("-E", f"{name}={value}")]
    task = submit(machine, *options, "--", "sh", "-c", script)
    arrived = until_written(machine, f"{WORK}/env").split(b"\0")
    for name, value in given.items():
        assert os.fsencode(f"{name}={value}") in arrived

    unit = f"ckptd-task-{task}-1.service"
    public = f"""systemctl show {unit}; systemctl cat {unit}; systemctl status {unit}
    cat /run/systemd/transient/*; grep -rs {SECRET} /run/ckptd /var/lib/ckptd
    ckptctl show {task}; ckptctl events"""
    assert SECRET not in machine.sh(public, user="bob", check=False)
    assert SECRET not in machine.sh(f"systemctl show {unit}; cat /run/systemd/transient/*")
    machine.sh(f"ckptctl cancel {task}; ckptctl wait {task}; true")
    writers = machine.sh(f"stat -c %U {WORK}/ld.*").split()
    assert set(writers) == {"alice"}, "the recorder, which is root's, used a user's environment"
    assert SECRET not in machine.journal()


# --- others -----------------------------------------------------------------------------------


def test_bob_sees_and_steers_nothing_of_alice(machine: Nspawn) -> None:
    script = f"""echo {SECRET}; cd "$CKPTD_DIR"; mkdir -p stage; echo {SECRET} >stage/f
    mv stage ckpt/1; touch {WORK}/said; exec sleep 1000"""
    machine.put(f"{WORK}/script", script)
    task = submit(machine, "-E", f"SECRET={SECRET}", "--", "sh", "-c", f". {WORK}/script")
    until_written(machine, f"{WORK}/said")
    pid = shown(machine, task)["row"]["pid"]
    for verb in ("logs", "show", "explain", "status", "cancel --yes", "kill --yes", "signal TERM",
                 "pause", "hold", "retry", "edit --nice 1", "checkpoint ls", "checkpoint now",
                 "checkpoint show", "clean --yes", "wait --timeout 1s"):  # fmt: skip
        words = verb.partition(" -")
        script = f"ckptctl {words[0]} {task} {words[1].strip()}{words[2]} 2>&1 </dev/null"
        said = machine.run(["timeout", "30", "sh", "-c", script], user="bob", check=False)
        assert said.code not in {0, 64, 124}, f"{verb}: {said.out}"
        assert SECRET not in said.out
    for path in (f"/var/lib/ckptd/output/{task}.log", f"/var/lib/ckptd/tasks/{task}/ckpt/1/f",
                 f"/var/lib/ckptd/start/{task}.1", f"/proc/{pid}/environ"):  # fmt: skip
        assert machine.run(["cat", path], user="bob", check=False).code == 1
    assert SECRET not in machine.sh("ckptctl events 2>&1; ckptctl status --all 2>&1",
                                    user="bob", check=False)  # fmt: skip
    assert (phase(machine, task), shown(machine, task)["row"]["pid"]) == ("running", pid)


def test_mallory_cannot_connect(machine: Nspawn) -> None:
    connect = "import socket; socket.socket(socket.AF_UNIX).connect('/run/ckptd/ctl.sock')"
    done = machine.run(["python3", "-c", connect], user="mallory", check=False)
    assert "PermissionError" in done.err
    for verb in ("status", "submit -- true", "daemon ping"):
        said = machine.run(["sh", "-c", f"cd /; ckptctl {verb}"], user="mallory", check=False)
        assert (said.code, said.out) == (77, "")


FLOOD = """
import resource, socket, sys
count = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (count + 64, count + 64))
held = []
for number in range(count):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(2)
    held.append(client)
    try:
        client.connect("/run/ckptd/ctl.sock")
        client.send(bytes.fromhex("ff00000000000000017f")[: number % 11])
    except OSError:
        pass
print("held", flush=True)
sys.stdin.read()
"""


def test_eight_thousand_connections_of_a_member_harm_nobody_else(machine: Nspawn) -> None:
    task = submit(machine, "--", "sleep", "1000")
    until(lambda: phase(machine, task) == "running", 30)
    pid = shown(machine, task)["row"]["pid"]
    flood = machine.spawn(
        [*BOB, "python3", "-c", FLOOD, str(CONNECTIONS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert flood.stdout is not None
        assert flood.stdout.readline() == b"held\n"
        after = submit(machine, "--", "touch", f"{WORK}/served")
        until_written(machine, f"{WORK}/served")
        assert (phase(machine, task), shown(machine, task)["row"]["pid"]) == ("running", pid)
    finally:
        flood.kill()
        flood.communicate()
    until(lambda: phase(machine, after) == "succeeded", 30)

    def is_served() -> bool:
        return machine.run(["ckptctl", "daemon", "ping"], user="bob", check=False).code == 0

    until(is_served, 30, every_s=0.2)
