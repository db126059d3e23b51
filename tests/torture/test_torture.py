"""The torture itself: a few seconds of it, and that its audit finds what it is there to find."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.daemon_fixture import ROOT
from tests.torture import samples
from tests.torture.audit import audit
from tests.torture.marked import IS_POSSIBLE
from tests.torture.run import Options, run

Doctor = Callable[["Notes"], None]


@pytest.mark.timeout(600)  # its own bounds come first
def test_whoever_is_killed_for_some_seconds_nothing_is_lost_and_nothing_done_twice() -> None:
    options = Options(seconds=5.0, seed=random.SystemRandom().randrange(10**6))
    outcome = run(options)
    again = f"{outcome.command}; kept: {outcome.root}"
    assert not outcome.violations, f"{again}: {outcome.violations}"
    assert outcome.figures["kills"] >= 1, again
    assert outcome.figures["tasks"] >= 10, again
    shutil.rmtree(outcome.root)


@pytest.mark.skipif(not IS_POSSIBLE, reason="needs root on x86-64 (ptrace)")
def test_a_task_that_has_forked_is_followed_to_its_later_calls() -> None:
    tasks = 'while :; do sh -c "/bin/true; /bin/true; exit 3"; done'
    with subprocess.Popen(["/bin/sh", "-c", tasks]) as parent:
        line = [sys.executable, "-m", "tests.torture.marked", str(parent.pid), "child-exit"]
        done = subprocess.run([*line, "1", "20"], cwd=ROOT, check=False, capture_output=True)
        parent.kill()
    assert done.returncode == 0, "what the task forks waits for us for ever, and the task for that"


class Notes:
    """The evidence of a small world in which all went well: a task killed once, a batch, a pause.

    w1 works items off and is killed at item 1; w2 fails twice and then succeeds; w3 is a batch.
    """

    def __init__(self) -> None:
        self.facts = [
            "w1 1 1 101 start", "w1 1 1 101 item 0", "w1 1 1 101 item 1",
            "w1 1 2 111 start", *(f"w1 1 2 111 item {n}" for n in range(1, 12)),
            "w1 1 2 111 end 0",
            "w2 2 1 102 start", "w2 2 1 102 end 3", "w2 2 2 103 start", "w2 2 2 103 end 0",
            "w4 4 1 104 start", "w4 4 1 104 at 0", "w4 4 1 104 saved 4",
            "w4 4 2 105 start", "w4 4 2 105 at 4", "w4 4 2 105 end 0",
            *(f"w3 0 0 106 item {n}" for n in range(25)),
        ]  # fmt: skip
        kinds = {1: "items", 2: "flaky", 4: "manual"}
        self.sent = [{"work": work, "kind": kind} for work, kind in kinds.items()]
        self.acked = [{"work": work, "task": work} for work in kinds]
        self.strikes = [
            {"pid": 101, "task": 1, "attempt": 1, "work": "w1", "how": "one"},
            {"pid": 104, "task": 4, "attempt": 1, "work": "w4", "how": "one"},
        ]
        self.steered = [{"verb": "checkpoint_now", "tasks": [2]}, {"verb": "cancel", "tasks": []}]
        self.batches: list[dict[str, Any]] = [{"name": "w3"}, {"name": "w3", "finished": True}]
        self.events = [
            *life(1, (101, "signal", 0, "queued"), (111, "exit", 0, "succeeded")),
            *life(2, (102, "exit", 3, "waiting"), (103, "exit", 0, "succeeded")),
            *life(4, (104, "signal", 0, "queued"), (105, "exit", 0, "succeeded")),
            event("checkpoint_asked", 2, 1),
        ]
        results = [{"key": str(n), "status": "pass", "result": n * 2} for n in range(25)]
        self.closing: dict[str, Any] = {
            "rows": [{"id": task, "phase": "succeeded"} for task in kinds],
            "checkpoints": {},
            "files": ["wal/spare.tmp", "tasks/1", "output/2.log"],
            "run_files": ["ctl.sock", "notify"],
            "wal": {"code": 0, "said": ""},
            "exit_code": 0,
            "batches": {"w3": results},
        }

    def audited(self, root: Path) -> list[str]:
        """Write it all down and return what the audit finds."""
        place = root / "evidence"
        place.mkdir()
        (place / "facts").write_text("".join(f"{line}\n" for line in self.facts))
        for name in ("sent", "acked", "strikes", "steered", "batches", "events"):
            lines = [json.dumps(one) + "\n" for one in getattr(self, name)]
            (place / f"{name}.jsonl").write_text("".join(lines))
        (place / "closing.json").write_text(json.dumps(self.closing))
        return audit(root).violations


def life(task: int, *attempts: tuple[int, str, int, str]) -> list[dict[str, Any]]:
    """Return the events of a task: each attempt with its pid, its end and the phase after it."""
    told = [event("submitted", task, 0, phase="queued", key=f"w{task}")]
    for number, (pid, cause, code, phase) in enumerate(attempts, 1):
        signal = 9 if cause == "signal" else 0
        shim = {"boot_id": "b", "pid": pid + 1000, "ticks": 1}
        told.append(event("start_intent", task, number))
        told.append(event("started", task, number, pid=pid, shim=shim))
        end = {"cause": cause, "code": code, "signal": signal, "verdict": {"phase": phase}}
        told.append(event("ended", task, number, **end))
    return told


def event(kind: str, task: int, attempt: int, **fields: Any) -> dict[str, Any]:
    """Return one event as the daemon tells it."""
    return {"type": kind, "task": task, "attempt": attempt, "fields": fields}


def test_the_audit_finds_nothing_where_all_went_well(tmp_path: Path) -> None:
    assert Notes().audited(tmp_path) == []


def end_of(notes: Notes, task: int, attempt: int) -> dict[str, Any]:
    """Return the fields of one end."""
    (found,) = (
        one for one in notes.events
        if (one["type"], one["task"], one["attempt"]) == ("ended", task, attempt)
    )  # fmt: skip
    fields = found["fields"]
    assert isinstance(fields, dict)
    return fields


def again(notes: Notes) -> None:
    at = notes.facts.index("w1 1 2 111 item 1")
    notes.facts.insert(at, "w1 1 2 111 item 0")


def rerun(notes: Notes) -> None:
    """An item of a batch under the daemon runs again in the first attempt."""
    notes.facts.append("w3 0 0 106 item 3")
    notes.events += life(9, (106, "exit", 0, "succeeded"))
    submitted = next(one for one in notes.events if (one["type"], one["task"]) == ("submitted", 9))
    submitted["fields"]["key"] = "batch:w3:1"


def hit_and_failed(notes: Notes) -> None:
    notes.strikes.append({"pid": 106, "task": 0, "attempt": 0, "work": "w3", "how": "one"})
    notes.closing["batches"]["w3"][4].update(status="fail")


def unrun(notes: Notes) -> None:
    notes.facts = [fact for fact in notes.facts if not fact.startswith("w2 2 2")]


def zombie(notes: Notes) -> None:
    notes.facts.insert(notes.facts.index("w1 1 2 111 item 5"), "w1 1 1 101 item 2")


def without(notes: Notes, fact: str) -> None:
    notes.facts.remove(fact)


def never_told(notes: Notes) -> None:
    notes.events = [one for one in notes.events if one["task"] != 2]


def untold_end(notes: Notes) -> None:
    notes.events = [
        one for one in notes.events
        if (one["type"], one["task"], one["attempt"]) != ("ended", 2, 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("doctor", "told"),
    [
        (again, "item 0 again"),
        (unrun, "never ran"),
        (zombie, "went on after its successor"),
        (lambda n: n.facts.append("w2 2 2 103 overlap"), "overlap"),
        (lambda n: n.facts.append("w2 9 1 109 start"), "ran as tasks [2, 9]"),
        (lambda n: n.facts.append("w2 2 2 108 start"), "began 2 times"),
        (lambda n: without(n, "w1 1 2 111 item 7"), "done with 11 items of 12"),
        (lambda n: n.acked.append({"work": 1, "task": 9}), "acknowledged as 1 and 9"),
        (lambda n: n.acked.pop(), "never answered"),
        (never_told, "never submitted"),
        (lambda n: n.events.append(event("submitted", 9, 0, phase="held", key="w1")), "key w1"),
        (lambda n: n.events.append(event("submitted", 1, 0, phase="held", key="")), "given twice"),
        (untold_end, "no end was ever told"),
        (lambda n: n.events.append(n.events[3]), "told twice"),
        (lambda n: end_of(n, 2, 1).update(code=0), "told as exit 0 0, left with 3"),
        (lambda n: end_of(n, 2, 2).update(cause="lost"), "nobody had touched it"),
        (lambda n: end_of(n, 1, 1).update(cause="exit"), "never came to its end"),
        (lambda n: end_of(n, 1, 1).update(cause="not_started"), "ran, told as not_started"),
        (lambda n: n.closing["rows"].pop(), "is None by status"),
        (lambda n: n.facts.insert(-28, "w4 4 2 105 at 3"), "began at 3, 4 was saved"),
        (lambda n: n.closing["batches"]["w3"].pop(), "batch w3"),
        (lambda n: n.closing["batches"]["w3"][4].update(result=9), "item 4 passed with 9"),
        (lambda n: without(n, "w3 0 0 106 item 3"), "item 3 passed"),
        (lambda n: n.facts.append("w3 0 0 106 item 3"), "1 repeats"),
        (lambda n: n.closing["checkpoints"].update({"1": "digest"}), "checkpoints of 1"),
        (lambda n: n.closing["wal"].update(code=65), "does not verify"),
        (lambda n: n.closing["files"].append("snap/9.tmp"), "temporary file"),
        (lambda n: n.closing["files"].append("tasks/77"), "not there"),
        (lambda n: n.closing["files"].append("attempts/3.1"), "attempt that is over"),
        (lambda n: n.closing["run_files"].append("notify/3.sock"), "socket of no task"),
        (lambda n: n.closing["batches"]["w3"][4].update(status="error"), "came to error"),
        (lambda n: end_of(n, 4, 1).update(signal=15), "by SIGKILL alone"),
        (lambda n: end_of(n, 2, 2).update(verdict={"phase": "failed"}), "ended as failed"),
        (rerun, "1 repeats, 0 kills, 0 stops"),
        (hit_and_failed, "came to fail"),
        (lambda n: n.batches.pop(), "never came to its end"),
        (lambda n: n.steered.append({"verb": "clean", "tasks": [1]}), "nothing became of it"),
        (lambda n: n.closing.update(left=[{"pid": 5}]), "left over"),
    ],
)  # fmt: skip
def test_the_audit_finds_one_mistake(tmp_path: Path, doctor: Doctor, told: str) -> None:
    notes = Notes()
    doctor(notes)
    found = notes.audited(tmp_path)
    assert any(told in one for one in found), found


def test_a_key_may_name_another_task_once_the_first_is_forgotten(tmp_path: Path) -> None:
    notes = Notes()
    notes.events += [event("removed", 3, 0), event("submitted", 9, 0, phase="cancelled", key="w3")]
    notes.events.insert(0, event("submitted", 3, 0, phase="cancelled", key="w3"))
    assert notes.audited(tmp_path) == []


def test_a_slope_is_found_beneath_noise_and_none_is_made_of_it() -> None:
    chance = random.Random(1)
    noise = [chance.randint(-50, 50) for _ in range(60)]
    flat = [(tasks, 1000 + noise[tasks]) for tasks in range(60)]
    flat[7] = (7, 10**6)  # one sample from a moment of trouble
    assert abs(samples.slope(flat)) < 1.0
    assert 4.0 < samples.slope([(tasks, value + 5 * tasks) for tasks, value in flat]) < 6.0
