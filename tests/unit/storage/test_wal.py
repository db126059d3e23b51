import errno
import random
from pathlib import Path

import pytest

from ckptd.protocol.errors import Busy, Corrupt, NotFound
from ckptd.storage import rebuild, segment
from ckptd.storage.disk import RealDisk
from ckptd.storage.frame import Chain
from ckptd.storage.segment import Link
from ckptd.storage.store import Store
from tests.fakes.log_model import ROOT, SMALL, Writer, numbers_in, open_store, payload_of, replay
from tests.fakes.memory_disk import Inode, MemoryDisk


def long_log(count: int = 60) -> Writer:
    writer = Writer(MemoryDisk(), segment_bytes=SMALL)
    rng = random.Random(count)
    for _ in range(count):
        writer.append(rng.randint(1, 9))
    writer.sync()
    return writer


def read_all(writer: Writer, since: int, bytes_max: int) -> list[int]:
    found: list[int] = []
    while frames := writer.wal.read(since, bytes_max):
        numbers = [n for one in frames for n in numbers_in(one)]
        found += [n for n in numbers if n > since]
        since = found[-1]
    return found


@pytest.mark.parametrize("bytes_max", [1, 100, 1000, 1 << 20])
def test_reading_gives_every_record_once_in_order_over_all_segments(bytes_max: int) -> None:
    writer = long_log()
    for since in (0, 1, 50, writer.acked - 1, writer.acked, writer.acked + 5):
        assert read_all(writer, since, bytes_max) == list(range(since + 1, writer.acked + 1))


def test_reading_shows_only_what_is_durable() -> None:
    writer = long_log(3)
    last = writer.acked
    writer.append(5)
    assert read_all(writer, 0, 1 << 20)[-1] == last
    writer.sync()
    assert read_all(writer, 0, 1 << 20)[-1] == last + 5


def test_reading_is_bounded_but_for_the_first_frame() -> None:
    writer = Writer(MemoryDisk(), segment_bytes=1 << 20)
    for _ in range(100):
        writer.append(50)
    writer.sync()
    assert len(writer.wal.read(0, 1)) == 1
    assert 2 <= len(writer.wal.read(0, 3000)) < 10


def test_reading_works_over_restarts_also_where_replay_did_not_look() -> None:
    writer = long_log()
    writer.snapshot()
    writer.close()
    again = Writer(writer.store.place.disk, writer.acked, writer.acked)  # type: ignore[arg-type]
    assert again.recovery.report.segments == 1
    assert read_all(again, 0, 300) == list(range(1, again.recovered + 1))


def test_reading_what_is_retired_names_the_earliest() -> None:
    writer = long_log()
    writer.snapshot()
    writer.append(1)
    writer.snapshot()
    earliest = writer.wal.earliest_lsn
    assert earliest > 1
    with pytest.raises(NotFound, match=str(earliest)):
        writer.wal.read(0, 100)
    assert read_all(writer, earliest - 1, 100)[0] == earliest


def test_reading_bytes_that_rotted_is_an_error_and_not_an_end() -> None:
    writer = long_log()
    disk = writer.store.place.disk
    assert isinstance(disk, MemoryDisk)
    name = segment.newest_names(disk.names(f"{ROOT}/wal"))[0][0]
    disk.inode(f"{ROOT}/wal/{name}").data[segment.BLOCK_BYTES + 60] ^= 4
    with pytest.raises(Corrupt):
        writer.wal.read(0, 1 << 20)


@pytest.mark.parametrize("offset", [segment.BLOCK_BYTES + 300, segment.BLOCK_BYTES + 60])
def test_damage_where_replay_did_not_look_is_an_error_each_time_and_hides_nothing_else(
    offset: int,
) -> None:
    writer = long_log()
    disk = writer.store.place.disk
    assert isinstance(disk, MemoryDisk)
    names = segment.newest_names(disk.names(f"{ROOT}/wal"))[0]
    writer.snapshot()
    writer.close()
    disk.inode(f"{ROOT}/wal/{names[1]}").data[offset] ^= 4
    again = Writer(disk, writer.acked, writer.acked)
    last_bad = names[2].first_lsn - 1

    found = [n for one in again.wal.read(0, 1 << 20) for n in numbers_in(one)]

    bad = found[-1] + 1
    assert found == list(range(1, bad))
    assert names[1].first_lsn <= bad <= last_bad
    for since in (bad - 1, bad - 1, last_bad - 1):
        with pytest.raises(Corrupt, match=f"it held {last_bad}") as told:
            again.wal.read(since, 1 << 20)
        assert f"--since {last_bad}`" in told.value.hint
    assert read_all(again, last_bad, 300) == list(range(last_bad + 1, again.recovered + 1))


def test_a_segment_that_the_disk_does_not_give_hides_nothing_else() -> None:
    writer = long_log()
    disk = writer.store.place.disk
    assert isinstance(disk, MemoryDisk)
    names = segment.newest_names(disk.names(f"{ROOT}/wal"))[0]
    begin, end = names[1].first_lsn, names[2].first_lsn - 1
    disk.fail("read", str(names[1]), times=3)

    found = [n for one in writer.wal.read(0, 1 << 20) for n in numbers_in(one)]

    assert found == list(range(1, begin))
    for _ in range(2):
        with pytest.raises(
            Corrupt, match=rf"cannot be read \(Input/output error\) at LSN {begin};"
        ):
            writer.wal.read(begin - 1, 1 << 20)
    assert read_all(writer, end, 300) == list(range(end + 1, writer.acked + 1))
    assert read_all(writer, 0, 300) == list(range(1, writer.acked + 1))
    assert not [file for file in disk.opened if str(names[1]) in file._path]


def test_a_segment_that_is_gone_is_told_as_damage() -> None:
    writer = long_log()
    disk = writer.store.place.disk
    names = segment.newest_names(disk.names(f"{ROOT}/wal"))[0]
    disk.unlink(f"{ROOT}/wal/{names[0]}")
    with pytest.raises(Corrupt, match="No such file or directory") as told:
        writer.wal.read(0, 1 << 20)
    assert f"--since {names[1].first_lsn - 1}`" in told.value.hint


def test_want_of_a_descriptor_is_no_damage() -> None:
    writer = long_log()
    disk = writer.store.place.disk
    assert isinstance(disk, MemoryDisk)
    disk.fail("read", error=errno.EMFILE)
    with pytest.raises(Busy, match="Too many open files"):
        writer.wal.read(0, 1 << 20)
    assert read_all(writer, 0, 300)


def test_a_damaged_header_where_replay_did_not_look_hides_only_its_own_segment() -> None:
    writer = long_log()
    disk = writer.store.place.disk
    assert isinstance(disk, MemoryDisk)
    names = segment.newest_names(disk.names(f"{ROOT}/wal"))[0]
    writer.snapshot()
    writer.close()
    disk.inode(f"{ROOT}/wal/{names[1]}").data[20] ^= 4
    again = Writer(disk, writer.acked, writer.acked)
    for _ in range(2):
        with pytest.raises(Corrupt, match=f"at LSN {names[1].first_lsn}"):
            again.wal.read(names[1].first_lsn - 1, 1 << 20)
    begin = names[2].first_lsn
    assert read_all(again, begin - 1, 300) == list(range(begin, again.recovered + 1))


def test_retiring_keeps_the_segment_that_holds_the_next_record() -> None:
    writer = long_log()
    disk = writer.store.place.disk
    names = segment.newest_names(disk.names(f"{ROOT}/wal"))[0]
    assert len(names) > 3
    assert writer.wal.retire(names[2].first_lsn - 2) == 1
    assert writer.wal.retire(names[2].first_lsn - 1) == 1
    assert writer.wal.retire(1 << 40) == len(names) - 3
    assert segment.newest_names(disk.names(f"{ROOT}/wal"))[0] == names[-1:]


def test_idle_markers_do_not_pile_up_and_never_run_out_of_room() -> None:
    writer = Writer(MemoryDisk(), segment_bytes=SMALL)
    for _ in range(200):
        writer.append(1)
        for _ in range(3):
            writer.wal.mark_idle()
    room = writer.wal.room_bytes
    writer.wal.mark_idle()
    assert writer.wal.room_bytes == room


@pytest.mark.parametrize("reigns", [50])
def test_empty_reigns_do_not_grow_the_log(reigns: int) -> None:
    disk = MemoryDisk()
    rooms = set()
    for _ in range(reigns):
        writer = Writer(disk)
        rooms.add(writer.wal.room_bytes)
        writer.close()
    assert len(rooms) == 1


def test_an_orderly_end_is_told_from_any_other() -> None:
    disk = MemoryDisk()
    writer = Writer(disk, 0, 0)
    assert not writer.recovery.clean
    writer.append(3)
    writer.close()
    writer = Writer(disk, 3, 3)
    assert writer.recovery.clean
    disk.locked.clear()
    assert not Writer(disk, 3, 3).recovery.clean


def test_a_real_log_with_full_segments_and_the_background_thread(tmp_path: Path) -> None:
    store = Store.open(f"{tmp_path}/state", RealDisk())
    wal = store.arm(store.recover(), epoch=1, boot_id="b", at_ns=1)
    big = payload_of(1, 300_000)  # about 5 MB
    sizes = []
    for _ in range(9):
        first = wal.next_lsn
        payload = payload_of(first, 60_000)
        sizes.append(len(payload))
        assert len(payload) < wal.payload_bytes_max < len(big)
        wal.append(payload, 60_000)
    assert wal.sync() == 540_000
    assert sum(sizes) > 9_000_000
    store.close()
    store = Store.open(f"{tmp_path}/state", RealDisk())
    assert replay(store.recover()) == 540_000
    store.close()


def test_a_smaller_setting_for_segments_takes_an_old_log_over() -> None:
    disk = MemoryDisk()
    writer = Writer(disk, segment_bytes=SMALL * 4)
    for _ in range(40):
        writer.append(5)
    writer.close()
    again = Writer(disk, 200, 200, segment_bytes=SMALL)
    for _ in range(40):
        again.append(5)
    again.close()
    assert replay(open_store(disk).recover()) == 400


def test_stale_bytes_in_a_spare_never_become_part_of_the_log() -> None:
    disk = MemoryDisk()
    writer = Writer(disk)
    for _ in range(5):
        writer.append(3)
        writer.sync()
    disk.locked.clear()
    name = segment.newest_names(disk.names(f"{ROOT}/wal"))[0][-1]
    old, spare = disk.inode(f"{ROOT}/wal/{name}"), disk.inode(f"{ROOT}/wal/{segment.SPARE}")
    spare.data[:] = spare.disk[:] = old.data  # a start died here; then the log was cut shorter
    rebuild.repair(open_store(disk).place, 6, 1)
    disk.locked.clear()
    assert Writer(disk, 6, 6).recovered == 6
    disk.locked.clear()
    assert Writer(disk, 6, 6).recovered == 6


def test_a_frame_of_another_past_does_not_follow() -> None:
    chain, other = Chain(1, 1), Chain(1, 1, crc=5)
    first = chain.encode(b"one", 1, 0, 1)
    data = memoryview(bytes(segment.BLOCK_BYTES) + first + other.encode(b"two", 2, 1, 1))
    found = [head.first_lsn for _, head in segment.frames(data, Link(1, 0), 1)]
    assert found == [1]


def test_the_name_of_a_new_segment_is_durable_although_there_is_no_room_for_a_spare() -> None:
    disk = MemoryDisk()
    writer = Writer(disk, segment_bytes=SMALL)
    disk.capacity = disk.capacity - disk.free_bytes(ROOT)
    while len(segment.newest_names(disk.names(f"{ROOT}/wal"))[0]) == 1:  # Bound: a segment is full
        writer.append(3)
    writer.sync()
    assert not writer.wal.has_spare
    left = disk.crash(random.Random(1), keep=0.0)
    left.capacity = 1 << 40
    assert replay(open_store(left).recover()) == writer.acked


def test_a_new_reign_writes_into_no_file_of_an_older_one() -> None:
    disk = long_log().disk
    disk.locked.clear()
    old = {f"{ROOT}/wal/{name}" for name in segment.newest_names(disk.names(f"{ROOT}/wal"))[0]}
    written: set[str] = set()
    disk.watch = lambda kind, path: written.add(path) if kind == "write" else None
    last = disk.names(f"{ROOT}/wal")
    assert last
    later = Writer(disk, 0, 1_000, segment_bytes=SMALL)
    later.append(1)
    later.sync()
    assert written
    assert not written & old


def test_a_torn_tail_that_was_cut_off_is_kept_in_quarantine() -> None:
    disk = MemoryDisk(seed=1)
    writer = Writer(disk)
    writer.append(3)
    for name, found in segments_of(disk):
        found.data[-600:-560] = b"x" * 40
        disk = disk.clone()
        Writer(disk, 0, 3)
        assert [one.partition(".torn-")[0] for one in disk.names(f"{ROOT}/quarantine")] == [name]


def segments_of(disk: MemoryDisk) -> list[tuple[str, Inode]]:
    names, _ = segment.newest_names(disk.names(f"{ROOT}/wal"))
    return [(str(name), disk.inode(f"{ROOT}/wal/{name}")) for name in names]


def test_an_orderly_end_is_still_known_after_a_power_cut() -> None:
    disk = MemoryDisk(seed=1)
    writer = Writer(disk)
    writer.append(3)
    writer.close()
    assert open_store(disk.crash(random.Random(1), 0.0)).recover().clean


def test_a_power_cut_while_the_log_is_closed_is_never_taken_for_damage() -> None:
    for length in range(8, 520, 8):  # wherever the two markers lie to the sectors
        disk = MemoryDisk(seed=length)
        wal = Writer(disk).wal
        wal.append(b"x" * length, 1)
        wal.sync()
        wal.mark_idle()
        left: list[MemoryDisk] = []

        def cut(kind: str, _: str, disk: MemoryDisk = disk, left: list[MemoryDisk] = left) -> None:
            if kind == "sync":
                left.extend(disk.crash(random.Random(seed), 0.5) for seed in range(6))

        disk.watch = cut
        wal.mark_idle(closed=True)
        for one in left:
            assert open_store(one).recover().last_lsn == 1
