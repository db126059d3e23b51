"""Files that a command line names: the text of one, or of stdin; one of variables; our own."""

import os
import sys
from collections.abc import Iterable

from ckptd.protocol.errors import BadRequest


def read_text(path: str) -> str:
    """Return the text of a file, `-` for stdin. Raises BadRequest."""
    try:
        if path == "-":
            return sys.stdin.buffer.read().decode()  # as a file, whatever the terminal speaks
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as bad:
        reason = bad.strerror if isinstance(bad, OSError) else bad
        raise BadRequest(f"cannot read {path}: {reason}") from bad


def read_env_file(path: str) -> list[str]:
    """Return the `K=V` lines of a file; blank lines, comments and `export` are left out."""
    lines: Iterable[str] = read_text(path).splitlines()
    lines = (line.strip().removeprefix("export ") for line in lines)
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return [f"{name}{equals}{_unquoted(value)}" for name, equals, value in pairs]


def _unquoted(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if is_quoted else value


def lasting(path: str) -> str:
    """Return a path into the installation that runs us as one that outlives its upgrades.

        .../lib/ckptd/venv-0.1.0-5f3a9c01/bin/ckptd-python -> .../lib/ckptd/venv/bin/ckptd-python

    `make install` removes old trees, and a task may wait for longer. Who starts by the link
    goes over to the tree behind it, see `in_its_tree` in `ckptd/sdk/run.py`.
    """
    tree = os.path.dirname(os.path.dirname(sys.executable))
    above, name = os.path.split(tree)
    link = os.path.join(above, "venv")
    is_current = os.path.islink(link) and os.readlink(link) == name
    is_ours = path.startswith(f"{tree}/")
    return f"{link}{path.removeprefix(tree)}" if is_current and is_ours else path
