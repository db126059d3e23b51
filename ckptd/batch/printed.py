"""What items print: told in one piece when they end, and appended to the log of their lane.

    logs/lane-02.log
    --- a.txt: pass, try 1 of run 3, 0.12 s
    12 lines counted

stdout of an item goes to ours, stderr to ours; a log has both. A log is turned over at 16 MiB, and
one old one is kept. Durable: no; results are, see `ledger.py`. Read next: `meter.py`.
"""

import contextlib
import os
from typing import Final

from ckptd.batch.job import Ended
from ckptd.storage.disk import append_all

LOG_BYTES_MAX: Final = 16 << 20
_KEY_CHARS: Final = 200


def shown_key(key: str) -> str:
    """Return a key as the line above an item's output shows it."""
    return "".join(char if char.isprintable() else "?" for char in key[:_KEY_CHARS])


class Printed:
    """The way out for everything that items print."""

    def __init__(self, path: str, run: int) -> None:
        self._folder = f"{path}/logs"
        self._run = run
        self._logs: dict[int, int] = {}  # lane -> descriptor
        self._sizes: dict[int, int] = {}
        self.is_unread = False  # nobody reads our stdout any more
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._folder, 0o700)

    def tell(self, end: Ended, status: str, seconds: float) -> None:
        """Print what an item printed, and log it."""
        if end.out:
            self._to(1, end.out)
        if end.err:
            self._to(2, end.err)
        with contextlib.suppress(OSError):  # a log that cannot be written costs no result
            self._log(end, status, seconds)

    def _to(self, fd: int, data: bytes) -> None:
        ended = data if data.endswith(b"\n") else data + b"\n"
        try:
            append_all(fd, ended)
        except BrokenPipeError:
            self.is_unread = self.is_unread or fd == 1
        except OSError:
            pass  # a full disk behind `>`: the result is what counts

    def _log(self, end: Ended, status: str, seconds: float) -> None:
        job, lane = end.job, end.job.lane
        key = shown_key(job.item.key)
        said = f"{status}, try {job.tries} of run {self._run}, {seconds:.2f} s"
        why = f" ({end.text})" if end.text else ""
        parts = [f"--- {key}: {said}{why}\n".encode(errors="replace")]
        parts += [one if one.endswith(b"\n") else one + b"\n" for one in (end.out, end.err) if one]
        data = b"".join(parts)
        fd = self._opened(lane)
        append_all(fd, data)
        self._sizes[lane] += len(data)

    def _opened(self, lane: int) -> int:
        fd = self._logs.get(lane, -1)
        path = f"{self._folder}/lane-{lane:02d}.log"
        if fd >= 0 and self._sizes[lane] > LOG_BYTES_MAX:
            os.close(fd)
            os.rename(path, f"{path}.1")
            fd = -1
        if fd < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(path, flags, 0o600)
            self._logs[lane] = fd
            self._sizes[lane] = os.fstat(fd).st_size
        return fd

    def close(self) -> None:
        """Close the logs."""
        for fd in self._logs.values():
            os.close(fd)
        self._logs.clear()
