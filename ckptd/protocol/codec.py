"""Bytes <-> messages, bounded and strict; the answer to anything else is an error, never a crash.

A request is one JSON object in one ZeroMQ frame. Read next: `messages.py`, PROTOCOL.md.
"""

from typing import TypeVar

import msgspec

from ckptd.protocol import limits
from ckptd.protocol.errors import BadRequest, CkptdError, ProtocolMismatch
from ckptd.protocol.messages import VERBS, Answer, Message, Reply, Request

A = TypeVar("A", bound=Answer)

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for foreign bytes; a string that is not UTF-8 is not a DecodeError."""

_encoder = msgspec.json.Encoder()
_request = msgspec.json.Decoder(Request)
_reply = msgspec.json.Decoder(Reply)
_args = {verb: msgspec.json.Decoder(args) for verb, (args, _, _) in VERBS.items()}


def encode_request(request_id: str, verb: str, args: Message) -> bytes:
    """Return the frame of one request. Raises BadRequest where it is no text, or too long."""
    try:
        body = msgspec.Raw(_encoder.encode(args))
    except UnicodeEncodeError as bad:
        odd = bad.object[:40].encode(errors="surrogateescape")
        text = f"only UTF-8 can be handed over, which this is not: {odd!r}"
        raise BadRequest(text, "bytes like these can stand in a script") from bad
    frame = _encoder.encode(Request(limits.PROTOCOL_VERSION, request_id, verb, body))
    if len(frame) > limits.REQUEST_BYTES_MAX:
        raise BadRequest(
            f"request of {len(frame)} bytes is over the bound of {limits.REQUEST_BYTES_MAX}",
            "split it, or pass big input by file",
        )
    return frame


def decode_request(frame: bytes | memoryview) -> Request:
    """Return the envelope. Raises BadRequest, or ProtocolMismatch for another version."""
    if len(frame) > limits.REQUEST_BYTES_MAX:
        raise BadRequest(f"request of {len(frame)} bytes is over {limits.REQUEST_BYTES_MAX}")
    try:
        request = _request.decode(frame)
    except UNREADABLE as bad:
        raise BadRequest(f"not a request: {bad}", "see PROTOCOL.md") from bad
    if request.v != limits.PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"request speaks protocol {request.v}, this daemon {limits.PROTOCOL_VERSION}",
            "upgrade the older side",
        )
    return request


def decode_args(request: Request) -> Message:
    """Return the typed arguments. Raises BadRequest for an unknown verb or a bad value."""
    decoder = _args.get(request.verb)
    if decoder is None:
        raise BadRequest(f"unknown verb {request.verb!r}", f"known: {', '.join(sorted(VERBS))}")
    try:
        return decoder.decode(request.args)
    except UNREADABLE as bad:
        raise BadRequest(f"{request.verb}: {bad}") from bad


def encode_answer(answer: Answer) -> bytes:
    """Return the JSON of a result, as the log keeps it for a resend."""
    return _encoder.encode(answer)


def encode_reply(request_id: str, answer: bytes) -> bytes:
    """Return the frame that carries an encoded answer."""
    return _encoder.encode(Reply(limits.PROTOCOL_VERSION, request_id, True, msgspec.Raw(answer)))


def encode_error(request_id: str, error: CkptdError) -> bytes:
    """Return the frame that carries an error."""
    return _encoder.encode(Reply(limits.PROTOCOL_VERSION, request_id, False, error=error.reply()))


def decode_reply(frame: bytes) -> Reply:
    """Return the envelope back. Raises ProtocolMismatch where it is none of ours."""
    try:
        reply = _reply.decode(frame)
    except UNREADABLE as bad:
        raise ProtocolMismatch(f"the daemon's answer cannot be read: {bad}") from bad
    if reply.v != limits.PROTOCOL_VERSION:
        raise ProtocolMismatch(f"the daemon speaks protocol {reply.v}")
    return reply


def decode_result(reply: Reply, kind: type[A]) -> A:
    """Return the typed result of a reply that is ok. Raises ProtocolMismatch."""
    try:
        return msgspec.json.decode(reply.result, type=kind)
    except UNREADABLE as bad:
        raise ProtocolMismatch(f"the daemon's result cannot be read: {bad}") from bad
