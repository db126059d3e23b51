"""Rates that all tasks and batches of a user share by name: durable token buckets in files.

    ${CKPTD_SCOPES_DIR:-${XDG_STATE_HOME:-~/.local/state}/ckptd/scopes}/NAME     128 bytes, 0600
    {"tat_ns":1760000000500000000,"blocked_ns":0}            <blanks> 5a7c01de

`tat_ns` is the theoretical arrival time of the generic cell rate algorithm: with a burst of B and
a rate of R, no window of T seconds ever sees more than B + R*T takings, over all processes.
`blocked_ns` is until when everybody waits, as a Retry-After asked. Both are wall clock, so they
outlive a reboot; a clock that was set back costs at most one burst, never a day.
Each call locks the file (flock), reads, decides, writes 128 bytes in place, unlocks. The last
eight digits are a CRC-32: a torn or hostile file counts as empty, and `warning` says so.
Durable: a wait of over a second; shorter ones are over before a machine is up again.
Stdlib only. Source: ITU-T I.371 (GCRA); RFC 9110, section 10.2.3 (Retry-After).
Read next: `ckptd/batch/pace.py`.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple
from zlib import crc32

from ckptd.home import home
from ckptd.storage.disk import sync_data_fd, sync_fd, write_all
from ckptd.storage.untrusted import is_passing

WAIT_S_MAX: Final = 86_400.0  # a longer Retry-After is cut to this; then it is asked again
SCOPE_CHARS_MAX: Final = 100
_NAME_BYTES_MAX: Final = 255  # Source: NAME_MAX
_RECORD_BYTES: Final = 128
_CRC_CHARS: Final = 8
_DURABLE_S: Final = 1.0
_REOPENED_MAX: Final = 100
_NS: Final = 1_000_000_000
_RATE: Final = re.compile(r"(\d+(?:\.\d+)?)/(?:(\d+(?:\.\d+)?)?\s*)?(s|sec|m|min|h|hour|d|day)")
_UNIT_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_retry_after(text: str, now_s: float) -> float:
    """Return the seconds that a Retry-After header asks for, 0 to WAIT_S_MAX.

    Both forms: `120`, and `Wed, 21 Oct 2026 07:28:00 GMT`, which is compared with `now_s`.

    Raises:
        ValueError: neither of them.
    """
    text = text.strip()
    try:
        seconds = float(text)
    except ValueError:
        seconds = _of_date(text) - now_s
    if math.isnan(seconds):
        raise ValueError(f"Retry-After {text!r} is no number")
    return min(max(seconds, 0.0), WAIT_S_MAX)


def parse_rate(text: str) -> float:
    """Return the takings per second of `10/s`, `100/5min`, `1000/day`.

    Raises:
        ValueError: it is no rate, or out of range.
    """
    found = _RATE.fullmatch(text.strip().lower())
    per_s = 0.0
    if found:
        seconds = float(found[2] or 1) * _UNIT_S[found[3][0]]
        per_s = float(found[1]) / seconds if seconds > 0 else 0.0
    if not 1e-6 <= per_s <= 1e6:
        raise ValueError(f"{text!r} is no rate; examples: 10/s, 100/min, 1000/day")
    return per_s


def _of_date(text: str) -> float:
    from email.utils import mktime_tz, parsedate_tz  # noqa: PLC0415 (10 ms; only for this form)

    found = parsedate_tz(text)
    try:
        if found is not None:
            return float(mktime_tz(found))
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"Retry-After {text[:60]!r} is neither seconds nor an HTTP date")


def scopes_dir(environ: Mapping[str, str] = os.environ) -> str:
    """Return the directory of this user's scopes."""
    if given := environ.get("CKPTD_SCOPES_DIR"):
        return given
    state = environ.get("XDG_STATE_HOME") or os.path.join(home(environ), ".local", "state")
    return os.path.join(state, "ckptd", "scopes")


class _Record(NamedTuple):
    tat_ns: int
    blocked_ns: int


_EMPTY: Final = _Record(0, 0)


class Bucket:
    """One scope; cheap to make, holds nothing open between calls."""

    def __init__(self, scope: str, directory: str = "") -> None:
        """Check the name.

        Raises:
            ValueError: it cannot be the name of a file.
        """
        fits = 0 < len(scope) <= SCOPE_CHARS_MAX and scope.isprintable() and "/" not in scope
        if not fits or scope.startswith(".") or len(scope.encode()) > _NAME_BYTES_MAX:
            raise ValueError(
                f"scope {scope[:120]!r}: 1 to {SCOPE_CHARS_MAX} printable characters, no slash, "
                "no dot in front"
            )
        self.scope = scope
        self.warning = ""
        self._dir = directory or scopes_dir()
        self._path = os.path.join(self._dir, scope)

    def take(self, rate: float, burst: float = 1.0, n: int = 1) -> float:
        """Take `n` at `rate` per second and return 0; or take nothing and return the wait in s.

        `burst` may be taken at once after a pause; it is at least `n`.

        Raises:
            ValueError: a rate that is not above zero. OSError: the file cannot be used.
        """
        if not (rate > 0 and math.isfinite(rate) and n >= 1):
            raise ValueError(f"rate {rate}, n {n}: both are above zero")
        with self._locked() as fd:
            now_ns = time.time_ns()
            held = self._read(fd, now_ns)
            if held.blocked_ns > now_ns:
                return (held.blocked_ns - now_ns) / _NS
            each_ns = _NS / rate
            room_ns = max(burst, n) * each_ns
            tat_ns = max(min(held.tat_ns, now_ns + math.ceil(room_ns)), now_ns)
            next_ns = tat_ns + math.ceil(n * each_ns)
            wait_ns = next_ns - math.floor(room_ns) - now_ns
            if wait_ns > n:  # what rounding up and down make of it is no wait
                return wait_ns / _NS
            self._write(fd, _Record(next_ns, held.blocked_ns), next_ns - now_ns)
            return 0.0

    def block(self, seconds: float) -> None:
        """Let everybody wait for some seconds; a longer wait that holds already stays.

        Durable: the wait, where it is over a second.
        """
        wait_ns = int(min(max(seconds, 0.0), WAIT_S_MAX) * _NS)
        with self._locked() as fd:
            now_ns = time.time_ns()
            held = self._read(fd, now_ns)
            if now_ns + wait_ns > held.blocked_ns:
                self._write(fd, _Record(held.tat_ns, now_ns + wait_ns), wait_ns)

    def wait_s(self) -> float:
        """Return for how long everybody waits still, 0 where nobody has to."""
        if not os.path.lexists(self._path):
            return 0.0
        with self._locked() as fd:
            now_ns = time.time_ns()
            return max(0, self._read(fd, now_ns).blocked_ns - now_ns) / _NS

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        fd = self._opened()
        try:
            yield fd
        finally:
            os.close(fd)

    def _opened(self) -> int:
        """Return a descriptor of the file, locked; what is no file of ours is put aside."""
        os.makedirs(self._dir, mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        for _ in range(_REOPENED_MAX):  # Bound: each turn follows a change by somebody else
            try:
                fd = os.open(self._path, flags, 0o600)
            except OSError as error:
                if is_passing(error):
                    raise
                self._put_aside(error.strerror or str(error))
                continue
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                os.close(fd)
                self._put_aside("no regular file of this user")
                continue
            fcntl.flock(fd, fcntl.LOCK_EX)
            if self._is_there(found.st_ino):
                return fd
            os.close(fd)
        raise OSError(f"{self._path}: somebody keeps replacing it")

    def _is_there(self, inode: int) -> bool:
        try:
            return os.stat(self._path, follow_symlinks=False).st_ino == inode
        except FileNotFoundError:
            return False

    def _put_aside(self, why: str) -> None:
        """Rename what is in the way. Raises OSError where even that fails: the disk's trouble."""
        self.warning = f"scope {self.scope}: {why}; put aside, counts as empty"
        os.rename(self._path, os.path.join(self._dir, f".bad-{time.time_ns()}"))

    def _read(self, fd: int, now_ns: int) -> _Record:
        data = os.pread(fd, _RECORD_BYTES + 1, 0)
        if not data:
            return _EMPTY
        try:
            body, crc = data[: -_CRC_CHARS - 1], data[-_CRC_CHARS - 1 : -1]
            if len(data) != _RECORD_BYTES or int(crc, 16) != crc32(body):
                raise ValueError("torn")  # noqa: TRY301 (one place says what follows)
            found = json.loads(body)
            record = _Record(int(found["tat_ns"]), int(found["blocked_ns"]))
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            self.warning = f"scope {self.scope}: {self._path} does not check; counts as empty"
            return _EMPTY
        # Nobody writes a wait that ends later: the clock was set back, and how far nobody knows.
        is_real = record.blocked_ns <= now_ns + int(WAIT_S_MAX * _NS)
        return record if is_real else record._replace(blocked_ns=0)

    def _write(self, fd: int, record: _Record, wait_ns: float) -> None:
        """Crash: 128 bytes within one page are written or not; a power cut may tear: see CRC.

        Durable: where the wait it carries is over a second.
        """
        body = json.dumps(record._asdict(), separators=(",", ":")).encode()
        body = body.ljust(_RECORD_BYTES - _CRC_CHARS - 1)
        data = b"%s%08x\n" % (body, crc32(body))
        is_new = os.fstat(fd).st_size == 0
        write_all(fd, data, 0)
        os.truncate(fd, _RECORD_BYTES)
        if wait_ns > _DURABLE_S * _NS:
            sync_data_fd(fd)
            if is_new:
                self._sync_name()

    def _sync_name(self) -> None:
        dir_fd = os.open(self._dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync_fd(dir_fd)
        finally:
            os.close(dir_fd)
