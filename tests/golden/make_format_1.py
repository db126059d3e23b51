"""Write the bytes of format 1 that are kept for ever: `python -m tests.golden.make_format_1 DIR`.

Run once, when the format was released. A later format gets a script and a directory of its own;
what is in `format_1` never changes.
"""

import sys
from pathlib import Path

from ckptd.storage import segment, snapshot
from ckptd.storage.store import Store
from tests.fakes.memory_disk import MemoryDisk

SEGMENT_BYTES = 4096 + 1024
BOOT_ID = "01234567-89ab-cdef-0123-456789abcdef"
AT_NS = 1_700_000_000_000_000_000
PAYLOADS = ((b"first", 1), (b"second and third", 2), (b"x", 1), (b"\x00\xff" * 40, 5))


def make() -> dict[str, bytes]:
    """Return the files of a small store: FORMAT, a log of two segments, a snapshot."""
    disk = MemoryDisk(seed=2024)
    store = Store.open("/s", disk, segment_bytes=SEGMENT_BYTES, has_threads=False)
    wal = store.arm(store.recover(), epoch=7, boot_id=BOOT_ID, at_ns=AT_NS)
    for _ in range(5):
        for payload, count in PAYLOADS:
            wal.append(payload, count)
        wal.sync()
    wal.mark_idle()
    writer = store.begin_snapshot(wal.durable_lsn)
    writer.add(b"chunk 0")
    writer.add(bytes(range(100)))
    writer.finish()
    writer.poll()
    wal.append(b"after the snapshot", 3)
    wal.mark_idle(closed=True)
    files = {"FORMAT": bytes(disk.inode("/s/FORMAT").data)}
    for name in segment.newest_names(disk.names("/s/wal"))[0]:
        files[f"wal/{name}"] = bytes(disk.inode(f"/s/wal/{name}").data)
    for lsn in snapshot.listed(disk, "/s/snap"):
        name = snapshot.name_of(lsn)
        files[f"snap/{name}"] = bytes(disk.inode(f"/s/snap/{name}").data)
    return files


if __name__ == "__main__":
    for path, data in make().items():
        target = Path(sys.argv[1]) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
