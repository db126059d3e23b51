"""What the end of a command says of its item: a status, or that it wants to run again.

    exit 0    pass                       exit 75   not now: all of the scope backs off
    exit 1    fail                       exit 85   checkpointed: started again at once
    others    error                      SIGKILL, SIGSEGV and their like: it killed its worker,
                                         or somebody did: it runs again, but not for ever

`--on-exit 2=transient,3=skipped` changes the codes. Read next: `runner.py`.
"""

import json
import signal
from collections.abc import Sequence
from typing import Any, Final

from ckptd.batch.itemdir import ItemDir
from ckptd.batch.job import Ended, How, Job
from ckptd.batch.spec import Config
from ckptd.storage.untrusted import is_passing, parse_json, refuse_deep

RESULT_BYTES_MAX: Final = 256 << 10
KILL_AFTER_S: Final = 5.0  # between asking an item whose time is over to end, and making it
AGAIN_STALLS_MAX: Final = 3  # ends with 85 and nothing new before that is an error
_LINE_CHARS_MAX: Final = 500
_USUAL: Final = {0: "pass", 1: "fail", 75: "transient", 85: "again"}
_DEATHS: Final = frozenset(
    (
        signal.SIGKILL,
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGSEGV,
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGILL,
        signal.SIGFPE,
        signal.SIGSYS,
    )
)


def signal_name(number: int) -> str:
    """Return `SIGKILL` for 9; the number where the kernel has no name for it."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Judge:
    """The meaning of ends under one config."""

    def __init__(self, config: Config) -> None:
        self._meaning = _USUAL | {int(code): said for code, said in config.on_exit.items()}
        self._chosen = frozenset(map(int, config.on_exit))
        self._capture = config.capture
        self._timeout_s = config.timeout_s

    def not_started(self, job: Job, program: str, error: Exception) -> Ended:
        """Return the end of what the kernel would not execute; the machine's trouble passes."""
        why = error.strerror if isinstance(error, OSError) else str(error)
        text = f"{program[:_LINE_CHARS_MAX]}: {why}"
        if is_passing(error) or isinstance(error, BlockingIOError):  # EAGAIN: too many processes
            return Ended(job, How.TRANSIENT, text=text)
        if len(job.item.text) > 128 << 10:
            text += "; an item that long is no word of a command line: put it into a file"
        return Ended(job, How.RESULT, "error", text=text, is_final=True)

    def ended(self, job: Job, code: int, place: ItemDir) -> Ended:
        """Return what an exit code, or a signal as a negative one, means."""
        out, err = place.read("out"), place.read("err")
        end = self._meant(job, code, place, out, err)
        return end._replace(out=out, err=err)

    def _meant(self, job: Job, code: int, place: ItemDir, out: bytes, err: bytes) -> Ended:
        if job.is_timed_out:
            return Ended(job, How.RESULT, "error", text=f"timed out after {self._timeout_s:g} s")
        if job.is_signalled and code != 0:
            return Ended(job, How.INNOCENT)
        if code < 0:
            how = How.DIED if -code in _DEATHS else How.RESULT
            return Ended(job, how, "error", text=f"killed by {signal_name(-code)}")
        meaning = self._meaning.get(code, "error")
        if meaning == "transient":
            return Ended(job, How.TRANSIENT, retry_after_s=place.mark().retry_after_s)
        if meaning == "again":
            return self._again(job, place)
        if meaning == "pass":
            return self._passed(job, out)
        trouble = None if code in self._chosen else place.trouble()
        if trouble is not None:  # it may have failed for no more than what it could not print
            return Ended(job, How.TROUBLE, trouble=trouble)
        text = f"exit {code}" if code or not self._last(err) else ""
        said = self._last(err) or self._last(out)
        return Ended(job, How.RESULT, meaning, text=": ".join(filter(None, (text, said))))

    @staticmethod
    def _again(job: Job, place: ItemDir) -> Ended:
        cursor = place.mark().cursor
        job.agains = job.agains + 1 if cursor == job.cursor else 1
        job.cursor = cursor
        if job.agains < AGAIN_STALLS_MAX:
            return Ended(job, How.AGAIN)
        text = f"exit 85 {AGAIN_STALLS_MAX} times, and nothing new was saved"
        return Ended(job, How.RESULT, "error", text=text, is_final=True)

    def _passed(self, job: Job, out: bytes) -> Ended:
        result: Any = None
        match self._capture:
            case "none":
                return Ended(job, How.RESULT, "pass")
            case "last":
                return Ended(job, How.RESULT, "pass", result=self._last(out) or None)
            case "all":
                result = out.decode(errors="replace")
            case "json":
                try:
                    result = parse_json(out)
                except ValueError as bad:
                    text = f"passed, but its output is no JSON: {bad}"
                    return Ended(job, How.RESULT, "error", text=text, is_final=True)
        try:
            refuse_deep([[[result]]])
            size = len(json.dumps(result))
            json.dumps(result, ensure_ascii=False).encode()  # half a surrogate could not be shown
        except ValueError as bad:
            text = f"its result cannot be kept: {bad}"
            return Ended(job, How.RESULT, "error", text=text, is_final=True)
        if size > RESULT_BYTES_MAX:
            text = f"its result takes {size:,} bytes, at most {RESULT_BYTES_MAX:,} are kept"
            return Ended(job, How.RESULT, "error", text=text, is_final=True)
        return Ended(job, How.RESULT, "pass", result=result)

    @staticmethod
    def _last(printed: bytes) -> str:
        """Return the last line that is not empty."""
        lines: Sequence[bytes] = printed[-4 * _LINE_CHARS_MAX :].strip().splitlines()
        return lines[-1].decode(errors="replace").strip()[:_LINE_CHARS_MAX] if lines else ""
