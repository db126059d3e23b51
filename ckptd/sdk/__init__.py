"""Resumable tasks in Python: `from ckptd.sdk import task`. The names, each loaded when it is used.

`ckpt` and the daemon's tools import this package, too, and must not pay for what they do not use.
Read next: docs/SDK.md, `context.py`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptd.sdk.aio import ResumableContext as ResumableContext
    from ckptd.sdk.behind import CheckpointRef as CheckpointRef
    from ckptd.sdk.context import SyncResumableContext as SyncResumableContext
    from ckptd.sdk.declare import RetryPolicy as RetryPolicy
    from ckptd.sdk.declare import task as task
    from ckptd.sdk.local import AlreadyRunning as AlreadyRunning
    from ckptd.sdk.local import run_local as run_local
    from ckptd.sdk.members import ResumePoint as ResumePoint
    from ckptd.sdk.members import TaskContext as TaskContext
    from ckptd.sdk.outcomes import CheckpointTooLarge as CheckpointTooLarge
    from ckptd.sdk.outcomes import CorruptCheckpointError as CorruptCheckpointError
    from ckptd.sdk.outcomes import DuplicateStepError as DuplicateStepError
    from ckptd.sdk.outcomes import LeaseLost as LeaseLost
    from ckptd.sdk.outcomes import NotJson as NotJson
    from ckptd.sdk.outcomes import Parked as Parked
    from ckptd.sdk.outcomes import PermanentError as PermanentError
    from ckptd.sdk.outcomes import QuarantineItem as QuarantineItem
    from ckptd.sdk.outcomes import RateLimited as RateLimited
    from ckptd.sdk.outcomes import SkipItem as SkipItem
    from ckptd.sdk.outcomes import StateVersionError as StateVersionError
    from ckptd.sdk.outcomes import StepInterrupted as StepInterrupted
    from ckptd.sdk.outcomes import StepTimeout as StepTimeout
    from ckptd.sdk.outcomes import StopRequested as StopRequested
    from ckptd.sdk.outcomes import TransientError as TransientError
    from ckptd.sdk.strategy import Automatic as Automatic
    from ckptd.sdk.strategy import Manual as Manual
    from ckptd.sdk.strategy import Progress as Progress
    from ckptd.sdk.strategy import Time as Time

_ROOMS = {
    "aio": "ResumableContext",
    "context": "SyncResumableContext",
    "members": "ResumePoint TaskContext",
    "declare": "RetryPolicy task",
    "local": "AlreadyRunning run_local",
    "outcomes": "CheckpointTooLarge CorruptCheckpointError DuplicateStepError LeaseLost NotJson"
    " Parked PermanentError QuarantineItem RateLimited SkipItem StateVersionError StepInterrupted"
    " StepTimeout StopRequested TransientError",
    "strategy": "Automatic Manual Progress Time",
    "behind": "CheckpointRef",
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # noqa: PLC0415  (whoever imports the package alone pays nothing)

    found = getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(_ROOM_OF)
