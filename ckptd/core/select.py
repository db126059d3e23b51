"""From a selector to the tasks that it names, within what the caller may see.

Invariant: no selection looks at more than a bounded number of tasks. Read next: `decide.py`.
"""

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

from ckptd.core.policy import Caller
from ckptd.core.records import Phase
from ckptd.core.rights import may_see
from ckptd.core.state import State, Task
from ckptd.protocol import limits
from ckptd.protocol.errors import BadRequest, Denied, NotFound
from ckptd.protocol.messages import PHASES, Selector

PHASE_OF = {phase.word: phase for phase in Phase}


Right = Callable[[Task, Caller], bool]


def selected(state: State, select: Selector, caller: Caller, right: Right = may_see) -> list[Task]:
    """Return the selected tasks by id, of those for which the caller has the right.

    Raises NotFound for a name that fits no task, Denied for somebody else's task,
    BadRequest for an empty or too wide selector.
    """
    check(select)
    named = _named(state, select, caller, right)
    if named is None:
        named = _scan(state, caller, right)
    found = {task.id: task for task in named if fits(task, select)}
    if len(found) > limits.SELECTED_MAX:
        raise BadRequest(
            f"{len(found)} tasks selected, at most {limits.SELECTED_MAX} at once",
            "narrow it with -g, --state or ids",
        )
    return [found[number] for number in sorted(found)]


def check(select: Selector) -> None:
    """Raise BadRequest for a selector that names nothing or an unknown phase."""
    for word in select.phases:
        if word not in PHASE_OF:
            raise BadRequest(f"unknown state {word!r}", f"one of: {', '.join(PHASES)}")
    if not _names(select) and not (select.all or select.group or select.labels or select.phases):
        raise BadRequest("no task selected", "name ids, or say --all")


def _names(select: Selector) -> bool:
    return bool(select.ids or select.last or select.keys or select.names)


def _named(state: State, select: Selector, caller: Caller, right: Right) -> Iterator[Task] | None:
    if not _names(select) or select.names:
        return None if not select.names else _by_name(state, select, caller, right)
    return _by_handle(state, select, caller, right)


def _by_handle(state: State, select: Selector, caller: Caller, right: Right) -> Iterator[Task]:
    for number in select.ids:
        yield one(state, number, caller, right)
    for key in select.keys:
        number = state.keys.get((caller.uid, key), 0)
        if not number:
            raise NotFound(f"no task with key {key!r}")
        yield one(state, number, caller, right)
    if select.last:
        yield from _lasts(state, select, caller)


def _lasts(state: State, select: Selector, caller: Caller) -> Iterator[Task]:
    wanted, seen = set(select.last), 0
    for task in state.tasks.descending(0):  # Bound: 100 lasts, each at most 1,000 back
        if task.uid != caller.uid:
            continue
        if seen in wanted:
            wanted.discard(seen)
            yield task
        seen += 1
        if not wanted or seen > limits.ROWS_PER_PAGE_MAX:
            break
    if wanted:
        raise NotFound(f"no task @~{min(wanted)}: you have submitted {seen}")


def _by_name(state: State, select: Selector, caller: Caller, right: Right) -> Iterator[Task]:
    hit = False
    for task in _scan(state, caller, right):
        name = task.unpacked().name
        if any(fnmatchcase(name, glob) for glob in select.names):
            hit = True
            yield task
    if not hit and not select.all:
        raise NotFound(f"no task with a name like {', '.join(select.names)}")
    yield from _by_handle(state, select, caller, right)


def _scan(state: State, caller: Caller, right: Right) -> Iterator[Task]:
    return (task for task in state.tasks.ascending(0) if right(task, caller))


def one(state: State, number: int, caller: Caller, right: Right = may_see) -> Task:
    """Return one task. Raises NotFound, Denied."""
    task = state.tasks.get(number)
    if task is None:
        gone = " (it is not known any more)" if number < state.next_id else ""
        raise NotFound(f"no task {number}{gone}", "see: ckptctl status --all")
    if not right(task, caller):
        raise Denied(f"task {number} belongs to uid {task.uid}, you are uid {caller.uid}")
    return task


def fits(task: Task, select: Selector) -> bool:
    """Tell whether a task passes the filters of a selector."""
    if select.group and task.group != select.group:
        return False
    if select.phases and task.phase.word not in select.phases:
        return False
    if not select.labels:
        return True
    labels = task.unpacked().labels
    return all(labels.get(name) == value for name, value in select.labels.items())
