"""`logs NAME`: what items printed, lane after lane, or as it comes; one item's alone.

    python -m ckptd.batch logs NAME [--key=KEY] [--lines=N] [--follow [--attended]]

It reads the files that `meter.py` appends to, and stands back from them: a lane that is turned
over meanwhile is followed into its new file. `--attended`: whoever started us knows of a runner to
come for as long as our stdin is open. Read next: `meter.py` (their form).
"""

import contextlib
import os
import re
import select
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Final

from ckptd.batch import place
from ckptd.batch.meter import shown_key
from ckptd.batch.refusal import NOT_FOUND, Refused
from ckptd.batch.report import Asked
from ckptd.streams import heed_reader

_LANE: Final = re.compile(r"lane-(\d+)\.log")
_LOOK_S: Final = 0.3
_HEAD: Final = b"--- "


def logs(words: Sequence[str]) -> int:
    """Print them.

    Raises:
        Refused: an unknown batch, a number that is none, an item that has printed nothing.
    """
    asked = Asked(words, ("key", "lines", "follow", "attended"))
    name = asked.one_name()
    path = place.path_of(name)
    place.load(path)
    with contextlib.suppress(KeyboardInterrupt):
        if asked.has("key"):
            return _one_item(path, asked.last("key"))
        lines = asked.last("lines")
        if lines and not lines.isdecimal():
            raise Refused(f"--lines: not a whole number: {lines!r}")
        followed = _print_lanes(path, int(lines) if lines else None)
        if asked.has("follow"):
            _follow(path, followed, is_attended=asked.has("attended"))
        return 0
    return 130


def _one_item(path: str, key: str) -> int:
    """Print what one item printed in all its tries that the logs still hold."""
    head = _HEAD + shown_key(key).encode(errors="replace") + b": "
    is_known = False
    for lane in _lanes(path):
        with _opened(lane) as files:
            for file in files:
                is_known |= _print_sections(file, head)
    sys.stdout.buffer.flush()
    if not is_known:
        raise Refused(
            f"the logs hold nothing of an item {key!r}",
            "its key is the first column of `ckptctl batch items`; old logs are turned over",
            code=NOT_FOUND,
        )
    return 0


def _print_sections(file: BinaryIO, head: bytes) -> bool:
    """Print what stands below such a head, up to the next head; return whether there was one."""
    is_ours = is_known = False
    for line in file:
        if line.startswith(_HEAD):
            is_ours = line.startswith(head)
            is_known |= is_ours
        if is_ours:
            sys.stdout.buffer.write(line)
    return is_known


def _lanes(path: str) -> list[str]:
    try:
        names = os.listdir(f"{path}/logs")
    except FileNotFoundError:
        return []
    lanes = sorted((int(found[1]), name) for name in names if (found := _LANE.fullmatch(name)))
    return [f"{path}/logs/{name}" for _, name in lanes]


@contextlib.contextmanager
def _opened(lane: str) -> Iterator[list[BinaryIO]]:
    """Open a lane and the older file before it, and yield them oldest first.

    The newer one is opened first: turned over meanwhile, it is still the one that is read.
    """
    with contextlib.ExitStack() as stack:
        files: list[BinaryIO] = []
        for name in (lane, f"{lane}.1"):
            with contextlib.suppress(FileNotFoundError):
                files.insert(0, stack.enter_context(open(name, "rb")))
        is_one = len({os.fstat(file.fileno()).st_ino for file in files}) == 1
        yield files[-1:] if is_one else files


def _print_lanes(path: str, lines: int | None) -> dict[str, tuple[int, int]]:
    """Print what there is by now; return (inode, size) of each lane that was printed."""
    followed: dict[str, tuple[int, int]] = {}
    lanes = _lanes(path)
    out = sys.stdout.buffer
    for lane in lanes:
        if lines is not None and len(lanes) > 1:
            out.write(b"==> %s <==\n" % os.path.basename(lane).encode())
        with _opened(lane) as files:
            for file in files if lines is None else files[-1:]:
                _copy(file, out, lines)
                followed[lane] = (os.fstat(file.fileno()).st_ino, file.tell())
    out.flush()
    return followed


def _copy(opened: BinaryIO, out: BinaryIO, lines: int | None) -> None:
    if lines is None:
        out.writelines(_chunks(opened))
    else:
        out.writelines(deque(opened, maxlen=lines))


def _chunks(opened: BinaryIO) -> Iterator[bytes]:
    while data := opened.read(1 << 16):  # Bound: the file's end of this moment
        yield data


def _follow(path: str, followed: dict[str, tuple[int, int]], *, is_attended: bool) -> None:
    """Print what comes, for as long as a runner holds the batch, or is known to come."""
    is_last = False
    while True:  # Bound: the runner's life, and that of who attends us; then one look more
        for lane in _lanes(path):
            followed[lane] = _print_new(lane, *followed.get(lane, (0, 0)))
        sys.stdout.buffer.flush()
        if is_last:
            return
        is_last = not (is_attended and _is_open(sys.stdin.fileno())) and place.holder(path) is None
        if not is_last:
            heed_reader()
            time.sleep(_LOOK_S)


def _is_open(fd: int) -> bool:
    """Return whether somebody holds the other end: nothing comes out of it but its end."""
    return not select.select([fd], [], [], 0)[0]


def _print_new(lane: str, inode: int, offset: int) -> tuple[int, int]:
    """Print what was appended to a lane; where it was turned over, the rest of the old file too."""
    try:
        with open(lane, "rb") as opened:
            now = os.fstat(opened.fileno()).st_ino
            if now != inode and inode:
                with contextlib.suppress(FileNotFoundError), open(f"{lane}.1", "rb") as old:
                    if os.fstat(old.fileno()).st_ino == inode:
                        old.seek(offset)
                        sys.stdout.buffer.writelines(_chunks(old))
            opened.seek(offset if now == inode else 0)
            sys.stdout.buffer.writelines(_chunks(opened))
            return now, opened.tell()
    except FileNotFoundError:
        return inode, offset
