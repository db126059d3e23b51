"""One trial: a copy of the project, a mistake in it, and what the killers say.

Every process of a trial loads the copy: pytest runs in it, PYTHONPATH names it before the
installed project, and all that tests start by path or with `-m` follows from where they lie. The
mutants of `catalog/canaries.toml` prove that for each kind of process.
"""

import compileall
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from py_compile import PycInvalidationMode

from tests.mutants.mutant import ROOT, Mutant

SECONDS_MAX = 120.0
_TOPS = ("ckptd", "ckptctl", "tests", "examples")
_SUMMARY = re.compile(r"^(FAILED|ERROR) (.+?)(?: - (.*))?$", re.MULTILINE)
_SKIPPED = re.compile(r"^SKIPPED ", re.MULTILINE)
# What a mistake in the mistake looks like, as opposed to a promise that is broken.
_SLIPS = re.compile(
    r"\b(NameError|ImportError|ModuleNotFoundError|SyntaxError|UnboundLocalError)\b"
)


class Verdict(StrEnum):
    """What became of a mutant; only the first is good."""

    KILLED = "killed"
    SURVIVED = "survived"
    SLIPPED = "slipped"  # it does not import, or not even the killers can be collected
    HUNG = "hung"
    UNSEEN = "unseen"  # a killer was skipped: nobody looked
    STALE = "stale"  # the code has changed, and the mistake cannot be made any more


@dataclass(frozen=True)
class Outcome:
    """How one run of some killers ended."""

    verdict: Verdict
    by: str = ""  # the test that failed first, and why
    seconds: float = 0.0
    said: str = ""


def copy_project(into: Path) -> None:
    """Copy what git tracks, as it lies in the work tree, with bytecode that knows its source.

    The bytecode is checked by the hash of its source, so a mutant is never run from a cache; all
    other files need not be compiled again in each process.
    """
    listed = subprocess.run(
        ("git", "ls-files", "-z", "--cached"), cwd=ROOT, check=True, capture_output=True
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).exists():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name, follow_symlinks=False)
    for top in _TOPS:
        compileall.compile_dir(
            str(into / top), quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH
        )


def try_out(mutant: Mutant, pristine: Path, room: Path) -> Outcome:
    """Return what the killers make of a mutant, in a copy of its own below `room`."""
    tree = room / "project"
    shutil.copytree(pristine, tree, symlinks=True)
    try:
        mutant.apply(tree)
        return ask(mutant.killers, tree, room)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def ask(killers: Sequence[str], tree: Path, room: Path, *, jobs: int = 1) -> Outcome:
    """Run these tests in a copy of the project, up to the first failure."""
    room.mkdir(exist_ok=True)
    began_s = time.monotonic()
    limit_s = SECONDS_MAX * (1 if jobs == 1 else len(killers))
    try:
        done = subprocess.run(
            _command(killers, room, jobs),
            cwd=tree,
            env=_environment(tree),
            check=False,
            capture_output=True,
            text=True,
            timeout=limit_s + 15.0,
        )
    except subprocess.TimeoutExpired:
        return Outcome(Verdict.HUNG, seconds=round(time.monotonic() - began_s, 2))
    verdict, by = judged(done.returncode, done.stdout)
    seconds = round(time.monotonic() - began_s, 2)
    return Outcome(verdict, by, seconds, done.stdout + done.stderr)


def _command(killers: Sequence[str], room: Path, jobs: int) -> list[str]:
    plugins = ["no:cacheprovider", "no:randomly", "tests.mutants.unshrunk"]
    split = ["-n", str(jobs)] if jobs > 1 else []
    plugins += [] if jobs > 1 else ["no:xdist"]
    return [
        sys.executable, "-m", "pytest", "-x", "-q", "-rfEs", "--tb=short", "--no-header",
        *(word for name in plugins for word in ("-p", name)),
        *split, "--hypothesis-profile=mutants", f"--timeout={SECONDS_MAX}",
        f"--basetemp={room}/t", *killers,
    ]  # fmt: skip


def _environment(tree: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {
        **kept,
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "400",  # the summary is not cut
    }


def judged(code: int, output: str) -> tuple[Verdict, str]:
    """Return what a run of pytest means, and the test that failed.

    Source: pytest's exit codes; 0: all passed, 1: some failed, 2 and more: not even run.
    """
    failed = _SUMMARY.search(output)
    if code == 0:
        return (Verdict.UNSEEN if _SKIPPED.search(output) else Verdict.SURVIVED), ""
    if code != 1 or failed is None:
        return Verdict.SLIPPED, output.strip()[-200:]
    _, test, why = failed.groups()
    by = f"{test}: {(why or '').strip()[:160]}"
    if "Timeout" in (why or "") and f">{SECONDS_MAX}" in (why or ""):
        return Verdict.HUNG, by
    return (Verdict.SLIPPED if _SLIPS.search(why or "") else Verdict.KILLED), by
