"""A text in a person's editor, opened again until it can be used.

Invariant: what somebody wrote is deleted only once it has done its work. Whatever refuses it (the
text, a value in it, the daemon, a task that was started meanwhile), it stays and its place is told.
Read next: `edit.py`, `checkpoint.py` (what is edited).
"""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ckptctl import files, units
from ckptd.protocol.errors import BadRequest, CkptdError


class Draft:
    """What a person wrote, as `parse` understands it."""

    def __init__(self, path: str, value: Any) -> None:
        self.path = path
        self.value = value
        self.is_kept = False

    @property
    def where(self) -> str:
        """Where it is, for who may still want it."""
        return f"what you wrote is kept in {self.path}"


@contextmanager
def edited(text: str, language: str, parse: Callable[[str], Any]) -> Iterator[Draft]:
    """Let a person change a text; yields the draft, which is kept if what is done with it fails.

    `parse` says no by a ValueError (it is not in that language) or a BadRequest.

    Raises:
        BadRequest: they gave up, or the editor failed.
    """
    draft = _written(_new_file(text, language), language, parse)
    try:
        yield draft
    except CkptdError as refused:
        refused.hint = "; ".join(filter(None, (refused.hint, draft.where)))
        raise
    except KeyboardInterrupt:
        sys.stderr.write(f"\nckptctl: {draft.where}")
        raise
    if not draft.is_kept:
        os.unlink(draft.path)


def _new_file(text: str, language: str) -> str:
    try:
        fd, path = tempfile.mkstemp(f".{language.lower()}", "ckptctl-")
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as bad:
        reason = f"{(bad.strerror or str(bad)).lower()}"
        raise BadRequest(
            f"no file for the editor: {reason}", "TMPDIR may name another directory"
        ) from bad
    return path


def _written(path: str, language: str, parse: Callable[[str], Any]) -> Draft:
    """Open the editor until the text can be used, or its author gives up."""
    editor = _editor()
    while True:  # Bound: a person says when to give up
        _run(editor, path)
        try:
            return Draft(path, parse(files.read_text(path)))
        except BadRequest as bad:
            refused = bad
        except ValueError as bad:
            refused = BadRequest(f"not {language}: {bad}")
        if not _wants_again(refused):
            hint = "; ".join(filter(None, (refused.hint, Draft(path, None).where)))
            raise BadRequest(f"{refused.message}; nothing was changed", hint)


def _wants_again(refused: BadRequest) -> bool:
    hint = f" ({refused.hint})" if refused.hint else ""
    sys.stderr.write(f"ckptctl: {refused.message}{hint}\nopen it again? [Y/n] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    return answer != "" and answer.strip().lower() in ("", "y", "yes")


def _editor() -> tuple[str, ...]:
    name = "VISUAL" if os.environ.get("VISUAL") else "EDITOR"
    return units.named(name, units.parse_command, os.environ.get(name) or "vi")


def _run(editor: Sequence[str], path: str) -> None:
    shown = shlex.join(editor)
    kept = f"the settings are in {path}; set EDITOR or VISUAL to another editor"
    try:
        code = subprocess.run([*editor, path], check=False).returncode
    except OSError as bad:
        os.unlink(path)
        text = f"the editor {shown} cannot be started, nothing was changed: {bad.strerror}"
        raise BadRequest(text, "set EDITOR or VISUAL to another editor") from bad
    if code:
        how = f"exit {code}" if code > 0 else units.signal_name(-code)
        raise BadRequest(f"the editor {shown} failed ({how}), nothing was changed", kept)
