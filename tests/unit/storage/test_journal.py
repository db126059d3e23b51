"""A task's journal: what counts as done, what is torn, what is damage."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.storage import facts, frame
from ckptd.storage.journal import TASK, JournalDamaged, StaleAttempt, TooLarge
from ckptd.storage.untrusted import Damaged, NotTrusted
from tests.task_world import TaskWorld

NAMES = ["one", "two", "three"]


@pytest.fixture
def world(tmp_path: Path) -> TaskWorld:
    return TaskWorld(tmp_path)


def three_steps(world: TaskWorld) -> bytes:
    for name in NAMES:
        world.record(facts.step_done(name))
    return world.journal_path().read_bytes()


def steps(world: TaskWorld) -> list[str]:
    return list(world.facts().steps)


def test_facts_of_all_attempts_add_up_in_order(world: TaskWorld) -> None:
    world.record(facts.step_done("fetch"), facts.set_value("a", 1), facts.set_value("b", 2))
    world.begin()
    world.record(facts.set_value("a", [3]), facts.delete_value("b"))
    world.record(facts.item_done("k", "fail"), facts.item_done("k", "pass", text="at last"))

    found = world.facts()

    assert list(found.steps) == ["fetch"]
    assert found.values == {"a": [3]}
    assert found.items["k"]["status"] == "pass"
    assert found.items["k"]["attempt"] == 2


def test_numbers_count_every_fact_of_the_attempt(world: TaskWorld) -> None:
    assert world.record(facts.set_value("a", 1)) == 2  # the first frame also opens the file
    assert world.record(facts.set_value("a", 1), facts.set_value("b", 1)) == 4


def test_two_writers_of_one_attempt_take_turns(world: TaskWorld) -> None:
    first, second = world.journal(), world.journal()

    first.append([facts.step_done("a")])
    second.append([facts.step_done("b")])
    first.append([facts.step_done("c")])

    assert steps(world) == ["a", "b", "c"]


def test_the_journal_is_made_of_the_frames_of_the_log(world: TaskWorld) -> None:
    data = memoryview(three_steps(world))
    seed = frame.crc32(b"ckptd journal 12.1")

    head = frame.decode(data, 0, seed)

    assert head is not None
    assert (head.kind, head.first_lsn, head.records, head.epoch) == (frame.NOTE, 1, 2, 1)


def test_cut_at_any_byte_gives_whole_facts_only_and_can_be_written_on(world: TaskWorld) -> None:
    data = three_steps(world)
    path = world.journal_path()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        kept = steps(world)
        assert kept == NAMES[: len(kept)], f"cut at {cut}"
        assert len(kept) < 3

        world.record(facts.step_done("after"))
        assert steps(world) == [*kept, "after"], f"cut at {cut}"


def test_a_flipped_bit_is_never_data(world: TaskWorld) -> None:
    data = three_steps(world)
    path = world.journal_path()
    last_begins = len(data) - frame.frame_bytes(_payload_bytes(data))

    for at in range(len(data)):
        for bit in (0, 3, 7):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            if at >= last_begins:  # nobody promised the last one: torn, not done
                assert steps(world) == NAMES[:2]
            else:
                with pytest.raises(JournalDamaged, match="durable"):
                    steps(world)
                with pytest.raises(JournalDamaged, match="durable"):
                    world.record(facts.step_done("after"))
                assert path.read_bytes() == bytes(flipped), "damage is left as it is"


def _payload_bytes(data: bytes) -> int:
    seed = frame.crc32(b"ckptd journal 12.1")
    *_, (_, head) = frame.find_later(memoryview(data), 0, seed)
    return head.length


def test_what_another_attempt_wrote_is_not_taken_for_ours(world: TaskWorld) -> None:
    data = three_steps(world)
    world.begin()

    world.journal_path().write_bytes(data)

    assert world.facts().count == 4  # attempt 1 alone: a copied file is not a journal of ours


def test_a_zombie_is_refused_once_a_newer_attempt_is_prepared(world: TaskWorld) -> None:
    zombie = world.journal()
    zombie.append([facts.step_done("a")])

    world.begin()

    with pytest.raises(StaleAttempt, match="attempt 2 exists"):
        zombie.append([facts.step_done("b")])
    assert steps(world) == ["a"]


def test_without_a_daemon_a_journal_needs_no_preparation(tmp_path: Path) -> None:
    world = TaskWorld(tmp_path)
    world.path("attempt.json").unlink()

    world.record(facts.step_done("a"))

    assert steps(world) == ["a"]


def test_an_op_of_a_later_version_is_a_problem_and_not_skipped(world: TaskWorld) -> None:
    world.record({"op": "teleport", "to": "moon"})

    assert "teleport" in world.facts().problem
    assert "teleport" in world.mark().problem


def test_a_problem_stops_the_attempt_that_recorded_it_and_no_later_one(world: TaskWorld) -> None:
    world.record(facts.problem("no way from version 1 to 2", "version"), facts.problem("and now?"))
    assert world.mark()[5:7] == ("no way from version 1 to 2", "version")

    world.begin()  # released, with mended code
    assert world.mark()[5:7] == ("", "")
    world.record(facts.step_done("a"))
    assert world.mark()[5:7] == ("", "")

    world.begin()
    world.record(facts.problem("cannot be read", "corrupt"))
    assert world.mark()[5:7] == ("cannot be read", "corrupt")


def test_an_unknown_op_is_a_problem_for_every_attempt(world: TaskWorld) -> None:
    world.record({"op": "teleport", "to": "moon"})
    world.begin()

    assert world.mark().why == "corrupt"
    assert "teleport" in world.mark().problem


def test_a_task_cannot_pass_a_problem_off_as_something_else(world: TaskWorld) -> None:
    with pytest.raises(ValueError, match="known: checkpoint, version, corrupt"):
        facts.problem("wait for it", "dependency")
    world.record({"op": "problem", "text": "wait for it", "why": "dependency"})

    assert world.mark()[5:7] == ("wait for it", "checkpoint")


def test_what_the_whole_task_came_to_is_a_gain_and_the_last_one_holds(world: TaskWorld) -> None:
    assert world.facts().result == {}
    world.record(facts.result_made({"rows": 1}))
    before = world.mark().cursor
    world.record(facts.result_made(None))

    assert world.facts().result["value"] is None
    assert world.mark().cursor not in ("", before)


@pytest.mark.parametrize("bad", [{"op": "set"}, {"op": "progress", "done": "x", "total": 1}, {}])
def test_a_fact_without_its_fields_is_a_problem(world: TaskWorld, bad: dict[str, object]) -> None:
    world.record(bad)

    assert world.facts().problem


def test_a_fact_beyond_the_bound_is_refused_and_nothing_is_written(world: TaskWorld) -> None:
    world.record(facts.step_done("a"))

    with pytest.raises(TooLarge):
        world.record(facts.set_value("k", "x" * (1 << 20)))
    with pytest.raises(TooLarge):
        world.record(facts.step_done("b"), facts.set_value("k", "x" * (1 << 20)))

    assert world.facts().count == 2


@pytest.mark.parametrize("look", [facts.read_facts, facts.read_durable])
@pytest.mark.parametrize("part", ["file_bytes", "all_bytes"])
def test_who_reads_keeps_to_the_bounds_that_it_was_given(
    world: TaskWorld, look: Callable[..., facts.Facts], part: str
) -> None:
    world.record(facts.step_done("a"))
    size = world.journal_path().stat().st_size
    fits = TASK._replace(**{part: size})

    assert list(look(world.dir, 12, world.uid, 1, bounds=fits).steps) == ["a"]
    with pytest.raises(JournalDamaged):
        look(world.dir, 12, world.uid, 1, bounds=fits._replace(**{part: size - 1}))


def test_a_full_disk_takes_nothing_that_was_there(world: TaskWorld, tmp_path: Path) -> None:
    journal = world.journal()
    journal.append([facts.step_done("a")])
    before = world.journal_path().read_bytes()
    real = journal._fd
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, real)
    os.close(full)

    with pytest.raises(OSError, match=r"."):
        journal.append([facts.step_done("b")])

    assert world.journal_path().read_bytes() == before


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_no_regular_file_is_not_read(world: TaskWorld, kind: str) -> None:
    world.path("journal").mkdir()
    path = world.journal_path()
    if kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()

    with pytest.raises((NotTrusted, Damaged)):
        world.facts()
    assert world.mark().problem


def test_the_wait_that_an_attempt_asked_for_counts_for_that_attempt_alone(
    world: TaskWorld,
) -> None:
    world.record(facts.retry_after(60, "api"))
    assert 50 < world.mark().retry_after_s <= 60

    world.begin()
    assert world.mark().retry_after_s == 0


def test_when_something_was_last_recorded_is_known_and_a_start_alone_is_nothing(
    world: TaskWorld,
) -> None:
    before_ns = time.time_ns()
    world.record(facts.step_done("fetch"))
    gained_ns = world.mark().gained_ns
    assert before_ns <= gained_ns <= time.time_ns()
    world.record(facts.step_start("parse"))
    assert world.mark().gained_ns == gained_ns


def test_a_wait_is_counted_from_when_it_was_asked_for_and_not_from_when_it_is_read() -> None:
    known = facts.Standing()
    asked_ns = time.time_ns() - 3_600 * 10**9
    known.take(1, {**facts.retry_after(60), "at_ns": asked_ns})
    assert known.retry_after_s(1) == 0
    known.take(1, {**facts.retry_after(7_200), "at_ns": asked_ns})
    assert known.retry_after_s(1) <= 3_600
