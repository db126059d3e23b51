"""A delay lock of logind: the machine's shutdown waits a moment while tasks begin to save.

A bonus, not the guarantee: logind waits InhibitDelayMaxSec= (5 s) at most and then goes on. What
takes longer is done by ckptd-drain.service, which the shutdown waits for. Without logind, or in
the moments when the bus is away, there is no lock and nothing is lost but the head start.
Source: org.freedesktop.login1(5), Inhibit and PrepareForShutdown. Read next: `ending.py`.
"""

import os
from collections.abc import Callable
from typing import Final

from ckptd.daemon.ending import Ending

ASK_AGAIN_NS: Final = 10_000_000_000

Inhibit = Callable[[Callable[[int], None]], None]
"""Asks for a lock; hands its descriptor over later, or -1."""


class Inhibitor:
    """Holds the lock from the start until every task of an announced shutdown has ended."""

    def __init__(self, ending: Ending) -> None:
        self._ending = ending
        self.inhibit: Inhibit | None = None  # None: there is nobody to ask
        self._fd = -1
        self._due_ns = 0
        self._is_coming = False
        ending.on_drained = self.release

    @property
    def is_held(self) -> bool:
        """Tell whether a shutdown would wait for us."""
        return self._fd >= 0

    def announced(self, is_coming: bool) -> None:  # noqa: FBT001 - as the signal has it
        """Take PrepareForShutdown: it begins, or it was called off."""
        self._is_coming = is_coming
        self._ending.announced(is_coming=is_coming)
        if not is_coming:
            self._due_ns = 0  # the next one is to wait for us, too

    def keep(self, mono_ns: int) -> None:
        """Ask for the lock where it is missing. Cheap: called in every turn."""
        if self.inhibit is None or self.is_held or self._is_coming or mono_ns < self._due_ns:
            return
        self._due_ns = mono_ns + ASK_AGAIN_NS
        self.inhibit(self._taken)

    def release(self) -> None:
        """Let the shutdown go on."""
        if self.is_held:
            os.close(self._fd)
            self._fd = -1

    def _taken(self, fd: int) -> None:
        if self.is_held or self._is_coming:  # too late, or asked for twice
            if fd >= 0:
                os.close(fd)
            return
        self._fd = fd
