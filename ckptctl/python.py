"""`submit --python module:function`: ask a function what it is, then make a command of it.

    [interpreter, .../ckptd/sdk/run.py, "work:ingest", "--input", "{...}"]

The author's own interpreter imports the function before anything is submitted, in the directory
and with the environment that the task will have: what cannot run there is refused here.
Bound: DESCRIBE_S for that. Read next: `spec.py`, `ckptd/sdk/run.py`.
"""

import argparse
import json
import os
import pwd
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import ckptd
from ckptctl import units
from ckptctl.files import lasting, read_text
from ckptctl.words import clean
from ckptd.protocol import limits
from ckptd.protocol.errors import BadRequest

if TYPE_CHECKING:
    import subprocess

DESCRIBE_S: Final = 10.0
INPUT_BYTES_MAX: Final = limits.ARGV_BYTES_MAX - (4 << 10)  # the rest of the command has room, too
ON_EXIT: Final = {"2": "transient"}  # what `ckptd.sdk` exits with when others make it wait
_SAID_BYTES_MAX: Final = 64 << 10
_EXAMPLE: Final = 'example: --python work:ingest --input \'{"path": "data.csv"}\''


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a task that is a function."""
    what = parser.add_argument_group("a Python function instead of a command")
    what.add_argument("--python", metavar="M:F", help="run function F of module M as a task")
    what.add_argument(
        "--input", metavar="JSON", help="its arguments as an object: JSON, @FILE, or - for stdin"
    )
    what.add_argument(
        "--interpreter", metavar="PATH", help="its Python (default: the venv's, else python3)"
    )


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was given of these options, the input as a value."""
    found = {name: getattr(args, name, None) for name in ("python", "interpreter")}
    text = getattr(args, "input", None)
    if text is not None:
        found["input"] = _input(text)
    return {name: value for name, value in found.items() if value is not None}


def _input(text: str) -> Any:
    source = "--input"
    if text == "-" or text.startswith("@"):
        source = f"--input {text}"
        text = read_text(text.removeprefix("@"))
    try:
        return units.parse_json(text)
    except ValueError as bad:
        raise BadRequest(f"{source}: not JSON: {bad}", _EXAMPLE) from bad


def with_command(
    options: dict[str, Any], environment: Callable[[], Mapping[str, str]]
) -> dict[str, Any]:
    """Return options with a command in place of the function, and what its author declared.

    What was given wins over what was declared. Without a function they come back as they are.

    Raises:
        BadRequest: it cannot be imported, is not there, or does not take the input.
    """
    options = dict(options)
    target, given = options.pop("python", None), options.pop("input", None)
    interpreter = options.pop("interpreter", None)
    if target is None:
        if given is not None or interpreter is not None:
            raise BadRequest("--input and --interpreter belong to --python", _EXAMPLE)
        return options
    if options.get("command"):
        raise BadRequest(
            "a task is a command or a function, not both", f"arguments go to --input; {_EXAMPLE}"
        )
    command = [_interpreter(interpreter), _runner(), str(target), "--input", _compact(given)]
    told = _described(command, options, environment())
    on_exit = units.named("--on-exit", units.parse_exit_map, options.pop("on-exit", {}))
    return {
        **_declared(told),
        **options,
        "command": command,
        "shell": False,
        "on-exit": {**ON_EXIT, **on_exit},
    }


def checked_command(target: str, given: Any, interpreter: str | None, cwd: str) -> list[str]:
    """Return the command of a function's attempt in our own environment, with it looked at.

    Raises:
        BadRequest: it cannot be imported, is not there, or does not take the input.
    """
    command = [_interpreter(interpreter), _runner(), target, "--input", _compact(given)]
    _described(command, {"chdir": cwd}, os.environ)
    return command


def _runner() -> str:
    assert ckptd.__file__ is not None
    return lasting(os.path.join(os.path.dirname(os.path.abspath(ckptd.__file__)), "sdk", "run.py"))


def _interpreter(given: str | None) -> str:
    """Return the interpreter's path, links and all: a venv is known by the path it is called by."""
    import shutil  # noqa: PLC0415 (a plain submit does not pay for it)

    venv = os.environ.get("VIRTUAL_ENV", "")
    wanted = given or (os.path.join(venv, "bin", "python") if venv else "python3")
    found = shutil.which(os.path.expanduser(wanted))
    if found is None:
        where = "--interpreter" if given else "$VIRTUAL_ENV" if venv else "$PATH"
        raise BadRequest(
            f"no Python to run it with: {wanted} (from {where}) cannot be executed",
            "name one: --interpreter .venv/bin/python",
        )
    return os.path.abspath(found)


def _compact(given: Any) -> str:
    given = {} if given is None else given
    if not isinstance(given, dict):
        kind = {list: "a list", str: "a text", bool: "true or false"}.get(type(given), "a number")
        raise BadRequest(
            f"--input is {kind}, an object is expected: names and values of the arguments", _EXAMPLE
        )
    try:
        text = json.dumps(given, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as bad:  # from TOML: a date, or inf
        raise BadRequest(f"input: it cannot be written as JSON: {bad}", "use a text") from bad
    if len(text) > INPUT_BYTES_MAX:
        raise BadRequest(
            f"--input has {len(text):,} bytes, a command takes at most {INPUT_BYTES_MAX:,}",
            "put it into a file, and hand over the file's path",
        )
    return text


def _declared(told: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": str(told.get("name") or "task")[: limits.NAME_CHARS_MAX]}
    if isinstance(told.get("retries"), int):
        found["retries"] = told["retries"]
    delays = [told.get("backoff_s"), told.get("backoff_max_s")]
    if all(isinstance(delay, int | float) for delay in delays):
        found["backoff"] = "..".join(f"{delay:.6f}s" for delay in delays)
    return found


def _described(
    command: list[str], options: Mapping[str, Any], env: Mapping[str, str]
) -> dict[str, Any]:
    """Let the interpreter import the function and look whether it takes the input."""
    python, runner, target, *rest = command
    import subprocess  # noqa: PLC0415 (a plain submit does not pay for it)

    cwd = os.path.abspath(os.path.expanduser(str(options["chdir"])))
    if not os.path.isdir(cwd):
        raise BadRequest(f"there is no directory {cwd}", "--chdir names where the task runs")
    try:
        done = subprocess.run(
            [python, runner, "--describe", target, *rest],
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=DESCRIBE_S,
            **_as_user(options.get("as")),
        )
    except subprocess.TimeoutExpired as late:
        raise BadRequest(
            f"{target} could not be looked at within {DESCRIBE_S:.0f} s: importing it works on",
            'what a module does at import belongs below if __name__ == "__main__":',
        ) from late
    except OSError as bad:
        raise BadRequest(f"{python} cannot be executed: {bad.strerror}") from bad
    return _answer(target, done)


def _answer(target: str, done: "subprocess.CompletedProcess[bytes]") -> dict[str, Any]:
    lines = done.stdout[-_SAID_BYTES_MAX:].decode(errors="replace").strip().splitlines()
    try:
        told = json.loads(lines[-1]) if lines and done.returncode == 0 else None
    except ValueError:
        told = None
    if not isinstance(told, dict):
        said = done.stderr[-_SAID_BYTES_MAX:].decode(errors="replace").strip().splitlines()
        last = f": {clean(said[-1])[:300]}" if said else ""
        places = [line for line in said if line.lstrip().startswith("File ")]
        ours = os.path.dirname(str(done.args[1]))  # what is wrong in ours is that it is too old
        if "SyntaxError" in last and places and f'"{ours}/' in places[-1]:
            raise BadRequest(
                f"{clean(str(done.args[0]))} is an old Python; a task needs 3.11 or newer",
                "name another: --interpreter .venv/bin/python",
            )
        raise BadRequest(
            f"importing {target} ended the interpreter (exit {done.returncode}){last}",
            f"try it: {clean(str(done.args[0]))} -c 'import {target.partition(':')[0]}'",
        )
    if told.get("error"):
        raise BadRequest(f"--python {target}: {clean(str(told['error']))}", "nothing was started")
    return told


def _as_user(user: Any) -> dict[str, Any]:
    """Return how to look as the user that the task will run as: whose code is not root's."""
    if user is None or os.geteuid() != 0:
        return {}
    try:
        known = pwd.getpwnam(str(user)) if not str(user).isdecimal() else pwd.getpwuid(int(user))
    except KeyError as bad:
        raise BadRequest(f"--as: there is no user {user!r}", "see: getent passwd") from bad
    groups = os.getgrouplist(known.pw_name, known.pw_gid)
    return {"user": known.pw_uid, "group": known.pw_gid, "extra_groups": groups}
