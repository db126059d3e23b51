"""Values as people mistype them: each is refused in one line that begins with its option."""

import argparse
import os
from pathlib import Path

import pytest

from ckptctl import cli, spec
from ckptctl.__main__ import run
from ckptctl.table import VERBS, Verb
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadRequest
from tests.unit.ctl.conftest import Scripted, ctl
from tests.unit.ctl.rows import page, row

NOBODY = "/nowhere.sock"
"""Where no daemon is: what is refused there with 64 was never sent."""


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what a command line is refused with, in the first line of stderr."""
    assert run(["--endpoint", NOBODY, *words]) == 64, words
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert [line.startswith("  hint: ") for line in lines] in ([False], [False, True])
    return lines[0].removeprefix("ckptctl: ")


def valued(verb: Verb) -> list[argparse.Action]:
    parser, _ = cli.parser_of(verb)
    return [action for action in parser._actions if action.nargs != 0]


@pytest.mark.parametrize("name", [name for name, verb in VERBS.items() if not verb.passes_on])
def test_no_option_and_no_word_of_any_verb_takes_an_empty_value_for_none(name: str) -> None:
    for action in valued(VERBS[name]):
        told = cli.option_name(action) if action.option_strings else "[A-Z]+"
        words = [f"{action.option_strings[-1]}="] if action.option_strings[1:] else []
        words = words or [*action.option_strings[:1], ""]
        words += ["--kill9"] if name == "drill" else []
        with pytest.raises(BadRequest, match=f"^{told}: the value is empty$") as caught:
            cli.parse(VERBS[name], [], words)
        assert "leave it out" in caught.value.hint


def test_an_option_before_the_verb_is_not_taken_for_none_either(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["-o", "", "status"]) == 64
    assert capsys.readouterr().err.startswith("ckptctl: --output: the value is empty\n")


def test_a_kill_with_an_unset_variable_for_its_signal_kills_nobody(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert refused(capsys, "kill", "-s", "", "7") == "--signal: the value is empty"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["submit", "-E", "=x", "true"], "-E: not a variable: '=x'"),
        (["submit", "-l", "=x", "true"], "--label: not a label: '=x'"),
        (["status", "-l", "x"], "--label: not a label: 'x'"),
        (["edit", "7", "--set", "=5"], "--set: not a setting: '=5'"),
        (["submit", "--timeout", "5x", "true"], "--timeout: not a duration: '5x'"),
        (["edit", "7", "--set", "timeout=nan"], "--timeout: not a duration: 'nan'"),
        (["edit", "7", "--set", "timeout="], "--timeout: the value is empty"),
        (["edit", "7", "--set", "group="], "--group: the value is empty"),
        (["edit", "7", "--set", "on-oom="], "--on-oom: the value is empty"),
        (["edit", "7", "--set", "command="], "--command: the value is empty"),
        (["edit", "7", "--set", "command= "], "--command: no command in ' '"),
        (["edit", "7", "--set", "command='a"],
         "--command: not a command: \"'a\": no closing quotation"),
        (["cancel", "-g", "a", "-g", "b"], "--group is given twice, as 'a' and 'b'"),
        (["submit", "-n", "a\nb", "true"], "--name: control characters in 'a\\nb'"),
        (["submit", "-k", "a\x1b[31m", "true"], "--key: control characters in 'a\\x1b[31m'"),
        (["submit", "-l", "a=\x7f", "true"], "--label: control characters in 'a=\\x7f'"),
        (["edit", "7", "--set", "name=a\u2028b"], "--name: control characters in 'a\\u2028b'"),
        (["edit", "7", "--set", "labels=b"], "--label: not a label: 'b'"),
        (["edit", "7", "--set", "name=a", "--set", "name=b"],
         "--set: the setting name is given twice, as 'a' and 'b'"),
        (["edit", "7", "--nice", "1", "--set", "nice=2"],
         "--nice is given twice, as '2' and '1'"),
        (["cancel", "-l", "a=1", "-l", "a=2"],
         "--label: the label a is given twice, as '1' and '2'"),
        (["submit", "--at", "soon", "true"], "--at: not a time: 'soon'"),
        (["submit", "--memory", "2x", "true"], "--memory: not a size: '2x'"),
        (["submit", "--cpus", "inf", "true"], "--cpus: not a number: 'inf'"),
        (["submit", "--backoff", "..5s", "true"], "--backoff: not a duration: ''"),
        (["submit", "--stop-signal", "0", "true"], "--stop-signal: no such signal: '0'"),
        (["submit", "--on-exit", "3=x", "true"], "--on-exit: not an exit map: '3=x'"),
        (["submit", "--after", ",", "true"], "--after: not a task: ''"),
        (["submit", "--after", "3-5", "true"], "--after: a dependency is an id or key:K"),
        (["submit", "--shell", "--", ""], "no command in what --shell is to run"),
        (["cancel", "--grace", "-1", "7"], "--grace: not a duration: '-1'"),
        (["clean", "--older", "2y", "--all"], "--older: not a duration: '2y'"),
        (["wait", "--timeout", "inf", "7"], "--timeout: not a duration: 'inf'"),
        (["status", "--answer-within", "x"], "--answer-within: not a duration: 'x'"),
        (["status", "--watch=x"], "--watch: not a duration: 'x'"),
        (["drill", "7", "--kill9", "--within", "x"], "--within: not a duration: 'x'"),
        (["batch", "wait", "n", "--timeout", "x"], "--timeout: not a duration: 'x'"),
        (["batch", "gc", "--older", "x"], "--older: not a duration: 'x'"),
        (["batch", "run", "--item-timeout", "x", "true", ":::", "a"],
         "--item-timeout: not a duration: 'x'"),
        (["batch", "run", "--park-after", "x", "true", ":::", "a"],
         "--park-after: not a duration: 'x'"),
        (["events", "--since", "soon"], "--since: not a time: 'soon'"),
        (["events", "--type", ","], "--type: no type in ','"),
        (["status", "--state", ","], "--state: no state in ','"),
        (["status", "--columns", ","], "--columns: no column in ','"),
        (["status", "-o", "template={id}", "--columns", "id"],
         "--columns does not go with -o template"),
        (["status", "--color", "nevr"], "--color: there is no 'nevr'"),
        (["status", "--sort", "-"], "--sort: no field '-'"),
        (["signal", "0", "7"], "SIGNAL: no such signal: '0'"),
        (["kill", "-s", "0", "7"], "--signal: no such signal: '0'"),
        (["status", "key:"], "TASK: 'key:' names no key"),
        (["status", "name:"], "TASK: 'name:' names no name"),
        (["status", "5-3"], "not a range of tasks: '5-3': it ends before it begins"),
    ],
)  # fmt: skip
def test_a_refused_value_is_told_by_its_option(
    capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert refused(capsys, *words) == told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["status", "-n", "-1"], "--limit: not a whole number from 0 on: '-1'"),
        (["status", "-n", "1e3"], "--limit: not a whole number from 0 on: '1e3'"),
        (["status", "-n", "\uff11"], "--limit: not a whole number from 0 on: '\uff11'"),
        (["status", "-n", "1_0"], "--limit: not a whole number from 0 on: '1_0'"),
        (["events", "-n", "-1"], "--limit: not a whole number from 0 on: '-1'"),
        (["events", "--task", "3-5"], "--task: not one task: '3-5'"),
        (["events", "--since", "+1h"], "--since: yet to come: '+1h'"),
        (["events", "--task", "-1"], "--task: not a task: '-1'"),
        (["events", "--task", "0"], "--task: not a task: '0'"),
        (["events", "--since", "\uff11"], "--since: not a time: '\uff11'"),
        (["logs", "-n", "-5", "7"], "--lines: not a whole number from 0 on: '-5'"),
        (["batch", "logs", "-n", "-5", "b"], "--lines: not a whole number from 0 on: '-5'"),
        (["priority", "1.5", "7"], "N: not a whole number: '1.5'"),
        (["priority", "1_0", "7"], "N: not a whole number: '1_0'"),
        (["submit", "-p", "\uff11", "true"], "--priority: not a whole number: '\uff11'"),
        (["submit", "--retries", "1_0", "true"], "--retries: not a whole number: '1_0'"),
        (["group", "add", "g", "-j", "-1"], "--parallel: not a whole number from 0 on: '-1'"),
        (["checkpoint", "show", "7", "-1"], "SEQ: not a whole number from 1 on: '-1'"),
        (["checkpoint", "diff", "7", "x"], "A: not a whole number from 1 on: 'x'"),
        (["submit", "--timeout", "\uff15", "true"], "--timeout: not a duration: '\uff15'"),
        (["submit", "--timeout", "\uff15m", "true"], "--timeout: not a duration: '\uff15m'"),
        (["submit", "--memory", "\uff15G", "true"], "--memory: not a size: '\uff15G'"),
        (["submit", "--cpus", "\uff15", "true"], "--cpus: not a number: '\uff15'"),
        (["submit", "--at", "\uff118:00", "true"], "--at: not a time: '\uff118:00'"),
        (["submit", "--on-exit", "\uff13=ok", "true"], "--on-exit: not an exit map: '\uff13=ok'"),
        (["submit", "--stop-signal", "\uff19", "true"], "--stop-signal: no such signal: '\uff19'"),
        (["batch", "run", "--rate", "\uff15/s", "true", ":::", "a"],
         "--rate: not a rate: '\uff15/s'"),
        (["batch", "run", "--max-errors", "\uff15", "true", ":::", "a"],
         "--max-errors: not a number or a percentage: '\uff15'"),
        (["status", "\uff17"], "not a task: '\uff17'"),
        (["status", "@~\uff17"], "not a task: '@~\uff17'"),
    ],
)  # fmt: skip
def test_numbers_are_written_in_the_ten_digits_and_in_their_range(
    capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert refused(capsys, *words) == told


@pytest.mark.parametrize(
    ("line", "told"),
    [('name = ""', "--name: the value is empty"), ('chdir = ""', "--chdir: the value is empty"),
     ('key = ""', "--key: the value is empty"), ('timeout = "x"', "--timeout: not a duration: 'x'"),
     ("priority = 1.5", "--priority: not a whole number: 1.5"),
     ("priority = true", "--priority: not a whole number: True"),
     ("timeout = nan", "--timeout: not a duration: nan"),
     ("env = 5", "-E: not a variable: '5'"), ("env = [5]", "-E: not a variable: '5'"),
     ("labels = { a = { b = 1 } }", "--label: not one value: a = {'b': 1}"),
     ('name = ["a"]', "--name: not one value: ['a']"),
     ("on-exit = 5", "--on-exit: not an exit map: '5='"),
     ("memory = 0.5", "--memory: not a size: 0.5"), ("command = 5", "not a command: 5"),
     ('as = "a\\u0000b"', "--as: there is no user 'a\\x00b'"),
     ('command = "a \'b"', "not a command: \"a 'b\": no closing quotation")],
)  # fmt: skip
def test_a_file_of_tasks_is_held_to_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, told: str
) -> None:
    file = tmp_path / "task.toml"
    command = "" if line.startswith("command") else 'command = "true"\n'
    file.write_text(f"{command}{line}\n")
    assert refused(capsys, "submit", "--file", str(file)) == told


def test_a_value_that_only_begins_with_a_minus_is_a_value(tmp_path: Path) -> None:
    args, _ = cli.parse(VERBS["submit"], [], ["--nice", "-5", "-p", "-3", "--", "true"])
    assert (args.nice, args.priority) == ("-5", "-3")
    assert ctl(NOBODY, "submit", "--nice", "-5", "true")[0] == 2


LONG = "9" * 5_000


@pytest.mark.parametrize("key", [key for key in spec.SETTINGS if key not in ("chdir", "stdin")])
@pytest.mark.parametrize("value", [LONG, f"+{LONG}", f"-{LONG}", f"{LONG}s", f"{LONG}T"])
def test_a_number_beyond_all_measure_is_refused_in_one_short_line(key: str, value: str) -> None:
    with pytest.raises(BadRequest) as caught:
        spec.build({"command": "true", "chdir": "/", key: value})
    assert len(f"{caught.value.message}{caught.value.hint}") < 250
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "value", ["foo://x", "ipc://", "tcp://1.2.3.4", "/tmp/" + "x" * 200, b"/\xff"]
)
def test_an_endpoint_that_is_none_is_wrong_usage_not_a_daemon_that_is_away(
    value: str | bytes,
) -> None:
    code, out, err = ctl(os.fsdecode(value), "status")
    assert (code, out) == (64, "")
    assert err.startswith("ckptctl: cannot use the endpoint ")


def test_states_and_types_that_are_given_twice_add_up(scripted: Scripted) -> None:
    daemon = scripted({"status": lambda _: page(row(7))})
    assert ctl(daemon.endpoint, "status", "--state", "failed", "--state", "held,failed")[0] == 0
    ((_, _, asked),) = daemon.requests
    assert isinstance(asked, m.Status)
    assert asked.select.phases == ("failed", "held")


def test_a_value_of_the_wire_is_told_as_people_write_it() -> None:
    for fields, told in (
        ({"memory": "9999999T"}, "--memory: 9999999.0 TiB is not allowed"),
        ({"deadline": "2200-01-01"}, "--deadline: 2200-01-01 00:00:00 is not allowed"),
    ):
        with pytest.raises(BadRequest) as caught:
            spec.build({"command": "true", "chdir": "/", **fields})
        assert caught.value.message == told


def test_labels_are_edited_as_they_are_shown(scripted: Scripted) -> None:
    daemon = scripted({"edit": lambda _: m.Changed((m.TaskChange(7, "held"),))})
    assert ctl(daemon.endpoint, "edit", "7", "--set", "labels=a=1,b=x=2")[0] == 0
    assert daemon.requests[-1][2] == m.Edit(m.Selector(ids=(7,)), labels={"a": "1", "b": "x=2"})


def test_a_label_may_hold_commas_and_a_name_can_be_taken_away(scripted: Scripted) -> None:
    daemon = scripted({"edit": lambda _: m.Changed((m.TaskChange(7, "held"),))})
    assert ctl(daemon.endpoint, "edit", "7", "--set", "labels=k=a,b,l=c")[0] == 0
    assert daemon.requests[-1][2] == m.Edit(m.Selector(ids=(7,)), labels={"k": "a,b", "l": "c"})
    assert ctl(daemon.endpoint, "edit", "7", "--set", "name=")[0] == 0
    assert daemon.requests[-1][2] == m.Edit(m.Selector(ids=(7,)), name="")


def test_a_limit_of_nothing_behind_the_verb_is_that_whatever_stands_before_it() -> None:
    verb = VERBS["status"]
    for leading in ([], ["--answer-within", "3s"]):
        args, _ = cli.parse(verb, leading, ["--answer-within", "0"])
        assert args.wait_s == 0.0


def test_names_in_any_script_and_a_group_said_twice_the_same_are_fine(scripted: Scripted) -> None:
    built = spec.build({"command": "true", "chdir": "/", "name": "ünï ☃ 夜"})
    assert built.name == "ünï ☃ 夜"
    daemon = scripted({"status": lambda _: page(row(7))})
    assert ctl(daemon.endpoint, "status", "-g", "a", "-g", "a")[0] == 0


def test_no_tasks_are_sorted_by_any_field_that_tasks_have(scripted: Scripted) -> None:
    daemon = scripted({"status": lambda _: page()})
    assert ctl(daemon.endpoint, "status", "--sort", "ended_at-")[:2] == (0, "")
    assert ctl(daemon.endpoint, "status", "--sort", "ended")[0] == 64
