"""Log records, and fields of them, that were appended since `records_1.txt`: still format 1.

Run once for the release; the file then stays for ever, and every later version must read it.
"""

from pathlib import Path

import msgspec

from ckptd.core.port import Identity
from ckptd.core.records import (
    AnyRecord,
    CheckpointsDropped,
    Ended,
    Marked,
    Phase,
    Spec,
    Started,
    Submitted,
    Verdict,
)

AT = 1_770_000_000_000_000_000
SPEC = msgspec.Raw(
    msgspec.msgpack.Encoder(order="sorted").encode(
        Spec(
            ("make",), memory_bytes=2 << 30, cpus=1.5, tasks_max=100, io_weight=50, nice=10,
            on_oom="retry:x2,max=16G",
        )
    )
)  # fmt: skip
RECORDS: list[AnyRecord] = [
    Submitted(
        1, AT, 1000, "default", 0, b"", Phase.QUEUED, "", 0, 0, "", (), SPEC,
    ),
    Started(
        1, 2, AT, Identity("0b9c", 1, 20), 11, 7, "", "0123456789abcdef0123456789abcdef",
    ),
    Ended(
        1, 2, AT, "oom", 137, 9, False, AT, AT + 1, 0.5, 4096, 1.5, "cafe", "text",
        Verdict(Phase.QUEUED, "oom", 0, 1, 2, 3, 4, 5), "limit", 4 << 30,
    ),
    CheckpointsDropped(1, AT),
    Marked(1, 2, AT, 8, AT, "cafe", True),
]  # fmt: skip
FILE = Path(__file__).parent / "records_1_appended.txt"


def encoded() -> list[str]:
    """Return each record as the log holds it, in hexadecimal."""
    return [msgspec.msgpack.encode(record).hex() for record in RECORDS]


if __name__ == "__main__":
    FILE.write_text("\n".join(encoded()) + "\n")
