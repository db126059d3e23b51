"""Whether this store is a copy of one whose attempts still run on this machine.

A backup that is restored beside the running original has its claims, and the pids in them live. A
daemon that took them for its own would follow, stop and kill what another store's tasks are, and
run them a second time. So it asks here before it changes anything, and does not start.
The same for units is `ckptd/units/original.py`.
Read next: `attempt.py`, where a claim is described.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ckptd.core.port import Identity
from ckptd.protocol.ids import parse_attempt_name
from ckptd.runner import attempt, identity
from ckptd.runner.instance import Began, began_of

Key = tuple[int, int]


class Living(NamedTuple):
    """An attempt of the original that still runs."""

    task: int
    attempt: int
    pid: int


def living(
    state_dir: str, boot_id: str, started: Mapping[Key, tuple[Identity, int]]
) -> Living | None:
    """Return an attempt that the original still runs, None where this store is nobody's copy.

    `started`: supervisor and main process of the attempts that run by the log. The log may know of
    one whose record is not there, as a copy that is made under a running daemon is of no moment.
    What cannot be read says nothing.
    """
    directory = f"{state_dir}/attempts"
    claimed = _claimed(directory)
    found = [one for key in claimed for one in _by_claim(directory, boot_id, key)]
    for key in started.keys() - claimed:
        found += _by_log(boot_id, key, *started[key])
    return min(found, default=None)


def runs(claim: Began, start: Began | None) -> bool:
    """Tell whether the attempt goes on. Its supervisor may long be at the next one."""
    if start is None:
        return identity.is_alive(claim.shim_pid, claim.shim_ticks)
    return identity.is_alive(start.pid, start.ticks)


def _claimed(directory: str) -> set[Key]:
    with contextlib.suppress(OSError):
        return {key for name in os.listdir(directory) if (key := parse_attempt_name(name))}
    return set()


def _by_claim(directory: str, boot_id: str, key: Key) -> Iterator[Living]:
    with contextlib.suppress(OSError):
        found = attempt.read(attempt.place_of(directory, *key))
        claim = began_of(found.claim) if found and found.exit is None else None
        if claim is None or claim.is_refusal or claim.boot_id != boot_id:
            return
        start = began_of(found.start) if found else None
        if not claim.is_of(attempt.home_of(directory)) and runs(claim, start):
            yield Living(*key, start.pid if start else claim.shim_pid)


def _by_log(boot_id: str, key: Key, shim: Identity, pid: int) -> Iterator[Living]:
    with contextlib.suppress(OSError):
        stat = identity.look(pid) if shim.boot_id == boot_id and shim.ticks else None
        is_its_child = stat is not None and stat.is_alive and stat.parent == shim.pid
        if is_its_child and identity.is_alive(shim.pid, shim.ticks):
            yield Living(*key, pid)
