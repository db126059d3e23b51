"""Items as calls of a Python function, in host processes of the author's own interpreter.

With `process` every lane has a host of its own; with `threads` and `async` one host has them all.
A host that dies tells on nobody: what was in flight in it is suspect, and from then on runs in a
host alone, so the item that kills is known at the next death.
Invariant: results that a host sent before it died are taken before anything is called suspect.
Read next: `host.py` (the other end of the pipes).
"""

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

from ckptd.batch import itemdir
from ckptd.batch.job import Ended, How, Job, Setting
from ckptd.batch.judge import KILL_AFTER_S, signal_name
from ckptd.batch.refusal import FAILED, Refused
from ckptd.batch.spec import Config, Knobs
from ckptd.storage.facts import RETRY_AFTER_S_MAX, STATUSES
from ckptd.storage.untrusted import is_passing

_HOST: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "host.py")
_LINE_BYTES_MAX: Final = 8 << 20
_READ_BYTES: Final = 1 << 20
_READS_MAX: Final = 64
_IMPORT_DEATHS_MAX: Final = 3  # by signals, in a row: it is not the machine's trouble, then
_CHECK_S_MAX: Final = 30.0


def host_command(interpreter: str, *words: str) -> list[str]:
    """Return the command of a host, run by path: its interpreter need not know ckptd."""
    return [interpreter, _HOST, *words]


def check_function(config: Config, interpreter: str, env: dict[str, str]) -> None:
    """Import the function once, in a process of its own.

    Raises:
        Refused: it is not there, or its module fails.
    """
    command = host_command(interpreter, "--check", config.python)
    try:
        done = subprocess.run(
            command,
            cwd=config.cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
            timeout=_CHECK_S_MAX,
        )
    except OSError as error:
        raise Refused(f"the interpreter {interpreter}: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise Refused(
            f"importing {config.python} takes more than {_CHECK_S_MAX:g} s",
            "do the work in the function, not when its module is imported",
        ) from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no word"]
        places = [line for line in lines if line.lstrip().startswith("File ")]
        if "SyntaxError" in lines[-1] and places and f'"{_HOST}"' in places[-1]:
            raise Refused(f"{interpreter} is an old Python; a batch needs 3.11 or newer")
        raise Refused(f"{config.python}: {lines[-1]}", f"it is imported in {config.cwd}")


class _Host:
    """One host process and what is in it."""

    def __init__(self, setting: Setting, config: Config, knobs: Knobs, jobs: int) -> None:
        self.jobs = jobs
        self.running: dict[int, Job] = {}
        self.is_ending = False  # by our hand: nobody in it is to blame
        self.is_ready = False
        self.is_full = False  # its pipe takes nothing more for now
        self.bad = ""
        self.is_async = False
        self.kill_at: dict[int, float] = {}  # when a cancelled coroutine must have ended
        self._rest = b""
        self._unsent = bytearray()
        theirs_in, self.to_fd = os.pipe()
        self.from_fd, theirs_out = os.pipe()
        mode = knobs.mode or "auto"
        words = (str(theirs_in), str(theirs_out), mode, str(jobs), config.python)
        try:
            self.process = subprocess.Popen(
                host_command(knobs.interpreter or sys.executable, *words),
                cwd=setting.cwd,
                env=setting.env,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs_in, theirs_out),
                process_group=0,
            )
        except OSError as error:
            os.close(self.to_fd)
            os.close(self.from_fd)
            if is_passing(error) or isinstance(error, BlockingIOError):
                raise  # EAGAIN, no descriptors: the machine's trouble, not the interpreter's
            raise Refused(
                f"the interpreter {knobs.interpreter}: {error.strerror}", code=FAILED
            ) from error
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        for fd in (self.to_fd, self.from_fd):
            os.set_blocking(fd, False)
        self.pid_fd = os.pidfd_open(self.process.pid)

    def say(self, message: dict[str, Any]) -> None:
        """Take a message in; it leaves with the next `flush`."""
        self._unsent += json.dumps(message).encode() + b"\n"

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def flush(self) -> bool:
        """Send what the pipe takes; return whether anything is left."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._unsent:  # Bound: write takes at least one byte or raises
                del self._unsent[: os.write(self.to_fd, self._unsent)]
        return bool(self._unsent)

    def heard(self) -> list[dict[str, Any]]:
        """Return the messages that lie ready; a host that talks nonsense is killed."""
        messages: list[dict[str, Any]] = []
        with contextlib.suppress(BlockingIOError):
            for _ in range(_READS_MAX):  # more than a pipe holds; the rest wakes us again
                chunk = os.read(self.from_fd, _READ_BYTES)
                if not chunk:
                    break
                *lines, self._rest = (self._rest + chunk).split(b"\n")
                messages += [found for line in lines if (found := self._parsed(line))]
                if len(self._rest) > _LINE_BYTES_MAX:
                    self.kill()
                    break
        return messages

    def _parsed(self, line: bytes) -> dict[str, Any] | None:
        try:
            found = json.loads(line)
            if isinstance(found, dict) and isinstance(found.get("n", 0), int):
                return found
        except (ValueError, RecursionError):
            pass
        self.kill()
        return None

    def begin_anew(self, now_s: float, timeout_s: float) -> None:
        """Let the time of what waits in it begin now: importing is not the items' doing."""
        for job in self.running.values():
            job.began_s = now_s
            job.ends_s = now_s + timeout_s if timeout_s else 0.0

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def fds(self) -> tuple[int, int, int]:
        return (self.from_fd, self.pid_fd, self.to_fd)


class Functions:
    """The `Workers` of functions."""

    def __init__(self, setting: Setting, config: Config, knobs: Knobs, epoll: select.epoll) -> None:
        self._setting, self._config, self._knobs = setting, config, knobs
        self._epoll = epoll
        self._shared = 1 if knobs.mode == "process" else knobs.workers
        self._hosts: list[_Host] = []
        self._by_fd: dict[int, _Host] = {}
        self._is_known = False
        self._import_deaths = 0  # in a row, by signals
        self._wants_context = False

    def can_start(self, job: Job) -> bool:
        """Return whether there is a worker for this job at this moment.

        The first host must have said what kind of function it is before anything is given to it.
        """
        if not self._is_known:
            if not self._hosts:
                self._opened(self._shared)
            return False
        return self._free(job) is not None or self._may_open(job)

    def _free(self, job: Job) -> _Host | None:
        jobs = 1 if job.is_suspect else self._shared
        for host in self._hosts:
            if host.jobs == jobs and len(host.running) < jobs and not host.is_ending:
                return host
        return None

    def _may_open(self, job: Job) -> bool:
        if job.is_suspect or self._shared == 1:
            return True  # a host of its own; the runner bounds how many items are in flight
        return all(host.jobs == 1 or host.is_ending for host in self._hosts)

    def start(self, job: Job) -> Ended | None:
        """Start a job: an order to a host.

        Raises:
            Refused: there is no such interpreter.
        """
        host = self._free(job) or self._opened(1 if job.is_suspect else self._shared)
        order: dict[str, Any] = {"n": job.number, "item": job.item.value}
        if self._wants_context:
            job.has_dir = True
            order |= {"dir": itemdir.path_of(self._setting, job), "task": job.number}
        host.running[job.number] = job
        host.say(order)
        return None

    def send(self) -> None:
        """Let the orders of this turn go out, one write a host."""
        for host in self._hosts:
            if host.has_unsent:
                self._watch(host)

    def _opened(self, jobs: int) -> _Host:
        host = _Host(self._setting, self._config, self._knobs, jobs)
        self._hosts.append(host)
        for fd in host.fds():
            self._by_fd[fd] = host
        self._epoll.register(host.from_fd, select.EPOLLIN)
        self._epoll.register(host.pid_fd, select.EPOLLIN)
        self._epoll.register(host.to_fd, 0)
        return host

    def _watch(self, host: _Host) -> None:
        is_full = host.flush()
        if is_full != host.is_full:
            host.is_full = is_full
            self._epoll.modify(host.to_fd, select.EPOLLOUT if is_full else 0)

    def take(self, fd: int, events: int) -> Sequence[Ended] | None:
        """Return the ends that a descriptor tells of; None where it is not one of ours.

        Raises:
            Refused: the function cannot be had; nothing was run.
        """
        del events
        host = self._by_fd.get(fd)
        if host is None:
            return None
        if fd == host.to_fd:
            self._watch(host)
            return []
        ends = [end for message in host.heard() for end in self._understood(host, message)]
        if host.bad:
            raise Refused(host.bad, "nothing more was run", code=FAILED)
        return ends + self._buried(host) if fd == host.pid_fd else ends

    def _understood(self, host: _Host, said: dict[str, Any]) -> list[Ended]:
        if "n" not in said:
            host.bad = str(said.get("bad", ""))
            host.is_ready = not host.bad
            host.begin_anew(time.monotonic(), self._config.timeout_s)
            host.is_async = bool(said.get("is_async"))
            self._import_deaths = 0
            self._is_known, self._wants_context = True, bool(said.get("wants_context"))
            return []
        job = host.running.pop(said["n"], None)
        return [] if job is None else [_end_of(job, said, self._config.timeout_s)]

    def _buried(self, host: _Host) -> list[Ended]:
        """Return the ends of everything that was in a host that is dead."""
        host.kill()  # what it left behind in its group; it is not reaped yet
        code = host.process.wait()
        if not host.is_ready and not host.is_ending:
            self._import_deaths += 1
            host.is_ending = True  # what waited in it has not begun
            if code >= 0 or self._import_deaths >= _IMPORT_DEATHS_MAX:
                raise Refused(
                    f"{self._config.python}: the process ended while its module was imported "
                    f"({_how_ended(code)})",
                    "nothing more was run",
                    code=FAILED,
                )
        for fd in host.fds():
            self._epoll.unregister(fd)
            os.close(fd)
            del self._by_fd[fd]
        self._hosts.remove(host)
        how = f"its process {_how_ended(code)}"
        return [self._end_in_dead(job, host, how) for job in host.running.values()]

    def _end_in_dead(self, job: Job, host: _Host, how: str) -> Ended:
        if job.is_timed_out:
            text = f"timed out after {self._config.timeout_s:g} s"
            return Ended(job, How.RESULT, "error", text=text)
        if host.is_ending or job.is_signalled:
            return Ended(job, How.INNOCENT)
        is_alone = len(host.running) == 1
        return Ended(job, How.DIED if is_alone else How.SUSPECT, text=how)

    def expire(self, job: Job) -> None:
        """End a job whose time is over: cancelled in a loop, else with its host.

        A thread cannot be ended alone: the others in it are innocent and run again; nor can a
        coroutine that does not let go of its loop.
        """
        now_s = time.monotonic()
        for host in self._hosts:
            if job.number in host.running and host.is_ready and not host.is_ending:
                if host.is_async and not job.is_timed_out:
                    job.is_timed_out = True
                    host.kill_at[job.number] = now_s + KILL_AFTER_S
                    host.say({"cancel": job.number})
                    self._watch(host)
                elif not host.is_async or now_s >= host.kill_at[job.number]:
                    job.is_timed_out = True
                    host.is_ending = True
                    host.kill()

    def stop(self, number: int) -> None:
        """Send a signal to every host."""
        for host in self._hosts:
            host.is_ending = True
            host.kill(number)

    def close(self) -> None:
        """Kill the hosts, and wait for them."""
        self.stop(signal.SIGKILL)
        for host in list(self._hosts):
            host.running.clear()
            self._buried(host)


def _how_ended(code: int) -> str:
    return f"was killed by {signal_name(-code)}" if code < 0 else f"exited with {code}"


def _bounded(seconds: object) -> float:
    """Return a wait that our clocks can hold, whatever a function or a server came up with."""
    if not isinstance(seconds, int | float) or math.isnan(seconds):
        return 0.0
    return float(min(max(seconds, 0), RETRY_AFTER_S_MAX))


def _end_of(job: Job, said: dict[str, Any], timeout_s: float) -> Ended:
    out = str(said.get("out", "")).encode(errors="replace")
    text = str(said.get("text", "")).encode(errors="replace").decode()
    if said.get("cancelled"):
        if job.is_timed_out:
            return Ended(job, How.RESULT, "error", text=f"timed out after {timeout_s:g} s")
        return Ended(job, How.RESULT, "error", text="cancelled itself")
    if said.get("stopped"):
        return Ended(job, How.INNOCENT, out=out)
    if "retry_after" in said:
        scope = str(said.get("scope", ""))
        wait_s = _bounded(said["retry_after"])
        how = How.LATER if said.get("is_own") else How.TRANSIENT
        return Ended(job, how, text=text, retry_after_s=wait_s, scope=scope, out=out)
    status = str(said.get("status"))
    if status not in STATUSES:
        return Ended(job, How.RESULT, "error", text=f"the host said {status!r}", out=out)
    try:
        json.dumps(said.get("result"), ensure_ascii=False).encode()
    except UnicodeEncodeError as bad:  # half a surrogate: nobody could show it
        text = f"its result cannot be kept: {bad}"
        return Ended(job, How.RESULT, "error", text=text, is_final=True, out=out)
    is_final = bool(said.get("final")) or status != "error"
    trace = str(said.get("trace", "")).encode(errors="replace")
    return Ended(
        job, How.RESULT, status, said.get("result"), text, is_final=is_final, out=out, err=trace
    )
