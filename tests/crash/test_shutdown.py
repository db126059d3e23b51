"""The end of the daemon with real tasks: who saves, who is killed, and who starts again."""

from pathlib import Path

from ckptd.daemon.ending import STOPPING_FLAG
from tests.daemon_fixture import LiveDaemon, StartDaemon, is_alive
from tests.waiting import until

SAVES_ON_TERM = """
import os, signal, sys
private = os.environ["CKPTD_DIR"]
def save(*_):
    open(private + "/stage/count", "w").write("47")
    os.rename(private + "/stage", private + "/ckpt/1")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
name, attempt, last = sys.argv[1], os.environ["CKPTD_ATTEMPT"], os.environ["CKPTD_LAST"]
count = open(last + "/count").read() if last else "0"
open(name + ".tmp", "w").write(f"{os.getpid()} {count}")
os.rename(name + ".tmp", f"{name}.{attempt}")
while True:
    signal.pause()
"""
"""Says `PID COUNT` in the file NAME.ATTEMPT; saves the count 47 when it is told to stop."""

MANY = "[groups.default]\nparallel = 10\n"
DEAF = 'trap "" TERM; echo $$ >deaf.$CKPTD_ATTEMPT; while :; do sleep 0.1; done'


def began(daemon: LiveDaemon, name: str) -> tuple[int, str]:
    pid, _, rest = daemon.wait_file(name).strip().partition(" ")
    return int(pid), rest


def test_a_shutdown_with_checkpoints_waits_for_every_kind_of_task_and_all_resume(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon(config=MANY)
    tasks = [
        daemon.submit_python(SAVES_ON_TERM, "saves"),
        daemon.submit_python(SAVES_ON_TERM, "paused"),
        daemon.submit("sh", "-c", DEAF, options=("--grace", "1s")),
    ]
    pids = [began(daemon, f"{name}.1")[0] for name in ("saves", "paused", "deaf")]
    daemon.ctl("pause", str(tasks[1]))
    daemon.wait_phase(tasks[1], "paused")

    done = daemon.ctl("daemon", "shutdown", "--tasks=checkpoint", "--wait")

    assert "has stopped" in done.stderr
    assert not any(map(is_alive, pids))
    assert daemon.process is not None
    assert daemon.process.wait(10) == 0
    daemon.process = None
    daemon.start()
    assert [began(daemon, f"{name}.2")[1] for name in ("saves", "paused")] == ["47", "47"]
    assert began(daemon, "deaf.2")[0] not in pids
    ends = [daemon.detail(task)["attempts"][0]["cause"] for task in tasks]
    assert ends == ["shutdown"] * 3


def test_sigterm_ends_the_tasks_only_where_the_machine_is_going_down(daemon: LiveDaemon) -> None:
    daemon.submit_python(SAVES_ON_TERM, "saves")
    pid, _ = began(daemon, "saves.1")
    assert daemon.stop() == 0
    assert is_alive(pid)

    daemon.start()
    flag = Path(daemon.run) / STOPPING_FLAG
    flag.touch()
    assert daemon.stop() == 0
    assert not is_alive(pid)

    daemon.start()
    assert not flag.exists()
    assert began(daemon, "saves.2")[1] == "47"


def test_a_shutdown_reaches_tasks_that_the_daemon_is_about_to_adopt(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon(config=MANY)
    for number in range(8):
        daemon.submit_python(SAVES_ON_TERM, f"saves{number}")
    pids = [began(daemon, f"saves{number}.1")[0] for number in range(8)]
    daemon.kill9()
    daemon.start(wait_ready=False)
    shutdown = ("daemon", "shutdown", "--tasks=checkpoint", "--wait")
    until(lambda: daemon.ctl(*shutdown, check=False).returncode == 0)  # 2: it does not listen yet
    assert daemon.process is not None
    assert daemon.process.wait(20) == 0
    daemon.process = None
    assert not any(map(is_alive, pids))
