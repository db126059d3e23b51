"""Whether this store is a copy of one whose units still run: `ckptd/runner/original.py` for units.

Asked of the kernel, not of the service manager: every process tells the unit it is in, and at this
moment of a start there is no bus yet. Read next: `recorder.py`, where a record's name is described.
"""

import contextlib
import os
from collections.abc import Iterator

from ckptd.protocol.ids import unit_name
from ckptd.runner import identity
from ckptd.runner.original import Key, Living
from ckptd.units import recorder


def living_unit(state_dir: str, boot_id: str) -> Living | None:
    """Return an attempt that the original still runs as a unit, None where there is none.

    What the log knows and `units/` does not is left to `Records`: a record may also have been
    removed by somebody.
    """
    directory = f"{state_dir}/units"
    foreign = {unit_name(*key): key for key in _foreign(directory, boot_id)}
    if not foreign:
        return None
    units = ((pid, unit) for pid in identity.every_pid() for unit in _units_of(pid))
    return min(
        (Living(*foreign[unit], pid) for pid, unit in units if unit in foreign), default=None
    )


def _foreign(directory: str, boot_id: str) -> Iterator[Key]:
    """Yield what was copied here of this boot, and has no end in the copy."""
    with contextlib.suppress(OSError):
        home = recorder.home_of(directory)
        for name in os.listdir(directory):
            key = recorder.key_of(name)
            is_ours = recorder.is_made_in(name, home)
            if key is None or is_ours or not recorder.is_of_boot(name, boot_id):
                continue
            if not _is_over(f"{directory}/{name}"):
                yield key


def _is_over(path: str) -> bool:
    with contextlib.suppress(OSError):
        record = recorder.parsed(*recorder.read(path))
        return record.is_refused or record.stopped is not None
    return False


def _units_of(pid: int) -> set[str]:
    """Return the names in the paths of its control groups: slices, units and what is in them."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
        return {name for line in file for name in line.rstrip("\n").split("/")}
    return set()
