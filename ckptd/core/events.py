"""From log records to the events that clients follow; the wire form ages on its own.

Internal records (answers, environments) are not events. The LSN is the consumer's offset: an event
that no page could carry would stop every consumer there for ever, so a long one is shortened.
"""

from itertools import islice
from typing import Any

import msgspec
from msgspec.structs import replace

from ckptd.core.policy import Caller
from ckptd.core.records import Answered, AnyRecord, EnvStored, Phase, Spec
from ckptd.core.state import State
from ckptd.protocol.messages import Event

_HIDDEN = (Answered, EnvStored)
_COMMON = ("task", "attempt", "at_ns")
EVENT_BYTES_MAX = 1 << 20  # of one event on the wire
_TEXT_CHARS = 256  # what is left of each text of a longer one, and
_ITEMS = 100  # of each list and table: all in all below EVENT_BYTES_MAX
_specs = msgspec.msgpack.Decoder(Spec)


def event(lsn: int, record: AnyRecord) -> Event | None:
    """Return the event of a record, None for an internal one."""
    if isinstance(record, _HIDDEN):
        return None
    fields: dict[str, Any] = {
        name: _plain(getattr(record, name))
        for name in record.__struct_fields__
        if name not in _COMMON
    }
    fields.pop("env", None)
    return Event(
        lsn=lsn,
        type=_word(type(record).__name__),
        at_ns=getattr(record, "at_ns", 0),
        task=getattr(record, "task", 0),
        attempt=getattr(record, "attempt", 0),
        fields=fields,
    )


def fitted(found: Event) -> tuple[Event, int]:
    """Return the event as it fits into a page, shortened where it must be, and its bytes there."""
    size = len(msgspec.json.encode(found))
    if size <= EVENT_BYTES_MAX:
        return found, size
    found = replace(found, fields={**_shortened(found.fields), "shortened": True})
    return found, len(msgspec.json.encode(found))


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= _TEXT_CHARS else value[:_TEXT_CHARS] + "..."
    if isinstance(value, dict):
        return {_shortened(k): _shortened(v) for k, v in islice(value.items(), _ITEMS)}
    if isinstance(value, list | tuple):
        return [_shortened(item) for item in value[:_ITEMS]]
    return value


def may_follow(state: State, found: Event, caller: Caller) -> bool:
    """Tell whether the caller may see an event: its own tasks', or with a role for it all."""
    if caller.admin or caller.reads:
        return True
    task = state.tasks.get(found.task)
    return task is not None and task.uid == caller.uid


def _plain(value: Any) -> Any:
    if isinstance(value, Phase):
        return value.word
    if isinstance(value, msgspec.Raw):
        spec = msgspec.to_builtins(_specs.decode(value))
        return {name: spec[name] for name in spec if name not in ("env", "digest")}
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _word(name: str) -> str:
    """Return `start_intent` for `StartIntent`."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
