"""The configuration: one frozen struct per table, read from TOML, strict and bounded.

A missing default file means defaults; anything that is there must be right: an unknown key, a
wrong type or a value out of range is refused with file, line, key, value and what is allowed.
`LIVE` marks what a reload can change. Every key is explained in `etc/ckptd.toml`.
Read next: `etc/ckptd.toml`, `config_check.py`.
"""

import os
import sys
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from ckptd import streams
from ckptd.host import paths
from ckptd.protocol import limits
from ckptd.protocol.errors import BadConfig, BadRequest
from ckptd.protocol.messages import GroupName
from ckptd.protocol.on_oom import EXAMPLES, parse_on_oom

LIVE: Final = Meta(extra={"live": True})
"""Marks a field that takes effect at a reload; all others need a restart."""

Path = Annotated[str, Meta(pattern=r"^(/.*)?\Z", max_length=4096)]
Seconds = Annotated[float, Meta(ge=0, le=366 * 86_400), LIVE]
Count = Annotated[int, Meta(ge=1, le=1_000_000), LIVE]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all tables."""


class Daemon(Table, frozen=True):
    """[daemon]: where things are, what runs the tasks, and how much is said."""

    state_dir: Path = ""
    run_dir: Path = ""
    runner: Literal["auto", "unit", "fork"] = "auto"
    log_level: Annotated[Literal["error", "warning", "info", "debug"], LIVE] = "info"


class Ipc(Table, frozen=True):
    """[ipc]: the control socket."""

    mode: Annotated[str, Meta(pattern=r"^0[0-7]{3}\Z")] = "0660"
    group: Annotated[str, Meta(max_length=64)] = "ckptd"
    connections_per_uid: Annotated[int, Meta(ge=4, le=4_096)] = 256
    hold_s: Annotated[float, Meta(ge=0, le=limits.HOLD_S_MAX), LIVE] = limits.HOLD_S_MAX


GroupNames = Annotated[
    tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...], Meta(max_length=100), LIVE
]


class Access(Table, frozen=True):
    """[access]: which groups may do what; who may connect at all is [ipc]'s."""

    read: GroupNames = ()
    submit: GroupNames = ("*",)
    admin: GroupNames = ()
    root_tasks: Annotated[bool, LIVE] = True
    submit_as: Annotated[bool, LIVE] = False


class Wal(Table, frozen=True):
    """[wal]: the write-ahead log."""

    segment_bytes: Annotated[int, Meta(ge=8 << 20, le=1 << 30)] = 16 << 20
    idle_mark_ms: Annotated[int, Meta(ge=1, le=60_000), LIVE] = 100
    snapshot_every_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 40), LIVE] = 64 << 20


class Task(Table, frozen=True):
    """[task]: what a submit that says nothing about it gets."""

    retries: Annotated[int, Meta(ge=-1, le=1_000_000), LIVE] = -1
    timeout_s: Seconds = 0.0
    ask_s: Seconds = 2.0
    grace_s: Seconds = 10.0
    on_oom: Annotated[str, Meta(max_length=64), LIVE] = "count"
    journal: Annotated[bool, LIVE] = False
    journal_lines_per_s: Annotated[int, Meta(ge=1, le=50_000), LIVE] = 1_000


class Retry(Table, frozen=True):
    """[retry]: how long to wait before the next attempt, and when to stop trying."""

    backoff_s: Seconds = 1.0
    backoff_max_s: Seconds = 900.0
    transient_backoff_s: Seconds = 10.0
    transient_backoff_max_s: Seconds = 900.0
    stalls_max: Count = 3
    crashes_max: Count = 2
    host_deaths_max: Count = 2
    interruptions_max: Count = 100
    attempts_max: Count = 1_000


class Retention(Table, frozen=True):
    """[retention]: how long ended tasks are remembered, and what they saved is kept."""

    finished_max: Annotated[int, Meta(ge=0, le=100_000_000), LIVE] = 100_000
    age_s: Annotated[float, Meta(ge=0, le=100 * 366 * 86_400), LIVE] = 30 * 86_400.0
    checkpoints_age_s: Annotated[float, Meta(ge=0, le=100 * 366 * 86_400), LIVE] = 86_400.0


class Group(Table, frozen=True):
    """[groups.NAME]: how many tasks of a group run at once."""

    parallel: Annotated[int, Meta(ge=0, le=limits.PARALLEL_MAX), LIVE] = 0


class Config(Table, frozen=True):
    """The whole file. Invariant: `groups` always holds "default"."""

    daemon: Daemon = Daemon()
    ipc: Ipc = Ipc()
    access: Access = Access()
    wal: Wal = Wal()
    task: Task = Task()
    retry: Retry = Retry()
    retention: Retention = Retention()
    groups: dict[GroupName, Group] = msgspec.field(default_factory=lambda: {"default": Group()})


def find(path: str | None) -> str:
    """Return the file that `load` reads: `path` itself, else the default one, "" if not there.

    Raises BadRequest for an empty name: the usual file may be about another store.
    """
    if path == "":
        raise BadRequest(
            "the name of the configuration file is empty",
            "name one, or leave --config out for the usual one",
        )
    if path is not None:
        return path
    default = paths.default_config(os.geteuid(), os.environ)
    return default if os.path.exists(default) else ""


def load(path: str | None) -> Config:
    """Return the configuration of `path` (None: of the default file, or defaults).

    Raises BadConfig with every problem of the file, one a line; nothing is half applied.
    Raises BadRequest for an empty name.
    """
    found = find(path)
    if not found:
        return Config()
    try:
        with open(found, "rb") as file:
            text = file.read().decode()
    except (OSError, UnicodeDecodeError) as bad:
        why = getattr(bad, "strerror", None) or bad
        raise BadConfig(f"cannot read configuration {found}: {why}") from bad
    from ckptd.host.config_check import read_table  # noqa: PLC0415 - 2 MB, only for a file

    tables = read_table(found, text, Config)
    tables["groups"] = {"default": {}} | tables.get("groups", {})
    config = msgspec.convert(tables, Config)
    _check_pairs(found, config)
    _check_on_oom(found, config.task.on_oom)
    paths.check_run(config.daemon.run_dir, f"{found}: ")
    return config


def _check_on_oom(path: str, text: str) -> None:
    try:
        parse_on_oom(text)
    except ValueError as bad:
        raise BadConfig(f"{path}: task.on_oom: {bad}", EXAMPLES) from bad


def _check_pairs(path: str, config: Config) -> None:
    """Refuse values that are fine alone and senseless together."""
    retry = config.retry
    for low, high, floor, cap in (
        ("retry.backoff_s", "retry.backoff_max_s", retry.backoff_s, retry.backoff_max_s),
        (
            "retry.transient_backoff_s",
            "retry.transient_backoff_max_s",
            retry.transient_backoff_s,
            retry.transient_backoff_max_s,
        ),
    ):
        if floor > cap:
            raise BadConfig(
                f"{path}: {low} is {floor:g} s, more than {high} of {cap:g} s",
                f"raise {high} or lower {low}",
            )


def as_toml(config: Config) -> str:
    """Return the configuration in force as a file that `load` reads back."""
    import tomli_w  # noqa: PLC0415 - only `config show` needs it

    return tomli_w.dumps(msgspec.to_builtins(config))


def live_changes(old: Config, new: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the dotted keys that differ: those that take effect now, those after a restart."""
    applied: list[str] = []
    waiting: list[str] = []
    _compare("", old, new, (applied, waiting))
    return tuple(applied), tuple(waiting)


def keep_fixed(old: Config, new: Config) -> Config:
    """Return what is in force after a reload: `new`, but `old` where a restart is needed."""
    return msgspec.convert(_merged(old, new), Config)


def _merged(old: Table, new: Table) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for field in msgspec.structs.fields(new):
        was, becomes = getattr(old, field.name), getattr(new, field.name)
        if isinstance(was, Table):
            merged[field.name] = _merged(was, becomes)
        elif field.name == "groups" or _is_live(field.type):
            merged[field.name] = msgspec.to_builtins(becomes)
        else:
            merged[field.name] = was
    return merged


def _compare(prefix: str, old: Table, new: Table, found: tuple[list[str], list[str]]) -> None:
    for field in msgspec.structs.fields(new):
        key = f"{prefix}{field.name}"
        was, becomes = getattr(old, field.name), getattr(new, field.name)
        if was == becomes:
            continue
        if isinstance(was, Table):
            _compare(f"{key}.", was, becomes, found)
        elif isinstance(was, dict):
            names = sorted({name for name, _ in was.items() ^ becomes.items()})
            found[0].extend(f"{key}.{name}" for name in names)
        else:
            found[0 if _is_live(field.type) else 1].append(key)


def _is_live(kind: Any) -> bool:
    marks = getattr(kind, "__metadata__", ())
    return any(isinstance(mark, Meta) and (mark.extra or {}).get("live") for mark in marks)


def main(argv: list[str]) -> int:
    """Run `check FILE` (say what is wrong) or `show [FILE]` (print the values in force)."""
    path: str | None
    match argv:
        case ["check", path]:
            show = False
        case ["show"]:
            path, show = None, True
        case ["show", path]:
            show = True
        case _:
            print("usage: python -m ckptd.host.config check FILE | show [FILE]", file=sys.stderr)
            return 64
    try:
        config = load(path)
    except (BadConfig, BadRequest) as bad:
        hint = f"\n  hint: {bad.hint}" if bad.hint else ""
        print(f"{bad.message}{hint}", file=sys.stderr)
        return bad.exit_code
    print(as_toml(config) if show else f"{path}: ok")
    return 0


if __name__ == "__main__":
    sys.exit(streams.run(lambda: main(sys.argv[1:]), "ckptctl config"))
