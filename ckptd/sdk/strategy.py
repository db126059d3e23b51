"""When to save: four strategies over what was measured of this task. Arithmetic only, no clock.

    Time(30)                    when so many seconds have passed
    Progress(0.05 | items=N)    when so much was done
    Manual()                    only when the author says so
    Automatic(0.01, 300)        Daly's optimum from the measured cost of a save and the observed
                                time between interruptions, within a budget and a maximum loss

Steps, items and values are durable at once under each; a strategy is about the bulk state alone.
Source: J. T. Daly, "A higher order estimate of the optimum checkpoint interval", FGCS 22 (2006).
Read next: `work.py`, which asks at every safe point.
"""

import math
from typing import Any, ClassVar, Final

PRIOR_MTBF_S: Final = 86_400.0  # one interruption a day, until this task knows better
FIRST_SAVE_S: Final = 2.0  # early, so that the cost is known and the way is proven
INTERVAL_MIN_S: Final = 1.0
_STEP: Final = 1.5  # an interval changes by no more than this factor from save to save
_SMOOTHING: Final = 0.3  # weight of the newest cost


class Pace:
    """What was measured, over all attempts; seconds without `_at_` are durations.

    `block_s` is all time that saving kept the task from working, `wall_s` all time it ran.
    """

    def __init__(self, interruptions: int = 0) -> None:
        self.saves = 0
        self.cost_s = 0.0  # of one save, smoothed
        self.bytes = 0  # of the last one
        self.block_s = 0.0
        self.wall_before_s = 0.0  # of earlier attempts, as far as their last save
        self.interruptions = interruptions
        self.resume_s = 0.0
        self.interval_s = 0.0  # that was aimed at after the last save
        self.began_at_s = 0.0
        self.saved_at_s = 0.0
        self.done_share = 0.0  # progress now, 0 to 1
        self.saved_share = 0.0
        self.items_since = 0
        self.jitter = 1.0  # 0.9 to 1.1, one for each task, so that many do not save together

    def wall_s(self, now_s: float) -> float:
        """Return how long the task ran, over all attempts."""
        return self.wall_before_s + max(0.0, now_s - self.began_at_s)

    def mtbf_s(self, now_s: float) -> float:
        """Return the mean time between interruptions, as far as it is known."""
        return (PRIOR_MTBF_S + self.wall_s(now_s)) / (1 + self.interruptions)

    def saved(self, now_s: float, cost_s: float, size_bytes: int) -> None:
        """Take note of a save that blocked for `cost_s`."""
        weight = _SMOOTHING if self.saves else 1.0
        self.cost_s += weight * (cost_s - self.cost_s)
        self.saves += 1
        self.block_s += cost_s
        self.bytes = size_bytes
        self.saved_at_s = now_s
        self.saved_share = self.done_share
        self.items_since = 0


def daly_s(cost_s: float, mtbf_s: float) -> float:
    """Return the interval between saves that wastes least, in seconds of work."""
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


class Strategy:
    """Base of the four."""

    name: ClassVar[str]

    def is_due(self, pace: Pace, now_s: float) -> bool:
        """Return whether to save at this safe point."""
        raise NotImplementedError

    def interval_s(self, pace: Pace, now_s: float) -> float:
        """Return the seconds between saves that it aims at; 0 where it has no such aim."""
        del pace, now_s
        return 0.0

    def is_worth_at_step_end(self, pace: Pace, now_s: float) -> bool:
        """Return whether the end of a step is a good moment, though no save is due yet."""
        del pace, now_s
        return False

    def warning(self, pace: Pace) -> str:
        """Return what the author should know about what saving costs, or an empty text."""
        del pace
        return ""


class Time(Strategy):
    """Save when `interval` seconds have passed since the last save."""

    name = "time"

    def __init__(self, interval: float = 30.0) -> None:
        _refuse_unless(0 <= interval < math.inf, "interval", interval, "seconds >= 0")
        self.interval = interval

    def is_due(self, pace: Pace, now_s: float) -> bool:
        """Return whether the interval has passed."""
        return now_s - pace.saved_at_s >= self.interval

    def interval_s(self, pace: Pace, now_s: float) -> float:
        """Return the interval."""
        del pace, now_s
        return self.interval


class Progress(Strategy):
    """Save when progress moved by `delta` (of 1), or after so many items."""

    name = "progress"

    def __init__(self, delta: float = 0.05, items: int = 0) -> None:
        _refuse_unless(0 < delta <= 1, "delta", delta, "a share from 0 to 1")
        _refuse_unless(items >= 0, "items", items, "a count")
        self.delta = delta
        self.items = items

    def is_due(self, pace: Pace, now_s: float) -> bool:
        """Return whether enough was done."""
        del now_s
        if self.items and pace.items_since >= self.items:
            return True
        return pace.done_share - pace.saved_share >= self.delta - 1e-9


class Manual(Strategy):
    """Save only when `checkpoint()` is called."""

    name = "manual"

    def is_due(self, pace: Pace, now_s: float) -> bool:
        """Return False."""
        del pace, now_s
        return False


class Automatic(Strategy):
    """Save as often as it pays: within `budget` of the time, at most `max_loss` seconds lost."""

    name = "automatic"

    def __init__(self, budget: float = 0.01, max_loss: float = 300.0) -> None:
        _refuse_unless(0 < budget <= 1, "budget", budget, "a share from 0 to 1")
        _refuse_unless(1 <= max_loss < math.inf, "max_loss", max_loss, "seconds >= 1")
        self.budget = budget
        self.max_loss = max_loss

    def is_due(self, pace: Pace, now_s: float) -> bool:
        """Return whether the interval has passed; the first save of a task comes early."""
        return now_s - pace.saved_at_s >= self.interval_s(pace, now_s)

    def interval_s(self, pace: Pace, now_s: float) -> float:
        """Return the interval that is aimed at now."""
        if not pace.saves:
            return FIRST_SAVE_S
        wanted = max(daly_s(pace.cost_s, pace.mtbf_s(now_s)), INTERVAL_MIN_S) * pace.jitter
        if pace.interval_s:
            wanted = min(max(wanted, pace.interval_s / _STEP), pace.interval_s * _STEP)
        wanted = max(wanted, pace.cost_s / self.budget)  # at once: a budget is no wish
        return min(wanted, self.max_loss)

    def is_worth_at_step_end(self, pace: Pace, now_s: float) -> bool:
        """Return whether half of the interval has passed."""
        return now_s - pace.saved_at_s >= self.interval_s(pace, now_s) / 2

    def warning(self, pace: Pace) -> str:
        """Return what to say where `max_loss` asks for more saves than the budget has room for."""
        if pace.cost_s / self.budget <= self.max_loss:
            return ""
        return (
            f"a save takes {pace.cost_s:.1f} s: one every {self.max_loss:.0f} s (max_loss) costs "
            f"{pace.cost_s / self.max_loss:.1%} of the time, the budget is {self.budget:.1%}"
        )


def numbers(strategy: Strategy, pace: Pace, now_s: float) -> dict[str, Any]:
    """Return what a checkpoint says of the way it came about; `ckptctl show` prints it."""
    wall_s = pace.wall_s(now_s)
    told = {
        "strategy": strategy.name,
        "saves": pace.saves + 1,  # with the one that says so
        "cost_s": pace.cost_s,
        "bytes": pace.bytes,
        "interval_s": strategy.interval_s(pace, now_s),
        "mtbf_s": pace.mtbf_s(now_s),
        "overhead": pace.block_s / wall_s if wall_s > 0 else 0.0,
        "block_s": pace.block_s,
        "wall_s": wall_s,
        "resume_s": pace.resume_s,
        "interruptions": pace.interruptions,
    }
    if isinstance(strategy, Automatic):
        told["budget"] = strategy.budget
    return {key: round(one, 6) if isinstance(one, float) else one for key, one in told.items()}


def pace_of(told: Any, interruptions: int) -> Pace:
    """Return the pace to go on with, from the numbers of the last checkpoint; hostile input."""
    known = told if isinstance(told, dict) else {}
    pace = Pace(interruptions)
    pace.saves = int(_number(known, "saves"))
    pace.cost_s = _number(known, "cost_s")
    pace.bytes = int(_number(known, "bytes"))
    pace.block_s = _number(known, "block_s")
    pace.wall_before_s = _number(known, "wall_s")
    pace.interval_s = _number(known, "interval_s")
    return pace


def _number(known: dict[str, Any], key: str) -> float:
    value = known.get(key)
    is_number = isinstance(value, int | float) and 0 <= value < 1e15
    return float(value) if is_number and value is not None else 0.0


def _refuse_unless(is_fit: bool, name: str, value: object, expected: str) -> None:  # noqa: FBT001
    if not is_fit:
        raise ValueError(f"{name} is {value!r}, expected {expected}")
