"""From the words of `batch submit` and `batch run` to the spec of a batch and of its one task.

A batch is named after its command, its directory and where its items come from: the same line
again is the same batch, and goes on where it stood. Nothing here touches a file.
Read next: `batch.py` (what is done with it), `ckptd/batch/prepare.py` (who checks it).
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
from typing import Any, Final

from ckptctl import files, spec, units
from ckptd.protocol import limits
from ckptd.protocol.errors import BadRequest
from ckptd.protocol.messages import TaskSpec

FORMATS: Final = ("lines", "jsonl", "csv", "null")
MODES: Final = ("threads", "async")
CAPTURES: Final = ("last", "all", "json", "none")
STATUSES: Final = ("pass", "fail", "error", "skipped", "quarantined")
MEANINGS: Final = (*STATUSES, "transient", "again")
_RATE: Final = re.compile(r"[0-9]+(\.[0-9]+)?(/[0-9]*(s|m|h|min|hour))?")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:@+=-]{0,99}")
_FUNCTION: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_WORDS: Final = ":::"  # what follows are the items themselves
_FINAL: Final = {"1": "fail", "2": "transient", "130": "fail"}
"""What the exit codes of a batch's runner mean to the daemon; 0 and 75 mean what they always do."""
_TASK_KEYS: Final = (
    "group", "priority", "env", "labels", "after", "after-ok", "after-fail", "after-any",
    "at", "in", "hold", "deadline", "grace", "journal", *spec.LIMITS,
)  # fmt: skip


# --- options ------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `batch submit` and `batch run` have in common: the batch itself."""
    parser.add_argument(
        "-n", "--name", metavar="NAME",
        help="what to call the batch (default: the command's name and a digest of the line)",
    )  # fmt: skip
    _add_items(parser)
    _add_work(parser)
    add_selection(parser)
    add_pace(parser)


def _add_items(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the items")
    group.add_argument("-i", "--items", metavar="FILE", help="one item a line; - for stdin")
    group.add_argument("--items-from", metavar="CMD", help="what this shell command prints")
    for names, metavar, text, known in (
        (("--format",), "FORMAT", f"{', '.join(FORMATS)} (default: by the file's name)", FORMATS),
        (("--item-key",), "FIELD", "the field that tells items apart (default: all of it)", None),
    ):
        group.add_argument(*names, metavar=metavar, help=text, choices=known)
    group.add_argument("--allow-empty", action="store_true", help="no items at all are fine")


def _add_work(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is done with each")
    group.add_argument(
        "--python", metavar="M:F", help="call this function with it instead of a command"
    )
    group.add_argument(
        "--interpreter", metavar="PATH", help="for functions (default: the venv's, else python3)"
    )
    group.add_argument(
        "--mode", choices=MODES, metavar="MODE",
        help="for functions: threads or async (default: as the function is written)",
    )  # fmt: skip
    group.add_argument("-d", "--chdir", metavar="DIR", help="working directory (default: this one)")
    group.add_argument(
        "--on-exit", metavar="MAP",
        help="meaning of exit codes: 3=skipped,4=transient (0 is pass, 1 fail, 75 transient,"
        " 85 again, all others error)",
    )  # fmt: skip
    group.add_argument(
        "--item-timeout", "--timeout", metavar="TIME", help="end an item that takes longer: error"
    )
    group.add_argument(
        "--capture", choices=CAPTURES, metavar="WHAT",
        help="kept of its output: last line (default), all, json (all of it, as JSON), none",
    )  # fmt: skip


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add which items run this time; all without a result by default."""
    group = parser.add_argument_group("which of them this time (default: those without a result)")
    group.add_argument(
        "--retry-errors", "--errors", dest="errors", action="store_true", help="errors again, too"
    )
    group.add_argument(
        "--retry-failed", "--failed", dest="failed", action="store_true", help="fails again, too"
    )
    group.add_argument(
        "--retry-status", "--status", dest="status", metavar="S[,S]", action="append", default=[],
        help=f"these again, too: {', '.join(STATUSES)}",
    )  # fmt: skip
    group.add_argument(
        "--only", metavar="KEY", action="append", default=[],
        help="these alone, with or without a result; repeatable",
    )  # fmt: skip
    group.add_argument("--limit", metavar="N", help="at most N of them")
    group.add_argument("--fresh", action="store_true", help="all again; results go to the archive")
    group.add_argument(
        "--accept-config", action="store_true",
        help="go on although the command differs from the one before",
    )  # fmt: skip
    group.add_argument("--dry-run", action="store_true", help="only tell what would run")


def add_pace(parser: argparse.ArgumentParser) -> None:
    """Add how fast, and when to stop; may differ from run to run."""
    group = parser.add_argument_group("how fast, and when to stop")
    for names, metavar, text in (
        (("-j", "--jobs"), "N", "items at once (default: as many as there are processors)"),
        (("--rate",), "N/s", "start at most so many a second, minute (/m) or hour (/h)"),
        (("--scope",), "NAME", "share rate and waits with all that name this scope"),
        (("--preflight",), "CMD", "asked before start: 0 go, 75 wait, else stop; or module:f"),
        (("--item-retries", "--retries"), "N", "more tries of an item that ends in error"),
        (("--max-errors",), "N|N%", "stop after more fails, errors and quarantined than that"),
        (("--park-after",), "TIME", "give the slot back where all must wait longer (10s)"),
    ):
        group.add_argument(*names, metavar=metavar, help=text)
    group.add_argument("--shuffle", action="store_true", help="in random order")
    group.add_argument("--seed", metavar="N", help="of the random order")


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add what the task that runs the batch may be given."""
    group = parser.add_argument_group("the task that runs it")
    for names, metavar, text in (
        (("-g", "--group"), "GROUP", "group to run in (default: default)"),
        (("-p", "--priority"), "N", "higher starts first (default: 0)"),
        (("--at",), "TIME", "not before: 18:00, 2026-11-20T18:00, +3h"),
        (("--in",), "TIME", "not before this long from now: 90s 5m 2h 3d"),
        (("--deadline",), "TIME", "give it up at this time"),
        (("--grace",), "TIME", "from the stop signal to SIGKILL"),
        (("--env-file",), "FILE", "read variables from a file of K=V lines"),
    ):
        group.add_argument(*names, metavar=metavar, help=text)
    for names, metavar, text in (
        (("--after", "--after-ok"), "TASKS", "once these succeeded: 3,5 or key:K; repeatable"),
        (("--after-fail",), "TASKS", "once these failed"),
        (("--after-any",), "TASKS", "once these ended, well or badly"),
        (("-E",), "K=V", "set a variable"),
        (("-l", "--label"), "K=V", "label it; repeatable"),
    ):
        where = {"-E": "env", "-l": "labels"}.get(names[0])
        more = {"dest": where} if where else {}
        group.add_argument(*names, metavar=metavar, help=text, action="append", **more)  # type: ignore[arg-type]
    group.add_argument("--hold", action="store_true", default=None, help="not before `release`")
    group.add_argument("--clean-env", action="store_true", help="do not pass this environment on")
    group.add_argument("--journal", action=argparse.BooleanOptionalAction, default=None,
                       help="its output goes to the systemd journal, too")  # fmt: skip
    spec.add_limits(parser)


# --- the batch ----------------------------------------------------------------------------------


def batch_of(args: argparse.Namespace, *, has_stdin: bool) -> tuple[str, dict[str, Any]]:
    """Return name and spec of a batch. Raises BadRequest.

    `has_stdin` tells that stdin is no terminal, so that items may come from there unasked.
    """
    command, words = _split(args.command)
    if bool(args.python) == bool(command):
        raise BadRequest(
            "a batch has a command or --python module:function, not both"
            if command
            else "no command, and no --python: what is to be done with each item?",
            "example: ckptctl batch submit -i hosts.txt -- ping -c 1 {}",
        )
    if args.python and not _FUNCTION.fullmatch(args.python):
        raise BadRequest(f"--python: not module:function: {args.python!r}", "example: work:fetch")
    if args.mode and not args.python:
        raise BadRequest("--mode is for functions, a command is a process", "say -j N alone")
    cwd = os.path.abspath(os.path.expanduser(args.chdir or os.getcwd()))
    made: dict[str, Any] = {"cwd": cwd, "items": _source(args, words, has_stdin=has_stdin)}
    made |= {"argv": command} if command else {"python": args.python}
    if args.python:
        made["interpreter"] = interpreter(args.interpreter)
    made |= {
        "capture": args.capture or "last",
        "on_exit": _on_exit(args.on_exit) or {},
        "timeout_s": _duration("--item-timeout", args.item_timeout) or 0.0,
        "mode": args.mode or "",
    }
    return checked_name(args.name or _usual_name(made)), made | _USUAL_PACE | pace_of(args)


def _split(command: list[str]) -> tuple[list[str], list[str] | None]:
    """Return the command and the items written behind `:::`, None where there are none."""
    if _WORDS not in command:
        return command, None
    place = command.index(_WORDS)
    words = command[place + 1 :]
    if misplaced := [word for word in words if word in _options()]:
        raise BadRequest(
            f"{misplaced[0]} stands behind {_WORDS}, where all words are items",
            "options go before the command; an item of that name goes into a file: -i FILE",
        )
    return command[:place], words


def _options() -> frozenset[str]:
    """Return the long options that people may mean behind the items."""
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser)
    add_task_options(parser)
    flags = (*parser._option_string_actions, "--wait", "--follow", "--output", "--quiet")
    return frozenset(flag for flag in flags if flag.startswith("--"))


def _source(
    args: argparse.Namespace, words: list[str] | None, *, has_stdin: bool
) -> dict[str, Any]:
    places = {"--items": args.items, "--items-from": args.items_from, _WORDS: words}
    given = [name for name, value in places.items() if value is not None]
    if len(given) > 1:
        raise BadRequest(f"items come from one place, not from {' and '.join(given)}")
    source: dict[str, Any] = {}
    if words is not None:
        source = {"from": "lines", "lines": words}
    elif args.items_from is not None:
        source = {"from": "command", "argv": ["/bin/sh", "-c", args.items_from]}
    elif args.items not in (None, "-"):
        source = {"from": "file", "path": os.path.abspath(os.path.expanduser(args.items))}
    elif args.items == "-" or has_stdin:
        source = {"from": "stdin"}
    else:
        raise BadRequest(
            "no items: where do they come from?",
            "-i FILE, --items-from 'ls logs/*.log', words after :::, or a pipe",
        )
    form = args.format or _usual_format(source.get("path", ""))
    return source | {"format": form} | ({"key": args.item_key} if args.item_key else {})


def interpreter(given: str | None) -> str:
    """Return the Python that a function runs in: its author's, not ours."""
    venv = os.environ.get("VIRTUAL_ENV", "")
    usual = os.path.join(venv, "bin", "python") if venv else "python3"
    found = shutil.which(os.path.expanduser(given or usual))
    if found is None:
        raise BadRequest(
            f"no interpreter {given or usual!r}", "--interpreter PATH names the Python to use"
        )
    return os.path.abspath(found)


def _usual_format(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}.get(suffix, "lines")


def _usual_name(made: dict[str, Any]) -> str:
    """Return `ping-3f9a1c`: the same for the same line in the same directory.

    What changes from run to run is not in it: the items themselves, and the pace.
    """
    source = {name: value for name, value in made["items"].items() if name != "lines"}
    what = [made.get("argv"), made.get("python"), made["cwd"], source.get("path") or source]
    digest = hashlib.sha256(repr(what).encode(errors="surrogateescape")).hexdigest()[:6]
    words = made.get("argv") or [str(made["python"]).rpartition(":")[2]]
    base = re.sub(r"[^A-Za-z0-9_.]+", "-", os.path.basename(words[0])).strip("-._")[:40]
    return f"{base or 'batch'}-{digest}"


def checked_name(name: str) -> str:
    """Return the name of a batch if it can be one."""
    if _NAME.fullmatch(name) is None:
        raise BadRequest(
            f"not a name for a batch: {name!r}",
            "letters, digits and . _ : @ + = -, at most 100, the first a letter or digit",
        )
    return name


# --- values -------------------------------------------------------------------------------------


_USUAL_PACE: Final[dict[str, Any]] = {
    "jobs": 0, "rate": "", "scope": "", "preflight": [], "retries": 0, "max_errors": "",
    "limit": 0, "shuffle": False, "seed": None, "park_after_s": 10.0,
}  # fmt: skip
"""A line says all of it: what it does not name is as usual, not as in the line before."""


def pace_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what may differ from run to run: how many, how fast, in what order."""
    pace: dict[str, Any] = {
        "jobs": _count("--jobs", args.jobs, least=1),
        "rate": _rate(args.rate),
        "scope": args.scope,
        "preflight": _preflight(args.preflight),
        "retries": _count("--item-retries", args.item_retries),
        "max_errors": _max_errors(args.max_errors),
        "park_after_s": _duration("--park-after", args.park_after),
        "limit": _count("--limit", args.limit, least=1),
        "shuffle": args.shuffle or None,
        "seed": _count("--seed", args.seed),
    }
    return {name: value for name, value in pace.items() if value is not None}


def selection_words(args: argparse.Namespace) -> list[str]:
    """Return the words of `prepare` for which items run this time."""
    words = [f"--{name}" for name in ("fresh", "accept-config", "dry-run", "allow-empty")
             if getattr(args, name.replace("-", "_"), False)]  # fmt: skip
    words += ["--retry-errors"] if args.errors else []
    words += ["--retry-failed"] if args.failed else []
    words += [f"--retry-status={status}" for status in statuses_of(args.status)]
    return words + [f"--only={key}" for key in args.only]


def statuses_of(given: list[str], more: tuple[str, ...] = ()) -> list[str]:
    """Return the statuses of `--status S[,S]`, checked."""
    known = (*STATUSES, *more)
    found = [word for text in given for word in text.split(",") if word]
    for word in found:
        if word not in known:
            hint = units.nearest(word, known) or f"one of: {', '.join(known)}"
            raise BadRequest(f"unknown status {word!r}", hint)
    return list(dict.fromkeys(found))


def _count(option: str, text: str | None, *, least: int = 0) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise BadRequest(f"{option}: not a whole number from {least} on: {text!r}")
    return int(text)


def _duration(option: str, text: str | None) -> float | None:
    return None if text is None else units.named(option, units.parse_duration, text)


def _rate(text: str | None) -> str | None:
    if text is not None and _RATE.fullmatch(text) is None:
        raise BadRequest(f"--rate: not a rate: {text!r}", "examples: 10/s 90/m 1000/h")
    return text


def _max_errors(text: str | None) -> str | None:
    found = re.fullmatch(r"([0-9]+)(%?)", text or "")
    if text is not None and (found is None or (found[2] and int(found[1]) > 100)):
        raise BadRequest(f"--max-errors: not a number or a percentage: {text!r}", "examples: 20 5%")
    return text


def _preflight(text: str | None) -> str | list[str] | None:
    if text is None or _FUNCTION.fullmatch(text):
        return text
    try:
        words = shlex.split(text)
    except ValueError as bad:
        raise BadRequest(f"--preflight: {bad}: {text!r}", "example: 'curl -sf HOST/up'") from bad
    if not words:
        raise BadRequest("--preflight: no command", "example: 'curl -sf HOST/up'")
    return ["/bin/sh", "-c", text]  # split words would say go to 'curl ... | grep -q up'


def _on_exit(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    found: dict[str, str] = {}
    for part in text.split(","):
        codes, _, meaning = part.partition("=")
        ends = re.fullmatch(r"([0-9]{1,3})(?:-([0-9]{1,3}))?", codes.strip())
        if ends is None or int(ends[2] or ends[1]) > 255 or meaning not in MEANINGS:
            hint = units.nearest(meaning, MEANINGS) or f"meanings: {', '.join(MEANINGS)}"
            raise BadRequest(f"--on-exit: not an exit map: {part!r}", hint)
        for code in range(int(ends[1]), int(ends[2] or ends[1]) + 1):
            found[str(code)] = meaning
    return found


# --- the task -----------------------------------------------------------------------------------


def task_of(
    args: argparse.Namespace, batch: str, key: str, runner: list[str], cwd: str
) -> TaskSpec:
    """Return the one task that runs a batch, in the directory that the batch works in."""
    given = {name: getattr(args, name.replace("-", "_"), None) for name in _TASK_KEYS}
    options = {name: value for name, value in given.items() if value is not None}
    if args.env_file:
        options["env"] = files.read_env_file(args.env_file) + options.get("env", [])
    labels = spec.labels_of(options.get("labels", []))
    fixed = {
        "name": f"batch:{batch}",
        "labels": {**labels, "batch": batch},
        "key": key,
        "retries": limits.RETRIES_UNLIMITED,  # three attempts without progress stop it
        "on-exit": dict(_FINAL),
        "chdir": cwd,
        "command": runner,
    }
    return spec.build({**options, **fixed})
