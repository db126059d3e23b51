"""Items as commands: a process group for each, its output in two files, its own directory.

    items/<number>/out  err      what it printed, kept apart; told when it ends
    items/<number>/stage ckpt journal attempt.json      the contract of a task, for one item

Words of the command: `{}` or `{item}` is the item, `{key}` its key, `{N}` its place in the list,
`{name}` a field of an object. Where no word holds any of these, the item is the last word.
Invariant: when the main process ends, its group is killed before it is reaped, so no child of it
runs beside the next item; one that left the group is found at the end of the run (`itemdir.py`).
Read next: `judge.py` (what an end means).
"""

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from ckptd.batch import itemdir
from ckptd.batch.job import Ended, How, Job, Setting
from ckptd.batch.judge import KILL_AFTER_S, Judge
from ckptd.batch.place import Item, canonical
from ckptd.batch.refusal import Refused
from ckptd.batch.spec import Config
from ckptd.storage.untrusted import NotTrusted

_PLACEHOLDER: Final = re.compile(r"\{([^{}]*)\}")
_OWN: Final = frozenset(("", "item", "key", "N"))


class Template:
    """The words of the command with their placeholders, worked out once for all items."""

    def __init__(self, argv: Sequence[str], fields: Iterable[str]) -> None:
        known = _OWN | set(fields)
        self._argv = list(argv)
        self._used = {name for word in argv for name in _PLACEHOLDER.findall(word) if name in known}

    def words(self, item: Item) -> list[str]:
        """Return the command for one item.

        Raises:
            KeyError: the item has no such field.
        """
        if not self._used:
            return [*self._argv, item.text]
        values = {name: _value(name, item) for name in self._used}

        def filled(found: re.Match[str]) -> str:
            return values.get(found[1], found[0])

        return [_PLACEHOLDER.sub(filled, word) for word in self._argv]


def _value(name: str, item: Item) -> str:
    match name:
        case "" | "item":
            return item.text
        case "key":
            return item.key
        case "N":
            return str(item.position)
        case _:
            if not isinstance(item.value, dict):
                raise KeyError(name)
            found = item.value[name]
            return found if isinstance(found, str) else canonical(found)


def fields_of(items: Iterable[Item]) -> set[str]:
    """Return the names of all fields that any item has."""
    return {name for item in items if isinstance(item.value, dict) for name in item.value}


def unknown_fields(argv: Sequence[str], fields: set[str]) -> list[str]:
    """Return what looks like a field in a command whose items have fields, but not this one."""
    named = dict.fromkeys(name for word in argv for name in _PLACEHOLDER.findall(word))
    return [name for name in named if fields and name.isidentifier() and name not in fields | _OWN]


def check_program(config: Config, env: dict[str, str]) -> None:
    """Look whether the program is there, where its name is the same for all items.

    Raises:
        Refused: it is not.
    """
    name = config.argv[0]
    if _PLACEHOLDER.search(name):
        return
    where = os.path.join(config.cwd, name) if "/" in name else name
    if shutil.which(where, path=env.get("PATH")) is None:
        is_there = os.path.exists(where)
        why = "is not executable" if is_there else "is not there"
        place = config.cwd if "/" in name else "PATH"
        raise Refused(f"the program {name!r} {why} (looked in {place})", "nothing was run")


class _Running(NamedTuple):
    job: Job
    process: subprocess.Popen[bytes]
    place: itemdir.ItemDir


class Commands:
    """The `Workers` of commands."""

    def __init__(
        self, setting: Setting, config: Config, fields: set[str], epoll: select.epoll
    ) -> None:
        self._setting = setting
        self._template = Template(config.argv, fields)
        self._judge = Judge(config)
        self._epoll = epoll
        self._running: dict[int, _Running] = {}  # by pidfd
        self._fd_of: dict[int, int] = {}  # by the number of an item
        self._kill_at: dict[int, float] = {}  # by pidfd

    def can_start(self, job: Job) -> bool:
        """Return whether there is a worker for this job: a process is always to be had."""
        del job
        return True

    def start(self, job: Job) -> Ended | None:
        """Start a job; return its end where it cannot even be started."""
        try:
            words = self._template.words(job.item)
        except KeyError as missing:
            return Ended(job, How.RESULT, "error", text=f"the item has no field {missing}")
        job.has_dir = True
        try:
            place = itemdir.make(self._setting, job)
            process, fd = self._spawned(words, place, job)
        except (OSError, NotTrusted, ValueError) as error:  # ValueError: a NUL is no part of a word
            return self._judge.not_started(job, words[0], error)
        self._running[fd] = _Running(job, process, place)
        self._fd_of[job.number] = fd
        self._epoll.register(fd, select.EPOLLIN)
        return None

    def _spawned(
        self, words: list[str], place: itemdir.ItemDir, job: Job
    ) -> tuple[subprocess.Popen[bytes], int]:
        """Crash: the order is in the ledger, the process runs; `itemdir.py` ends it."""
        with place.opened("out") as out, place.opened("err") as err:
            process = subprocess.Popen(
                words,
                cwd=self._setting.cwd,
                env=place.environment(self._setting.env, job),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                process_group=0,
            )
        try:
            return process, os.pidfd_open(process.pid)
        except OSError:  # no descriptor left: nobody would see it end
            _signal(process.pid, signal.SIGKILL)
            process.wait()
            raise

    def send(self) -> None:
        """Do nothing: a process was started at once."""

    def take(self, fd: int, events: int) -> Sequence[Ended] | None:
        """Return the end that a pidfd tells of; None where it is not one of ours."""
        del events
        running = self._running.pop(fd, None)
        if running is None:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(running.process.pid, signal.SIGKILL)  # not reaped: still its own
        code = running.process.wait()
        self._epoll.unregister(fd)
        os.close(fd)
        self._fd_of.pop(running.job.number, None)
        self._kill_at.pop(fd, None)
        return [self._judge.ended(running.job, code, running.place)]

    def expire(self, job: Job) -> None:
        """Ask a job whose time is over to end, later make it."""
        fd = self._fd_of.get(job.number, -1)
        running = self._running.get(fd)
        if running is None:
            return
        now_s = time.monotonic()
        if now_s >= self._kill_at.setdefault(fd, now_s + KILL_AFTER_S):
            _signal(running.process.pid, signal.SIGKILL)
        elif not job.is_timed_out:
            job.is_timed_out = True
            _signal(running.process.pid, signal.SIGTERM)

    def stop(self, number: int) -> None:
        """Send a signal to every group; what ends now badly says nothing of its item."""
        for running in self._running.values():
            running.job.is_signalled = True
            _signal(running.process.pid, number)

    def close(self) -> None:
        """Kill what runs, and wait for it."""
        self.stop(signal.SIGKILL)
        for fd, running in self._running.items():
            running.process.wait()
            os.close(fd)
        self._running.clear()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
