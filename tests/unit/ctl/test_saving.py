"""How saving goes and what a task came to, as `ckptctl show` tells it."""

import json
from pathlib import Path

import msgspec
import pytest

from ckptctl import saving
from ckptctl.words import oom_text
from ckptd.protocol import messages as m
from ckptd.protocol.errors import Denied
from tests.unit.ctl.conftest import Scripted, ctl
from tests.unit.ctl.rows import NOW_NS, SECOND_NS, detail, row

NUMBERS: dict[str, float | str] = {
    "strategy": "automatic", "saves": 12, "cost_s": 0.0504, "bytes": 3 << 20, "interval_s": 93.1,
    "budget": 0.01, "mtbf_s": 86_400, "overhead": 0.004, "block_s": 0.6, "wall_s": 150.2,
    "resume_s": 0.02, "interruptions": 1,
}  # fmt: skip


def attempt(number: int, lost_s: float = 0.0, cause: str = "signal") -> m.AttemptRow:
    began_ns = NOW_NS - 60 * SECOND_NS
    return m.AttemptRow(number, began_ns, NOW_NS, cause, None, 9, 0, lost_s, 1.0, 0, "")


def checkpoint(seq: int, *, valid: bool = True, **numbers: float | str) -> m.CheckpointRow:
    path = f"/state/tasks/7/ckpt/{seq:08d}"
    return m.CheckpointRow(seq, valid, True, NOW_NS, 1, 0, (), "d", "", path, numbers)


def test_the_numbers_in_words() -> None:
    facts = dict(saving.number_facts(NUMBERS, [attempt(1, 12.3), attempt(2, 0.5), attempt(3)]))
    assert facts == {
        "strategy": "automatic",
        "saves": "12, the last one with 3.0 MiB in files",
        "cost": "50.4ms a save, 600ms in all",
        "interval": "1m33s (for an interruption every 1d00h)",
        "overhead": "0.40% of 2m30s so far, at most 1% is wanted",
        "resume": "20ms to resume",
        "lost": "13s of work was repeated (attempt 1: 12s, attempt 2: 500ms)",
    }


def test_work_that_an_unseen_end_threw_away_is_told_as_the_most_that_it_can_be() -> None:
    both = [attempt(1, 12.3, "lost"), attempt(2, 0.5)]
    assert saving.lost_text(both) == (
        "at most 13s of work was repeated (attempt 1: at most 12s, attempt 2: 500ms)"
    )
    assert saving.lost_text(both[:1]) == "at most 12s of work was repeated, of attempt 1"


def test_without_numbers_there_is_nothing_to_tell() -> None:
    assert not [text for _, text in saving.number_facts({}) if text]


@pytest.mark.parametrize("value", ["\x1b[2J", -1.0, 1e300, 0.0])
def test_odd_numbers_are_told_without_harm(value: float | str) -> None:
    texts = [text for _, text in saving.number_facts(dict.fromkeys(NUMBERS, value))]
    assert not any("\x1b" in text for text in texts)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.00048, "480us"), (0.05, "50ms"), (1.5, "1.5s"), (125, "2m05s")],
)
def test_short_times_are_told_exactly(seconds: float, text: str) -> None:
    assert saving.short_text(seconds) == text


def test_show_tells_how_saving_goes_and_the_work_lost_at_each_interruption(
    scripted: Scripted,
) -> None:
    one = msgspec.structs.replace(
        detail(row(7, checkpoint=4, attempt=3)),
        attempts=(attempt(1, 12.34), attempt(2), attempt(3, 2.5, "reboot")),
    )
    found = m.CheckpointList((checkpoint(5, valid=False), checkpoint(4, **NUMBERS)))
    daemon = scripted({"show": lambda _: m.TaskDetails((one,)), "checkpoints": lambda _: found})
    _, out, _ = ctl(daemon.endpoint, "show", "7")
    assert "  interval  1m33s (for an interruption every 1d00h)" in out
    text = "at most 15s of work was repeated (attempt 1: 12s, attempt 3: at most 2.5s)"
    assert f"  lost      {text}" in out
    line = next(line for line in out.splitlines() if "reboot" in line)
    assert ("at most 1m00s" in line, "at most 2.5s" in line) == (True, True)
    document = json.loads(ctl(daemon.endpoint, "show", "7", "-o", "json")[1])["tasks"][0]
    assert document["saving"]["saves"] == 12
    assert document["attempts"][0]["lost_s"] == 12.34


def test_show_prints_the_result_of_a_task_that_succeeded(scripted: Scripted) -> None:
    result = json.dumps({"rows": list(range(1_000)), "name": "é"}, ensure_ascii=False)
    done = detail(row(7, phase="succeeded"))
    daemon = scripted({
        "show": lambda _: m.TaskDetails((done,)),
        "checkpoints": lambda _: m.CheckpointList((), result),
    })  # fmt: skip
    _, out, _ = ctl(daemon.endpoint, "show", "7")
    (line,) = [line for line in out.splitlines() if line.startswith("result")]
    assert line.endswith(f"... ({len(result):,} characters: -o json)")
    assert len(line) < 1_200
    asked = daemon.requests[-1][2]
    assert asked == m.Checkpoints(7, result=True)
    document = json.loads(ctl(daemon.endpoint, "show", "7", "-o", "jsonl")[1])
    assert document["result"] == json.loads(result)


def test_a_task_that_neither_saved_nor_succeeded_costs_no_second_request(
    scripted: Scripted,
) -> None:
    daemon = scripted({"show": lambda _: m.TaskDetails((detail(row(7)),))})
    assert ctl(daemon.endpoint, "show", "7")[0] == 0
    assert [verb for _, verb, _ in daemon.requests] == ["show"]


def test_show_goes_on_where_the_files_cannot_be_looked_at(
    scripted: Scripted,
) -> None:
    daemon = scripted({
        "show": lambda _: m.TaskDetails((detail(row(7, checkpoint=4)),)),
        "checkpoints": lambda _: Denied("not yours"),
    })  # fmt: skip
    code, out, err = ctl(daemon.endpoint, "show", "7")
    assert (code, "census" in out) == (0, True)
    assert "the files of task 7 cannot be looked at: not yours" in err


def test_json_of_any_shape_is_shown_on_a_page() -> None:
    value = {
        "short": {"a": [1, 2]},
        "text": "x" * 1_000,
        "rows": [{"id": number, "name": "n" * 20} for number in range(50)],
        "deep": {"er": {f"name {number}": "y" * 60 for number in range(3)}},
    }
    lines = saving.json_lines(value)
    assert lines[:2] == ["{", '  "short": {"a": [1, 2]},']
    assert "(1,002 characters: -o json)" in lines[2]
    assert lines[3:5] == ['  "rows": [', f'    {{"id": 0, "name": "{"n" * 20}"}},']
    assert "    ... 38 more: -o json" in lines
    assert lines[-8:] == [
        '  "deep": {',
        '    "er": {',
        *(f'      "name {number}": "{"y" * 60}"{"," * (number < 2)}' for number in range(3)),
        "    }",
        "  }",
        "}",
    ]
    assert len(saving.json_lines({str(n): ["z" * 90] * 9 for n in range(99)})) <= 41


def test_a_list_that_grew_is_one_line_and_many_changes_are_cut() -> None:
    grown = [{"path": f"state.seen.{n}", "kind": "added", "after": n} for n in range(317, 744)]
    few = [{"path": f"state.few.{n}", "kind": "removed", "before": n} for n in range(2)]
    many = [{"path": f"state.k{n}", "kind": "added", "after": n} for n in range(500)]
    assert saving.change_lines([*grown, *few]) == [
        "state.seen.317 to 743: added 427",
        "state.few.0: removed, was 0",
        "state.few.1: removed, was 1",
    ]
    lines = saving.change_lines(many)
    assert len(lines) == 101
    assert lines[-1] == "... 400 more: -o json"


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("", "the value is empty"),
        ("out.tgz", "hint: ckptctl checkpoint export 7 3 - | gzip > out.tgz"),
        ("a b.tar.zst", "hint: ckptctl checkpoint export 7 3 - | zstd > 'a b.tar.zst'"),
    ],
)
def test_a_name_that_means_something_else_is_not_exported_to(
    tmp_path: Path, target: str, told: str
) -> None:
    nowhere = f"ipc://{tmp_path}/none"
    code, out, err = ctl(nowhere, "checkpoint", "export", "7", "3", target, "--timeout", "1s")
    assert (code, out) == (64, "")
    assert told in err


def test_show_tells_for_each_attempt_how_it_ended(scripted: Scripted) -> None:
    ends = [
        ({"cause": "exit", "code": 3}, "exit 3"),
        ({"cause": "exit", "code": 3, "blame": "disk"}, "exit 3, disk full"),
        ({"cause": "oom", "blame": "host"}, oom_text("host", None)),
        ({"cause": "signal", "signal": 11}, "SIGSEGV"),
        ({"cause": "reboot"}, "reboot"),
        ({"cause": "", "ended_ns": 0}, "running"),
    ]
    plain = msgspec.structs.replace(attempt(1), signal=None)
    rows = tuple(msgspec.structs.replace(plain, **changed) for changed, _ in ends)
    one = msgspec.structs.replace(detail(row(7)), attempts=rows)
    daemon = scripted({
        "show": lambda _: m.TaskDetails((one,)),
        "checkpoints": lambda _: m.CheckpointList(()),
    })  # fmt: skip
    shown = ctl(daemon.endpoint, "show", "7", COLUMNS="200")[1].splitlines()
    (head,) = (index for index, line in enumerate(shown) if line.split()[:2] == ["TRY", "STARTED"])
    at = shown[head].index("END")
    told = [line[at:].split("  ")[0] for line in shown[head + 1 : head + 1 + len(ends)]]
    assert told == [said for _, said in ends]
