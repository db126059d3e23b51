r"""stdin, stdout and stderr of a command: always open, wide enough, honest about what got lost.

    ckptctl status >/dev/full    74: stdout cannot be written: No space left on device
    ckptctl status >&-           74, too: no file that we open gets the number 1
    ckptctl status | head -1     141, without a word: the reader has seen enough
    ckptctl status 2>&-          what was asked for, with its own exit code

Exit code 1 is an answer of many commands ("no", "a task failed"). Python ends with 1 where a stream
fails it, so every command of ours does its work in `run`. What a stream's encoding lacks comes
as `\u65e5`, which whoever reads JSON reads back; bytes that were no text come as they were.
Invariant: once a write to stdout failed, the exit code is not 0. It knows no command; stdlib only.
"""

import codecs
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any, Final, TextIO

BUG: Final = 70
LOST: Final = 74
INTERRUPTED: Final = 130
UNREAD: Final = 141

_SHOWN: Final = "ckptd.shown"
_WAS_NO_TEXT: Final = ("\udc80", "\udcff")  # how Python keeps a byte that is no text


class Lost(Exception):
    """Stdout takes nothing more; `code` is the exit code for it.

    No OSError: where files are read and written, nobody may take it for one of theirs.
    """

    def __init__(self, text: str, code: int = LOST) -> None:
        super().__init__(text)
        self.code = code


class NoInput(Lost):
    """Stdin gives nothing: not even its end."""


class _In(io.FileIO):
    """Raises NoInput where reading fails, as it does on a closed stdin."""

    def readinto(self, buffer: Any) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise _unread(error) from error

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            raise _unread(error) from error


class _Out(io.FileIO):
    """Raises Lost where a write fails, and from then on; once that was told, nothing comes out."""

    lost: Lost | None = None
    is_told = False

    def write(self, data: Any) -> int:
        view = memoryview(data)
        written = len(view) if self.is_told else 0
        while written < len(view):  # Bound: each turn writes, waits for a reader, or is the last
            if self.lost is not None:
                raise self.lost
            try:
                taken = super().write(view[written:])
            except OSError as error:
                self._fail(error)
                break
            written += taken or await_reader(self.fileno())
        return len(view)

    def _fail(self, error: OSError) -> None:
        self.lost = broken(error)
        raise self.lost from error


class _Err(_Out):
    """Never raises: what cannot be told changes nothing of what is done."""

    def _fail(self, error: OSError) -> None:
        del error


def await_reader(fd: int) -> int:
    """Wait until something fits in: some who share a pipe with us make it non-blocking."""
    import select  # noqa: PLC0415 (rarely)

    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()
    return 0


def broken(error: OSError) -> Lost:
    """Return what a write to stdout that failed with `error` comes to."""
    is_unread = isinstance(error, BrokenPipeError)
    return Lost(f"stdout cannot be written: {_why(error)}", UNREAD if is_unread else LOST)


def _unread(error: OSError) -> NoInput:
    return NoInput(f"stdin cannot be read: {_why(error)}")


def _why(error: OSError) -> str:
    return "it is closed" if error.errno == errno.EBADF else error.strerror or str(error)


def run(work: Callable[[], int], name: str = "", *, gives_bytes: bool = False) -> int:
    """Do a command's work between good streams; return the exit code for it and its output."""
    settle(gives_bytes=gives_bytes)
    try:
        return ended(work(), name)
    except Lost as lost:
        return tell(lost, name)
    except SystemExit as left:  # argparse, after -h
        return ended(left.code, name)
    except KeyboardInterrupt:
        return ended(INTERRUPTED, name)
    except Exception:  # noqa: BLE001 (a bug: Python would end with 1, which is an answer)
        sys.excepthook(*sys.exc_info())
        return ended(BUG, name)


def ended(code: object, name: str) -> int:
    """Return the exit code, `code` as in sys.exit, once what was printed is out or lost."""
    try:
        flush()
    except Lost as lost:
        return tell(lost, name)
    return code if isinstance(code, int) else int(code is not None)


def tell(lost: Lost, name: str) -> int:
    """Say what got lost, unless the reader just left; return the exit code."""
    raw = _raw()
    if raw is not None:
        raw.is_told = True
    if lost.code != UNREAD:
        sys.stderr.write(f"{name}: {lost}\n" if name else f"{lost}\n")
    return lost.code


def flush() -> None:
    """Write out what was printed. Raises Lost where that, or anything before, failed."""
    sys.stdout.flush()
    raw = _raw()
    if raw is not None and raw.lost is not None:
        raise raw.lost


def heed_reader() -> None:
    """Raise Lost where nobody can read stdout any more: a follower may write nothing for days."""
    raw = _raw()
    if raw is None:
        return
    import select  # noqa: PLC0415 (who follows alone)

    poll = select.poll()
    poll.register(raw, 0)
    if any(event & select.POLLERR for _, event in poll.poll(0)):
        raise broken(BrokenPipeError(errno.EPIPE, "nobody reads it"))


def _raw() -> _Out | None:
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Out) else None


def settle(*, gives_bytes: bool = False) -> None:
    """Put our own streams in place of Python's.

    `gives_bytes`: what stdout's encoding lacks comes as UTF-8, for who gave it as bytes.
    """
    _occupy()
    codecs.register_error(_SHOWN, _as_utf8 if gives_bytes else _shown)
    sys.stdin = io.TextIOWrapper(
        io.BufferedReader(_In(0, "r", closefd=False)),
        encoding=_encoding(sys.__stdin__),
        errors="surrogateescape",
    )
    sys.stdout = _writer(_Out(1, "w", closefd=False), sys.__stdout__, _SHOWN)
    sys.stderr = _writer(_Err(2, "w", closefd=False), sys.__stderr__, "backslashreplace")
    sys.stderr.reconfigure(line_buffering=True)


def _writer(raw: io.FileIO, before: TextIO | None, errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=_encoding(before),
        errors=errors,
        newline="\n",
        line_buffering=raw.isatty() or bool(getattr(before, "write_through", False)),
    )


def _encoding(stream: TextIO | None) -> str:
    return "utf-8" if stream is None else stream.encoding


def _occupy() -> None:
    """Let the numbers 0, 1 and 2 be taken: else a file of ours gets one, and is printed into.

    What stands for a closed 0 cannot be read, and what stands for a closed 1 cannot be written:
    both go on to fail, also for the programs that we become or start.
    """
    for fd, way in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, way)
            os.dup2(null, fd)
            if null != fd:
                os.close(null)
            else:
                os.set_inheritable(fd, True)


def _shown(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return how a character is written that the encoding of stdout does not have."""
    assert isinstance(error, UnicodeEncodeError)
    char = error.object[error.start]
    if _WAS_NO_TEXT[0] <= char <= _WAS_NO_TEXT[1]:
        return _as_utf8(error)
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4)), error.start + 1


def _as_utf8(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    char = error.object[error.start]
    is_byte = _WAS_NO_TEXT[0] <= char <= _WAS_NO_TEXT[1]
    return char.encode(errors="surrogateescape" if is_byte else "surrogatepass"), error.start + 1
