"""`python host.py IN OUT MODE JOBS module:function`: where functions run, many in one process.

    <- {"ready":true,"is_async":false,"wants_context":false}    or {"bad":"text"} and the end
    -> {"n":7,"item":"a.txt","dir":".../items/7","task":7}           {"cancel":7}
    <- {"n":7,"status":"pass","result":5,"out":"printed"}
    <- {"n":8,"retry_after":30,"scope":"api"}     not a result: try again

JSON lines over the descriptors IN and OUT; what the function prints goes with its result. This
file is executed by path, with the author's own interpreter, which need not have ckptd installed:
stdlib only, and of ckptd only what is stdlib only itself.
Invariant: once IN ends, the runner is dead, and so is this process, whatever the function does.
With JOBS 1 the function runs in the main thread. Read next: `functions.py` (the other side).
"""

import os
import sys

if __name__ == "__main__":  # before any other import: this directory's names are not for others
    _ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.path[:1] = [os.getcwd()]
    sys.path.append(_ROOT)

import asyncio
import contextvars
import fcntl
import importlib
import io
import json
import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final

from ckptd.sdk import outcomes
from ckptd.sdk.values import encode

RESULT_BYTES_MAX: Final = 256 << 10
OUTPUT_CHARS_MAX: Final = 256 << 10
_TEXT_CHARS_MAX: Final = 500
_CO_COROUTINE: Final = 0x80  # Source: inspect.CO_COROUTINE
RUNNER_GONE: Final = 75
PARK_AFTER_S: Final = 10.0  # an item that waits longer gives its worker to another

Message = dict[str, Any]
_printed: contextvars.ContextVar["_Printed | None"] = contextvars.ContextVar("item", default=None)


class Missing(Exception):
    """The function is not there, or cannot be one."""


def resolve(name: str) -> Callable[..., Any]:
    """Return the function `module:function`.

    Raises:
        Missing: with a text that says what is wrong.
    """
    module_name, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.split(".")[0] == error.name.split(".")[0]:
            raise Missing(f"there is no module {module_name!r} in {os.getcwd()}") from error
        raise Missing(f"module {module_name!r} cannot be imported: {_last_line(error)}") from error
    except BaseException as error:
        raise Missing(f"module {module_name!r} cannot be imported: {_last_line(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(found) if callable(getattr(found, key)) and key[0] != "_"]
            raise Missing(f"{module_name!r} has no {part!r}; it has: {', '.join(public[:12])}")
        found = getattr(found, part)
    if not callable(found):
        raise Missing(f"{name} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]  # callable: all that can be known


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether calling it gives a coroutine."""
    code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
    return bool(code is not None and code.co_flags & _CO_COROUTINE)


def wants_context(function: Callable[..., Any]) -> bool:
    """Return whether the first parameter is named `ctx`."""
    code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code is not None else ()
    return "ctx" in names[:1]


class _Printed:
    """What one item printed: the end of it counts, bounded."""

    def __init__(self) -> None:
        self.out: list[str] = []
        self.chars = 0

    def add(self, text: str) -> None:
        room = OUTPUT_CHARS_MAX - self.chars
        self.chars += len(text)
        if room > 0:
            self.out.append(text[:room])

    def text(self) -> str:
        lost = self.chars - OUTPUT_CHARS_MAX
        return "".join(self.out) + (f"\n[{lost} more characters]\n" if lost > 0 else "")


class _Stream(io.TextIOBase):
    """Stands for sys.stdout: what an item writes is kept with the item, the rest passes."""

    def __init__(self, behind: Any) -> None:
        self._behind = behind

    def write(self, text: str) -> int:
        printed = _printed.get()
        if printed is None:
            self._behind.write(text)
        else:
            printed.add(str(text))
        return len(text)

    def flush(self) -> None:
        self._behind.flush()

    def fileno(self) -> int:
        return int(self._behind.fileno())

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a property where the base has a value
        return str(self._behind.encoding)

    @property
    def buffer(self) -> Any:
        """Return the stream of bytes behind; what is written to it belongs to no item."""
        return self._behind.buffer


def _last_line(error: BaseException) -> str:
    text = traceback.format_exception_only(error)[-1].strip()
    where = traceback.extract_tb(error.__traceback__)
    if where and not isinstance(error, SyntaxError):
        text += f" ({os.path.basename(where[-1].filename)}:{where[-1].lineno})"
    return text[:_TEXT_CHARS_MAX]


def outcome_of(error: BaseException) -> Message:
    """Return what an exception says of the item."""
    text = str(error)[:_TEXT_CHARS_MAX]
    match error:
        case outcomes.SkipItem():
            return {"status": "skipped", "text": text}
        case outcomes.QuarantineItem():
            return {"status": "quarantined", "text": text}
        case outcomes.RateLimited():
            return {"retry_after": error.retry_after_s, "scope": error.scope, "text": text}
        case outcomes.TransientError():
            return {"retry_after": error.retry_after_s, "scope": "", "text": text}
        case outcomes.Parked():
            import time  # noqa: PLC0415 (only here)

            wait_s = max(0.0, error.until_s - time.time())
            is_limit = error.reason == "rate_limit"
            return {"retry_after": wait_s, "scope": error.scope, "is_own": not is_limit}
        case outcomes.StopRequested():
            return {"stopped": True}
        case outcomes.PermanentError():
            return {"status": "fail", "text": _last_line(error), "final": True}
        case outcomes.SdkError():
            return {"status": "error", "text": _last_line(error), "final": True}
        case AssertionError():
            return {"status": "fail", "text": _last_line(error), "trace": _trace(error)}
        case _:
            return {"status": "error", "text": _last_line(error), "trace": _trace(error)}


def _trace(error: BaseException) -> str:
    tail = error.__traceback__.tb_next if error.__traceback__ is not None else None
    return "".join(traceback.format_exception(type(error), error, tail))[-8_192:]


def result_of(value: Any) -> Message:
    """Return what a returned value says: that it passed, unless it cannot be stored."""
    if value is None:
        return {"status": "pass"}
    try:
        stored = encode(value, "the result")
        size = len(json.dumps(stored))
    except (TypeError, ValueError, RecursionError) as error:
        return {"status": "error", "text": str(error)[:_TEXT_CHARS_MAX], "final": True}
    if size > RESULT_BYTES_MAX:
        text = f"the result takes {size:,} bytes, at most {RESULT_BYTES_MAX:,}: write it to a file"
        return {"status": "error", "text": text, "final": True}
    return {"status": "pass", "result": stored}


class Host:
    """One process of functions."""

    def __init__(self, source: int, sink: int, function: Callable[..., Any], jobs: int) -> None:
        self.source = source
        self.sink = sink
        self.function = function
        self.jobs = jobs
        self.wants_context = wants_context(function)
        self._lock = threading.Lock()

    def say(self, message: Message) -> None:
        """Send one line as a whole; a runner that is gone takes this process along."""
        data = memoryview(json.dumps(message).encode() + b"\n")
        with self._lock:
            try:
                while data:  # Bound: write gives at least one byte or raises
                    data = data[os.write(self.sink, data) :]
            except OSError:
                os._exit(RUNNER_GONE)

    def orders(self) -> Iterator[Message]:
        """Yield what the runner says; at its end this process ends."""
        rest = b""
        while chunk := os.read(self.source, 1 << 18):  # Bound: the runner lives
            *lines, rest = (rest + chunk).split(b"\n")
            yield from map(json.loads, lines)
        os._exit(RUNNER_GONE)

    # --- threads ---------------------------------------------------------------------------------

    def run_in_threads(self) -> None:
        """Work until the runner is gone; with one job at a time, in the main thread."""
        orders: queue.SimpleQueue[Message] = queue.SimpleQueue()

        def feed() -> None:
            for order in self.orders():
                if "n" in order:
                    orders.put(order)

        def work() -> None:
            while True:  # Bound: this process ends with the runner
                self.say(self._call(orders.get()))

        targets = [feed, *[work] * (self.jobs - 1)]
        for target in targets:
            threading.Thread(target=target, daemon=True).start()
        work()

    def _call(self, order: Message) -> Message:
        printed = _Printed()
        token = _printed.set(printed)
        try:
            if self.wants_context:
                with context_of(order, self.function) as ctx:
                    said = result_of(self.function(ctx, order["item"]))
            else:
                said = result_of(self.function(order["item"]))
        except BaseException as error:  # noqa: BLE001 (whatever it raised is its outcome)
            said = outcome_of(error)
        finally:
            _printed.reset(token)
        return _told(order, said, printed)

    # --- a loop ----------------------------------------------------------------------------------

    async def run_in_loop(self) -> None:
        """Work until the runner is gone, in one thread."""
        loop = asyncio.get_running_loop()
        tasks: dict[int, asyncio.Task[None]] = {}

        def took(order: Message) -> None:
            if "cancel" in order:
                if order["cancel"] in tasks:
                    tasks[order["cancel"]].cancel()
                return
            task = loop.create_task(self._await(order))
            tasks[order["n"]] = task
            task.add_done_callback(lambda _: tasks.pop(order["n"], None))

        def feed() -> None:
            for order in self.orders():
                loop.call_soon_threadsafe(took, order)

        threading.Thread(target=feed, daemon=True).start()
        await loop.create_future()  # for ever: this process ends with the runner

    async def _await(self, order: Message) -> None:
        printed = _Printed()
        _printed.set(printed)
        try:
            if self.wants_context:
                with context_of(order, self.function) as ctx:
                    said = result_of(await self.function(ctx, order["item"]))
            else:
                said = result_of(await self.function(order["item"]))
        except asyncio.CancelledError:
            said = {"cancelled": True}
        except BaseException as error:  # noqa: BLE001 (whatever it raised is its outcome)
            said = outcome_of(error)
        self.say(_told(order, said, printed))


def context_of(order: Message, function: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Return the context of one item, over its own directory."""
    from ckptd.sdk.local import open_context  # noqa: PLC0415 (only for functions that want it)

    return open_context(order["dir"], function, task=order["task"], park_after=PARK_AFTER_S)


def _told(order: Message, said: Message, printed: _Printed) -> Message:
    out = printed.text()
    return {"n": order["n"], **said, **({"out": out} if out else {})}


def _preflight(function: Callable[..., Any]) -> int:
    """Call a function of no arguments: nothing means go, a number is seconds to wait."""
    try:
        found = asyncio.run(function()) if is_async(function) else function()
    except outcomes.TransientError as wait:
        print(wait.retry_after_s)
        return 75
    except Exception as error:  # noqa: BLE001 (whatever it raised is a no)
        print(_last_line(error), file=sys.stderr)
        return 1
    if found is None or found is True:
        return 0
    if isinstance(found, int | float) and not isinstance(found, bool):
        print(found)
        return 75 if found > 0 else 0
    print(f"it returned {found!r}", file=sys.stderr)
    return 1


def main(argv: list[str]) -> int:
    """Be a host; or, with `--check` or `--preflight` and a name, look or ask once."""
    if argv[0] in {"--check", "--preflight"}:
        try:
            function = resolve(argv[1])
        except Missing as missing:
            print(missing, file=sys.stderr)
            return 64
        return _preflight(function) if argv[0] == "--preflight" else 0
    source, sink, mode, jobs, name = argv
    for fd in (int(source), int(sink)):
        os.set_inheritable(fd, False)
    try:
        function = resolve(name)
    except Missing as missing:
        os.write(int(sink), json.dumps({"bad": str(missing)}).encode() + b"\n")
        return 64
    host = Host(int(source), int(sink), function, int(jobs))
    sys.stdout = sys.stderr = _Stream(sys.stdout)  # all they need
    loops = is_async(function)
    if mode == "async" and not loops:
        host.say({"bad": f"{name} is no coroutine function; say --mode threads"})
        return 64
    host.say({"ready": True, "is_async": loops, "wants_context": host.wants_context})
    if loops:
        asyncio.run(host.run_in_loop())
    else:
        host.run_in_threads()
    return 0


def _let_prints_pass() -> None:
    """Let what a module prints go nowhere where our stdout is one that nobody can write to."""
    if fcntl.fcntl(1, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)


if __name__ == "__main__":
    _let_prints_pass()
    _code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_code)  # whatever threads the module has left behind
