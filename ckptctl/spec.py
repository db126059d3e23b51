"""From submit options (command line or TOML) to a TaskSpec.

Both sources go through one table of converters, so that `--backoff 5s..10m` and
`backoff = "5s..10m"` mean the same. It asks no daemon. Read next: `messages.TaskSpec`.
"""

import argparse
import os
import pwd
import re
import tomllib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

import msgspec

from ckptctl import files, python, units
from ckptctl.selectors import words_of
from ckptd.protocol.errors import BadRequest
from ckptd.protocol.limits import RETRIES_UNLIMITED
from ckptd.protocol.messages import Dependency, TaskSpec

Setting = Callable[[Any], dict[str, Any]]


def _field(name: str, convert: Callable[[Any], Any]) -> Setting:
    return lambda value: {name: convert(value)}


def _backoff(value: Any) -> dict[str, Any]:
    first, cap = units.parse_backoff(value)
    if cap is not None and cap < first:
        raise BadRequest(
            f"--backoff: the longest delay in {value!r} is below the first", "example: 5s..10m"
        )
    return {"backoff_s": first} | ({} if cap is None else {"backoff_max_s": cap})


def _retries(value: Any) -> int:
    is_unlimited = str(value).strip().lower() == "unlimited"
    return RETRIES_UNLIMITED if is_unlimited else units.whole()(value)


def _truth(value: Any) -> bool:
    if str(value).lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise BadRequest(f"neither true nor false: {units.told(value)}")
    return str(value).lower() in ("true", "yes", "1")


def _path(value: Any) -> str:
    return os.path.abspath(os.path.expanduser(str(value)))


def _pairs(what: str) -> Callable[[Any], dict[str, str]]:
    def convert(value: Any) -> dict[str, str]:
        if not isinstance(value, dict):
            words = value if isinstance(value, list | tuple) else [value]
            return units.parse_pairs(map(str, words), what)
        for name, item in value.items():
            if isinstance(item, dict | list):
                raise BadRequest(f"not one value: {name} = {units.told(item)}")
        return {str(name): str(item) for name, item in value.items()}

    return convert


def _labels(value: Any) -> dict[str, str]:
    pairs = _pairs("label")(value)
    for name, item in pairs.items():
        units.one_line(f"{name}={item}")
    return pairs


def _uid_of(value: Any) -> int:
    """Return the uid of a user by name or number; that it is a user's, the daemon checks."""
    try:
        return pwd.getpwnam(str(value)).pw_uid
    except (KeyError, ValueError):
        if re.fullmatch(r"[0-9]{1,10}", str(value)):
            return int(value)
        raise BadRequest(f"there is no user {units.told(value)}", "see: getent passwd") from None


def _needs(when: str) -> Setting:
    def convert(value: Any) -> dict[str, Any]:
        words = words_of(str(word) for word in _listed(value))
        if words.last or words.names or words.ranges:
            raise BadRequest("a dependency is an id or key:K", "example: --after 3,key:prepare")
        tasks = [Dependency(task=number, when=when) for number in words.ids]  # type: ignore[arg-type]
        tasks += [Dependency(key=key, when=when) for key in words.keys]  # type: ignore[arg-type]
        return {"after": tuple(tasks)}

    return convert


def _listed(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [word for item in value for word in _listed(item)]
    return str(value).split(",") if ":" not in str(value) else [value]


SETTINGS: Final[dict[str, Setting]] = {
    "name": _field("name", units.one_line),
    "group": _field("group", str),
    "key": _field("key", units.one_line),
    "priority": _field("priority", units.whole()),
    "chdir": _field("cwd", _path),
    "env": _field("env", _pairs("variable")),
    "labels": _field("labels", _labels),
    "after": _needs("ok"),
    "after-ok": _needs("ok"),
    "after-fail": _needs("fail"),
    "after-any": _needs("any"),
    "hold": _field("hold", _truth),
    "at": _field("at_ns", units.parse_time),
    "in": _field("in_s", units.parse_duration),
    "timeout": _field("timeout_s", units.parse_duration),
    "deadline": _field("deadline_ns", units.parse_time),
    "retries": _field("retries", _retries),
    "backoff": _backoff,
    "on-exit": _field("on_exit", units.parse_exit_map),
    "stop-signal": _field("stop_signal", units.parse_signal),
    "grace": _field("grace_s", units.parse_duration),
    "checkpoint-signal": _field("checkpoint_signal", units.parse_signal),
    "memory": _field("memory_bytes", units.parse_size),
    "cpus": _field("cpus", units.parse_number),
    "tasks-max": _field("tasks_max", units.whole()),
    "io-weight": _field("io_weight", units.whole()),
    "nice": _field("nice", units.whole()),
    "on-oom": _field("on_oom", units.parse_on_oom),
    "stdin": _field("stdin", _path),
    "journal": _field("journal", _truth),
    "as": _field("uid", _uid_of),
}
"""Option or TOML key -> TaskSpec fields; `_OTHER_KEYS` are what else a TOML table may have."""

_FLAGS: Final = {"env": "-E", "labels": "--label"}
"""How a setting is called on the command line, where that is not its key."""
_MANY: Final = ("env", "labels", "after", "after-ok", "after-fail", "after-any", "on-exit")
_OTHER_KEYS: Final = ("command", "shell", "exit-profile", "python", "input", "interpreter")


EXIT_PROFILES: Final[dict[str, dict[str, str]]] = {
    "sysexits": {},  # what the daemon does by itself: 75 and EX_* of sysexits(3)
    "seed": {"1": "fail", "2": "transient"},
}
"""`exit-profile`: what exit codes mean that `on-exit` says nothing of."""


LIMITS: Final = ("memory", "cpus", "tasks-max", "io-weight", "nice", "on-oom")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add what an attempt may use, for submit, run and edit."""
    limits = parser.add_argument_group("what it may use (0: no limit)")
    for names, metavar, text in (
        (("--memory",), "SIZE", "memory, such as 2G"),
        (("--on-oom",), "WHAT", "over its memory: count, fail, hold or retry:x2,max=16G"),
        (("--cpus",), "N", "processors' worth of time, such as 1.5"),
        (("--tasks-max",), "N", "processes and threads"),
        (("--io-weight",), "N", "share of the disk, 1 to 10000 (usual: 100)"),
        (("--nice",), "N", "step back behind others, up to 19; below 0: root's tasks only"),
    ):
        limits.add_argument(*names, metavar=metavar, help=text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of submit and run."""
    what = parser.add_argument_group("the task")
    for names, metavar, text in (
        (("-n", "--name"), "NAME", "what to call it (default: the command's name)"),
        (("-g", "--group"), "GROUP", "group to run in (default: default)"),
        (("-k", "--key"), "KEY", "submit once only: the same key gives the same task"),
        (("-p", "--priority"), "N", "higher starts first (default: 0)"),
        (("-d", "--chdir"), "DIR", "working directory (default: this one)"),
        (("--stdin",), "FILE", "file to read as standard input (default: none)"),
        (("--as",), "USER", "for root: run as this user, and give it the task"),
    ):
        what.add_argument(*names, metavar=metavar, help=text)
    what.add_argument(
        "-l", "--label", dest="labels", metavar="K=V", action="append", help="label it; repeatable"
    )
    what.add_argument("-E", dest="env", metavar="K=V", action="append", help="set a variable")
    what.add_argument("--env-file", metavar="FILE", help="read variables from a file of K=V lines")
    what.add_argument("--clean-env", action="store_true", help="do not pass this environment on")
    what.add_argument(
        "--journal",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="its output goes to the systemd journal, too",
    )
    what.add_argument("--shell", action="store_true", help="run the words as one sh -c script")
    what.add_argument("--file", metavar="SPEC.toml", help="read task(s) from TOML; options win")
    add_limits(parser)
    _add_timing(parser)


def _add_timing(parser: argparse.ArgumentParser) -> None:
    when = parser.add_argument_group("when to start")
    for names, metavar, text in (
        (("--after", "--after-ok"), "TASKS", "once these succeeded: 3,5 or key:K; repeatable"),
        (("--after-fail",), "TASKS", "once these failed"),
        (("--after-any",), "TASKS", "once these ended, well or badly"),
    ):
        when.add_argument(*names, metavar=metavar, action="append", help=text)
    when.add_argument("--at", metavar="TIME", help="not before: 18:00, 2026-11-20T18:00, +3h")
    when.add_argument("--in", metavar="TIME", help="not before this long from now: 90s 5m 2h 3d")
    when.add_argument("--hold", action="store_true", default=None, help="not before `release`")
    ends = parser.add_argument_group("limits, failures and stopping")
    for names, metavar, text in (
        (("--timeout",), "TIME", "stop an attempt that runs longer, however the clock is set"),
        (("--deadline",), "TIME", "give the whole task up at this time"),
        (
            ("--retries",),
            "N",
            "failures beyond the first (default: none), or: unlimited; 3 without progress end it",
        ),
        (("--backoff",), "A..B", "first and longest delay between tries: 5s..10m"),
        (("--on-exit",), "MAP", "meaning of exit codes: 3=retry,65=fail,9=ok"),
        (("--exit-profile",), "NAME", "of other codes: sysexits, or seed: 1=fail,2=transient"),
        (("--stop-signal",), "SIG", "asks the task to stop (default: TERM)"),
        (("--grace",), "TIME", "from the stop signal to SIGKILL"),
        (("--checkpoint-signal",), "SIG", "asks the task to save and go on (default: none)"),
    ):
        ends.add_argument(*names, metavar=metavar, help=text)


def from_args(args: argparse.Namespace) -> list[TaskSpec]:
    """Return the specs of one submit: one from the command line, or those of --file."""
    given = options_of(args) | python.options_of(args)
    tables = read_file(args.file) if args.file else [{}]
    # Not asked for where it is not needed: the directory that we are in may be gone.
    base = {} if all("chdir" in (table | given) for table in tables) else {"chdir": os.getcwd()}
    if args.command:
        given |= {"command": args.command, "shell": args.shell}
    merged = ({**base, **table, **given} for table in tables)
    return [build(python.with_command(one, partial(_env_of, args, one))) for one in merged]


def _env_of(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, str]:
    """Return the environment that a task with these options gets, but for what ckptd adds."""
    fields = read("env", options.get("env", {})) | read("chdir", options["chdir"])
    user = read("as", options["as"]) if "as" in options else {}
    login = _login(user["uid"]) if user else {}
    env, _ = _passed_on(args, is_for_others=bool(user))
    return {**env, "PWD": fields["cwd"], **login, **fields["env"]}


def limits_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the given limits by their TOML keys."""
    given = {key: getattr(args, key.replace("-", "_")) for key in LIMITS}
    return {key: value for key, value in given.items() if value is not None}


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the given options by their TOML keys."""
    found: dict[str, Any] = {}
    for key in (*SETTINGS, "exit-profile"):
        value = getattr(args, key.replace("-", "_"), None)
        if value is not None:
            found[key] = value
    if args.env_file:
        found["env"] = files.read_env_file(args.env_file) + found.get("env", [])
    return found


def build(options: dict[str, Any]) -> TaskSpec:
    """Return the spec of the options. Raises BadRequest with the nearest key."""
    options = dict(options)
    fields: dict[str, Any] = {"umask": _umask()}
    argv = _argv(options.pop("command", None), shell=options.pop("shell", False))
    profile = _exit_profile(options.pop("exit-profile", "sysexits"))
    for key, value in options.items():
        merge(fields, key, value)
    if profile:
        fields["on_exit"] = {**profile, **fields.get("on_exit", {})}
    if "uid" in fields:
        fields["env"] = {**_login(fields["uid"]), **fields.get("env", {})}
    return converted({**fields, "argv": argv})


def _exit_profile(name: Any) -> dict[str, str]:
    if str(name) not in EXIT_PROFILES:
        hint = units.nearest(str(name), EXIT_PROFILES) or f"known: {', '.join(EXIT_PROFILES)}"
        raise BadRequest(f"--exit-profile: there is no profile {units.told(name)}", hint)
    return EXIT_PROFILES[str(name)]


def merge(fields: dict[str, Any], key: str, value: Any) -> None:
    """Add one setting; dependencies of several keys add up."""
    if key not in SETTINGS:
        hint = units.nearest(key, [*SETTINGS, *_OTHER_KEYS]) or "see: ckptctl submit -h"
        raise BadRequest(f"unknown setting {key!r}", hint)
    for name, item in read(key, value).items():
        fields[name] = (*fields[name], *item) if name == "after" and name in fields else item


def read(key: str, value: Any) -> dict[str, Any]:
    """Return the fields of one setting; what cannot be read is told by its option."""
    option = _FLAGS.get(key, f"--{key}")
    if isinstance(value, str) and not value:
        raise units.empty(option)
    if isinstance(value, dict | list | tuple) and key not in _MANY:
        raise BadRequest(f"{option}: not one value: {units.told(value)}")
    return units.named(option, SETTINGS[key], value)


def labels_of(words: Iterable[str]) -> dict[str, str]:
    """Return the labels of many `--label K=V`."""
    return dict(read("labels", words)["labels"])


def _login(uid: int) -> dict[str, str]:
    """Return what a login sets, so that nobody works in another user's home by mistake."""
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return {}
    names = {"USER": user.pw_name, "LOGNAME": user.pw_name}
    return {"HOME": user.pw_dir, "SHELL": user.pw_shell or "/bin/sh", **names}


def converted(fields: dict[str, Any]) -> TaskSpec:
    """Return the checked spec. Raises BadRequest for a value out of range."""
    try:
        return msgspec.convert(fields, TaskSpec, strict=True)
    except msgspec.ValidationError as bad:
        from ckptctl.refusals import out_of_range  # noqa: PLC0415 (for mistakes only)

        refused = BadRequest(f"the task cannot be submitted: {bad}")
        raise out_of_range(refused, fields) from bad


def _argv(command: Any, *, shell: bool) -> tuple[str, ...]:
    if not command:
        raise BadRequest("no command", "example: ckptctl submit -- rsync -a src/ dst/")
    if isinstance(command, str):
        return ("/bin/sh", "-c", command) if shell else units.parse_command(command)
    if not isinstance(command, list | tuple):
        raise BadRequest(f"not a command: {units.told(command)}", 'example: "make all"')
    words = tuple(str(word) for word in command)
    if shell and not "".join(words).strip():
        raise BadRequest("no command in what --shell is to run")
    if shell:
        return ("/bin/sh", "-c", words[0] if len(words) == 1 else " ".join(words))
    return words


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def environment(
    args: argparse.Namespace, tasks: Iterable[TaskSpec] = ()
) -> tuple[dict[str, str], list[str]]:
    """Return the environment to pass on, and the names that no text can carry.

    For another user only what is nobody's own: the rest may hold what is not theirs to know.
    """
    return _passed_on(args, is_for_others=any(task.uid is not None for task in tasks))


def _passed_on(
    args: argparse.Namespace, *, is_for_others: bool
) -> tuple[dict[str, str], list[str]]:
    if args.clean_env or is_for_others:
        own = () if is_for_others else ("HOME", "USER", "LOGNAME", "SHELL")
        kept = ("PATH", "LANG", *own)
        return {name: os.environ[name] for name in kept if name in os.environ}, []
    env, lost = {}, []
    for name, value in os.environ.items():
        if f"{name}{value}".isascii() or _is_text(name + value):
            env[name] = value
        else:
            lost.append(name)
    return env, lost


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_file(path: str) -> list[dict[str, Any]]:
    """Return the options of each task of a TOML file: the top level, or every [[task]]."""
    try:
        table = tomllib.loads(files.read_text(path))
    except tomllib.TOMLDecodeError as bad:
        raise BadRequest(f"{path}: not TOML: {bad}") from bad
    tasks = table.pop("task", None)
    if tasks is None:
        return [table]
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise BadRequest(f"{path}: write each task as a [[task]] table")
    return [{**table, **task} for task in tasks]
