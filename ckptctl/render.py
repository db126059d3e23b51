"""From answers to text: table, wide, json, jsonl, csv, tsv, name and templates.

Tables are for people and fit the terminal; every other format is for programs: complete, with
RFC 3339 times in UTC, seconds as numbers and null for nothing. stdout gets data only.
Read next: `words.py`.
"""

import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import msgspec

from ckptctl.units import nearest, rfc3339
from ckptd.protocol.errors import BadRequest

SCHEMA: Final = "ckptd/v1"
FORMATS: Final = ("table", "wide", "json", "jsonl", "csv", "tsv", "name", "template")
GAP: Final = "  "
_AT: Final = {"at_ns": "at", "until_ns": "until", "deadline_ns": "deadline"}


class Column(msgspec.Struct, frozen=True):
    """One column of a table: `shrink` is the width it may shrink to, 0 for never.

    Where even that is too wide for the terminal, columns are left out, the highest `drop` first.
    """

    key: str
    text: Callable[[Any], str]
    title: str = ""
    is_right: bool = False
    is_wide: bool = False  # in -o wide only
    shrink: int = 0
    drop: int = 0  # 0: never left out
    usual: str = ""  # a column with nothing but this is left out
    paint: Callable[[Any], str] | None = None  # ANSI code of a cell


class Style(msgspec.Struct, frozen=True):
    """How this invocation wants its output."""

    form: str = "table"
    template: str = ""
    columns: tuple[str, ...] = ()
    has_headers: bool = True
    has_color: bool = False
    is_quiet: bool = False  # ids alone
    width: int = 0  # 0: no limit


class Listing(msgspec.Struct, frozen=True):
    """Rows of one kind, with the columns that people see of them."""

    kind: str  # the JSON member: tasks, groups, ...
    rows: Sequence[Any]
    columns: tuple[Column, ...]
    name: Callable[[Any], str]  # what other commands take as its name
    extra: dict[str, Any] = {}  # further JSON members


def terminal_width() -> int:
    """Return the columns of the terminal on stdout, 0 where it is none."""
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"])
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else 0
    except (OSError, ValueError):
        return 0


def make_style(
    output: str,
    *,
    columns: str = "",
    headers: bool = True,
    color: str = "auto",
    quiet: bool = False,
) -> Style:
    """Return the Style of the options. Raises BadRequest for an unknown format."""
    form, equals, template = output.partition("=")
    if "{" in form:
        form, template = "template", output
    if form not in FORMATS:
        hint = nearest(form, FORMATS) or f"one of: {', '.join(FORMATS)}"
        raise BadRequest(f"unknown output format {form!r}", hint)
    if form == "template" and not template:
        raise BadRequest("a template is missing", "example: -o 'template={id} {phase}'")
    if equals and form != "template":
        raise BadRequest(f"the format {form} takes no value", "example: -o json")
    dull = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    is_auto = color == "auto" and sys.stdout.isatty() and not dull
    names = tuple(filter(None, (name.strip() for name in columns.split(","))))
    if columns and not names:
        raise BadRequest(f"--columns: no column in {columns!r}", "example: --columns id,name")
    if names and form in ("json", "jsonl", "template"):
        raise BadRequest(
            f"--columns does not go with -o {form}", "it goes with table, wide, csv and tsv"
        )
    return Style(
        form,
        template,
        names,
        headers,
        color == "always" or is_auto,
        quiet,
        width=terminal_width(),
    )


def plain(value: Any) -> Any:
    """Return builtins fit for JSON: `x_ns` becomes `x_at` in RFC 3339, or null for never."""
    return _renamed(msgspec.to_builtins(value))


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            plain_name(name) if _is_time(name, item) else name: (
                rfc3339(item) if _is_time(name, item) else _renamed(item)
            )
            for name, item in value.items()
        }
    return [_renamed(item) for item in value] if isinstance(value, list | tuple) else value


def plain_name(name: str) -> str:
    """Return how programs know a time: `ended_at` of ended_ns."""
    return _AT.get(name, f"{name[:-3]}_at")


def _is_time(name: Any, item: Any) -> bool:
    return isinstance(name, str) and name.endswith("_ns") and isinstance(item, int)


def json_text(members: dict[str, Any]) -> str:
    """Return one indented JSON document that carries the schema's name."""
    body = msgspec.json.encode({"schema": SCHEMA, **members})
    return msgspec.json.format(body, indent=2).decode()


def json_line(item: Any) -> str:
    """Return one row as one line of JSON."""
    return msgspec.json.encode({"schema": SCHEMA, **plain(item)}).decode()


def listing_lines(listing: Listing, style: Style) -> Iterable[str]:
    """Return the lines of a listing in the style's format."""
    rows = listing.rows
    if style.is_quiet or style.form == "name":
        return [listing.name(row) for row in rows]
    match style.form:
        case "json":
            return [json_text({listing.kind: [plain(row) for row in rows], **listing.extra})]
        case "jsonl":
            return [json_line(row) for row in rows]
        case "template":
            return [_filled(style.template, _fields(listing, row)) for row in rows]
        case "csv" | "tsv":
            return _separated(listing, style)
        case _:
            pass
    columns = _chosen(listing, style)
    return table_lines(columns, rows, style, keep=bool(style.columns))


def _fields(listing: Listing, row: Any) -> dict[str, Any]:
    """Return all that a template may name: the columns' texts, and the fields by their names."""
    fields: dict[str, Any] = {column.key: column.text(row) for column in listing.columns}
    fields.update(plain(row))
    return fields


def _filled(template: str, fields: dict[str, Any]) -> str:
    shown = {name: "" if value is None else value for name, value in fields.items()}
    try:
        return template.replace("\\t", "\t").replace("\\n", "\n").format_map(shown)
    except KeyError as bad:
        raise _no_column(str(bad.args[0]), fields) from bad
    except (ValueError, IndexError, AttributeError, TypeError) as bad:
        raise BadRequest(f"the template does not work: {bad}", "example: '{id} {phase}'") from bad


def _no_column(name: str, known: Iterable[str]) -> BadRequest:
    names = sorted(known)
    return BadRequest(f"no column {name!r}", nearest(name, names) or f"known: {', '.join(names)}")


def _separated(listing: Listing, style: Style) -> list[str]:
    separator = "," if style.form == "csv" else "\t"
    every = [_fields(listing, row) for row in listing.rows]
    names = style.columns or tuple(plain(listing.rows[0]) if every else ())
    lines = [separator.join(names)] if style.has_headers and names else []
    for fields in every:
        if missing := [name for name in names if name not in fields]:
            raise _no_column(missing[0], fields)
        lines.append(separator.join(_cell(fields[name], separator) for name in names))
    return lines


def _cell(value: Any, separator: str) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    if separator == "\t":
        return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\n\r') else text


def _chosen(listing: Listing, style: Style) -> list[Column]:
    if not style.columns:
        is_wide = style.form == "wide"
        return [column for column in listing.columns if is_wide or not column.is_wide]
    known = {column.key: column for column in listing.columns}
    fields = plain(listing.rows[0]) if listing.rows else {}
    chosen: list[Column] = []
    for name in style.columns:
        if name in known:
            chosen.append(known[name])
        elif name in fields or not listing.rows:
            chosen.append(_field_column(name))
        else:
            raise _no_column(name, {*known, *fields})
    return chosen


def _field_column(name: str) -> Column:
    return Column(name, lambda row: _cell(plain(row).get(name), ""))


# --- tables -----------------------------------------------------------------------------------


def text_width(text: str) -> int:
    """Return the terminal cells of a text without escapes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def shorten(text: str, width: int) -> str:
    """Return the text in at most `width` cells; what is cut is marked."""
    if text_width(text) <= width:
        return text
    kept, used = [], 1
    for char in text:
        used += text_width(char)
        if used > width:
            break
        kept.append(char)
    return "".join(kept) + "…" if width > 0 else ""


def table_lines(
    columns: Sequence[Column], rows: Sequence[Any], style: Style, *, keep: bool = False
) -> list[str]:
    """Return header and rows, fitted to the width; blank columns are left out unless `keep`."""
    cells = [[column.text(row) for column in columns] for row in rows]
    used = [
        place
        for place, column in enumerate(columns)
        if keep or not rows or any(line[place] not in ("", column.usual) for line in cells)
    ]
    naturals = {
        place: max(text_width(line[place]) for line in [titles_of(columns, style), *cells])
        for place in used
    }
    used = used if keep else _without_dropped(columns, naturals, style.width)
    shown = [columns[place] for place in used]
    titles = [titles_of(columns, style)[place] for place in used]
    widths = [naturals[place] for place in used]
    widths = fit(widths, [column.shrink for column in shown], style.width)
    lines = []
    if style.has_headers and rows:
        heads = [_padded(t, w, c) for t, w, c in zip(titles, widths, shown, strict=True)]
        lines.append(_line(heads, ["1" if style.has_color else ""] * len(heads)))
    for row, line in zip(rows, cells, strict=True):
        texts = [_padded(line[p], w, c) for p, w, c in zip(used, widths, shown, strict=True)]
        paints = [column.paint(row) if column.paint and style.has_color else "" for column in shown]
        lines.append(_line(texts, paints))
    return lines


def titles_of(columns: Sequence[Column], style: Style) -> list[str]:
    """Return the header's cells, blank where no header is wanted."""
    return [(c.title or c.key).upper() if style.has_headers else "" for c in columns]


def _without_dropped(columns: Sequence[Column], naturals: dict[int, int], limit: int) -> list[int]:
    """Return the columns to show: as many as fit when each shrinks as far as it may."""
    used = list(naturals)
    least = {p: min(w, columns[p].shrink or w) for p, w in naturals.items()}
    for place in sorted(used, key=lambda place: -columns[place].drop):
        needed = sum(least[p] for p in used) + len(GAP) * (len(used) - 1)
        if not limit or needed <= limit or not columns[place].drop:
            break
        used.remove(place)
    return used


def fit(widths: list[int], shrink: list[int], limit: int) -> list[int]:
    """Return widths whose sum with gaps is within the limit, as far as columns may shrink.

    The column that is furthest above its minimum gives way first; 0 as limit means no limit.
    """
    fitted = list(widths)
    over = sum(fitted) + len(GAP) * (len(fitted) - 1) - limit if limit else 0
    while over > 0:  # Bound: each turn takes at least one cell from a column
        able = [p for p in range(len(fitted)) if shrink[p] and fitted[p] > shrink[p]]
        if not able:
            break
        richest = max(able, key=lambda place: fitted[place] - shrink[place])
        fitted[richest] -= 1
        over -= 1
    return fitted


def _padded(text: str, width: int, column: Column) -> str:
    if width <= 0:
        return ""
    text = shorten(text, width)
    space = " " * (width - text_width(text))
    return space + text if column.is_right else text + space


def _line(texts: list[str], paints: list[str]) -> str:
    last = len(texts) - 1
    texts = [text.rstrip() if place == last else text for place, text in enumerate(texts)]
    parts = [f"\x1b[{p}m{t}\x1b[0m" if p and t else t for t, p in zip(texts, paints, strict=True)]
    return GAP.join(parts).rstrip()


def facts_lines(facts: Iterable[tuple[str, str]], style: Style) -> list[str]:
    """Return `name  value` lines with the names aligned; empty values are left out."""
    shown = [(name, value) for name, value in facts if value]
    width = max((len(name) for name, _ in shown), default=0)
    bold = ("\x1b[1m", "\x1b[0m") if style.has_color else ("", "")
    return [f"{bold[0]}{name.ljust(width)}{bold[1]}  {value}" for name, value in shown]
