"""What wakes the loop besides sockets and processes: signals, and other threads' results."""

import os
import signal
from types import FrameType


class Wake:
    """One pipe that signals and threads write to, and the flags that they leave."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.stop_asked = False
        self.reload_asked = False

    def install(self) -> None:
        """Take SIGTERM and SIGINT as "stop", SIGHUP as "reload"; SIGPIPE is an error number."""
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGHUP, self._reload)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stop_asked = True

    def _reload(self, _number: int, _frame: FrameType | None) -> None:
        self.reload_asked = True

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._read

    def up(self) -> None:
        """Wake the loop; any thread may."""
        try:
            os.write(self._write, b"\0")
        except BlockingIOError:
            return  # it is full: the loop will wake

    def clear(self) -> None:
        """Empty the pipe."""
        try:
            os.read(self._read, 4_096)
        except BlockingIOError:
            return
