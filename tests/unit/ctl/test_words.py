import msgspec
import pytest

from ckptctl import words
from ckptctl.picture import check_code
from ckptctl.run import exit_code
from ckptd.protocol.limits import RETRIES_UNLIMITED
from ckptd.protocol.messages import Progress
from tests.unit.ctl.rows import NOW_NS, SECOND_NS, row


def test_a_state_says_why() -> None:
    until = NOW_NS + 12 * SECOND_NS
    assert words.state_text(row(), NOW_NS) == "running"
    waiting = row(phase="waiting", reason="backoff", until_ns=until, failures=2, failures_max=3)
    assert words.state_text(waiting, NOW_NS) == "waiting: retry in 12s (failure 2 of 3)"
    unlimited = msgspec.structs.replace(waiting, failures_max=RETRIES_UNLIMITED + 1)
    assert words.state_text(unlimited, NOW_NS) == "waiting: retry in 12s (failure 2)"
    starts = row(phase="waiting", reason="at", until_ns=until)
    assert words.state_text(starts, NOW_NS) == "waiting: starts in 12s"
    after = row(phase="waiting", reason="after")
    assert words.state_text(after, NOW_NS) == "waiting: for other tasks"


def test_an_end_says_how() -> None:
    assert words.end_text(row(cause="exit", code=3)) == "exit 3"
    assert words.end_text(row(cause="signal", signal=11)) == "SIGSEGV"
    assert words.end_text(row(cause="oom", signal=9)) == "out of memory"
    assert words.end_text(row(cause="oom", signal=9, blame="limit")) == "over its memory limit"
    assert words.end_text(row(cause="oom", signal=9, code=137, blame="limit")) == (
        "over its memory limit, a child was killed (exit 137)"
    )
    assert words.end_text(row(cause="oom", blame="host")) == "the host ran out of memory"
    assert words.end_text(row(cause="shutdown", code=0)) == "stopped by a shutdown"
    assert words.end_text(row(cause="spawn_error", code=2)) == (
        "cannot start: no such file or directory"
    )


def test_an_exit_on_a_full_disk_names_the_disk() -> None:
    full = row(phase="failed", reason="permanent", cause="exit", code=1, blame="disk")
    assert words.state_text(full, NOW_NS) == "failed: permanent (exit 1, disk full)"
    until = NOW_NS + 12 * SECOND_NS
    waits = row(phase="waiting", reason="transient", until_ns=until, blame="disk")
    assert words.state_text(waits, NOW_NS) == "waiting: retry in 12s (disk full)"


def test_a_task_that_could_not_start_names_what_was_missing() -> None:
    text = "cannot execute mkae: No such file or directory"
    failed = row(phase="failed", reason="cannot start", cause="spawn_error", code=2, text=text)
    assert words.state_text(failed, NOW_NS) == f"failed: {text}"


def test_a_task_that_could_not_start_at_last_still_names_what_ended_it() -> None:
    text = "cannot prepare its directory: Resource temporarily unavailable"
    late = row(phase="failed", reason="deadline", cause="spawn_error", code=11, text=text)
    assert words.state_text(late, NOW_NS) == f"failed: past its deadline ({text})"
    gone = row(phase="cancelled", reason="cancel", cause="spawn_error", code=11, text=text)
    assert words.state_text(gone, NOW_NS) == "cancelled"


def test_a_state_after_running_out_of_memory_says_what_comes_next() -> None:
    oom = {"cause": "oom", "signal": 9, "blame": "limit"}
    again = row(phase="queued", reason="oom", **oom)
    assert words.state_text(again, NOW_NS) == "queued: again, with more memory"
    held = row(phase="held", reason="oom", **oom)
    assert words.state_text(held, NOW_NS) == "held: over its memory limit"
    failed = row(phase="failed", reason="oom", **oom)
    assert words.state_text(failed, NOW_NS) == "failed: over its memory limit"
    stopped = row(phase="cancelled", reason="stopped", cause="stopped", signal=15)
    assert words.state_text(stopped, NOW_NS) == "cancelled: its unit was stopped"


def test_limits_are_told_by_their_options_and_the_usual_is_left_out() -> None:
    given = dict(words.settings({"cpus": 1.5, "tasks_max": 9, "nice": -3, "on_oom": "hold"}))
    assert [given[name] for name in ("cpus", "tasks-max", "nice", "on-oom")] == [
        "1.5", "9", "-3", "hold",
    ]  # fmt: skip
    usual = dict(words.settings({"on_oom": "count"}))
    limits = ("memory", "cpus", "tasks-max", "io-weight", "nice", "on-oom")
    assert not any(usual[name] for name in limits)


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (("/p/python3", "/l/ckptd/sdk/run.py", "work:bill", "--input", "{}"), "work:bill"),
        (
            ("/p/python3", "/l/ckptd/sdk/run.py", "work:bill", "--input", '{"n":1}'),
            'work:bill {"n":1}',
        ),
        (("/p/python", "-P", "-m", "ckptd.batch", "run", "/h/batches/lint"), "batch lint"),
        (("python3", "run.py", "a b"), "python3 run.py 'a b'"),
    ],
)
def test_a_list_says_what_a_function_or_a_batch_is_and_not_how_it_is_run(
    argv: tuple[str, ...], shown: str
) -> None:
    assert words.brief_command_text(row(argv=argv)) == shown


def test_a_batch_that_ended_badly_is_explained_by_its_items() -> None:
    over = row(name="batch:lint", phase="failed", labels={"batch": "lint"}, attempt=1)
    assert words.next_steps(over) == [
        "which items, and how to go on: ckptctl batch status lint",
        "its output: ckptctl logs -n 20 1",
    ]


def test_hostile_text_cannot_steer_the_terminal() -> None:
    said = Progress(text="\x1b[2Jgone\r\n", at_ns=1)
    for text in (
        words.progress_text(row(progress=said)),
        words.command_text(row(argv=("echo", "\x1b]0;x\x07"))),
        words.clean("a\u202eb"),
    ):
        assert text.isprintable()


def test_the_name_of_a_program_that_is_missing_cannot_steer_the_terminal() -> None:
    failed = row(phase="failed", cause="spawn_error", code=2, text="cannot execute \x1b[2J\nx")
    assert words.end_text(failed) == words.clean(failed.text)
    assert not {"\x1b", "\n"} & set(words.outcome_text(failed))


def test_progress_is_a_share_a_bar_and_the_time_left() -> None:
    task = row(progress=Progress(340, 1000, "", NOW_NS, rate=10.0))
    assert words.progress_text(task) == "34% 340/1000"
    assert words.eta_text(task) == "1m06s"
    assert words.bar_text(task, 10) == "━━━───────  34%"
    full = msgspec.structs.replace(task, progress=Progress(1000, 1000))
    assert words.bar_text(full, 4) == "━━━━ 100%"
    assert words.bar_text(row(progress=Progress(7)), 4) == "7"


@pytest.mark.parametrize(
    ("cause", "most"), [("lost", "at most "), ("reboot", "at most "), ("signal", "")]
)
def test_an_end_that_nobody_saw_is_told_with_the_most_that_it_can_have_lasted(
    cause: str, most: str
) -> None:
    queued = row(phase="queued", cause=cause, ended_ns=NOW_NS)
    assert words.runtime_text(queued, NOW_NS) == f"{most}50s"
    assert words.outcome_text(queued).endswith(f", after {most}50s")
    again = msgspec.structs.replace(queued, phase="running", attempt=2)
    assert words.runtime_text(again, NOW_NS) == "50s", "this one is seen"


def test_the_exit_code_of_run_is_the_tasks_own() -> None:
    assert exit_code(row(phase="succeeded", cause="exit", code=0)) == 0
    assert exit_code(row(phase="failed", cause="exit", code=3)) == 3
    assert exit_code(row(phase="failed", cause="signal", signal=11)) == 139
    assert exit_code(row(phase="cancelled", cause="cancel", signal=15)) == 143
    assert exit_code(row(phase="failed", cause="oom", signal=9)) == 137
    assert exit_code(row(phase="failed", cause="timeout", signal=15)) == 124
    assert exit_code(row(phase="failed", cause="spawn_error", code=2)) == 127
    assert exit_code(row(phase="failed", cause="spawn_error", code=13)) == 126
    assert exit_code(row(phase="cancelled", attempt=0)) == 1
    assert exit_code(row(phase="failed", cause="exit", code=0)) == 1


def test_check_tells_failed_from_unfinished() -> None:
    assert check_code([row(phase="succeeded")]) == 0
    assert check_code([row(phase="succeeded"), row(phase="failed")]) == 1
    assert check_code([row(phase="failed"), row(phase="queued")]) == 3
