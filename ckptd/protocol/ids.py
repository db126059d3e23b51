"""The names of things: ids, how they are written and how they are read back.

A task id is a small integer, logged before it is told, never reused. Read next: `messages.py`.
"""

from typing import NewType

TaskId = NewType("TaskId", int)
Lsn = NewType("Lsn", int)
"""Position of a record in the log: from 1, +1 each, never reused."""
Epoch = NewType("Epoch", int)
"""Number of a daemon's reign over the store: +1 at every start; the fencing token."""

ATTEMPT_SEPARATOR = "."


def attempt_name(task: int, attempt: int) -> str:
    """Return the name of one attempt, `7.2` for the second attempt of task 7."""
    return f"{task}{ATTEMPT_SEPARATOR}{attempt}"


def unit_name(task: int, attempt: int) -> str:
    """Return the name of the systemd unit that one attempt runs in, where it runs in one."""
    return f"ckptd-task-{task}-{attempt}.service"


def parse_attempt_name(text: str) -> tuple[int, int] | None:
    """Return (task, attempt), or None where `text` is not the name of an attempt."""
    task, dot, attempt = text.partition(ATTEMPT_SEPARATOR)
    if dot and task.isascii() and task.isdigit() and attempt.isascii() and attempt.isdigit():
        return int(task), int(attempt)
    return None
