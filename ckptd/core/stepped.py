"""The wall clock was set: what is left of a length stays what it was.

A timeout, a grace and a delay are lengths, but their ends are noted by the wall clock, as every
fact of the log is. What a person names by the clock, `--at` and deadlines, means the clock as it
is now. How far the clock was set is measured against the monotonic one; so time that the machine
slept counts for no length either. What has ended is kept by the wall clock; but where that was set
ahead by more than a day, it is believed a day later only: by then a mistake was set right, and who
looks for what ended before has found it. Read next: `plan.py`.
"""

from ckptd.core.plan import Instance, Observed
from ckptd.core.policy import Now
from ckptd.core.records import AnyRecord, Moved, Phase
from ckptd.core.state import State, Task

_DELAYS = frozenset({"backoff", "transient", "rate_limit"})
_DAY_NS = 86_400_000_000_000


def stepped(state: State, observed: Observed, step_ns: int, now: Now) -> list[AnyRecord]:
    """Move the ends of what runs by `step_ns`; return the records of delays that end earlier.

    Observed only: the log keeps what the clock showed. A delay comes early where the clock went
    forward: its end may be of an earlier boot, noted by a clock that was right.
    """
    for number, instance in observed.instances.items():
        task = state.tasks.get(number)
        if task is not None and task.run is not None and task.run.attempt == instance.attempt:
            _move(instance, task.run.noted_ns, step_ns)
            state.touched.add(number)
    observed.doubted_until_ns += step_ns
    if step_ns > _DAY_NS:
        observed.doubted_until_ns = now.at_ns + _DAY_NS
    if step_ns >= 0:
        return []
    waiting = (state.tasks.get(number) for number in sorted({entry[1] for entry in state.timers}))
    return [_sooner(task, step_ns, now) for task in waiting if task is not None and _delayed(task)]


def _move(instance: Instance, noted_ns: int, step_ns: int) -> None:
    instance.moved = (noted_ns, instance.end_ns(noted_ns) + step_ns)
    for name in ("extended_ns", "first_ns", "said_ns"):
        if at_ns := getattr(instance, name):
            setattr(instance, name, at_ns + step_ns)


def _delayed(task: Task) -> bool:
    return task.phase is Phase.WAITING and task.reason in _DELAYS


def _sooner(task: Task, step_ns: int, now: Now) -> Moved:
    return Moved(task.id, now.at_ns, task.phase, task.reason, task.until_ns + step_ns)
