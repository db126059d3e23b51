"""Members of JSON by path: what differs between two, and one of them changed.

    state.part: 6 -> 7        files.model.bin: 9f86... -> 2c26...        state.rows.3: added 12

A path is names and list positions with dots between; a name that has dots itself is found, too.
Pure, no I/O. Stdlib only. Read next: `checkpoint.py`.
"""

import difflib
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

CHANGES_MAX: Final = 10_000
_ABSENT: Final = object()
_PATH_CHARS_MAX: Final = 1_024


class BadPath(Exception):
    """A path leads nowhere; the second argument says what was meant perhaps."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text, hint)
        self.text = text
        self.hint = hint


class Change(NamedTuple):
    """One member that differs; `kind` is added, removed or changed."""

    path: str
    kind: str
    before: Any = None
    after: Any = None

    def as_json(self) -> dict[str, Any]:
        """Return only what there is: nothing was before what was added."""
        found: dict[str, Any] = {"path": self.path, "kind": self.kind}
        if self.kind != "added":
            found["before"] = self.before
        return found if self.kind == "removed" else {**found, "after": self.after}


def changes(before: Any, after: Any, path: str = "") -> Iterator[Change]:
    """Yield what differs, member by member, in the order of names.

    Bound: as deep as `parse_json` lets values be; the caller stops at CHANGES_MAX.
    """
    if before is _ABSENT:
        yield Change(path, "added", after=after)
    elif after is _ABSENT:
        yield Change(path, "removed", before)
    elif isinstance(before, dict) and isinstance(after, dict):
        for name in sorted({*before, *after}):
            one, other = before.get(name, _ABSENT), after.get(name, _ABSENT)
            yield from changes(one, other, _joined(path, name))
    elif isinstance(before, list) and isinstance(after, list):
        for place in range(max(len(before), len(after))):
            one = before[place] if place < len(before) else _ABSENT
            other = after[place] if place < len(after) else _ABSENT
            yield from changes(one, other, _joined(path, str(place)))
    elif before != after or isinstance(before, bool) is not isinstance(after, bool):
        yield Change(path, "changed", before, after)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def assigned(root: dict[str, Any], path: str, value: Any, *, is_forced: bool = False) -> None:
    """Set the member at a path, in place; its parent must be there.

    Raises:
        BadPath: there is no such parent; or no such member, but one that looks like a typing
            error of it, unless `is_forced`.
    """
    parent, name = _place(root, path)
    if isinstance(parent, list):
        parent[_index(parent, name, path)] = value
        return
    near = difflib.get_close_matches(name, map(str, parent), 1, 0.75)
    if name not in parent and near and not is_forced:
        meant = path.removesuffix(name) + near[0]
        raise BadPath(f"there is no {path}", f"did you mean {meant}? to add it: --force")
    parent[name] = value


def removed(root: dict[str, Any], path: str) -> None:
    """Remove the member at a path, in place.

    Raises:
        BadPath: there is none.
    """
    parent, name = _place(root, path)
    if isinstance(parent, list):
        del parent[_index(parent, name, path)]
    elif name in parent:
        del parent[name]
    else:
        raise BadPath(f"there is no {path}", _known(parent, path.removesuffix(name)))


def _place(root: dict[str, Any], path: str) -> tuple[Any, str]:
    """Return the container that the last name of a path is in, and that name.

    Bound: every turn takes at least one name off the path.
    """
    at: Any = root
    rest = path.split(".") if path and len(path) <= _PATH_CHARS_MAX else []
    if not all(rest) or not rest:
        raise BadPath(f"not a path: {path[:80]!r}", "names with dots between: state.part")
    done = ""
    while True:
        taken = _taken(at, rest)
        name, rest = ".".join(rest[:taken]), rest[taken:]
        if not rest:
            return at, name
        if isinstance(at, list):
            inner = at[_index(at, name, _joined(done, name))]
        elif name in at:
            inner = at[name]
        else:
            raise BadPath(f"there is no {_joined(done, name)}", _known(at, done and f"{done}."))
        done = _joined(done, name)
        if inner is None and isinstance(at, dict):
            inner = at[name] = {}
        if not isinstance(inner, dict | list):
            raise BadPath(f"{done} is {_kind(inner)}: nothing is in it", f"set all of it: {done}=")
        at = inner


def _taken(at: Any, rest: list[str]) -> int:
    """Return how many parts make the next name: the longest that is there, else one."""
    if isinstance(at, dict):
        for count in range(len(rest), 1, -1):
            if ".".join(rest[:count]) in at:
                return count
    return 1


def _index(items: list[Any], name: str, path: str) -> int:
    if name.isascii() and name.isdigit() and len(name) < 10 and int(name) < len(items):
        return int(name)
    text = f"it has {len(items)} elements, the first is 0"
    raise BadPath(f"there is no {path}", text if items else "it is empty")


def _known(names: Any, prefix: str) -> str:
    known = [f"{prefix}{name}" for name in list(names)[:10]]
    return f"there are: {', '.join(known)}" if known else "there is nothing in it"


def _kind(value: Any) -> str:
    kinds = {str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
