"""What a task gained by its journals, as one digest, so that progress is told from repetition.

Read next: `blobs.py`, which adds the newest checkpoint to it (`mark`).
"""

import json
from _blake2 import blake2b
from typing import Any

from ckptd.storage.facts import Standing
from ckptd.storage.journal import read
from ckptd.storage.untrusted import Damaged, NotTrusted, is_passing


class Gain(Standing):
    """Folds everything gained into one digest, in 100 bytes a key, whatever the order it came in.

    Invariant: equal what is known, equal digest: saying the same again is no progress.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[bytes, int] = {}
        self._sum = 0

    def gained(self, kind: str, key: str, value: Any) -> None:
        """Replace the key's share of the sum."""
        name = f"{kind}:{key}".encode(errors="surrogatepass")
        slot = blake2b(name, digest_size=16).digest()
        self._sum ^= self._known.pop(slot, 0)
        if value is not None:
            share = blake2b(slot + json.dumps(value, sort_keys=True).encode())
            self._known[slot] = int.from_bytes(share.digest()[:16], "big")
            self._sum ^= self._known[slot]

    def digest(self) -> str:
        """Return the sum as text, empty where nothing was gained."""
        return f"{self._sum:032x}" if self._known else ""


def read_gain(task_dir: str, task: int, owner_uid: int, attempt_max: int) -> Gain:
    """Return what journals hold up to an attempt; damage is told as its `problem`."""
    gain = Gain()
    try:
        for attempt, fact in read(task_dir, task, owner_uid, attempt_max):
            gain.take(attempt, fact)
    except (Damaged, NotTrusted, OSError) as error:
        if is_passing(error):
            raise
        gain.problem = gain.problem or str(error)
    return gain
