"""`submit --python`: a function is looked at in its own interpreter, then submitted."""

import argparse
import json
import os
import pwd
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from ckptctl import cli, spec
from ckptctl.table import VERBS
from ckptd.protocol import limits
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadRequest
from ckptd.protocol.messages import TaskSpec
from tests.unit.ctl.conftest import ROOT, Scripted, ctl

RUN = str(ROOT / "ckptd/sdk/run.py")
WORK = """
import os
from ckptd.sdk import task, RetryPolicy

@task(name="take-in", version=3, retry=RetryPolicy(max_failures=5, backoff=2.5, backoff_max=60))
def ingest(ctx, path, limit=0):
    return 1

@task
def forever(ctx):
    return os.environ["COLOUR"]

def plain(ctx, n=1):
    print("noise")
"""


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work.py").write_text(WORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return tmp_path


def parsed(*words: str) -> argparse.Namespace:
    return cli.parse(VERBS["submit"], [], words)[0]


def submitted(*words: str) -> TaskSpec:
    (task,) = spec.from_args(parsed(*words))
    return task


def test_a_function_becomes_a_command_with_what_its_author_declared() -> None:
    task = submitted("--python", "work:ingest", "--input", '{"path": "a b", "limit": 1.0}')
    python, *rest = task.argv
    assert os.path.samefile(python, sys.executable)
    assert rest == [RUN, "work:ingest", "--input", '{"path":"a b","limit":1.0}']
    assert (task.name, task.retries, task.backoff_s, task.backoff_max_s) == ("take-in", 4, 2.5, 60)
    assert task.on_exit == {"2": "transient"}
    assert task.cwd == os.getcwd()


def test_what_the_command_line_says_wins() -> None:
    options = ["-n", "other", "--retries", "1", "--backoff", "1s..2s", "--on-exit=3=retry,2=fail"]
    task = submitted("--python", "work:ingest", "--input", '{"path": ""}', *options)
    assert (task.name, task.retries, task.backoff_s, task.backoff_max_s) == ("other", 1, 1, 2)
    assert task.on_exit == {"2": "fail", "3": "retry"}


def test_an_exit_profile_goes_with_what_a_function_says() -> None:
    seed = {"1": "fail", "2": "transient"}
    assert submitted("--exit-profile", "seed", "--python", "work:plain").on_exit == seed


def test_without_a_limit_a_function_is_tried_for_as_long_as_there_is_progress() -> None:
    task = submitted("--python", "work:plain")
    assert (task.name, task.retries) == ("plain", limits.RETRIES_UNLIMITED)


def test_input_comes_from_a_file_and_a_spec_may_name_a_function(work: Path) -> None:
    (work / "in.json").write_text('{"path": "é"}')
    task = submitted("--python", "work:ingest", "--input", "@in.json")
    assert json.loads(task.argv[-1]) == {"path": "é"}
    (work / "tasks.toml").write_text(
        '[[task]]\npython = "work:ingest"\ninput = {path = "x"}\nretries = "unlimited"\n'
        '[[task]]\ncommand = ["true"]\n'
    )
    one, two = spec.from_args(parsed("--file", "tasks.toml"))
    assert (one.argv[-1], one.retries) == ('{"path":"x"}', limits.RETRIES_UNLIMITED)
    assert two.argv == ("true",)


def test_it_is_looked_at_in_the_directory_and_environment_of_the_task(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/where.py").write_text(
        'import os\nassert os.environ["COLOUR"] == "red"\nassert os.getcwd() == os.environ["PWD"]\n'
        "def f(ctx): ...\n"
    )
    assert submitted("-d", "sub", "-E", "COLOUR=red", "--python", "where:f").name == "f"
    with pytest.raises(BadRequest, match=r"importing where failed at .*where.py:2"):
        submitted("-d", "sub", "-E", "COLOUR=blue", "--python", "where:f")


BROKEN = {
    "raises": "1 / 0",
    "lacks": "import no_such_thing_at_all",
    "syntax": "def (",
    "exits": "import os; os._exit(3)",
    "quits": "raise SystemExit('no licence')",
}
REFUSED = [
    ("work:nope", "{}", "work has no 'nope'; it has: ingest, forever, plain"),
    ("nowhere:f", "{}", "no module 'nowhere'"),
    ("some/work.py:f", "{}", "there is no file some/work.py in "),
    ("/some/work.py:f", "{}", "there is no file /some/work.py\n"),
    ("work", "{}", "not of the form module:function"),
    ("work:os", "{}", "--python work:os"),
    ("work:ingest", "{}", "the input does not fit take-in"),
    ("work:ingest", '{"path": 1, "typo": 2}', "typo"),
    ("work:ingest", "[1]", "--input is a list, an object is expected"),
    ("work:ingest", "{'path': 1}", "--input: not JSON"),
    ("work:ingest", '{"path": NaN}', "NaN is not JSON"),
    ("work:ingest", "@nowhere.json", "cannot read nowhere.json"),
    ("work:ingest", '{"path": "%s"}' % ("x" * 140_000), "put it into a file"),
    ("raises:f", "{}", "importing raises failed at"),
    ("lacks:f", "{}", "lacks imports 'no_such_thing_at_all', which is not installed"),
    ("syntax:f", "{}", "SyntaxError"),
    ("exits:f", "{}", "ended the interpreter (exit 3)"),
    ("quits:f", "{}", "ended the interpreter (exit 1): no licence"),
]


@pytest.mark.parametrize(("target", "given", "said"), REFUSED, ids=[row[2] for row in REFUSED])
def test_what_cannot_run_is_refused_before_it_is_submitted(
    work: Path, target: str, given: str, said: str
) -> None:
    for name, text in BROKEN.items():
        (work / f"{name}.py").write_text(text)
    with pytest.raises(BadRequest) as caught:
        submitted("--python", target, "--input", given)
    assert said in f"{caught.value.message}\n{caught.value.hint}"
    assert caught.value.exit_code in (64, 65)


def test_an_import_that_never_ends_is_given_up(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "endless.py").write_text("import signal\nsignal.pause()")
    monkeypatch.setattr("ckptctl.python.DESCRIBE_S", 0.5)
    with pytest.raises(BadRequest, match="could not be looked at"):
        submitted("--python", "endless:f")


def test_a_command_beside_a_function_is_refused_and_so_is_input_without_one() -> None:
    with pytest.raises(BadRequest, match="a command or a function, not both"):
        submitted("--python", "work:plain", "--", "echo")
    with pytest.raises(BadRequest, match="belong to --python"):
        submitted("--input", "{}", "--", "echo")


def test_the_interpreter_is_the_one_named_else_that_of_the_venv(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(work / "own", symlinks=True, with_pip=False)
    monkeypatch.setenv("VIRTUAL_ENV", str(work / "own"))
    own = str(work / "own/bin/python")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert submitted("--python", "work:plain").argv[0] == own  # it has no ckptd of its own
    chosen = submitted("--python", "work:plain", "--interpreter", "own/bin/python3")
    assert chosen.argv[0] == str(work / "own/bin/python3")
    with pytest.raises(BadRequest, match="no Python to run it with: nopython"):
        submitted("--python", "work:plain", "--interpreter", "nopython")
    monkeypatch.setenv("VIRTUAL_ENV", str(work / "gone"))
    with pytest.raises(BadRequest, match=r"from \$VIRTUAL_ENV"):
        submitted("--python", "work:plain")


def test_a_python_too_old_to_say_so_is_told_as_what_it_is(work: Path) -> None:
    old = work / "python2"
    old.write_text(
        "#!/bin/sh\n"
        'printf \'  File "%s", line 1\\nSyntaxError: invalid syntax\\n\' "$1" >&2; exit 1'
    )
    old.chmod(0o755)
    with pytest.raises(BadRequest, match=r"python2 is an old Python; a task needs 3\.11 or newer"):
        submitted("--python", "work:plain", "--interpreter", str(old))


THEIRS = "/usr/bin/python3"  # one that any user may execute


def is_usable() -> bool:
    words = ["setpriv", "--reuid", "nobody", "--clear-groups", THEIRS, "-c"]
    check = f"import sys; open({RUN!r}); sys.exit(sys.version_info < (3, 11))"
    return os.geteuid() == 0 and subprocess.run([*words, check], check=False).returncode == 0


@pytest.mark.skipif(not is_usable(), reason="only root submits as others, with a Python for all")
def test_code_of_others_is_looked_at_as_they_are(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = short_dir / "seen"
    (short_dir / "theirs.py").write_text(
        f"import os\nopen({str(seen)!r}, 'a').write(f'{{os.getuid()}} {{os.getgroups()}}')\n"
        "def f(ctx): ...\n"
    )
    short_dir.chmod(0o755)
    seen.touch()
    seen.chmod(0o666)
    monkeypatch.chdir(short_dir)
    nobody = pwd.getpwnam("nobody")

    task = submitted("--as", "nobody", "--python", "theirs:f", "--interpreter", THEIRS)

    assert task.uid == nobody.pw_uid
    assert seen.read_text() == f"{nobody.pw_uid} [{nobody.pw_gid}]"


def test_a_refusal_submits_nothing(scripted: Scripted, work: Path) -> None:
    daemon = scripted({"submit": lambda _: m.Submitted((7,), (True,))})
    code, _, err = ctl(daemon.endpoint, "submit", "--python", "work:nope", "-d", str(work))
    assert (code, daemon.requests) == (64, [])
    assert err.startswith("ckptctl: --python work:nope: work has no 'nope'")
    code, out, _ = ctl(daemon.endpoint, "submit", "--python", "work:plain", "-d", str(work))
    assert (code, out) == (0, "7\n")
