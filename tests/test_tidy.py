"""What a linter cannot say about this code: sizes, who may sync, who may read a clock, names."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FUNCTION_LINES_MAX = 60
FILE_LINES_MAX = 450
TEST_LINES_MAX = 600
MODULES_PER_FLOOR_MAX = 24

SOURCES = sorted(
    path
    for top in ("ckptd", "ckptctl", "examples", "bench", "install")
    for path in (ROOT / top).rglob("*.py")
)
ALL_PYTHON = SOURCES + sorted((ROOT / "tests").rglob("*.py"))
TEXTS = [
    *ALL_PYTHON,
    *(
        path
        for top in ("etc", "systemd", "install/man", "docs", ".ci")
        for path in (ROOT / top).rglob("*")
    ),
    *ROOT.glob("*.md"),
    ROOT / "Makefile",
]

# Every sync is that of disk.py, but for the exit record's: what a supervisor loads stays tiny.
MAY_SYNC = {"ckptd/storage/disk.py", "ckptd/runner/attempt.py"}
# Declarations: long, flat, and better in one place.
LONGER = {"ckptd/protocol/messages.py": 620}
SYNCS = {"fsync", "fdatasync", "sync_file_range"}
CLOCKS = {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "now", "utcnow"}
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "base", "misc"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = node.body[0]
    has_docstring = ast.get_docstring(node) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


def calls(tree: ast.Module, module: str) -> Iterator[tuple[str, int]]:
    """Yield (name, line) of every `module.name` that is used and of `from module import name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == module:
                yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == module:
            yield from ((alias.name, node.lineno) for alias in node.names)


def declared(tree: ast.Module) -> Iterator[str]:
    """Yield the names of functions, classes and values, members included."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Assign(targets=targets):
                yield from (one.id for one in targets if isinstance(one, ast.Name))


@pytest.mark.parametrize("path", ALL_PYTHON, ids=name_of)
def test_files_and_functions_fit_on_a_page(path: Path) -> None:
    name = name_of(path)
    lines = len(path.read_text().splitlines())
    allowed = FILE_LINES_MAX if path in SOURCES else TEST_LINES_MAX
    assert lines <= LONGER.get(name, allowed), f"{name} has {lines} lines"
    long = [
        f"{node.name} ({code_lines(node)} lines)"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and code_lines(node) > FUNCTION_LINES_MAX
    ]
    assert not long, f"{name}: {long}"


def test_floors_stay_small_enough_to_know_by_heart() -> None:
    for floor in (path for path in (ROOT / "ckptd").iterdir() if path.is_dir()):
        modules = [path.stem for path in floor.glob("*.py") if path.stem != "__init__"]
        assert len(modules) <= MODULES_PER_FLOOR_MAX, f"{floor.name}: {modules}"


def test_packages_are_floors_and_their_init_is_empty() -> None:
    public = {"ckptd/sdk/__init__.py"}  # what authors import; each name loaded when it is used
    for path in SOURCES:
        if path.name == "__init__.py" and name_of(path) not in public:
            assert not path.read_text(), f"{name_of(path)} is not empty"


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert not [name_of(path) for path in ALL_PYTHON if path.stem in BANNED_NAMES]


def test_syncs_are_made_in_one_place() -> None:
    for path in SOURCES:
        name = name_of(path)
        if name.startswith("ckpt") and name not in MAY_SYNC:
            found = [line for call, line in calls(tree_of(path), "os") if call in SYNCS]
            assert not found, f"{name}:{found} syncs; storage/disk.py does that"


def test_time_is_read_in_one_place() -> None:
    floors = ("daemon", "door", "host", "core")
    for path in (path for floor in floors for path in (ROOT / "ckptd" / floor).glob("*.py")):
        if path.name == "clock.py":
            continue
        tree = tree_of(path)
        found = [
            line
            for module in ("time", "datetime")
            for call, line in calls(tree, module)
            if call in CLOCKS
        ]
        assert not found, f"{name_of(path)}:{found} reads a clock; host/clock.py does that"


def test_tests_wait_for_conditions_and_never_sleep() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        found = [line for call, line in calls(tree_of(path), "time") if call == "sleep"]
        assert not found, f"{name_of(path)}:{found}: wait with tests/waiting.py instead"


def test_tests_use_no_mocks() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        imported = [
            alias.name
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        ]
        assert "mock" not in imported, name_of(path)


def test_no_text_names_the_machine_it_was_written_on() -> None:
    machine = re.compile(r"/(root|work|Users)/[\w.]")
    for path in TEXTS:
        if path.is_file() and path != Path(__file__):
            found = machine.search(path.read_text(errors="replace"))
            assert not found, f"{name_of(path)} mentions {found and found.group()}"


def test_every_file_that_the_architecture_names_exists() -> None:
    document = ROOT / "ARCHITECTURE.md"
    if not document.exists():
        pytest.skip("ARCHITECTURE.md is not written yet")
    text = document.read_text()
    assert len(text.splitlines()) <= 250
    named = re.findall(r"\b((?:ckptd|ckptctl|tests|examples|etc|systemd|bench)/[\w./-]*\w)", text)
    missing = [name for name in sorted(set(named)) if not (ROOT / name).exists()]
    assert not missing
    for file, function in re.findall(r"`((?:\w+/)+\w+\.py)(?::(\w+))?`", text):
        (path,) = (p for p in (ROOT / file, ROOT / "ckptd" / file) if p.exists())
        assert re.search(rf"\b(def|class) {function}", path.read_text()), f"{file}: {function}"


def test_nothing_is_declared_that_nobody_uses() -> None:
    by_name = re.compile(r"_|__\w+__|\w+_options")  # cli.py finds a verb's options by its name
    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    words = Counter(re.findall(r"\w+", " ".join([path.read_text() for path in SOURCES] + pages)))
    unused = [
        f"{name_of(path)}:{name}"
        for path in SOURCES
        for name in declared(tree_of(path))
        if words[name] == 1 and not by_name.fullmatch(name)
    ]
    assert not unused


def test_every_module_says_what_it_is_for() -> None:
    bare = [p for p in SOURCES if p.name != "__init__.py" and not ast.get_docstring(tree_of(p))]
    assert not [name_of(path) for path in bare]


def test_the_rooms_of_the_architecture_are_the_modules_of_each_floor() -> None:
    table = (
        (ROOT / "ARCHITECTURE.md").read_text().partition("## The floors")[2].partition("\n## ")[0]
    )
    rooms: dict[str, set[str]] = {}
    floor = ""
    for first, second in re.findall(r"^\| (.*?)\| (.*?) \|", table, re.MULTILINE):
        if named := re.match(r"\d `(\w+)/`|(?:beside )?$", first):
            floor = f"ckptd/{named[1]}" if named[1] else floor
        if beside := re.match(r"`([\w/]+)/`:", second):
            floor = beside[1]
        rooms.setdefault(floor, set()).update(re.findall(r"`(\w+)`", second))
    for floor, named_here in rooms.items():
        if floor:
            there = {path.stem for path in (ROOT / floor).glob("[!_]*.py")}
            assert named_here == there, floor
    floors = {
        name_of(path) for path in (ROOT / "ckptd").iterdir() if (path / "__init__.py").exists()
    }
    assert floors <= set(rooms)
