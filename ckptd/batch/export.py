"""Results as JSON lines, one JSON document or CSV, written row by row.

CSV has one row a result; the fields of an item that is an object become columns `item.FIELD`, as
far as the first item has them. It knows no ledger. Read next: `report.py`.
"""

import csv
import io
import sys
import time
from collections.abc import Iterable
from typing import Any, BinaryIO, Final

import msgspec

FORMATS: Final = ("jsonl", "json", "csv")
_SCHEMA: Final = "ckptd/v1"
_COLUMNS: Final = ("key", "status", "result", "text", "tries", "took_s", "lane", "run", "ended_at")

Row = dict[str, Any]


def write(name: str, form: str, rows: Iterable[Row]) -> None:
    """Write all rows to stdout in one of FORMATS."""
    out = sys.stdout.buffer
    shown = (_for_people(row) for row in rows)
    match form:
        case "csv":
            _write_csv(shown, out)
        case "json":
            _write_json(name, shown, out)
        case _:
            for row in shown:
                out.write(msgspec.json.encode({"schema": _SCHEMA, **row}) + b"\n")
    out.flush()


def _for_people(row: Row) -> Row:
    """Return the row with the time that programs of others read."""
    found = {name: value for name, value in row.items() if name != "at_ns"}
    return {**found, "ended_at": _rfc3339(row["at_ns"])}


def _rfc3339(at_ns: int) -> str | None:
    if not at_ns:
        return None
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at_ns // 1_000_000_000))
    return f"{whole}.{at_ns % 1_000_000_000 // 1000:06d}Z"


def _write_json(name: str, rows: Iterable[Row], out: BinaryIO) -> None:
    head = msgspec.json.encode({"schema": _SCHEMA, "batch": name})
    out.write(head[:-1] + b',"results":[')
    gap = b"\n"
    for row in rows:
        out.writelines((gap, msgspec.json.encode(row)))
        gap = b",\n"
    out.write(b"\n]}\n")


def _write_csv(rows: Iterable[Row], out: BinaryIO) -> None:
    text = io.TextIOWrapper(out, encoding="utf-8", newline="", write_through=False)
    writer = csv.writer(text, lineterminator="\n")
    fields: list[str] | None = None
    for row in rows:
        if fields is None:
            fields = list(row["item"]) if isinstance(row["item"], dict) else []
            heads = [f"item.{field}" for field in fields] or ["item"]
            writer.writerow([*_COLUMNS, *heads])
        cells = [row[name] for name in _COLUMNS]
        item = row["item"]
        if fields:
            cells += [item.get(field) if isinstance(item, dict) else None for field in fields]
        else:
            cells.append(item)
        writer.writerow([_cell(cell) for cell in cells])
    text.flush()
    text.detach()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
