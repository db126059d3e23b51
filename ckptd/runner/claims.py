"""The daemon's side of the start fence: its reign, its record files, and claims of its own.

Read next: `attempt.py`, where the files are described.
"""

import contextlib
import os

from ckptd.runner import attempt
from ckptd.runner.attempt import Found, Holder, Record


class Claims:
    """The records of all attempts. Making one begins a reign: older orders are revoked."""

    def __init__(self, state_dir: str, boot_id: str) -> None:
        self._directory = f"{state_dir}/attempts"
        os.makedirs(self._directory, 0o700, exist_ok=True)
        self.home = attempt.home_of(self._directory)
        self._mine = Holder(boot_id, os.getpid(), ticks=0)
        self._free: list[int] = []  # record files that no attempt uses
        self._refused: dict[tuple[int, int], int] = {}  # record files of our own claims
        self._made = 0
        self.reign = os.urandom(8).hex()
        attempt.begin_reign(self._directory, self.reign)

    def take_spare(self) -> int:
        """Return the number of a record file for a supervisor to use."""
        if self._free:
            return self._free.pop()
        self._made += 1
        return self._made

    def give_back(self, spare: int) -> None:
        """Take back a record file whose attempt is forgotten, or never was."""
        self._free.append(spare)

    def refuse(self, task: int, number: int) -> None:
        """Claim an attempt, if nobody has it, so that nobody ever runs it.

        On a full disk that may fail; then the end of this reign revokes the order.
        """
        spare = self.take_spare()
        place = self._place(task, number)
        is_taken = False
        with contextlib.suppress(OSError):
            name = f"{self.reign}.{spare}"
            record = Record(self._directory, place, name, self._mine.claim)
            with contextlib.closing(record):
                is_taken = record.take()
        if is_taken:
            self._refused[task, number] = spare
        else:
            self.give_back(spare)

    def read(self, task: int, number: int) -> Found | None:
        """Return what is known of an attempt; None where nobody has claimed it.

        Raises:
            OSError: it cannot be read now.
        """
        return attempt.read(self._place(task, number))

    def forget(self, task: int, number: int, spare: int = -1) -> None:
        """Drop an attempt's record, and take back its record file (-1: it is not of this reign).

        Durable: nothing; one that comes back after a power loss is dropped again.
        """
        spares = [spare, self._refused.pop((task, number), -1)]
        try:
            attempt.forget(self._place(task, number))
        except OSError:  # the file still is an attempt's: it is not used again
            return
        for one in spares:
            if one >= 0:
                self.give_back(one)

    def _place(self, task: int, number: int) -> str:
        return attempt.place_of(self._directory, task, number)
