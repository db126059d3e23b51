"""The means of looking: programs of the system with a time limit, small files, listening sockets.

Nothing here raises or changes anything; what cannot be found out is empty.
"""

import os
import socket
import subprocess
from collections.abc import Mapping, Sequence

TOOL_S = 4.0
CONNECT_S = 2.0


def output_of(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Return what a program of the system prints, "" where it fails, is missing, or takes long."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TOOL_S,
            check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0", **(env or {})},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""


def read_text(path: str) -> str:
    """Return a small file's text without the space around it, "" where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(65_536).strip()
    except OSError:
        return ""


def connects(path: str) -> bool | None:
    """Tell whether somebody listens at a socket; None where that cannot be told.

    It is a connection like any other: one to a socket of systemd's starts the service behind it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return None
    return True
