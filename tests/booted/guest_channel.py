"""The test's end of the line to a virtual machine: commands out, results back, several at once.

The other end is guest_agent.py. Who dies is told: a machine that goes down while a command runs
raises `MachineGone` in whoever waits for it.
"""

import base64
import contextlib
import itertools
import json
import queue
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.waiting import until

GRACE_S = 20.0  # beyond the agent's own limit: emulated machines stall while the host is busy


class MachineGone(ConnectionError):
    """The machine went down before the command's result was here; the command may have run."""


class GuestChannel:
    """One connection to the agent, for the life of one qemu process."""

    def __init__(self, path: Path) -> None:
        line = until(lambda: _connected(path), 20)
        assert line is not None
        self._socket = line
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[dict[str, Any] | None]] = {}
        self._lock = threading.Lock()
        self._is_gone = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def execute(
        self, argv: Sequence[str], *, env: Mapping[str, str], stdin: bytes, timeout_s: float
    ) -> tuple[int, bytes, bytes]:
        """Run a command; return its code (negative: the signal), stdout and stderr.

        Raises:
            MachineGone: The machine went down before.
            TimeoutError: The command took too long and was killed, or the machine does not answer.
        """
        answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        number = next(self._numbers)
        asked = {"id": number, "argv": list(argv), "env": dict(env), "timeout_s": timeout_s}
        asked["stdin"] = base64.b64encode(stdin).decode()
        with self._lock:
            if self._is_gone:
                raise MachineGone("the machine is off")
            self._waiting[number] = answers
        try:
            with contextlib.suppress(OSError):  # the reader sees the end, too
                self._send(json.dumps(asked).encode() + b"\n")
            told = answers.get(timeout=timeout_s + GRACE_S)
        except queue.Empty:
            raise TimeoutError(f"{list(argv)}: no answer from the machine") from None
        finally:
            self._waiting.pop(number, None)
        if told is None:
            raise MachineGone(f"the machine went down during {list(argv)}")
        if told.get("late"):
            raise TimeoutError(f"{list(argv)}: not done in {timeout_s} s")
        return told["code"], base64.b64decode(told["out"]), base64.b64decode(told["err"])

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join(5)
        self._socket.close()

    def _send(self, data: bytes) -> None:
        with self._lock:
            self._socket.sendall(data)

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
            for line in lines:
                told = json.loads(line)
                waiting = self._waiting.get(told["id"])
                if waiting is not None:
                    waiting.put(told)
        with self._lock:
            self._is_gone = True
            for waiting in self._waiting.values():
                waiting.put(None)


def _connected(path: Path) -> socket.socket | None:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.connect(str(path))
    except OSError:  # qemu has not made it yet
        line.close()
        return None
    return line
