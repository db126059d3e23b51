"""Large files: the daemon answers while it seals them; kill -9 of a save costs no generation."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.storage import blobs
from tests.daemon_fixture import LiveDaemon
from tests.raw_client import RawClient
from tests.task_world import TaskWorld
from tests.waiting import let_pass, until

BIG_BYTES = 320 << 20  # mostly a hole, as large as one may be: hashing takes a while, writing not
PUBLISH = """
import os, socket, sys, time
stage = os.environ["CKPTD_DIR"] + "/stage"
with open(stage + "/weights", "wb") as file:
    file.write(os.urandom(20 << 20))
    file.truncate(int(sys.argv[1]))
os.rename(stage, os.environ["CKPTD_DIR"] + "/ckpt/1")
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
    out.sendto(b"CHECKPOINT=1", os.environ["NOTIFY_SOCKET"])
time.sleep(1000)
"""
TRAIN = """
import os, sys
from ckptd.sdk.save import save
from ckptd.storage.blobs import newest_sealed
home, n = os.environ["CKPTD_DIR"], int(sys.argv[1])
header = {"attempt": int(os.environ["CKPTD_ATTEMPT"])}
while True:
    with open(home + "/stage/state", "w") as file:
        file.write(str(n))
    is_first = not newest_sealed(home, os.getuid())[0]
    if is_first:
        with open(home + "/stage/weights", "wb") as file:
            file.write(b"w" * 300_000)
    print(n, save(home, [], header, carry=[] if is_first else ["weights"]).seq, flush=True)
    n += 1
"""


def has_open(pid: int, path: Path) -> bool:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            if os.readlink(f"/proc/{pid}/fd/{fd}") == str(path):
                return True
        except OSError:  # closed meanwhile
            continue
    return False


def test_the_daemon_answers_while_it_seals_a_large_file(daemon: LiveDaemon) -> None:
    task = daemon.submit_python(PUBLISH, str(BIG_BYTES))
    generation = daemon.state / "tasks" / str(task) / "ckpt" / "1"
    until(lambda: has_open(daemon.pid, generation / "weights"), every_s=0.001)
    answered = 0
    with RawClient(daemon.endpoint) as client:
        while not (generation / "MANIFEST.json").exists():  # Bound: the seal ends
            client.ask("status", {"select": {"ids": [task]}})
            answered += not (generation / "MANIFEST.json").exists()

    assert answered, "an answer came only after the seal: the loop was held"
    until(lambda: daemon.row(task)["checkpoint"] == 1)


@pytest.fixture
def world(tmp_path: Path) -> TaskWorld:
    return TaskWorld(tmp_path)


def test_killed_while_carrying_on_the_newest_is_whole_and_no_older_than_answered(
    world: TaskWorld, rounds: int
) -> None:
    n = 1
    for _ in range(rounds):
        with subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(n)],
            env=world.environ(),
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            told = process.stdout.readline()
            let_pass(random.uniform(0, 0.02))
            process.kill()
            told += process.stdout.read()
        answered = told[: told.rfind("\n")].splitlines()[-1]
        answered_n, answered_seq = map(int, answered.split())
        world.begin()

        found = world.newest()

        assert found.warning == found.problem == ""
        assert found.seq >= answered_seq
        assert Path(found.path, "weights").read_bytes() == b"w" * 300_000
        n = int(Path(found.path, "state").read_text())
        assert answered_n <= n <= answered_n + 1
        blobs.prune(world.dir, world.uid)
        assert len(os.listdir(world.path("ckpt"))) <= 2
        n += 1
