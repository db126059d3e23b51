"""One invocation: its options, its style, the client (made on first use) and where talk goes.

stdout is for data; `note` and `problem` speak on stderr. Read next: `cli.py`.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable
from functools import cached_property
from typing import TypeVar

from ckptctl import render, selectors, units
from ckptd.client import TIMEOUT_S, Client, find_endpoint
from ckptd.protocol import limits
from ckptd.protocol.errors import BadRequest, CkptdError, ErrorReply, NotFound
from ckptd.protocol.messages import (
    Answer,
    Empty,
    Groups,
    Message,
    Pong,
    Selector,
    Status,
    TaskPage,
    TaskRow,
)
from ckptd.streams import Lost

A = TypeVar("A", bound=Answer)


class Call:
    """What a verb's function gets."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.until_mono_s = float("inf")  # past it, an answer is of no use to this invocation
        self.style = render.make_style(
            args.output or "table",
            columns=args.columns or "",
            headers=not args.no_headers,
            color=args.color or "auto",
            quiet=bool(args.quiet),
        )

    @cached_property
    def client(self) -> Client:
        """The connection to the daemon."""
        wait_s = TIMEOUT_S if self.args.wait_s is None else float(self.args.wait_s)
        return Client(find_endpoint(self.args.endpoint or ""), wait_s, self.note)

    def connect_once(self) -> None:
        """Talk over one connection that is never made again, so that we start no next daemon."""
        self.client.call("ping", Empty(), Pong)  # where nobody is there, this says so at once
        endpoint, wait_s = self.client.endpoint, self.client.timeout_s
        self.client.close()
        self.client = Client(endpoint, wait_s, self.note, reconnects=False)

    def ask(self, verb: str, args: Message, kind: type[A]) -> A:
        """Send one request and return the typed answer."""
        try:
            return self.client.call(verb, args, kind, until_mono_s=self.until_mono_s)
        except (BadRequest, NotFound) as bad:
            raise self._for_people(bad, args) from bad

    def wait_for(
        self, verb: str, args: Message, kind: type[A], until_mono_s: float = float("inf")
    ) -> A:
        """Like `ask`, but outlive restarts of the daemon."""
        try:
            return self.client.call(verb, args, kind, patient=True, until_mono_s=until_mono_s)
        except (BadRequest, NotFound) as bad:
            raise self._for_people(bad, args) from bad

    def _for_people(self, bad: BadRequest | NotFound, args: Message) -> BadRequest | NotFound:
        from ckptctl import refusals  # noqa: PLC0415 (for mistakes only)

        if isinstance(bad, BadRequest):
            return refusals.out_of_range(bad, args)
        return refusals.no_such_last(bad, getattr(self.args, "tasks", None) or [])

    def takes(self, *formats: str) -> None:
        """Refuse a format that the verb does not have; what people read is always there."""
        form = self.style.form
        if form not in ("table", "wide", "name", *formats):
            known = f"-o {', '.join(formats)}" if formats else "no -o at all"
            raise BadRequest(f"`{self.args.verb}` has no output as {form}", f"it takes {known}")

    @property
    def is_for_people(self) -> bool:
        """Whether the output is a table, not data for a program."""
        return self.style.form in ("table", "wide") and not self.style.is_quiet

    @property
    def clock_utc(self) -> bool:
        """Whether people want their times in UTC."""
        return bool(self.args.utc)

    def out(self, lines: Iterable[str]) -> None:
        """Print data."""
        sys.stdout.writelines(f"{line}\n" for line in lines)

    def show(self, listing: render.Listing) -> None:
        """Print a listing in the chosen format."""
        self.out(render.listing_lines(listing, self.style))

    def note(self, text: str) -> None:
        """Tell a person something on stderr, unless they want it quiet."""
        if not self.style.is_quiet:
            _show_before()
            sys.stderr.write(f"ckptctl: {text}\n")
            sys.stderr.flush()

    def aside(self, text: str) -> None:
        """Add a line under a table, for a person at a terminal only."""
        if self.is_for_people and sys.stdout.isatty():
            _show_before()
            dim = ("\x1b[2m", "\x1b[0m") if self.style.has_color else ("", "")
            sys.stderr.write(f"{dim[0]}{text}{dim[1]}\n")
            sys.stderr.flush()

    def problem(self, error: ErrorReply, about: str = "") -> None:
        """Tell on stderr what was refused."""
        report(error, is_json=self.style.form in ("json", "jsonl"), about=about)

    # --- tasks --------------------------------------------------------------------------------

    def select(self, *, default_last: bool = False) -> Selector:
        """Return the selection of the options; ids of a range are those that exist."""
        return selectors.selector(self.args, self._existing, default_last=default_last)

    def _existing(self, first: int, end: int) -> list[int]:
        ids: list[int] = []
        cursor = first - 1
        while True:  # Bound: the cursor only moves on, to `end` or the last task
            asked = Status(Selector(all=True), limits.ROWS_PER_PAGE_MAX, cursor)
            page = self.ask("status", asked, TaskPage)
            ids += [row.id for row in page.tasks if row.id <= end]
            cursor = page.next
            if not cursor or cursor >= end:
                break
        if not ids:
            raise NotFound(f"no task from {first} to {end}", "see them all: ckptctl status --all")
        return ids

    def check_group(self, name: str) -> None:
        """Raise NotFound, with the nearest name, for a group that does not exist."""
        names = [row.name for row in self.ask("groups", Empty(), Groups).groups]
        if name not in names:
            hint = units.nearest(name, names) or f"known: {', '.join(names)}"
            raise NotFound(f"no group {name!r}", hint)

    def pages(self, select: Selector, *, newest: bool = False) -> Iterable[TaskPage]:
        """Yield every page of the selected tasks."""
        cursor = 0
        while True:  # Bound: the daemon's cursor only moves on, 0 is the end
            asked = Status(select, limits.ROWS_PER_PAGE_MAX, cursor, newest)
            page = self.ask("status", asked, TaskPage)
            yield page
            cursor = page.next
            if not cursor:
                return

    def rows(self, select: Selector) -> list[TaskRow]:
        """Return the selected tasks. Raises NotFound where there is none."""
        rows = [row for page in self.pages(select) for row in page.tasks]
        if not rows:
            raise NotFound("no task fits the selection", "see them all: ckptctl status --all")
        return rows

    def one_id(self, select: Selector) -> int:
        """Return the id of the one selected task, without asking where it is plain."""
        if len(select.ids) == 1 and not (select.last or select.keys or select.names):
            return select.ids[0]
        rows = self.rows(select)
        if len(rows) > 1:
            ids = ", ".join(str(row.id) for row in rows[:5])
            raise BadRequest(f"{len(rows)} tasks fit the selection ({ids} ...)", "name one task")
        return rows[0].id

    @property
    def asks(self) -> bool:
        """Whether a person is there to be asked back; scripts and --yes are not asked."""
        return not self.args.yes and sys.stdin.isatty() and sys.stderr.isatty()

    def confirm(self, question: str) -> bool:
        """Ask a person at a terminal; scripts and --yes are taken at their word."""
        if not self.asks:
            return True
        sys.stderr.write(f"{question} [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")


def _show_before() -> None:
    """Let what was printed stand above what is told; that it got lost is told when all is done."""
    with contextlib.suppress(Lost):
        sys.stdout.flush()


def report(error: ErrorReply, *, is_json: bool = False, about: str = "") -> None:
    """Write an error to stderr: what failed, and on a second line what to do."""
    _show_before()
    message = f"{about}{error.message}"
    if is_json:
        fields = {
            "code": error.code,
            "message": message,
            "hint": error.hint or None,
            "retryable": error.retryable,
            "exit_code": error.exit_code,
        }
        sys.stderr.write(render.json_text({"error": fields}) + "\n")
        return
    is_colored = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    red, dim, off = ("\x1b[31m", "\x1b[2m", "\x1b[0m") if is_colored else ("", "", "")
    sys.stderr.write(f"{red}ckptctl:{off} {message}\n")
    if error.hint:
        sys.stderr.write(f"{dim}  hint: {error.hint}{off}\n")


def report_error(error: CkptdError, *, is_json: bool = False) -> int:
    """Report an exception; return the exit code that goes with it."""
    report(error.reply(), is_json=is_json)
    return error.exit_code
