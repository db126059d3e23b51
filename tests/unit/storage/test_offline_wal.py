"""The offline tool on a real directory, verb by verb."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ckptd.core.records import AnyRecord, DaemonStarted, DaemonStopped, EnvStored, GroupChanged
from ckptd.daemon.offline_wal import main
from ckptd.protocol.errors import Corrupt
from ckptd.storage.store import Store


def encode(records: list[AnyRecord]) -> bytes:
    return msgspec.msgpack.encode(records)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    root = tmp_path / "state"
    store = Store.open(str(root))
    wal = store.arm(store.recover(), epoch=1, boot_id="b", at_ns=1)
    wal.append(encode([DaemonStarted(5, 1, "b", "0.1", 42, clean=True)]), 1)
    for n in range(20):
        group = GroupChanged(f"g{n}", n + 1, paused=False)
        wal.append(encode([group, EnvStored(bytes([n]) * 4, b"\x80")]), 2)
        wal.sync()
    wal.append(encode([DaemonStopped(9)]), 1)
    wal.mark_idle(closed=True)
    store.close()
    return root


def segment_of(state: Path) -> Path:
    return next((state / "wal").glob("*.wal"))


def flip(path: Path, byte: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_whole_log_is_verified_dumped_and_replayed(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "verify", "--state", state)
    assert (code, out) == (0, "a start works, up to LSN 42\n")
    code, out, _ = run(capsys, "status", "--state", state, "--json")
    assert code == 0
    assert json.loads(out)["last_lsn"] == 42
    assert json.loads(out)["is_clean"] is True
    code, out, _ = run(capsys, "replay", "--state", state, "-o", "json")
    assert code == 0
    assert json.loads(out)["schema"] == "ckptd.wal.replay/1"
    assert json.loads(out)["records"] == 42
    code, out, _ = run(capsys, "dump", "--state", state, "--since", 3, "--limit", 2)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["lsn"], row["record"]) for row in rows] == [(4, "GroupChanged"), (5, "EnvStored")]
    assert rows[0]["name"] == "g1"


def test_reading_verbs_change_nothing(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(segment_of(state), 4200, 3)
    before = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    for verb in ("status", "verify", "dump", "replay"):
        assert run(capsys, verb, "--state", state)[0] == 65
    assert before == {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_reading_verbs_work_where_nothing_can_be_written(state: Path) -> None:
    here = shlex.quote(str(state))
    mounts = f"mount --bind {here} {here} && mount -o remount,bind,ro {here}"
    for verb in ("status", "verify", "dump", "replay"):
        look = f"{sys.executable} -m ckptd.daemon.offline_wal {verb} --state {here}"
        command = ["unshare", "--mount", "sh", "-c", f"{mounts} && exec {look}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")


def test_reading_verbs_make_no_lock_in_a_copy_that_has_none(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (state / "LOCK").unlink()
    for verb in ("status", "verify", "dump", "replay"):
        assert run(capsys, verb, "--state", state)[0] == 0
    assert not (state / "LOCK").exists()


def test_a_flipped_bit_is_named(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(segment_of(state), 4300, 6)
    code, out, _ = run(capsys, "verify", "--state", state)
    assert code == 65
    assert "bit 6 of byte 4300 is flipped" in out
    assert "a start is refused" in out
    assert f"ckptctl wal repair --state {state} --truncate-after 5" in out
    assert f"ckptctl wal salvage --state {state}" in out


def test_a_log_that_only_a_later_version_can_read_is_no_start_that_works(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store.open(str(state))
    wal = store.arm(store.recover(), epoch=2, boot_id="b", at_ns=1)
    wal.append(msgspec.msgpack.encode([["Unheard", 1]]), 1)
    wal.sync()
    store.close()
    code, out, _ = run(capsys, "verify", "--state", state)
    assert code == 65
    assert "a start is refused: a log frame checks but cannot be read" in out
    assert "written by a newer ckptd" in out
    assert "salvage" not in out
    assert "nothing is damaged" in run(capsys, "salvage", "--state", state)[1]


def test_salvage_and_repair_bring_a_damaged_log_back(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = segment_of(state).read_bytes()
    flip(segment_of(state), 4300, 6)
    damaged = segment_of(state)
    code, out, _ = run(capsys, "salvage", "--state", state, "--json")
    assert code == 0
    [lost] = json.loads(out)["lost"]
    assert lost[1] - lost[0] == 1
    kept = Path(json.loads(out)["kept_in"]) / damaged.name
    assert sum(a != b for a, b in zip(kept.read_bytes(), before, strict=True)) == 1
    assert run(capsys, "verify", "--state", state)[0] == 0
    code, out, _ = run(capsys, "dump", "--state", state)
    assert any("lost" in json.loads(line) for line in out.splitlines())
    code, out, _ = run(capsys, "repair", "--state", state, "--truncate-after", 21)
    assert code == 0
    assert "the log ends at LSN 21" in out
    assert json.loads(run(capsys, "status", "--state", state, "--json")[1])["last_lsn"] == 21


def test_salvage_makes_a_lost_format_anew(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (state / "FORMAT").unlink()
    assert run(capsys, "verify", "--state", state)[0] == 65
    code, out, err = run(capsys, "salvage", "--state", state)
    assert (code, out) == (0, "nothing else is damaged, only FORMAT was changed\n")
    assert "FORMAT is missing; made anew" in err
    assert run(capsys, "verify", "--state", state)[0] == 0
    code, out, err = run(capsys, "salvage", "--state", state)
    assert (code, out, err) == (0, "nothing is damaged, nothing was changed\n", "")


def test_an_option_that_a_verb_has_not_names_the_help_of_that_verb(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "repair", "--state", state, "--truncate-after", 3, "-y")
    assert code == 64
    assert err == "ckptctl: unrecognized arguments: -y\n  hint: see: ckptctl wal repair -h\n"


def test_a_copy_without_its_empty_snap_is_read_and_starts(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (state / "snap").rmdir()
    for verb in ("status", "verify", "dump", "replay"):
        assert run(capsys, verb, "--state", state)[0] == 0
    assert not (state / "snap").exists()  # they only read
    store = Store.open(str(state))
    store.arm(store.recover(), epoch=2, boot_id="b", at_ns=1)
    store.close()
    assert (state / "snap").stat().st_mode & 0o777 == 0o700


def test_a_log_that_needs_its_lost_snapshot_is_damaged_and_can_be_salvaged(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store.open(str(state), segment_bytes=1 << 20)
    wal = store.arm(store.recover(), epoch=2, boot_id="b", at_ns=1)
    for n in range(3):  # more than a segment
        wal.append(encode([EnvStored(bytes([n]), msgspec.msgpack.encode("x" * 600_000))]), 1)
        wal.sync()
    store.close()
    min((state / "wal").glob("*.wal")).unlink()
    (state / "snap").rmdir()
    for verb in ("status", "verify", "dump", "replay"):
        code, out, err = run(capsys, verb, "--state", state)
        assert code == 65
        assert f"{state}/snap is missing, and the log begins only at LSN" in out + err
    assert run(capsys, "salvage", "--state", state)[0] == 0
    assert run(capsys, "verify", "--state", state)[0] == 0


def test_a_log_that_is_gone_is_told_alike_by_all_and_never_made_anew(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(state / "wal")
    for verb in ("status", "verify", "dump", "replay", "salvage"):
        code, _, err = run(capsys, verb, "--state", state)
        assert (code, err.partition("\n")[0]) == (
            65,
            f"ckptctl: {state}/wal is missing, the log is gone",
        )
    with pytest.raises(Corrupt, match="the log is gone"):
        Store.open(str(state))
    assert not (state / "wal").exists()


def test_a_running_daemon_a_wrong_directory_and_a_wrong_word_have_their_own_codes(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store.open(str(state))
    assert run(capsys, "verify", "--state", state)[0] == 2
    store.close()
    assert run(capsys, "verify", "--state", tmp_path)[0] == 78
    assert not (tmp_path / "LOCK").exists()
    for words in (["verify"], ["mend", "--state", "x"], ["repair", "--state", "x"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 64
        said = capsys.readouterr().err
        assert said.startswith("ckptctl: ")
        assert "\n  hint: see: ckptctl wal" in said
