"""Answers to build tests from."""

import msgspec

from ckptd.protocol.messages import TaskDetail, TaskPage, TaskRow

SECOND_NS = 1_000_000_000
NOW_NS = 1_800_000_000 * SECOND_NS


def row(number: int = 1, phase: str = "running", **fields: object) -> TaskRow:
    made = TaskRow(
        id=number, name="census", argv=("python3", "census.py"), group="default", priority=0,
        phase=phase, reason="", until_ns=0, uid=1000, key="", labels={}, attempt=1, failures=0,
        failures_max=0,
        interruptions=0, submitted_ns=NOW_NS - 60 * SECOND_NS, started_ns=NOW_NS - 50 * SECOND_NS,
        ended_ns=0, cause="", code=None, signal=None, pid=0, checkpoint=0, checkpoint_ns=0,
    )  # fmt: skip
    return msgspec.structs.replace(made, **fields)


def page(*rows: TaskRow, following: int = 0) -> TaskPage:
    totals: dict[str, int] = {}
    for one in rows:
        totals[one.phase] = totals.get(one.phase, 0) + 1
    return TaskPage(rows, totals, following)


def detail(one: TaskRow, **spec: object) -> TaskDetail:
    known = {"cwd": "/tmp", "timeout_s": 0.0, "max_failures": 4, "grace_s": 10.0, **spec}
    return TaskDetail(one, known, (), "runs", "/state/tasks/1", "/state/output/1.log")
