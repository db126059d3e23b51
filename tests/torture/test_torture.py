"""The torture itself: a few seconds of it, and that its audit finds what it is there to find."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.torture import samples
from tests.torture.audit import audit
from tests.torture.run import RUN, Options, judged, run

Doctor = Callable[["Notes"], None]


@pytest.mark.timeout(600)  # its own bounds come first
def test_whoever_is_killed_for_some_seconds_nothing_is_lost_and_nothing_done_twice() -> None:
    options = Options(seconds=5.0, seed=random.SystemRandom().randrange(10**6))
    outcome = run(options)
    again = f"{outcome.command}; kept: {outcome.root}"
    assert not outcome.violations, f"{again}: {outcome.violations}"
    assert outcome.figures["kills"] >= 1, again
    assert outcome.figures["tasks"] >= 1, again  # how many is the load of the machine
    shutil.rmtree(outcome.root)


class Notes:
    """The evidence of a small world in which all went well: a task killed once, a batch, a pause.

    w1 works items off and is killed at item 1; w2 fails twice and then succeeds; w3 is a batch; w5
    works items off in four lanes, and is killed while two of them are at their second one.
    """

    def __init__(self) -> None:
        self.facts = [
            "w1 1 1 101 start", "w1 1 1 101 item 0", "w1 1 1 101 item 1",
            "w1 1 2 111 start", *(f"w1 1 2 111 item {n}" for n in range(1, 12)),
            "w1 1 2 111 end 0",
            "w2 2 1 102 start", "w2 2 1 102 end 3", "w2 2 2 103 start", "w2 2 2 103 end 0",
            "w4 4 1 104 start", *(f"w4 4 1 104 at {n}" for n in range(5)), "w4 4 1 104 saved 4",
            "w4 4 2 105 start", *(f"w4 4 2 105 at {n}" for n in range(4, 30)),
            "w4 4 2 105 end 0",
            *(f"w3 0 0 106 item {n}" for n in range(25)),
            "w5 5 1 120 start", *(f"w5 5 1 120 item {n} lane {n % 4}" for n in range(6)),
            "w5 5 2 122 start", *(f"w5 5 2 122 item {n} lane {n % 4}" for n in range(2, 24)),
            "w5 5 2 122 end 0",
        ]  # fmt: skip
        kinds = {1: "items", 2: "flaky", 4: "manual", 5: "lanes"}
        self.sent = [{"work": work, "kind": kind} for work, kind in kinds.items()]
        self.acked = [{"work": work, "task": work} for work in kinds]
        self.strikes = [
            struck(pid, task=task, work=f"w{task}") for pid, task in ((101, 1), (104, 4), (120, 5))
        ]
        self.steered = [{"verb": "checkpoint_now", "tasks": [2]}, {"verb": "cancel", "tasks": []}]
        self.batches: list[dict[str, Any]] = [{"name": "w3"}, {"name": "w3", "finished": True}]
        self.events = [
            event("daemon_started", 0, 0, boot_id="b"),
            *life(1, (101, "signal", 0, "queued"), (111, "exit", 0, "succeeded")),
            *life(2, (102, "exit", 3, "waiting"), (103, "exit", 0, "succeeded")),
            *life(4, (104, "signal", 0, "queued"), (105, "exit", 0, "succeeded")),
            *life(5, (120, "signal", 0, "queued"), (122, "exit", 0, "succeeded")),
            event("checkpoint_asked", 2, 1),
        ]
        results = [{"key": str(n), "status": "pass", "result": n * 2} for n in range(25)]
        self.closing: dict[str, Any] = {
            "rows": [{"id": task, "phase": "succeeded"} for task in kinds],
            "checkpoints": {},
            "forgets": False,
            "since": 0,
            "files_at_rest": ["wal/1.wal"],
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


S_NS = 1_000_000_000


def struck(pid: int, **who: Any) -> dict[str, Any]:
    """Return a strike at a process in the midst of its life; of no attempt where none is told."""
    attempt = {"attempt": 1} if "task" in who else {}
    about = {"ticks": 1, "name": "sh", "how": "one", "at_ns": pid * 100 * S_NS + S_NS // 2}
    return {"pid": pid, **about, **attempt, **who}


def life(task: int, *attempts: tuple[int, str, int, str]) -> list[dict[str, Any]]:
    """Return the events of a task: each attempt with its pid, its end and the phase after it.

    The process `pid` lives for one second, from pid * 100 on.
    """
    told = [event("submitted", task, 0, phase="queued", key=f"w{task}")]
    for number, (pid, cause, code, phase) in enumerate(attempts, 1):
        signal = 9 if cause == "signal" else 0
        shim = {"boot_id": "b", "pid": pid + 1000, "ticks": 1}
        over_ns = pid * 100 * S_NS + S_NS
        end = {"cause": cause, "code": code, "signal": signal, "verdict": {"phase": phase}}
        end["ended_ns"] = over_ns
        lived = [
            event("start_intent", task, number),
            event("started", task, number, pid=pid, shim=shim),
            event("ended", task, number, **end),
        ]
        for at, one in enumerate(lived):
            one["at_ns"] = pid * 100 * S_NS + at * S_NS // 2
        told += lived
    return told


def event(kind: str, task: int, attempt: int, **fields: Any) -> dict[str, Any]:
    """Return one event as the daemon tells it."""
    return {"type": kind, "task": task, "attempt": attempt, "at_ns": 0, "lsn": 0, "fields": fields}


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


def again_beside_others(notes: Notes, item: int) -> None:
    """An item is begun once more where four are under way, by a lane that is there for a moment."""
    at = notes.facts.index("w5 5 2 122 item 2 lane 2")
    notes.facts.insert(at, f"w5 5 2 122 item {item} lane 9")


def signalled(notes: Notes, task: int, attempt: int, before_s: int) -> None:
    """An attempt is answered a signal so long before its end."""
    at_ns = end_of(notes, task, attempt)["ended_ns"] - before_s * S_NS
    place = next(n for n, one in enumerate(notes.events) if one["task"] == task and one["attempt"])
    notes.events.insert(
        place + 1, event("signal_intent", task, attempt, signal=9) | {"at_ns": at_ns}
    )


def signalled_in_vain(notes: Notes, many: int) -> None:
    """So many tasks are answered a signal just before they end by themselves."""
    for task in range(20, 20 + many):
        notes.events += life(task, (1_000 + task, "exit", 0, "succeeded"))
        signalled(notes, task, 1, 0)


def rerun(notes: Notes) -> None:
    """An item of a batch under the daemon runs again in the first attempt."""
    notes.facts.append("w3 0 0 106 item 3")
    notes.events += life(9, (106, "exit", 0, "succeeded"))
    submitted = next(one for one in notes.events if (one["type"], one["task"]) == ("submitted", 9))
    submitted["fields"]["key"] = "batch:w3:1"


def hit_and_failed(notes: Notes) -> None:
    notes.strikes.append(struck(106, work="w3", line="python -m ckptd.batch"))
    notes.closing["batches"]["w3"][4].update(status="fail")


def struck_elsewhere(notes: Notes) -> None:
    """Another process had the pid later, and was killed."""
    notes.strikes.append(struck(102) | {"at_ns": 900_000 * S_NS})
    end_of(notes, 2, 1).update(code=0)


def supervisor_struck_later(notes: Notes) -> None:
    """The supervisor that had the attempt is killed while it has another one."""
    notes.strikes.append(struck(1102, name="ckptd-shim") | {"at_ns": 900_000 * S_NS})
    end_of(notes, 2, 1).update(code=0)


def host_struck(notes: Notes, *items: int) -> None:
    """The host of the batch is killed once, and these items run again."""
    notes.strikes.append(struck(106, work="w3", line="python -m ckptd.batch"))
    notes.facts += [f"w3 0 0 107 item {item}" for item in items]


def quarantined(notes: Notes, number: int) -> None:
    host_struck(notes)
    for one in notes.closing["batches"]["w3"][:number]:
        one.update(status="quarantined")


def retried_twice(notes: Notes) -> None:
    notes.steered += [{"verb": "retry", "tasks": [2]}] * 2
    notes.events.append(event("reset", 2, 0, fresh=False))
    notes.events.append(event("moved", 2, 0, phase="succeeded"))


def moved_to_the_end(notes: Notes) -> None:
    notes.events = [one for one in notes.events if one["task"] != 2 or not one["attempt"]]
    notes.facts = [fact for fact in notes.facts if not fact.startswith("w2")]
    notes.events.append(event("moved", 2, 0, phase="succeeded"))


def told_as(notes: Notes, cause: str) -> None:
    """The killed attempt is told to have ended by something else."""
    end_of(notes, 1, 1).update(cause=cause, signal=0)


def removed(notes: Notes) -> None:
    notes.events.append(event("removed", 2, 0))
    notes.closing["rows"] = [row for row in notes.closing["rows"] if row["id"] != 2]
    notes.closing["files"].remove("output/2.log")


def removed_while_queued(notes: Notes) -> None:
    notes.events.insert(-1, event("submitted", 9, 0, phase="queued", key=""))
    notes.events.append(event("removed", 9, 0))


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
        (lambda n: again_beside_others(n, 1), "item 1 again in attempt 2"),
        (lambda n: n.facts.append("w5 5 3 123 item 23 lane 9"), "item 23 again in attempt 3"),
        (lambda n: signalled(n, 2, 2, 3), "task 2, attempt 2: SIGKILL was answered, told as exit"),
        (lambda n: signalled_in_vain(n, 10), "SIGKILL of 10 attempts was answered, and none died"),
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
        (lambda n: n.events.append(n.events[4]), "told twice"),
        (lambda n: end_of(n, 2, 1).update(code=0), "told as exit 0 0, left with 3"),
        (lambda n: end_of(n, 2, 2).update(cause="lost"), "nobody had touched it"),
        (struck_elsewhere, "told as exit 0 0, left with 3"),
        (supervisor_struck_later, "told as exit 0 0, left with 3"),
        (lambda n: told_as(n, "oom"), "told as oom"),
        (lambda n: told_as(n, "timeout"), "told as timeout"),
        (lambda n: told_as(n, "cancel"), "told as cancel"),
        (lambda n: told_as(n, "reboot"), "told as reboot"),
        (lambda n: told_as(n, "lost"), "told as lost"),
        (moved_to_the_end, "never came to its end"),
        (lambda n: end_of(n, 2, 2).update(code=7), "its last attempt is told as exit 7"),
        (removed, "nobody asked for it"),
        (lambda n: (removed(n), n.closing["rows"].append({"id": 2, "phase": "succeeded"})),
         "task 2 was removed and is there"),
        (removed_while_queued, "removed while it was queued"),
        (retried_twice, "retry of task 2 was answered 2 times"),
        (lambda n: n.facts.insert(n.facts.index("w4 4 2 105 at 4"), "w4 4 2 105 at 9"),
         "is at 9 after 4"),
        (lambda n: without(n, "w4 4 1 104 at 3"), "is at 4 after 2"),
        (lambda n: without(n, "w4 4 2 105 at 29"), "done at turn 29 of 30"),
        (lambda n: host_struck(n, 1, 2, 3, 4), "4 repeats, 1 kills of its host"),
        (lambda n: quarantined(n, 4), "4 items quarantined"),
        (lambda n: n.closing["files_at_rest"].append("snap/9.tmp"), "temporary file"),
        (lambda n: n.closing["files_at_rest"].append("attempts/3.1"), "attempt that is over"),
        (lambda n: end_of(n, 1, 1).update(cause="exit"), "never came to its end"),
        (lambda n: end_of(n, 1, 1).update(cause="not_started"), "ran, told as not_started"),
        (lambda n: n.closing["rows"].pop(), "is None by status"),
        (lambda n: n.facts.insert(n.facts.index("w4 4 2 105 at 4"), "w4 4 2 105 at 3"),
         "began at 3, 4 was saved"),
        (lambda n: n.closing["batches"]["w3"].pop(), "batch w3"),
        (lambda n: n.closing["batches"]["w3"][4].update(result=9), "item 4 passed with 9"),
        (lambda n: without(n, "w3 0 0 106 item 3"), "item 3 passed"),
        (lambda n: n.facts.append("w3 0 0 106 item 3"), "1 repeats"),
        (lambda n: n.closing["checkpoints"].update({"1": "digest"}), "checkpoints of 1"),
        (lambda n: n.closing["wal"].update(code=65), "does not verify"),
        (lambda n: n.closing["files"].append("snap/9.tmp"), "temporary file"),
        (lambda n: n.closing["files"].append("tasks/77"), "not there"),
        (lambda n: n.closing["files"].append("quarantine/FORMAT.bad"), "found bad"),
        (lambda n: n.closing["files"].append("attempts/3.1"), "attempt that is over"),
        (lambda n: n.closing["run_files"].append("notify/3.sock"), "socket of no task"),
        (lambda n: n.closing["batches"]["w3"][4].update(status="error"), "came to error"),
        (lambda n: end_of(n, 4, 1).update(signal=15), "by SIGKILL alone"),
        (lambda n: end_of(n, 2, 2).update(verdict={"phase": "failed"}), "ended as failed"),
        (rerun, "1 repeats, 0 kills of its host, 0 of items, 0 stops"),
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


@pytest.mark.parametrize(
    "doctor",
    [
        lambda n: host_struck(n, 1, 2, 3),
        lambda n: quarantined(n, 3),
        lambda n: signalled(n, 2, 2, 1),
        lambda n: signalled_in_vain(n, 9),
        lambda n: signalled(n, 1, 1, 3),
        lambda n: (
            signalled(n, 2, 2, 3),
            n.events.append(event("daemon_started", 0, 0, boot_id="b") | {"at_ns": 10_302 * S_NS}),
        ),
        lambda n: (removed(n), n.steered.append({"verb": "clean", "tasks": [2]})),
    ],
)
def test_the_audit_allows_what_a_strike_or_a_person_explains(
    tmp_path: Path, doctor: Doctor
) -> None:
    notes = Notes()
    doctor(notes)
    assert notes.audited(tmp_path) == []


def test_evidence_that_is_empty_proves_nothing(tmp_path: Path) -> None:
    notes = Notes()
    for name in ("facts", "sent", "acked", "strikes", "steered", "batches", "events"):
        setattr(notes, name, [])
    notes.closing |= {"rows": [], "files": [], "files_at_rest": [], "run_files": [], "batches": {}}
    place = tmp_path / "evidence"
    assert notes.audited(tmp_path) == []
    figures = {"seconds": 100.0, "strikes": {}, "batches": 0}
    done = {"name": "torture", "command": "", "figures": figures, "violations": []}
    (place / RUN).write_text(json.dumps(done))
    found = judged(tmp_path).violations
    assert [one.split()[:3] for one in found] == [
        ["only", "0", name] for name in ("struck", "tasks", "facts", "struck_attempts", "batches")
    ]


def test_a_key_may_name_another_task_once_the_first_is_forgotten(tmp_path: Path) -> None:
    notes = Notes()
    notes.closing["forgets"] = True
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


def lives(*rss_kb: list[int]) -> list[dict[str, int]]:
    """Return samples of every ten seconds, of one daemon after the other."""
    shape = dict.fromkeys(("files", "bytes", "segments", "snapshots", "processes"), 10)
    shape |= {"threads": 11, "descriptors": 50, "snapshot_lsn": 1}
    found: list[dict[str, int]] = []
    for pid, values in enumerate(rss_kb):
        for value in values:
            t_s = 10 * len(found)
            found.append(shape | {"t_s": t_s, "tasks": 50 * t_s, "calm": int(len(values) > 1),
                                  "pid": pid, "changes": 20_000, "rss_kb": value})  # fmt: skip
    return found


def wild(count: int) -> list[list[int]]:
    """Return as many short lives."""
    return [[35_000]] * count


def leaking(kb_per_sample: int) -> list[int]:
    return [40_000 + at * kb_per_sample for at in range(30)]


FLAT = [40_000] * 10 + [45_000] * 20  # it takes its pages once


def grown_of(samples_: list[dict[str, int]]) -> list[str]:
    return samples.growth(samples_, len(samples_) * 10.0).violations


def test_lives_that_take_their_pages_once_do_not_grow() -> None:
    assert grown_of(lives(*wild(30), FLAT, *wild(30), FLAT, *wild(30), FLAT)) == []


def with_snapshots(seen: list[dict[str, int]], *at: int) -> list[dict[str, int]]:
    """Let each of the last thirty samples that `at` counts be the first behind a new snapshot."""
    for number, one in enumerate(seen[-30:]):
        one["snapshot_lsn"] += sum(number >= count for count in at)
    return seen


def test_what_the_first_snapshot_of_a_life_takes_is_taken_once() -> None:
    late = [42_000] * 20 + [48_500] * 10
    assert grown_of(with_snapshots(lives(*wild(30), FLAT, *wild(30), late), 20)) == []


def test_what_every_snapshot_of_a_life_takes_is_a_leak() -> None:
    late = [42_000] * 2 + [48_500] * 18 + [56_000] * 10
    found = grown_of(with_snapshots(lives(*wild(30), FLAT, *wild(30), late), 2, 20))
    assert any(one.startswith("rss_kb grew by") and "in one life" in one for one in found), found


@pytest.mark.parametrize("kb_per_sample", [1_000, 4_000])
def test_a_leak_in_one_life_of_many_is_seen(kb_per_sample: int) -> None:
    found = grown_of(lives(*wild(30), FLAT, *wild(30), leaking(kb_per_sample), *wild(30), FLAT))
    assert any(one.startswith("rss_kb grew by") and "in one life" in one for one in found), found


def test_a_leak_of_descriptors_is_seen_although_each_life_begins_anew() -> None:
    seen = lives(*wild(30), FLAT, *wild(30), FLAT)
    for at, one in enumerate(seen[-30:]):
        one["descriptors"] += at
    assert any("descriptors grew by" in one for one in grown_of(seen))


def test_files_that_stay_behind_from_life_to_life_are_seen() -> None:
    seen = lives(*wild(30), FLAT, *wild(30), FLAT)
    for at, one in enumerate(seen):
        one["files"] += at // 10
    assert any(one.startswith("files grew by") for one in grown_of(seen))


def test_a_peak_that_is_gone_by_the_next_sample_is_seen() -> None:
    seen = lives(FLAT)
    seen[25]["rss_kb"] = 90_000
    assert any("came to 90000" in one for one in grown_of(seen))


def test_what_answers_take_until_they_are_as_many_as_are_remembered_is_no_growth() -> None:
    seen = lives([30_000 + at * 100 for at in range(100)] + [40_000] * 80)
    for at, one in enumerate(seen):
        one["changes"] = at * 164
    assert grown_of(seen) == []


def test_a_soak_without_samples_shows_nothing() -> None:
    assert samples.growth([], 3600.0).violations == [
        "only 0 samples in 3600 s",
        "only 0 lives of the daemon were long enough to be judged",
    ]
