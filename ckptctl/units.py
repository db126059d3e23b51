"""Durations, times, sizes, signals: from what people type, and back to what people read.

It knows no task and prints nothing; what it cannot read is a BadRequest that shows examples.
"""

import re
import signal
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

from ckptd.protocol import on_oom
from ckptd.protocol.errors import BadRequest

T = TypeVar("T")
V = TypeVar("V")

SHOWN_CHARS: Final = 60  # of a value that is refused
_TOO_LONG_S: Final = 1e12  # no clock counts so far
_TOO_LARGE: Final = 1e24
SECOND_NS: Final = 1_000_000_000
_UNIT_S: Final = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SIZE: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d|w)\s*")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_CLOCK: Final = re.compile(r"[0-9]{1,2}:[0-9]{2}")
ON_EXIT: Final = ("ok", "fail", "retry", "transient", "again")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" where a known word is near, else ""."""
    import difflib  # noqa: PLC0415 (for mistakes only)

    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"did you mean {found[0]}?" if found else ""


def told(value: object) -> str:
    """Return a value as it is told in a refusal: whole where it is short."""
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits
        text = "a number too long to be written"
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 3]}..."


def empty(option: str) -> BadRequest:
    """Return the refusal of an empty value, with the likely reason."""
    return BadRequest(
        f"{option}: the value is empty", "leave it out, or give it one: is a variable not set?"
    )


def one_line(text: object) -> str:
    """Return a text that can be told in one line. Raises BadRequest for control characters."""
    if _CONTROL.search(str(text)):
        raise BadRequest(f"control characters in {told(text)}", "it is shown in lists: one line")
    return str(text)


def twice(what: str, first: object, second: object) -> BadRequest:
    """Return the refusal of two values where there is room for one."""
    return BadRequest(f"{what} is given twice, as {told(first)} and {told(second)}")


def named(option: str, parse: Callable[[T], V], value: T) -> V:
    """Return the parsed value of an option; a refusal begins with the option's name."""
    try:
        return parse(value)
    except BadRequest as bad:
        if bad.message.startswith(f"{option}: "):
            raise
        raise BadRequest(f"{option}: {bad.message}", bad.hint) from bad


def listed(option: str, what: str, text: str) -> list[str]:
    """Return the words of `A,B`, in small letters. Raises BadRequest where there is none."""
    words = [word for part in text.split(",") if (word := part.strip().lower())]
    if not words:
        raise BadRequest(f"{option}: no {what} in {told(text)}")
    return words


def whole(least: int | None = None) -> Callable[[object], int]:
    """Return what reads a whole number, of at least so much."""

    def parse(value: object) -> int:
        words = str(value).strip()
        if re.fullmatch(r"[+-]?[0-9]{1,30}", words) is None or (
            least is not None and int(words) < least
        ):
            range_text = "" if least is None else f" from {least} on"
            raise BadRequest(f"not a whole number{range_text}: {told(value)}")
        return int(words)

    return parse


def parse_duration(text: str | float) -> float:
    """Return seconds of `90`, `90s`, `1h30m`, `250ms`, `3d`."""
    words = str(text).strip().lower()
    is_bare = words.isascii() and words.replace(".", "", 1).isdecimal()
    parts = [(words, "s")] if is_bare else _PART.findall(words)
    total = sum(float(number) * _UNIT_S[unit] for number, unit in parts)
    if not parts or (not is_bare and _PART.sub("", words)) or total > _TOO_LONG_S:
        raise BadRequest(f"not a duration: {told(text)}", "examples: 90s 5m 2h 3d 1h30m")
    return total


def parse_time(text: object, now_s: float | None = None) -> int:
    """Return ns since the epoch of `2026-11-20T18:00` (local), `...Z`, `18:00`, `+3h`."""
    now = time.time() if now_s is None else now_s
    words = text.isoformat() if isinstance(text, datetime) else str(text).strip()
    if words.startswith("+"):
        return int((now + parse_duration(words[1:])) * SECOND_NS)
    try:
        if _CLOCK.fullmatch(words):
            hour, minute = map(int, words.split(":"))
            today = datetime.fromtimestamp(now).astimezone()
            when = today.replace(hour=hour, minute=minute, second=0, microsecond=0)
            if when.timestamp() <= now:
                when = (when.replace(tzinfo=None) + timedelta(days=1)).astimezone()
        else:
            when = datetime.fromisoformat(words).astimezone()
        return int(when.timestamp()) * SECOND_NS + when.microsecond * 1000
    except (ValueError, OverflowError) as bad:
        hint = "examples: 2026-11-20T18:00 (local time) 2026-11-20T17:00Z 18:00 +3h"
        raise BadRequest(f"not a time: {told(text)}", hint) from bad


def parse_moment(text: str) -> int:
    """Return ns of a time that was, or of a duration ago: `2h` is two hours ago, 09:00 the last."""
    now_s = time.time()
    try:
        return int((now_s - parse_duration(text)) * SECOND_NS)
    except BadRequest:
        from_s = now_s - 86_400 if _CLOCK.fullmatch(text.strip()) else now_s
        at_ns = parse_time(text, from_s)
    if at_ns > now_s * SECOND_NS:
        raise BadRequest(f"yet to come: {told(text)}", "examples: 2h (ago) 09:00 2026-11-20T18:00")
    return at_ns


def parse_size(text: str | float) -> int:
    """Return bytes of `2G`, `512M`, `1.5GiB`, `4096`: multiples of 1024."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:I?B)?", str(text).strip().upper())
    if found is None or float(found[1]) > _TOO_LARGE or 0 < float(found[1]) * _SIZE[found[2]] < 1:
        raise BadRequest(f"not a size: {told(text)}", "examples: 512M 2G 1.5G")
    return int(float(found[1]) * _SIZE[found[2]])


def parse_number(text: str | float) -> float:
    """Return `1.5`, `2`; nothing negative, and no text that only looks like a number."""
    words = str(text).strip()
    if re.fullmatch(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+", words) is None:
        raise BadRequest(f"not a number: {told(text)}", "examples: 0.5 2")
    return float(words)


def parse_on_oom(text: str) -> str:
    """Return the text of a policy for running out of memory, once it can be understood."""
    try:
        on_oom.parse_on_oom(str(text).strip())
    except ValueError as bad:
        raise BadRequest(f"--on-oom: {bad}", on_oom.EXAMPLES) from bad
    return str(text).strip()


def parse_signal(text: str | int) -> int:
    """Return the number of `TERM`, `SIGUSR1` or `10`."""
    words = str(text).strip().upper()
    if re.fullmatch(r"[0-9]{1,2}", words) and 1 <= int(words) <= 64:
        return int(words)
    names = {name: number for number in signal.Signals for name in (number.name,)}
    found = names.get(words) or names.get(f"SIG{words}")
    if found is None:
        short = [name.removeprefix("SIG") for name in names]
        hint = nearest(words.removeprefix("SIG"), short) or "examples: TERM USR1 10"
        raise BadRequest(f"no such signal: {told(text)}", hint)
    return int(found)


def parse_command(text: str) -> tuple[str, ...]:
    """Return the words of a command as a shell splits them."""
    import shlex  # noqa: PLC0415 (for few verbs only)

    try:
        words = tuple(shlex.split(text))
    except ValueError as bad:
        raise BadRequest(f"not a command: {told(text)}: {str(bad).lower()}") from bad
    if not words:
        raise BadRequest(f"no command in {told(text)}")
    return words


def parse_exit_map(text: str | dict[str, object]) -> dict[str, str]:
    """Return {"3": "retry", ...} of `3=retry,65=fail,10-12=transient`."""
    pairs = (
        [(key, str(value)) for key, value in text.items()]
        if isinstance(text, dict)
        else [part.partition("=")[::2] for part in str(text).split(",")]
    )
    found: dict[str, str] = {}
    for key, value in pairs:
        codes = re.fullmatch(r"\s*([0-9]{1,3})(?:-([0-9]{1,3}))?\s*", key)
        if codes is None or value not in ON_EXIT or int(codes[2] or codes[1]) > 255:
            hint = f"examples: 3=retry,65=fail; meanings: {', '.join(ON_EXIT)}"
            raise BadRequest(f"not an exit map: {told(f'{key}={value}')}", hint)
        for code in range(int(codes[1]), int(codes[2] or codes[1]) + 1):
            found[str(code)] = value
    return found


def parse_backoff(text: str | float) -> tuple[float, float | None]:
    """Return (first delay, cap) in seconds of `5s..10m`; without a cap None stands for it."""
    first, dots, cap = str(text).partition("..")
    return parse_duration(first), parse_duration(cap) if dots else None


def parse_pairs(words: Iterable[str], what: str) -> dict[str, str]:
    """Return the dict of many `K=V`; only of variables may a later one win over an earlier."""
    pairs: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise BadRequest(f"not a {what}: {told(word)}", "write it as KEY=VALUE")
        if what != "variable" and pairs.get(key, value) != value:
            raise twice(f"the {what} {key}", pairs[key], value)
        pairs[key] = value
    return pairs


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError, also for NaN and what is too deep."""
    import json  # noqa: PLC0415 (for few verbs only)

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
    except RecursionError as bad:
        raise ValueError("nested too deeply") from bad
    return value


def duration_text(seconds: float) -> str:
    """Return `13ms`, `0.4s`, `12s`, `2m10s`, `3h05m`, `2d04h`: two units, never more."""
    if seconds < 0.0995:
        return f"{max(0, round(seconds * 1000))}ms"
    if seconds < 0.95:
        return f"{seconds:.1f}s"
    total = round(seconds)
    for over_s, big, small, letters in (
        (86_400, 86_400, 3600, "dh"),
        (3600, 3600, 60, "hm"),
        (60, 60, 1, "ms"),
    ):
        if total >= over_s:
            return f"{total // big}{letters[0]}{total % big // small:02d}{letters[1]}"
    return f"{total}s"


def age_text(seconds: float) -> str:
    """Return one unit alone: `12s`, `3m`, `5h`, `4d`."""
    total = max(0, int(seconds))
    for over_s, letter in ((2 * 86_400, "d"), (3600, "h"), (60, "m")):
        if total >= over_s:
            return f"{total // (86_400 if letter == 'd' else over_s)}{letter}"
    return f"{total}s"


def size_text(count: float) -> str:
    """Return `412 B`, `1.9 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def number_text(value: float) -> str:
    """Return `1,234,567`, or three digits after the point where there is a fraction."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3f}"


def rfc3339(at_ns: int) -> str | None:
    """Return `2026-11-20T17:00:00.250000Z`, or None for 0."""
    if not at_ns:
        return None
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at_ns // SECOND_NS))
    return f"{whole}.{at_ns % SECOND_NS // 1000:06d}Z"


def clock_text(at_ns: int, *, utc: bool = False) -> str:
    """Return `2026-11-20 18:00:03` in local time (or UTC, marked Z), "" for 0."""
    if not at_ns:
        return ""
    parts = (time.gmtime if utc else time.localtime)(at_ns // SECOND_NS)
    return time.strftime("%Y-%m-%d %H:%M:%S", parts) + ("Z" if utc else "")


def signal_name(number: int) -> str:
    """Return `SIGTERM` for 15; numbers without a name stay numbers."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
