"""The judge of verbs that steer: what was answered to them is seen, and lasts until it is undone.

As the model, it hears what was asked and answered, and what clients see; nothing of the daemon.
"""

from collections import Counter
from typing import Any

from tests.sim.asked import STARTERS, Asked, hold, may_have, standing

STILL = frozenset({"held", "cancelled", "failed"})  # what is held can be given up, and no more
LATE_START_NS = 15 * 10**9  # an order on its way is carried out by then, if ever
UNDONE_BY = {"pause": frozenset({"resume"}), "resume": frozenset({"pause"})}
STEERS = frozenset({"hold", "pause", "resume", "edit", "signal"})  # tasks; `group_set` a group
LEAVES_IN = {"pause": "paused", "resume": "running"}


class Steering:
    """Holds, pauses, priorities, groups, signals."""

    def __init__(self, asked: dict[str, Asked], parallel: int) -> None:
        self._asked = asked
        self._parallel = parallel  # of the one group, until somebody changes that
        self.answered = 0  # of these verbs, with something to be seen of it
        self._unlooked: list[Asked] = []  # answered by the daemon in this turn
        self._delivered: Counter[tuple[int, int]] = Counter()  # (task, signal), in this turn

    # --- starts -----------------------------------------------------------------------------------

    def check_start(self, task: int, spec: dict[str, Any], now_ns: int) -> None:
        """Nothing starts that is held, or whose group is paused."""
        holds = [one.sent for one in self._asked.values() if _has_held(one, task)]
        holds += [0] if spec.get("hold") else []
        for sent in holds:
            hold(self._may_have(task, STARTERS, sent), f"task {task} is held, and it starts")
        sets = self._sets("default")
        for one in sets:
            is_paused = one.args["paused"] and one.issued_ns <= now_ns - LATE_START_NS
            is_on = any(not two.args["paused"] and two.issued > one.sent for two in sets)
            hold(not is_paused or is_on, f"the group is paused by {one.request}, {task} starts")

    def _may_have(self, task: int, verbs: frozenset[str], since: int) -> bool:
        return may_have(self._asked.values(), task, verbs, since)

    def _sets(self, group: str) -> list[Asked]:
        return [
            one
            for one in self._asked.values()
            if one.verb == "group_set" and one.args["name"] == group and not one.is_refused
        ]

    # --- what is seen -----------------------------------------------------------------------------

    def check_row(self, row: dict[str, Any], began: int, priority: int, asked_at: int) -> None:
        """Check the row of a task whose last attempt began then, by what it was asked to be."""
        task, phase = row["id"], row["phase"]
        edits = []
        for one in self._asked.values():
            if one.verb == "edit" and one.may_concern(task):
                edits.append(one)
            elif one.issued >= asked_at:
                continue
            elif _has_held(one, task) and phase not in STILL:
                is_freed = self._may_have(task, STARTERS, one.sent)
                hold(is_freed, f"task {task}: hold {one.request} was answered, it is {phase}")
            elif one.verb in LEAVES_IN and began < one.sent:
                self._check_frozen(one, task, phase)
        self._check_priority(row, edits, priority, asked_at)

    def _check_frozen(self, one: Asked, task: int, phase: str) -> None:
        """Check that what was paused stays so, and what was resumed, for as long as it runs."""
        if one.has_put(task, LEAVES_IN[one.verb]) and phase in {"running", "paused"}:
            hold(
                phase == LEAVES_IN[one.verb] or self._may_have(task, UNDONE_BY[one.verb], one.sent),
                f"task {task}: {one.verb} {one.request} was answered, it is {phase}",
            )

    @staticmethod
    def _check_priority(row: dict[str, Any], edits: list[Asked], first: int, asked_at: int) -> None:
        last, is_none_done = standing(edits, asked_at)
        may_be = {one.args["priority"] for one in last} | ({first} if is_none_done else set())
        told = row["priority"]
        hold(told in may_be, f"task {row['id']} has priority {told}, it was edited to {may_be}")

    def check_groups(self, rows: list[dict[str, Any]], asked_at: int) -> None:
        """Check that a group is as it was set, by whoever may have been the last."""
        for row in rows:
            last, is_none_done = standing(self._sets(row["name"]), asked_at)
            may_be = {(one.args["parallel"], one.args["paused"]) for one in last}
            may_be |= {(self._parallel, False)} if is_none_done else set()
            told = (row["parallel"], row["paused"])
            hold(told in may_be, f"group {row['name']} is told as {told}, was set to {may_be}")

    # --- turns ------------------------------------------------------------------------------------

    def issued(self, one: Asked) -> None:
        """The daemon answers a request for the first time."""
        self._unlooked.append(one)

    def delivered(self, task: int, signal: int) -> None:
        """The daemon orders a signal."""
        self._delivered[task, signal] += 1

    def turn_is_over(self, begun: int) -> list[Asked]:
        """Return what was answered in a turn that the daemon lived through: it can be seen now.

        Of a signal everything is done by then, but where an earlier daemon has carried it out:
        `begun` is when this one was.
        """
        one_turn, self._unlooked = self._unlooked, []
        self.answered += sum(
            one.verb == "group_set" or (one.verb in STEERS and bool(one.changed()))
            for one in one_turn
        )
        delivered, self._delivered = self._delivered, Counter()
        for one in one_turn:
            if one.verb == "signal" and one.sent > begun:
                self._check_delivered(one, delivered)
        return one_turn

    @staticmethod
    def _check_delivered(one: Asked, delivered: Counter[tuple[int, int]]) -> None:
        for row in one.changed():
            hold(
                delivered[row["id"], one.args["signal"]] > 0,
                f"signal {one.request} of task {row['id']} was answered, and never sent",
            )


def _has_held(one: Asked, task: int) -> bool:
    return one.verb == "hold" and one.has_put(task, "held")
