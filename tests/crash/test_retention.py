"""A real daemon gives checkpoints back once their task succeeded: after kill -9, on any day."""

from pathlib import Path

from tests.daemon_fixture import LiveDaemon, StartDaemon
from tests.waiting import until

TASK = """
import os, subprocess, sys
from ckptd.sdk.save import save
with open("weights", "wb") as file:
    file.write(os.urandom(1 << 20))
fresh = not os.path.exists(os.environ["CKPTD_DIR"] + "/journal")
print("resumed from", os.environ["CKPTD_SEQ"], "journal", not fresh, flush=True)
subprocess.run([sys.executable, "-m", "ckptd.sdk.ckpt", "item", "a", "pass"], check=True)
save(os.environ["CKPTD_DIR"], ["weights"], {"attempt": int(os.environ["CKPTD_ATTEMPT"])})
sys.exit(int(sys.argv[1]))
"""


def keep_for(daemon: LiveDaemon, seconds: float) -> None:
    daemon.config.write_text(
        f'[daemon]\nstate_dir = "{daemon.state}"\nrun_dir = "{daemon.run}"\n'
        f"[retention]\ncheckpoints_age_s = {seconds}\n"
    )
    daemon.ctl("daemon", "reload")


def ckpt(daemon: LiveDaemon, task: int) -> Path:
    return daemon.state / "tasks" / str(task) / "ckpt"


def test_what_succeeded_gives_its_checkpoints_back_and_keeps_result_and_audit(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon()
    done, failed = (daemon.submit_python(TASK, code) for code in ("0", "1"))
    daemon.wait_phase(done, "succeeded")
    daemon.wait_phase(failed, "failed", "waiting", "quarantined")
    assert daemon.row(done)["checkpoint"] == 1
    assert (ckpt(daemon, done) / "00000001" / "weights").stat().st_size == 1 << 20

    keep_for(daemon, 0.001)
    until(lambda: not ckpt(daemon, done).exists())

    assert (ckpt(daemon, failed) / "00000001" / "weights").exists()
    assert daemon.row(done)["checkpoint"] == 0
    assert list((daemon.state / "tasks" / str(done) / "journal").iterdir())
    assert "resumed from 0" in daemon.ctl("logs", str(done)).stdout
    assert "starts from nothing" in daemon.ctl("explain", str(done)).stdout

    keep_for(daemon, 86_400)
    daemon.ctl("retry", str(done))
    until(lambda: daemon.row(done)["attempt"] == 2)
    daemon.wait_phase(done, "succeeded")
    said = daemon.ctl("logs", str(done)).stdout
    assert said.count("resumed from 0 journal False") == 2, said
    assert ckpt(daemon, done).exists()


def test_a_daemon_killed_between_the_record_and_the_deletion_deletes_at_its_next_start(
    start_daemon: StartDaemon,
) -> None:
    daemon = start_daemon()
    done, other = (daemon.submit_python(TASK, "0") for _ in range(2))
    daemon.wait_phase(done, "succeeded")
    daemon.wait_phase(other, "succeeded")
    kept = ckpt(daemon, done) / "00000001" / "weights"
    weights = kept.read_bytes()
    keep_for(daemon, 0.001)
    until(lambda: not ckpt(daemon, done).exists())
    daemon.kill9()
    kept.parent.mkdir(parents=True, mode=0o700)  # as if the deletion had not come to it
    ckpt(daemon, done).chmod(0o700)
    kept.write_bytes(weights)

    daemon.start()

    until(lambda: not ckpt(daemon, done).exists())
    assert daemon.row(done)["phase"] == "succeeded"
