"""What of a submit can be seen to never start: a line of shell as one word, what is not there.

A look at submit, from here: only the first is refused. A program or directory may come before
the task starts, and the daemon may see other files than we do: that is worth a word, no more.
Read next: `run.py` (who asks), `ckptd/runner/environment.py` (how a program is found).
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from ckptd.protocol.errors import BadRequest
from ckptd.protocol.messages import TaskSpec

_SHELL: Final = frozenset("|&;<>$`")


def check_line(task: TaskSpec, env: Mapping[str, str]) -> None:
    """Raise BadRequest for one word that is no program and reads like a line of shell."""
    line = task.argv[0]
    if len(task.argv) == 1 and _is_of_shell(line, task, env) and _why_no_program(line, task, env):
        raise BadRequest(
            f"there is no program {line!r}: this is one word, and no shell reads it",
            "for a line of shell: --shell; for a program with arguments: no quotes around it all",
        )


def doubts(tasks: Iterable[TaskSpec], env: Mapping[str, str]) -> Iterator[str]:
    """Yield, once each, why tasks would fail if they started now."""
    yield from dict.fromkeys(why for task in tasks if (why := _why_not(task, env)))


def _why_not(task: TaskSpec, env: Mapping[str, str]) -> str:
    if task.cwd and not os.path.isdir(task.cwd):
        return f"there is no directory {task.cwd!r}"
    return _why_no_program(task.argv[0], task, env)


def _is_of_shell(line: str, task: TaskSpec, env: Mapping[str, str]) -> bool:
    """Tell a line from a program with blanks in its name, that may yet come: its first word is one.

    Bound: builtins are no programs; a line of these alone is taken, with a note.
    """
    words = line.split()
    is_one_of_many = len(words) > 1 and not _why_no_program(words[0], task, env)
    return is_one_of_many or not _SHELL.isdisjoint(line)


def _why_no_program(name: str, task: TaskSpec, env: Mapping[str, str]) -> str:
    if "/" in name:
        path = os.path.join(task.cwd, name)
        if os.path.isfile(path):
            return "" if os.access(path, os.X_OK) else f"{name!r} is not executable"
        return f"there is no program {name!r}"
    path = {**env, **task.env}.get("PATH", "")
    if not path or name == "ckpt":  # the daemon has a PATH for who has none, and adds this one
        return ""
    is_there = any(_is_program(os.path.join(task.cwd, at, name)) for at in path.split(":"))
    return "" if is_there else f"there is no program {name!r} on the PATH that the task will have"


def _is_program(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.X_OK)  # the first takes a NUL, too
