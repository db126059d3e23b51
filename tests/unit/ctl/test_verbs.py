"""The command line as a process, against a scripted daemon."""

import json
import os
import signal
from pathlib import Path

import msgspec
import pytest

from ckptctl import edit
from ckptd.protocol import messages as m
from ckptd.protocol.errors import Conflict, DiskFull, ErrorReply, NotFound
from ckptd.sdk.save import save
from ckptd.storage import blobs, manifest
from tests.fakes.scripted_daemon import Handler
from tests.unit.ctl.conftest import Scripted, ctl, ctl_on_terminal, ctl_process
from tests.unit.ctl.rows import detail, page, row
from tests.waiting import until

ENDED = row(7, phase="failed", cause="exit", code=3)


def test_status_prints_a_table_and_status_json_a_document(scripted: Scripted) -> None:
    daemon = scripted({"status": lambda _: page(row(7), row(8, phase="queued"))})
    code, out, _ = ctl(daemon.endpoint)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["ID", "7", "8"]
    document = json.loads(ctl(daemon.endpoint, "-o", "json")[1])
    assert [task["id"] for task in document["tasks"]] == [7, 8]


def test_status_reads_every_page(scripted: Scripted) -> None:
    pages = {0: page(row(1), following=1), 1: page(row(2), following=2), 2: page(row(3))}
    daemon = scripted({"status": lambda asked: pages[asked.cursor]})  # type: ignore[attr-defined]
    assert ctl(daemon.endpoint, "status", "--all", "-q")[1].split() == ["1", "2", "3"]


def test_status_of_a_long_queue_shows_the_active_first(scripted: Scripted) -> None:
    totals = {"running": 1, "queued": 100_000, "succeeded": 50_000}

    def status(asked: m.Message) -> m.TaskPage:
        assert isinstance(asked, m.Status)
        phases = asked.select.phases
        if not phases:
            return m.TaskPage((row(150_001, phase="queued"),), totals, 150_001)
        first = {"starting": row(9), "waiting": row(10, phase="queued")}.get(phases[0])
        ended = row(5, phase="succeeded", ended_ns=5)
        return m.TaskPage((first or ended,), totals, 0)

    daemon = scripted({"status": status})
    code, out = ctl_on_terminal(daemon.endpoint, "status")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["9", "10", "5"]
    assert "3 shown, all: ckptctl status --all" in out.splitlines()[-1]


def test_the_last_tasks_alone_cost_one_page(scripted: Scripted) -> None:
    pages = {0: page(*(row(number) for number in range(900, 800, -1)), following=801)}
    daemon = scripted({"status": lambda asked: pages[asked.cursor]})  # type: ignore[attr-defined]
    assert ctl(daemon.endpoint, "status", "-q", "-n", "3")[1].split() == ["898", "899", "900"]


def test_submit_prints_the_id_and_passes_on_where_it_was_called(
    scripted: Scripted, short_dir: Path
) -> None:
    daemon = scripted({"submit": lambda _: m.Submitted((7,), (True,))})
    code, out, _ = ctl(daemon.endpoint, "submit", "-d", str(short_dir), "--", "true", COLOUR="red")
    assert (code, out) == (0, "7\n")
    (_, _, asked) = daemon.requests[0]
    assert isinstance(asked, m.Submit)
    assert asked.tasks[0].cwd == str(short_dir) == asked.env["PWD"]
    assert asked.env["COLOUR"] == "red"


def test_a_full_disk_is_transient_and_an_error_in_json_is_json(scripted: Scripted) -> None:
    daemon = scripted({"submit": lambda _: DiskFull("no room for new work", "free some")})
    code, out, err = ctl(daemon.endpoint, "submit", "-o", "json", "--", "true")
    assert (code, out) == (2, "")
    error = json.loads(err)["error"]
    assert error["code"] == "disk_full"
    assert error["hint"] == "free some"
    assert error["retryable"]


def test_one_refused_target_gives_its_own_code_and_one_of_many_gives_1(
    scripted: Scripted,
) -> None:
    no = ErrorReply("conflict", "task 8 has ended", "retry it", exit_code=5)
    refused, fine = m.TaskChange(8, "failed", no), m.TaskChange(7, "stopping")
    answers = iter([m.Changed((refused,)), m.Changed((fine, refused))])
    daemon = scripted({"cancel": lambda _: next(answers)})
    code, _, err = ctl(daemon.endpoint, "cancel", "8")
    assert (code, err) == (5, "ckptctl: task 8 has ended\n  hint: retry it\n")
    code, out, err = ctl(daemon.endpoint, "cancel", "7,8")
    assert (code, out) == (1, "task 7: is being stopped\n")
    assert "task 8 has ended" in err


def test_a_retry_says_whether_the_task_is_queued_or_waits_for_others(scripted: Scripted) -> None:
    changed = m.Changed((m.TaskChange(7, "queued"), m.TaskChange(8, "waiting")))
    daemon = scripted({"retry": lambda _: changed})
    code, out, _ = ctl(daemon.endpoint, "retry", "7,8")
    assert (code, out) == (0, "task 7: queued again\ntask 8: put back, now waiting\n")


def test_logs_are_copied_byte_for_byte(scripted: Scripted) -> None:
    text = b"one\n\xff\x00two\nthree\n"

    def output(asked: m.Message) -> m.OutputChunk:
        assert isinstance(asked, m.Output)
        data = text[asked.offset : asked.offset + asked.limit]
        return m.OutputChunk(data, asked.offset, len(text), done=False)

    daemon = scripted({"output": output})
    with ctl_process(daemon.endpoint, "logs", "7") as process:
        assert process.stdout is not None
        assert process.stdout.buffer.read() == text
    assert ctl(daemon.endpoint, "logs", "-n", "1", "7")[1] == "three\n"
    assert ctl(daemon.endpoint, "logs", "-n", "0", "7")[1] == ""


def test_run_copies_the_output_and_returns_the_tasks_own_code(scripted: Scripted) -> None:
    daemon = scripted({
        "submit": lambda _: m.Submitted((7,), (True,)),
        "output": lambda _: m.OutputChunk(b"hello\n", 0, 6, done=True),
        "wait": lambda _: m.Waited(met=True, tasks=(ENDED,)),
    })  # fmt: skip
    code, out, err = ctl(daemon.endpoint, "run", "false")
    assert (code, out) == (3, "hello\n")
    assert "task 7 (census) failed: exit 3" in err


def test_run_detaches_on_ctrl_c_and_cancels_on_the_second(scripted: Scripted) -> None:
    daemon = scripted({
        "submit": lambda _: m.Submitted((7,), (True,)),
        "output": lambda _: m.OutputChunk(b"", 0, 0, done=False),
        "wait": lambda _: m.Waited(met=False, tasks=(row(7),)),
        "cancel": lambda _: m.Changed((m.TaskChange(7, "stopping"),)),
    })  # fmt: skip
    with ctl_process(daemon.endpoint, "run", "sleep", "9") as process:
        assert process.stderr is not None
        until(lambda: daemon.asked("output"))
        process.send_signal(signal.SIGINT)
        until(lambda: "detached" in process.stderr.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert daemon.asked("cancel")


def test_ctrl_c_ends_a_wait_and_says_that_the_task_goes_on(scripted: Scripted) -> None:
    daemon = scripted({"status": lambda _: page(row(7)), "wait": lambda _: None})
    with ctl_process(daemon.endpoint, "wait", "7") as process:
        until(lambda: daemon.asked("wait"))
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=20)[1]
    assert (process.returncode, err) == (130, "ckptctl: task 7 goes on\n")


def test_a_wait_for_what_can_never_come_says_so(scripted: Scripted) -> None:
    over = row(7, phase="succeeded", ended_ns=5)
    daemon = scripted({
        "status": lambda _: page(over), "wait": lambda _: m.Waited(met=True, tasks=(over,)),
    })  # fmt: skip
    code, _, err = ctl(daemon.endpoint, "wait", "--for", "checkpoint", "7")
    assert (code, err) == (1, "ckptctl: task 7 ended without a checkpoint\n")


def test_a_submit_that_follows_does_not_advise_to_follow(scripted: Scripted) -> None:
    over = row(7, phase="succeeded", ended_ns=5)
    daemon = scripted({
        "submit": lambda _: m.Submitted((7,), (True,)),
        "output": lambda _: m.OutputChunk(b"hello\n", 0, 6, done=True),
        "wait": lambda _: m.Waited(met=True, tasks=(over,)),
    })  # fmt: skip
    code, shown = ctl_on_terminal(daemon.endpoint, "submit", "--follow", "true")
    assert code == 0
    assert "hello" in shown
    assert "follow it" not in shown
    assert "follow it: ckptctl logs -f 7" in ctl_on_terminal(daemon.endpoint, "submit", "true")[1]


def test_wait_survives_a_restart_and_returns_the_right_code(scripted: Scripted) -> None:
    daemon = scripted({"status": lambda _: page(row(7)), "wait": lambda _: None})
    with ctl_process(daemon.endpoint, "wait", "--exit-code", "task", "7") as process:
        until(lambda: daemon.asked("wait"))
        daemon.stop()
        daemon.script["wait"] = lambda _: m.Waited(met=True, tasks=(ENDED,))
        daemon.start()
        assert process.wait(30) == 3
        assert process.stderr is not None
        assert "the daemon is back" in process.stderr.read()


@pytest.mark.parametrize(
    ("words", "code"),
    [(["7"], 1), (["--for", "done", "7"], 0), (["--for", "running", "7"], 0),
     (["--for", "checkpoint", "7"], 1), (["--exit-code", "task", "7"], 3), (["--any", "7"], 1)],
)  # fmt: skip
def test_the_exit_code_of_wait_depends_on_what_for(
    scripted: Scripted, words: list[str], code: int
) -> None:
    daemon = scripted({
        "status": lambda _: page(ENDED),
        "wait": lambda _: m.Waited(met=True, tasks=(ENDED,)),
    })  # fmt: skip
    assert ctl(daemon.endpoint, "wait", *words)[0] == code


def test_wait_times_out_with_124_and_asks_once_with_0(scripted: Scripted) -> None:
    daemon = scripted({
        "status": lambda _: page(row(7)),
        "wait": lambda _: m.Waited(met=False, tasks=(row(7),)),
    })  # fmt: skip
    code, _, err = ctl(daemon.endpoint, "wait", "--timeout", "0.2", "7")
    assert code == 124
    assert "task 7 is running" in err
    assert ctl(daemon.endpoint, "wait", "--timeout", "0", "7")[0] == 3


@pytest.mark.parametrize(
    ("first", "last", "code"),
    [("succeeded", "succeeded", 0), ("failed", "succeeded", 1), ("succeeded", "failed", 1)],
)
def test_a_task_that_ended_may_be_forgotten_while_the_others_are_waited_for(
    scripted: Scripted, first: str, last: str, code: int
) -> None:
    answers = iter([
        m.Waited(met=False, tasks=(row(7, phase=first), row(8))),
        NotFound("no task 7"),
        m.Waited(met=True, tasks=(row(8, phase=last),)),
    ])  # fmt: skip
    daemon = scripted({
        "status": lambda _: page(row(7), row(8)),
        "wait": lambda _: next(answers),
    })  # fmt: skip
    told, out, _ = ctl(daemon.endpoint, "wait", "-o", "json", "7", "8")
    assert told == code
    assert [task["id"] for task in json.loads(out)["tasks"]] == [7, 8]
    asked = [args for _, verb, args in daemon.requests if verb == "wait"]
    assert [args.select.ids for args in asked if isinstance(args, m.Wait)] == [(7, 8), (7, 8), (8,)]


def test_a_task_that_was_forgotten_before_its_end_was_heard_of_is_not_found(
    scripted: Scripted,
) -> None:
    answers = iter([m.Waited(met=False, tasks=(row(7), row(8))), NotFound("no task 7")])
    daemon = scripted({
        "status": lambda _: page(row(7), row(8)),
        "wait": lambda _: next(answers),
    })  # fmt: skip
    code, _, err = ctl(daemon.endpoint, "wait", "7", "8")
    assert code == 4
    assert "no task 7" in err


def test_show_in_json_is_complete(scripted: Scripted) -> None:
    daemon = scripted({"show": lambda _: m.TaskDetails((detail(row(7)),))})
    (task,) = json.loads(ctl(daemon.endpoint, "show", "7", "-o", "json")[1])["tasks"]
    assert task["row"]["id"] == 7
    assert task["spec"]["max_failures"] == 4
    assert ctl(daemon.endpoint, "show", "7")[1].startswith("task       7\n")


def test_show_names_the_unit_for_systemctl_and_what_is_not_limited(scripted: Scripted) -> None:
    found = msgspec.structs.replace(
        detail(row(7, attempt=2)), unit="ckptd-task-7-2.service", invocation="ab" * 16,
        warning="not limited here: cpus",
    )  # fmt: skip
    daemon = scripted({"show": lambda _: m.TaskDetails((found,))})
    shown, _, _ = ctl(daemon.endpoint, "show", "7")[1].partition("\n\n")
    facts = dict(line.split(None, 1) for line in shown.splitlines())
    assert facts["unit"] == "ckptd-task-7-2.service"
    assert facts["invocation"] == "ab" * 16
    assert facts["warning"] == "not limited here: cpus"


@pytest.mark.parametrize(
    ("uid", "told"), [(0, "root (uid 0)"), (4_000_000_123, "4000000123")], ids=["known", "unknown"]
)
def test_show_names_the_user_of_a_task_where_the_machine_knows_the_name(
    scripted: Scripted, uid: int, told: str
) -> None:
    daemon = scripted({"show": lambda _: m.TaskDetails((detail(row(7, uid=uid)),))})
    assert f"\nuser       {told}\n" in ctl(daemon.endpoint, "show", "7")[1]


def test_events_go_on_from_the_offset_they_were_given(scripted: Scripted) -> None:
    found = m.Event(11, "started", 5, 7, 1, {"pid": 3})
    pages = {10: m.EventPage((found,), 11), 11: m.EventPage((), 11)}
    daemon = scripted({"events": lambda asked: pages[asked.since]})  # type: ignore[attr-defined]
    code, out, _ = ctl(daemon.endpoint, "events", "--since", "10", "-o", "jsonl")
    assert code == 0
    assert json.loads(out)["lsn"] == 11


def test_a_group_that_does_not_exist_is_not_made_by_a_typing_error(scripted: Scripted) -> None:
    known = m.GroupRow("batch", 0, 2, paused=False, active=0, phases={})
    daemon = scripted({"groups": lambda _: m.Groups((known,))})
    code, _, err = ctl(daemon.endpoint, "group", "set", "bacth", "--parallel", "3")
    assert code == 4
    assert "did you mean batch?" in err


def test_a_checkpoint_is_exported_as_it_is(scripted: Scripted, short_dir: Path) -> None:
    task_dir, source = short_dir / "7", short_dir / "state.bin"
    source.write_bytes(b"\x00\x01")
    blobs.prepare(str(task_dir), 1, os.getuid(), os.getgid(), fresh=False)
    saved = save(str(task_dir), [str(source)], {**manifest.EMPTY, "task": 7, "attempt": 1})
    made = m.CheckpointRow(
        seq=saved.seq, valid=True, sealed=True, at_ns=1, attempt=1, bytes=2, files=("state.bin",),
        digest="d", problem="", path=f"{task_dir}/ckpt/{saved.seq}",
    )  # fmt: skip
    daemon = scripted({"checkpoints": lambda _: m.CheckpointList((made,))})
    code, _, _ = ctl(daemon.endpoint, "checkpoint", "export", "7", str(short_dir / "out"))
    assert code == 0
    assert (short_dir / "out" / "state.bin").read_bytes() == b"\x00\x01"
    assert ctl(daemon.endpoint, "checkpoint", "export", "7", str(short_dir / "out"))[0] == 5
    assert ctl(daemon.endpoint, "checkpoint", "export", "7", "9", str(short_dir / "new"))[0] == 4


def test_edit_sends_only_what_the_editor_changed(scripted: Scripted, short_dir: Path) -> None:
    editor = short_dir / "editor"
    editor.write_text('#!/bin/sh\nsed -i \'s/^timeout = .*/timeout = "2h"/\' "$1"\n')
    editor.chmod(0o755)
    daemon = scripted({
        "show": lambda _: m.TaskDetails((detail(row(7, phase="queued")),)),
        "edit": lambda _: m.Changed((m.TaskChange(7, "queued"),)),
    })  # fmt: skip
    code, out = ctl_on_terminal(daemon.endpoint, "edit", "7", EDITOR=str(editor), VISUAL="")
    assert (code, out) == (0, "task 7: changed\n")
    asked = daemon.requests[-1][2]
    assert asked == m.Edit(m.Selector(ids=(7,)), timeout_s=7200.0)


def test_edit_takes_limits_as_options_as_submit_does(scripted: Scripted) -> None:
    daemon = scripted({"edit": lambda _: m.Changed((m.TaskChange(7, "held"),))})
    code, _, err = ctl(daemon.endpoint, "edit", "7", "--memory", "4G", "--set", "nice=3")
    assert (code, err) == (0, "")
    asked = daemon.requests[-1][2]
    assert asked == m.Edit(m.Selector(ids=(7,)), memory_bytes=4 << 30, nice=3)


def test_edit_refuses_what_cannot_be_edited(scripted: Scripted) -> None:
    daemon = scripted({})
    code, _, err = ctl(daemon.endpoint, "edit", "7", "--set", "nmae=x")
    assert code == 64
    assert "did you mean name?" in err
    assert set(edit.EDITABLE) - {"command"} <= set(edit.spec.SETTINGS)


def test_a_conflict_of_keys_is_5(scripted: Scripted) -> None:
    daemon = scripted({"submit": lambda _: Conflict("key 'k' names task 3")})
    assert ctl(daemon.endpoint, "submit", "-k", "k", "true")[0] == 5


def test_a_closed_pipe_ends_quietly(scripted: Scripted) -> None:
    many = page(*(row(number) for number in range(1, 900)))
    daemon = scripted({"status": lambda _: many})
    with ctl_process(daemon.endpoint, "status", "--all", "-o", "jsonl") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(20) == 141
        assert process.stderr.read() == ""


@pytest.mark.parametrize("silent", ["status", "wait"])
def test_a_wait_ends_at_its_limit_though_the_daemon_does_not_answer(
    scripted: Scripted, silent: str
) -> None:
    script: dict[str, Handler] = {"status": lambda _: page(row(7)), "wait": lambda _: None}
    daemon = scripted({**script, silent: lambda _: None})
    words = "wait", "7", "--timeout", "0.2s", "--answer-within", "45s"
    code, out, err = ctl(daemon.endpoint, *words)  # or it is killed after 50 s
    assert (code, out) == (124, "")
    assert f"the time limit ran out while the daemon did not answer `{silent}`" in err
    assert "the tasks go on" in err


def test_the_advice_for_a_daemon_that_is_slow_is_an_option_that_every_verb_has(
    scripted: Scripted,
) -> None:
    daemon = scripted({"status": lambda _: None})
    code, _, err = ctl(daemon.endpoint, "wait", "7", "--answer-within", "0.2s")
    assert code == 2
    assert "a longer --answer-within waits more" in err


def test_a_task_that_was_forgotten_while_it_was_waited_for_is_told_as_that(
    scripted: Scripted,
) -> None:
    answers = iter([m.Waited(met=False, tasks=(row(7),)), NotFound("no task 7")])
    daemon = scripted({"status": lambda _: page(row(7)), "wait": lambda _: next(answers)})
    code, _, err = ctl(daemon.endpoint, "wait", "7")
    assert code == 4
    assert "no task 7 any more: it ended and was forgotten meanwhile" in err
