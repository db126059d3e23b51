"""`ckptctl doctor`: is this machine fit for ckptd, and what to do where it is not.

Looks from outside, as the user who runs it, with or without a daemon; changes nothing but a
small file for timing that it removes again. Exit 1 where something is bad, else 0.
Read next: `place.py` for what is looked at, then one module for each part of the report.
"""

import argparse
import shutil
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

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


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; 1 where something is bad."""
    parser = argparse.ArgumentParser("doctor", description="Is this machine fit for ckptd?")
    parser.add_argument("--config", metavar="FILE", help="the daemon's configuration")
    parser.add_argument("--endpoint", metavar="PATH", default="", help="the daemon's socket")
    parser.add_argument("-o", choices=["table", "json"], default="table", dest="form")
    parser.add_argument("--json", action="store_const", const="json", dest="form")
    whose = parser.add_mutually_exclusive_group()
    for name, text in (("system", "the daemon of root"), ("user", "a daemon of your own")):
        whose.add_argument(f"--{name}", action="store_const", const=name, dest="scope", help=text)
    asked = parser.parse_args(argv)
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
