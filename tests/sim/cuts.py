"""Every way a power cut may leave a disk at one moment, as contents that can be told apart.

What a cut may leave are axes: of each file the subsets of its unsynced sectors (in each version
they went through) for each of its sizes; of each directory the subsets of its unsynced operations.
`Cuts` goes through all combinations where they are few and draws where they are many. Equal bytes
are one state, however they came about. The disk itself is only read.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from math import prod

from tests.fakes.memory_disk import SECTOR, Directory, Inode, MemoryDisk

AXIS_MAX = 64  # contents of one file, name spaces of one directory; more are drawn
DRAWS = 3  # for each state that is wanted, where equal ones come up


class Book:
    """Numbers for contents: equal numbers mean equal bytes, over all moments that share a book."""

    def __init__(self) -> None:
        self.sectors: list[bytes] = []
        self._sector_ids: dict[bytes, int] = {}
        self._file_ids: dict[tuple[int, ...], int] = {}
        self._layout_ids: dict[tuple[tuple[str, int], ...], int] = {}
        self._axes: dict[int, tuple[int, int, FileAxis]] = {}

    def sector(self, data: bytes) -> int:
        """Return the number of a sector's bytes."""
        found = self._sector_ids.get(data)
        if found is None:
            found = self._sector_ids[data] = len(self.sectors)
            self.sectors.append(data)
        return found

    def file(self, sectors: tuple[int, ...]) -> int:
        """Return the number of a file's content."""
        return self._file_ids.setdefault(sectors, len(self._file_ids))

    def layout(self, paths: tuple[tuple[str, int], ...]) -> int:
        """Return the number of a name space: which path is which file."""
        return self._layout_ids.setdefault(paths, len(self._layout_ids))

    def axis(self, inode: Inode, dice: random.Random) -> "FileAxis":
        """Return what a file may hold after a cut, the same until it is written or synced."""
        found = self._axes.get(id(inode))
        if found is not None and found[:2] == (inode.writes, inode.syncs):
            return found[2]
        axis = FileAxis(inode, self, dice)  # holds the inode: its id is given to no other
        self._axes[id(inode)] = inode.writes, inode.syncs, axis
        return axis


class FileAxis:
    """What one file may hold after a cut. `ids` are distinct, the first is the disk as it is."""

    def __init__(self, inode: Inode, book: Book, dice: random.Random) -> None:
        self._book = book
        self._inode = inode
        self._built: dict[int, Inode] = {}
        self._sectors: dict[int, tuple[int, ...]] = {}
        sizes = dict.fromkeys((len(inode.disk), *inode.sizes))
        options = [self._options(size) for size in sizes]
        found: Iterable[tuple[int, ...]] = _drawn(options, dice)
        if sum(map(_ways, options)) <= AXIS_MAX:
            found = (way for one in options for way in product(*one))
        for way in found:
            self._sectors.setdefault(book.file(way), way)
        self.ids = list(self._sectors)

    def build(self, content: int) -> Inode:
        """Return the file with this content, the same one each time."""
        if content not in self._built:
            sectors = self._book.sectors
            new = self._built[content] = Inode()
            new.disk = bytearray(b"".join([sectors[one] for one in self._sectors[content]]))
            new.data = bytearray(new.disk)
        return self._built[content]

    def describe(self, content: int) -> str:
        """Return what was kept of the unsynced sectors."""
        ways = [self._sectors[content], self._sectors[self.ids[0]]]
        size = sum(len(self._book.sectors[one]) for one in ways[0])
        kept = [at for at, (now, old) in enumerate(zip(*ways, strict=False)) if now != old]
        return f"{size} bytes, unsynced sectors kept: {kept} of {sorted(self._inode.dirty)}"

    def _options(self, size: int) -> list[list[int]]:
        """Return for each sector of a file of this size what it may hold, the old content first."""
        disk, dirty, sector = self._inode.disk, self._inode.dirty, self._book.sector
        found = []
        for at in range(0, size, SECTOR):
            room = min(SECTOR, size - at)
            old = bytes(disk[at : at + room]).ljust(room, b"\0")
            versions = dirty.get(at // SECTOR)
            if versions is None:
                found.append([sector(old)])
            else:
                may = [old, *((new + old[len(new) :])[:room] for new in versions)]
                found.append([sector(data) for data in dict.fromkeys(may)])
        return found


def _ways(options: list[list[int]]) -> int:
    return prod(map(len, options))


def _drawn(options: list[list[list[int]]], dice: random.Random) -> Iterator[tuple[int, ...]]:
    """Yield nothing kept, everything kept, and AXIS_MAX drawn ones."""
    for one in options:
        yield tuple([may[0] for may in one])
    yield tuple([may[-1] for may in options[-1]])
    for _ in range(AXIS_MAX):
        keep = dice.choice((0.1, 0.5, 0.9))
        yield tuple(
            [
                may[0] if len(may) == 1 or dice.random() >= keep else dice.choice(may[1:])
                for may in dice.choice(options)
            ]
        )


Names = tuple[tuple[str, Inode], ...]


def _name_spaces(directory: Directory, dice: random.Random) -> list[Names]:
    """Return what the names in a directory may be after a cut, distinct ones."""
    steps = directory.pending
    subsets: Iterable[int] = range(1 << len(steps))
    if 1 << len(steps) > AXIS_MAX:
        drawn = (dice.getrandbits(len(steps)) for _ in range(AXIS_MAX))
        subsets = (0, (1 << len(steps)) - 1, *drawn)
    found: dict[tuple[tuple[str, int], ...], Names] = {}
    for subset in subsets:
        names = dict(directory.disk)
        for number, step in enumerate(steps):
            if subset >> number & 1:
                step.apply(names)
        space = tuple(sorted(names.items(), key=lambda item: item[0]))
        found.setdefault(tuple((name, id(inode)) for name, inode in space), space)
    return list(found.values())


class Layout:
    """One name space: which file is where. The files that a recovery reads come first."""

    def __init__(
        self,
        spaces: tuple[tuple[str, Names], ...],
        axis_of: Callable[[Inode], FileAxis],
        book: Book,
        is_read: Callable[[str], bool],
    ) -> None:
        self._dirs = [path for path, _ in spaces]
        named = [(path, name, inode) for path, names in spaces for name, inode in names]
        named.sort(key=lambda item: not is_read(item[1]))
        places: dict[int, int] = {}
        self.axes: list[FileAxis] = []
        self._files: list[tuple[str, str, int]] = []
        self.read = 0  # so many of the axes belong to files that a recovery reads
        for path, name, inode in named:
            if id(inode) not in places:
                places[id(inode)] = len(self.axes)
                self.axes.append(axis_of(inode))
            self._files.append((path, name, places[id(inode)]))
            if is_read(name):
                self.read = len(self.axes)
        spelled = tuple((f"{path}/{name}", at) for path, name, at in self._files)
        self.number = book.layout(spelled)
        self._read_paths = tuple(one for one in spelled if one[1] < self.read)
        self.read_number = book.layout(self._read_paths)
        self.count = prod(len(axis.ids) for axis in self.axes)

    def states(self, most: int, dice: random.Random) -> Iterator[tuple[int, ...]]:
        """Yield contents of all files: all combinations, or about `most` drawn ones."""
        if self.count <= most:
            yield from product(*(axis.ids for axis in self.axes))
            return
        yield tuple([axis.ids[0] for axis in self.axes])
        choice = dice.choice
        for _ in range(DRAWS * most):
            yield tuple([choice(a.ids) if len(a.ids) > 1 else a.ids[0] for a in self.axes])

    def put(self, contents: tuple[int, ...], disk: MemoryDisk) -> None:
        """Make `disk` hold this state. Its files are shared with other states: only read them."""
        files = [axis.build(one) for axis, one in zip(self.axes, contents, strict=True)]
        names: dict[str, dict[str, Inode]] = {path: {} for path in self._dirs}
        for path, name, at in self._files:
            names[path][name] = files[at]
        disk.dirs = {path: Directory(found, dict(found)) for path, found in names.items()}
        disk.locked.clear()

    def files_read(self, contents: tuple[int, ...]) -> Iterator[tuple[str, int, Inode]]:
        """Yield the files that a recovery reads: path, number of the content, the file itself."""
        for path, at in self._read_paths:
            yield path, contents[at], self.axes[at].build(contents[at])

    def describe(self, contents: tuple[int, ...]) -> str:
        """Return the state in words."""
        return "\n".join(
            f"  {path}/{name}: {self.axes[at].describe(contents[at])}"
            for path, name, at in self._files
        )


class Cuts:
    """The states that a cut may leave of a disk as it is now, `most` at most."""

    def __init__(
        self,
        disk: MemoryDisk,
        book: Book,
        dice: random.Random,
        is_read: Callable[[str], bool],
        most: int,
    ) -> None:
        self._book = book
        self._dice = dice
        self._most = most
        spaces = [(path, _name_spaces(one, dice)) for path, one in disk.dirs.items()]
        self.layouts = [
            Layout(
                tuple((path, names) for (path, _), names in zip(spaces, chosen, strict=True)),
                self._axis_of, book, is_read,
            )
            for chosen in self._combined([names for _, names in spaces])
        ]  # fmt: skip

    def _combined(self, spaces: list[list[Names]]) -> Iterable[tuple[Names, ...]]:
        if prod(map(len, spaces)) <= AXIS_MAX:
            return product(*spaces)
        first = tuple(space[0] for space in spaces)
        drawn = (tuple(map(self._dice.choice, spaces)) for _ in range(AXIS_MAX))
        return (first, *drawn)

    def _axis_of(self, inode: Inode) -> FileAxis:
        return self._book.axis(inode, self._dice)

    @property
    def count(self) -> int:
        """Return how many combinations the axes have."""
        return sum(layout.count for layout in self.layouts)

    def __iter__(self) -> Iterator[tuple[Layout, tuple[int, ...]]]:
        """Yield distinct states as (name space, contents)."""
        share = self._most if self.count <= self._most else -(-self._most // len(self.layouts))
        seen: set[tuple[int, tuple[int, ...]]] = set()
        for layout in self.layouts:
            before = len(seen)
            for contents in layout.states(share, self._dice):
                key = layout.number, contents
                if key not in seen:
                    seen.add(key)
                    yield layout, contents
                    if len(seen) - before >= share:
                        break
            if len(seen) >= self._most:
                return
