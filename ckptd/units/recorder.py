r"""The exit record of a unit: written by a few lines of shell that systemd runs after the task.

    STATE/units/7.2.8a0f2fb3c19d77e45b1d0c2e    task 7, attempt 2; then the begin of the boot id,
                                                random, and of which `units/`: no copy is that

    refused
    ended result=oom-kill code=killed status=KILL inv=... stopping=0 cpu=.. peak=.. oom=1 oom_kill=1

    RUN/began/7.2                        gone with the boot, as the unit itself

    started at=1795208329020171000 pid=65 from=3 inv=d5e6e7e7863140799e53b74afcbb0bf0 record=7.2.8..

The record is made empty, with its block, before the unit: a full disk cannot refuse an end. It is
the start fence, too: a unit whose record holds anything does not start (ConditionFileNotEmpty).
Lines are added whole, by one write each: `refused` by a daemon that gave the attempt up, `ended` by
the recorder. The file is synchronous (chattr +S), so that the shell's write is durable by itself.
Invariant: nothing of the task's is left running when `ended` is written.
Read next: `runner.py`. Source: systemd.service(5) on ExecStopPost, cgroup v2 documentation.
"""

import contextlib
import errno
import os
import re
import signal
import time
import zlib
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec.structs import replace

from ckptd.core.port import EndSeen
from ckptd.protocol.ids import parse_attempt_name
from ckptd.runner import attempt, linux

RECORD_BYTES_MAX = 4_096
_DIGITS_EACH = 8  # of the three parts that a record's name ends with

RECORDER = r"""umask 077
group= oom= stopping=0 synced=0 usec= peak=
while IFS= read -r line; do
  case $line in 0::*) group=/sys/fs/cgroup${line#0::};; esac
done </proc/self/cgroup
[ -r "$group/memory.events" ] && while read -r key value; do
  case $key in oom|oom_kill) oom="$oom $key=$value";; esac
done <"$group/memory.events"
[ -r "$group/cpu.stat" ] && while read -r key value; do
  case $key in usage_usec) usec=$value;; esac
done <"$group/cpu.stat"
[ -r "$group/memory.peak" ] && read -r peak <"$group/memory.peak"
[ -e "$2" ] && stopping=1 && sync && synced=1
how="result=$SERVICE_RESULT code=$EXIT_CODE status=$EXIT_STATUS inv=$INVOCATION_ID"
printf '%s\n' "ended $how stopping=$stopping synced=$synced cpu=$usec peak=$peak$oom" >>"$1"
[ "$3" ] && sync "$1" "${1%/*}" 2>/dev/null || :
"""
"""The shell's own commands only: one process an end. sync(1) where the file system needs it; a
daemon that has read the record meanwhile may have removed it."""


class Began(msgspec.Struct, frozen=True):
    """The `started` line."""

    at_ns: int
    pid: int
    resumed_from: int
    invocation: str


class Stopped(msgspec.Struct, frozen=True):
    """The `ended` line, or the same from the properties of a unit whose recorder failed."""

    code: str  # exited, killed, dumped
    status: str  # 3, KILL
    ended_ns: int
    result: str = ""
    is_stopping: bool = False
    is_synced: bool = False  # all files were, after the task's end: what it saved can be trusted
    limit_hits: int = 0  # the group's own memory limit was hit, so often
    kills: int = 0  # of its processes, by the kernel's OOM killer
    cpu_s: float = 0.0
    peak_bytes: int = 0

    @property
    def exit_code(self) -> int:
        """Return the main process's exit code; 0 where a signal ended it."""
        return _whole(self.status) if self.code == "exited" else 0

    @property
    def signal(self) -> int:
        """Return the signal that ended the main process, 0 for none."""
        if self.code == "exited":
            return 0
        if number := _whole(self.status):
            return number
        name, plus, more = f"SIG{self.status}".partition("+")
        return int(getattr(signal, name, signal.SIGKILL)) + (_whole(more) if plus else 0)


class Record(msgspec.Struct, frozen=True):
    """What a record says so far."""

    began: Began | None = None
    is_refused: bool = False
    stopped: Stopped | None = None


# --- on disk --------------------------------------------------------------------------------


class Records:
    """The records of all attempts, and their names."""

    def __init__(self, state_dir: str, run_dir: str, boot_id: str) -> None:
        self.directory = f"{state_dir}/units"
        self._began = f"{run_dir}/began"
        self.is_synchronous = False
        is_new = not os.path.isdir(self.directory)
        for path in (self.directory, self._began):
            os.makedirs(path, 0o700, exist_ok=True)
            os.chmod(path, 0o700)
        self._boot = boot_id.replace("-", "")[:_DIGITS_EACH]
        self._home = home_of(self.directory)
        self._names: dict[tuple[int, int], str] = {}
        for name in os.listdir(self.directory):  # Bound: attempts that are not forgotten
            if (key := key_of(name)) is not None:
                self._names[key] = name
        if not is_new:  # else what has begun was another store's
            self._find_removed()

    def _find_removed(self) -> None:
        """Know attempts of this boot whose record somebody removed: they may still run."""
        for name in os.listdir(self._began):
            key = parse_attempt_name(name)
            if key is None or key in self._names:
                continue
            record = _NAME(read(f"{self._began}/{name}")[0])
            if record is not None and key_of(record[1]) == key:
                self._names[key] = record[1]

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._names

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(tuple(self._names))

    def path(self, key: tuple[int, int]) -> str:
        """Return where the attempt's record is, "" where it has none."""
        name = self._names.get(key, "")
        return f"{self.directory}/{name}" if name else ""

    def is_of_this_boot(self, key: tuple[int, int]) -> bool:
        """Tell whether a process of this attempt can still be there."""
        return is_of_boot(self._names[key], self._boot)

    def gone(self, key: tuple[int, int]) -> tuple[str, str] | None:
        """Return cause and text for an attempt that no process of ours can be of; else None."""
        if not self.is_of_this_boot(key):
            return "reboot", "the machine was restarted meanwhile"
        if not is_made_in(self._names[key], self._home):
            return "lost", "it ran in the store that this is a copy of"
        return None

    def make(self, key: tuple[int, int]) -> str:
        """Make an empty record for an attempt that has none; return its path.

        Raises:
            FileExistsError: it has one: somebody ordered or refused it.
            OSError: there is no room for it.

        Durable: nothing; after a power loss no process of that boot is left.
        """
        if key in self._names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.path(key))
        name = f"{key[0]}.{key[1]}.{self._boot}{os.urandom(4).hex()}{self._home}"
        path = f"{self.directory}/{name}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            linux.reserve(fd, RECORD_BYTES_MAX)
            self.is_synchronous = linux.make_synchronous(fd)
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
        self._names[key] = name
        return path

    def note_start(self, key: tuple[int, int], began: Began) -> None:
        """Keep who runs the attempt, for the next daemon.

        Durable: nothing, as the start itself.
        """
        line = f"started at={began.at_ns} pid={began.pid} from={began.resumed_from}"
        with contextlib.suppress(OSError):  # then the next daemon asks for more
            record = os.path.basename(self.path(key))
            text = f"{line} inv={began.invocation} record={record}\n"
            _write(f"{self._began}/{key[0]}.{key[1]}", text, os.O_TRUNC)

    def refuse(self, key: tuple[int, int]) -> None:
        """Shut the fence: an order that is still under way runs nothing from here on."""
        if key not in self._names:
            with contextlib.suppress(OSError):  # a full disk: then there is no order either
                self.make(key)
        self._add(key, "refused\n")

    def read(self, key: tuple[int, int]) -> Record:
        """Return what is known of an attempt. A record that somebody removed says nothing.

        Raises:
            OSError: it cannot be read now.
        """
        path = self.path(key)
        if not path:
            return Record()
        text, changed_ns = "", 0
        with contextlib.suppress(FileNotFoundError):  # the recorder makes it anew
            text, changed_ns = read(path)
        with contextlib.suppress(FileNotFoundError):
            if self.is_of_this_boot(key):
                began = read(f"{self._began}/{key[0]}.{key[1]}")[0]
                name = _NAME(began)  # another's: of a store that was thrown away
                text = began + text if name is not None and name[1] == self._names[key] else text
        return parsed(text, changed_ns)

    def forget(self, key: tuple[int, int]) -> None:
        """Drop an attempt's record. Durable: nothing; one that comes back is dropped again."""
        path = self.path(key)
        if path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            del self._names[key]
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self._began}/{key[0]}.{key[1]}")

    def _add(self, key: tuple[int, int], line: str) -> None:
        path = self.path(key)
        if path:
            with contextlib.suppress(OSError):  # the block is there; a disk that fails shows later
                _write(path, line, os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK)


def _write(path: str, text: str, flags: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def read(path: str) -> tuple[str, int]:
    """Return what a file says and when it was written last, in ns."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.read(fd, RECORD_BYTES_MAX).decode(errors="replace"), os.fstat(fd).st_mtime_ns
    finally:
        os.close(fd)


def home_of(directory: str) -> str:
    """Return the digits that tell the directory of records from any copy of it."""
    return f"{zlib.crc32(attempt.home_of(directory).encode()):08x}"


def is_of_boot(name: str, boot_id: str) -> bool:
    """Tell whether a process of the record's attempt can still be there."""
    return name.rpartition(".")[2][:_DIGITS_EACH] == boot_id.replace("-", "")[:_DIGITS_EACH]


def is_made_in(name: str, home: str) -> bool:
    """Tell whether a record was made there; those of versions that did not say were."""
    return name.rpartition(".")[2][2 * _DIGITS_EACH :] in {"", home}


def key_of(name: str) -> tuple[int, int] | None:
    """Return (task, attempt) of a record's name, None where it is none."""
    stem, _, _ = name.rpartition(".")
    return parse_attempt_name(stem)


def parsed(text: str, changed_ns: int) -> Record:
    """Return what the lines say; one without its newline is torn and says nothing.

    `changed_ns`: when the file was written last, which is when the attempt ended.
    """
    began: Began | None = None
    stopped: Stopped | None = None
    is_refused = False
    for line in text.splitlines(keepends=True):
        kind, _, rest = line.partition(" ")
        said = dict(_PAIR(rest)) if line.endswith("\n") else {}
        if kind == "started" and said:
            began = Began(
                _number(said, "at"), _number(said, "pid"), _number(said, "from"),
                said.get("inv", ""),
            )  # fmt: skip
        elif kind == "refused\n":
            is_refused = True
        elif kind == "ended" and said.get("code"):
            stopped = _stopped(said, changed_ns)
    return Record(began, is_refused, stopped)


_NAME = re.compile(r" record=(\S+)\n").search
_PAIR = re.compile(r"(\w+)=(\S*)").findall


def _stopped(said: dict[str, str], ended_ns: int) -> Stopped:
    return Stopped(
        code=said["code"],
        status=said.get("status", ""),
        ended_ns=ended_ns,
        result=said.get("result", ""),
        is_stopping=said.get("stopping") == "1",
        is_synced=said.get("synced") == "1",
        limit_hits=_number(said, "oom"),
        kills=_number(said, "oom_kill"),
        cpu_s=_number(said, "cpu") / 1e6,
        peak_bytes=_number(said, "peak"),
    )


def _number(said: dict[str, str], name: str) -> int:
    return _whole(said.get(name, ""))


def _whole(text: str) -> int:
    """Return a number; 0 for what is none, as a record of `systemd --user` may hold anything."""
    return int(text) if _DIGITS(text) else 0


_DIGITS = re.compile(r"[0-9]{1,19}").fullmatch  # a time in nanoseconds has 19


# --- what it means ----------------------------------------------------------------------------


def seen(key: tuple[int, int], stopped: Stopped, began: Began | None, memory_bytes: int) -> EndSeen:
    """Return the end as the daemon waits for it."""
    cause = "signal" if stopped.signal else "exit"
    text = blame = ""
    has_failed = stopped.signal or stopped.exit_code
    if stopped.is_stopping:  # whatever else it met with: nobody is to blame, it runs again
        cause, text = "shutdown", "the machine, or the slice of all tasks, was being stopped"
    elif stopped.kills and has_failed:
        blame = "limit" if stopped.limit_hits else "host"
        text = _evidence(stopped, blame, memory_bytes)
        if signal.SIGKILL in {stopped.signal, stopped.exit_code - 128}:
            cause = "oom"
    return EndSeen(
        *key,
        cause,
        code=stopped.exit_code,
        signal=signal.SIGKILL if cause == "oom" else stopped.signal,
        core=stopped.code == "dumped",
        started_ns=began.at_ns if began else 0,
        ended_ns=max(stopped.ended_ns, began.at_ns if began else 0),  # a file's clock is coarse
        cpu_s=stopped.cpu_s,
        rss_bytes=stopped.peak_bytes,
        text=text,
        blame=blame,
    )


def _evidence(stopped: Stopped, blame: str, memory_bytes: int) -> str:
    who = "it" if stopped.signal == signal.SIGKILL else "a child of it"
    if blame == "host":
        return f"memory ran out around it: the kernel's OOM killer ended {who} ({stopped.kills})"
    limit = f"its own limit of {memory_bytes} bytes" if memory_bytes else "its own memory limit"
    return f"{limit} was hit: the kernel's OOM killer ended {who} ({stopped.kills})"


def from_unit(said: dict[str, Any], *, has_limit: bool, is_stopping: bool) -> Stopped:
    """Return an end as the manager's properties tell it, where no recorder could run."""
    return Stopped(
        code=_CODES.get(said.get("ExecMainCode", 0), "exited"),
        status=str(said.get("ExecMainStatus", 0)),
        ended_ns=said.get("ExecMainExitTimestamp", 0) * 1_000 or time.time_ns(),
        result=said.get("Result", ""),
        is_stopping=is_stopping,
        kills=said.get("Result") == "oom-kill",
        limit_hits=has_limit,
    )


_CODES = {os.CLD_EXITED: "exited", os.CLD_KILLED: "killed", os.CLD_DUMPED: "dumped"}


def without(
    key: tuple[int, int], cause: str, text: str, code: int = 0, *, began: Began | None = None
) -> EndSeen:
    """Return an end that nobody recorded, as of now."""
    started_ns = began.at_ns if began is not None else 0
    return EndSeen(*key, cause, code, started_ns=started_ns, ended_ns=time.time_ns(), text=text)


def as_stopped(end: EndSeen) -> EndSeen:
    """Return the same end of a unit that somebody stopped by hand."""
    if end.cause not in {"exit", "signal"}:
        return end
    return replace(end, cause="stopped", text="its unit was stopped: systemctl stop, or the like")
