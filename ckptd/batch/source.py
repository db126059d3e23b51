"""From a file, stdin or a command's output to items: streaming, bounded, checked line by line.

    lines   a line is an item and its own key; empty lines are left out
    null    the same, ended by NUL: what `find -print0` writes
    jsonl   a JSON value a line; its key the field `key`, else the value itself as canonical JSON
    csv     a header, then a row an item: {"column": "value"}; its key a column, else the row

Invariant: the key comes from the content, never from the place in the list, so a list that was
sorted or extended means the same items. A refusal names source, line and remedy; it happens
before anything is written. Read next: `prepare.py`.
"""

import csv
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from typing import IO, Any, Final, NamedTuple

from ckptd.batch.place import Item, canonical
from ckptd.batch.refusal import BAD_DATA, Refused, count
from ckptd.batch.spec import Source
from ckptd.storage.untrusted import parse_json

ITEM_BYTES_MAX: Final = 1 << 20
ITEMS_MAX: Final = 5_000_000
KEY_CHARS_MAX: Final = 512
_CHUNK_BYTES: Final = 1 << 18
_SHOWN_CHARS: Final = 60

Line = tuple[int, bytes]


class Taken(NamedTuple):
    """The items of a source, each key once, in order."""

    items: dict[str, Item]
    duplicates: int
    warnings: list[str]


class _Bad(Exception):
    """What is wrong with a line; the place is added where it is known."""

    def __init__(self, line: int, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.line = line
        self.hint = hint


def take(source: Source, cwd: str) -> Taken:
    """Return the items of a source.

    Raises:
        Refused: it cannot be opened or read, or a line is unfit; nothing was changed.
    """
    name = _name_of(source)
    try:
        return _gathered(_values(source, cwd), source, name)
    except _Bad as bad:
        hint = f"{bad.hint}; nothing was changed" if bad.hint else "nothing was changed"
        raise Refused(f"{name}: line {bad.line:,} {bad}", hint, code=BAD_DATA) from bad


def _name_of(source: Source) -> str:
    match source.from_:
        case "file":
            return source.path or "--items"
        case "stdin":
            return "stdin"
        case "command":
            return f"the output of {' '.join(source.argv)[:_SHOWN_CHARS]!r}"
        case "lines":
            return "the items given"


def _gathered(values: Iterable[tuple[int, Any]], source: Source, name: str) -> Taken:
    items: dict[str, Item] = {}
    lines: dict[str, int] = {}
    twice: list[int] = []
    for line, value in values:
        key = _key(value, source, line)
        before = items.get(key)
        if before is None:
            if len(items) >= ITEMS_MAX:
                raise Refused(f"{name} has more than {ITEMS_MAX:,} items", "split it in batches")
            items[key] = Item(key, value, len(items) + 1)
            lines[key] = line
        elif before.value == value:
            twice.append(line)
        else:
            shown = key[:_SHOWN_CHARS]
            raise _Bad(
                line,
                f"has the key {shown!r} of line {lines[key]:,}, but another content",
                f"choose a field that tells items apart, or none ({source.key!r} is not unique)",
            )
    warnings = []
    if twice:
        times = count(len(twice), "line repeats", "lines repeat")
        warnings.append(f"{name}: {times} an item given before; each runs once (line {twice[0]:,})")
    return Taken(items, len(twice), warnings)


def _key(value: Any, source: Source, line: int) -> str:
    if value in ("", None):
        what = "null" if value is None else "an empty text"
        raise _Bad(line, f"is {what}, which is no item", "leave it out")
    if source.key is None:
        text = value if isinstance(value, str) else canonical(value)
    elif not isinstance(value, dict) or source.key not in value:
        has = ", ".join(list(value)[:8]) if isinstance(value, dict) else type(value).__name__
        raise _Bad(line, f"has no field {source.key!r}", f"it has: {has}")
    else:
        found = value[source.key]
        text = found if isinstance(found, str) else canonical(found)
    if not text:
        raise _Bad(line, f"has an empty {source.key!r}, which can be no key")
    if len(text) <= KEY_CHARS_MAX:
        return text
    whole = sha256(text.encode()).hexdigest()
    return text[: KEY_CHARS_MAX - 1 - len(whole)] + "#" + whole


def _values(source: Source, cwd: str) -> Iterator[tuple[int, Any]]:
    match source.from_:
        case "file":
            yield from _of_file(source, os.path.join(cwd, os.path.expanduser(source.path)))
        case "stdin":
            yield from _parsed(sys.stdin.buffer, source)
        case "command":
            yield from _of_command(source, cwd)
        case "lines":
            yield from _of_lines(source)


def _of_file(source: Source, path: str) -> Iterator[tuple[int, Any]]:
    shown = source.path
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except IsADirectoryError:
        hint = f"for the files in it: --items-from 'find {shown} -type f'; nothing was changed"
        raise Refused(f"{shown} is a directory, not a list of items", hint) from None
    except OSError as error:
        raise Refused(f"{shown}: {error.strerror}", "nothing was changed", code=BAD_DATA) from error
    with file:
        if stat.S_ISCHR(os.fstat(file.fileno()).st_mode) and path != os.devnull:
            raise Refused(f"{shown} is a device, not a list of items", "nothing was changed")
        yield from _parsed(file, source)


def _of_command(source: Source, cwd: str) -> Iterator[tuple[int, Any]]:
    if not source.argv:
        raise Refused("--items-from: no command given")
    name = _name_of(source)
    try:
        done = subprocess.Popen(
            source.argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd=cwd
        )
    except OSError as error:
        raise Refused(f"{name}: {source.argv[0]}: {error.strerror}", "nothing was changed") from (
            error
        )
    assert done.stdout is not None
    try:
        yield from _parsed(done.stdout, source)
        code = done.wait()
    finally:
        done.stdout.close()
        if done.poll() is None:
            done.kill()
            done.wait()
    if code:
        how = f"exited with {code}" if code > 0 else f"was killed by signal {-code}"
        hint = "half a list is no list; nothing was changed"
        raise Refused(f"{name}: the command {how}", hint, code=BAD_DATA)


def _of_lines(source: Source) -> Iterator[tuple[int, Any]]:
    for number, value in enumerate(source.lines, 1):
        if isinstance(value, str):
            _refuse_binary(number, value.encode(errors="surrogatepass"), source)
        if len(canonical(value)) > ITEM_BYTES_MAX:
            raise _too_long(number)
        yield number, value


# --- formats -------------------------------------------------------------------------------------


def _parsed(file: IO[bytes], source: Source) -> Iterator[tuple[int, Any]]:
    parser: Callable[[IO[bytes], Source], Iterator[tuple[int, Any]]] = {
        "lines": _text_lines,
        "null": _text_lines,
        "jsonl": _json_lines,
        "csv": _csv_rows,
    }[source.format]
    yield from parser(file, source)


def _split(file: IO[bytes], separator: bytes) -> Iterator[Line]:
    """Yield (number, line) without its end; reads no more than a line and a chunk at once."""
    rest, number = b"", 0
    while chunk := file.read(_CHUNK_BYTES):  # Bound: the end of the source
        *lines, rest = (rest + chunk).split(separator)
        for line in lines:
            number += 1
            if len(line) > ITEM_BYTES_MAX:
                raise _too_long(number)
            yield number, line
        if len(rest) > ITEM_BYTES_MAX:
            raise _too_long(number + 1)
    if rest:
        yield number + 1, rest


def _too_long(number: int) -> _Bad:
    return _Bad(
        number,
        f"is longer than {ITEM_BYTES_MAX:,} bytes",
        "an item names the work, it does not hold it: put large data into a file, list its path",
    )


def _refuse_binary(number: int, line: bytes, source: Source) -> str:
    at = line.find(b"\0")
    if at >= 0:
        hint = "for names from `find -print0` say --format null"
        raise _Bad(number, f"holds a NUL byte (byte {at + 1}): this is no text", hint)
    try:
        return line.decode()
    except UnicodeDecodeError as bad:
        ends = "NUL-ended item" if source.format == "null" else "line"
        raise _Bad(
            number,
            f"is no UTF-8 (byte {bad.start + 1} is 0x{bad.object[bad.start]:02x})",
            f"is it binary, or in another encoding? every {ends} must be UTF-8 (see: iconv)",
        ) from bad


def _text_lines(file: IO[bytes], source: Source) -> Iterator[tuple[int, Any]]:
    separator = b"\0" if source.format == "null" else b"\n"
    for number, line in _split(file, separator):
        text = _refuse_binary(number, line, source)
        if source.format == "lines":
            text = _without_bom(number, text).removesuffix("\r")
            if not text.strip():
                continue
        if text:
            yield number, text


def _without_bom(number: int, text: str) -> str:
    return text.removeprefix("\ufeff") if number == 1 else text


def _json_lines(file: IO[bytes], source: Source) -> Iterator[tuple[int, Any]]:
    for number, line in _split(file, b"\n"):
        text = _without_bom(number, _refuse_binary(number, line, source)).strip()
        if not text:
            continue
        try:
            value = parse_json(text.encode())
            canonical(value).encode()
        except ValueError as bad:
            what = bad.msg if isinstance(bad, json.JSONDecodeError) else str(bad)
            hint = "--format jsonl wants one JSON value on every line"
            raise _Bad(number, f"is no JSON ({what}): {text[:_SHOWN_CHARS]!r}", hint) from bad
        yield number, value


def _csv_rows(file: IO[bytes], source: Source) -> Iterator[tuple[int, Any]]:
    lines = _CsvLines(file, source)
    reader = csv.reader(lines, strict=True)
    header: list[str] = []
    try:
        for row in reader:  # Bound: the end of the source
            began, lines.began, lines.row_bytes = lines.began, lines.number + 1, 0
            if not row:
                continue
            if not header:
                header = _header(began, row)
            elif len(row) != len(header):
                expected = f"{len(row)} columns, the header has {len(header)}"
                raise _Bad(began, f"has {expected}", "quote values that hold commas")
            else:
                yield began, dict(zip(header, row, strict=True))
    except csv.Error as bad:
        raise _Bad(lines.began, f"is no CSV: {bad}", "is a quote not closed?") from bad


def _header(line: int, row: list[str]) -> list[str]:
    if len(set(row)) != len(row) or "" in row:
        raise _Bad(line, f"is no header: names must be there and differ: {','.join(row)[:80]}")
    return row


class _CsvLines:
    """The lines of a CSV file as text; knows where the row under way began, and bounds it."""

    def __init__(self, file: IO[bytes], source: Source) -> None:
        csv.field_size_limit(2 * ITEM_BYTES_MAX)  # rows are bounded below, with their line
        self.number = 0
        self.began = 1
        self.row_bytes = 0
        self._source = source
        self._lines = _split(file, b"\n")

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        self.row_bytes += len(line) + 1
        if self.row_bytes > ITEM_BYTES_MAX:
            raise _Bad(
                self.began,
                f"begins a row of more than {ITEM_BYTES_MAX:,} bytes",
                "is a quote not closed?",
            )
        return _without_bom(self.number, _refuse_binary(self.number, line, self._source)) + "\n"
