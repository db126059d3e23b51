"""The journal: do the daemon's lines reach it, how many of them, and for how long.

Read next: `machine.py`, docs/JOURNAL.md.
"""

import os
from collections.abc import Iterator

from ckptd.doctor import tools
from ckptd.doctor.contact import journalctl, user_name
from ckptd.doctor.finding import Check, Finding, ok, warn
from ckptd.doctor.place import SERVICE, Place
from ckptd.host.journal import JOURNAL_SOCKET, Kind

JOURNALD_LIMIT = "10,000 lines in 30 s, or more with much free room"  # Source: journald.conf(5)
_UNSET = frozenset({"", "0", "infinity"})


def lines(place: Place) -> Iterator[Finding]:
    """Look whether what the daemon tells is found again."""
    if not os.path.exists(JOURNAL_SOCKET):
        yield ok("journal", "there is no journald: the daemon's lines go to its stderr")
        return
    unit = place.systemd.service
    if unit.get("LoadState") != "loaded" or (place.pid and not place.is_of_unit):
        yield ok("journal", "not of ckptd.service: the daemon's lines go where its stderr goes")
        return
    to = unit.get("StandardError", "inherit")
    to = unit.get("StandardOutput", "") if to == "inherit" else to
    if not to.startswith("journal"):
        text = f"the unit's output goes to {to}"
        yield warn("journal", text, f"{place.systemd.command} edit ckptd: StandardError=journal")
    elif _newest(place):
        yield ok("journal", f"tells the story: {journalctl(place)} -x, or CKPTD_TASK_ID=7 for one")
    elif os.geteuid() != 0 and place.is_system:
        text = "you may not read the lines of the system"
        advice = f"to read along, as root: usermod -aG systemd-journal {user_name()}"
        yield warn("journal", text, advice)
    elif place.pid:
        text = "no line of the daemon is found"
        yield warn("journal", text, "does it run? systemctl status systemd-journald")
    else:
        yield ok("journal", "the daemon's lines will go there")


def _newest(place: Place) -> str:
    scope, field = ([], "_SYSTEMD_UNIT") if place.is_system else (["--user"], "_SYSTEMD_USER_UNIT")
    words = ["journalctl", *scope, "--no-pager", "-q", "-n", "1", "-o", "cat", f"{field}={SERVICE}"]
    return tools.output_of(words, place.systemd.env)


def rate(place: Place) -> Iterator[Finding]:
    """Look at the unit's rate limit. Zero means "not set", not "no limit"."""
    unit = place.systemd.service
    if unit.get("LoadState") != "loaded":
        return
    interval, burst = (unit.get(f"LogRateLimit{name}", "") for name in ("IntervalUSec", "Burst"))
    if not place.is_system:  # journald asks PID 1 alone, whatever the unit says
        yield ok("journal rate", f"journald's own: {JOURNALD_LIMIT}")
    elif interval in _UNSET or burst in _UNSET:
        text = f"journald's own rate limit holds: {JOURNALD_LIMIT}"
        advice = "to lift it: LogRateLimitIntervalSec=1s, LogRateLimitBurst=100000 (0 does nothing)"
        yield warn("journal rate", text, advice)
    else:
        yield ok("journal rate", f"{int(burst):,} lines in {interval} of the daemon's own")


def kept(_: Place) -> Iterator[Finding]:
    """Look whether the journal outlives a reboot."""
    if not os.path.exists(JOURNAL_SOCKET):
        return
    name = tools.read_text("/etc/machine-id")
    if name and os.path.isdir(f"/var/log/journal/{name}"):
        yield ok("journal kept", "on disk; of the last seconds before a power cut, the log tells")
    else:
        text = "in memory only: the story is gone after a reboot (the log of tasks is not)"
        advice = "mkdir -p /var/log/journal; journalctl --flush"
        yield warn("journal kept", text, advice)


def catalog(place: Place) -> Iterator[Finding]:
    """Look whether `journalctl -x` knows our kinds of lines."""
    if place.systemd.service.get("LoadState") != "loaded":
        return
    if tools.output_of(["journalctl", "--no-pager", "--list-catalog", Kind.DAEMON_READY.value]):
        yield ok("journal catalog", "installed: journalctl -x says what each line means")
    elif not place.is_system:
        yield ok("journal catalog", "not there: journalctl -x knows us where root installed ckptd")
    else:
        text = "not installed: journalctl -x has nothing to say about ckptd"
        yield warn(
            "journal catalog", text, "as root: journalctl --update-catalog (after make install)"
        )


CHECKS: tuple[Check, ...] = (lines, rate, kept, catalog)
