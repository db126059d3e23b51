"""How the tools of this room say no: an exit code, one line why, one line what to do.

Stdlib only. Read next: `checkpoint.py`, whose `main` catches it.
"""

import os


class Refused(Exception):
    """What is said on stderr, with the exit code that goes with it."""

    def __init__(self, code: int, text: str, hint: str = "") -> None:
        super().__init__(code, text, hint)
        self.code, self.text, self.hint = code, text, hint


def refuse_others(task_dir: str) -> None:
    """Refuse who does not own the files: whatever they wrote would not be the task's.

    Raises:
        Refused: 77. FileNotFoundError: the task has no directory.
    """
    owner = os.stat(task_dir).st_uid
    if owner != os.getuid():
        raise Refused(77, f"the task's files belong to uid {owner}, you are {os.getuid()}")
