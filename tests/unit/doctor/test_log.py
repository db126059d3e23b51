"""The doctor and the log: what a start would make of it, told before the start and unchanged."""

import json
from pathlib import Path
from zlib import crc32

import msgspec
import pytest

from ckptd.core.records import AnyRecord, DaemonStarted, GroupChanged
from ckptd.doctor import contact, disk, log
from ckptd.doctor.finding import Finding
from ckptd.doctor.place import find
from ckptd.storage import segment, store
from ckptd.storage.disk import RealDisk
from ckptd.storage.segment import BLOCK_BYTES, Name
from ckptd.storage.store import Store
from tests.daemon_fixture import LiveDaemon
from tests.unit.doctor.test_doctor import examine


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The configuration of a daemon that wrote some records, made a snapshot, and ended."""
    path = tmp_path / "ckptd.toml"
    path.write_text(f'[daemon]\nstate_dir = "{tmp_path}/state"\nrun_dir = "{tmp_path}/run"\n')
    opened = Store.open(f"{tmp_path}/state", segment_bytes=1 << 20)
    wal = opened.arm(opened.recover(), epoch=1, boot_id="b", at_ns=1)
    wal.append(packed([DaemonStarted(5, 1, "b", "0.1", 42, clean=True)]), 1)
    for number in range(20):
        wal.append(packed([GroupChanged(f"g{number}", number + 1, paused=False)]), 1)
        wal.sync()
    opened.close()
    return path


def packed(records: list[AnyRecord]) -> bytes:
    return msgspec.msgpack.encode(records)


def found(config: Path) -> dict[str, Finding]:
    place = find(str(config), "")
    return {each.name: each for check in (contact.daemon, disk.log) for each in check(place)}


def segments(config: Path) -> list[Path]:
    return sorted((config.parent / "state" / "wal").glob("*.wal"))


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x40
    path.write_bytes(data)


def test_a_log_that_a_start_reads_is_well_and_left_as_it_is(config: Path) -> None:
    before = {path: path.read_bytes() for path in config.parent.rglob("*") if path.is_file()}
    told = found(config)
    assert told["log"] == Finding("log", "ok", "a start reads it, up to LSN 21 (1 MiB)")
    assert told["daemon"].advice == "start it: ckptd"
    assert before == {path: path.read_bytes() for path in before}


def test_a_damaged_log_is_not_fit_and_nobody_is_told_to_start_a_daemon_on_it(config: Path) -> None:
    flip(segments(config)[0], BLOCK_BYTES + 200)
    before = segments(config)[0].read_bytes()
    code, told = examine("--config", str(config))
    assert (code, told["log"]["level"]) == (1, "bad")
    assert told["log"]["text"].startswith("a start ends with exit 65: ")
    assert told["log"]["advice"] == f"ckptctl wal verify --state {config.parent}/state"
    assert "mend the log first" in told["daemon"]["advice"]
    assert segments(config)[0].read_bytes() == before


def test_a_torn_tail_is_told_as_what_a_start_cuts_off(config: Path) -> None:
    [path] = segments(config)
    data = bytearray(path.read_bytes())
    end = len(bytes(data).rstrip(b"\0"))
    data[end + 8 : end + 16] = b"tornhere"
    path.write_bytes(data)
    told = found(config)["log"]
    assert told.level == "ok"
    assert "were never acknowledged" in told.text


def test_a_log_of_a_later_format_is_told_as_that_and_not_as_damage(config: Path) -> None:
    path = config.parent / "state" / "FORMAT"
    data = store.encode_format(bytes.fromhex(json.loads(path.read_text())["store"]))
    path.write_bytes(later(data))
    told = found(config)["log"]
    assert (told.level, "written by a newer ckptd: format 9" in told.text) == ("bad", True)
    assert told.text.startswith("a start ends with exit 78: ")
    assert "run the version that wrote it" in told.advice


def later(data: bytes) -> bytes:
    """Return a FORMAT as ckptd of format 9 would write it."""
    body = data.partition(b',"crc32":"')[0]
    body = body.replace(b'"format":1,"min_reader":1', b'"format":9,"min_reader":9')
    return body + f',"crc32":"{crc32(body):08x}"}}\n'.encode()


def test_a_record_of_a_later_version_is_told_as_that(config: Path) -> None:
    opened = Store.open(f"{config.parent}/state", segment_bytes=1 << 20)
    wal = opened.arm(opened.recover(), epoch=2, boot_id="b", at_ns=1)
    wal.append(msgspec.msgpack.encode([["WorldMoved", 1]]), 1)
    wal.sync()
    opened.close()
    told = found(config)["log"]
    assert told.text.startswith("a start ends with exit 65: a log frame checks but cannot be read")
    assert told.advice == "it was written by a newer ckptd: upgrade, or see FORMAT.md"


def test_a_damaged_snapshot_that_a_start_does_without_is_to_be_looked_at(config: Path) -> None:
    (config.parent / "state" / "snap" / f"{10:020d}.snap").write_bytes(b"x" * 8192)
    told = found(config)["log"]
    assert (told.level, told.advice[:18]) == ("warn", "ckptctl wal verify")
    assert "up to LSN 21" in told.text
    assert "snapshot 10 is damaged" in told.text


def test_the_bound_is_of_what_a_start_reads_the_newest_snapshot_and_the_log_behind_it(
    tmp_path: Path,
) -> None:
    for name, size in {
        f"wal/{Name(1, 1)}": 1, f"wal/{Name(100, 1)}": 10, f"wal/{Name(100, 2)}": 100,
        f"wal/{Name(200, 2)}": 1_000, "wal/spare.tmp": 5,
        f"snap/{90:020d}.snap": 7, f"snap/{150:020d}.snap": 10_000,
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert log._bytes_of_a_start(segment.Place(RealDisk(), str(tmp_path), b"")) == 11_100


def test_a_log_that_takes_long_to_read_is_said_to_be_unread(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "READ_BYTES_MAX", (1 << 20) - 1)
    flip(segments(config)[0], BLOCK_BYTES + 200)
    told = found(config)["log"]
    assert (told.level, told.text) == ("warn", "not looked at: a start reads 1 MiB of it")
    assert told.advice.startswith("ckptctl wal verify")


def test_of_a_log_that_takes_long_to_replay_the_bytes_are_checked(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "REPLAY_BYTES_MAX", (1 << 20) - 1)
    told = found(config)["log"]
    assert (told.level, told.text.partition("(1 MiB; ")[2][:7]) == ("ok", "checked")
    flip(segments(config)[0], BLOCK_BYTES + 200)
    assert found(config)["log"].level == "bad"


def test_the_log_of_a_daemon_that_runs_is_its_own_business(
    daemon: LiveDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_seen", lambda _: pytest.fail("it was read"))
    assert "log" not in found(daemon.config)
    socket = daemon.run / "ctl.sock"
    socket.unlink()  # it answers nobody, and still holds the lock
    assert "log" not in found(daemon.config)


def test_where_nothing_was_ever_stored_there_is_no_log_to_look_at(tmp_path: Path) -> None:
    path = tmp_path / "ckptd.toml"
    path.write_text(f'[daemon]\nstate_dir = "{tmp_path}/state"\nrun_dir = "{tmp_path}/run"\n')
    assert "log" not in found(path)
    (tmp_path / "state").mkdir()
    assert "log" not in found(path)
