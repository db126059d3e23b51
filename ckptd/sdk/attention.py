"""What is asked of this attempt while it runs: to stop, to save; and waits that such a wish ends.

The daemon writes `control.json`, then sends SIGTERM. The handler sets a flag and writes one byte
to a pipe, nothing else: saving happens at the next safe point, never inside a handler. A look
costs one stat(2). Stdlib only. Read next: `surroundings.py` (the file), `work.py` (safe points).
"""

import os
import select
import signal
import threading
import time
from types import FrameType
from typing import Any

from ckptd.sdk.surroundings import Surroundings


class Attention:
    """The stop reason, the grace and the requests to save of one attempt."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._seen: tuple[int, int] = (0, 0)
        self._control: dict[str, Any] = {}
        self._is_signalled = False
        self._before: Any = None
        self._saves_taken = 0  # the file is of this attempt alone: see `taskdir.prepare`
        self.wake_fd, self._byte_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def listen(self) -> None:
        """Take SIGTERM for a wish to stop; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._is_signalled = True
        os.write(self._byte_fd, b"!")  # never drained: every wait from now on ends at once

    def reason(self) -> str:
        """Return why to stop, or an empty text."""
        asked = str(self._read().get("stop") or "")
        return asked or ("terminated" if self._is_signalled else "")

    def grace_left_s(self) -> float:
        """Return the seconds until SIGKILL; infinite where nobody asked to stop."""
        deadline_s = self._read().get("deadline")
        if not isinstance(deadline_s, int | float) or not self.reason():
            return float("inf")
        return max(0.0, deadline_s - time.time())

    def takes_save(self) -> bool:
        """Return whether a checkpoint was asked for since this last returned True."""
        asked = self._saves_asked()
        if asked <= self._saves_taken:
            return False
        self._saves_taken = asked
        return True

    def _saves_asked(self) -> int:
        asked = self._read().get("checkpoint")
        return asked if isinstance(asked, int) else 0

    def _read(self) -> dict[str, Any]:
        try:
            found = os.stat(self._around.control_path)
        except OSError:
            return {}
        seen = (found.st_ino, found.st_mtime_ns)
        if seen != self._seen:
            self._control, self._seen = self._around.control(), seen
        return self._control

    def wait(self, seconds: float) -> None:
        """Wait so long, or until a signal asks to stop."""
        waker = select.poll()  # not select(2): a task may have more than 1,024 files open
        waker.register(self.wake_fd, select.POLLIN)
        waker.poll(max(0.0, seconds) * 1e3)

    def close(self) -> None:
        """Give the pipe back; the handler, if it is ours, goes too."""
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) == self._on_signal:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
        os.close(self.wake_fd)
        os.close(self._byte_fd)
