"""Run inside a booted machine while no daemon runs: append COUNT small records to its log.

fill_log.py STATE_DIR COUNT
"""

import sys

from ckptd.core.records import GroupChanged
from ckptd.daemon.engine import Engine
from ckptd.daemon.policy import policy_of
from ckptd.daemon.recovery import replay
from ckptd.host.clock import boot_id
from ckptd.host.config import Config
from ckptd.storage.disk import RealDisk
from ckptd.storage.store import Store

PER_FRAME = 50_000


def main(directory: str, count: int) -> None:
    """Write them by the daemon's own engine, as a reign of its own."""
    store = Store.open(directory, RealDisk())
    found = store.recover()
    state = replay(found.chunks(), found.frames()).state
    wal = store.arm(found, epoch=max(found.epoch, state.epoch) + 1, boot_id=boot_id(), at_ns=1)
    engine = Engine(state, wal, policy_of(Config()))
    for start in range(0, count, PER_FRAME):
        numbers = range(start, min(count, start + PER_FRAME))
        engine.stage(GroupChanged("default", number % 7, paused=False) for number in numbers)
        engine.commit()
        engine.orders()
        wal.prepare_spare()
    wal.mark_idle(closed=True)
    wal.close()
    store.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
