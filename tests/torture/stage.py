"""The stage: one real daemon that is killed and started again, and the boot that it believes in.

A power loss of processes: all are killed, the runtime directory is emptied as a tmpfs would be,
and the next daemon and its tasks read another boot id. That needs root (a mount namespace of
their own); without it everything is killed and the boot stays the same.
"""

import json
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.daemon_fixture import LiveDaemon, kill_quietly, processes_of
from tests.waiting import until

_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
_AS_BOOT: Final = f'mount --bind "$0" {_BOOT_ID} && exec "$@"'
RETENTION: Final = {
    False: "",
    True: "[retention]\nfinished_max = 400\nage_s = 30.0\ncheckpoints_age_s = 5.0\n",
}
CONFIG: Final = """
[task]
retries = 1000
ask_s = 0.2
grace_s = 0.5
[retry]
backoff_s = 0.02
backoff_max_s = 0.3
transient_backoff_s = 0.02
transient_backoff_max_s = 0.3
stalls_max = 100000
crashes_max = 100000
host_deaths_max = 100000
interruptions_max = 100000
attempts_max = 100000
[wal]
segment_bytes = 8388608
snapshot_every_bytes = 8388608
[groups.default]
parallel = 6
"""
SETTLED_S: Final = 120.0


class Stage:
    """The daemon, the evidence beside it, and who has been killed."""

    def __init__(self, *, forgets: bool) -> None:
        self.daemon = LiveDaemon(config=CONFIG + RETENTION[forgets])
        self.evidence = self.daemon.root / "evidence"
        (self.evidence / "locks").mkdir(parents=True)
        self.daemon.env["EVIDENCE"] = str(self.evidence)
        self.forgets = forgets
        self.boots = 0
        self.starts = 0
        self.changes = 0  # that were answered: by each the daemon remembers more, up to a bound
        self.deaths: list[str] = []  # of the daemon, by its own hand: each is a violation
        self._notes = threading.Lock()
        self.power = threading.Lock()  # held while it is off: nobody begins anything
        self._boot()

    def _boot(self) -> None:
        """Choose the id of the next boot."""
        if os.geteuid() == 0 and shutil.which("unshare"):
            place = self.daemon.root / f"boot.{self.boots}"
            place.write_text(f"{uuid.uuid4()}\n")
            self.daemon.prefix = ["unshare", "-m", "sh", "-c", _AS_BOOT, str(place)]
        self.boots += 1

    def start(self) -> None:
        """Start the daemon, and do not wait for anything: it may be killed while it replays."""
        self.daemon.start(wait_ready=False)
        self.starts += 1

    def revive(self) -> bool:
        """Start the daemon again where it is not there; tell whether it was not."""
        process = self.daemon.process
        if process is not None:
            code = process.poll()
            if code is None:
                return False
            if code != -signal.SIGKILL:
                self.deaths.append(f"the daemon ended by itself, with {code}")
            self.daemon.process = None
        self.start()
        return True

    def kill_daemon(self) -> None:
        """SIGKILL the daemon; `revive` starts the next one."""
        if self.revive():
            return
        self.daemon.kill9()

    def power_loss(self) -> int:
        """SIGKILL everything and begin another boot; return how many were killed."""
        if self.daemon.process is not None and self.daemon.process.poll() is None:
            self.daemon.kill9()
        with self.power:
            killed = self.clear()
            shutil.rmtree(self.daemon.run, ignore_errors=True)
            self._boot()
        return killed

    def clear(self) -> int:
        """SIGKILL whoever is left, until nobody is; return how many there were at first."""
        killed = self._kill_all()
        until(lambda: not self._kill_all(), SETTLED_S, every_s=0.005)
        return killed

    def _kill_all(self) -> int:
        left = list(processes_of(self.daemon.root))
        for pid in left:
            self.note_strike(pid, identity(pid), "power")
            kill_quietly(pid)
        return len(left)

    def note(self, file: str, what: dict[str, Any]) -> None:
        """Append one line of JSON to the evidence."""
        with self._notes, (self.evidence / f"{file}.jsonl").open("a") as lines:
            lines.write(json.dumps(what) + "\n")

    def note_strike(self, pid: int, who: dict[str, Any], how: str) -> None:
        """Write down who is killed, and when."""
        self.note("strikes", {"pid": pid, **who, "how": how, "at_ns": time.time_ns()})

    def processes(self) -> Iterator[int]:
        """Yield everyone who belongs to this stage."""
        return processes_of(self.daemon.root)

    def asked(self, *args: str) -> Any:
        """Return what ckptctl says, as JSON."""
        return self.daemon.json(*args)

    @property
    def root(self) -> Path:
        """Where all of it lies."""
        return self.daemon.root


def identity(pid: int) -> dict[str, Any]:
    """Return who a process is: ticks, name, task and attempt; {} where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            head, _, tail = file.read().rpartition(b")")
        with open(f"/proc/{pid}/environ", "rb") as file:
            words = file.read().split(b"\0")
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            line = file.read().replace(b"\0", b" ").decode(errors="replace")[:300]
    except OSError:
        return {}
    pairs = (word.decode(errors="replace").partition("=") for word in words)
    env = {key: value for key, _, value in pairs}
    return {
        "ticks": int(tail.split()[19]),
        "name": head.partition(b"(")[2].decode(errors="replace"),
        "task": int(env.get("CKPTD_TASK_ID") or 0),
        "attempt": int(env.get("CKPTD_ATTEMPT") or 0),
        "work": env.get("WORK", ""),
        "line": line,
    }


def role(who: dict[str, Any]) -> str:
    """Tell what a process is to ckptd."""
    line = who.get("line", "")
    if who.get("name") in ("ckptd-shim", "ckptd-parent"):
        return str(who["name"]).removeprefix("ckptd-")
    if "-m ckptd " in line:
        return "daemon"
    if "ckptd.batch" in line or "batch/host" in line or "batch run" in line:
        return "batch"
    if "ckptctl" in line:
        return "client"
    if who.get("task") or who.get("work"):
        return "task"
    return "other"
