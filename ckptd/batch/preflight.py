"""Asked before a batch starts and before it goes on after a wait: may it?

    exit 0        go
    exit 2 or 75  wait: as many seconds as stand alone on its last line of output, else a minute
    others        no: nothing is run, and the batch fails with what it said

A function is asked the same way: nothing or True means go, a number is seconds to wait, so is
RateLimited(retry_after=...); any other exception is a no. Read next: `runner.py`.
"""

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import Final, NamedTuple

from ckptd.batch.functions import host_command
from ckptd.batch.job import Setting
from ckptd.batch.spec import Knobs
from ckptd.sdk.rate import parse_retry_after

WAIT_S: Final = 60.0
TIMEOUT_S: Final = 120.0
_SAID_BYTES_MAX: Final = 64 << 10
_WAITS: Final = frozenset((2, 75))


class Answer(NamedTuple):
    """What the preflight said; `wait_s` above 0 means not yet, a text means no."""

    wait_s: float = 0.0
    refusal: str = ""


class Preflight:
    """One question under way: a process of its own, watched by the runner's epoll."""

    def __init__(self, setting: Setting, knobs: Knobs, now_s: float) -> None:
        """Start it.

        Raises:
            OSError: it cannot be started.
        """
        command = knobs.preflight
        if isinstance(command, str):
            command = host_command(knobs.interpreter or sys.executable, "--preflight", command)
        # A file, not a pipe: nobody reads before the end, and it may say more than a pipe holds.
        self._said = tempfile.TemporaryFile(dir=setting.path)  # noqa: SIM115 (closed in `answer`)
        try:
            self._process = subprocess.Popen(
                command,
                cwd=setting.cwd,
                env=setting.env,
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        except OSError:
            self._said.close()
            raise
        self.fd = os.pidfd_open(self._process.pid)
        self.ends_s = now_s + TIMEOUT_S
        self._is_late = False

    def watch(self, epoll: select.epoll) -> None:
        """Let the end wake the loop."""
        epoll.register(self.fd, select.EPOLLIN)

    def expire(self) -> None:
        """End it: its time is over."""
        self._is_late = True
        self.stop()

    def stop(self) -> None:
        """Kill it with all that it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return

    def answer(self, epoll: select.epoll) -> Answer:
        """Return what it said, once its descriptor woke us."""
        epoll.unregister(self.fd)
        self.stop()
        code = self._process.wait()
        size = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, size - _SAID_BYTES_MAX))
        said = self._said.read(_SAID_BYTES_MAX)
        self._said.close()
        os.close(self.fd)
        lines = said.decode(errors="replace").strip().splitlines()
        last = lines[-1].strip() if lines else ""
        if self._is_late:
            return Answer(refusal=f"the preflight took more than {TIMEOUT_S:g} s")
        if code == 0:
            return Answer()
        if code in _WAITS:
            return Answer(wait_s=_seconds(last))
        how = f"exited with {code}" if code > 0 else f"was killed by signal {-code}"
        return Answer(refusal=f"the preflight {how}" + (f": {last[:300]}" if last else ""))


def _seconds(text: str) -> float:
    try:
        return parse_retry_after(text, time.time()) or WAIT_S
    except ValueError:
        return WAIT_S
