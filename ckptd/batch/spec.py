"""What a batch is told to do: the spec of a submit, its config, and the digest of that.

    {"argv":["gzip","-k","{}"],"cwd":"/data","on_exit":{"2":"transient"},"timeout_s":60,"jobs":8,
     "items":{"from":"file","path":"list.txt","format":"lines"}}

Config is what a result depends on; a batch whose config changed must be told so. The rest are
knobs: they change how fast, how many and when, never what comes out. It reads no files.
Read next: `place.py` (where both are kept), `prepare.py`.
"""

import json
import os
import re
from hashlib import sha256
from typing import Any, Final, Literal, TypeVar

import msgspec

from ckptd.batch.refusal import Refused
from ckptd.sdk import rate

Format = Literal["lines", "jsonl", "csv", "null"]
Outcome = Literal["pass", "fail", "error", "skipped", "quarantined", "transient", "again"]
JOBS_MAX: Final = 256
RETRIES_MAX: Final = 1_000
_PYTHON: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
T = TypeVar("T", bound=msgspec.Struct)


class Source(msgspec.Struct, rename={"from_": "from"}, forbid_unknown_fields=True):
    """Where the items come from; `lines` are given in the spec itself."""

    from_: Literal["file", "stdin", "command", "lines"]
    path: str = ""
    argv: list[str] = []
    lines: list[Any] = []
    format: Format = "lines"
    key: str | None = None


class Config(msgspec.Struct, forbid_unknown_fields=True):
    """What a result depends on."""

    argv: list[str] = []
    python: str = ""
    cwd: str = ""
    format: Format = "lines"
    key: str | None = None
    on_exit: dict[str, Outcome] = {}
    timeout_s: float = 0.0
    capture: Literal["last", "all", "json", "none"] = "last"


class Knobs(msgspec.Struct, forbid_unknown_fields=True):
    """How fast, how many, when."""

    jobs: int = 0  # 0: as many as there are processors for us
    mode: Literal["", "process", "threads", "async"] = ""
    interpreter: str = ""
    retries: int = 0
    rate: str = ""
    scope: str = ""
    preflight: list[str] | str = []
    max_errors: str = ""
    limit: int = 0
    shuffle: bool = False
    seed: int | None = None
    park_after_s: float = 10.0
    grace_s: float = 10.0

    @property
    def workers(self) -> int:
        """Return how many items may be in flight at once."""
        return self.jobs or min(len(os.sched_getaffinity(0)), JOBS_MAX)


class Spec(msgspec.Struct):
    """A submit, taken apart: config and knobs as they hold now, the source if one was given."""

    config: Config
    knobs: Knobs
    source: Source | None


_OF_ITEMS: Final = ("format", "key")


def parse(given: Any, config: Config | None, knobs: Knobs | None) -> Spec:
    """Return what holds once `given` is laid over what was stored before.

    Raises:
        Refused: an unknown or unfit value, named.
    """
    if not isinstance(given, dict):
        raise Refused("the spec is a JSON object", "see `python -m ckptd.batch help`")
    rest = dict(given)
    source = _made(Source, rest.pop("items"), "items") if rest.get("items") else None
    rest.pop("items", None)
    of_config = {name: rest.pop(name) for name in Config.__struct_fields__ if name in rest}
    if source is not None:
        of_config |= {name: getattr(source, name) for name in _OF_ITEMS}
    if of_config.get("argv"):
        of_config.setdefault("python", "")
    if of_config.get("python"):
        of_config.setdefault("argv", [])
    if rest.get("jobs", 0) is None:
        del rest["jobs"]
    merged = Spec(
        _made(Config, _as_dict(config) | of_config, "the spec"),
        _made(Knobs, _as_dict(knobs) | rest, "the spec"),
        source,
    )
    _check_config(merged.config)
    _check_knobs(merged.knobs, merged.config)
    return merged


def _as_dict(held: msgspec.Struct | None) -> dict[str, Any]:
    return {} if held is None else dict(msgspec.to_builtins(held))


def _made(kind: type[T], value: Any, what: str) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as bad:
        raise Refused(f"{what}: {bad}") from bad


def _check_config(config: Config) -> None:
    if bool(config.argv) == bool(config.python):
        raise Refused(
            "a batch runs either a command or a function",
            "give a command after `--`, or --python module:function",
        )
    if config.python and not _PYTHON.fullmatch(config.python):
        raise Refused(f"--python is written module:function, not {config.python!r}")
    for code in config.on_exit:
        if not (code.isascii() and code.isdigit() and 0 <= int(code) <= 255):
            raise Refused(f"--on-exit: {code!r} is no exit code; they are 0 to 255")
    if not 0 <= config.timeout_s <= 366 * 86_400:
        raise Refused(f"--item-timeout: {config.timeout_s} s is out of range")


def _check_knobs(knobs: Knobs, config: Config) -> None:
    if not 0 <= knobs.jobs <= JOBS_MAX:
        raise Refused(f"-j {knobs.jobs} is out of range; 1 to {JOBS_MAX}")
    if knobs.mode and config.argv:
        raise Refused(f"--mode {knobs.mode} is for functions; commands are processes")
    if not 0 <= knobs.retries <= RETRIES_MAX:
        raise Refused(f"--item-retries {knobs.retries} is out of range; 0 to {RETRIES_MAX}")
    if knobs.limit < 0:
        raise Refused(f"--limit {knobs.limit} is below zero")
    parse_rate(knobs.rate)
    parse_max_errors(knobs.max_errors)
    scope_fits = knobs.scope.isascii() and len(knobs.scope) <= 100 and "/" not in knobs.scope
    if not scope_fits or knobs.scope.startswith("."):
        raise Refused(f"--scope {knobs.scope!r}: a name of up to 100 characters without slashes")
    is_function = isinstance(knobs.preflight, str) and bool(knobs.preflight)
    if is_function and not _PYTHON.fullmatch(str(knobs.preflight)):
        raise Refused(
            f"preflight {knobs.preflight!r}: as one text it is module:function",
            'a command is a list of words: ["curl","-fsS","URL"]',
        )


def parse_rate(text: str) -> float:
    """Return items per second; 0 where there is no limit."""
    try:
        return rate.parse_rate(text) if text else 0.0
    except ValueError as error:
        raise Refused(f"--rate {error}") from error


def parse_max_errors(text: str) -> tuple[float, bool]:
    """Return (number, is_percent) of `5` or `10%`; a negative number where there is no limit."""
    if not text:
        return -1.0, False
    digits = text.removesuffix("%")
    try:
        number = float(digits) if text.endswith("%") else int(digits)
    except ValueError:
        number = -1
    if not 0 <= number <= (100 if text.endswith("%") else 10**9):
        raise Refused(f"--max-errors {text!r} is neither a count nor a share", "examples: 5, 10%")
    return float(number), text.endswith("%")


def digest(config: Config) -> str:
    """Return the identity of a config."""
    canonical = json.dumps(msgspec.to_builtins(config), sort_keys=True, separators=(",", ":"))
    return sha256(canonical.encode()).hexdigest()


def diff(old: Config, new: Config) -> list[str]:
    """Return what changed, two lines a member: `- cwd: "/a"`, `+ cwd: "/b"`."""
    lines: list[str] = []
    for name in Config.__struct_fields__:
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            shown = [json.dumps(value, ensure_ascii=False) for value in (before, after)]
            lines += [f"- {name}: {shown[0]}", f"+ {name}: {shown[1]}"]
    return lines
