"""The bridge to the files of batches: a program of its own reads and writes them, this side asks.

`python -m ckptd.batch VERB` answers in JSON on stdout, refuses in words on stderr and with the
exit codes of `ckptd/protocol/errors.py`. A batch belongs to its user, not to the daemon: all of
this works without one. Read next: `ckptd/batch/report.py`.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final, NoReturn

import msgspec

from ckptctl.files import lasting
from ckptctl.units import nearest
from ckptd.protocol.errors import Busy, CkptdError, Internal, NotFound, all_errors

_ERRORS: Final[dict[int, type[CkptdError]]] = {
    **{kind.exit_code: kind for kind in all_errors()},
    Busy.exit_code: Busy,
}
_HINT: Final = "  "  # before the lines of a hint
_SELF: Final = "ckptd batch: "


class Run(msgspec.Struct, frozen=True):
    """One run of a batch's runner, as its ledger has it."""

    run: int
    began_ns: int
    ended_ns: int = 0  # 0: no orderly end
    end: str = ""  # why it ended, as the runner said
    task: int = 0


class Trouble(msgspec.Struct, frozen=True):
    """One text that items came out with, how often, and the first of them."""

    status: str
    text: str
    count: int
    key: str


class Batch(msgspec.Struct, frozen=True):
    """One batch as its directory tells it."""

    name: str
    dir: str
    problem: str = ""  # it cannot be read; all below is unknown then
    command: tuple[str, ...] = ()  # words; of a function its name alone
    is_function: bool = False
    cwd: str = ""
    source: str = ""
    format: str = ""
    total: int = 0
    done: int = 0
    todo: int = 0
    counts: dict[str, int] = {}
    made_ns: int = 0
    changed_ns: int = 0
    lock_pid: int = 0  # of the runner that holds the batch right now; -1: one that we cannot name
    runs: tuple[Run, ...] = ()
    rate_per_s: float = 0.0  # results of late
    pause_count: int = 0
    resume_count: int = 0
    wait_s: float = 0.0
    paused_until_ns: int = 0  # of a pause that is not over; 0: none
    archived: int = 0
    bytes: int = 0
    troubles: tuple[Trouble, ...] = ()

    @property
    def is_locked(self) -> bool:
        """Whether a runner is at work, under a daemon or not."""
        return self.lock_pid != 0

    @property
    def errors(self) -> int:
        """Return how many items came out badly."""
        return sum(self.counts.get(name, 0) for name in ("fail", "error", "quarantined"))


def reports(names: Sequence[str] = (), how: str = "") -> list[Batch]:
    """Return the batches of these names, all without names. Raises NotFound.

    `how`: `detail` adds their troubles, `brief` is name and directory alone, and quick.
    """
    said = ask(["report", *([f"--{how}"] if how else []), *names])
    return [msgspec.json.decode(line, type=Batch) for line in said.splitlines()]


def report(name: str) -> Batch:
    """Return one batch in detail. Raises NotFound naming the nearest."""
    check_name(name)
    return reports([name], "detail")[0]


def check_name(name: str) -> None:
    """Raise NotFound, with the nearest name, for a batch that does not exist."""
    where = ask(["dir", name]).decode(errors="surrogateescape").rstrip("\n")
    if os.path.lexists(os.path.join(where, "batch.json")):
        return
    known = [batch.name for batch in reports(how="brief")]
    there = f"there are: {', '.join(known[:8])}" if known else "there are none yet"
    raise NotFound(f"no batch {name!r}", nearest(name, known) or there)


def ask_json(words: Sequence[str], stdin: bytes | None = None) -> dict[str, Any]:
    """Return the one JSON document that the tool answers with."""
    found = json.loads(ask(words, stdin))
    assert isinstance(found, dict)
    return found


def ask(words: Sequence[str], stdin: bytes | None = None) -> bytes:
    """Run the tool to its end; return what it printed. Raises what its exit code means.

    Without `stdin` it reads ours.
    """
    sys.stderr.flush()
    done = subprocess.run(_command(words), input=stdin, capture_output=True, check=False)
    if done.returncode:
        raise refusal(done.returncode, done.stderr.decode(errors="replace"))
    return done.stdout


def refusal(code: int, said: str) -> CkptdError:
    """Return the error for an exit code and what was said about it."""
    if code == 130:
        raise KeyboardInterrupt
    lines = said.rstrip().splitlines()
    texts = [line for line in lines if not line.startswith(_HINT)]
    hints = [line.strip() for line in lines if line.startswith(_HINT)]
    kind = _ERRORS.get(code, Internal)
    if kind is Internal:  # a traceback: its last line says it
        return kind(f"the batch tool ended with {code}: {texts[-1] if texts else 'no word'}")
    return kind("\n".join(texts).removeprefix(_SELF), "\n        ".join(hints))


def become(words: Sequence[str]) -> NoReturn:
    """Be the tool from here on: it prints, it is interrupted, its exit code is ours."""
    sys.stdout.flush()
    sys.stderr.flush()
    command = _command(words)
    os.execv(command[0], command)  # noqa: S606 (no shell)


@contextlib.contextmanager
def attended(words: Sequence[str]) -> Iterator["subprocess.Popen[bytes]"]:
    """Run the tool beside us: it prints, and knows us to be there until the block ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = subprocess.Popen([*_command(words), "--attended"], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def runner(directory: str) -> list[str]:
    """Return the command that runs a prepared batch."""
    return [lasting(sys.executable), *_command(["run", directory])[1:]]


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-P", "-m", "ckptd.batch", *words]
