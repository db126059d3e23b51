"""Every way in which ckptd says no: one tree, stable codes, exit codes and hints.

    CkptdError
    |-- Rejected      the request is at fault; asking again changes nothing
    |   |-- BadRequest (64)  NotFound (4)  Conflict (5)  Denied (77)
    |   |-- ProtocolMismatch (69)  BadConfig (78)
    |-- Unavailable   try the same again
    |   |-- Unreachable (2)  Busy (2)  DiskFull (2)  ShuttingDown (2)  TimedOut (124)
    |-- StreamBroken  the caller's own stdin or stdout; never said by the daemon (exit 74)
    |-- Corrupt       stop and look: damage that must not be papered over (exit 65)
    `-- Internal      our own bug, or a disk that lies (exit 70)

A text says what failed, with which value, in what state things are; the hint says what to do.
Codes are never reused. Read next: `ckptd/protocol/messages.py`.
"""

from typing import ClassVar

import msgspec


class ErrorReply(msgspec.Struct, frozen=True):
    """The wire form of an error; `code` is stable, `message` is for people."""

    code: str
    message: str
    hint: str = ""
    retryable: bool = False
    exit_code: int = 1


class CkptdError(Exception):
    """Root of the tree; never raised itself."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def reply(self) -> ErrorReply:
        """Return the wire form."""
        return ErrorReply(self.code, self.message, self.hint, self.retryable, self.exit_code)


class Rejected(CkptdError):
    """The request is at fault; the same request will be refused again."""

    code = "rejected"


class BadRequest(Rejected):
    """A value, verb or selector that cannot be understood or is out of range."""

    code = "bad_request"
    exit_code = 64


class NotFound(Rejected):
    """No such task, group or checkpoint."""

    code = "not_found"
    exit_code = 4


class Conflict(Rejected):
    """Right request, wrong moment: the phase, key or group does not allow it."""

    code = "conflict"
    exit_code = 5


class Denied(Rejected):
    """The peer's uid may not do this."""

    code = "denied"
    exit_code = 77


class ProtocolMismatch(Rejected):
    """The peer speaks a version that this side does not."""

    code = "protocol_mismatch"
    exit_code = 69


class BadConfig(Rejected):
    """The configuration file cannot be used; nothing was changed."""

    code = "bad_config"
    exit_code = 78


class Unavailable(CkptdError):
    """Not now; the very same request may be repeated."""

    code = "unavailable"
    exit_code = 2
    retryable = True


class Unreachable(Unavailable):
    """No daemon answers at the endpoint."""

    code = "unreachable"


class Busy(Unavailable):
    """A bound was reached: queue, waiters or connections."""

    code = "busy"


class DiskFull(Unavailable):
    """No room for new work. What runs goes on; one that fails for it is tried again."""

    code = "disk_full"


class ShuttingDown(Unavailable):
    """The daemon drains and takes no new work."""

    code = "shutting_down"


class TimedOut(Unavailable):
    """The caller's own time limit ran out; the task is untouched."""

    code = "timed_out"
    exit_code = 124


class StreamBroken(CkptdError):
    """The caller's stdout takes nothing more, or its stdin gives nothing."""

    code = "stream_broken"
    exit_code = 74


class Corrupt(CkptdError):
    """Stored bytes do not check; nothing was changed, a person must look."""

    code = "corrupt"
    exit_code = 65


class Internal(CkptdError):
    """A broken invariant or a failed sync; the process must end and replay."""

    code = "internal"
    exit_code = 70


def all_errors() -> list[type[CkptdError]]:
    """Return every class of the tree, parents first; PROTOCOL.md's table is made from it."""
    found: list[type[CkptdError]] = [CkptdError]
    for cls in found:  # Bound: the tree is finite and has no cycles
        found.extend(cls.__subclasses__())
    return found[1:]
