"""Power cuts of one life: at places of its tape, with what may survive there, judged by its check.

Crash: a state is the disk at the last flush before the cut, and some of what was written since.
The check of a drawn part is cut in its turn: a recovery that dies is recovered.
"""

import random
import traceback
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.crashdisk.device import (
    OVERLAYS,
    UNTORN,
    Content,
    Device,
    Event,
    Flush,
    Mark,
    Overlay,
    Write,
    survivors,
)
from tests.crashdisk.filesystem import Kind, blocks_of_files, mounted
from tests.crashdisk.lives import Life, Promise

WORKS_ON_SHARE = 0.2
INSIDE_SHARE = 0.25  # of those that work on


class Broken(Exception):
    """A state in which a promise is broken; the text says which and why."""

    def __init__(self, text: str, disk: Content | None = None) -> None:
        """`disk`: as it was before the recovery."""
        super().__init__(text)
        self.disk = disk
        self.tape: list[Event] = []


@dataclass
class Place:
    """Where cuts are played: a file system's kind, its image, a node and a mount point."""

    kind: Kind
    image: bytes
    node: Path
    top: Path
    states: Counter[str] = field(default_factory=Counter)


@dataclass
class Cut:
    """One moment of a tape: what was flushed, what was not, and what was promised around it."""

    at: int
    flushes: int
    volatile: list[Write]
    least: Promise
    most: Promise


def recorded(place: Place, life: Life, dice: random.Random) -> tuple[list[Event], set[int]]:
    """Live on an empty file system; return the tape and the blocks of file data."""
    device = Device(place.node, Content(place.image))
    device.tape = []
    try:
        with mounted(place.kind, place.node, place.top) as top:
            life.live(top, dice, device.mark)
            tape, device.tape = device.tape or [], None
            file_data = blocks_of_files(place.kind, top)
    finally:
        device.close()
    return tape, file_data


def cuts(
    tape: list[Event], wanted: set[int], layer: dict[int, bytes], image: bytes
) -> Iterator[Cut]:
    """Yield the wanted moments in order; `layer` is the disk as of the flush before each."""
    marks = [(at, event.promise) for at, event in enumerate(tape) if isinstance(event, Mark)]
    last = marks[-1][1] if marks else Promise()
    volatile: list[Write] = []
    least, following, flushes = Promise(), 0, 0
    for at, event in enumerate((*tape, Flush())):  # that of the unmount
        if at in wanted:
            while following < len(marks) and marks[following][0] < at:
                following += 1
            most = marks[following][1] if following < len(marks) else last
            yield Cut(at, flushes, list(volatile), least, most)
        match event:
            case Write():
                volatile.append(event)
            case Flush():
                flushed = Content(image, layer)
                for write in volatile:
                    flushed.write(*write)
                layer.update(flushed.blocks)
                volatile.clear()
                flushes += 1
            case Mark(promise):
                least = promise


def play(place: Place, life: Life, seed: str, moments_max: int) -> None:
    """Live once by a seed, then cut it at so many moments. Raises Broken.

    States are told apart by what is on the disk and what was promised: none is looked at twice.
    """
    dice = random.Random(seed)
    tape, file_data = recorded(place, life, dice)
    layer: dict[int, bytes] = {}
    judge = Judge(place, life, dice)
    seen = set[Hashable]()
    try:
        moments = range(1, len(tape) + 1)
        drawn = set(dice.sample(moments, min(len(moments), moments_max)))
        for cut in cuts(tape, drawn, layer, place.image):
            for overlay in OVERLAYS if place.kind.overwrites else UNTORN:
                content = Content(place.image, layer)
                for write in survivors(cut.volatile, overlay, dice, file_data):
                    content.write(*write)
                state = (cut.flushes, cut.least, cut.most, frozenset(content.blocks.items()))
                if state not in seen:
                    judge.look(content, cut, overlay)
                seen.add(state)
    except Broken as broken:
        told = Broken(f"{life.name} on {place.kind.name}, seed {seed!r}: {broken}", broken.disk)
        told.tape = tape
        raise told from broken
    finally:
        judge.close()


class Judge:
    """Recovers states of one life and has them checked."""

    def __init__(self, place: Place, life: Life, dice: random.Random) -> None:
        self._place, self._life, self._dice = place, life, dice
        self._device = Device(place.node, Content(place.image))

    def close(self) -> None:
        """Take the device away."""
        self._device.close()

    def look(self, content: Content, cut: Cut, overlay: Overlay) -> None:
        """Recover a state; a drawn part works on, and of that a part is cut again meanwhile."""
        works_on = self._dice.random() < WORKS_ON_SHARE
        is_inside = works_on and self._dice.random() < INSIDE_SHARE
        before = dict(content.blocks)
        self._place.states[overlay] += 1
        self._device.tape = [] if is_inside else None
        self._check(content, cut, overlay, works_on=works_on)
        if is_inside:
            tape, self._device.tape = self._device.tape or [], None
            at = self._dice.randrange(len(tape) + 1)
            self._place.states["inside a recovery"] += 1
            most = cut.most._replace(tried=cut.most.tried + self._life.adds)
            inner = Content(self._place.image, *content.below, before)
            self._replay(inner, tape[:at])
            what = f"{overlay}, then cut at {at} of {len(tape)} of the recovery"
            self._check(inner, replace(cut, most=most), what, works_on=True)

    def _replay(self, content: Content, tape: list[Event]) -> None:
        """Do to the content what a tape did, with a cut at its end."""
        volatile: list[Write] = []
        for event in tape:
            if isinstance(event, Write):
                volatile.append(event)
            else:
                for write in volatile:
                    content.write(*write)
                volatile.clear()
        for write in survivors(volatile, self._dice.choice(OVERLAYS), self._dice, set()):
            content.write(*write)

    def _check(self, content: Content, cut: Cut, what: str, *, works_on: bool) -> None:
        place = self._place
        self._device.content = content
        before = Content(place.image, *content.below, dict(content.blocks))
        try:
            with mounted(place.kind, place.node, place.top) as top:
                self._life.check(top, cut.least, cut.most, works_on=works_on)
        except Exception as error:
            said = "".join(traceback.format_exception(error, limit=-3))
            raise Broken(
                f"cut at event {cut.at} with {len(cut.volatile)} volatile writes, kept {what};"
                f" promised {cut.least}, tried {cut.most}\n{said}",
                before,
            ) from error
