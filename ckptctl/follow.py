"""A task's output: the last lines of it, all of it, or as it grows.

One file holds all attempts, so following it goes on across retries and daemon restarts. Between
them stand the daemon's markers, which `run` takes out: its stdout is the task's own.
"""

import re
import sys
import time
from collections.abc import Callable
from typing import Final

from ckptctl.call import Call
from ckptd.protocol import limits
from ckptd.protocol.messages import Output, OutputChunk, Selector, Wait, Waited
from ckptd.streams import heed_reader

POLL_S: Final = 0.1
POLL_S_MAX: Final = 0.5
TAIL_BYTES_MAX: Final = 64 << 20
MARK: Final = b"--- ckptd: attempt "
_STARTED: Final = re.compile(rb"--- ckptd: (attempt (\d+) started) \S+?(, .*)? ---\n")


class Markers:
    """Takes markers out of a stream; `starts` hears of every attempt after the first."""

    def __init__(self, starts: Callable[[str], None]) -> None:
        self._starts = starts
        self._held = b""
        self._is_new_line = True

    def feed(self, data: bytes) -> bytes:
        """Return what may be printed by now; a line that may become a marker is held back."""
        kept: list[bytes] = []
        lines = (self._held + data).split(b"\n")
        self._held = b""
        for place, text in enumerate(lines):
            is_last = place == len(lines) - 1
            line = text if is_last else text + b"\n"
            if self._is_new_line and line.startswith(MARK[: len(line)]) and line:
                if is_last:
                    self._held = line
                    break
                if line.startswith(MARK):
                    self._tell(line)
                    continue
            kept.append(line)
            self._is_new_line = not is_last or (self._is_new_line and not line)
        return b"".join(kept)

    def rest(self) -> bytes:
        """Return what was held back once no more comes."""
        return self._held

    def _tell(self, line: bytes) -> None:
        found = _STARTED.fullmatch(line)
        if found is not None and int(found[2]) > 1:
            self._starts((found[1] + (found[3] or b"")).decode(errors="replace"))


def follow(
    call: Call, task: int, offset: int, *, once: bool = False, markers: Markers | None = None
) -> int:
    """Copy the output from `offset` to stdout, until the task is done (once: until its end now).

    Returns the size of the output.
    """
    pause_s, is_over = POLL_S, once
    while True:  # Bound: ends with the task, or (once) with the file's size of now
        chunk = call.wait_for("output", Output(task, offset), OutputChunk)
        if chunk.data:
            _copy(chunk.data if markers is None else markers.feed(chunk.data))
            offset, pause_s = chunk.offset + len(chunk.data), POLL_S
        if chunk.done or (is_over and offset >= chunk.size):
            _copy(b"" if markers is None else markers.rest())
            return chunk.size
        if offset >= chunk.size:
            heed_reader()
            is_over = _ends_within(call, task, pause_s)
            pause_s = min(POLL_S_MAX, pause_s * 1.5)


def _copy(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _ends_within(call: Call, task: int, pause_s: float) -> bool:
    """Wait a moment for the task's end, so that following it ends at once."""
    started = time.monotonic()
    asked = Wait(Selector(ids=(task,)), hold_s=pause_s)
    is_over = call.wait_for("wait", asked, Waited).met
    if not is_over:
        time.sleep(max(0.0, started + pause_s - time.monotonic()))  # a daemon may hold shorter
    return is_over


def tail(call: Call, task: int, lines: int) -> int:
    """Return the offset at which the last `lines` lines begin."""
    chunk_bytes = limits.OUTPUT_CHUNK_BYTES_MAX
    size = end = call.ask("output", Output(task, 0, 1), OutputChunk).size
    wanted, is_first = lines, True
    while end > 0 and size - end < TAIL_BYTES_MAX:
        start = max(0, end - chunk_bytes)
        data = call.ask("output", Output(task, start, end - start), OutputChunk).data
        if is_first and data.endswith(b"\n"):
            wanted += 1  # the end of the last line begins no new one
        is_first = False
        place = len(data)
        while wanted > 0 and (place := data.rfind(b"\n", 0, place)) >= 0:
            wanted -= 1
        if wanted == 0:
            return start + place + 1
        end = start
    return end if lines else size
