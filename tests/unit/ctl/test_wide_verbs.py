"""What strangers stumbled over: wide selections, bounds in words, formats that a verb lacks."""

import json
import os
from pathlib import Path

import msgspec
import pytest

from ckptctl.admin import configured_state_dir, stop_command
from ckptctl.events import TYPES
from ckptctl.refusals import out_of_range
from ckptctl.words import state_text
from ckptd.core.records import Record
from ckptd.host import config
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadRequest, ErrorReply, NotFound
from tests.unit.ctl.conftest import Scripted, ctl, ctl_on_terminal
from tests.unit.ctl.rows import NOW_NS, detail, page, row

OVER = ErrorReply("conflict", "cannot signal task 8: it is failed", "", exit_code=5)
DENIED = ErrorReply("denied", "task 9 belongs to uid 0", "", exit_code=77)


def test_a_pipe_gets_every_task_where_a_terminal_gets_a_digest(scripted: Scripted) -> None:
    rows = [row(number, phase="succeeded", ended_ns=number) for number in range(1, 40)]
    daemon = scripted({"status": lambda _: page(*rows)})
    assert len(ctl(daemon.endpoint, "status", "--no-headers")[1].splitlines()) == 39
    shown = ctl_on_terminal(daemon.endpoint, "status", "--no-headers")[1].splitlines()
    assert len(shown) == 11
    assert "10 shown" in shown[-1]


def test_a_wide_selection_counts_what_does_not_fit_and_a_named_task_is_an_error(
    scripted: Scripted,
) -> None:
    fine, over = m.TaskChange(7, "running"), m.TaskChange(8, "failed", OVER)
    answer = [m.Changed((fine, over, m.TaskChange(10, "failed", OVER)))]
    daemon = scripted({"signal": lambda _: answer[0]})
    for words in (["-g", "batch"], ["--all"], ["--state", "live,ended"], ["name:b*"]):
        code, out, err = ctl(daemon.endpoint, "signal", "USR1", *words)
        assert (code, out) == (0, "task 7: signalled\n")
        assert err == "ckptctl: 2 were not running\n"
    assert ctl(daemon.endpoint, "signal", "USR1", "7,8,10")[0] == 1
    answer[0] = m.Changed((over,))
    assert ctl(daemon.endpoint, "signal", "USR1", "--all")[::2] == (
        0,
        "ckptctl: 1 was not running\n",
    )
    answer[0] = m.Changed((fine, m.TaskChange(9, "running", DENIED)))
    assert ctl(daemon.endpoint, "signal", "USR1", "--all")[0] == 1


def test_a_person_is_asked_with_the_number_of_tasks(scripted: Scripted) -> None:
    daemon = scripted({"status": lambda _: page(row(1), row(2))})
    code, shown = ctl_on_terminal(daemon.endpoint, "cancel", "--all", typed="n\n")
    assert code == 64
    assert "cancel 2 tasks? [y/N]" in shown
    assert not daemon.asked("cancel")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["submit", "-g", "a b", "x"], "--group: 'a b' is not allowed\n  hint: allowed: letters"),
        (["submit", "-p", "9999999", "x"], "priority: 9999999 is not allowed"),
        (["submit", "-p", "high", "x"], "--priority: not a whole number: 'high'"),
        (["submit", "--in", "999d", "x"], "--in: 999d00h is not allowed"),
        (["submit", "--retries", "-1", "x"], "--retries: -1 is not allowed"),
        (["submit", "--backoff", "10m..5s", "x"], "--backoff: the longest delay"),
        (["edit", "7", "--set", "priority=9999999"], "priority: 9999999 is not allowed"),
    ],
)
def test_a_value_out_of_range_is_told_by_its_option(
    scripted: Scripted, words: list[str], said: str
) -> None:
    code, _, err = ctl(scripted({}).endpoint, *words)
    assert code == 64
    assert said in err
    assert "$" not in err
    assert "regex" not in err


def test_what_only_the_daemon_refuses_is_told_by_its_option_too() -> None:
    bad = BadRequest("group_set: Expected `int` <= 10000 - at `$.parallel`")
    told = out_of_range(bad, m.GroupSet("gpu", 20_000))
    assert told.message == "--parallel: 20000 is not allowed"
    assert told.hint == "allowed: a whole number from 0 to 10,000"


def test_the_last_task_is_called_as_it_was_typed(scripted: Scripted) -> None:
    gone = NotFound("no task @~0: you have submitted 0")
    daemon = scripted({"show": lambda _: gone})
    code, _, err = ctl(daemon.endpoint, "show", "@last")
    assert code == 4
    assert "no task @last: you have no tasks yet" in err
    assert "ckptctl: you have no tasks yet" in ctl(daemon.endpoint, "show")[2]


def test_edit_without_a_terminal_is_refused_and_bad_toml_is_kept(
    scripted: Scripted, short_dir: Path
) -> None:
    editor = short_dir / "editor"
    editor.write_text('#!/bin/sh\necho "nonsense [" > "$1"\n')
    editor.chmod(0o755)
    daemon = scripted({"show": lambda _: m.TaskDetails((detail(row(7, phase="queued")),))})
    code, _, err = ctl(daemon.endpoint, "edit", "7", EDITOR=str(editor))
    assert code == 64
    assert "needs a terminal" in err
    at = {"EDITOR": str(editor), "VISUAL": "", "TMPDIR": str(short_dir)}
    code, shown = ctl_on_terminal(daemon.endpoint, "edit", "7", typed="y\nn\n", **at)
    (kept,) = short_dir.glob("ckptctl-*.toml")
    assert code == 64
    assert shown.count("open it again?") == 2
    assert f"what you wrote is kept in {kept}" in shown
    code, shown = ctl_on_terminal(daemon.endpoint, "edit", "7", EDITOR="false", VISUAL="")
    assert code == 64
    assert "the editor false failed (exit 1), nothing was changed" in shown


def test_every_format_is_one_document_or_refused(scripted: Scripted) -> None:
    known = m.GroupRow("batch", 3, 3, paused=False, active=0, phases={})
    daemon = scripted({
        "submit": lambda _: m.Submitted((7,), (True,)),
        "wait": lambda _: m.Waited(met=True, tasks=(row(7, phase="succeeded"),)),
        "groups": lambda _: m.Groups((known,)),
        "group_set": lambda _: m.Done(),
    })  # fmt: skip
    at = daemon.endpoint
    (task,) = json.loads(ctl(at, "submit", "--wait", "-o", "json", "true")[1])["tasks"]
    assert (task["id"], task["phase"]) == (7, "succeeded")
    assert json.loads(ctl(at, "submit", "-o", "jsonl", "true")[1])["id"] == 7
    assert ctl(at, "submit", "-o", "csv", "true")[1] == "id,created\n7,true\n"
    assert ctl(at, "submit", "-o", "{id}!", "true")[1] == "7!\n"
    assert ctl(at, "submit", "-q", "--wait", "true")[1] == "7\n"
    group = json.loads(ctl(at, "group", "set", "batch", "-j", "3", "-o", "json")[1])["group"]
    assert group["parallel"] == 3
    assert ctl(at, "group", "set", "batch", "-j", "3", "-o", "csv")[0] == 64
    assert ctl(at, "logs", "7", "-o", "json")[0] == 64
    assert ctl(at, "run", "-o", "json", "true")[0] == 64


def test_a_configuration_is_checked_in_json(scripted: Scripted, short_dir: Path) -> None:
    file = short_dir / "ckptd.toml"
    file.write_text(f'[daemon]\nrun_dir = "/{"x" * 107}"\n')
    endpoint = scripted({}).endpoint
    code, out, _ = ctl(endpoint, "config", "check", str(file), "-o", "json")
    found = json.loads(out)["config"]
    assert (code, found["ok"]) == (78, False)
    assert "daemon.run_dir has 108 bytes, over 87" in found["problems"][0]


def test_a_diff_tells_keys_that_the_file_says_nothing_of_any_more(
    scripted: Scripted, short_dir: Path
) -> None:
    file = short_dir / "ckptd.toml"
    file.write_text("[task]\nretries = 2\n")
    began = msgspec.to_builtins(config.load(str(file)))
    began["daemon"]["state_dir"] = "/srv/ckptd"
    began["groups"]["big"] = {"parallel": 3}
    endpoint = scripted({"config": lambda _: m.EffectiveConfig(str(file), began)}).endpoint
    code, out, _ = ctl(endpoint, "config", "diff")
    assert code == 1
    assert out.splitlines() == [
        f"daemon.state_dir: '/srv/ckptd' in force, '' in {file}",
        f"groups.big.parallel: 3 in force, nothing in {file}",
    ]
    file.write_text("[task]\nretreis = 2\n")
    code, _, err = ctl(endpoint, "config", "diff")
    assert code == 78
    assert "unknown key task.retreis" in err
    assert "hint: every key is explained in etc/ckptd.toml" in err


def test_without_a_daemon_the_usual_file_is_checked(short_dir: Path) -> None:
    usual = Path("/etc") if os.geteuid() == 0 else short_dir
    file = usual / "ckptd" / "ckptd.toml"
    if os.geteuid():
        file.parent.mkdir()
        file.write_text("[task]\nretreis = 2\n")
    nobody = f"ipc://{short_dir}/ctl.sock"
    _, out, _ = ctl(nobody, "config", "check", "-o", "json", XDG_CONFIG_HOME=str(short_dir))
    assert json.loads(out)["config"]["path"] == (str(file) if file.exists() else None)


@pytest.mark.parametrize("verb", ["check", "diff"])
def test_an_empty_name_of_a_configuration_is_wrong_usage(scripted: Scripted, verb: str) -> None:
    code, out, err = ctl(scripted({}).endpoint, "config", verb, "")
    assert (code, out) == (64, "")
    assert "FILE: the value is empty" in err


def test_more_tasks_than_one_request_shows_are_shown_in_turn(scripted: Scripted) -> None:
    def show(asked: m.Message) -> m.TaskDetails:
        assert isinstance(asked, m.Show)
        assert len(asked.select.ids) <= 100
        return m.TaskDetails(tuple(detail(row(number)) for number in asked.select.ids))

    rows = [row(number) for number in range(1, 251)]
    daemon = scripted({"status": lambda _: page(*rows), "show": show})
    out = ctl(daemon.endpoint, "explain", "--all", "-o", "json")[1]
    assert [task["id"] for task in json.loads(out)["tasks"]] == list(range(1, 251))


def test_why_a_task_ended_is_in_its_state() -> None:
    late = row(phase="failed", reason="deadline")
    assert state_text(late, NOW_NS) == "failed: past its deadline"
    dropped = row(phase="failed", reason="dropped: too many failures", cause="exit", code=3)
    assert state_text(dropped, NOW_NS) == "failed: dropped: too many failures (exit 3)"
    assert state_text(row(phase="cancelled", reason="cancel"), NOW_NS) == "cancelled"
    assert state_text(row(phase="cancelled", reason="wrong"), NOW_NS) == "cancelled: wrong"


def test_a_task_that_never_started_has_no_output_and_says_so(scripted: Scripted) -> None:
    daemon = scripted({
        "output": lambda _: m.OutputChunk(b"", 0, 0, done=False),
        "status": lambda _: page(row(7, phase="queued", attempt=0)),
    })  # fmt: skip
    code, out, err = ctl(daemon.endpoint, "logs", "7")
    assert (code, out) == (0, "")
    assert "task 7 has never started, so it has no output; it is queued" in err


def test_unknown_types_and_groups_are_no_empty_answers(scripted: Scripted) -> None:
    known = m.GroupRow("batch", 0, 2, paused=False, active=0, phases={})
    daemon = scripted({"status": lambda _: page(), "groups": lambda _: m.Groups((known,))})
    assert ctl(daemon.endpoint, "status", "-g", "bacth")[0] == 4
    assert ctl(daemon.endpoint, "status", "-g", "batch")[0] == 0
    code, _, err = ctl(daemon.endpoint, "events", "--type", "endet")
    assert code == 64
    assert "did you mean ended?" in err


def test_the_types_of_events_are_those_of_the_log() -> None:
    names = {kind.__name__ for kind in Record.__subclasses__()} - {"Answered", "EnvStored"}
    assert {name.replace("_", "").lower() for name in TYPES} == {name.lower() for name in names}


def test_run_with_a_key_that_is_known_says_so(scripted: Scripted) -> None:
    daemon = scripted({
        "submit": lambda _: m.Submitted((7,), (False,)),
        "output": lambda _: m.OutputChunk(b"", 0, 0, done=True),
        "wait": lambda _: m.Waited(met=True, tasks=(row(7, phase="succeeded"),)),
    })  # fmt: skip
    assert "task 7 is already known by its key" in ctl(daemon.endpoint, "run", "-k", "k", "x")[2]


def test_submit_says_when_a_task_starts(scripted: Scripted) -> None:
    daemon = scripted({"submit": lambda _: m.Submitted((7,), (True,))})
    shown = ctl_on_terminal(daemon.endpoint, "submit", "--in", "2h", "make")[1]
    assert shown.startswith("task 7: make, starts in 2h00m (")


def test_the_help_of_repair_says_which_lsn_to_take(scripted: Scripted) -> None:
    out = ctl(scripted({}).endpoint, "wal", "repair", "-h")[1]
    assert "--truncate-after LSN" in out
    assert "one less than the LSN that `ckptctl wal verify` names" in " ".join(out.split())


@pytest.mark.parametrize(
    ("cgroup", "command"),
    [
        ("0::/system.slice/ckptd.service\n", "systemctl stop ckptd.socket ckptd"),
        (
            "0::/user.slice/user-0.slice/user@0.service/app.slice/ckptd.service\n",
            "systemctl --user stop ckptd.socket ckptd",
        ),
        ("0::/user.slice/user-1000.slice/session-2.scope\n", "ckptctl daemon shutdown"),
        ("", "ckptctl daemon shutdown"),
    ],
)
def test_a_daemon_is_stopped_by_what_does_not_start_it_again(cgroup: str, command: str) -> None:
    assert stop_command(cgroup) == command


def test_the_log_is_looked_for_where_the_configuration_says(tmp_path: Path) -> None:
    file = tmp_path / "ckptd.toml"
    file.write_text('[daemon]\nstate_dir = "/srv/ckptd"\n')
    assert configured_state_dir(str(file)) == "/srv/ckptd"
    file.write_text("[wal]\nidle_mark_ms = 100\n")
    assert configured_state_dir(str(file)) == ""
    assert configured_state_dir("") == ""


def test_priority_says_which_and_that_an_ended_task_keeps_it_for_a_retry(
    scripted: Scripted,
) -> None:
    changed = m.Changed((m.TaskChange(5, "queued"), m.TaskChange(6, "failed")))
    daemon = scripted({"edit": lambda _: changed})
    code, out, _ = ctl(daemon.endpoint, "priority", "1", "5", "6")
    assert code == 0
    assert out.splitlines() == [
        "task 5: priority 1",
        "task 6: priority 1 (it has ended: this is for when it is retried)",
    ]


def test_daemon_status_has_a_line_for_each_note_of_the_recovery(scripted: Scripted) -> None:
    recovery = {"records": 3, "warnings": [], "notes": ["records 4 to 5 are lost", "twice"]}
    status = m.DaemonStatus(
        version="0.1.0", pid=1, uid=0, epoch=2, boot_id="b", started_ns=1, state_dir="/state",
        lsn=9, snapshot_lsn=0, health="ok", runner="fork", cgroup="", totals={}, counters={},
        last_recovery=recovery,
    )  # fmt: skip
    daemon = scripted({"daemon": lambda _: status, "ping": lambda _: m.Pong("0.1.0", 1, 1, 0, 2)})
    lines = ctl(daemon.endpoint, "daemon", "status")[1].splitlines()
    assert [line.split(maxsplit=1) for line in lines[-3:-1]] == [
        ["recovery", "records 3"],
        ["notes", "records 4 to 5 are lost"],
    ]
    assert lines[-1].split() == ["twice"]
