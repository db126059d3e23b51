import argparse
from pathlib import Path

import pytest

from ckptctl import cli, spec
from ckptctl.table import VERBS
from ckptctl.words import settings
from ckptd.protocol.errors import BadRequest
from ckptd.protocol.limits import RETRIES_UNLIMITED
from ckptd.protocol.messages import Dependency, TaskSpec


def parsed(*words: str) -> argparse.Namespace:
    return cli.parse(VERBS["submit"], [], words)[0]


def submitted(*words: str) -> TaskSpec:
    (task,) = spec.from_args(parsed(*words))
    return task


EVERY_OPTION = """
    -n nightly -g batch -k key-1 -p -5 -l a=b -l c=d --after 3,4 --after-fail key:x --in 5m --hold
    --timeout 2h --retries 3 --backoff 5s..10m --on-exit 3=retry --stop-signal INT --grace 30s
    --checkpoint-signal USR1 --memory 2G --cpus 1.5 --tasks-max 100 --io-weight 50 --nice -5
    --on-oom retry:x2,max=16G -E A=1=2 -d /tmp --stdin /dev/zero -- rsync -a x
"""


def test_every_option_reaches_its_field() -> None:
    task = submitted(*EVERY_OPTION.split())
    assert task.argv == ("rsync", "-a", "x")
    assert (task.name, task.group, task.key, task.priority) == ("nightly", "batch", "key-1", -5)
    assert task.labels == {"a": "b", "c": "d"}
    assert task.after == (Dependency(3), Dependency(4), Dependency(key="x", when="fail"))
    assert (task.in_s, task.hold, task.timeout_s, task.retries) == (300, True, 7200, 3)
    assert (task.backoff_s, task.backoff_max_s, task.on_exit) == (5, 600, {"3": "retry"})
    assert (task.stop_signal, task.grace_s, task.checkpoint_signal) == (2, 30, 10)
    assert (task.memory_bytes, task.env) == (2 << 30, {"A": "1=2"})
    assert (task.cwd, task.stdin) == ("/tmp", "/dev/zero")
    assert (task.cpus, task.tasks_max, task.io_weight, task.nice) == (1.5, 100, 50, -5)
    assert task.on_oom == "retry:x2,max=16G"


def test_output_goes_to_the_journal_as_the_daemon_has_it_unless_one_says() -> None:
    found = [submitted(*words, "true").journal for words in ([], ["--journal"], ["--no-journal"])]
    assert found == [None, True, False]


@pytest.mark.parametrize("word", ["unlimited", "Unlimited"])
def test_retries_may_be_unlimited(word: str) -> None:
    (task,) = spec.from_args(parsed("--retries", word, "--", "true"))
    assert task.retries == RETRIES_UNLIMITED
    assert dict(settings({"max_failures": task.retries + 1}))["retries"] == "unlimited"


def test_a_command_keeps_its_own_options() -> None:
    assert submitted("-n", "x", "grep", "-n", "--hold").argv == ("grep", "-n", "--hold")
    assert submitted("--", "-x").argv == ("-x",)
    assert not submitted("grep", "--hold").hold


def test_shell_words_become_one_script() -> None:
    assert submitted("--shell", "a | b").argv == ("/bin/sh", "-c", "a | b")


def test_the_working_directory_is_this_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert submitted("true").cwd == str(tmp_path)


def test_a_file_gives_many_tasks_and_options_win(tmp_path: Path) -> None:
    file = tmp_path / "tasks.toml"
    file.write_text(
        'group = "batch"\nretries = 2\n'
        '[[task]]\nname = "one"\ncommand = ["echo", "1"]\nkey = "one"\n'
        '[[task]]\nname = "two"\ncommand = "echo 2"\nafter = ["key:one"]\non-exit = {3 = "ok"}\n'
    )
    one, two = spec.from_args(parsed("--file", str(file), "--retries", "9"))
    assert (one.argv, one.group, one.retries) == (("echo", "1"), "batch", 9)
    assert (two.argv, two.on_exit) == (("echo", "2"), {"3": "ok"})
    assert two.after == (Dependency(key="one"),)


def test_an_exit_profile_says_what_codes_mean_that_nobody_mapped(tmp_path: Path) -> None:
    seed = {"1": "fail", "2": "transient"}
    assert submitted("--exit-profile", "seed", "true").on_exit == seed
    assert submitted("--exit-profile", "seed", "--on-exit", "2=ok,9=retry", "true").on_exit == {
        "1": "fail", "2": "ok", "9": "retry",
    }  # fmt: skip
    assert submitted("--exit-profile", "sysexits", "true").on_exit == {}
    file = tmp_path / "tasks.toml"
    file.write_text(
        'exit-profile = "seed"\n[[task]]\ncommand = "a"\non-exit = {1 = "retry"}\n'
        '[[task]]\ncommand = "b"\nexit-profile = "sysexits"\n'
    )
    one, two = spec.from_args(parsed("--file", str(file)))
    assert (one.on_exit, two.on_exit) == ({"1": "retry", "2": "transient"}, {})


def test_an_unknown_exit_profile_names_the_nearest() -> None:
    with pytest.raises(BadRequest, match="there is no profile 'sysexit'") as caught:
        submitted("--exit-profile", "sysexit", "true")
    assert caught.value.hint == "did you mean sysexits?"
    with pytest.raises(BadRequest) as caught:
        submitted("--exit-profile", "x", "true")
    assert caught.value.hint == "known: sysexits, seed"


def test_an_unknown_setting_in_a_file_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "tasks.toml"
    file.write_text('command = "true"\nretreis = 2\n')
    with pytest.raises(BadRequest, match="unknown setting 'retreis'") as caught:
        spec.from_args(parsed("--file", str(file)))
    assert "retries" in caught.value.hint


def test_an_environment_file_may_be_a_shell_fragment(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# comment\nexport A='x y'\nB=2\n\n")
    assert submitted("--env-file", str(file), "-E", "B=3", "true").env == {"A": "x y", "B": "3"}


def test_a_clean_environment_keeps_what_a_login_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setenv("PATH", "/bin")
    env, lost = spec.environment(parsed("--clean-env", "true"))
    assert env["PATH"] == "/bin"
    assert "SECRET" not in env
    assert not lost


def test_variables_that_are_no_text_are_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BROKEN", "\udcff")
    env, lost = spec.environment(parsed("true"))
    assert "BROKEN" not in env
    assert lost == ["BROKEN"]


def test_no_command_and_values_out_of_range_are_refused() -> None:
    with pytest.raises(BadRequest, match="no command"):
        submitted("--hold")
    with pytest.raises(BadRequest, match="priority: 9999999999 is not allowed"):
        submitted("-p", "9999999999", "true")
    for words, complaint in (
        ("--nice 20", "--nice: 20 is not allowed"),
        ("--io-weight 10001", "--io-weight: 10001 is not allowed"),
        ("--tasks-max many", "--tasks-max: not a whole number: 'many'"),
        ("--cpus nan", "not a number: 'nan'"),
        ("--cpus -1", "not a number: '-1'"),
        ("--on-oom retry", "--on-oom: 'retry' needs a factor"),
    ):
        with pytest.raises(BadRequest, match=complaint):
            submitted(*words.split(), "true")
    with pytest.raises(BadRequest, match="--group: 'no spaces' is not allowed"):
        submitted("-g", "no spaces", "true")
