"""Entry of `ckptctl`: exit codes, interrupts and broken streams; everything else is `cli.py`.

Exit codes: 0 ok, 1 a task failed or was refused, 2 transient, 3 not finished, 4 no such task,
5 conflict, 64 usage, 65 damaged data, 69 protocol, 70 a bug or a bad disk, 74 stdout or stdin is
broken, 77 denied, 78 config, 124 timeout, 130 interrupted, 141 the reader of the output is gone.
"""

import contextlib
import gc
import os
import sys
from typing import Final, NoReturn

gc.disable()  # a short life with many imports: collecting would be a tenth of it

from ckptctl import cli  # noqa: E402 (the collector is off first)
from ckptctl.call import report_error  # noqa: E402
from ckptd import streams  # noqa: E402
from ckptd.protocol.errors import BadRequest, CkptdError, Internal, StreamBroken  # noqa: E402

_ALL_THE_SAME: Final = "give it room; what was to be changed is changed all the same"

_NOWHERE: Final = (
    "the directory that you are in was removed",
    "go to one that is there; or name it (-d DIR), and all paths from /",
)


def main() -> NoReturn:
    """Run the command line of this process and end it."""
    gc.freeze()
    gc.enable()
    streams.settle()
    code = run(sys.argv[1:])
    # Nothing is left to tidy up; taking the interpreter down in order would cost more than asking.
    os._exit(code)


def run(argv: list[str]) -> int:
    """Run one command line; returns the exit code, with stdout flushed."""
    try:
        code = _run(argv)
        streams.flush()
    except CkptdError as error:
        return report_error(error, is_json=_wants_json(argv))
    except streams.Lost as lost:
        return _told(lost, is_json=_wants_json(argv))
    except KeyboardInterrupt:
        with contextlib.suppress(streams.Lost):
            sys.stdout.flush()
        sys.stderr.write("\n")
        return streams.INTERRUPTED
    except Exception as error:  # noqa: BLE001 (Python would end with 1, "a task failed")
        if isinstance(error, FileNotFoundError) and _is_nowhere():
            return report_error(BadRequest(*_NOWHERE), is_json=_wants_json(argv))
        sys.excepthook(*sys.exc_info())  # a bug
        return Internal.exit_code
    return code


def _run(argv: list[str]) -> int:
    try:
        return cli.main(argv)
    except SystemExit as ended:  # argparse, after -h
        return ended.code if isinstance(ended.code, int) else 1


def _is_nowhere() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _told(lost: streams.Lost, *, is_json: bool) -> int:
    if lost.code == streams.UNREAD:
        return lost.code
    hint = "" if isinstance(lost, streams.NoInput) else _ALL_THE_SAME
    return report_error(StreamBroken(str(lost), hint), is_json=is_json)


def _wants_json(argv: list[str]) -> bool:
    words = " ".join(argv[: argv.index("--")] if "--" in argv else argv)
    return any(sign in words for sign in ("-o json", "-ojson", "--output json", "--output=json"))


if __name__ == "__main__":
    main()
