"""`ckpt`: checkpoints, steps and items for tasks written in shell or any other language.

A small program of its own, stdlib only, at work in about 20 ms: everything is files in CKPTD_DIR,
no daemon is asked or waited for. In a loop use `ckpt pipe`, which starts once.
Exit codes: 0 yes or done, 1 no, 64 wrong usage or no task, 74 the disk, stdout or stdin refuses, 75
this attempt is over (a newer one was started), 65 what is stored does not check, 70 a bug, 130
interrupted, 141 nobody reads stdout; `ckpt step` gives its command's own.
Invariant: 1 is an answer; no failure ends with it.
Read next: `docs/CHECKPOINTS.md`, `pipe.py`.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn

from ckptd import streams
from ckptd.sdk.surroundings import NotATask, Surroundings
from ckptd.storage import facts
from ckptd.storage.facts import Facts, read_durable
from ckptd.storage.journal import (
    FACT_BYTES_MAX,
    Fact,
    Journal,
    StaleAttempt,
    TooLarge,
)
from ckptd.storage.untrusted import Damaged, NotTrusted

YES: Final = 0
NO: Final = 1
USAGE: Final = 64
BAD_DATA: Final = 65
IO_ERROR: Final = 74
TRY_AGAIN: Final = 75

HELP: Final = """\
ckpt: checkpoints, steps and items of a task that ckptd runs

  step NAME [--once] -- CMD...   run CMD unless the step is done; done once CMD succeeds
                                 (--once: never begun twice; begun and not done exits 65)
  done NAME                      exit 0 if the step is done, else 1
  set KEY VALUE|-                keep a value (- reads it from stdin)
  get KEY [DEFAULT]              print a value; exit 1 if there is none
  unset KEY                      forget a value
  item KEY STATUS [TEXT]         record an item: pass, fail, error, skipped, quarantined
  items [--status S] [--keys]    list items: KEY, STATUS, TEXT separated by tabs
  save [FILE...] [--state JSON] [--progress 3/10]
                                 save a checkpoint (without FILE: what is in stage/)
  last                           print the directory of the newest valid checkpoint, else exit 1
  restore DIR                    copy the newest valid checkpoint's files into DIR
  progress 3/10 [TEXT]           tell how far; not durable
  status TEXT                    tell what is going on; not durable
  stop?                          exit 0 and print the reason if the task shall stop, else 1
  wanted                         exit 0 if a checkpoint was asked for since the last one, else 1
  retry-after SECONDS [SCOPE]    ask not to be started again before; then exit 75
  resume                         exit 0 if there is anything to go on from, else 1
  pipe                           coprocess: one JSON object per line, see docs/CHECKPOINTS.md
  help                           print this

Exit: 0 yes, 1 no, 64 usage, 65 damaged, 74 disk or stream refuses, 75 this attempt is over."""


class Usage(Exception):
    """The command line cannot be understood."""


def _facts(around: Surroundings) -> Facts:
    found = read_durable(around.dir, around.task, os.getuid(), around.attempt)
    if found.problem:
        raise Damaged(found.problem)
    return found


def _record(around: Surroundings, *group: Fact) -> int:
    """Durable: every fact given."""
    journal = Journal(around.dir, around.task, around.attempt, around.epoch)
    try:
        return journal.append(list(group))
    finally:
        journal.close()


# --- steps ---------------------------------------------------------------------------------------


def _step(around: Surroundings, words: list[str]) -> int:
    """Durable: before it returns 0, that the step is done."""
    options, dashes, command = _split(words)
    is_once = "--once" in options
    names = [word for word in options if word != "--once"]
    if len(names) != 1 or not dashes or not command:
        raise Usage("ckpt step NAME [--once] -- CMD...")
    name = names[0]
    known = _facts(around)
    if name in known.steps:
        return YES
    if is_once and name in known.started:
        text = f"step {name!r} was begun, is not done, and must not run twice"
        return _fail(f"{text}; {_how_to_go_on(around, name)}", BAD_DATA)
    if is_once:
        _record(around, facts.step_start(name))
    around.notify(f"STATUS=step {name}")
    code = _run(command)
    if code == 0:
        _record(around, facts.step_done(name))
    elif is_once:
        text = f"step {name!r} failed with {code} and stays recorded as begun: --once never runs it"
        return _fail(f"{text} again; {_how_to_go_on(around, name)}", code)
    return code


def _how_to_go_on(around: Surroundings, name: str) -> str:
    """Say what a person can do about a step of which nobody knows how much of it was done."""
    import shlex  # noqa: PLC0415  (costs 3 ms; only here)

    shown = shlex.quote(name)
    ways = f"look: if it was done, say `ckpt step {shown} -- true`, if not, run it without --once"
    is_item = "CKPTD_ITEM_KEY" in os.environ  # a batch's: it is no task that could be retried
    return ways if is_item else f"{ways} or `ckptctl retry --from-step {shown} {around.task}`"


def _split(words: list[str]) -> tuple[list[str], bool, list[str]]:
    if "--" not in words:
        return words, False, []
    at = words.index("--")
    return words[:at], True, words[at + 1 :]


def _run(command: list[str]) -> int:
    """Run a command as a shell would; a signal that stops us is passed on to it."""
    import signal  # noqa: PLC0415  (enum costs 3 ms; only this verb needs it)

    try:
        python_ignores = [signal.SIGPIPE, signal.SIGXFSZ]
        pid = os.posix_spawnp(command[0], command, os.environ, setsigdef=python_ignores)
    except OSError as error:
        code = 127 if isinstance(error, FileNotFoundError) else 126
        return _fail(f"{command[0]}: {error.strerror}", code)

    def pass_on(number: int, _: object) -> None:
        os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, pass_on)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _done(around: Surroundings, words: list[str]) -> int:
    (name,) = _exactly(words, 1, "ckpt done NAME")
    return YES if name in _facts(around).steps else NO


# --- values and items ----------------------------------------------------------------------------


def _set(around: Surroundings, words: list[str]) -> int:
    key, value = _exactly(words, 2, "ckpt set KEY VALUE|-")
    text = sys.stdin.read(FACT_BYTES_MAX + 1).removesuffix("\n") if value == "-" else value
    _record(around, facts.set_value(key, text))
    return YES


def _get(around: Surroundings, words: list[str]) -> int:
    if len(words) not in {1, 2}:
        raise Usage("ckpt get KEY [DEFAULT]")
    values = _facts(around).values
    if words[0] in values:
        print(_shown(values[words[0]]))
    elif len(words) == 2:
        print(words[1])
    else:
        return NO
    return YES


def _unset(around: Surroundings, words: list[str]) -> int:
    (key,) = _exactly(words, 1, "ckpt unset KEY")
    _record(around, facts.delete_value(key))
    return YES


def _item(around: Surroundings, words: list[str]) -> int:
    if len(words) < 2:
        raise Usage("ckpt item KEY pass|fail|error|skipped|quarantined [TEXT]")
    _record(around, facts.item_done(words[0], words[1], text=" ".join(words[2:])))
    return YES


def _items(around: Surroundings, words: list[str]) -> int:
    status, rest = _option(words, "--status")
    if rest not in ([], ["--keys"]):
        raise Usage("ckpt items [--status S] [--keys]")
    for key, fact in _facts(around).items.items():
        if status is None or fact["status"] == status:
            print(key if rest else f"{key}\t{fact['status']}\t{fact.get('text', '')}")
    return YES


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# --- checkpoints ---------------------------------------------------------------------------------


def _save(around: Surroundings, words: list[str]) -> int:
    """Durable: the checkpoint whose number it prints."""
    from ckptd.sdk.save import save_from  # noqa: PLC0415  (hashes and copies: only this verb)

    state, words = _option(words, "--state")
    progress, words = _option(words, "--progress")
    if any(word.startswith("--") for word in words):
        raise Usage("ckpt save [FILE...] [--state JSON] [--progress 3/10]")
    done_total = _fraction(progress) if progress else None
    saved = save_from(around, words, json.loads(state) if state else None, done_total)
    print(saved.seq)
    return YES


def _last(around: Surroundings, words: list[str]) -> int:
    _exactly(words, 0, "ckpt last")
    seq, path = _newest(around)
    if seq:
        print(path)
    return YES if seq else NO


def _restore(around: Surroundings, words: list[str]) -> int:
    """Durable: the files in DIR."""
    from ckptd.storage.copy import copy_out  # noqa: PLC0415  (only this verb)
    from ckptd.storage.taskdir import kept  # noqa: PLC0415

    (into,) = _exactly(words, 1, "ckpt restore DIR")
    with kept(around.dir, os.getuid()):
        seq, _ = _newest(around)
        if seq:
            copy_out(around.dir, os.getuid(), seq, into)
    return YES if seq else _fail("there is no valid checkpoint to restore", NO)


def _newest(around: Surroundings) -> tuple[int, str]:
    from ckptd.storage.blobs import newest_sealed  # noqa: PLC0415  (hashes: few verbs)

    return newest_sealed(around.dir, os.getuid())


# --- telling and asking --------------------------------------------------------------------------


def _progress(around: Surroundings, words: list[str]) -> int:
    if not words:
        raise Usage("ckpt progress 3/10 [TEXT]")
    done, total = _fraction(words[0])
    lines = [f"PROGRESS={done:.15g}/{total:.15g}"]
    around.notify(*lines, *([f"STATUS={' '.join(words[1:])}"] if words[1:] else []))
    return YES


def _status(around: Surroundings, words: list[str]) -> int:
    around.notify(f"STATUS={' '.join(words)}")
    return YES


def _stop(around: Surroundings, words: list[str]) -> int:
    _exactly(words, 0, "ckpt stop?")
    reason = str(around.read_control().get("stop") or "")
    if reason:
        print(reason)
    return YES if reason else NO


def _wanted(around: Surroundings, words: list[str]) -> int:
    _exactly(words, 0, "ckpt wanted")
    around.read_control()  # which fails where no answer can be given
    return YES if around.is_checkpoint_wanted() else NO


def _retry_after(around: Surroundings, words: list[str]) -> int:
    if len(words) not in {1, 2}:
        raise Usage("ckpt retry-after SECONDS [SCOPE]")
    _record(around, facts.retry_after(_seconds(words[0]), *words[1:]))
    return YES


def _resume(around: Surroundings, words: list[str]) -> int:
    _exactly(words, 0, "ckpt resume")
    return YES if around.is_resuming or _facts(around).has_any else NO


def _pipe(around: Surroundings, words: list[str]) -> int:
    from ckptd.sdk.pipe import Pipe  # noqa: PLC0415  (only this verb)

    _exactly(words, 0, "ckpt pipe")
    return Pipe(around).run(0, 1)


VERBS: Final[dict[str, Callable[[Surroundings, list[str]], int]]] = {
    "step": _step,
    "done": _done,
    "set": _set,
    "get": _get,
    "unset": _unset,
    "item": _item,
    "items": _items,
    "save": _save,
    "last": _last,
    "restore": _restore,
    "progress": _progress,
    "status": _status,
    "stop?": _stop,
    "stop": _stop,
    "wanted": _wanted,
    "retry-after": _retry_after,
    "resume": _resume,
    "pipe": _pipe,
}


# --- words ---------------------------------------------------------------------------------------


def _exactly(words: list[str], count: int, usage: str) -> list[str]:
    if len(words) != count:
        raise Usage(usage)
    return words


def _option(words: list[str], name: str) -> tuple[str | None, list[str]]:
    if name not in words:
        return None, words
    at = words.index(name)
    if at + 1 == len(words):
        raise Usage(f"{name} needs a value")
    return words[at + 1], words[:at] + words[at + 2 :]


def _fraction(text: str) -> tuple[float, float]:
    done, slash, total = text.partition("/")
    try:
        made = facts.progress_made(float(done), float(total) if slash else 0.0)
    except ValueError as error:
        raise Usage(f"progress is written 3/10, not {text!r}") from error
    return made["done"], made["total"]


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise Usage(f"{text!r} is not a number of seconds") from error


def _fail(text: str, code: int) -> int:
    print(f"ckpt: {text}", file=sys.stderr)
    return code


def run(words: list[str]) -> int:
    """Run one verb and return the exit code."""
    if not words or words[0] in {"help", "--help", "-h"}:
        print(HELP)
        return YES if words else USAGE
    verb = VERBS.get(words[0])
    if verb is None:
        return _fail(f"unknown verb {words[0]!r}; see `ckpt help`", USAGE)
    try:
        around = Surroundings()
        os.stat(around.dir)  # what is gone holds nothing, and would be answered with "no"
        return verb(around, words[1:])
    except (Usage, ValueError) as error:
        return _fail(str(error), USAGE)
    except NotATask as error:
        return _fail(f"{error}; start it with `ckptctl submit -- CMD`", USAGE)
    except StaleAttempt as error:
        return _fail(f"{error}; nothing was recorded", TRY_AGAIN)
    except (Damaged, NotTrusted, TooLarge) as error:
        return _fail(str(error), BAD_DATA)
    except OSError as error:
        return _fail(f"{error}; nothing was recorded", IO_ERROR)


def main() -> NoReturn:
    """Entry point of the console script."""
    sys.exit(streams.run(lambda: run(sys.argv[1:]), "ckpt", gives_bytes=True))


if __name__ == "__main__":
    main()
