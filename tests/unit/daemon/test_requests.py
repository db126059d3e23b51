"""What the desk answers to a request that comes twice."""

import io

import msgspec

from ckptd.core import image
from ckptd.core.policy import Now, Policy
from ckptd.core.state import State
from ckptd.daemon.engine import Engine
from ckptd.daemon.files import Files
from ckptd.daemon.requests import Requests
from ckptd.door.access import Roles
from ckptd.door.server import Incoming
from ckptd.door.zap import Access, Peer
from ckptd.host.journal import Journal, StreamSink
from ckptd.protocol import codec
from ckptd.protocol import messages as m
from ckptd.storage.store import Store
from tests.fakes.memory_disk import MemoryDisk

ONE = m.Selector(ids=(1,))


class Desk:
    """Requests over a log in memory; there is no daemon behind it, and none is asked for."""

    OWN_UID = 1_000

    def __init__(self, state: State | None = None) -> None:
        store = Store.open("/state", MemoryDisk(), segment_bytes=8 << 20, has_threads=False)
        wal = store.arm(store.recover(), epoch=1, boot_id="b", at_ns=1)
        self.engine = Engine(state or State(), wal, Policy())
        journal = Journal(StreamSink(io.StringIO(), prefixed=True))
        roles = Roles(self.OWN_UID, Access(self.OWN_UID, ""))
        self.requests = Requests(self.engine, self, Files("/state"), journal, roles)

    def ask(self, request_id: str, verb: str, args: m.Message, uid: int = 0) -> object:
        """Return the answer to one request, committed."""
        incoming = Incoming(Peer(uid, uid, 1), b"c", False, request_id, verb, args, 1)
        self.requests.take(incoming, Now(10**18), 1)
        self.engine.commit()
        reply = codec.decode_reply(self.requests.outbox.pop()[1])
        assert reply.ok, reply
        return msgspec.json.decode(reply.result)


def test_a_copy_of_a_retry_that_changed_nothing_starts_nothing_that_was_cancelled_since() -> None:
    desk = Desk()
    desk.ask("a", "submit", m.Submit((m.TaskSpec(("true",)),)))
    desk.ask("b", "hold", m.Hold(ONE))
    first = desk.ask("c", "retry", m.Retry(ONE))  # refused for this task: it has not ended
    desk.ask("d", "cancel", m.Cancel(ONE))
    assert desk.ask("c", "retry", m.Retry(ONE)) == first
    task = desk.engine.state.tasks.get(1)
    assert task is not None
    assert task.phase.word == "cancelled"


def test_a_copy_of_a_submit_whose_key_was_known_submits_nothing_after_a_clean() -> None:
    desk = Desk()
    keyed = m.Submit((m.TaskSpec(("true",), key="one"),))
    desk.ask("a", "submit", keyed)
    known = desk.ask("b", "submit", keyed)
    desk.ask("c", "cancel", m.Cancel(ONE))
    desk.ask("d", "clean", m.Clean(ONE))
    assert desk.ask("b", "submit", keyed) == known
    assert len(desk.engine.state.tasks) == 0


def test_what_a_dry_run_tells_is_not_remembered() -> None:
    desk = Desk()
    desk.ask("a", "submit", m.Submit((m.TaskSpec(("true",)),)))
    lsn = desk.engine.state.lsn
    desk.ask("b", "clean", m.Clean(m.Selector(all=True), dry_run=True))
    assert desk.engine.state.lsn == lsn


def test_nobody_gets_the_answer_to_another_users_request() -> None:
    desk = Desk()
    submit = m.Submit((m.TaskSpec(("true",)),))
    first = desk.ask("a", "submit", submit, uid=0)
    second = desk.ask("a", "submit", submit, uid=desk.OWN_UID)
    assert first != second
    assert desk.ask("a", "submit", submit, uid=0) == first


def test_a_copy_that_comes_after_a_snapshot_and_a_restart_gets_the_first_answer() -> None:
    desk = Desk()
    submit = m.Submit((m.TaskSpec(("true",)),))
    first = desk.ask("a", "submit", submit)
    state = image.load(list(desk.engine.image()))
    state.index()
    again = Desk(state)
    assert again.ask("a", "submit", submit) == first
    assert len(again.engine.state.tasks) == 1
