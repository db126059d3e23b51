"""What `submit --python` runs: errors of targets and input, exit codes, strange interpreters."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
RUN = ROOT / "ckptd" / "sdk" / "run.py"

MODULE = """
import os, time
from ckptd.sdk import (task, RetryPolicy, PermanentError, TransientError, RateLimited,
                       StopRequested)

@task(name="declared", version=3, retry=RetryPolicy(max_failures=4, backoff=2))
def declared(ctx, n, m=1):
    return ctx.step("sum", lambda: n + m)

async def awaited(ctx):
    return await ctx.step("one", lambda: 1)

def permanent(ctx): raise PermanentError("never")
def transient(ctx): raise TransientError("later", retry_after=7)
def limited(ctx): raise RateLimited("slow down", retry_after=7, scope="api")
def broken(ctx): raise ZeroDivisionError("oops")
def sleeps(ctx): ctx.sleep_until(time.time() + 3600)
def unfit(ctx): return object()
def leaves(ctx): raise StopRequested("shutdown")
number = 7
"""


@pytest.fixture
def world(tmp_path: Path) -> Path:
    (tmp_path / "jobs.py").write_text(MODULE)
    (tmp_path / "bad.py").write_text("x = 1\nx / 0\n")
    (tmp_path / "needs.py").write_text("import there_is_no_such_module\n")
    (tmp_path / "task").mkdir(mode=0o700)
    return tmp_path


def run(
    world: Path, *args: str, python: str = sys.executable, **env: str
) -> subprocess.CompletedProcess[str]:
    around = {"CKPTD_DIR": f"{world}/task", "CKPTD_TASK_ID": "0", "CKPTD_ATTEMPT": "1"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CKPTD_")}
    scopes = {"CKPTD_SCOPES_DIR": f"{world}/scopes", "PYTHONPATH": "", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [python, str(RUN), *args],
        env={**kept, **scopes, **around, **env},
        cwd=world,
        capture_output=True,
        text=True,
        check=False,
    )


def described(world: Path, *args: str) -> Any:
    done = run(world, "--describe", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_declared_function_is_described(world: Path) -> None:
    told = described(world, "jobs:declared", "--input", '{"n": 1}')
    assert told["error"] is None
    assert [told[key] for key in ("name", "version", "retries", "backoff_s", "is_async")] == [
        "declared",
        3,
        3,
        2,
        False,
    ]
    assert described(world, "jobs.py:awaited")["is_async"] is True


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("jobs", "is not of the form module:function"),
        (":x", "is not of the form module:function"),
        ("nowhere:x", "no module 'nowhere'"),
        ("jobs:nothing", "has no 'nothing'; it has: declared, awaited"),
        ("jobs:number", "is no function"),
        ("bad:x", "bad.py:2: ZeroDivisionError"),
        ("needs:x", "there_is_no_such_module"),
    ],
)
def test_a_wrong_target_is_told_by_describe_and_by_run(world: Path, target: str, told: str) -> None:
    assert told in described(world, target)["error"]
    done = run(world, target)
    assert (done.returncode, told in done.stderr) == (65, True), done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "the input is not JSON"),
        ("[1]", "the input is a list, expected a JSON object"),
        ("{}", "missing a required argument: 'n'"),
        ('{"n": 1, "k": 2}', "got an unexpected keyword argument 'k'"),
    ],
)
def test_input_that_does_not_fit_is_told_before_anything_is_submitted(
    world: Path, text: str, told: str
) -> None:
    assert told in described(world, "jobs:declared", "--input", text)["error"]


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("awaited", 0),
        ("permanent", 65),
        ("transient", 75),
        ("limited", 75),
        ("broken", 1),
        ("sleeps", 75),
        ("unfit", 65),
        ("leaves", 75),
    ],
)
def test_exit_codes_tell_how_to_go_on(world: Path, target: str, code: int) -> None:
    done = run(world, f"jobs:{target}")
    assert done.returncode == code, done.stderr


def test_outside_of_a_task_it_says_what_to_do(world: Path) -> None:
    done = run(world, "jobs:awaited", CKPTD_DIR="")
    assert done.returncode == 64
    assert "submit it, or use run_local" in done.stderr


@pytest.mark.parametrize("args", [(), ("a:b", "c:d"), ("--what",)])
def test_wrong_usage_is_told(world: Path, args: tuple[str, ...]) -> None:
    done = run(world, *args)
    assert (done.returncode, "usage" in done.stderr) == (64, True)


@pytest.mark.parametrize("text", ["{", "[1]", "7"])
def test_input_that_is_no_object_is_bad_data_and_not_tried_again(world: Path, text: str) -> None:
    done = run(world, "jobs:awaited", "--input", text)
    assert done.returncode == 65, done.stderr


def test_an_interpreter_without_ckptd_runs_it(world: Path) -> None:
    made = world / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True)
    python = str(made / "bin" / "python")
    bare = subprocess.run([python, "-I", "-c", "import ckptd"], capture_output=True, check=False)
    assert bare.returncode != 0, "this interpreter shall have no ckptd of its own"

    done = run(world, "jobs:declared", "--input", '{"n": 1}', python=python)

    assert done.returncode == 0, done.stderr


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


HEAVY = {"asyncio", "msgspec", "zmq", "hashlib", "ssl", "dataclasses", "inspect", "concurrent"}


@pytest.mark.parametrize(
    "code",
    [
        "import ckptd.sdk",
        "from ckptd.sdk import task, run_local, SyncResumableContext, Time, RateLimited",
    ],
)
def test_importing_the_sdk_loads_nothing_heavy(code: str) -> None:
    assert loaded_by(code) & HEAVY == set()


def test_every_public_name_is_there_and_others_are_refused() -> None:
    import ckptd.sdk  # noqa: PLC0415

    for name in dir(ckptd.sdk):
        assert getattr(ckptd.sdk, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        ckptd.sdk.nothing_like_it  # noqa: B018
