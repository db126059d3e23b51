"""What records mean for the tasks, folded from plain values: a second opinion on core/apply.py.

Made from what FORMAT.md tells of records, by number and place; nothing of ckptd is used but to take
the picture of its State that is compared. It folds what a client is told of each task: not how
checkpoints stand, not groups, answers and environments.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from ckptd.core.state import Past, State, Task

QUEUED, STARTING, RUNNING, PAUSED, STOPPING = 1, 3, 4, 5, 6
ENDED = frozenset({7, 8, 9})  # succeeded, failed, cancelled: no time but that of the end
Picture = dict[int, dict[str, Any]]


@dataclass
class _Task:
    """One task; the names of State."""

    phase: int
    reason: str
    until_ns: int
    uid: int
    group: str
    priority: int
    submitted_ns: int
    deadline_ns: int
    env: bytes
    key: str
    needs: list[list[Any]]
    spec: dict[str, Any]
    attempt: int = 0
    end: tuple[Any, ...] = ()  # of the last attempt that ended: number, cause, code, signal, when


class PlainState:
    """The tasks, record by record."""

    def __init__(self) -> None:
        self._tasks: dict[int, _Task] = {}
        self._next_id = 1

    def picture(self) -> tuple[int, Picture]:
        """Return the id that comes next, and all tasks."""
        return self._next_id, {number: dict(vars(task)) for number, task in self._tasks.items()}

    def take(self, record: list[Any]) -> None:
        """Fold one record."""
        tag, *fields = record
        if tag == 11:  # Submitted
            self._submit(*fields)
        elif tag == 15:  # Removed
            del self._tasks[fields[0]]
        elif tag in _CHANGES:
            _CHANGES[tag](self._tasks[fields[0]], fields)

    def _submit(self, number: int, at_ns: int, *fields: Any) -> None:
        uid, group, priority, env, phase, reason, until_ns, deadline_ns, key, needs, spec = fields[
            :11
        ]
        self._next_id = number + 1
        self._tasks[number] = _Task(
            phase, reason, until_ns, uid, group, priority, at_ns, deadline_ns, env, key, needs, spec
        )


def _edit(task: _Task, fields: list[Any]) -> None:
    _, _, task.group, task.priority, task.deadline_ns, task.spec = fields


def _move(task: _Task, fields: list[Any]) -> None:
    _, at_ns, task.phase, task.reason, *rest = fields
    task.until_ns = at_ns if task.phase in ENDED else rest[0] if rest else 0


def _reset(task: _Task, _fields: list[Any]) -> None:
    task.phase, task.reason, task.until_ns = QUEUED, "", 0


def _intend(task: _Task, fields: list[Any]) -> None:
    task.phase, task.reason, task.until_ns, task.attempt = STARTING, "", 0, fields[1]


def _start(task: _Task, _fields: list[Any]) -> None:
    """A stop that came while it was starting stays."""
    task.phase = RUNNING if task.phase == STARTING else task.phase


def _stop(task: _Task, fields: list[Any]) -> None:
    task.phase, task.reason = STOPPING, fields[3]


def _freeze(task: _Task, fields: list[Any]) -> None:
    task.phase = PAUSED if fields[3] else RUNNING


def _end(task: _Task, fields: list[Any]) -> None:
    _, attempt, _, cause, code, signal, _, _, ended_ns = fields[:9]
    task.phase, task.reason, until_ns = fields[14][:3]
    task.until_ns = ended_ns if task.phase in ENDED else until_ns
    task.end = (attempt, cause, code, signal, ended_ns)
    if len(fields) > 16 and fields[16]:
        task.spec = {**task.spec, "memory_bytes": fields[16]}


_CHANGES = {
    12: _edit, 13: _move, 14: _reset, 20: _intend, 21: _start, 22: _stop, 24: _freeze, 27: _end,
}  # fmt: skip


def picture_of(state: State) -> tuple[int, Picture]:
    """Return what ckptd's State says of the same."""
    tasks = state.tasks.ascending(0)
    return state.next_id, {task.id: dict(vars(_task_of(task))) for task in tasks}


def _task_of(task: Task) -> _Task:
    needs = [[need.task, need.when] for need in task.needs]
    attempt, past = (task.run.attempt, task.run.past) if task.run else (0, ())
    return _Task(
        int(task.phase), task.reason, task.until_ns, task.uid, task.group, task.priority,
        task.submitted_ns, task.deadline_ns, task.env, task.key, needs,
        msgspec.msgpack.decode(task.spec), attempt, _last_end(past),
    )  # fmt: skip


def _last_end(past: tuple[Past, ...]) -> tuple[Any, ...]:
    if not past:
        return ()
    one = past[-1]
    return (one.attempt, one.cause, one.code, one.signal, one.ended_ns)
