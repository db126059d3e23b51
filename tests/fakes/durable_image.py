"""What a power cut leaves of real files at least: what was synced, and nothing else.

For code that works on descriptors (journals, checkpoints, exit records, ledgers), where no
MemoryDisk can stand in. It listens to fsync(2) and fdatasync(2) of this process: a file keeps the
content of its last sync, a directory the names. `cut` makes the directory look like that.
Symlinks are passed over. Real disks keep more, in any order; `forgets` adds the worst of it: names
that were removed are gone, though nobody has synced that. Source: fsync(2).
"""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest


class Inode(NamedTuple):
    """Which file, for as long as the image holds it open: then its number is not used again."""

    device: int
    number: int
    is_dir: bool


Content = bytes | dict[str, Inode]


def _inode(found: os.stat_result) -> Inode:
    return Inode(found.st_dev, found.st_ino, stat.S_ISDIR(found.st_mode))


class DurableImage:
    """Everything below `root` is durable at first; from then on only what is synced."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.before_sync: Callable[[], None] = lambda: None
        self._kept: dict[Inode, Content] = {}
        self._modes: dict[Inode, int] = {}
        self._held: dict[Inode, int] = {}
        self._is_listening = True
        self._keep_tree(root)
        for name in ("fsync", "fdatasync"):
            self._listen(name, monkeypatch)

    def _listen(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        real: Callable[[int], None] = getattr(os, name)

        def heard(fd: int) -> None:
            if self._is_listening:
                self._is_listening = False
                self.before_sync()
                self._is_listening = True
                self._keep(fd)
            real(fd)

        monkeypatch.setattr(os, name, heard)

    def cut(self, *, forgets: bool = False) -> None:
        """Lose the power: the directory holds what is durable, and the machine is up again."""
        self.write_to(self.root, forgets=forgets)
        self._keep_tree(self.root)

    def write_to(self, into: Path, *, forgets: bool = False) -> None:
        """Write what a power cut at this moment would leave."""
        kept = self._names(self.root, forgets=forgets)
        if into.exists():
            for path in into.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            into.mkdir()
        self._put(kept, into)

    def close(self) -> None:
        """Let go of the files."""
        for fd in self._held.values():
            os.close(fd)

    # --- keeping ------------------------------------------------------------------------------

    def _keep_tree(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        self._keep(fd)
        os.close(fd)
        if path.is_dir():
            for inner in path.iterdir():
                if not inner.is_symlink():
                    self._keep_tree(inner)

    def _keep(self, fd: int) -> None:
        found = os.fstat(fd)
        inode = _inode(found)
        path = f"/proc/self/fd/{fd}"
        self._kept[inode] = _listed(Path(path)) if inode.is_dir else Path(path).read_bytes()
        self._modes[inode] = stat.S_IMODE(found.st_mode)
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY)

    # --- giving back --------------------------------------------------------------------------

    def _names(self, path: Path, *, forgets: bool) -> dict[str, tuple[Inode, Content]]:
        """Return the tree of `path` by its own inode, with names that were removed left out."""
        gone: set[tuple[Inode, str]] = set()
        if forgets:
            gone = {
                (inode, name)
                for inode, content in self._kept.items()
                if isinstance(content, dict)
                for name, inner in content.items()
                if _listed(Path(f"/proc/self/fd/{self._held[inode]}")).get(name) != inner
            }
        return self._below(_inode(path.stat()), gone)

    def _below(
        self, inode: Inode, gone: set[tuple[Inode, str]], prefix: str = ""
    ) -> dict[str, tuple[Inode, Content]]:
        content = self._kept.get(inode, {})
        assert isinstance(content, dict)
        found: dict[str, tuple[Inode, Content]] = {}
        for name, inner in content.items():
            if (inode, name) in gone:
                continue
            empty: Content = {} if inner.is_dir else b""
            found[prefix + name] = inner, self._kept.get(inner, empty)
            if inner.is_dir:
                found |= self._below(inner, gone, f"{prefix}{name}/")
        return found

    def _put(self, kept: dict[str, tuple[Inode, Content]], into: Path) -> None:
        for name, (inode, content) in kept.items():  # a directory comes before what is in it
            path = into / name
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.mkdir()
            path.chmod(self._modes.get(inode, 0o700 if inode.is_dir else 0o600))


def _listed(path: Path) -> dict[str, Inode]:
    found = {name: (path / name).lstat() for name in os.listdir(path)}
    return {name: _inode(one) for name, one in found.items() if not stat.S_ISLNK(one.st_mode)}
