"""Root works on the files of a user who put traps everywhere: nothing of root's leaks or changes.

A daemon of root's may read and write anything (CAP_DAC_OVERRIDE), so that what stops it is only how
it opens files. The traps are set by a process of that user where the kernel lets a user do so, and
by root where a site has protected_hardlinks off.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from ckptd.core.port import Control, Start
from ckptd.daemon.files import Files
from ckptd.runner.files import TaskFiles
from ckptd.storage.blobs import this_boot_id
from ckptd.storage.untrusted import Damaged, NotTrusted
from tests.unit.storage.test_untrusted import as_user

USER, TASK = 4711, 12
SECRET = b"root's own words"
CONTROLS = 10  # written in each round: what is raced for there is short
PLACES = (
    "attempt.json",
    "control.json",
    "control.json.tmp",
    "stage",
    "stage/x",
    "ckpt",
    "ckpt/1",
    "ckpt/1/x",
    "ckpt/1/MANIFEST.json",
    "ckpt/1/MANIFEST.json.tmp",
    "journal",
    "journal/000001.j",
    "archive",
    "archive/2",
)
KINDS = (
    "link to a file",
    "link to a directory",
    "hard link",
    "fifo",
    "socket",
    "directory",
    "hole",
)

pytestmark = pytest.mark.root


class Prey:
    """What belongs to root, beside a state directory with one task of a user's."""

    def __init__(self, root: Path) -> None:
        for folder in (root, *root.parents):
            if "pytest" in str(folder):
                folder.chmod(0o711)
        self.file, self.folder = root / "shadow", root / "private"
        self.file.write_bytes(SECRET)
        self.file.chmod(0o600)
        self.folder.mkdir(mode=0o700)
        (self.folder / "x").write_bytes(SECRET)
        (self.folder / "1").mkdir()
        self.state = root / "state"
        self.state.mkdir(mode=0o711)
        self.files = TaskFiles(str(self.state), this_boot_id())
        self.prepare(1)
        self.task = Path(self.files.directory(TASK))
        self.before = self.look()

    def prepare(self, attempt: int, *, fresh: bool = False) -> None:
        start = Start(
            TASK, attempt, ("true",), {}, "/", USER, USER, "", 0o022, 0, 1, 0, fresh=fresh
        )
        self.files.prepare(start)

    def look(self) -> list[tuple[str, int, int, bytes]]:
        """Return all about root's files that anybody could have changed."""
        found = []
        for path in (self.file, self.folder, *sorted(self.folder.rglob("*"))):
            status = path.lstat()
            data = path.read_bytes() if path.is_file() else b""
            found.append((str(path), status.st_uid, status.st_mode, data))
        return found

    def work(self, first: int = 1) -> list[str]:
        """Do all that a daemon does with the files of three attempts; return what it says."""
        files, reader = self.files, Files(str(self.state))
        said: list[str] = []
        for step in (
            lambda: files.is_touched(TASK, first, 0),
            lambda: files.mark(TASK, first, USER),
            lambda: files.write_control(Control(TASK, first, "cancel", 0, 1), USER),
            lambda: reader.checkpoints(TASK, USER, verify=True),
            lambda: files.checkpoint_to_resume(TASK, USER),
            lambda: self.prepare(first + 1),
            lambda: self.prepare(first + 2, fresh=True),
            lambda: files.mark(TASK, first + 2, USER),
        ):
            try:
                said.append(str(step()))
            except (OSError, NotTrusted, Damaged) as refused:
                said.append(str(refused))
        return said

    def is_untouched(self) -> bool:
        return self.look() == self.before

    def written(self) -> bytes:
        """Return all bytes in regular files of the user's own, where a copy could have gone."""
        own = (path for path in self.task.rglob("*") if path.is_file() and not path.is_symlink())
        return b"".join(path.read_bytes() for path in own if _is_small_own(path))


def _is_small_own(path: Path) -> bool:
    status = path.lstat()
    return status.st_uid == USER and status.st_size < 1 << 20


@pytest.fixture
def prey(tmp_path: Path) -> Prey:
    return Prey(tmp_path)


def set_trap(prey: Prey, place: str, kind: str) -> None:
    path = prey.task / place

    def by_the_user() -> None:
        os.umask(0o077)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            path.rename(prey.task / "put-away")
        path.unlink(missing_ok=True)
        match kind:
            case "link to a file":
                path.symlink_to(prey.file)
            case "link to a directory":
                path.symlink_to(prey.folder)
            case "fifo":
                os.mkfifo(path)
            case "socket":
                os.chdir(path.parent)
                socket.socket(socket.AF_UNIX).bind(path.name)
            case "directory":
                (path / "in" / "it").mkdir(parents=True)
            case "hole":
                with path.open("wb") as file:
                    file.truncate(1 << 42)

    as_user(USER, by_the_user)
    if kind == "hard link":
        os.link(prey.file, path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_trap_of_any_kind_in_any_place_costs_root_nothing(
    prey: Prey, place: str, kind: str
) -> None:
    set_trap(prey, place, kind)

    said = prey.work()

    assert prey.is_untouched()
    told = "\n".join(said).encode() + prey.written()
    assert SECRET not in told
    assert sha256(SECRET).hexdigest().encode() not in told
    prey.files.deletion(TASK)()
    assert prey.is_untouched()
    assert not prey.task.exists()


SWAPS: dict[str, Callable[[Prey], tuple[Path, Path]]] = {
    "a checkpoint": lambda prey: (prey.task / "ckpt" / "1", prey.folder),
    "the checkpoints": lambda prey: (prey.task / "ckpt", prey.folder),
    "the journal": lambda prey: (prey.task / "journal", prey.folder),
    "a saved file": lambda prey: (prey.task / "ckpt" / "1" / "x", prey.file),
    "the stage": lambda prey: (prey.task / "stage", prey.folder),
    "control.json": lambda prey: (prey.task / "control.json.tmp", prey.file),
}


@pytest.mark.parametrize("what", list(SWAPS))
def test_what_is_swapped_for_a_link_while_root_reads_leads_it_nowhere(
    prey: Prey, what: str, rounds: int
) -> None:
    path, target = SWAPS[what](prey)
    swapper = os.fork()
    if swapper == 0:
        _swap_for_ever(prey, path, target)
    try:
        for number in range(rounds):
            prey.work(2 * number + 1)
            for stop in ("cancel", "timeout") * CONTROLS:
                prey.files.write_control(Control(TASK, 1, stop, 0, number), USER)
            assert prey.is_untouched(), number
    finally:
        os.kill(swapper, signal.SIGKILL)
        os.waitpid(swapper, 0)
    written = prey.written()
    assert SECRET not in written
    assert sha256(SECRET).hexdigest().encode() not in written


def _swap_for_ever(prey: Prey, path: Path, target: Path) -> None:
    """As the user: now it is real, now it is a link to what is root's. Never returns."""
    os.setgroups([])
    os.setgid(USER)
    os.setuid(USER)
    twin = prey.task / "twin"
    names = os.fsencode(path), os.fsencode(twin)
    exchange = ctypes.CDLL(None).renameat2
    while True:  # Bound: the test kills it
        if path.suffix == ".tmp":  # what counts is the moment in which there is none
            _try(lambda: path.symlink_to(target))
        elif exchange(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE):
            _try(lambda: _set_up(path, twin, target))


def _try(work: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):
        work()


def _set_up(path: Path, twin: Path, target: Path) -> None:
    """Make one of the two a link and the other real; root moves things away meanwhile."""
    shutil.rmtree(twin, ignore_errors=True)
    twin.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_symlink():
        twin.symlink_to(target)
    elif target.name == "private":
        twin.mkdir()
    real = twin if path.is_symlink() else path
    if target.name == "private":
        (real / "1").mkdir(parents=True, exist_ok=True)
        (real / "x").write_text("mine")
    else:
        real.write_text("mine")


AT_FDCWD, RENAME_EXCHANGE = -100, 2
