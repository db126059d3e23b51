"""What systemd is told: READY, STATUS, RELOADING, STOPPING, EXTEND_TIMEOUT_USEC, WATCHDOG, FDSTORE.

Without systemd every call is a cheap no-op. The variables are consumed: no child of the daemon
may ever speak to our manager in our name. Lost messages are counted, never waited for.
Source: sd_notify(3), sd_watchdog_enabled(3). Read next: `systemd/ckptd.service`.
"""

import os
import socket
from collections.abc import MutableMapping

import sdnotify

from ckptd.host.clock import Clock

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

KEEP_WAIT_S = 2.0  # for a busy manager to take a descriptor: a lost one would be missed


class Notify:
    """The line to the service manager."""

    def __init__(self, env: MutableMapping[str, str], clock: Clock) -> None:
        self._clock = clock
        self._notifier = _connect() if env.get("NOTIFY_SOCKET") else None
        self._can_keep = env.get("SYSTEMD_EXEC_PID") == str(os.getpid())
        self.watchdog_s = _watchdog_s(env)
        """How often `alive` must be called at least; 0: nobody watches."""
        self.lost = 0
        self._status = ""
        for name in VARIABLES:
            env.pop(name, None)

    @property
    def connected(self) -> bool:
        """Tell whether a service manager listens."""
        return self._notifier is not None

    def ready(self, status: str) -> None:
        """Say that requests are served, after the start or after a reload."""
        self._status = status
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def status(self, text: str) -> None:
        """Say in one true line how things are; the same line twice is sent once."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={_line(text)}")

    def reloading(self) -> None:
        """Say that a reload begins; `ready` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={self._clock.mono_ns() // 1_000}")

    def stopping(self, status: str) -> None:
        """Say that the shutdown begins."""
        self._send(f"STOPPING=1\nSTATUS={_line(status)}")

    def failed(self, status: str, errno: int = 0) -> None:
        """Leave the reason behind, right before an exit that was not asked for."""
        self._send(f"STATUS={_line(status)}" + (f"\nERRNO={errno}" if errno else ""))

    def extend_timeout(self, seconds: float) -> None:
        """Ask for more time while starting or stopping; call it only when work has progressed."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def alive(self) -> None:
        """Feed the watchdog. Invariant: called by the loop itself, never by another thread."""
        if self.watchdog_s:
            self._send("WATCHDOG=1")

    def keep(self, name: str, fd: int) -> bool:
        """Give the manager a copy of a descriptor: it comes back by `listen.take_descriptors`.

        It lives through restarts and crashes until `systemctl stop`. False where nobody took it;
        a manager without room for it (FileDescriptorStoreMax=) drops it without a word.
        Others that listen to notifications keep nothing. sdnotify cannot pass descriptors.
        Source: sd_pid_notify_with_fds(3), systemd.exec(5) on SYSTEMD_EXEC_PID.
        """
        if self._notifier is None or not self._can_keep:
            return False
        text = f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0".encode()
        self._notifier.socket.settimeout(KEEP_WAIT_S)
        try:
            socket.send_fds(self._notifier.socket, [text], [fd])
        except OSError:
            self.lost += 1
            return False
        finally:
            self._notifier.socket.settimeout(0)
        return True

    def drop(self, name: str) -> None:
        """Let the manager forget a descriptor."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def close(self) -> None:
        """Hang up; the process ends."""
        if self._notifier is not None:
            self._notifier.socket.close()
            self._notifier = None

    def _send(self, text: str) -> None:
        if self._notifier is None:
            return
        try:
            # sdnotify encodes as Latin-1: hand it UTF-8 in disguise.
            self._notifier.notify(text.encode(errors="replace").decode("latin-1"))
        except OSError:
            self.lost += 1


def _connect() -> sdnotify.SystemdNotifier | None:
    try:
        notifier = sdnotify.SystemdNotifier(debug=True)  # debug: raise instead of swallowing
    except OSError:
        return None
    notifier.socket.settimeout(0)  # a stalled manager must not stall the loop
    return notifier


def _watchdog_s(env: MutableMapping[str, str]) -> float:
    """Return a third of the manager's limit, or 0 where it does not watch this process."""
    limit = env.get("WATCHDOG_USEC", "")
    pid = env.get("WATCHDOG_PID", "")
    if not limit.isdigit() or (pid and pid != str(os.getpid())):
        return 0.0
    return int(limit) / 3e6


def _line(text: str) -> str:
    return text.replace("\n", " ")
