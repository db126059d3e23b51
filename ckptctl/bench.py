"""`bench overhead`: what saving costs a Python function, measured on this machine and disk.

The author's own interpreter runs it, below this directory and without a daemon; here the answer
becomes words. Read next: `ckptd/offline/overhead.py` (how it is measured), `python.py`.
"""

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any, Final

from ckptctl import python, units
from ckptctl.call import Call
from ckptctl.render import facts_lines, json_text
from ckptctl.saving import short_text
from ckptctl.words import clean
from ckptd.protocol.errors import BadRequest, Rejected

PAIRS: Final = 10
PAIRS_MAX: Final = 1_000
_EXAMPLE: Final = "example: ckptctl bench overhead --python work:ingest --input '{\"n\": 3}'"


def overhead_options(parser: argparse.ArgumentParser) -> None:
    """Add the function and how often it runs."""
    python.add_options(parser)
    parser.add_argument(
        "--pairs", metavar="N", type=units.whole(), default=PAIRS,
        help=f"run it so often with saving, and as often without (default: {PAIRS})",
    )  # fmt: skip


def overhead(call: Call) -> int:
    """Measure, and tell."""
    call.takes("json")
    pairs = call.args.pairs
    if not 1 <= pairs <= PAIRS_MAX:
        raise BadRequest(f"--pairs: {pairs} is out of range", f"it takes 1 to {PAIRS_MAX:,}")
    options = python.options_of(call.args)
    if "python" not in options:
        raise BadRequest("no function", _EXAMPLE)
    target = str(options["python"])
    command = python.checked_command(
        target, options.get("input"), options.get("interpreter"), os.getcwd()
    )
    call.note(f"{2 * pairs} runs of {clean(target)}, in turns with and without saving ...")
    found = _measured(command, target, pairs)
    if call.style.form == "json":
        call.out([json_text({"overhead": {"function": target, **found}})])
        return 0
    call.out(facts_lines(_facts(target, found), call.style))
    for text in _remarks(found):
        call.note(text)
    return 0


def _measured(command: list[str], target: str, pairs: int) -> dict[str, Any]:
    import subprocess  # noqa: PLC0415 (for this verb only)
    import tempfile  # noqa: PLC0415

    interpreter, runner, *rest = command
    tool = os.path.join(os.path.dirname(os.path.dirname(runner)), "offline", "overhead.py")
    try:
        made = tempfile.TemporaryDirectory(prefix=".ckptd-bench-", dir=os.getcwd())
    except OSError as bad:
        text = f"no directory can be made in {os.getcwd()}: {bad.strerror}"
        raise BadRequest(text, "do it in a directory of yours, on the disk that counts") from bad
    with made as place:  # ours, so that it goes also where the interpreter is killed
        words = [interpreter, tool, place, str(pairs), *rest]
        with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            try:
                out, _ = process.communicate()
            except KeyboardInterrupt:  # it got the same Ctrl-C
                process.wait()
                raise
    return _answer(target, out, process.returncode)


def _answer(target: str, out: bytes, code: int) -> dict[str, Any]:
    lines = out.decode(errors="replace").strip().splitlines()
    try:
        told = json.loads(lines[-1]) if lines else None
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise Rejected(f"{target} ended the interpreter (exit {code})", "nothing was measured")
    if "error" in told:
        raise Rejected(f"{target}: {clean(str(told['error']))}", "nothing was measured")
    return told


# --- in words ------------------------------------------------------------------------------------


def _facts(target: str, found: Mapping[str, Any]) -> list[tuple[str, str]]:
    low, high = _percent(found["ratio_low"]), _percent(found["ratio_high"])
    without, with_ = short_text(found["manual_s"]), short_text(found["declared_s"])
    saves, cost = found["saves"], short_text(found["cost_s"])
    size = f" with {units.size_text(found['bytes'])} in files" if found["bytes"] else ""
    every = short_text(found["interval_s"])
    return [
        ("function", f"{clean(target)}, strategy {clean(found['strategy'])}"),
        ("runs", f"{found['pairs']} pairs, {without} without saving, {with_} with"),
        ("measured", f"{_percent(found['ratio'])} (with 95 %: {low} to {high})"),
        ("saves", f"{saves:.3g} a run, {cost} each{size}" if saves else "none"),
        ("counted", f"{found['counted']:.2%}: the time in saves, as the task counts it"),
        ("expected", f"{found['expected']:.2%}: {cost} every {every}" if found["expected"] else ""),
    ]


def _percent(ratio: float) -> str:
    return f"{ratio - 1:+.2%}"


def _remarks(found: Mapping[str, Any]) -> list[str]:
    said = []
    if found["strategy"] == "manual":
        said.append("it is declared Manual: both of a pair did the same")
    elif not found["saves"]:
        said.append("it made no save: it ended before one was due, or has no safe point")
    elif found["saves_manual"]:
        said.append(
            f"{found['saves_manual']:.3g} saves a run are asked for by the function itself, "
            "in both of a pair"
        )
    if found["pairs"] < PAIRS:
        said.append(f"{found['pairs']} pairs say little, take {PAIRS} or more")
    return said
