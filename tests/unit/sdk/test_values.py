"""What can be stored comes back as it was; what would not is refused, by name."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.sdk import NotJson
from ckptd.sdk.values import decode, encode

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.binary()
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text().filter(lambda k: k != "$bytes"), inner)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_a_value_comes_back_equal_through_json(value: Any) -> None:
    stored = json.loads(json.dumps(encode(value, "it")))
    assert decode(stored) == value


@given(VALUES)
def test_encoding_what_came_back_changes_nothing(value: Any) -> None:
    once = encode(value, "it")
    assert encode(decode(once), "it") == once


def test_tuples_come_back_as_lists_the_first_time_too() -> None:
    assert decode(encode({"pair": (1, (2,))}, "it")) == {"pair": [1, [2]]}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (object(), "holds a object"),
        ({1, 2}, "holds a set"),
        (1j, "holds a complex"),
        (float("nan"), "holds nan"),
        ([float("inf")], "holds inf"),
        ({1: "x"}, "has the key 1"),
        ({"$bytes": "x"}, r"has the key '\$bytes'"),
        (nested(70), "nested deeper"),
        pytest.param(1 << 20_000, "holds a number of 20001 bits", id="big"),
    ],
)
def test_what_json_does_not_have_is_refused(value: Any, told: str) -> None:
    with pytest.raises(NotJson, match=f"the result of 'x' {told}|is {told}"):
        encode(value, "the result of 'x'")


def test_a_value_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(NotJson, match="nested deeper"):
        encode(loop, "it")
