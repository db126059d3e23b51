"""Telling a person what is wrong in a TOML file: line, key, value, what is allowed, nearest key.

Knows nothing of what the keys mean; the struct types say it all. Read next: `config.py`.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
from msgspec import inspect

from ckptd.protocol.errors import BadConfig

Kind = type[msgspec.Struct]


def read_table(path: str, text: str, kind: Kind) -> dict[str, Any]:
    """Return the parsed file once every key and value fits `kind`; raises BadConfig otherwise."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as bad:
        raise BadConfig(f"{path}: not TOML: {bad}", "see etc/ckptd.toml for the syntax") from bad
    lines = dict(_lines(text))
    everywhere = list(known_keys(kind))
    problems = [
        f"{path}{_place(lines, key)}: {problem or _unknown(key, everywhere)}"
        for key, problem in _problems("", tables, kind)
    ]
    if problems:
        raise BadConfig("\n".join(problems), "every key is explained in etc/ckptd.toml")
    return tables


def _problems(prefix: str, table: dict[str, Any], kind: Kind) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, what is wrong; "" for an unknown key). Bound: types nest two deep."""
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for name, value in table.items():
        if name not in fields:
            yield f"{prefix}{name}", ""
        else:
            yield from _value_problems(f"{prefix}{name}", value, fields[name])


def _value_problems(key: str, value: Any, wanted: Any) -> Iterator[tuple[str, str]]:
    match inspect.type_info(wanted):
        case (
            inspect.StructType(cls=kind) | inspect.DictType(value_type=inspect.StructType(kind))
        ) if not isinstance(value, dict):
            yield key, f"{key} is {_shown(value)}, but it is a table: write [{key}]"
        case inspect.StructType(cls=kind):
            yield from _problems(f"{key}.", value, kind)
        case inspect.DictType(key_type=name_type, value_type=inspect.StructType(cls=kind)):
            for name, inner in value.items():
                if not _fits(name, get_args(wanted)[0]):
                    told = f"{_shown(name)} is no name for {key}, allowed is {allowed(name_type)}"
                    yield f"{key}.{name}", told
                elif not isinstance(inner, dict):
                    yield f"{key}.{name}", f"{key}.{name} must be a table: [{key}.{name}]"
                else:
                    yield from _problems(f"{key}.{name}.", inner, kind)
        case leaf:
            if not _fits(value, wanted):
                yield key, f"{key} is {_shown(value)}, allowed is {allowed(leaf)}"


def _fits(value: Any, wanted: Any) -> bool:
    try:
        msgspec.convert(value, wanted)
    except msgspec.ValidationError:
        return False
    return bool(value == value)  # noqa: PLR0124  # nan passes every bound


def allowed(leaf: inspect.Type) -> str:
    """Return in words what a value may be."""
    match leaf:
        case inspect.Metadata(type=inner):
            return allowed(inner)
        case inspect.IntType(ge=low, le=high):
            return f"a whole number from {low} to {high}"
        case inspect.FloatType(ge=low, le=high):
            return f"a number from {low} to {high}"
        case inspect.LiteralType(values=values):
            return "one of " + ", ".join(sorted(repr(value) for value in values))
        case inspect.StrType(pattern=pattern, max_length=most):
            form = f" of the form {pattern}".replace(r"\Z", "$") if pattern else ""
            return f"text{form}" + (f", at most {most} characters" if most else "")
        case inspect.VarTupleType() | inspect.ListType():
            return 'a list of names, such as ["ops"]'
        case inspect.BoolType():
            return "true or false"
        case _:
            return "text"


def known_keys(kind: Kind, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key; the name in a table of tables is written `NAME`."""
    for field in msgspec.structs.fields(kind):
        key = f"{prefix}{field.name}"
        match inspect.type_info(field.type):
            case inspect.StructType(cls=inner):
                yield from known_keys(inner, f"{key}.")
            case inspect.DictType(value_type=inspect.StructType(cls=inner)):
                yield from known_keys(inner, f"{key}.NAME.")
            case _:
                yield key


def _unknown(key: str, everywhere: list[str]) -> str:
    """Return what to say of an unknown key: the nearest of its table, else of any table."""
    table, _, name = key.rpartition(".")
    table = re.sub(r"^groups\..*", "groups.NAME", table)
    here = [known for known in everywhere if known.rpartition(".")[0] == table]
    for candidates in (here, everywhere):
        leaves = {known.rpartition(".")[2]: known for known in candidates}
        if close := difflib.get_close_matches(name, list(leaves), n=1, cutoff=0.7):
            return f"unknown key {key}, did you mean {leaves[close[0]]}?"
    tables = sorted({known.partition(".")[0] for known in everywhere})
    if not here and (close := difflib.get_close_matches(key, tables, n=1, cutoff=0.6)):
        return f"unknown key {key}, did you mean [{close[0]}]?"
    return f"unknown key {key}, known here: {', '.join(here or tables)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _lines(text: str) -> Iterator[tuple[str, int]]:
    """Yield (dotted key, line) of plain `[table]` and `key =` lines: good enough to point."""
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([\w.\-\"' ]+)\]", line):
            table = _bare(header[1])
            yield table, number
        elif key := re.match(r"\s*([\w.\-\"' ]+?)\s*=", line):
            name = _bare(key[1])
            yield (f"{table}.{name}" if table else name), number


def _bare(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))


def _place(lines: dict[str, int], key: str) -> str:
    return f":{lines[key]}" if key in lines else ""
