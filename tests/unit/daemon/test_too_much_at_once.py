"""What no log frame, no reply and no log would take is refused; the daemon lives on.

Named after the damage: each of these once ended the daemon, or was told as what it is not.
"""

import msgspec
import pytest
from msgspec.structs import replace

from ckptd.core import image
from ckptd.core.decide import Case, decide
from ckptd.core.policy import Caller, Now, Policy
from ckptd.core.records import (
    AnyRecord,
    Edited,
    Ended,
    Marked,
    Phase,
    StartIntent,
    StopIntent,
    Verdict,
)
from ckptd.core.state import State
from ckptd.daemon.engine import Engine
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadRequest, Busy, DiskFull
from ckptd.storage.frame import PAYLOAD_BYTES_MAX
from ckptd.storage.snapshot import SnapshotDone
from ckptd.storage.store import Store
from tests.fakes.memory_disk import MemoryDisk
from tests.unit.daemon.test_requests import Desk

ALL = m.Selector(all=True)
ONE = m.Selector(ids=(1,))
ROOT = Caller(0, 0, admin=True)
MIB = 1 << 20


def new_engine(store: Store) -> Engine:
    wal = store.arm(store.recover(), epoch=1, boot_id="b", at_ns=1)
    return Engine(State(), wal, Policy())


def new_store() -> Store:
    return Store.open("/state", MemoryDisk(), has_threads=False)  # segments of the usual size


def admit(engine: Engine, command: m.Message) -> None:
    case = Case(engine.state, ROOT, Now(1), Policy())
    engine.admit(decide(case, command)[0], is_small=False)
    engine.commit()


def admit_in_one_turn(engine: Engine, commands: list[m.Submit]) -> None:
    for command in commands:
        case = Case(engine.state, ROOT, Now(1), Policy())
        engine.admit(decide(case, command)[0], is_small=False)


def words(size: int) -> tuple[str, ...]:
    """Return a command of about that many bytes."""
    return ("y" * 120_000,) * (size // 120_000)


def test_an_edit_that_makes_a_spec_larger_than_a_frame_is_refused_for_that_task() -> None:
    desk = Desk()
    labelled = m.TaskSpec(("true",), labels={"a": "x" * 3_500_000}, hold=True)
    desk.ask("a", "submit", m.Submit((labelled,)))
    reply = desk.reply("b", "edit", m.Edit(ONE, argv=words(3_800_000)))
    (row,) = msgspec.json.decode(reply.result)["tasks"]
    assert "over 4194304" in row["error"]["message"]
    assert desk.engine.state.tasks.get(1).unpacked().argv == ("true",)  # type: ignore[union-attr]


def test_a_record_that_leaves_a_snapshot_no_room_is_refused_before_anything_is_changed() -> None:
    engine = new_engine(new_store())
    admit(engine, m.Submit((m.TaskSpec(("true",), hold=True),)))
    spec = msgspec.msgpack.encode({"argv": ["x" * (PAYLOAD_BYTES_MAX - 60_000)]})
    large = Edited(1, 1, "default", 0, 0, msgspec.Raw(spec))
    with pytest.raises(BadRequest, match="the most that the log takes"):
        engine.admit([Edited(1, 1, "default", 7, 0, msgspec.Raw(b"\x80")), large], is_small=False)
    assert engine.state.tasks.get(1).priority == 0  # type: ignore[union-attr]
    assert not engine.commit()


def test_a_task_as_large_as_an_older_version_let_it_become_is_written_to_a_snapshot() -> None:
    store = new_store()
    engine = new_engine(store)
    admit(engine, m.Submit((m.TaskSpec(("true",), key="k" * 250, hold=True),)))
    spec = msgspec.msgpack.encode({"argv": ["x" * (PAYLOAD_BYTES_MAX - 60)]})
    engine.stage([Edited(1, 1, "default", 0, 0, msgspec.Raw(spec))])
    engine.commit()
    writer = store.begin_snapshot(engine.wal.durable_lsn)
    chunks = list(engine.image())
    assert max(map(len, chunks)) > PAYLOAD_BYTES_MAX
    for chunk in chunks:
        writer.add(chunk)
    writer.finish()
    assert isinstance(writer.poll(), SnapshotDone)
    state = image.load(store.recover().chunks())
    assert state.tasks.get(1) == engine.state.tasks.get(1)


def test_ten_thousand_refusals_of_one_edit_are_one_refusal_where_all_are_the_same() -> None:
    desk = Desk()
    desk.ask("a", "submit", m.Submit((m.TaskSpec(("true",), hold=True),) * 10_000))
    reply = desk.reply("b", "edit", m.Edit(ALL, on_oom="\U000e0001" * 64))
    assert reply.error is not None
    assert reply.error.code == "bad_request"


def test_ten_thousand_refusals_of_one_edit_fit_into_one_answer() -> None:
    desk = Desk()
    desk.ask("a", "submit", m.Submit((m.TaskSpec(("true",), hold=True),) * 10_000))
    one_byte = "retry:x2,max=" + "\U0001d7d8" * 50 + "1"  # zeros of four bytes each
    answer = desk.ask("b", "edit", m.Edit(ALL, on_oom=one_byte, memory_bytes=1 << 61))
    rows = answer["tasks"]  # type: ignore[index]
    assert len(rows) == 10_000
    assert all(row["error"]["message"].endswith("...") for row in rows)


def test_an_edit_of_many_tasks_by_their_ids_is_not_weighed_by_the_ids() -> None:
    desk = Desk()
    desk.ask("a", "submit", m.Submit((m.TaskSpec(("true",), hold=True),) * 3_000))
    some = m.Selector(ids=tuple(range(1, 3_001)))
    answer = desk.ask("b", "edit", m.Edit(some, priority=5))
    assert not any(row["error"] for row in answer["tasks"])  # type: ignore[index]


def test_an_edit_that_would_never_fit_says_so_and_does_not_speak_of_a_full_disk() -> None:
    engine = new_engine(new_store())
    for _ in range(7):
        admit(engine, m.Submit((m.TaskSpec(("prog", "a" * 2_500), hold=True),) * 1_400))
    with pytest.raises(BadRequest, match="at once") as refused:
        admit(engine, m.Edit(ALL, priority=5))
    assert not refused.value.retryable
    admit(engine, m.Edit(m.Selector(ids=tuple(range(1, 2_001))), priority=5))


def test_more_than_a_log_ever_takes_at_once_is_no_full_disk_either() -> None:
    engine = new_engine(new_store())
    admit(engine, m.Submit((m.TaskSpec(("true",), hold=True),)))
    many = [Edited(1, 1, "default", 7, 0, msgspec.Raw(b"\xc6" + (MIB).to_bytes(4) + bytes(MIB)))]
    with pytest.raises(BadRequest, match="at once are over"):
        engine.admit(many * 15, is_small=False)
    assert engine.state.tasks.get(1).priority == 0  # type: ignore[union-attr]


def test_what_does_not_fit_beside_others_in_this_turn_is_no_full_disk() -> None:
    engine = new_engine(new_store())
    big = m.Submit((m.TaskSpec(words(3 * MIB), hold=True),))
    with pytest.raises(Busy):
        admit_in_one_turn(engine, [big] * 20)  # two segments hold fewer
    engine.commit()
    admit(engine, big)


def test_many_active_attempts_leave_room_for_new_work() -> None:
    engine = new_engine(new_store())
    admit(engine, m.GroupSet("default", parallel=10_000))
    for _ in range(2):
        admit(engine, m.Submit((m.TaskSpec(("true",)),) * 8_064))
    engine.stage([StartIntent(number, 1, 1) for number in range(1, 16_129)])
    engine.commit()
    while engine.wal.segment_room_bytes > MIB:  # the spare alone has to do
        admit(engine, m.Submit((m.TaskSpec(words(MIB // 2), hold=True),)))
    assert engine.has_room()
    admit(engine, m.Submit((m.TaskSpec(words(3 * MIB), hold=True),)))


def test_no_more_is_started_than_a_full_log_can_note_the_ends_of() -> None:
    disk = MemoryDisk()
    engine = new_engine(Store.open("/s", disk, has_threads=False))
    engine.policy = replace(engine.policy, active_max=100_000, starts_per_turn_max=100_000)
    admit(engine, m.GroupSet("default", parallel=100_000))
    for _ in range(3):
        admit(engine, m.Submit((m.TaskSpec(("true",)),) * 8_000))
    engine.plan(Now(2))
    engine.commit()
    active = list(engine.state.active)
    assert 10_000 <= len(active) < 24_000
    disk.capacity -= disk.free_bytes("")
    for size in (MIB // 2, 4_096, 1):
        fill(engine, size)

    for at in range(0, len(active), 8):
        for number in active[at : at + 8]:
            engine.stage(longest_end(number))
        engine.commit()

    assert not engine.state.active
    assert engine.wal.has_spare, "the next start needs one, and could not make it"


def fill(engine: Engine, size: int) -> None:
    """Submit tasks of about that size until the disk is full."""
    spec = m.TaskSpec(("true",), labels={"a": "x" * size})
    with pytest.raises(DiskFull):  # noqa: PT012 - which one is the first that it does not take
        for _ in range(10_000):
            admit(engine, m.Submit((spec,)))


def longest_end(task: int) -> list[AnyRecord]:
    """Return an end after all rungs of a stop, with as long a text as a supervisor tells."""
    at_ns = 1_760_000_000_000_000_000
    verdict = Verdict(Phase.CANCELLED, "cancel", at_ns, 1, 2, 3, 4, 5)
    return [
        *(StopIntent(task, 1, at_ns, "cancel", rung, at_ns, 10.5, 1_000) for rung in range(3)),
        Marked(task, 1, at_ns, 7, at_ns, "0123456789abcdef"),
        Ended(
            task, 1, at_ns, "cancel", 0, 9, False, at_ns, at_ns, 0.5, 1 << 30, 1.5,
            "0123456789abcdef", "x" * 240, verdict,
        ),
    ]  # fmt: skip
