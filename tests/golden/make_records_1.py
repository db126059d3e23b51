"""One example of every log record of format 1, and how `records_1.txt` was made from them.

Run once for the release; the file then stays for ever, and every later version must read it.
"""

from pathlib import Path

import msgspec

from ckptd.core.port import Identity
from ckptd.core.records import (
    Answered,
    AnyRecord,
    CheckpointAsked,
    DaemonStarted,
    DaemonStopped,
    Edited,
    Ended,
    EnvStored,
    FreezeIntent,
    GroupChanged,
    GroupRemoved,
    Marked,
    Moved,
    Need,
    Phase,
    Removed,
    Reset,
    SignalIntent,
    Spec,
    Started,
    StartIntent,
    StopIntent,
    Submitted,
    Verdict,
)

AT = 1_760_000_000_000_000_000
SPEC = msgspec.Raw(
    msgspec.msgpack.Encoder(order="sorted").encode(
        Spec(("sh", "-c", "true"), cwd="/w", name="sh", gid=7, labels={"a": "b"}, timeout_s=1.5)
    )
)
RECORDS: list[AnyRecord] = [
    DaemonStarted(AT, 3, "0b9c", "0.1.0", 99, clean=False),
    DaemonStopped(AT),
    Answered("r-1", 1000, b'{"ids":[1]}'),
    EnvStored(b"0123456789abcdef", b"\x81\xa1A\xa1B"),
    Submitted(
        1, AT, 1000, "default", -5, b"0123456789abcdef", Phase.WAITING, "after", AT + 1, AT + 2,
        "key", (Need(1, "ok"),), SPEC,
    ),
    Edited(1, AT, "g", 9, 0, SPEC),
    Moved(1, AT, Phase.HELD, "why", 5),
    Reset(1, AT, fresh=True),
    Removed(1, AT),
    StartIntent(1, 2, AT),
    Started(1, 2, AT, Identity("0b9c", 10, 20), 11, 7, "warned"),
    StopIntent(1, 2, AT, "cancel", 1, AT + 1, 10.0, 1000),
    SignalIntent(1, 2, AT, 10, True, 1000),
    FreezeIntent(1, 2, AT, True),
    CheckpointAsked(1, 2, AT, 3),
    Marked(1, 2, AT, 8, AT, "cafe"),
    Ended(
        1, 2, AT, "signal", 0, 9, False, AT, AT + 1, 0.5, 4096, 1.5, "cafe", "text",
        Verdict(Phase.WAITING, "backoff", AT + 9, 1, 2, 3, 4, 5),
    ),
    GroupChanged("g", 3, paused=True, by_person=True),
    GroupRemoved("g"),
]  # fmt: skip
FILE = Path(__file__).parent / "records_1.txt"


def encoded() -> list[str]:
    """Return each record as the log holds it, in hexadecimal."""
    return [msgspec.msgpack.encode(record).hex() for record in RECORDS]


if __name__ == "__main__":
    FILE.write_text("\n".join(encoded()) + "\n")
