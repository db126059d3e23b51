"""The offline tool for the log: `python -m ckptd.daemon.offline_wal VERB --state DIR`.

    status    segments, snapshots, positions             reads only
    verify    check every byte, name a flipped bit       reads only
    dump      print the records, one JSON object a line  reads only
    replay    rebuild State from it and count            reads only
    repair    --truncate-after LSN: drop what follows    keeps everything in quarantine/ first
    salvage   go on around the damage                    keeps everything in quarantine/ first

It takes the lock, so it works while no daemon runs; what reads only does so on a read-only mount,
too. Exit: 0 ok, 2 a daemon runs, 64 usage, 65 the log is damaged, 70 the disk fails, 78 no state
directory.
Read next: `ckptd/storage/recovery.py`.
"""

import argparse
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, NoReturn

import msgspec

from ckptd import streams
from ckptd.core.records import AnyRecord
from ckptd.daemon.engine import decode
from ckptd.daemon.recovery import replay
from ckptd.host import paths
from ckptd.host.clock import Clock
from ckptd.protocol.errors import BadRequest, CkptdError, Corrupt, Denied, Internal
from ckptd.storage import examine, frame, rebuild, segment, snapshot, store
from ckptd.storage.disk import ReadOnlyDisk, RealDisk
from ckptd.storage.store import Store

Row = dict[str, Any]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _complain(message, f"see: {self.prog} -h")
        self.exit(64)


def _complain(text: str, hint: str = "") -> None:
    """Say it as `ckptctl` does, which people called us by."""
    print(f"ckptctl: {text}" + (f"\n  hint: {hint}" if hint else ""), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    args, unknown = _parser().parse_known_args(argv)
    if unknown:  # argparse would name the options of all verbs
        _complain(
            f"unrecognized arguments: {' '.join(unknown)}", f"see: ckptctl wal {args.verb} -h"
        )
        return BadRequest.exit_code
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except CkptdError as bad:
        if isinstance(bad.__cause__, PermissionError):
            bad = Denied(bad.message, "run it as the user whose daemon keeps its state there")
        _complain(bad.message, bad.hint)
        return bad.exit_code
    except OSError as bad:
        _complain(f"{args.state}: {bad}")
        return Internal.exit_code


def _parser() -> argparse.ArgumentParser:
    top = _Parser(prog="ckptctl wal", description="Look at and mend the log of ckptd.")
    verbs = top.add_subparsers(dest="verb", required=True, parser_class=_Parser)
    for name, run, text in (
        ("status", _status, "segments, snapshots, positions"),
        ("verify", _verify, "check every byte"),
        ("dump", _dump, "print the records"),
        ("replay", _replay, "rebuild State from it and count"),
        ("repair", _repair, "drop everything after an LSN"),
        ("salvage", _salvage, "go on around the damage"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        verb.set_defaults(run=run)
        verb.add_argument("--state", required=True, metavar="DIR", help="the state directory")
        verb.add_argument("--json", dest="form", action="store_const", const="json", default="text")
        verb.add_argument("-o", "--output", dest="form", choices=("text", "json", "jsonl"))
        if name == "dump":
            verb.add_argument("--since", type=int, default=0, metavar="LSN", help="after this LSN")
            verb.add_argument("--limit", type=int, default=0, help="at most so many records")
        if name == "replay":
            verb.add_argument("--dry-run", action="store_true", help="as it always is")
        if name == "repair":
            verb.add_argument("--truncate-after", type=int, required=True, metavar="LSN")
    return top


def _show(args: argparse.Namespace, row: Row, lines: list[str]) -> None:
    """Print one result: JSON with its schema, or lines for people."""
    if args.form == "text":
        print("\n".join(lines))
    else:
        row = {"schema": f"ckptd.wal.{args.verb}/1", **row}
        print(msgspec.json.encode(row).decode())


def _look_at(args: argparse.Namespace) -> Store:
    """Open the store so that nothing in it is changed, also where nothing can be."""
    return Store.open(args.state, ReadOnlyDisk(), create=False)


def _judge(opened: Store, *, replays: bool = False) -> tuple[Row, Corrupt | None]:
    """Return what a start would find, and the reason for which it would refuse.

    Without a replay what checks counts as good, also what only a later version can read.
    """
    report: Row = {}
    try:
        found = opened.recover()
        report = msgspec.to_builtins(found.report)
        if replays:
            replay(found.chunks(), found.frames())
    except Corrupt as bad:
        return report, bad
    return report, None


def _status(args: argparse.Namespace) -> int:
    opened = _look_at(args)
    place = opened.place
    names, replaced = segment.newest_names(place.disk.names(place.wal_dir))
    report, bad = _judge(opened)
    row = {
        "store": place.store.hex(),
        "files": [str(name) for name in names],
        "left_over": [str(name) for name in replaced],
        "snapshots": snapshot.listed(place.disk, place.snap_dir),
        "quarantine": place.disk.names(place.quarantine_dir),
        "refused": bad.message if bad else "",
        **report,
    }
    opened.close()
    _show(args, row, [f"{key + ':':14} {_flat(value)}" for key, value in row.items()])
    return bad.exit_code if bad else 0


def _flat(value: Any) -> str:
    return ", ".join(map(str, value)) or "-" if isinstance(value, list) else str(value) or "-"


def _verify(args: argparse.Namespace) -> int:
    opened = _look_at(args)
    findings = list(examine.examine(opened.place))
    report, bad = _judge(opened, replays=True)
    opened.close()
    torn = report.get("torn_file", "")
    lines = []
    is_damaged = bad is not None
    for found in findings:
        is_harmless = found.file == torn or found.text.startswith("left over")
        is_damaged = is_damaged or not is_harmless
        lines.append(f"{found.file} at offset {found.offset} (LSN {found.lsn}): {found.text}")
        if found.flipped:
            lines.append(f"  bit {found.flipped[1]} of byte {found.flipped[0]} is flipped")
        if found.file == torn:
            lines.append("  a torn tail: never acknowledged, the next start cuts it off")
    if bad:
        lines.append(f"a start is refused: {bad.message}")
        if report:  # it checks, and is of a later version
            lines.append(f"  {bad.hint}")
        elif findings:
            last = min(found.lsn for found in findings) - 1
            where = state_option(args.state)
            cut = f"ckptctl wal repair{where} --truncate-after {max(0, last)}"
            lines.append(f"  to go on around it: ckptctl wal salvage{where}")
            lines.append(f"  to drop everything from the damage on: {cut}")
    else:
        lines.append(f"a start works, up to LSN {report['last_lsn']}")
    row = {
        "findings": msgspec.to_builtins(findings),
        "refused": bad.message if bad else "",
        "last_lsn": report.get("last_lsn", -1),
        "damaged": is_damaged,
    }
    _show(args, row, lines)
    return Corrupt.exit_code if is_damaged else 0


def state_option(state: str) -> str:
    """Return the option that names a state directory, where it is not the usual one."""
    usual = paths.resolve(os.geteuid(), os.environ).state
    return "" if state == usual else f" --state {shlex.quote(state)}"


def _dump(args: argparse.Namespace) -> int:
    opened = _look_at(args)
    for row in islice(_rows(opened, args.since), args.limit or None):
        print(msgspec.json.encode(row).decode())
    _, bad = _judge(opened)
    opened.close()
    if bad:
        raise bad
    return 0


def _rows(opened: Store, since: int) -> Iterator[Row]:
    """Yield one row for every record of every frame that checks."""
    for name, _, head, payload in examine.all_frames(opened.place):
        if head.kind == frame.NOTE:
            yield {"segment": name, "lsn": head.first_lsn, "note": payload.decode()}
        elif head.kind == frame.LOST:
            yield {"segment": name, "lsn": head.first_lsn, "lost": head.records}
        elif head.kind == frame.RECORDS and head.last_lsn > since:
            for lsn, record in enumerate(decode(payload), head.first_lsn):
                if lsn > since:
                    yield {"segment": name, "lsn": lsn, **_readable(record)}


def _readable(record: AnyRecord) -> Row:
    """Return a record as its name and fields; packed values are unpacked."""
    row: Row = {"record": type(record).__name__}
    for field in record.__struct_fields__:
        value = getattr(record, field)
        if isinstance(value, msgspec.Raw):
            value = msgspec.msgpack.decode(value)
        row[field] = msgspec.to_builtins(value, str_keys=True)
    return row


def _replay(args: argparse.Namespace) -> int:
    with closing(_look_at(args)) as opened:
        found = opened.recover()
        replayed = replay(found.chunks(), found.frames())
    state = replayed.state
    row = {
        "snapshot_lsn": found.snapshot_lsn,
        "last_lsn": found.last_lsn,
        "epoch": found.epoch,
        "records": found.report.records,
        "tasks": len(state.tasks),
        "phases": dict(Counter(task.phase.word for task in state.tasks.ascending(0))),
        "lost": replayed.lost,
        "in_doubt": sorted(replayed.doubtful),
        "warnings": found.report.warnings,
        "notes": found.report.notes,
    }
    _show(args, row, [f"{key + ':':14} {_flat(value)}" for key, value in row.items()])
    return 0


def _repair(args: argparse.Namespace) -> int:
    opened = Store.open(args.state, create=False)
    done = rebuild.repair(opened.place, args.truncate_after, Clock().now().at_ns)
    return _mended(args, opened, done)


def _salvage(args: argparse.Namespace) -> int:
    is_new = False
    try:
        opened = Store.open(args.state, create=False)
    except Corrupt as bad:
        store.restore_format(RealDisk(), args.state)
        is_new = True
        print(f"{bad.message}; made anew from the segments' headers", file=sys.stderr)
        opened = Store.open(args.state, create=False)
    if _is_sound(opened):
        opened.close()
        untouched = "nothing else is damaged" if is_new else "nothing is damaged"
        what = "only FORMAT" if is_new else "nothing"
        row = {"damaged": False, "format_restored": is_new}
        _show(args, row, [f"{untouched}, {what} was changed"])
        return 0
    return _mended(args, opened, rebuild.salvage(opened.place, Clock().now().at_ns))


def _is_sound(opened: Store) -> bool:
    """Tell whether a start works and loses nothing that was acknowledged."""
    report, bad = _judge(opened)
    torn = report.get("torn_file", "")
    return bad is None and all(
        found.file == torn or found.text.startswith("left over")
        for found in examine.examine(opened.place)
    )


def _mended(args: argparse.Namespace, opened: Store, done: rebuild.Rebuilt) -> int:
    """Say what was done, and check that a start works now."""
    _, bad = _judge(opened)
    opened.close()
    lines = [f"the log ends at LSN {done.last_lsn}; everything as it was is in {done.kept_in}"]
    lines += [f"records {first} to {last} are lost" for first, last in done.lost]
    row = {"last_lsn": done.last_lsn, "kept_in": done.kept_in, "lost": done.lost}
    _show(args, row, lines)
    if bad:
        raise bad
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has seen enough is no error
    raise SystemExit(streams.run(main, "ckptctl"))
