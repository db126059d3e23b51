"""Run `python -m ckptd.offline.checkpoint` as whoever calls, and say its refusals as ours.

So the command line knows no file format, and files are reached with the caller's own rights.
Read next: `checkpoint.py`.
"""

import json
import os
import subprocess
import sys
from typing import IO, Any, Final

from ckptctl.words import clean
from ckptd.protocol.errors import (
    BadRequest,
    CkptdError,
    Conflict,
    Corrupt,
    Denied,
    DiskFull,
    Internal,
    NotFound,
    StreamBroken,
)
from ckptd.streams import UNREAD, Lost

_COMMAND: Final = (sys.executable, "-P", "-m", "ckptd.offline.checkpoint")
_REFUSALS: Final[dict[int, type[CkptdError]]] = {
    kind.exit_code: kind
    for kind in (DiskFull, NotFound, Conflict, BadRequest, Corrupt, Denied, StreamBroken)
}
_HINTS: Final = {
    Corrupt.exit_code: "see: ckptctl checkpoint verify",
    Denied.exit_code: "the files belong to the task's user: do it as that user",
    DiskFull.exit_code: "nothing was changed; free some space",
}


def task_dir(checkpoint: str) -> str:
    """Return the directory of the task that a published checkpoint lies in."""
    return os.path.dirname(os.path.dirname(checkpoint))


def ask(verb: str, *given: str, sent: str = "", stdin: IO[str] | None = None) -> Any:
    """Run one verb on a text, or on our stdin; return its answer. Raises what its code says."""
    command = [*_COMMAND, verb, *given]
    if stdin is None:
        done = subprocess.run(command, input=sent.encode(), capture_output=True, check=False)
    else:
        done = subprocess.run(command, stdin=stdin, capture_output=True, check=False)
    _refuse(done.returncode, done.stderr)
    return json.loads(done.stdout) if done.stdout else None


def stream(verb: str, *given: str) -> None:
    """Run one verb whose output is our own. Raises what its exit code says."""
    sys.stdout.flush()
    done = subprocess.run([*_COMMAND, verb, *given], stderr=subprocess.PIPE, check=False)
    _refuse(done.returncode, done.stderr)


def _refuse(code: int, said: bytes) -> None:
    if not code:
        return
    if code == UNREAD:
        raise Lost("nobody reads it", UNREAD)
    text, _, hint = said.decode(errors="replace").strip().partition("\n")
    kind = _REFUSALS.get(code)
    if kind is None:  # a traceback: its last line says what
        raise Internal(clean(hint.rpartition("\n")[2] or text), "this is a bug of ckptctl")
    raise kind(clean(text), clean(hint) or _HINTS.get(code, ""))
