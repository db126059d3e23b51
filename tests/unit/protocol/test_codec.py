"""Bytes and messages: what is said comes back, what is garbled is refused, nothing crashes."""

import json
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.protocol import codec, limits
from ckptd.protocol.errors import (
    BadRequest,
    DiskFull,
    ProtocolMismatch,
    all_errors,
)
from ckptd.protocol.ids import attempt_name, parse_attempt_name
from ckptd.protocol.messages import VERBS, Pong, Submit, Submitted, TaskSpec

REQUEST = codec.encode_request("a", "submit", Submit((TaskSpec(("true",), key="k"),)))


def test_a_request_comes_back_as_it_was_said() -> None:
    request = codec.decode_request(REQUEST)
    assert (request.v, request.id, request.verb) == (1, "a", "submit")
    assert codec.decode_args(request) == Submit((TaskSpec(("true",), key="k"),))


def test_a_reply_carries_the_very_bytes_that_the_log_keeps() -> None:
    answer = codec.encode_answer(Submitted((7,), (True,)))
    reply = codec.decode_reply(codec.encode_reply("a", answer))
    assert bytes(reply.result) == answer
    assert codec.decode_result(reply, Submitted) == Submitted((7,), (True,))


def test_an_error_carries_code_hint_and_whether_to_try_again() -> None:
    reply = codec.decode_reply(codec.encode_error("a", DiskFull("no room", "free some")))
    assert not reply.ok
    assert reply.error == DiskFull("no room", "free some").reply()
    assert (reply.error.code, reply.error.exit_code, reply.error.retryable) == (
        "disk_full",
        2,
        True,
    )


@given(st.binary(max_size=400))
def test_any_bytes_are_a_request_or_a_clean_refusal(garbage: bytes) -> None:
    with suppress(BadRequest, ProtocolMismatch):
        codec.decode_args(codec.decode_request(garbage))


@given(st.integers(0, len(REQUEST) - 1), st.integers(0, 255))
def test_a_request_with_one_byte_changed_is_read_or_refused(place: int, value: int) -> None:
    changed = bytearray(REQUEST)
    changed[place] = value
    with suppress(BadRequest, ProtocolMismatch):
        codec.decode_args(codec.decode_request(bytes(changed)))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    ),
    st.sampled_from(sorted(VERBS)),
)
def test_any_json_as_arguments_of_any_verb_is_read_or_refused(value: object, verb: str) -> None:
    frame = json.dumps({"v": 1, "id": "a", "verb": verb, "args": value}).encode()
    with suppress(BadRequest, ProtocolMismatch):
        codec.decode_args(codec.decode_request(frame))


def test_nesting_without_end_is_refused() -> None:
    deep = b'{"v":1,"id":"a","verb":"ping","args":' + b"[" * 200_000
    with pytest.raises(BadRequest):
        codec.decode_request(deep)


def test_an_argument_with_a_typo_is_refused_and_an_unknown_field_of_a_result_is_not() -> None:
    request = codec.decode_request(b'{"v":1,"id":"a","verb":"status","args":{"limti":3}}')
    with pytest.raises(BadRequest, match="limti"):
        codec.decode_args(request)
    reply = codec.decode_reply(
        b'{"v":1,"id":"a","ok":true,"result":'
        b'{"version":"9","protocol":1,"pid":1,"uid":0,"epoch":1,"new":2}}'
    )
    assert codec.decode_result(reply, Pong).version == "9"


def test_another_version_is_told_apart_from_a_bad_request() -> None:
    with pytest.raises(ProtocolMismatch, match="speaks protocol 2"):
        codec.decode_request(REQUEST.replace(b'"v":1', b'"v":2'))
    with pytest.raises(ProtocolMismatch, match="speaks protocol 2"):
        codec.decode_reply(b'{"v":2,"id":"a","ok":true}')


def test_a_request_over_the_bound_is_refused_on_both_sides() -> None:
    many = Submit((TaskSpec(("true",), env={"A": "x" * limits.REQUEST_BYTES_MAX}),))
    with pytest.raises(BadRequest, match="over the bound"):
        codec.encode_request("a", "submit", many)
    with pytest.raises(BadRequest, match="is over"):
        codec.decode_request(b" " * (limits.REQUEST_BYTES_MAX + 1))


def test_bytes_that_are_no_text_are_refused_before_they_are_sent() -> None:
    odd = b"caf\xe9".decode(errors="surrogateescape")  # as sys.argv has it
    with pytest.raises(BadRequest, match=r"only UTF-8 can be handed over.*caf.xe9"):
        codec.encode_request("a", "submit", Submit((TaskSpec(("echo", odd)),)))


def test_every_error_has_a_code_of_its_own_and_a_retryable_one_is_transient() -> None:
    codes = [error.code for error in all_errors()]
    assert len(set(codes)) == len(codes)
    for error in all_errors():
        assert error.retryable == (error.exit_code in {2, 124}), error


def test_every_verb_has_a_decoder_and_a_result_that_ignores_what_is_new() -> None:
    for verb, (args, result, _) in VERBS.items():
        assert args.__struct_config__.forbid_unknown_fields, verb
        assert not result.__struct_config__.forbid_unknown_fields, verb
        msgspec.json.Decoder(args)


@given(st.integers(1, 2**47), st.integers(1, 10**6))
def test_the_name_of_an_attempt_comes_back(task: int, attempt: int) -> None:
    assert parse_attempt_name(attempt_name(task, attempt)) == (task, attempt)


@pytest.mark.parametrize("text", ["", ".", "7", "7.", ".2", "7.2.1", "-7.2", "\u0667.2", "7.x"])
def test_what_is_no_name_of_an_attempt_is_none(text: str) -> None:
    assert parse_attempt_name(text) is None
