"""The bytes of every format ever released stay readable, and this version writes the newest."""

import shutil
from pathlib import Path

from ckptd.storage.store import Store
from tests.golden.make_format_1 import PAYLOADS, make

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def test_format_1_is_still_written_byte_for_byte() -> None:
    kept = GOLDEN / "format_1"
    files = {p.relative_to(kept).as_posix(): p.read_bytes() for p in kept.rglob("*") if p.is_file()}
    assert make() == files


def test_format_1_is_still_read(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "format_1", tmp_path / "state")
    for name in ("quarantine", "wal", "snap"):
        (tmp_path / "state" / name).mkdir(exist_ok=True)
    store = Store.open(f"{tmp_path}/state", create=False)
    recovery = store.recover()
    assert recovery.clean
    assert (recovery.snapshot_lsn, recovery.last_lsn, recovery.epoch) == (45, 48, 7)
    assert list(recovery.chunks()) == [b"chunk 0", bytes(range(100))]
    assert [one.payload for one in recovery.frames()] == [b"after the snapshot"]
    wal = store.arm(recovery, epoch=8, boot_id="b", at_ns=1)
    assert [one.payload for one in wal.read(0, 1 << 20)][:20] == [p for p, _ in PAYLOADS] * 5
    store.close()
