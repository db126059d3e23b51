"""The tables of PROTOCOL.md and FORMAT.md, made from the code.

`python -m tests.unit.protocol.tables` writes them. A region runs from
`<!-- generated: NAME -->` to `<!-- end -->`; the test holds it equal to this.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import inspect as shape

from ckptd.core import records
from ckptd.core.events import _HIDDEN, _word
from ckptd.core.port import Identity
from ckptd.protocol import limits, messages
from ckptd.protocol.errors import all_errors

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "PROTOCOL.md"
FORMAT = ROOT / "FORMAT.md"
REGION = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Kind = type[msgspec.Struct]


def verbs() -> Iterator[str]:
    yield "| verb | arguments | result | resend | what it does |"
    yield "|---|---|---|---|---|"
    for verb, (args, result, mutating) in messages.VERBS.items():
        about = {"groups": "every group", "stats": "counters", "ping": "who answers"} | {
            "daemon": "how the daemon is", "config": "the configuration in force",
            "reload": "read the configuration again; role admin",
        }  # fmt: skip
        text = about.get(verb) or summary(args).split(": ", 1)[-1].rstrip(".")
        resend = "by id" if mutating else ("never" if verb == "shutdown" else "freely")
        takes = "none" if args is messages.Empty else link(args)
        gives = "`{}`" if result is messages.Done else link(result)
        yield f"| `{verb}` | {takes} | {gives} | {resend} | {text} |"


def types() -> Iterator[str]:
    for kind in reachable():
        yield f"### {kind.__name__}"
        yield ""
        yield full_text(kind)
        yield ""
        yield "| field | JSON | default | |"
        yield "|---|---|---|---|"
        comments = dict(field_comments(kind))
        for field in shape.type_info(kind).fields:  # type: ignore[attr-defined]
            default = "" if field.required else f"`{json_text(default_of(field))}`"
            note = comments.get(field.name, "").replace("|", "\\|")
            yield f"| `{field.name}` | {named(field.type)} | {default} | {note} |"
        yield ""


def errors() -> Iterator[str]:
    yield "| code | exit code | retry the same | when |"
    yield "|---|---|---|---|"
    for error in all_errors():
        if error.__module__ != all_errors.__module__:  # of another floor, never on the wire
            continue
        retry = "yes" if error.retryable else "no"
        yield f"| `{error.code}` | {error.exit_code} | {retry} | {summary(error)} |"


def bounds() -> Iterator[str]:
    yield "| bound | value | why |"
    yield "|---|---|---|"
    for line in inspect.getsource(limits).splitlines():
        if found := re.match(r"(\w+): Final = [^#]+(?:# (.*))?", line):
            value = getattr(limits, found[1])
            yield f"| `{found[1]}` | {value:,} | {found[2] or ''} |"


def events() -> Iterator[str]:
    yield "| type | `fields` | what happened |"
    yield "|---|---|---|"
    for kind in records.Record.__subclasses__():
        if kind in _HIDDEN:
            continue
        own = [f for f in kind.__struct_fields__ if f not in ("task", "attempt", "at_ns", "env")]
        shown = ", ".join(f"`{name}`" for name in own)
        yield f"| `{_word(kind.__name__)}` | {shown} | {summary(kind)} |"


def records_of_the_log() -> Iterator[str]:
    yield "| tag | record | fields, in this order |"
    yield "|---|---|---|"
    for kind in records.Record.__subclasses__():
        yield f"| {kind.__struct_config__.tag} | {kind.__name__} | {fields_of(kind)} |"
    for part in (records.Need, records.Verdict, Identity):
        yield f"| | in it {part.__name__} | {fields_of(part)} |"
    yield f"| | Spec, a map | {fields_of(records.Spec)} |"
    numbers = ", ".join(f"{phase.value} {phase.word}" for phase in records.Phase)
    yield f"| | phase, a number | {numbers} |"


def fields_of(kind: Kind) -> str:
    """Names and types of an array's members; with a default where it may be left out."""

    def one(field: shape.Field) -> str:
        default = "" if field.required else f" = {json_text(default_of(field))}"
        return f"`{field.encode_name}` {stored(field.type)}{default}"

    return ", ".join(map(one, shape.type_info(kind).fields))  # type: ignore[attr-defined]


def stored(node: shape.Type) -> str:
    """A type in words of msgpack."""
    match node:
        case shape.StructType(cls=kind):
            return kind.__name__
        case shape.EnumType():
            return "phase"
        case shape.RawType():
            return "Spec"
        case shape.BytesType():
            return "bin"
        case shape.BoolType():
            return "bool"
        case shape.IntType():
            return "int"
        case shape.FloatType():
            return "float"
        case shape.StrType():
            return "str"
        case shape.VarTupleType(item_type=item):
            return f"array of {stored(item)}"
        case shape.DictType():
            return "map of str"
        case _:
            raise AssertionError(node)


REGIONS = {
    DOCUMENT: {f.__name__: f for f in (verbs, types, errors, bounds, events)},
    FORMAT: {"records": records_of_the_log},
}


def reachable() -> list[Kind]:
    """Every struct that is said on the wire, in the order in which a reader meets it."""
    found: dict[Kind, None] = {}

    def visit(node: shape.Type) -> None:
        match node:
            case shape.StructType(cls=kind, fields=fields):
                if kind in found or kind in (messages.Empty, messages.Done):
                    return
                found[kind] = None
                for field in fields:
                    visit(field.type)
            case shape.UnionType(types=inner):
                for one in inner:
                    visit(one)
            case shape.VarTupleType(item_type=item) | shape.ListType(item_type=item):
                visit(item)
            case shape.DictType(value_type=value):
                visit(value)
            case shape.Metadata(type=inner_type):
                visit(inner_type)
            case _:
                return

    for args, result, _ in messages.VERBS.values():
        visit(shape.type_info(args))
        visit(shape.type_info(result))
    return list(found)


def named(node: shape.Type) -> str:
    """A type in words of JSON."""
    match node:
        case shape.Metadata(type=inner):
            return named(inner)
        case shape.StructType(cls=kind):
            return link(kind)
        case shape.UnionType(types=inner):
            return " or ".join(named(one) for one in inner)
        case shape.VarTupleType(item_type=item, min_length=low, max_length=high):
            return f"array of {named(item)}{within(low, high)}"
        case shape.DictType(value_type=value, max_length=high):
            return f"object, {named(value)} values{within(None, high)}"
        case shape.LiteralType(values=values):
            return ", ".join(f'`"{value}"`' for value in values)
        case shape.StrType(min_length=low, max_length=high, pattern=pattern):
            form = f" like `{pattern}`".replace(r"\Z", "$") if pattern else ""  # as others write it
            return f"string{within(low, high)}{form}"
        case shape.IntType(ge=low, le=high, lt=under):
            return f"integer{within(low, high if under is None else under - 1)}"
        case shape.FloatType(ge=low, le=high):
            return f"number{within(low, high)}"
        case shape.BytesType():
            return "string (base64)"
        case shape.BoolType():
            return "boolean"
        case shape.NoneType():
            return "null"
        case _:
            return "any"


def within(low: float | None, high: float | None) -> str:
    match low, high:
        case None, None:
            return ""
        case _, None:
            return f" >= {low}"
        case None, _:
            return f" <= {high:,}"
        case _:
            return f" {low} to {high:,}"


def link(kind: type) -> str:
    return f"[{kind.__name__}](#{kind.__name__.lower()})"


def summary(kind: type) -> str:
    return in_json((kind.__doc__ or "").strip().splitlines()[0])


def full_text(kind: type) -> str:
    return in_json(" ".join((kind.__doc__ or "").split()))


def default_of(field: shape.Field) -> object:
    if field.default is not msgspec.NODEFAULT:
        return field.default
    return field.default_factory()


def json_text(value: object) -> str:
    return msgspec.json.encode(value).decode()


def field_comments(kind: type) -> Iterator[tuple[str, str]]:
    """The comment behind a field, on the line where its declaration ends."""
    name = ""
    for line in inspect.getsource(kind).splitlines():
        if found := re.match(r"    (\w+): ", line):
            name = found[1]
        comment = re.search(r"  # (?!noqa|type:)(.*)$", line)
        if name and comment:
            yield name, in_json(comment[1])


def in_json(text: str) -> str:
    """What a comment says of Python's constants, in JSON's words."""
    return re.sub(r"\bNone\b", "`null`", re.sub(r"\bFalse\b", "`false`", text))


def regenerated(document: Path) -> str:
    def fill(found: re.Match[str]) -> str:
        body = "\n".join(REGIONS[document][found[2]]())
        return f"{found[1]}{body.rstrip()}\n{found[3]}"

    return REGION.sub(fill, document.read_text())


if __name__ == "__main__":
    for page in REGIONS:
        page.write_text(regenerated(page))
        sys.stdout.write(f"{page.name} is up to date\n")
