"""`ckptctl doctor`: is this machine fit for ckptd, and what to do where it is not.

Looks from outside, as the user who runs it, with or without a daemon; changes nothing but a
small file for timing that it removes again. Exit 1 where something is bad, 64
for wrong usage, else 0.
Read next: `place.py` for what is looked at, then one module for each part of the report.
"""

import argparse
import difflib
import shlex
import shutil
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NoReturn

import msgspec

from ckptd import streams
from ckptd.doctor import contact, disk, journald, machine, place, services
from ckptd.doctor.finding import Check, Finding, Report

PARTS: tuple[tuple[str, tuple[Check, ...]], ...] = (
    ("Daemon", contact.CHECKS),
    ("systemd", services.CHECKS),
    ("Journal", journald.CHECKS),
    ("Machine", machine.CHECKS),
    ("Disk", disk.CHECKS),
)
COLUMNS_MIN, COLUMNS_MAX = 60, 100
NAME_COLUMNS = 16
_INDENT = 5 + NAME_COLUMNS + 1


def examine(here: place.Place) -> Iterator[tuple[str, Finding]]:
    """Yield every finding with its part. Bound: no check takes longer than a few seconds."""
    for part, checks in PARTS:
        for check in checks:
            for finding in check(here):
                yield part, finding


def shown(finding: Finding, columns: int) -> str:
    """Return a finding as a person reads it; what is too long goes on below."""
    head = f"{finding.level:<5}{finding.name:<{NAME_COLUMNS}} "
    text = _wrapped(head, finding.text, columns)
    if not finding.advice:
        return text
    return f"{text}\n{_wrapped(' ' * _INDENT + '-> ', finding.advice, columns)}"


def _wrapped(head: str, text: str, columns: int) -> str:
    """Return the text behind its head. Words are never broken: paths and commands are copied."""
    return textwrap.fill(
        " ".join(text.split()),
        columns,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def verdict(findings: Sequence[Finding]) -> str:
    """Return the last line."""
    count = Counter(finding.level for finding in findings)
    if count["bad"]:
        return f"Not fit: {count['bad']} bad, {count['warn']} to look at."
    return f"Fit; {count['warn']} to look at." if count["warn"] else "Fit; nothing to do."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with 64 (EX_USAGE): argparse's 2 would say "try again"."""
        _refuse(message)


def _refuse(text: str, hint: str = "see: ckptctl doctor -h") -> NoReturn:
    """Say it as `ckptctl` does, which people called us by."""
    print(f"ckptctl: doctor: {text}\n  hint: {hint}", file=sys.stderr)
    raise SystemExit(64)


def asked_for(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; ends with 64 for what is none, such as a configuration without --config.

    An empty `--config` is refused: the usual file in its place would be about another daemon.
    """
    parser = _Parser("doctor", description="Is this machine fit for ckptd?", allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="the daemon's configuration")
    parser.add_argument("--endpoint", metavar="PATH", default="", help="the daemon's socket")
    parser.add_argument("-o", choices=["table", "json"], default="table", dest="form")
    parser.add_argument("--json", action="store_const", const="json", dest="form")
    whose = parser.add_mutually_exclusive_group()
    for name, text in (("system", "the daemon of root"), ("user", "a daemon of your own")):
        whose.add_argument(f"--{name}", action="store_const", const=name, dest="scope", help=text)
    asked, extra = parser.parse_known_args(argv)
    if extra:
        _refuse_word(parser, extra[0])
    if asked.config == "":
        _refuse("--config names no file", "name one, or leave --config out for the usual one")
    return asked


def _refuse_word(parser: argparse.ArgumentParser, word: str) -> NoReturn:
    if not word.startswith("-"):
        hint = f"for that configuration: --config {shlex.quote(word)}"
        _refuse(f"unexpected word {word!r}", hint)
    flag = word.partition("=")[0]
    if close := difflib.get_close_matches(flag, parser._option_string_actions, n=1):
        _refuse(f"unknown option {flag}", f"did you mean {close[0]}?")
    _refuse(f"unknown option {flag}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; 1 where something is bad."""
    asked = asked_for(argv)
    here = place.find(asked.config, asked.endpoint, asked.scope or "")
    if asked.form == "json":
        findings = [finding for _, finding in examine(here)]
    else:
        findings = list(_print_all(here))
    fit = all(finding.level != "bad" for finding in findings)
    if asked.form == "json":
        report = Report("ckptd.doctor/1", fit, tuple(findings))
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    return 0 if fit else 1


def _print_all(here: place.Place) -> Iterator[Finding]:
    columns = shutil.get_terminal_size((COLUMNS_MAX, 24)).columns
    columns = min(max(columns, COLUMNS_MIN), COLUMNS_MAX)
    found, before = [], ""
    for part, finding in examine(here):
        if part != before:
            print(f"{chr(10) if before else ''}{part}")
            before = part
        print(shown(finding, columns), flush=True)
        found.append(finding)
        yield finding
    print(f"\n{verdict(found)}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has seen enough is no error
    sys.exit(streams.run(main, "ckptctl doctor"))
