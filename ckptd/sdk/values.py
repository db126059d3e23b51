"""What can be stored: JSON, and bytes as {"$bytes": base64}. What comes back equals what went in.

    encode({"n": 1, "raw": b"ab"})  ->  {"n": 1, "raw": {"$bytes": "YWI="}}
    decode(encode(value)) == value, tuples aside: they come back as lists

Invariant: a step returns the same the first time and when it is remembered, so a value passes
through here before it is handed on. Never pickle: it breaks with the code, and it runs code.
Stdlib only.
"""

import base64
import math
from typing import Any, Final

from ckptd.sdk.outcomes import NotJson

_BYTES: Final = "$bytes"
_INT_BITS_MAX: Final = 14_000  # Python reads no more than 4,300 digits
_DEPTH_MAX: Final = 60  # what a journal keeps, less its own levels


def encode(value: Any, what: str) -> Any:
    """Return the value as plain JSON types; `what` names it in the error.

    Raises:
        NotJson: a type, key or number that JSON does not have, or nested too deeply.
    """
    return _encoded(value, what, 0)


def _encoded(value: Any, what: str, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of an Enum what will come back
    if depth > _DEPTH_MAX:
        raise NotJson(f"{what} is nested deeper than {_DEPTH_MAX}")
    match value:
        case int() if value.bit_length() <= _INT_BITS_MAX:
            return int(value)
        case int():
            raise NotJson(f"{what} holds a number of {value.bit_length()} bits; store it as text")
        case float():
            return _finite(value, what)
        case bytes() | bytearray():
            return {_BYTES: base64.b64encode(value).decode()}
        case list() | tuple():
            return [_encoded(one, what, depth + 1) for one in value]
        case dict():
            return {_key(key, what): _encoded(one, what, depth + 1) for key, one in value.items()}
        case _:
            raise NotJson(
                f"{what} holds a {type(value).__name__} ({str(value)[:60]!r}); it takes JSON values"
                " and bytes: convert it, or write it to a file"
            )


def _finite(value: float, what: str) -> float:
    if math.isfinite(value):
        return float(value)
    raise NotJson(f"{what} holds {value!r}, which JSON does not have")


def _key(key: Any, what: str) -> str:
    if isinstance(key, str) and key != _BYTES:
        return key
    raise NotJson(f"{what} has the key {key!r}: keys are texts (a number would come back as one)")


def decode(value: Any) -> Any:
    """Return what `encode` was given."""
    if isinstance(value, list):
        return [decode(one) for one in value]
    if isinstance(value, dict):
        if len(value) == 1 and isinstance(value.get(_BYTES), str):
            return base64.b64decode(value[_BYTES])
        return {key: decode(one) for key, one in value.items()}
    return value
