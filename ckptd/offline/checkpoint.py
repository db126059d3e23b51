"""Checkpoints of a task that does not run, from outside: show, diff, export, import, edit.

    python -P -m ckptd.offline.checkpoint VERB ...         what `ckptctl checkpoint` executes
        show    TASK_DIR SEQ                one line of JSON: the manifest
        diff    TASK_DIR A B                one line of JSON: what differs, member by member
        export  TASK_DIR SEQ DIR|FILE.tar|-
        import  TASK_DIR TASK ATTEMPT DIR|FILE.tar|-           prints {"seq":8,...}
        edit    TASK_DIR TASK ATTEMPT SEQ   stdin: {"set":{"state.part":7},"unset":["state.x"]}
                                            or {"whole":{"state":...}}; prints {"seq":8,...}
        rewind  TASK_DIR TASK ATTEMPT STEP  see `rewind.py`; prints {"steps":["clean","load"]}

So the command line needs to know no file format. It runs as whoever called it: the files belong
to the task's user. ATTEMPT is the newest one the daemon knows of; where another was started
meanwhile, nothing is published (`taskdir.fence`).
Exit codes: 0 done, 2 the disk refuses, 4 no such checkpoint or step, 5 a newer attempt, 64 wrong
usage, 65 it does not check, 74 stdout or stdin is broken, 77 not readable. On stderr one
line, and a hint as a second one.
Invariant: no generation is ever changed; import and edit make a new one. Stdlib only.
Read next: `new_generation.py`, `ckptd/sdk/save.py`.
"""

import contextlib
import copy
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

from ckptd import streams
from ckptd.offline import differences, new_generation
from ckptd.offline.differences import BadPath
from ckptd.offline.refusal import Refused, refuse_others
from ckptd.offline.rewind import rewind
from ckptd.sdk.save import Saved
from ckptd.storage import facts
from ckptd.storage import manifest as seals
from ckptd.storage.copy import CutShort, copy_out, write_tar
from ckptd.storage.journal import StaleAttempt, TooLarge
from ckptd.storage.manifest import Manifest, TooNew
from ckptd.storage.taskdir import MANIFEST, numbered, opened
from ckptd.storage.untrusted import (
    Damaged,
    NotTrusted,
    is_passing,
    open_directory,
    parse_json,
    plain,
)

EDITABLE: Final = ("state", "cursors", "progress", "results")
_NOT_EDITABLE: Final = {
    "steps": "steps are facts of the journal: one runs again once its version= in the code rises",
    "files": "export the checkpoint, change the files, save them in the task",
}
_COMPARED: Final = (
    "task_name", "task_version", "state_version", "schema", "code_digest", "config_digest",
    "current_step", "progress", "cursors", "state", "results",
)  # fmt: skip
_CHANGES_TOLD_MAX: Final = 100
_VALUE_CHARS_MAX: Final = 200


def main(argv: list[str]) -> int:
    """Run one verb; return its exit code."""
    try:
        verb, *words = argv
        print_json(VERBS[verb](*words))
    except Refused as refused:
        return _say(refused)
    except (KeyError, TypeError, ValueError) as wrong:
        return _say(Refused(64, f"cannot understand it: {plain(wrong)}"))
    except BadPath as wrong:
        return _say(Refused(64, wrong.text, wrong.hint))
    except FileNotFoundError as gone:
        return _say(Refused(4, f"it is gone: {plain(gone)}"))
    except StaleAttempt as stale:
        text = f"{stale}: it was started meanwhile, nothing was changed"
        return _say(Refused(5, text, "cancel it or hold it first"))
    except new_generation.Occupied as busy:
        return _say(Refused(5, str(busy), "try again in a moment"))
    except TooNew as new:
        return _say(Refused(65, plain(new), "a later ckptd wrote it: use that one"))
    except (Damaged, NotTrusted, TooLarge) as bad:
        return _say(Refused(65, f"it does not check: {plain(bad)}"))
    except OSError as error:
        code = 2 if is_passing(error) else 77
        return _say(Refused(code, f"{'the disk refuses: ' if code == 2 else ''}{error}"))
    return 0


def print_json(answer: Any) -> None:
    """Print an answer, None for nothing."""
    if answer is not None:
        sys.stdout.write(json.dumps(answer) + "\n")


def _say(refused: Refused) -> int:
    sys.stderr.write(f"{refused.text}\n" + (f"{refused.hint}\n" if refused.hint else ""))
    return refused.code


# --- looking -------------------------------------------------------------------------------------


def show(task_dir: str, seq: str) -> Manifest:
    """Return the manifest of a generation, its own digest compared."""
    return _manifest(task_dir, int(seq))


def _manifest(task_dir: str, seq: int) -> Manifest:
    uid = os.stat(task_dir).st_uid
    with opened(task_dir, uid) as (_, ckpt_fd):
        for number, name in numbered(ckpt_fd):
            if number == seq:
                fd = open_directory(name, uid, ckpt_fd)
                try:
                    return seals.load(fd, uid)
                finally:
                    os.close(fd)
    raise FileNotFoundError(f"checkpoint {seq}")


def diff(task_dir: str, first: str, second: str) -> list[dict[str, Any]]:
    """Return what differs between two generations, at most CHANGES_MAX members."""
    one, other = (_comparable(_manifest(task_dir, int(seq))) for seq in (first, second))
    found = itertools.islice(differences.changes(one, other), differences.CHANGES_MAX)
    return [change.as_json() for change in found]


def _comparable(manifest: Manifest) -> dict[str, Any]:
    """Return what was saved, without when and how: steps and files by name, digests for content."""
    found = {name: manifest[name] for name in _COMPARED if manifest.get(name) is not None}
    steps = [step for step in manifest["steps"] if isinstance(step, str)]
    found["steps"] = dict.fromkeys(steps, "done")
    found["files"] = {
        str(entry["name"]): f"{entry.get('sha256')}, {entry.get('bytes')} bytes"
        for entry in manifest["files"]
    }
    return found


# --- out -----------------------------------------------------------------------------------------


def export(task_dir: str, seq: str, into: str) -> None:
    """Copy a generation to a new directory or tar file, all or nothing; `-`: a tar on stdout."""
    uid = os.stat(task_dir).st_uid
    if into == "-":
        _send(task_dir, uid, int(seq))
        return
    partial = f"{into.rstrip('/')}.partial-{os.getpid()}"
    try:
        if into.endswith(".tar"):
            with open(partial, "xb") as out:
                write_tar(task_dir, uid, int(seq), out)
                new_generation.sync_file(out)
        else:
            os.mkdir(partial)
            copy_out(task_dir, uid, int(seq), partial)
            with open(f"{partial}/{MANIFEST}", "x", encoding="ascii") as text:
                json.dump(_manifest(task_dir, int(seq)), text, indent=1)
                new_generation.sync_file(text)
        os.rename(partial, into)
    except BaseException:
        with contextlib.suppress(OSError):
            new_generation.remove(partial)
        raise


def _send(task_dir: str, uid: int, seq: int) -> None:
    """Write a generation to stdout as a tar. Raises Refused where only a part of it came out."""
    try:
        write_tar(task_dir, uid, seq, sys.stdout.buffer)
    except CutShort as cut:
        raise Refused(
            5, f"checkpoint {seq} was cleared away while it was sent: the tar is cut short",
            "the task saved twice meanwhile; send it again, or export to a file first",
        ) from cut  # fmt: skip
    finally:
        sys.stdout.buffer.flush()


# --- in ------------------------------------------------------------------------------------------


def import_(task_dir: str, task: str, attempt: str, source: str) -> dict[str, Any]:
    """Make a new generation of an exported one, every digest compared.

    Durable: the checkpoint; then the values that the journal shall know of, too.
    """
    _made(task_dir)
    refuse_others(task_dir)
    _refuse_missing(source)
    where = new_generation.Place(task_dir, int(task), int(attempt))
    with _unpacked(source, where) as (fd, path):
        old = _checked_origin(source, fd)
        origin = {"task": old["task"], "seq": old["seq"], "digest": old["digest"]}
        header = {**_header(old), "provenance": {"imported_from": origin, **_who()}}
        saved = new_generation.publish(where, path, old, header)
    before = {**old, "results": {}, "progress": None}
    new_generation.record(where, before, old, has_journal=True)
    done = facts.read_facts(task_dir, where.task, os.getuid(), where.attempt).steps
    unknown = [step for step in old["steps"] if isinstance(step, str) and step not in done]
    saved_by = {"task": old["task"], "name": str(old.get("task_name") or "")}
    return {
        "seq": saved.seq,
        "path": saved.path,
        "steps_to_run_again": unknown,
        "saved_by": saved_by,
    }


@contextlib.contextmanager
def _unpacked(source: str, where: new_generation.Place) -> Iterator[tuple[int, str]]:
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(new_generation.unpacked(source, where))
        except (Damaged, NotTrusted) as bad:
            hint = "it was changed since, or cut short: export it again"
            raise Refused(65, f"{source} does not check: {plain(bad)}", hint) from bad
        yield found


def _checked_origin(source: str, fd: int) -> Manifest:
    uid = os.fstat(fd).st_uid
    try:
        old = seals.load(fd, uid)
        seals.verify(fd, uid, old, is_deep=True)
    except FileNotFoundError as none:
        text = f"{source} is no exported checkpoint: it holds no {MANIFEST}"
        raise Refused(65, text, "name what `checkpoint export` made") from none
    except (Damaged, NotTrusted) as bad:
        hint = "it was changed since, or cut short: export it again"
        raise Refused(65, f"{source} does not check: {plain(bad)}", hint) from bad
    return old


def _refuse_missing(source: str) -> None:
    if source != "-" and not os.path.exists(source):
        raise Refused(64, f"there is no {source}", "name what `checkpoint export` made")


def edit(task_dir: str, task: str, attempt: str, seq: str) -> dict[str, Any]:
    """Make a new generation of another one with some members changed, its files carried over.

    Durable: the checkpoint; then the values that the journal shall know of, too.
    """
    refuse_others(task_dir)
    wish = parse_json(sys.stdin.buffer.read())
    old = _manifest(task_dir, int(seq))
    before = {name: old.get(name) for name in EDITABLE}
    after = _edited(copy.deepcopy(before), wish)
    _refuse_unfit(after)
    told = [change.as_json() for change in differences.changes(before, after)]
    if not told:
        return {"seq": int(seq), "changes": []}
    provenance = {"edited": int(seq), "changes": _short(told), **_who()}
    kept = {name: value for name, value in after.items() if name in old or value is not None}
    header = {**_header(old), **kept, "provenance": provenance, "parent": int(seq)}
    where = new_generation.Place(task_dir, int(task), int(attempt))
    saved = _published(where, int(seq), old, header)
    new_generation.record(where, before, after)
    return {"seq": saved.seq, "path": saved.path, "changes": told[:_CHANGES_TOLD_MAX]}


def _published(where: new_generation.Place, seq: int, old: Manifest, header: Manifest) -> Saved:
    with new_generation.lying(where.task_dir, seq) as path:
        try:
            return new_generation.publish(where, path, old, header)
        except (Damaged, NotTrusted) as error:
            if not os.path.isdir(path):  # two newer ones were made meanwhile, it was cleared away
                raise FileNotFoundError(f"checkpoint {seq}") from error
            raise


def _edited(document: dict[str, Any], wish: dict[str, Any]) -> dict[str, Any]:
    for name, value in wish.get("whole", {}).items():
        _refuse_root(name)
        document[name] = value
    for path, value in wish.get("set", {}).items():
        _refuse_root(path)
        differences.assigned(document, path, value, is_forced=bool(wish.get("force")))
    for path in wish.get("unset", ()):
        _refuse_root(path)
        if path in EDITABLE:
            document[path] = {} if path in {"results", "cursors"} else None
        else:
            differences.removed(document, path)
    return document


def _refuse_root(path: str) -> None:
    root = path.partition(".")[0]
    if root not in EDITABLE:
        known = f"what can be edited: {', '.join(EDITABLE)}"
        raise Refused(64, f"cannot edit {plain(root)!r}", _NOT_EDITABLE.get(root, known))


def _refuse_unfit(after: dict[str, Any]) -> None:
    """Refuse what the task's next attempt could not read."""
    for name in ("results", "cursors"):
        if not isinstance(after[name] or {}, dict):
            raise Refused(64, f"{name} must stay an object: names and values")
    progress = after["progress"]
    if progress is None:
        return
    numbers = progress if isinstance(progress, dict) else {}
    done, total = numbers.get("done"), numbers.get("total", 0)
    if not all(isinstance(n, int | float) and 0 <= n < math.inf for n in (done, total)):
        raise Refused(64, f"progress cannot be {json.dumps(progress)[:80]}",
                      'example: --set \'progress={"done": 3, "total": 10}\'')  # fmt: skip
    after["progress"] = {"done": done, "total": total}


def _made(task_dir: str) -> None:
    """Make the directory of a task that was never started, of a daemon of our own."""
    if os.path.lexists(task_dir):
        return
    try:
        os.mkdir(task_dir, 0o700)
    except OSError as error:
        text = f"the task was never started, it has no directory yet: {error}"
        raise Refused(77, text, "start it once (run it, then hold it), then import") from error


def _header(old: Manifest) -> Manifest:
    """Return what a new generation takes over: all but what is said of it when it is sealed."""
    own = ("format", "seq", "parent", "at_ns", "boot_id", "files", "digest", "task", "attempt")
    return {name: value for name, value in old.items() if name not in own}


def _who() -> dict[str, Any]:
    return {"uid": os.getuid(), "at_ns": new_generation.now_ns()}


def _short(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return changes for the provenance: a value that is long is left out."""
    return [
        {
            name: value
            for name, value in change.items()
            if name in {"path", "kind"} or len(json.dumps(value)) <= _VALUE_CHARS_MAX
        }
        for change in told[:_CHANGES_TOLD_MAX]
    ]


VERBS: Final[dict[str, Callable[..., Any]]] = {
    "show": show, "diff": diff, "export": export, "import": import_, "edit": edit,
    "rewind": rewind,
}  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(streams.run(lambda: main(sys.argv[1:])))
