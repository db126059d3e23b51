"""A disk in memory whose power can be cut: a real implementation of the Disk port.

It keeps apart what the page cache shows and what the disk holds, by sectors of 512 bytes and by
single directory operations. `crash` gives the disk as a power cut may leave it: any subset of the
unsynced sectors (and of the versions a sector went through), any subset of the unsynced directory
operations. A failed sync leaves its pages clean but not written, as kernels do.
"""

import errno
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ckptd.storage.disk import Bytes

SECTOR = 512


class Inode:
    """One file: `data` is the page cache, `disk` what a power cut leaves at least."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.disk = bytearray()
        self.dirty: dict[int, list[bytes]] = {}  # sector -> what was written there since the sync
        self.sizes: list[int] = []
        self.lost: set[int] = set()  # sectors that a failed sync left clean in the cache
        self.writes = self.syncs = 0  # so many times the cache, the disk may have changed

    def write(self, data: Bytes, offset: int) -> None:
        self.writes += 1
        end = offset + len(data)
        if end > len(self.data):
            self.data.extend(bytes(end - len(self.data)))
            self.sizes.append(end)
        self.data[offset:end] = data
        for sector in range(offset // SECTOR, (end + SECTOR - 1) // SECTOR):
            version = bytes(self.data[sector * SECTOR : (sector + 1) * SECTOR])
            self.dirty.setdefault(sector, []).append(version)
            self.lost.discard(sector)

    def sync(self) -> None:
        self.syncs += 1
        self._store({sector: versions[-1] for sector, versions in self.dirty.items()})
        self._resize(len(self.data))
        self.dirty.clear()
        self.sizes.clear()

    def fail_sync(self, rng: random.Random) -> None:
        self.syncs += 1
        some = {s: versions[-1] for s, versions in self.dirty.items() if rng.random() < 0.5}
        self._store(some)
        self._resize(len(self.data))
        self.lost |= self.dirty.keys() - some.keys()
        self.dirty.clear()
        self.sizes.clear()

    def drop_cache(self) -> None:
        self.writes += bool(self.lost)
        for sector in self.lost:
            at = slice(sector * SECTOR, (sector + 1) * SECTOR)
            self.data[at] = self.disk[at]
        self.lost.clear()

    def after_crash(self, rng: random.Random, keep: float) -> "Inode":
        new = Inode()
        new.disk = bytearray(self.disk)
        chosen = {}
        for sector, versions in self.dirty.items():
            if rng.random() < keep:
                chosen[sector] = versions[-1] if keep >= 1 else rng.choice(versions)
        sizes = [len(self.disk), *self.sizes]
        size = sizes[-1] if keep >= 1 else sizes[0] if keep <= 0 else rng.choice(sizes)
        new._store(chosen)
        new._resize(size)
        new.data = bytearray(new.disk)
        return new

    def clone(self) -> "Inode":
        new = Inode()
        new.data, new.disk = bytearray(self.data), bytearray(self.disk)
        new.dirty = {sector: list(versions) for sector, versions in self.dirty.items()}
        new.sizes, new.lost = list(self.sizes), set(self.lost)
        return new

    def _store(self, sectors: dict[int, bytes]) -> None:
        for sector, data in sectors.items():
            at = sector * SECTOR
            self._resize(max(len(self.disk), at + len(data)))
            self.disk[at : at + len(data)] = data

    def _resize(self, size: int) -> None:
        if size < len(self.disk):
            del self.disk[size:]
        else:
            self.disk.extend(bytes(size - len(self.disk)))


@dataclass
class Step:
    """One directory operation: `inode` gets `new` (if any) and loses `old` (if any)."""

    inode: Inode
    new: str = ""
    old: str = ""

    def apply(self, names: dict[str, Inode]) -> None:
        if self.old and names.get(self.old) is self.inode:
            del names[self.old]
        if self.new:
            names[self.new] = self.inode


@dataclass
class Directory:
    """Names as the cache shows them and as the disk has them, and what lies between."""

    names: dict[str, Inode] = field(default_factory=dict)
    disk: dict[str, Inode] = field(default_factory=dict)
    pending: list[Step] = field(default_factory=list)

    def do(self, step: Step) -> None:
        step.apply(self.names)
        self.pending.append(step)

    def sync(self) -> None:
        self.disk = dict(self.names)
        self.pending.clear()


@dataclass
class Fault:
    """The `after`-th next operation of this kind on a path that contains `part` fails."""

    kind: str
    part: str
    error: int
    after: int
    times: int


class MemoryFile:
    """An open file of a MemoryDisk."""

    def __init__(
        self, disk: "MemoryDisk", path: str, inode: Inode, *, is_lock: bool = False
    ) -> None:
        self._disk = disk
        self._path = path
        self._inode = inode
        self._is_lock = is_lock
        disk.opened.add(self)

    def read(self, size: int, offset: int) -> bytes:
        self._disk.check("read", self._path)
        return bytes(self._inode.data[offset : offset + size])

    def write(self, data: Bytes, offset: int) -> None:
        self._disk.step("write", self._path)
        self._disk.take_room(offset + len(data) - len(self._inode.data))
        self._inode.write(data, offset)

    def size(self) -> int:
        return len(self._inode.data)

    def sync_data(self) -> None:
        try:
            self._disk.step("sync", self._path)
        except OSError:
            self._inode.fail_sync(self._disk.rng)
            raise
        if not self._disk.is_deaf("sync", self._path):
            self._inode.sync()

    sync = sync_data

    def drop_cache(self) -> None:
        self._inode.drop_cache()

    def close(self) -> None:
        self._disk.opened.discard(self)
        if self._is_lock:
            self._disk.locked.discard(self._path)


class MemoryDisk:
    """The disk. `watch` is called before every operation that changes it, with kind and path."""

    def __init__(self, capacity: int = 1 << 40, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.capacity = capacity
        self.dirs: dict[str, Directory] = {}
        self.locked: set[str] = set()
        self.opened: set[MemoryFile] = set()  # and not closed
        self.watch: Callable[[str, str], None] | None = None
        self.deaf: set[str] = set()  # "sync" or "sync_dir .snap": what it pretends to do, and where
        self.faults: list[Fault] = []

    def fail(
        self, kind: str, part: str = "", *, error: int = errno.EIO, after: int = 0, times: int = 1
    ) -> None:
        """Let an operation fail: write, sync, rename, unlink, create, sync_dir, read."""
        self.faults.append(Fault(kind, part, error, after, times))

    def check(self, kind: str, path: str) -> None:
        for fault in self.faults:
            if fault.kind == kind and fault.part in path and fault.times:
                if fault.after:
                    fault.after -= 1
                    continue
                fault.times -= 1
                raise OSError(fault.error, os.strerror(fault.error), path)

    def is_deaf(self, kind: str, path: str) -> bool:
        """Tell whether this operation is only pretended: for the disks of mutants."""
        for told in self.deaf:
            deaf_kind, _, part = told.partition(" ")
            if deaf_kind == kind and part in path:
                return True
        return False

    def step(self, kind: str, path: str) -> None:
        if self.watch:
            self.watch(kind, path)
        self.check(kind, path)

    def take_room(self, more: int) -> None:
        if more > 0 and more > self.free_bytes(""):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def crash(self, rng: random.Random, keep: float) -> "MemoryDisk":
        """Return the disk after a power cut; each unsynced thing survives with chance `keep`."""
        new = MemoryDisk(self.capacity, rng.randrange(1 << 30))
        inodes: dict[int, Inode] = {}

        def survivor(inode: Inode) -> Inode:
            if id(inode) not in inodes:
                inodes[id(inode)] = inode.after_crash(rng, keep)
            return inodes[id(inode)]

        for path, directory in self.dirs.items():
            names = dict(directory.disk)
            for step in directory.pending:
                if rng.random() < keep:
                    step.apply(names)
            kept = {name: survivor(inode) for name, inode in names.items()}
            new.dirs[path] = Directory(dict(kept), dict(kept))
        return new

    def clone(self) -> "MemoryDisk":
        """Return the disk as the next process finds it after kill -9: the cache is still there."""
        new = MemoryDisk(self.capacity, self.rng.randrange(1 << 30))
        inodes: dict[int, Inode] = {}

        def same(inode: Inode) -> Inode:
            if id(inode) not in inodes:
                inodes[id(inode)] = inode.clone()
            return inodes[id(inode)]

        for path, directory in self.dirs.items():
            new.dirs[path] = Directory(
                {name: same(inode) for name, inode in directory.names.items()},
                {name: same(inode) for name, inode in directory.disk.items()},
                [Step(same(step.inode), step.new, step.old) for step in directory.pending],
            )
        return new

    def inode(self, path: str) -> Inode:
        directory, name = self._split(path)
        if name not in directory.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return directory.names[name]

    # --- the Disk port ---

    def make_dir(self, path: str, mode: int) -> None:
        self.dirs.setdefault(path, Directory())

    def create(self, path: str) -> MemoryFile:
        self.step("create", path)
        directory, name = self._split(path)
        inode = Inode()
        directory.do(Step(inode, new=name))
        return MemoryFile(self, path, inode)

    def open(self, path: str, *, write: bool = False) -> MemoryFile:
        return MemoryFile(self, path, self.inode(path))

    def names(self, path: str) -> list[str]:
        if path not in self.dirs:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        below = {p[len(path) + 1 :] for p in self.dirs if p.startswith(path + "/")}
        return sorted({*self.dirs[path].names, *(name for name in below if "/" not in name)})

    def rename(self, old: str, new: str) -> None:
        self.step("rename", new)
        inode = self.inode(old)
        (old_dir, old_name), (new_dir, new_name) = self._split(old), self._split(new)
        if old_dir is new_dir:
            old_dir.do(Step(inode, new=new_name, old=old_name))
        else:
            new_dir.do(Step(inode, new=new_name))
            old_dir.do(Step(inode, old=old_name))

    def link(self, old: str, new: str) -> None:
        self.step("link", new)
        directory, name = self._split(new)
        directory.do(Step(self.inode(old), new=name))

    def unlink(self, path: str) -> None:
        self.step("unlink", path)
        directory, name = self._split(path)
        directory.do(Step(self.inode(path), old=name))

    def sync_dir(self, path: str) -> None:
        self.step("sync_dir", path)
        if not self.is_deaf("sync_dir", path):
            self.dirs[path].sync()

    def lock(self, path: str) -> MemoryFile:
        if path in self.locked:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), path)
        self.locked.add(path)
        directory, name = self._split(path)
        if name not in directory.names:
            directory.do(Step(Inode(), new=name))
        return MemoryFile(self, path, directory.names[name], is_lock=True)

    def free_bytes(self, path: str) -> int:
        inodes = {id(i): i for d in self.dirs.values() for i in d.names.values()}
        return max(0, self.capacity - sum(len(inode.data) for inode in inodes.values()))

    def random_bytes(self, count: int) -> bytes:
        return self.rng.randbytes(count)

    def _split(self, path: str) -> tuple[Directory, str]:
        parent, _, name = path.rpartition("/")
        if parent not in self.dirs:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return self.dirs[parent], name
