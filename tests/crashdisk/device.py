"""The lying disk: a device whose volatile cache is a log, so that any power cut can be played.

    Tape     what happened: writes, flushes, and marks of what was promised meanwhile, in order
    Content  what a disk holds: blocks over an image that nobody changes
    Device   a Content behind FUSE, recorded on a Tape if wanted, failing or stalling if told to

Crash: before a flush returned, any subset of the writes since the flush before may be on the
disk: file data torn by sectors of 512 bytes, everything else by blocks of 4,096.
"""

import errno
import random
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tests.fakes.fuse_file import BLOCK_BYTES, FuseFile

SECTOR_BYTES = 512
SECTORS = BLOCK_BYTES // SECTOR_BYTES
Kind = Literal["write", "flush"]
FOR_EVER = 1 << 60


class Write(NamedTuple):
    """Bytes that came to the cache."""

    offset: int
    data: bytes


class Flush(NamedTuple):
    """Everything before it is on the disk."""


class Mark(NamedTuple):
    """What its user had promised, and to whom, when the disk stood here."""

    promise: Any


Event = Write | Flush | Mark


def told(tape: list[Event]) -> Iterator[str]:
    """Yield a tape as lines of text, each with its position."""
    for at, event in enumerate(tape):
        match event:
            case Write(offset, data):
                yield f"{at} write {len(data)} bytes at {offset}, crc32 {zlib.crc32(data):08x}"
            case Flush():
                yield f"{at} flush"
            case Mark(promise):
                yield f"{at} {promise}"


class Content:
    """Blocks over an image, with layers between that are only looked at."""

    def __init__(self, image: bytes, *below: dict[int, bytes]) -> None:
        """`below`: the lowest layer first."""
        self.image = image
        self.below = below
        self.blocks: dict[int, bytes] = {}

    def block(self, number: int) -> bytes:
        """Return a block as it stands."""
        for layer in (self.blocks, *reversed(self.below)):
            found = layer.get(number)
            if found is not None:
                return found
        return self.image[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes."""
        first, last = offset // BLOCK_BYTES, (offset + size - 1) // BLOCK_BYTES
        data = b"".join(self.block(number) for number in range(first, last + 1))
        start = offset - first * BLOCK_BYTES
        return data[start : start + size]

    def write(self, offset: int, data: bytes) -> None:
        """Replace bytes."""
        at = 0
        while at < len(data):  # Bound: the data
            number, start = divmod(offset + at, BLOCK_BYTES)
            part = data[at : at + BLOCK_BYTES - start]
            if len(part) < BLOCK_BYTES:
                old = self.block(number)
                part = old[:start] + part + old[start + len(part) :]
            self.blocks[number] = part
            at += BLOCK_BYTES - start


class Device(FuseFile):
    """A Content as a file that a loop device can be put on."""

    def __init__(self, node: Path, content: Content) -> None:
        self.content = content
        self.tape: list[Event] | None = None
        self.requests_held = threading.Semaphore(0)  # released once for each that stalls
        self._gate = threading.Event()
        self._gate.set()
        self._failures: dict[Kind, int] = {"write": 0, "flush": 0}
        super().__init__(node, len(content.image))

    def fail(self, *kinds: Kind, count: int = FOR_EVER) -> None:
        """Answer the next `count` requests of each of these kinds with EIO."""
        for kind in kinds:
            self._failures[kind] = count

    def heal(self) -> None:
        """Fail no more."""
        self.fail("write", "flush", count=0)

    def stall(self) -> None:
        """Hold every write and flush from now on."""
        self._gate.clear()

    def release(self) -> None:
        """Let what is held go on."""
        self._gate.set()

    def mark(self, promise: Any) -> None:
        """Note on the tape what is promised from here on."""
        if self.tape is not None:
            self.tape.append(Mark(promise))

    def read(self, offset: int, size: int) -> bytes:
        """Return what stands in the cache, else on the disk."""
        return self.content.read(offset, size)

    def write(self, offset: int, data: memoryview) -> None:
        """Take it into the cache."""
        self._await_gate()
        self._may_fail("write")
        held = bytes(data)
        self.content.write(offset, held)
        if self.tape is not None:
            self.tape.append(Write(offset, held))

    def flush(self) -> None:
        """Empty the cache onto the disk."""
        self._await_gate()
        self._may_fail("flush")
        if self.tape is not None:
            self.tape.append(Flush())

    def _await_gate(self) -> None:
        if not self._gate.is_set():
            self.requests_held.release()
            self._gate.wait()

    def _may_fail(self, kind: Kind) -> None:
        if self._failures[kind]:
            self._failures[kind] -= 1
            raise OSError(errno.EIO, f"the {kind} failed")


Overlay = Literal["none", "all", "subset", "torn"]
OVERLAYS: tuple[Overlay, ...] = ("none", "all", "subset", "subset", "torn", "torn")
UNTORN: tuple[Overlay, ...] = tuple("subset" if one == "torn" else one for one in OVERLAYS)
"""Where nobody tells which blocks hold file data, nothing is torn, nor counted so."""


def survivors(
    volatile: list[Write], overlay: Overlay, dice: random.Random, file_data: set[int]
) -> list[Write]:
    """Return what of the volatile writes is on the disk after the cut."""
    if overlay == "none":
        return []
    if overlay == "all":
        return volatile
    share = dice.random()
    kept: list[Write] = []
    for write in volatile:
        for at in range(0, len(write.data), BLOCK_BYTES):
            part = Write(write.offset + at, write.data[at : at + BLOCK_BYTES])
            if overlay == "torn" and part.offset // BLOCK_BYTES in file_data:
                kept += _torn(part, share, dice)
            elif dice.random() < share:
                kept.append(part)
    return kept


def _torn(part: Write, share: float, dice: random.Random) -> list[Write]:
    return [
        Write(part.offset + at, part.data[at : at + SECTOR_BYTES])
        for at in range(0, len(part.data), SECTOR_BYTES)
        if dice.random() < share
    ]
