"""What lies ready before a unit is ordered, and is cleared away when it is forgotten.

    RUN/recorder            what every unit runs after its task   (`recorder.py`)
    STATE/start/7.2         start script, its user's own          (`launch.py`)
    STATE/units/7.2.*       exit record, empty: the start fence   (`recorder.py`)
    STATE/output/7.log      where the unit writes to, by descriptor

Read next: `runner.py`.
"""

import contextlib
import os
import time

from msgspec.structs import replace

from ckptd.core.port import DISK, EndSeen, Start
from ckptd.runner import environment, output
from ckptd.runner.environment import Place
from ckptd.storage.blobs import Found
from ckptd.units import launch
from ckptd.units.launch import Paths, Property
from ckptd.units.recorder import RECORDER, Records

_TAIL_BYTES = 64  # of a script, where it says what failed
_OURS = (-1, -1)


class Papers:
    """The files of all units. `is_system`: tasks have users of their own."""

    def __init__(self, state_dir: str, run_dir: str, records: Records, *, is_system: bool) -> None:
        self._scripts = Scripts(f"{state_dir}/start")  # its user could fill the memory of RUN
        self._stopping = f"{run_dir}/stopping"
        self._recorder = f"{run_dir}/recorder"
        _write_recorder(self._recorder)
        self._records = records
        self._is_system = is_system

    @property
    def is_stopping(self) -> bool:
        """Tell whether the machine, or the slice of all tasks, is being stopped."""
        return os.path.exists(self._stopping)

    def prepare(self, start: Start, place: Place, found: Found, ckpt_dir: str | None) -> None:
        """Lay everything ready.

        Raises:
            FileExistsError: there is a record: somebody ordered or refused the attempt.
            OSError: there is no room.
            ValueError: the command or the environment cannot be handed over.
        """
        key = (start.task, start.attempt)
        argv = environment.expand(start.argv, found, place.directory)
        env = environment.environment(start, place, found, ckpt_dir)
        script = launch.script(start, argv, env)
        self._records.make(key)
        self._scripts.write(key, script, self._ids(start))
        fd = output.opened(place.output, *self._ids(start))
        try:
            output.write_start(fd, start.attempt, time.time_ns(), found.seq)
        finally:
            os.close(fd)

    def order(self, start: Start, place: Place) -> tuple[list[Property], int]:
        """Return the unit's properties, and the descriptor in them, for the caller to close.

        Raises:
            OSError: the output cannot be opened.
        """
        key = (start.task, start.attempt)
        is_synchronous = self._records.is_synchronous
        paths = Paths(
            self._scripts.path(key),
            self._recorder,
            self._records.path(key),
            self._stopping,
            is_synchronous=is_synchronous,
        )
        fd = output.opened(place.output, *self._ids(start))
        return launch.properties(start, paths, fd, is_system=self._is_system), fd

    def complaint(self, key: tuple[int, int], start: Start | None) -> tuple[int, str] | None:
        """Return (errno, text) of what the start script could not do."""
        return self._scripts.complaint(key, start)

    def close_output(self, place: Place, end: EndSeen, uid: int) -> EndSeen:
        """Write the last line of an attempt; return its end, with the full disk as it is now.

        A full disk costs the line, never the end.
        """
        is_plain = end.cause == "exit" and end.code and not end.blame
        if is_plain and output.is_full(place.output, uid if self._is_system else -1):
            end = replace(end, blame=DISK, text=end.text or output.FULL)
        said = output.ending(
            end.cause, end.code, end.signal, end.text, blame=end.blame, is_oom=end.cause == "oom"
        )
        with contextlib.suppress(OSError):
            fd = output.opened(place.output, *_OURS)
            output.write_end(fd, end.attempt, end.ended_ns, said)
            os.close(fd)
        return end

    def forget(self, key: tuple[int, int]) -> None:
        """Clear away what is an attempt's alone."""
        self._records.forget(key)
        self._scripts.forget(key)

    def _ids(self, start: Start) -> tuple[int, int]:
        return (start.uid, start.gid) if self._is_system else _OURS


def _write_recorder(path: str) -> None:
    """Put the recorder in its place at once: units that end right now find the old or the new."""
    new = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="ascii") as file:
        file.write(RECORDER)
    os.rename(new, path)


class Scripts:
    """The start scripts of all attempts, each its user's own."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, exist_ok=True)
        os.chmod(directory, 0o711)  # noqa: S103  (tasks of all users pass through)

    def path(self, key: tuple[int, int]) -> str:
        """Return where an attempt's script is."""
        return f"{self._directory}/{key[0]}.{key[1]}"

    def write(self, key: tuple[int, int], text: bytes, ids: tuple[int, int]) -> None:
        """Write a script and give it to its user; `ids` of -1 leave it ours.

        Raises:
            OSError: there is no room for it.

        Durable: nothing, as the unit itself.
        """
        self.forget(key)
        fd = os.open(self.path(key), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(text)
            if ids[0] >= 0:
                os.fchown(fd, *ids)

    def complaint(self, key: tuple[int, int], start: Start | None) -> tuple[int, str] | None:
        """Return (errno, text) of what the script could not do. Nothing is followed."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(self.path(key), flags)
        except OSError:
            return None
        try:
            size = os.fstat(fd).st_size
            tail = os.pread(fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        except OSError:
            return None
        finally:
            os.close(fd)
        return launch.complaint(tail, start)

    def forget(self, key: tuple[int, int]) -> None:
        """Remove an attempt's script; one that is missing is no error."""
        with contextlib.suppress(OSError):
            os.unlink(self.path(key))
