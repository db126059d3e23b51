"""What a task finds when it wakes up: its environment, its argument words, its groups.

Read next: PROTOCOL.md on the checkpoint contract, and `child.py`.
"""

import os
import pwd
import shlex
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from ckptd.core.port import Start
from ckptd.runner.attempt import Order
from ckptd.storage.blobs import Found

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
GROUPS_KEPT_S = 60.0  # a change of a user's groups is seen by tasks started this much later
_NOT_FOR_TASKS = frozenset(
    {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "INVOCATION_ID", "JOURNAL_STREAM"}
)
_PLACEHOLDER = "{resume:"


class Place(NamedTuple):
    """The paths of one task that the contract names."""

    directory: str
    output: str
    notify: str  # "": no socket could be made


def order(start: Start, place: Place, found: Found, ckpt_dir: str | None, reign: str) -> Order:
    """Return what a supervisor is told; the user and the groups are filled in by `Users`.

    Raises:
        ValueError: a placeholder cannot be read, a word holds a NUL, no word is left.
    """
    made = Order()
    made.task, made.attempt, made.reign = start.task, start.attempt, reign
    argv = expand(start.argv, found, place.directory)
    if not argv:
        raise ValueError("nothing is left of the command: all of it is for resuming only")
    env = environment(start, place, found, ckpt_dir)
    made.programs = _programs(argv[0], env["PATH"])
    made.argv = _joined(argv)
    made.env = _joined([f"{name}={value}" for name, value in env.items()])
    made.cwd, made.stdin, made.output = start.cwd, start.stdin, place.output
    made.umask, made.memory_bytes = start.umask, start.memory_bytes
    made.cpus, made.tasks_max, made.io_weight = start.cpus, start.tasks_max, start.io_weight
    made.nice = start.nice
    made.resumed_from = found.seq
    return made


def _programs(name: str, path: str) -> tuple[bytes, ...]:
    """Return what `name` may mean: itself, or a file in one of the directories of PATH."""
    if "/" in name:
        return (os.fsencode(name),)
    return tuple(os.fsencode(f"{directory or '.'}/{name}") for directory in path.split(":"))


def _joined(words: Sequence[str]) -> bytes:
    joined = "\0".join(words)
    if joined.count("\0") != len(words) - 1:
        raise ValueError("an argument or a variable holds a NUL character")
    return os.fsencode(joined)


def environment(start: Start, place: Place, found: Found, ckpt_dir: str | None) -> dict[str, str]:
    """Return the submitter's environment with the contract's variables in it."""
    env = {
        name: value
        for name, value in start.env.items()
        if name not in _NOT_FOR_TASKS and not name.startswith("LISTEN_")
    }
    env["CKPTD_TASK_ID"] = str(start.task)
    env["CKPTD_ATTEMPT"] = str(start.attempt)
    env["CKPTD_EPOCH"] = str(start.epoch)
    env["CKPTD_DIR"] = place.directory
    env["CKPTD_RESUME"] = "1" if found.seq else "0"
    env["CKPTD_LAST"] = found.path
    env["CKPTD_SEQ"] = str(found.seq)
    env["CKPTD_CONTROL"] = f"{place.directory}/control.json"
    env["CKPTD_JOURNAL"] = f"{place.directory}/journal/{start.attempt:06d}.j"
    env["CKPTD_DEADLINE"] = str(start.deadline_ns // 10**9) if start.deadline_ns else ""
    env["CKPTD_OUTPUT"] = place.output
    if place.notify:
        env["NOTIFY_SOCKET"] = place.notify
    path = env.get("PATH") or DEFAULT_PATH
    env["PATH"] = f"{path}:{ckpt_dir}" if ckpt_dir else path
    return env


def expand(argv: tuple[str, ...], found: Found, directory: str) -> tuple[str, ...]:
    """Return the words with `{resume:WORD ...}` spelt out when resuming, left out otherwise.

    Raises:
        ValueError: the words inside have an open quote.
    """
    if not any(word.startswith(_PLACEHOLDER) for word in argv):
        return argv
    words: list[str] = []
    for word in argv:
        if not (word.startswith(_PLACEHOLDER) and word.endswith("}")):
            words.append(word)
        elif found.seq:
            inner = shlex.split(word[len(_PLACEHOLDER) : -1])
            words += [
                part.replace("{last}", found.path).replace("{dir}", directory) for part in inner
            ]
    return tuple(words)


def now_ns() -> int:
    """Return the wall clock, for times that people see."""
    return time.time_ns()


def where_ckpt_is() -> str | None:
    """Return the directory of `ckpt` where it is installed beside the interpreter."""
    directory = os.path.dirname(sys.executable)
    return directory if os.path.exists(f"{directory}/ckpt") else None


class Users:
    """Who tasks run as, and with which groups: asked of the system at most once a minute each."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        self._own = os.geteuid()

    def set(self, made: Order, uid: int, gid: int) -> None:
        """Fill in who the task becomes. Only root can change that; to others it is no change."""
        if self._own == 0:
            made.uid, made.gid, made.groups = uid, gid, self._groups(uid, gid)
        elif uid == self._own:
            made.uid, made.gid, made.groups = -1, -1, ()
        else:
            made.uid, made.gid, made.groups = uid, gid, ()  # the kernel will refuse, and say so

    def _groups(self, uid: int, gid: int) -> tuple[int, ...]:
        """Return the groups of `uid`, `gid` among them; of an unknown uid only `gid`."""
        now_s = time.monotonic()
        asked_s, groups = self._known.get((uid, gid), (-GROUPS_KEPT_S, ()))
        if now_s - asked_s < GROUPS_KEPT_S:
            return groups
        try:
            groups = tuple(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
        except KeyError:
            groups = (gid,)
        self._known[uid, gid] = (now_s, groups)
        return groups
