"""`status`: the list of tasks, once or redrawn in place.

Read next: `picture.py`, `watch.py`.
"""

import argparse
import time

from ckptctl import selectors, units
from ckptctl.call import Call
from ckptctl.picture import check_code, empty_text, picture, task_listing, totals_text


def status_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `status`."""
    selectors.add_options(parser)
    shown = parser.add_argument_group("what to show")
    shown.add_argument(
        "-w", "--watch", nargs="?", const="2s", metavar="EVERY", type=units.parse_duration,
        help="redraw until Ctrl-C or q (--watch=5s; default 2s)",
    )  # fmt: skip
    shown.add_argument("--sort", metavar="FIELD", help="sort by a field; FIELD- turns it round")
    shown.add_argument(
        "-n", "--limit", metavar="N", type=units.whole(0),
        help="the last N alone (with --sort: the first N)",
    )  # fmt: skip
    shown.add_argument(
        "--check", action="store_true",
        help="print nothing; exit 0 if all succeeded, 3 if some are not finished, else 1",
    )  # fmt: skip


def status(call: Call) -> int:
    """List tasks."""
    if call.args.watch is not None:
        from ckptctl.watch import watch  # noqa: PLC0415 (a terminal's needs, rarely loaded)

        return watch(call)
    shown = picture(call)
    if not shown.rows and call.args.group:
        call.check_group(call.args.group)
    if call.args.check:
        return check_code(shown.rows)
    now_ns = time.time_ns()
    call.show(task_listing(shown, now_ns))
    if not shown.rows:
        call.aside(empty_text(shown))
    call.aside(totals_text(shown))
    return 0
