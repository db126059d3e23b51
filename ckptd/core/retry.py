"""Arithmetic of trying again: delays, exit classes, when patience ends. No I/O, no clock.

Source: exit classes follow sysexits(3), `timeout(1)` and HTCondor's 85 ("checkpointed, restart
me"); full jitter follows the AWS builders' article on backoff.
"""

from typing import Final

OK: Final = "ok"
FAIL: Final = "fail"  # final: no retry makes it better
RETRY: Final = "retry"  # the task's fault; counts as a failure
TRANSIENT: Final = "transient"  # nobody's fault; waits, counts as an interruption
AGAIN: Final = "again"  # checkpointed, start me again at once

EXIT_AGAIN: Final = 85
EXIT_TRANSIENT: Final = 75  # EX_TEMPFAIL
# EX_USAGE DATAERR NOINPUT NOUSER NOHOST SOFTWARE OSFILE CANTCREAT PROTOCOL NOPERM CONFIG;
# 126 not executable, 127 not found: the same run would end the same way.
EXIT_PERMANENT: Final = frozenset({64, 65, 66, 67, 68, 70, 72, 73, 76, 77, 78, 126, 127})

# What shells and argument parsers exit with for a mistyped line: as fast, and so often in a row.
USAGE_CODE: Final = 2
USAGE_S_MAX: Final = 2.0
USAGE_TIMES: Final = 3

# SIGILL SIGTRAP SIGABRT SIGBUS SIGFPE SIGSEGV SIGSYS
CRASH_SIGNALS: Final = frozenset({4, 5, 6, 7, 8, 11, 31})

# EINTR EIO EAGAIN ENOMEM EBUSY ENFILE EMFILE ENOSPC EDQUOT: the machine's trouble, not the task's.
SPAWN_TRANSIENT: Final = frozenset({4, 5, 11, 12, 16, 23, 24, 28, 122})


def exit_class(code: int, on_exit: dict[str, str], *, is_full: bool = False) -> str:
    """Return what an exit code means; the task's own map wins over the defaults.

    `is_full`: the disk of its output was. A program that cannot write may exit with anything.
    """
    chosen = on_exit.get(str(code))
    if chosen is not None:
        return chosen
    if code == 0:
        return OK
    if code == EXIT_AGAIN:
        return AGAIN
    if code == EXIT_TRANSIENT or is_full:
        return TRANSIENT
    return FAIL if code in EXIT_PERMANENT else RETRY


def backoff_ns(count: int, base_s: float, cap_s: float, u: float) -> int:
    """Return the delay before the next try after `count` tries: doubling, capped, full jitter.

    `u` in [0, 1) is the jitter. At least a tenth of the whole delay, so that a storm is spread
    but nobody spins.
    """
    whole_s = min(cap_s, base_s * 2.0 ** min(count - 1, 40)) if count > 0 else 0.0
    return int(max(u, 0.1) * whole_s * 1e9)


def jitter(seed: int, task: int, attempt: int) -> float:
    """Return a number in [0, 1) from one turn's seed, different for each task and attempt.

    Source: the finaliser of splitmix64 (Steele, Lea, Flood 2014).
    """
    mask = (1 << 64) - 1
    x = (seed + task * 0x9E3779B97F4A7C15 + attempt * 0xD1B54A32D192ED03) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return ((x ^ (x >> 31)) >> 11) / (1 << 53)
