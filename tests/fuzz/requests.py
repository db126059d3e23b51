"""Targets of the socket's other side: replies, and whole conversations of requests.

Oracle of a conversation: each line is refused by one of our errors, or it changes State exactly
as a replay of its records does, and planning comes to rest.
"""

import contextlib

import msgspec

from ckptd.core import image, query
from ckptd.core.apply import apply
from ckptd.core.policy import Caller
from ckptd.core.state import State
from ckptd.daemon.engine import decode
from ckptd.protocol import codec
from ckptd.protocol import messages as m
from ckptd.protocol.errors import CkptdError
from tests.fuzz.target import DEEP, LIGHT, Target
from tests.unit.core.world import ME, ROOT, World

_encoder = msgspec.msgpack.Encoder()
LINES_MAX = 50


def run_requests(data: bytes) -> None:
    """Take in one request a line; every second one by root."""
    world = World(finished_max=3)
    for number, line in enumerate(data.split(b"\n")[:LINES_MAX]):
        with contextlib.suppress(CkptdError):
            _ask(world, codec.decode_request(line), (ME, ROOT)[number % 2])
    again = State()
    for lsn, record in enumerate(decode(_encoder.encode(world.log)), 1):
        apply(again, lsn, record)
    assert list(image.chunks(again)) == list(image.chunks(world.state)), "live and replay agree"


def _ask(world: World, request: m.Request, caller: Caller) -> None:
    args = codec.decode_args(request)
    is_change = m.VERBS[request.verb][2]
    if is_change:
        answer = world.ask(args, caller)
    else:
        found = _query(world, args, caller)
        if found is None:
            return
        answer = found
    told = codec.encode_answer(answer)
    reply = codec.decode_reply(codec.encode_reply(request.id, told))
    again = codec.decode_result(reply, type(answer))
    assert codec.encode_answer(again) == told, "an answer survives its way to the client"


def _query(world: World, args: m.Message, caller: Caller) -> m.Answer | None:
    view = query.View(world.state, world.observed, caller, world.now, world.policy)
    match args:
        case m.Status():
            return query.status(view, args)
        case m.Show():
            return query.show(view, args, "/state")
        case m.Wait():
            return query.waited(view, args)
        case _:
            return None


def request_seeds() -> list[bytes]:
    """Return conversations that reach every verb."""
    submit = b'{"v":1,"id":"a","verb":"submit","args":{"tasks":[{"argv":["true"]%s}]}}'
    lines = [
        submit % b"",
        submit % b',"key":"k","labels":{"a":"b"},"after":[{"task":1}]',
        submit % b',"hold":true,"timeout_s":1.5,"retries":3,"on_exit":{"3":"retry"},"cpus":0.5',
    ]
    plain = b'{"v":1,"id":"b","verb":"%s","args":{"select":{"ids":[1]}}}'
    verbs = [verb for verb in sorted(m.VERBS) if verb not in {"submit", "group_set"}]
    lines += [plain % verb.encode() for verb in verbs]
    lines += [
        b'{"v":1,"id":"c","verb":"signal","args":{"select":{"all":true},"signal":10}}',
        b'{"v":1,"id":"d","verb":"group_set","args":{"name":"g","parallel":2}}',
        b'{"v":1,"id":"e","verb":"group_remove","args":{"name":"g"}}',
        b'{"v":1,"id":"f","verb":"edit","args":{"select":{"ids":[1]},"priority":5}}',
        b'{"v":1,"id":"g","verb":"status","args":{"select":{"names":["t*"]},"limit":5}}',
    ]
    return [b"\n".join(lines), *(b"\n".join([lines[0], line]) for line in lines[3:])]


def run_reply(data: bytes) -> None:
    """Read what a foreign daemon might answer; every result type of it."""
    with contextlib.suppress(CkptdError):
        reply = codec.decode_reply(data)
        for _, kind, _ in m.VERBS.values():
            with contextlib.suppress(CkptdError):
                answer = codec.decode_result(reply, kind)
                codec.encode_answer(answer)


def reply_seeds() -> list[bytes]:
    """Return replies, good and refused."""
    answers = (m.Submitted((1,), (True,)), m.TaskPage((), {"queued": 1}, 0))
    good = [codec.encode_reply("a", codec.encode_answer(one)) for one in answers]
    return [*good, codec.encode_error("b", CkptdError("no", "try again"))]


TARGETS = (
    Target("requests", run_requests, request_seeds, weight=DEEP),
    Target("reply", run_reply, reply_seeds, weight=LIGHT),
)
