"""`status --watch`: the list, redrawn in place, with a bar for every task that runs.

Drawn on the alternate screen in one write per frame, so that nothing flickers and the terminal is
as it was afterwards, whatever ends it: q, Ctrl-C, a signal or an error.
"""

import errno
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from ckptctl import words
from ckptctl.call import Call
from ckptctl.picture import Picture, empty_text, picture, task_columns, totals_text
from ckptctl.render import Column, Style, shorten, table_lines
from ckptctl.selectors import ACTIVE
from ckptd.protocol.errors import BadRequest, Unavailable
from ckptd.protocol.messages import TaskRow
from ckptd.streams import UNREAD, Lost

ENTER: Final = "\x1b[?1049h\x1b[?25l"
LEAVE: Final = "\x1b[?25h\x1b[?1049l"
FRAME: Final = "\x1b[?2026h\x1b[H", "\x1b[J\x1b[?2026l"  # synchronised where the terminal can
EVERY_S_MIN: Final = 0.1
ANSWER_S: Final = 1.0  # longer, and keys and resizing would feel dead while no daemon answers
BAR_CELLS: Final = 20
ROOMY: Final = 110  # columns of a terminal that has room for long bars


def watch(call: Call) -> int:
    """Redraw until q or Ctrl-C."""
    every_s = max(EVERY_S_MIN, call.args.watch)
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        raise BadRequest("--watch needs a terminal", "for programs: ckptctl events -f -o jsonl")
    call.client.timeout_s = min(call.client.timeout_s, ANSWER_S)
    try:
        return _watched(call, every_s)
    except (OSError, termios.error) as gone:
        if gone.args[0] != errno.EIO:
            raise
        raise Lost("the terminal is gone", UNREAD) from gone


def _watched(call: Call, every_s: float) -> int:
    with _screen() as wake:
        shown, problem = Picture([], {}), ""
        while True:  # Bound: ends by q or Ctrl-C
            try:
                shown, problem = picture(call), ""
            except Unavailable as error:
                problem = error.message
            size = os.get_terminal_size(sys.stdout.fileno())
            draw(frame(shown, call.style, size.columns, size.lines, problem))
            if _pressed_q(wake, every_s):
                return 0


@contextmanager
def _screen() -> Iterator[int]:
    """Hold the alternate screen; yields a descriptor that is readable after a resize."""
    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)
    wake, alarm = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def leave(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    old = signal.set_wakeup_fd(alarm)
    signal.signal(signal.SIGWINCH, lambda *_: None)
    signal.signal(signal.SIGTERM, leave)
    try:
        tty.setcbreak(stdin)
        os.write(1, ENTER.encode())
        yield wake
    finally:
        os.write(1, LEAVE.encode())
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
        signal.set_wakeup_fd(old)


def _pressed_q(wake: int, every_s: float) -> bool:
    """Wait for the next frame's time, a resize or a key; return whether to leave."""
    stdin = sys.stdin.fileno()
    until = time.monotonic() + every_s
    while (left_s := until - time.monotonic()) > 0:
        ready, _, _ = select.select([stdin, wake], [], [], left_s)
        if wake in ready:
            os.read(wake, 4096)
            return False
        if stdin in ready:
            keys = os.read(stdin, 64)
            return not keys or keys[:1] in b"qQ\x1b\x04"
    return False


def draw(lines: list[str]) -> None:
    """Put a frame on the screen in one write."""
    body = "\r\n".join(f"{line}\x1b[K" for line in lines)
    data = f"{FRAME[0]}{body}{FRAME[1]}".encode()
    while data:  # Bound: each write takes bytes
        data = data[os.write(1, data) :]


def frame(shown: Picture, style: Style, width: int, height: int, problem: str) -> list[str]:
    """Return the lines of one frame, at most `height` of at most `width` cells."""
    now_ns = time.time_ns()
    style = msgspec.structs.replace(style, width=width, has_color=style.has_color)
    cells = BAR_CELLS if width >= ROOMY else BAR_CELLS // 2
    columns = [_barred(c, cells) for c in task_columns(now_ns) if not c.is_wide]
    body = table_lines(columns, shown.rows, style) if shown.rows else [empty_text(shown)]
    room = max(1, height - 2)
    if len(body) > room:
        hidden = len(body) - room + 1
        body = [*body[: room - 1], shorten(f"... {hidden} more, not enough lines", width)]
    left = problem or totals_text(shown) or "no tasks"
    right = f"{time.strftime('%H:%M:%S')}  q quits"
    space = width - len(right) - 2
    status = f"{shorten(left, max(0, space)):<{max(0, space)}}  {right}"
    paint = ("\x1b[31m" if problem else "\x1b[2m", "\x1b[0m") if style.has_color else ("", "")
    return [f"{paint[0]}{shorten(status, width)}{paint[1]}", "", *body][:height]


def _barred(column: Column, cells: int) -> Column:
    if column.key != "progress":
        return column
    return Column("progress", lambda row: _bar(row, cells), drop=1, paint=lambda _row: "32")


def _bar(row: TaskRow, cells: int) -> str:
    if row.phase not in ACTIVE:
        return ""
    eta = words.eta_text(row)
    bar = words.bar_text(row, cells)
    return f"{bar} {eta} left" if eta else bar
