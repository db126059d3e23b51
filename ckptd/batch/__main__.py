"""`python -m ckptd.batch VERB ...`: the file side of `ckptctl batch`, and the runner itself.

    prepare NAME --spec JSON|-   make or update a batch; prints one JSON object
    run DIR                      work on it until it is done
    dir NAME                     print where a batch lies
    report, items, export, logs  what there is to see: report.py, logs.py
    gc [NAME...]                 remove what is finished and old: gc.py

Errors go to stderr: a line, a hint. Exit: 0 done, 1 done with errors, 2 not finished, run it
again, 4 no such batch or item, 5 conflict, 64 usage, 65 bad data, 74 stdout or stdin is broken,
75 parked, 130 interrupted.
Read next: `prepare.py`, `runner.py`.
"""

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn

from ckptd import streams
from ckptd.batch.refusal import BAD_DATA, DENIED, TRANSIENT, Refused, tell
from ckptd.storage.untrusted import NotTrusted


class _Parser(argparse.ArgumentParser):
    """Exits with 64 where argparse would say 2, which means "run it again" here."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{self.prog.split()[-1]}: {message}", "see `python -m ckptd.batch --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("python -m ckptd.batch", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=_Parser)
    _prepare_options(verbs.add_parser("prepare", allow_abbrev=False))
    _run_options(verbs.add_parser("run", allow_abbrev=False))
    verbs.add_parser("dir", allow_abbrev=False).add_argument("name")
    return parser


def _prepare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name")
    parser.add_argument("--spec", required=True, help="a JSON object, or - for stdin")
    for flag in ("accept-config", "fresh", "allow-empty", "dry-run"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--retry-errors", action="append_const", dest="status", const="error")
    parser.add_argument("--retry-failed", action="append_const", dest="status", const="fail")
    parser.add_argument("--retry-status", action="append", dest="status", metavar="STATUS")
    parser.add_argument("--only", action="append", default=[], metavar="KEY")


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir")
    parser.add_argument("-j", "--jobs", type=int)
    parser.add_argument("--rate")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-errors")
    parser.add_argument("--shuffle", action="store_true", default=None)
    parser.add_argument("--no-wait", action="store_true", help="exit 2 where it would wait")
    parser.add_argument("--dry-run", action="store_true", help="print the keys that would run")


def _prepare(asked: argparse.Namespace) -> int:
    from ckptd.batch.prepare import Wishes, prepare  # noqa: PLC0415 (this verb alone)

    text = sys.stdin.read() if asked.spec == "-" else asked.spec
    try:
        given = json.loads(text)
    except ValueError as bad:
        raise Refused(f"--spec is no JSON: {bad}") from bad
    wishes = Wishes(
        accepts_config=asked.accept_config,
        is_fresh=asked.fresh,
        allows_empty=asked.allow_empty,
        is_dry=asked.dry_run,
        statuses=tuple(asked.status or ()),
        only=tuple(asked.only),
    )
    print(json.dumps(prepare(asked.name, given, wishes)))
    return 0


def _run(asked: argparse.Namespace) -> int:
    _keep_to_this_tree()
    from ckptd.batch.run import dry_run, run  # noqa: PLC0415 (this verb alone)

    names = ("jobs", "rate", "limit", "max_errors", "shuffle")
    knobs: dict[str, Any] = {name: getattr(asked, name) for name in names}
    knobs = {name: value for name, value in knobs.items() if value is not None}
    path = os.path.abspath(asked.dir)
    return dry_run(path, knobs) if asked.dry_run else run(path, knobs, waits=not asked.no_wait)


def _dir(asked: argparse.Namespace) -> int:
    from ckptd.batch.place import path_of  # noqa: PLC0415 (this verb alone)

    print(path_of(asked.name))
    return 0


VERBS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    "prepare": _prepare,
    "run": _run,
    "dir": _dir,
}


_LOOKS: Final = {
    "report": "report",
    "items": "report",
    "export": "report",
    "logs": "logs",
    "gc": "gc",
}
"""Verbs that take their words as they are, and the module of each."""


def _look(verb: str, words: list[str]) -> int:
    module = importlib.import_module(f"ckptd.batch.{_LOOKS[verb]}")
    return int(getattr(module, verb)(words))


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if words and words[0] in _LOOKS:
            return _look(words[0], words[1:])
        asked = _parser().parse_args(words)
        return VERBS[asked.verb](asked)
    except Refused as refused:
        return tell(refused)
    except NotTrusted as bad:
        return tell(Refused(str(bad), "nothing was changed", code=BAD_DATA))
    except PermissionError as denied:
        return tell(Refused(str(denied), "a batch belongs to its user", code=DENIED))
    except (OSError, MemoryError) as error:
        hint = "what was recorded before is kept; run it again once that is mended"
        return tell(Refused(str(error) or "out of memory", hint, code=TRANSIENT))


def _keep_to_this_tree() -> None:
    """Run again by the tree itself, if we came through an installation's link to it."""
    from ckptd.sdk.run import in_its_tree  # noqa: PLC0415 (`run` alone)

    wanted = in_its_tree(sys.executable)
    if wanted != sys.executable:
        os.execv(wanted, [wanted, *sys.orig_argv[1:]])  # noqa: S606 (no shell)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(streams.run(main, "ckptd batch"))
