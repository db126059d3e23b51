"""The bulk state of a task and its cursors: what the strategy saves, and what it looks like saved.

    "state": {"offset": 700}, "cursors": {"rows": 700}      members of MANIFEST.json

Whether there is anything new is found by comparing what would be written with what was: no
mutation, however deep, can be missed. Stdlib only, msgspec for a schema alone.
"""

import json
from typing import Any, Final

from ckptd.sdk.declare import Task
from ckptd.sdk.outcomes import CheckpointTooLarge, NotJson, StateVersionError
from ckptd.sdk.values import decode, encode

STATE_BYTES_MAX: Final = 1 << 20  # a manifest has 4 MiB, and facts and files in it, too


class State(dict[str, Any]):
    """A dict whose content is saved by the strategy. Keys are texts, values JSON or bytes."""

    def replace(self, other: dict[str, Any]) -> None:
        """Take another content as a whole."""
        kept = dict(other)
        self.clear()
        self.update(kept)


class Cursor:
    """A position that moves forward, saved by the strategy and whenever the task stops."""

    def __init__(self, cursors: dict[str, Any], name: str) -> None:
        self._cursors = cursors
        self.name = name

    @property
    def value(self) -> Any:
        """The position, a copy of it; after a resume that of the last save."""
        return decode(self._cursors[self.name])

    def set(self, value: Any) -> None:
        """Move to a position."""
        self._cursors[self.name] = encode(value, f"the cursor {self.name!r}")

    def advance(self, by: int = 1) -> None:
        """Move on by so many."""
        self._cursors[self.name] += by


def restored(task: Task, saved: Any, saved_version: int, *, is_there: bool) -> Any:
    """Return the state to begin with: an empty one, or what was saved, migrated and converted.

    Raises:
        StateVersionError: the code cannot read it; what is saved stays as it is.
    """
    if not is_there:
        return State() if task.state_schema is None else _new(task)
    value = decode(json.loads(json.dumps(saved)))  # a copy: a migration may change it in place
    if saved_version:
        value = task.migrated(value, saved_version)
    if task.state_schema is not None:
        return _converted(value, task)
    if value is None:
        return State()
    if not isinstance(value, dict):
        raise StateVersionError(
            f"the saved state of {task.name} is a {type(value).__name__}, not an object: it was "
            "not saved by this function; start over with --fresh"
        )
    return State(value)


def _new(task: Task) -> Any:
    schema = task.state_schema
    assert schema is not None
    try:
        return schema()
    except TypeError as error:
        raise StateVersionError(
            f"{schema.__name__} cannot be made without arguments ({error}): give each field of a "
            "state schema a default"
        ) from error


def _converted(value: Any, task: Task) -> Any:
    import msgspec  # noqa: PLC0415  (only tasks with a schema need it)

    assert task.state_schema is not None
    try:
        return msgspec.convert(value, task.state_schema, str_keys=True)
    except msgspec.ValidationError as error:
        raise StateVersionError(
            f"the saved state of {task.name} does not fit {task.state_schema.__name__}: {error}; "
            "raise the version and add a migration"
        ) from error


def packed(state: Any, *, has_schema: bool) -> Any:
    """Return what goes into the manifest.

    Raises:
        NotJson: something in it cannot be stored. CheckpointTooLarge: more than 1 MiB.
    """
    if has_schema:
        import msgspec  # noqa: PLC0415

        state = msgspec.to_builtins(state, builtin_types=(bytes, bytearray), str_keys=True)
    try:
        made = encode(state, "the state")
    except RuntimeError as error:  # dictionary changed size during iteration
        raise NotJson("the state was changed by another thread while it was saved") from error
    size = len(json.dumps(made))
    if size > STATE_BYTES_MAX:
        raise CheckpointTooLarge(
            f"the state takes {size} bytes, at most {STATE_BYTES_MAX} fit; write what is large to "
            "a file: ctx.file(NAME). The last checkpoint stands"
        )
    return made
