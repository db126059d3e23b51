"""Entry of `ckptctl`: exit codes, interrupts and closed pipes; everything else is `cli.py`.

Exit codes: 0 ok, 1 a task failed or was refused, 2 transient, 3 not finished, 4 no such task,
5 conflict, 64 usage, 65 damaged data, 69 protocol, 70 a bug or a bad disk, 77 denied, 78 config,
124 timeout, 130 interrupted, 141 the reader of the output is gone.
"""

import gc
import os
import sys
from typing import NoReturn

gc.disable()  # a short life with many imports: collecting would be a tenth of it

from ckptctl import cli  # noqa: E402 (the collector is off first)
from ckptctl.call import report_error  # noqa: E402
from ckptd.protocol.errors import CkptdError  # noqa: E402


def main() -> NoReturn:
    """Run the command line of this process and end it."""
    gc.freeze()
    gc.enable()
    try:
        code = run(sys.argv[1:])
        sys.stderr.flush()
    except BrokenPipeError:
        code = 141  # the reader has seen enough
    # Nothing is left to tidy up; taking the interpreter down in order would cost more than asking.
    os._exit(code)


def run(argv: list[str]) -> int:
    """Run one command line; returns the exit code, with stdout flushed."""
    try:
        code = cli.main(argv)
        sys.stdout.flush()
    except CkptdError as error:
        return report_error(error, is_json=_wants_json(argv))
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return 130
    except SystemExit as ended:  # argparse, after -h
        sys.stdout.flush()
        return ended.code if isinstance(ended.code, int) else 1
    return code


def _wants_json(argv: list[str]) -> bool:
    words = " ".join(argv[: argv.index("--")] if "--" in argv else argv)
    return any(sign in words for sign in ("-o json", "-ojson", "--output json", "--output=json"))


if __name__ == "__main__":
    main()
