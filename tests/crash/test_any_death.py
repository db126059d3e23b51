"""Promise 3 under chance: any processes of ours die at any moment; never two, never none."""

import os
import random
import shutil

import pytest

from tests.daemon_fixture import LiveDaemon, StartDaemon, kill_quietly, processes_of
from tests.raw_client import RawClient
from tests.waiting import let_pass, until

ALONE = """
exec 9>>"lock.$CKPTD_TASK_ID"
until flock -n -E 9 9; do  # 9: somebody has it; anything else: flock itself was hit
  [ $? -eq 9 ] && echo "$CKPTD_TASK_ID.$CKPTD_ATTEMPT" >> overlap && break
done
echo "$CKPTD_ATTEMPT" >> "began.$CKPTD_TASK_ID"
sleep 0.05
echo "$CKPTD_ATTEMPT" >> "done.$CKPTD_TASK_ID"
"""
"""`sleep` inherits the lock: an orphan of an earlier attempt counts as a second instance."""
ENV = {"PATH": os.environ["PATH"]}
CONFIG = (  # one strike may hit a task twice: the daemon that goes down last starts it again before
    "[task]\nretries = 9\n[retry]\nbackoff_s = 0.02\ntransient_backoff_s = 0.02\n"
    "host_deaths_max = 9\nstalls_max = 9\ncrashes_max = 9\n"
)


def strike(daemon: LiveDaemon, chance: random.Random) -> str:
    """SIGKILL some of the daemon's, the supervisors' and the task's processes; tell which.

    A daemon that was hit is started again.
    """
    alive = sorted(processes_of(daemon.root))
    victims = chance.sample(alive, chance.randint(1, len(alive)))
    for pid in victims:
        kill_quietly(pid)
    if daemon.pid in victims:
        daemon.restart()
        return f"{len(victims)} of {len(alive)} with the daemon"
    return f"{len(victims)} of {len(alive)} without the daemon"


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock(1) of util-linux")
@pytest.mark.timeout(1800)
def test_whatever_dies_at_whatever_moment_one_instance_comes_to_its_end(
    start_daemon: StartDaemon, rounds: int
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    daemon = start_daemon(config=CONFIG)
    for number in range(rounds):
        with RawClient(daemon.endpoint) as client:
            spec = {"argv": ["/bin/sh", "-c", ALONE], "cwd": str(daemon.work), "env": ENV}
            (task,) = client.ask("submit", {"tasks": [spec]})["ids"]
        let_pass(chance.choice((0.008, 0.08)) * chance.random())
        struck = strike(daemon, chance)
        told = f"seed {seed}, round {number}, task {task}, killed {struck}"

        def has_ended(task: int = task) -> bool:
            return daemon.row(task)["phase"] not in ("queued", "waiting", "starting", "running")

        try:
            until(has_ended, 20.0, every_s=0.02)
        except TimeoutError as late:
            log = daemon.log.read_text()[-3000:]
            raise TimeoutError(f"{told}: {daemon.row(task)}\n{log}") from late
        detail = daemon.detail(task)
        assert detail["row"]["phase"] == "succeeded", f"{told}: {detail}"
        assert not (daemon.work / "overlap").exists(), f"{told}: {detail['attempts']}"
        assert (daemon.work / f"done.{task}").exists(), told
