"""A task in words: its state with the reason, its end, its progress, its times.

Text from tasks is hostile to a terminal: `clean` takes control characters out of all of it.
"""

import os
import pwd
import shlex
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from ckptctl.selectors import ACTIVE
from ckptctl.units import SECOND_NS, age_text, clock_text, duration_text, signal_name, size_text
from ckptd.protocol.limits import RETRIES_UNLIMITED
from ckptd.protocol.messages import FINISHED, Progress, TaskRow, TaskSpec

PAINT: Final = {
    "running": "32", "starting": "32", "paused": "36", "stopping": "33",
    "waiting": "33", "queued": "", "held": "36",
    "succeeded": "2", "failed": "31", "cancelled": "2", "quarantined": "35", "blocked": "35",
}  # fmt: skip
"""ANSI colour of a phase."""

_WAITS: Final = {
    "backoff": "retry",
    "transient": "retry",
    "rate_limit": "rate limit,",
    "at": "starts",
}
_STOPS: Final = {
    "cancel": "cancel asked",
    "kill": "being killed",
    "timeout": "over its time limit",
    "deadline": "past its deadline",
    "shutdown": "the daemon shuts down",
    "drill": "drilled",
    "drill_oom": "drilled: without memory",
}
_ENDS: Final = {
    "oom": "out of memory",
    "oom limit": "over its memory limit",
    "oom host": "the host ran out of memory",
    "timeout": "over its time limit",
    "deadline": "past its deadline",
    "lost": "supervisor lost",
    "reboot": "the machine restarted",
    "shutdown": "stopped by a shutdown",
    "drill": "stopped by a drill",
    "drill_oom": "stopped by a drill",
    "stopped": "its unit was stopped",
    "cancel": "",
    "kill": "killed",
    "not_started": "never started",
}

_FULL: Final = "disk full"  # short: a table cuts what follows
_UNSEEN: Final = frozenset({"lost", "reboot"})  # it may be as old as the last sign of the attempt


def clean(text: str) -> str:
    """Return the text without control characters, so that it cannot steer the terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def state_text(row: TaskRow, now_ns: int) -> str:
    """Return the phase and why, as in `waiting: retry in 12s (failure 2 of 3)`."""
    why = clean(_why(row, now_ns))
    return f"{row.phase}: {why}" if why else row.phase


def _why(row: TaskRow, now_ns: int) -> str:
    match row.phase:
        case "waiting":
            return _waiting(row, now_ns)
        case "stopping":
            return _STOPS.get(row.reason, row.reason)
        case "queued" if row.reason == "oom":
            return "again, with more memory"
        case "held" if row.reason == "oom":
            return end_text(row)
        case "queued" if row.failures or row.interruptions:
            return row.reason or f"to go on after attempt {row.attempt}"
        case "failed" | "cancelled":
            return _ended(row)
        case "quarantined":
            end = end_text(row)
            return f"{row.reason} ({end})" if end else row.reason
        case "blocked" if row.reason == "dependency":
            return "what it waits for can no longer happen"
        case "held" if row.until_ns > now_ns:
            left = duration_text((row.until_ns - now_ns) / SECOND_NS)
            return f"until released, and for {left} more"
        case _:
            return row.reason


def _ended(row: TaskRow) -> str:
    """Return the end and, where there is one that says more, the reason."""
    end = end_text(row) if row.phase == "failed" else _ENDS.get(row.cause, "")
    says_nothing = (row.cause, row.phase, "cancel", "kill", "oom", "cannot start")
    reason = "" if row.reason in says_nothing else row.reason
    reason = _ENDS.get(reason, reason)
    if not end or end == reason:
        return reason
    return f"{reason} ({end})" if reason and reason not in end else end


def _waiting(row: TaskRow, now_ns: int) -> str:
    words = _WAITS.get(row.reason, row.reason)
    if row.reason == "after":
        return "for other tasks"
    if row.until_ns:
        left_s = (row.until_ns - now_ns) / SECOND_NS
        words += f" in {duration_text(left_s)}" if left_s > 0 else " now"
    if row.reason == "backoff" and row.failures:
        is_bounded = 0 < row.failures_max <= RETRIES_UNLIMITED
        most = f" of {row.failures_max}" if is_bounded else ""
        words += f" (failure {row.failures}{most})"
    if row.reason == "transient" and row.blame == "disk":
        words += f" ({_FULL})"
    return words


def end_text(row: TaskRow) -> str:
    """Return how the last attempt ended: `exit 3`, `SIGSEGV`, `out of memory`."""
    match row.cause:
        case "exit":
            return exit_text(row.blame, row.code)
        case "signal":
            return signal_name(row.signal or 0)
        case "spawn_error":
            return clean(row.text) or f"cannot start: {os.strerror(row.code or 0).lower()}"
        case "oom":
            return oom_text(row.blame, row.code)
        case _:
            return _ENDS.get(row.cause, row.cause)


def exit_text(blame: str, code: int | None) -> str:
    """Return an exit code, and that the disk was full where that may be why."""
    return f"exit {code}" + (f", {_FULL}" if blame == "disk" else "")


def oom_text(blame: str, code: int | None) -> str:
    """Return whose memory ran out and, by its exit code, that the task itself lived on."""
    child = f", a child was killed (exit {code})" if code else ""
    return _ENDS.get(f"oom {blame}", _ENDS["oom"]) + child


def outcome_text(row: TaskRow) -> str:
    """Return one sentence about an ended task: `task 7 (census) failed: exit 3, after 2m10s`."""
    took = at_most(duration_text(runtime_s(row, row.ended_ns)), row.cause)
    after = f", after {took}" if row.ended_ns else ""
    again = f" in {row.attempt} attempts" if row.attempt > 1 else ""
    state = state_text(row, row.ended_ns)
    return f"task {row.id} ({clean(row.name)}) {state}{again}{after if row.attempt else ''}"


def runtime_s(row: TaskRow, now_ns: int) -> float:
    """Return the seconds of the last attempt so far, 0.0 where there was none."""
    if not row.started_ns:
        return 0.0
    end_ns = now_ns if row.phase in ACTIVE else row.ended_ns
    return max(0, end_ns - row.started_ns) / SECOND_NS


def runtime_text(row: TaskRow, now_ns: int) -> str:
    """Return how long the last attempt runs or ran."""
    if not row.started_ns or (row.phase not in ACTIVE and row.ended_ns < row.started_ns):
        return ""
    took = duration_text(runtime_s(row, now_ns))
    return took if row.phase in ACTIVE else at_most(took, row.cause)


def at_most(text: str, cause: str) -> str:
    """Return how long, of an attempt with that end: where nobody saw it, until it was found."""
    return f"at most {text}" if cause in _UNSEEN else text


def row_age_text(row: TaskRow, now_ns: int) -> str:
    """Return when it was submitted or, once over, when it ended, as an age."""
    since_ns = row.ended_ns if row.phase in FINISHED and row.ended_ns else row.submitted_ns
    return age_text((now_ns - since_ns) / SECOND_NS)


def command_text(row: TaskRow) -> str:
    """Return the command as a shell would take it."""
    return clean(shlex.join(row.argv))


def brief_command_text(row: TaskRow) -> str:
    """Return the command for a list: of a function or a batch what it is, not how it is run."""
    match row.argv:
        case [_, runner, target, "--input", given] if runner.endswith("/ckptd/sdk/run.py"):
            return clean(target if given == "{}" else f"{target} {given}")
        case [_, "-P", "-m", "ckptd.batch", "run", folder]:
            return clean(f"batch {folder.rpartition('/')[2]}")
        case _:
            return command_text(row)


def fraction(progress: Progress | None) -> float | None:
    """Return how far, 0.0 to 1.0, or None where a total is not known."""
    if progress is None or progress.total <= 0:
        return None
    return min(1.0, max(0.0, progress.done / progress.total))


def progress_text(row: TaskRow) -> str:
    """Return `34% 340/1000`, or the count alone, or what the task said of itself."""
    progress = row.progress
    part = fraction(progress)
    if progress is None:
        return ""
    if part is None:
        return _count(progress.done) if progress.done else clean(progress.text)
    return f"{int(part * 100)}% {_count(progress.done)}/{_count(progress.total)}"


def _count(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.1f}"


def eta_text(row: TaskRow) -> str:
    """Return the time that is left, "" where the rate is not known."""
    progress = row.progress
    if progress is None or progress.rate <= 0 or progress.total <= progress.done:
        return ""
    return duration_text((progress.total - progress.done) / progress.rate)


def bar_text(row: TaskRow, cells: int) -> str:
    """Return a bar of `cells` characters with the percentage, or the plain words."""
    part = fraction(row.progress)
    if part is None:
        return progress_text(row)
    halves = int(part * cells * 2)
    full, half = "━" * (halves // 2), "╸" * (halves % 2)
    return f"{full}{half}{'─' * (cells - len(full) - len(half))} {int(part * 100):3d}%"


def next_steps(row: TaskRow) -> list[str]:
    """Return what a person may want to do with a task that ended badly."""
    if row.phase not in ("failed", "cancelled"):
        return []
    steps = [f"its output: ckptctl logs -n 20 {row.id}"] if row.attempt else []
    if (batch := row.labels.get("batch")) and row.name == f"batch:{batch}":
        again = f"which items, and how to go on: ckptctl batch status {batch}"
        return [*map(clean, [again]), *steps]
    return [*steps, f"to start it again: ckptctl retry {row.id}"]


def settings(spec: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a task was submitted with, by the options of `submit`; "" for the usual."""
    failures, stop = spec.get("max_failures", 0), spec.get("stop_signal", 15)
    ask, on_exit = spec.get("checkpoint_signal", 0), spec.get("on_exit", {})
    delays = [duration_text(spec.get(name, 0.0)) for name in ("backoff_s", "backoff_max_s")]
    needs = [f"{need['task']} ({need['when']})" for need in spec.get("after", ())]
    return [
        ("after", ", ".join(needs)),
        ("timeout", _unless_zero(duration_text, spec.get("timeout_s"))),
        ("deadline", clock_text(spec.get("deadline_ns", 0))),
        ("retries", retries_text(failures)),
        ("backoff", "..".join(delays) if failures != 1 else ""),
        ("on-exit", ",".join(f"{code}={meaning}" for code, meaning in on_exit.items())),
        ("stop signal", signal_name(stop) if stop != 15 else ""),
        ("grace", _unless_zero(duration_text, spec.get("grace_s"))),
        ("save signal", signal_name(ask) if ask else ""),
        ("memory", _unless_zero(size_text, spec.get("memory_bytes"))),
        ("on-oom", on_oom if (on_oom := str(spec.get("on_oom", ""))) != "count" else ""),
        ("cpus", _unless_zero("{:g}".format, spec.get("cpus"))),
        ("tasks-max", str(spec.get("tasks_max") or "")),
        ("io-weight", str(spec.get("io_weight") or "")),
        ("nice", str(spec.get("nice") or "")),
        ("stdin", clean(spec.get("stdin", ""))),
    ]


@cache
def user_text(uid: int) -> str:
    """Return `ada (uid 1000)`, the number alone where the user database has no name for it."""
    try:
        return f"{clean(pwd.getpwuid(uid).pw_name)} (uid {uid})"
    except (KeyError, OverflowError):
        return str(uid)


def retries_text(failures_max: int) -> str:
    """Return how many failures beyond the first a task may have."""
    if not failures_max:
        return "for as long as it makes progress"
    return "unlimited" if failures_max > RETRIES_UNLIMITED else str(failures_max - 1)


def starts_text(task: TaskSpec, now_ns: int) -> str:
    """Return `, starts in 2h05m (2026-11-20 18:00:00)` of a task with a time, else ""."""
    at_ns = task.at_ns or (now_ns + int(task.in_s * SECOND_NS) if task.in_s else 0)
    if at_ns <= now_ns:
        return ""
    return f", starts in {duration_text((at_ns - now_ns) / SECOND_NS)} ({clock_text(at_ns)})"


def _unless_zero(text: Callable[[float], str], value: float | None) -> str:
    return text(value) if value else ""
