"""What a task finds around it: the environment, the notify socket, the control file.

    CKPTD_TASK_ID=12 CKPTD_ATTEMPT=3 CKPTD_EPOCH=4 CKPTD_DIR=.../tasks/12 CKPTD_RESUME=1
    CKPTD_LAST=.../tasks/12/ckpt/00000007 CKPTD_SEQ=7 CKPTD_CONTROL=.../tasks/12/control.json
    CKPTD_DEADLINE=1760000000 NOTIFY_SOCKET=/run/ckptd/notify/12.sock

Stdlib only; nothing here waits for the daemon. Read next: `ckpt.py`.
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from typing import Any, Final

from ckptd.storage.untrusted import Damaged

_CONTROL_BYTES_MAX: Final = 4_096


class NotATask(Exception):
    """The environment lacks what the daemon gives to every task."""


class Surroundings:
    """The task as the daemon described it to this process."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Read the environment.

        Raises:
            NotATask: CKPTD_DIR or CKPTD_TASK_ID is missing, or a number is none.
        """
        self.dir = environ.get("CKPTD_DIR", "")
        if not self.dir:
            raise NotATask("CKPTD_DIR is not set: not inside a task of ckptd")
        self.task = _number(environ, "CKPTD_TASK_ID", None)
        self.attempt = _number(environ, "CKPTD_ATTEMPT", 1)
        self.epoch = _number(environ, "CKPTD_EPOCH", 0)
        self.seq = _number(environ, "CKPTD_SEQ", 0)
        self.last = environ.get("CKPTD_LAST", "")
        self.is_resuming = environ.get("CKPTD_RESUME") == "1"
        self.control_path = environ.get("CKPTD_CONTROL") or f"{self.dir}/control.json"
        self.deadline_s = _number(environ, "CKPTD_DEADLINE", 0)
        self.notify_path = environ.get("NOTIFY_SOCKET", "")

    def notify(self, *lines: str) -> None:
        """Send lines to the daemon; lost where nobody listens, and that is fine."""
        if not self.notify_path:
            return
        import socket  # noqa: PLC0415  (costs a fifth of the start; most verbs do not notify)

        path = self.notify_path
        address = "\0" + path[1:] if path.startswith("@") else path
        text = "\n".join(line.replace("\n", " ") for line in lines)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.setblocking(False)
            out.sendto(text.encode(errors="replace"), address)

    def control(self) -> dict[str, Any]:
        """Return what the daemon asks for; empty where it asks for nothing."""
        try:
            return self.read_control()
        except (OSError, Damaged):
            return {}

    def read_control(self) -> dict[str, Any]:
        """Return what the daemon asks for, for who must not take a failure for "nothing".

        Raises:
            OSError: it is there and cannot be read. Damaged: no daemon wrote that.
        """
        try:
            with open(self.control_path, "rb") as file:
                found = json.loads(file.read(_CONTROL_BYTES_MAX))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as bad:
            raise Damaged(f"{self.control_path} holds no JSON: {bad}") from bad
        if not isinstance(found, dict):
            raise Damaged(f"{self.control_path} holds no object")
        return found

    def stop_reason(self) -> str:
        """Return why the task shall stop, or an empty text."""
        return str(self.control().get("stop") or "")

    def is_checkpoint_wanted(self) -> bool:
        """Return whether a checkpoint was asked for after the newest one was published."""
        if not self.control().get("checkpoint"):
            return False
        asked_ns = os.stat(self.control_path).st_mtime_ns
        return asked_ns >= _newest_ns(f"{self.dir}/ckpt")


def _newest_ns(ckpt: str) -> int:
    try:
        with os.scandir(ckpt) as entries:
            return max(
                (
                    one.stat(follow_symlinks=False).st_ctime_ns
                    for one in entries
                    if one.name.isdigit()
                ),
                default=0,
            )
    except OSError:
        return 0


def _number(environ: Mapping[str, str], name: str, default: int | None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text) if text.isdecimal() else int(float(text))  # an item's id has 60 bits
    except (ValueError, OverflowError):
        raise NotATask(f"{name} is {text!r}, expected a number") from None


def now_s() -> float:
    """Return the wall clock, as CKPTD_DEADLINE counts it."""
    return time.time()
