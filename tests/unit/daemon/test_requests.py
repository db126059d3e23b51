"""What the desk answers to a request that comes twice, and on a full disk."""

import io
import threading
from collections.abc import Collection
from typing import Any

import msgspec
import pytest

from ckptd.core import image
from ckptd.core.policy import Now, Policy
from ckptd.core.port import EndSeen, Identity
from ckptd.core.records import Started, StartIntent
from ckptd.core.state import State
from ckptd.daemon.engine import Engine
from ckptd.daemon.files import Files
from ckptd.daemon.requests import LATE_MAX, Requests
from ckptd.door.access import Roles
from ckptd.door.server import Incoming
from ckptd.door.zap import Access, Peer
from ckptd.host.journal import Journal, StreamSink
from ckptd.protocol import codec
from ckptd.protocol import messages as m
from ckptd.storage import rebuild
from ckptd.storage.segment import BLOCK_BYTES
from ckptd.storage.store import Store
from tests.fakes.memory_disk import MemoryDisk

ONE = m.Selector(ids=(1,))
SHIM = Identity("b", 1, 1)


class Desk:
    """Requests over a log in memory; there is no daemon behind it, and none is asked for."""

    OWN_UID = 1_000
    at_ns = 10**18

    def __init__(
        self,
        state: State | None = None,
        disk: MemoryDisk | None = None,
        door: type[Access] = Access,
    ) -> None:
        self.disk = disk or MemoryDisk()
        store = Store.open("/state", self.disk, segment_bytes=8 << 20, has_threads=False)
        found = store.recover()
        wal = store.arm(found, epoch=found.epoch + 1, boot_id="b", at_ns=1)
        self.engine = Engine(state or State(), wal, Policy())
        journal = Journal(StreamSink(io.StringIO(), prefixed=True))
        roles = Roles(self.OWN_UID, door(self.OWN_UID, ""))
        self.requests = Requests(self.engine, self, Files("/state"), journal, roles)

    def ask(self, request_id: str, verb: str, args: m.Message, uid: int = 0) -> Any:
        """Return the answer to one request, committed."""
        reply = self.reply(request_id, verb, args, uid)
        assert reply.ok, reply
        return msgspec.json.decode(reply.result)

    def reply(self, request_id: str, verb: str, args: m.Message, uid: int = 0) -> m.Reply:
        incoming = Incoming(Peer(uid, uid, 1), b"c", False, request_id, verb, args, 1)
        self.requests.take(incoming, Now(self.at_ns), 1)
        self.engine.commit()
        return codec.decode_reply(self.requests.outbox.pop()[1])

    def run(self, task: int) -> None:
        """Let a task be started, as if there were a loop and a runner."""
        self.engine.stage([StartIntent(task, 1, 1), Started(task, 1, 1, SHIM, 2, 0, "")])
        self.engine.commit()

    def fill_disk(self) -> None:
        """Submit until nothing is taken any more."""
        self.disk.capacity -= self.disk.free_bytes("/state")
        for length in (100_000, 5_000, 100, 1):
            big = m.Submit((m.TaskSpec(("x" * length,), hold=True),))
            ids = (f"{length}-{number}" for number in range(10_000))
            assert any(not self.reply(one, "submit", big).ok for one in ids)


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


def test_a_copy_of_a_submit_is_answered_alike_though_its_start_is_long_past() -> None:
    desk = Desk()
    submit = m.Submit((m.TaskSpec(("true",), at_ns=desk.at_ns),))
    first = desk.ask("a", "submit", submit)
    desk.at_ns += 100_000 * 10**9
    assert desk.ask("a", "submit", submit) == first
    assert not desk.reply("b", "submit", submit).ok


def test_an_operator_can_steer_on_a_full_disk_whether_or_not_it_changes_anything() -> None:
    desk = Desk()
    desk.ask("s", "submit", m.Submit((m.TaskSpec(("true",)),) * 3))
    desk.run(1)
    desk.fill_disk()
    steps: list[tuple[str, m.Message]] = [
        ("group_set", m.GroupSet("default", paused=True)),
        ("hold", m.Hold(m.Selector(ids=(2,)))),
        ("pause", m.Pause(ONE)),
        ("resume", m.Resume(ONE)),
        ("signal", m.Signal(ONE, signal=10)),
        ("cancel", m.Cancel(ONE)),
        ("kill", m.Kill(ONE)),
        ("cancel", m.Cancel(m.Selector(ids=(3,)))),
        ("cancel", m.Cancel(m.Selector(ids=(3,)))),  # it has ended: nothing to change
        ("clean", m.Clean(m.Selector(ids=(3,)))),
    ]
    for number, (verb, args) in enumerate(steps):
        reply = desk.reply(f"step {number}", verb, args)
        assert reply.ok, (verb, reply)
        answer = msgspec.json.decode(reply.result)
        assert all(row["error"] is None for row in answer.get("tasks", ())), (verb, answer)


def test_steering_on_a_full_disk_without_end_leaves_room_for_the_ends_of_tasks() -> None:
    desk = Desk()
    desk.ask("s", "submit", m.Submit((m.TaskSpec(("true",)),)))
    desk.run(1)
    desk.fill_disk()
    replies = (desk.reply(f"p{n}", "signal", m.Signal(ONE, signal=10)) for n in range(100_000))
    refused = next(reply for reply in replies if not reply.ok)
    assert refused.error is not None
    assert (refused.error.code, refused.error.retryable) == ("disk_full", True)
    now = Now(10**18)
    desk.engine.see(EndSeen(1, 1, "exit", 7, text="x" * 1_000), now)
    desk.engine.commit()
    task = desk.engine.state.tasks.get(1)
    assert task is not None
    assert task.phase.word == "failed"


def test_damage_in_the_log_is_told_to_whoever_reads_events_and_all_else_goes_on() -> None:
    desk = Desk()
    for name in "ab":
        desk.ask(name, "submit", m.Submit((m.TaskSpec(("true",)),)))
    wal_dir = "/state/wal"
    (name,) = (name for name in desk.disk.names(wal_dir) if name.endswith(".wal"))
    desk.disk.inode(f"{wal_dir}/{name}").data[BLOCK_BYTES + 60] ^= 4
    refused = desk.reply("c", "events", m.Events(0)).error
    assert refused is not None
    assert (refused.code, refused.exit_code, refused.retryable) == ("corrupt", 65, False)
    assert "a restart needs this segment" in refused.hint
    assert desk.reply("d", "submit", m.Submit((m.TaskSpec(("true",)),))).ok


def test_events_go_on_behind_what_a_salvage_could_not_save() -> None:
    desk = Desk()
    for name in "abc":
        desk.ask(name, "submit", m.Submit((m.TaskSpec(("true",)),)))
    wal_dir = "/state/wal"
    (name,) = (name for name in desk.disk.names(wal_dir) if name.endswith(".wal"))
    desk.disk.inode(f"{wal_dir}/{name}").data[BLOCK_BYTES + 60] ^= 4
    desk.disk.locked.clear()
    lost = rebuild.salvage(Store.open("/state", desk.disk, has_threads=False).place, 5).lost
    desk.disk.locked.clear()
    again = Desk(disk=desk.disk)
    page = again.ask("d", "events", m.Events(0))
    assert lost[0][0] == 1
    assert [told["task"] for told in page["events"]] == [2, 3]
    assert page["next"] == again.engine.wal.durable_lsn
    one = again.ask("e", "events", m.Events(0, limit=1))
    assert [told["task"] for told in one["events"]] == [2]


def test_status_names_what_a_task_could_not_be_started_for() -> None:
    desk = Desk()
    desk.ask("a", "submit", m.Submit((m.TaskSpec(argv=("mkae",)),)))
    desk.run(1)
    text = "cannot execute mkae: No such file or directory"
    seen = EndSeen(1, 1, "spawn_error", 2, text=text)
    desk.engine.see(seen, Now(10**18))
    (row,) = desk.ask("b", "status", m.Status(m.Selector(all=True)))["tasks"]
    assert row["text"] == text


def test_a_daemon_that_is_stopping_takes_no_new_work_and_still_lets_its_tasks_be_steered() -> None:
    desk = Desk()
    desk.ask("a", "submit", m.Submit((m.TaskSpec(("true",), hold=True),)))
    desk.engine.draining = True
    refused = desk.reply("b", "submit", m.Submit((m.TaskSpec(("true",)),)))
    assert refused.error is not None
    assert (refused.error.code, refused.error.retryable) == ("shutting_down", True)
    assert desk.engine.state.next_id == 2
    assert desk.ask("c", "cancel", m.Cancel(ONE))["tasks"][0]["phase"] == "cancelled"


def test_a_bug_behind_one_verb_is_told_to_who_asked_and_ends_nothing() -> None:
    desk = Desk()  # it has no counters
    failed = desk.reply("a", "stats", m.Empty())
    assert failed.error is not None
    assert (failed.error.code, failed.error.exit_code) == ("internal", 70)
    assert desk.ask("b", "submit", m.Submit((m.TaskSpec(("true",)),)))["ids"] == [1]


def test_files_that_nobody_can_make_sense_of_are_told_to_who_asked_and_end_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hostile(*_: object, **__: object) -> m.CheckpointList:
        raise RecursionError("nested too deep")

    monkeypatch.setattr(Files, "checkpoints", hostile)
    desk, is_read = Desk(), threading.Event()
    desk.requests.on_late = is_read.set
    desk.ask("a", "submit", m.Submit((m.TaskSpec(("true",)),)))
    asked = Incoming(Peer(0, 0, 1), b"c", False, "b", "checkpoints", m.Checkpoints(1), 1)
    desk.requests.take(asked, Now(10**18), 1)
    assert is_read.wait(10.0)
    desk.requests.revisit((), Now(10**18), 1, grown=False)
    ((_, frame),) = desk.requests.outbox
    error = codec.decode_reply(frame).error
    assert error is not None
    assert "nested too deep" in error.message


def test_no_more_wait_for_files_to_be_read_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    goes_on = threading.Event()

    def slow(*_: object, **__: object) -> m.CheckpointList:
        assert goes_on.wait(10.0)
        return m.CheckpointList(())

    monkeypatch.setattr(Files, "checkpoints", slow)
    desk = Desk()
    desk.ask("a", "submit", m.Submit((m.TaskSpec(("true",)),)))
    for number in range(LATE_MAX + 1):
        asked = Incoming(
            Peer(0, 0, 1), b"c", False, f"{number}", "checkpoints", m.Checkpoints(1), 1
        )
        desk.requests.take(asked, Now(10**18), 1)
    goes_on.set()
    ((refused, frame),) = desk.requests.outbox
    error = codec.decode_reply(frame).error
    assert error is not None
    assert (refused.request_id, error.code, error.retryable) == (f"{LATE_MAX}", "busy", True)


MINE, THEIRS = 1_001, 1_002


class OpenDoor(Access):
    """Lets everybody in."""

    def permits(self, peer: Peer, groups: Collection[int] = ()) -> bool:
        return True


def with_a_task_of_another() -> Desk:
    desk = Desk(door=OpenDoor)
    desk.ask("a", "submit", m.Submit((m.TaskSpec(("true",), hold=True),)), uid=THEIRS)
    return desk


def test_nobody_follows_what_becomes_of_another_users_tasks() -> None:
    desk = with_a_task_of_another()
    assert desk.ask("b", "events", m.Events(0), uid=MINE)["events"] == []
    assert len(desk.ask("c", "events", m.Events(0), uid=THEIRS)["events"]) == 1


@pytest.mark.parametrize(
    ("verb", "args"), [("output", m.Output(1)), ("checkpoints", m.Checkpoints(1))]
)
def test_nobody_reads_what_another_users_task_says_and_saves(verb: str, args: m.Message) -> None:
    error = with_a_task_of_another().reply("b", verb, args, uid=MINE).error
    assert error is not None
    assert (error.code, error.exit_code) == ("denied", 77)


def test_how_busy_others_are_is_theirs_to_know() -> None:
    desk = with_a_task_of_another()
    desk.counters = dict  # type: ignore[attr-defined]
    mine, theirs = (desk.ask("b", "stats", m.Empty(), uid=uid) for uid in (MINE, THEIRS))
    assert (mine["totals"], mine["groups"]) == ({}, {})
    assert (theirs["totals"], theirs["groups"]) == ({"held": 1}, {})


def test_who_asks_how_the_daemon_is_hears_nothing_of_others_tasks_either() -> None:
    desk = with_a_task_of_another()
    everything = m.DaemonStatus(
        "1", 1, 0, 1, "b", 1, "/state", 1, 1, "ok", "fork", "", {"held": 1}, {}, {}
    )
    desk.daemon_status = lambda: everything  # type: ignore[attr-defined]
    mine, theirs = (desk.ask("b", "daemon", m.Empty(), uid=uid) for uid in (MINE, THEIRS))
    assert (mine["totals"], theirs["totals"]) == ({}, {"held": 1})
