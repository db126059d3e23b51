"""Room in a journal: zeros that wait for frames. They end it, and blur no verdict on damage."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.storage import facts, frame
from ckptd.storage.journal import (
    ROOM_BYTES_MAX,
    UNSYNCED_BYTES_MAX,
    Bounds,
    Journal,
    JournalDamaged,
    TooLarge,
    read,
)
from tests.task_world import ROOT, TASK, TaskWorld
from tests.waiting import until

MANY = 60  # facts: enough for room, few enough to try every byte of the last of them
SEED = frame.crc32(b"ckptd journal 12.1")


@pytest.fixture
def world(tmp_path: Path) -> TaskWorld:
    return TaskWorld(tmp_path)


def fill(journal: Journal, count: int = MANY, begin: int = 0) -> list[str]:
    keys = [f"item-{number}" for number in range(begin, begin + count)]
    for key in keys:
        journal.append([facts.item_done(key, "pass")])
    return keys


def fill_until_refused(journal: Journal, keys: list[str]) -> None:
    while len(keys) < 1_000:
        journal.append([facts.item_done(str(len(keys)), "pass")])
        keys.append(str(len(keys)))


def killed_writer(world: TaskWorld) -> tuple[list[str], bytes]:
    """Return what a writer recorded that was killed, and its file as it left it, with room."""
    journal = world.journal()
    keys = fill(journal)
    left = world.journal_path().read_bytes()
    journal.close()
    world.journal_path().write_bytes(left)
    return keys, left


def items(world: TaskWorld) -> list[str]:
    return list(world.facts().items)


def ends(data: bytes) -> list[int]:
    """Return the offset behind each frame."""
    return [at + head.size for at, head in frame.find_later(memoryview(data), 0, SEED)]


def promises(world: TaskWorld) -> list[int]:
    """Return what each frame says had been synced before it."""
    data = memoryview(world.journal_path().read_bytes())
    return [head.durable_lsn for _, head in frame.find_later(data, 0, SEED)]


# --- how large a file is --------------------------------------------------------------------------


def test_a_journal_of_a_few_facts_has_no_room(world: TaskWorld) -> None:
    journal = world.journal()
    fill(journal, 5)

    data = world.journal_path().read_bytes()

    assert len(data) == ends(data)[-1]


def test_a_process_that_appends_once_makes_no_room(world: TaskWorld) -> None:
    for number in range(MANY):
        world.journal().append([facts.item_done(str(number), "pass")])  # and is killed

    data = world.journal_path().read_bytes()

    assert len(data) == ends(data)[-1]


def test_room_doubles_a_file_at_most_and_is_bounded(world: TaskWorld) -> None:
    journal = world.journal()
    most_bytes = 0
    for number in range(400):
        journal.append([facts.set_value(str(number % 7), "x" * 3_000)])
        size = world.journal_path().stat().st_size
        room_bytes = size - journal._end_bytes
        assert size <= 2 * journal._end_bytes
        most_bytes = max(most_bytes, room_bytes)

    assert ROOM_BYTES_MAX // 2 < most_bytes <= ROOM_BYTES_MAX


def test_frames_in_room_leave_the_size_as_it_is(world: TaskWorld) -> None:
    journal = world.journal()
    sizes = []
    for number in range(500):
        journal.append([facts.item_done(str(number), "pass")])
        sizes.append(world.journal_path().stat().st_size)

    assert len(set(sizes[100:])) < 8


def test_a_writer_that_closes_gives_its_room_back(world: TaskWorld) -> None:
    journal = world.journal()
    keys = fill(journal)
    assert world.journal_path().stat().st_size > journal._end_bytes

    journal.close()

    data = world.journal_path().read_bytes()
    assert len(data) == ends(data)[-1]
    assert items(world) == keys


def test_room_that_others_append_to_is_left_to_them(world: TaskWorld) -> None:
    first, second = world.journal(), world.journal()
    keys = fill(first)
    keys += fill(second, 3, begin=MANY)

    first.close()

    keys += fill(second, 3, begin=MANY + 3)
    assert items(world) == keys


def test_whose_room_was_cut_off_by_another_makes_room_again(world: TaskWorld) -> None:
    first, second = world.journal(), world.journal()
    keys = fill(first)
    keys += fill(second, 1, begin=MANY)  # it counts on the room that it sees
    keys += fill(first, 1, begin=MANY + 1)
    first.close()

    keys += fill(second, 8, begin=MANY + 2)

    assert items(world) == keys
    assert world.journal_path().stat().st_size > second._end_bytes


# --- what a crash leaves --------------------------------------------------------------------------


def test_a_killed_writer_leaves_room_and_the_next_one_writes_into_it(world: TaskWorld) -> None:
    keys, left = killed_writer(world)
    assert len(left) > ends(left)[-1]
    assert items(world) == keys

    world.record(facts.item_done("after", "pass"))

    assert items(world) == [*keys, "after"]
    assert world.journal_path().stat().st_size == len(left)


def test_cut_or_zeroed_from_any_byte_of_the_last_frames_on_gives_whole_facts(
    world: TaskWorld,
) -> None:
    keys, left = killed_writer(world)
    begin, end = ends(left)[-3], ends(left)[-1]
    path = world.journal_path()
    for cut in [*range(begin, end + 80), len(left) - 1]:
        for damaged in (left[:cut], left[:cut].ljust(len(left), b"\0")):
            path.write_bytes(damaged)
            whole = sum(behind <= cut for behind in ends(left))
            kept = items(world)
            assert kept == keys[: len(kept)], f"from byte {cut}"
            assert whole <= len(kept) <= whole + 1, "a frame that ends in zeros may be whole"

            world.record(facts.item_done("after", "pass"))
            assert items(world) == [*kept, "after"], f"from byte {cut}"
            written = path.read_bytes()
            assert not written[ends(written)[-1] :].strip(b"\0"), "what was torn is gone"


def test_a_flipped_bit_before_room_is_damage_and_in_the_last_frame_torn(world: TaskWorld) -> None:
    keys, left = killed_writer(world)
    *_, second, third, end = ends(left)
    path = world.journal_path()
    for at in range(second, end):
        flipped = bytearray(left)
        flipped[at] ^= 0x08
        path.write_bytes(flipped)
        if at >= third:
            assert items(world) == keys[:-1], f"byte {at}"
            continue
        with pytest.raises(JournalDamaged, match="durable"):
            items(world)
        with pytest.raises(JournalDamaged, match="durable"):
            world.record(facts.step_done("after"))
        assert path.read_bytes() == bytes(flipped), "damage is left as it is"


def test_a_promised_frame_that_became_zeros_is_damage_and_no_end(world: TaskWorld) -> None:
    _, left = killed_writer(world)
    *_, before, second, _third, _end = ends(left)
    zeroed = left[:before] + bytes(second - before) + left[second:]
    world.journal_path().write_bytes(zeroed)

    with pytest.raises(JournalDamaged, match="durable"):
        items(world)
    with pytest.raises(JournalDamaged, match="durable"):
        world.record(facts.step_done("after"))


def test_a_torn_frame_that_lost_its_beginning_is_cut_off(world: TaskWorld) -> None:
    """A power cut may keep any sector of an append; what is left must not stay in the room."""
    keys, left = killed_writer(world)
    end = ends(left)[-1]
    torn = bytearray(left)
    torn[end + 512 : end + 612] = b"half of a frame".ljust(100, b"!")
    world.journal_path().write_bytes(torn)

    world.record(facts.item_done("after", "pass"))

    assert items(world) == [*keys, "after"]
    assert b"half of a frame" not in world.journal_path().read_bytes()


def test_a_file_that_is_room_only_is_an_empty_journal(world: TaskWorld) -> None:
    world.path("journal").mkdir()
    world.journal_path().write_bytes(bytes(8_192))
    assert world.facts().count == 0

    assert world.record(facts.step_done("a")) == 2

    assert list(world.facts().steps) == ["a"]


WRITER = """
import sys
from ckptd.storage import facts
from ckptd.storage.journal import Journal
journal = Journal(sys.argv[1], 12, 1, 1)
for number in range(100_000):
    journal.append([facts.item_done(f"{sys.argv[2]}-{number}", "pass")])
    print(number, flush=True)
"""


def writer(world: TaskWorld, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, world.dir, name],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_that_append_in_turn_and_are_killed_lose_nothing(world: TaskWorld) -> None:
    acked: dict[str, int] = {}
    for round_ in range(4):
        both = {f"{name}{round_}": writer(world, f"{name}{round_}") for name in "ab"}
        until(lambda: world.journal_path().exists())
        begun = world.journal_path().stat().st_size
        until(lambda begun=begun: world.journal_path().stat().st_size > begun + 30_000)
        for name, process in both.items():
            process.kill()
            told, _ = process.communicate()
            acked[name] = len(told.splitlines())

    found = items(world)

    for name, count in acked.items():
        mine = [key for key in found if key.startswith(f"{name}-")]
        assert mine == [f"{name}-{number}" for number in range(len(mine))]
        assert count <= len(mine) <= count + 1, "at most one was written and not yet told"


# --- a disk without room for room -----------------------------------------------------------------


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_where_there_is_no_space_for_room_frames_are_appended_to_the_last_byte(
    world: TaskWorld,
) -> None:
    journal = world.journal()
    kept: list[str] = []
    with files_no_larger_than(20_000), pytest.raises(OSError, match="large") as full:
        fill_until_refused(journal, kept)

    assert full.value.errno == errno.EFBIG
    assert 20_000 - journal._end_bytes < 300
    assert items(world) == kept
    fill(journal, 3)  # and on it goes, once there is space
    assert len(items(world)) == len(kept) + 3


def test_bounds_hold_with_room_and_reader_and_writer_agree_on_them(world: TaskWorld) -> None:
    bounds = Bounds(file_bytes=20_000, all_bytes=30_000)
    kept: list[str] = []
    for _ in range(2):
        journal = Journal(world.dir, TASK, world.attempt, 1, bounds=bounds)
        with pytest.raises(TooLarge):
            fill_until_refused(journal, kept)
        assert world.journal_path().stat().st_size <= bounds.file_bytes
        world.begin()  # the writer was killed: its room stays

    found = [fact["key"] for _, fact in read(world.dir, TASK, world.uid, 9, bounds=bounds)
             if fact["op"] == "item"]  # fmt: skip
    assert found == kept
    with pytest.raises(JournalDamaged, match="larger than"):
        list(read(world.dir, TASK, world.uid, 9, bounds=Bounds(20_000, 20_000)))


# --- facts that ride unsynced ---------------------------------------------------------------------


def test_a_frame_promises_nothing_that_rides_unsynced(world: TaskWorld) -> None:
    journal = world.journal()
    journal.append([facts.set_value("a", 1)])  # facts 1 and 2
    journal.append([facts.set_value("b", 1)], is_synced=False)  # 3
    journal.append([facts.set_value("c", 1)], is_synced=False)  # 4
    assert journal.append([facts.set_value("d", 1)]) == 5
    journal.append([facts.set_value("e", 1)])

    assert promises(world) == [0, 2, 2, 2, 5]


def test_facts_that_ride_unsynced_outlive_their_process(world: TaskWorld) -> None:
    world.journal().append([facts.set_value("a", 1)], is_synced=False)

    assert world.facts().values == {"a": 1}
    world.record(facts.set_value("b", 2))
    assert world.facts().values == {"a": 1, "b": 2}
    assert promises(world) == [0, 2], "the other one synced it before it promised it"


def test_lost_unsynced_facts_are_torn_although_later_ones_are_whole(world: TaskWorld) -> None:
    journal = world.journal()
    journal.append([facts.set_value("a", 1)])
    for key in "bcd":
        journal.append([facts.set_value(key, 1)], is_synced=False)
    data = world.journal_path().read_bytes()
    first, second, *_ = ends(data)
    world.journal_path().write_bytes(data[:first] + bytes(second - first) + data[second:])

    assert world.facts().values == {"a": 1}


def test_what_rides_unsynced_is_bounded(world: TaskWorld) -> None:
    journal = world.journal()
    journal.append([facts.set_value("a", 1)])
    for _ in range(4):
        journal.append([facts.set_value("b", "x" * (UNSYNCED_BYTES_MAX // 3))], is_synced=False)

    journal.append([facts.set_value("c", 1)], is_synced=False)

    assert promises(world)[-1] == 5


def test_a_failed_sync_takes_back_all_that_was_not_durable_and_nothing_may_follow(
    world: TaskWorld,
) -> None:
    journal = world.journal()
    journal.append([facts.step_done("a")])
    real = os.dup(journal._fd)
    devnull = os.open("/dev/null", os.O_RDWR)  # takes every write and refuses the sync
    os.dup2(devnull, journal._fd)
    os.close(devnull)

    with pytest.raises(OSError, match="Invalid argument"):
        journal.append([facts.step_done("b")])

    os.dup2(real, journal._fd)
    os.close(real)
    with pytest.raises(JournalDamaged, match="sync failed before"):
        journal.append([facts.step_done("c")])
    assert list(world.facts().steps) == ["a"]


def test_what_a_failed_sync_refused_is_not_found_later(
    world: TaskWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = world.journal()
    journal.append([facts.step_done("a")])

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        journal.append([facts.step_done("b")])
    monkeypatch.undo()
    assert list(world.facts().steps) == ["a"]
