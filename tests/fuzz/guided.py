"""One target under libFuzzer, in a process of its own: `python -m tests.fuzz.guided NAME ARGS`.

ARGS are libFuzzer's. Source: the documentation of atheris and libFuzzer.
"""

import shlex
import sys

import atheris

from tests.fuzz.target import Target


def main() -> None:
    """Instrument the product while it is imported, then let libFuzzer have the process."""
    name, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=["ckptd", "ckptctl", "tests.fuzz.canary"]):
        target = _target(name)
        for data in target.seeds():  # what is imported late, by the first call, is instrumented too
            target.run(data)
    # A merge runs itself anew through a shell: what libFuzzer takes for its own name is a command.
    again = f"{shlex.quote(sys.executable)} -m tests.fuzz.guided {name}"
    atheris.Setup([again, *arguments], target.run)
    atheris.Fuzz()


def _target(name: str) -> Target:
    """Import what the target needs: only what is imported from here is instrumented."""
    from tests.fuzz.canary import CANARY  # noqa: PLC0415

    if name == CANARY.name:
        return CANARY
    from tests.fuzz.every import TARGETS  # noqa: PLC0415

    return TARGETS[name]


if __name__ == "__main__":
    main()
