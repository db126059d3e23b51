r"""How an attempt becomes a transient unit: its start script and its properties.

    ckptd-task-7-2.service in ckptd.slice
      ExecStart     /bin/sh STATE/start/7.2          cd, environment, input, then `exec` the command
      ExecStopPost  /bin/sh RUN/recorder RECORD    as root, see `recorder.py`

The script exists because properties are public: every user may read a unit's environment and
argument words over D-Bus and in /run/systemd/transient. It belongs to the task's user, mode 0600.
And because the unit's own environment is also that of ExecStopPost, which runs as root: an
LD_PRELOAD of the user must never get there.
Invariant: nothing of a client's text reaches a property, but for typed values and the description.
Read next: `runner.py`.
"""

import errno
import os
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

from ckptd.core.port import Start
from ckptd.protocol.ids import parse_attempt_name

SLICE, DAEMON, DRAIN = "ckptd.slice", "ckptd.service", "ckptd-drain.service"
_SHUTDOWN = "shutdown.target"
_STOOD_ON = ("basic.target", "network.target", "remote-fs.target")
_SHELL, _ENV = "/bin/sh", "/usr/bin/env"
_STOP_MIN_S = 1.0
_OOM_SCORE = 300  # before the daemon and the system, after what asks to be killed first
_NAME_CHARS_SHOWN = 100

Property = tuple[str, tuple[str, Any]]


# --- names ----------------------------------------------------------------------------------


def key_of(unit: str) -> tuple[int, int] | None:
    """Return (task, attempt) of a unit's name, None where it is none of ours."""
    stem = unit.removeprefix("ckptd-task-").removesuffix(".service")
    return parse_attempt_name(stem.replace("-", ".")) if len(stem) < len(unit) else None


# --- the script -----------------------------------------------------------------------------

_EXPORTABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*").fullmatch
_SPECIAL = frozenset(
    (
        "DIRSTACK", "EPOCHREALTIME", "EPOCHSECONDS", "EUID", "EXECIGNORE", "FUNCNAME", "FUNCNEST",
        "GLOBIGNORE", "GROUPS", "HISTCMD", "IFS", "LINENO", "OPTARG", "OPTIND", "PIPESTATUS",
        "PPID", "RANDOM", "SECONDS", "SHELLOPTS", "SRANDOM", "UID",
    )
)  # fmt: skip
"""What some shell keeps for itself or obeys, with all of BASH*: set by env(1), after the shell."""
_NOT_OURS = "HOME LANG LOGNAME OLDPWD PWD SHELL SHLVL USER"  # set by systemd or the shell


def script(start: Start, argv: Sequence[str], env: dict[str, str]) -> bytes:
    r"""Return the start script.

    Each step is named in $1; where one fails, its name and the exit code are added to the script
    itself, so that "cannot start" is told from a command that ends with the same code:

        trap 'printf "# failed %s %s\n" "$?" "$1" >>"$0"' EXIT
        set cd; cd -- '/work' || exit 1
        set exec; exec 'make' 'all'
        # failed 127 exec

    Raises:
        ValueError: a word holds a NUL character, or none is left.
    """
    if not argv:
        raise ValueError("nothing is left of the command: all of it is for resuming only")
    odd = {name for name in env if not _EXPORTABLE(name) or _is_special(name)}
    plain = (f"{name}={_quoted(value)}" for name, value in env.items() if name not in {*odd, "_"})
    words = [_quoted(word) for word in argv]
    found = ""
    if odd:
        found = f"command -v -- {words[0]} >/dev/null || exit 127; "  # env(1) would not say it
        words = [_ENV, "--", *(_quoted(f"{name}={env[name]}") for name in sorted(odd)), *words]
    lines = [
        """trap 'printf "# failed %s %s\\n" "$?" "$1" >>"$0"' EXIT""",
        '[ -z "$BASH_VERSION" ] || shopt -s execfail',  # it drops the trap before an exec
        f"set cd; cd -- {_quoted(start.cwd)} || exit 1",
        f"umask {start.umask:04o}",
        f"set stdin; exec <{_quoted(start.stdin)} || exit 1" if start.stdin else "",
        f"unset {_NOT_OURS} MEMORY_PRESSURE_WATCH MEMORY_PRESSURE_WRITE SYSTEMD_EXEC_PID",
        f"export {' '.join(plain)} 2>/dev/null",  # bash complains of locales that it lacks
        f"set exec; {found}exec {' '.join(words)}",
        """set "$?"; printf "# failed %s exec\\n" "$1" >>"$0"; trap - EXIT; exit "$1\"""",
    ]
    text = "\n".join(line for line in lines if line) + "\n"
    if "\0" in text:
        raise ValueError("an argument or a variable holds a NUL character")
    return os.fsencode(text)


def _is_special(name: str) -> bool:
    return name in _SPECIAL or name.startswith("BASH")


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def complaint(tail: bytes, start: Start | None) -> tuple[int, str] | None:
    """Return (errno, text) where the script says that a step failed, None where it does not.

    The script is the user's: what they write there is believed of their own task only.
    """
    found = re.search(rb"\n# failed (\d{1,3}) (cd|stdin|exec)\n*$", tail)
    if found is None:
        return None
    step = found[2].decode()
    number = errno.EACCES if (step, found[1]) == ("exec", b"126") else errno.ENOENT
    doing = {"cd": "enter the working directory", "stdin": "open the input", "exec": "execute"}
    what = ""
    if start is not None:
        what = {"cd": start.cwd, "stdin": start.stdin, "exec": start.argv[0]}[step]
    said = os.strerror(number)
    return (
        number,
        f"cannot {doing[step]} {what}: {said}" if what else f"cannot {doing[step]}: {said}",
    )


_STEPS = {  # Source: systemd.exec(5), "Process Exit Codes"
    200: "enter the working directory", 203: "execute /bin/sh", 205: "set its limits",
    208: "open its input", 209: "open its output", 216: "take on its group",
    217: "take on its user", 219: "make its control group",
}  # fmt: skip


def systemd_problem(code: int, status: int, unit: str) -> tuple[int, str] | None:
    """Return (errno, text) where systemd itself gave up before the start script ran.

    `code`, `status`: ExecMainCode and ExecMainStatus of a unit without an exit record.
    """
    if code != os.CLD_EXITED or status not in range(200, 246):
        return None
    doing = _STEPS.get(status, f"set it up (step {status})")
    return errno.EINVAL, f"systemd could not {doing}; see: journalctl -u {unit}"


# --- the properties -------------------------------------------------------------------------


class Paths:
    """The files of one attempt that its unit is told of."""

    __slots__ = ("is_synchronous", "record", "recorder", "script", "stopping")

    def __init__(
        self, script_path: str, recorder: str, record: str, stopping: str, *, is_synchronous: bool
    ) -> None:
        self.script = script_path
        self.recorder = recorder
        self.record = record
        self.is_synchronous = is_synchronous  # a write to the record is durable by itself
        self.stopping = stopping


def properties(start: Start, paths: Paths, output: int, *, is_system: bool) -> list[Property]:
    """Return the unit's properties, for StartTransientUnit."""
    recorder = ["sh", paths.recorder, paths.record, paths.stopping]
    if not paths.is_synchronous:
        recorder.append("sync")
    found: list[Property] = [
        ("Description", ("s", _description(start))),
        ("Type", ("s", "simple")),  # what cannot be executed is told by the script
        # Not ExecStartEx, which has flags: systemd 252 writes that very name into the unit's file,
        # and after the next daemon-reload the unit has neither a command nor a recorder. Nor may
        # a word hold `;` or `$`: it reads them back with a backslash before. So both are files.
        ("ExecStart", ("a(sasb)", [_command(["sh", paths.script])])),
        ("ExecStopPost", ("a(sasb)", [_command(recorder)])),
        # The fence: once anything is known of a start or an end, there is no other start; nor
        # once the attempt is forgotten, for an order that was on its way all the time.
        ("Conditions", ("a(sbbs)", _fence(paths.record))),
        ("AddRef", ("b", True)),  # it stays to be asked about for as long as we are there
        ("CollectMode", ("s", "inactive")),
        ("Slice", ("s", SLICE)),
        # The default dependencies but for sysinit.target, which a running machine has, and which
        # would cost fifty jobs a start. At a shutdown we are stopped before what tasks stand on.
        ("DefaultDependencies", ("b", False)),
        ("Conflicts", ("as", [_SHUTDOWN])),
        ("Before", ("as", [DRAIN, _SHUTDOWN])),
        ("After", ("as", [DAEMON, *_STOOD_ON])),
        ("KillMode", ("s", "mixed")),
        ("KillSignal", ("i", start.stop_signal)),
        ("TimeoutStopUSec", ("t", _usec(max(start.stop_s, _STOP_MIN_S)))),
        ("IgnoreSIGPIPE", ("b", False)),
        ("OOMPolicy", ("s", "continue")),  # a dead child is the task's business
        ("OOMScoreAdjust", ("i", _OOM_SCORE)),
        ("StandardOutputFileDescriptor", ("h", output)),
        ("StandardErrorFileDescriptor", ("h", output)),
        ("SyslogIdentifier", ("s", "ckptd-task")),
        ("LogExtraFields", ("aay", list(_log_fields(start)))),
        *_limits(start),
    ]
    if is_system:
        found += [
            ("User", ("s", str(start.uid))),
            ("Group", ("s", str(start.gid))),
            ("PermissionsStartOnly", ("b", True)),  # the recorder stays root
        ]
    return found


def _fence(record: str) -> list[tuple[str, bool, bool, str]]:
    """Return the conditions of a start: (kind, is trigger, is negated, path)."""
    return [
        ("ConditionPathExists", False, False, record),
        ("ConditionFileNotEmpty", False, True, record),
    ]


def _command(argv: list[str]) -> tuple[str, list[str], bool]:
    """Return a command of a unit, its words safe from the manager's own `$` expansion."""
    return _SHELL, [word.replace("$", "$$") for word in argv], False


def _description(start: Start) -> str:
    """Return what systemd's own log lines call it; the name is a client's: one printable line."""
    shown = "".join(char if char in _SHOWN else "?" for char in start.name[:_NAME_CHARS_SHOWN])
    return f"ckptd task {start.task}, attempt {start.attempt}" + (f": {shown}" if shown else "")


_SHOWN = frozenset(string.ascii_letters + string.digits + " ._-+/=,:@")


def _log_fields(start: Start) -> Iterable[bytes]:
    yield b"CKPTD_TASK_ID=%d" % start.task
    yield b"CKPTD_ATTEMPT=%d" % start.attempt
    yield b"CKPTD_UID=%d" % start.uid


def _limits(start: Start) -> Iterable[Property]:
    if start.memory_bytes:
        yield "MemoryMax", ("t", start.memory_bytes)
        yield "MemorySwapMax", ("t", 0)  # a limit that swap takes the point of is none
    if start.cpus:
        yield "CPUQuotaPerSecUSec", ("t", _usec(start.cpus))
    if start.tasks_max:
        yield "TasksMax", ("t", start.tasks_max)
    if start.io_weight:
        yield "IOWeight", ("t", start.io_weight)
    if start.nice:
        yield "Nice", ("i", start.nice)


def _usec(seconds: float) -> int:
    return int(seconds * 1e6)
