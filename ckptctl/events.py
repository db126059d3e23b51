"""`events`: what happened, in order, as a durable stream whose offset is the LSN.

A follower that passes the last LSN it saw as --since misses nothing, whatever restarted meanwhile;
where the log was cut behind that LSN it is told so. Who names no LSN gets what there is.
Read next: `ckptd/core/records.py` (what there is to hear of).
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from ckptctl import selectors, units, words
from ckptctl.call import Call
from ckptctl.render import Column, Listing, json_line
from ckptctl.units import SECOND_NS, duration_text
from ckptd.protocol import limits
from ckptd.protocol.errors import BadRequest, NotFound
from ckptd.protocol.messages import DaemonStatus, Empty, Event, EventPage, Events, Selector
from ckptd.streams import heed_reader

HOLD_S: Final = 2.0  # of one question for what comes next; then we look whether anybody reads us
SHOWN: Final = 40  # of the past, where nobody says how many
TYPES: Final = (
    "daemon_started", "daemon_stopped", "submitted", "edited", "moved", "reset", "removed",
    "checkpoints_dropped", "start_intent", "started", "stop_intent", "signal_intent",
    "freeze_intent", "checkpoint_asked", "marked", "ended", "group_changed", "group_removed",
)  # fmt: skip
_LSN: Final = re.compile(r"[0-9]+")
_EARLIEST: Final = re.compile(r"LSN (\d+)")  # Source: PROTOCOL.md, events that are not_found
RECORDS_PER_EVENT: Final = 20  # looked through at most for one that is shown


def events_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `events`."""
    parser.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C")
    parser.add_argument(
        "--since", metavar="LSN|TIME",
        help="after this LSN (0: all that is still in the log), or from 2h ago, or a time",
    )  # fmt: skip
    parser.add_argument(
        "--type", metavar="T[,T]", action="append", default=[], help="only these types"
    )
    parser.add_argument("--task", metavar="TASK", help="only of this task: 7, @last, key:K")
    parser.add_argument("-n", "--limit", metavar="N", type=units.whole(0), help="only the last N")


def events(call: Call) -> int:
    """Print what happened; with -f for ever, over restarts of the daemon."""
    args = call.args
    types, task = _types(args.type), _task(call)
    since, from_ns, last = _since(call, types)
    is_heard = is_gone = False
    is_exact = bool(_LSN.fullmatch(args.since or "")) and since > 0
    kept: list[Event] = []
    while True:  # Bound: a follower ends by Ctrl-C or with its task, others at the log's end
        hold_s = HOLD_S if args.follow and is_heard and not kept else 0.0
        asked = Events(since, limits.EVENTS_PER_PAGE_MAX, task, hold_s)
        page = _page(call, asked, is_exact=is_exact)
        fits = [
            event for event in page.events
            if event.at_ns >= from_ns and (not types or event.type.lower() in types)
        ]  # fmt: skip
        is_end = page.next == since  # a page may be empty before: much of others was looked through
        if is_end and not is_heard:
            _check_there(call, task, since)
        is_heard = is_heard or is_end or bool(page.events)
        since, is_exact = page.next, True
        if last is not None:
            kept = (kept + fits)[-last:] if last else []
            fits = kept if is_end else []
            if is_end:
                kept, last = [], None
        _print_events(call, fits)
        if is_end and not args.follow:
            return 0
        is_gone = is_gone or (task > 0 and any(event.type == "removed" for event in page.events))
        if is_gone and last is None and args.follow:
            call.note(f"task {task} is forgotten: nothing more happens to it")
            return 0
        heed_reader()


def _task(call: Call) -> int:
    """Return the id of the one task that is meant, 0 for all. It may be forgotten by now."""
    if call.args.task is None:
        return 0
    found = units.named("--task", lambda word: selectors.words_of([word]), call.args.task)
    if found.ranges or len(found.ids) > 1:
        raise BadRequest(f"--task: not one task: {units.told(call.args.task)}")
    ids, keys, names = tuple(found.ids), tuple(found.keys), tuple(found.names)
    return call.one_id(Selector(ids=ids, last=tuple(found.last), keys=keys, names=names))


def _check_there(call: Call, task: int, since: int) -> None:
    """Raise where nothing was heard because there is no such task, or no such place in the log."""
    if task:
        call.rows(Selector(ids=(task,)))
    if _LSN.fullmatch(call.args.since or "") and since > 0:
        end = call.ask("daemon", Empty(), DaemonStatus).lsn
        if since > end:
            raise BadRequest(
                f"--since: LSN {since} is not written yet, the log ends at LSN {end}",
                "is it the LSN of another daemon?",
            )


def _page(call: Call, asked: Events, *, is_exact: bool) -> EventPage:
    """Return the next page; where the log was cut, from where it begins, unless `is_exact`.

    Raises:
        NotFound: what comes next is no longer in the log.
    """
    while True:  # Bound: each time the log begins at a later LSN
        try:
            return call.wait_for("events", asked, EventPage)
        except NotFound as gone:
            named = _EARLIEST.search(gone.message)
            if is_exact or named is None or int(named[1]) - 1 <= asked.since:
                raise
            asked = msgspec.structs.replace(asked, since=int(named[1]) - 1)
            if call.args.since is not None or asked.task:
                call.note(f"the log begins at LSN {named[1]}: what was before is not kept")


def _types(texts: Sequence[str]) -> set[str]:
    found = {word for text in texts for word in units.listed("--type", "type", text)}
    for word in sorted(found - set(TYPES)):
        hint = units.nearest(word, TYPES) or f"one of: {', '.join(TYPES)}"
        raise BadRequest(f"--type: unknown type of event {word!r}", hint)
    return found


def _since(call: Call, types: set[str]) -> tuple[int, int, int | None]:
    """Return (LSN to start after, oldest time, how many of the past; None for all)."""
    args = call.args
    if args.since is not None:
        if _LSN.fullmatch(args.since):
            return int(args.since), 0, args.limit
        return 0, units.named("--since", units.parse_moment, args.since), args.limit
    if args.task:
        return 0, 0, args.limit
    if args.follow and args.limit is None:
        return -1, 0, None
    wanted = SHOWN if args.limit is None else args.limit
    if types:
        return 0, 0, wanted  # the last of a rare type may be far back
    lsn = call.ask("daemon", Empty(), DaemonStatus).lsn
    return max(0, lsn - RECORDS_PER_EVENT * wanted), 0, wanted


def _print_events(call: Call, found: Sequence[Event]) -> None:
    if call.style.form in ("json", "jsonl"):
        call.out(json_line(event) for event in found)
    elif call.is_for_people:
        call.out(_line(call, event) for event in found)
    elif found:
        call.show(Listing("events", found, (_TEXT,), lambda row: str(row.lsn)))
    if found and call.args.follow:
        sys.stdout.flush()


def _line(call: Call, event: Event) -> str:
    task = f"task {event.task}" + (f".{event.attempt}" if event.attempt else "")
    at = units.clock_text(event.at_ns, utc=call.clock_utc)
    text = event_text(event)
    start = f"{event.lsn:>7}  {at:<19}  {task if event.task else 'daemon':<9}"
    return f"{start}  {event.type:<15}  {text}".rstrip()


def event_text(event: Event) -> str:
    """Return what a person wants to know of an event."""
    fields = event.fields
    match event.type:
        case "daemon_started":
            text = f"version {fields['version']}, epoch {fields['epoch']}, pid {fields['pid']}"
            text += "" if fields["clean"] else ", after a crash"
        case "submitted" | "edited":
            spec = fields["spec"]
            where = f"in {fields['group']}" + (f", {fields['phase']}" if "phase" in fields else "")
            text = f"{spec.get('name', '')} {where}: {shlex.join(spec['argv'])}"
        case "started":
            resumed = fields.get("resumed_from")
            text = f"pid {fields['pid']}" + (f", from checkpoint {resumed}" if resumed else "")
            text += f" ({fields['warning']})" if fields.get("warning") else ""
        case "ended":
            text = _ended(fields)
        case "moved":
            text = fields["phase"] + (f": {fields['reason']}" if fields["reason"] else "")
        case "marked":
            text = f"checkpoint {fields['checkpoint']}" if fields["checkpoint"] else "progress"
        case "stop_intent":
            rung = ("ask for a checkpoint", "stop signal", "SIGKILL")[min(2, fields["rung"])]
            text = f"{fields['why']}: {rung}"
        case "signal_intent":
            text = units.signal_name(fields["signal"])
        case _:
            text = " ".join(f"{name}={value}" for name, value in fields.items())
    return words.clean(text)


def _ended(fields: dict[str, Any]) -> str:
    cause, verdict = fields["cause"], fields["verdict"]
    how = words.exit_text(fields.get("blame", ""), fields["code"]) if cause == "exit" else cause
    if fields["signal"]:
        how = f"{units.signal_name(fields['signal'])}" + ("" if cause == "signal" else f", {cause}")
    took_s = (fields["ended_ns"] - fields["started_ns"]) / SECOND_NS
    took = words.at_most(duration_text(took_s), cause)
    reason = f": {verdict['reason']}" if verdict["reason"] else ""
    lost_text = words.at_most(duration_text(fields["lost_s"]), cause)
    lost = f", lost {lost_text} of work" if fields["lost_s"] else ""
    return f"{how} after {took}{lost}, now {verdict['phase']}{reason}"


_TEXT: Final = Column("text", event_text)
