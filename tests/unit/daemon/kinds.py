"""What is sent with each kind of line, read from the code, and the table of docs/JOURNAL.md.

`python -m tests.unit.daemon.kinds` writes the table; the test holds it equal to this.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ckptd.host.journal import Kind

ROOT = Path(__file__).resolve().parents[3]
CATALOG = ROOT / "systemd" / "ckptd.catalog"
DOCUMENT = ROOT / "docs" / "JOURNAL.md"
REGION = re.compile(r"(<!-- generated: kinds -->\n).*?(<!-- end -->)", re.DOTALL)
TELLERS = {"event": (), "_line": ("lsn", "task_id", "phase"), "head": (), "send": ()}
"""Who sends lines, and what each adds by itself."""
DICTS = {"OUTPUT": "task_id attempt uid unit stream", "DROPPED": "count"}


def sent_with() -> dict[Kind, list[str]]:
    """Return the fields of every kind; those that any of its lines has."""
    found: dict[Kind, dict[str, None]] = {kind: {} for kind in Kind}
    floors = ("daemon", "door", "host")
    for path in sorted(one for floor in floors for one in (ROOT / "ckptd" / floor).glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                for kind, name in _told_in(function):
                    found[kind][name] = None
    for part, names in DICTS.items():
        (kind,) = (kind for kind in Kind if kind.name.endswith(part))
        found[kind] |= dict.fromkeys(names.split())
    return {kind: list(names) for kind, names in found.items()}


def _told_in(function: ast.FunctionDef) -> Iterator[tuple[Kind, str]]:
    """Yield (kind, field); a kind that is held in a variable may be any that the function names."""
    named = [kind for node in ast.walk(function) if (kind := _kind_of(node)) is not None]
    for node in ast.walk(function):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        kinds = [_kind_of(node.args[0])]
        if isinstance(node.args[0], ast.Name) and node.args[0].id == "kind":
            kinds = [*named]
        for kind in kinds:
            if kind is not None and node.func.attr in TELLERS:
                yield from ((kind, name) for name in TELLERS[node.func.attr])
                words = (word.arg for word in node.keywords)
                yield from ((kind, word) for word in words if word not in (None, "priority"))


def _kind_of(node: ast.AST) -> Kind | None:
    is_kind = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    if is_kind and node.value.id == "Kind":  # type: ignore[attr-defined]
        return Kind[node.attr]  # type: ignore[attr-defined]
    return None


def catalog() -> dict[str, tuple[dict[str, str], str]]:
    """Return the catalog: MESSAGE_ID -> (its headers, its text)."""
    found = {}
    for entry in re.split(r"^-- ", CATALOG.read_text(), flags=re.MULTILINE)[1:]:
        top, _, text = entry.partition("\n\n")
        number, *headers = top.splitlines()
        pairs = (line.partition(": ") for line in headers)
        found[number] = ({name: value for name, _, value in pairs}, text.split("\n#")[0])
    return found


def table() -> Iterator[str]:
    """Yield the lines of the table."""
    entries, sent = catalog(), sent_with()
    yield "| `CKPTD_EVENT` | `MESSAGE_ID` | fields (all but `ERRNO` with `CKPTD_`) | what it says |"
    yield "|---|---|---|---|"
    for kind in Kind:
        names = ", ".join(f"`{name.upper()}`" for name in sent[kind])
        subject = re.sub(
            r"@CKPTD_(\w+)@", lambda at: _WORDS[at[1]], entries[kind.value][0]["Subject"]
        )
        yield f"| `{kind.name.lower()}` | `{kind.value}` | {names} | {subject} |"


_WORDS = {"TASK_ID": "7", "UID": "1000", "COUNT": "12", "GROUP": "gpu"}


def regenerated(text: str) -> str:
    """Return the document with the table of now."""
    rows = "\n".join(table())
    return REGION.sub(lambda found: f"{found[1]}{rows}\n{found[2]}", text)


if __name__ == "__main__":
    DOCUMENT.write_text(regenerated(DOCUMENT.read_text()))
    sys.stdout.write(f"{DOCUMENT.name} is up to date\n")
