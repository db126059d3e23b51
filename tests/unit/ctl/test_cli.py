import subprocess
import sys

import pytest

from ckptctl import cli
from ckptctl.table import ALIASES, NOUNS, VERBS
from ckptd.protocol.errors import BadRequest
from tests.unit.ctl.conftest import ROOT, ctl


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_a_function_and_a_help_with_its_usage(name: str) -> None:
    parser, function = cli.parser_of(VERBS[name])
    assert callable(function)
    assert parser.format_help().startswith(f"usage: ckptctl {name}")
    for line in VERBS[name].examples.splitlines():
        assert "ckptctl" in line or line.startswith("(")


def test_aliases_and_nouns_lead_to_verbs() -> None:
    assert all(name in VERBS or name in NOUNS for name in ALIASES.values())
    assert all(name in VERBS for name in NOUNS.values())


@pytest.mark.parametrize(
    ("words", "verb"),
    [([], "status"), (["--watch"], "status"), (["ls", "7"], "status"), (["group"], "group ls"),
     (["group", "-o", "json"], "group ls"), (["rm", "7"], "cancel"),
     (["quarantine", "release", "7"], "quarantine release"), (["prune"], "clean")],
)  # fmt: skip
def test_words_find_their_verb(words: list[str], verb: str) -> None:
    found, _ = cli.find_verb(words)
    assert found is not None
    assert found.name == verb


@pytest.mark.parametrize(
    ("words", "hint"),
    [(["sumbit"], "submit"), (["satus"], "status"), (["group", "lst"], "ls"),
     (["cnacel"], "cancel"), (["daemon", "stauts"], "status"), (["ps"], "mean status?"),
     (["watch"], "mean status --watch?"), (["stop", "7"], "mean cancel?"),
     (["version"], "mean --version?"), (["daemon", "stop"], "mean daemon shutdown?"),
     (["batch", "rm", "x"], "mean batch gc?"), (["batch", "cancel", "x"], "mean cancel, of")],
)  # fmt: skip
def test_an_unknown_verb_names_the_nearest(words: list[str], hint: str) -> None:
    with pytest.raises(BadRequest) as caught:
        cli.find_verb(words)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("words", "hint"),
    [(["status", "--wacth"], "--watch"), (["submit", "--retreis", "3", "true"], "--retries"),
     (["wait", "--exit-cod", "task"], "--exit-code"), (["run", "--cwd=/", "true"], "--chdir?"),
     (["logs", "--tail", "5"], "mean --lines?"), (["status", "--running"], "--state running?"),
     (["daemon", "ping", "--running"], "see: ckptctl daemon ping -h")],
)  # fmt: skip
def test_an_unknown_option_names_the_nearest(words: list[str], hint: str) -> None:
    verb, rest = cli.find_verb(words)
    assert verb is not None
    with pytest.raises(BadRequest) as caught:
        cli.parse(verb, [], rest)
    assert hint in caught.value.hint


def test_options_may_stand_before_the_verb_and_between_tasks() -> None:
    args, _ = cli.parse(VERBS["cancel"], ["-o", "json"], ["3", "--grace", "5s", "4-7"])
    assert (args.output, args.grace, args.tasks) == ("json", 5.0, ["3", "4-7"])


def test_a_bare_watch_takes_no_task_for_its_interval() -> None:
    args, _ = cli.parse(VERBS["status"], [], ["-w", "7"])
    assert (args.watch, args.tasks) == (2.0, ["7"])
    args, _ = cli.parse(VERBS["status"], [], ["--watch=5s"])
    assert args.watch == 5.0


def test_a_timeout_means_what_the_verb_says_and_the_answers_before_it() -> None:
    args, _ = cli.parse(VERBS["wait"], ["--timeout", "3s"], ["--timeout", "1h", "7"])
    assert (args.wait_s, args.timeout) == (3.0, 3600.0)
    args, _ = cli.parse(VERBS["status"], [], ["--timeout", "3s"])
    assert args.wait_s == 3.0


def test_negative_priorities_are_values() -> None:
    args, _ = cli.parse(VERBS["priority"], [], ["-5", "7"])
    assert (args.priority, args.tasks) == (-5, ["7"])


@pytest.mark.parametrize(
    "words",
    [["sumbit"], ["status", "--wacth"], ["submit"], ["cancel"], ["group", "add"], ["-o", "jsn"],
     ["status", "--state", "x"], ["wait", "--timeout", "soon", "7"], ["signal", "TREM", "7"]],
)  # fmt: skip
def test_wrong_usage_exits_with_64_and_says_why_on_stderr(words: list[str]) -> None:
    code, out, err = ctl("/nowhere.sock", *words)
    assert code == 64
    assert out == ""
    assert err.startswith("ckptctl: ")
    assert "  hint: " in err


def test_help_and_version_need_no_daemon() -> None:
    for words in ([], ["submit"], ["group"], ["wal", "dump"]):
        code, out, _ = ctl("/nowhere.sock", *words, "-h")
        assert code == 0
        assert out.startswith("usage: ckptctl")
    assert ctl("/nowhere.sock", "--version")[1].startswith("ckptctl 0.")


def test_a_dead_daemon_is_a_clear_error_with_exit_2() -> None:
    code, out, err = ctl("/nowhere.sock", "status")
    assert (code, out) == (2, "")
    assert err.startswith("ckptctl: no daemon answers at /nowhere.sock\n  hint: start one")


def test_completion_scripts_name_every_verb() -> None:
    for shell in ("bash", "zsh", "fish"):
        code, out, _ = ctl("/nowhere.sock", "completion", shell)
        assert code == 0
        assert all(verb.split()[0] in out for verb in VERBS)
    script = ctl("/nowhere.sock", "completion", "bash")[1]
    checked = subprocess.run(["bash", "-n"], input=script, text=True, check=False)
    assert checked.returncode == 0


def test_status_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom ckptctl.__main__ import run\n"
        "assert run(['status', '--endpoint', '/nowhere.sock']) == 2\n"
        "heavy = {'rich', 'asyncio', 'subprocess', 'tomllib', 'tomli_w', 'psutil', 'difflib',"
        " 'shutil', 'importlib.metadata', 'ckptctl.run', 'ckptctl.admin', 'ckptctl.watch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
