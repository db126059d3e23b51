"""The knobs that decisions depend on, and the moment they are taken at. Values only.

`host/config.py` makes a Policy from the configuration, `host/clock.py` makes a Now once a turn.
"""

import msgspec


class Rules(msgspec.Struct, frozen=True, gc=False):
    """Which groups have which role ("*": whoever may connect), and as whom root's tasks may run."""

    read: tuple[str, ...] = ()
    submit: tuple[str, ...] = ("*",)
    admin: tuple[str, ...] = ()
    root_tasks: bool = True  # root may submit tasks that run as root
    submit_as: bool = False  # root may submit tasks that run as another user


class Policy(msgspec.Struct, frozen=True, gc=False):
    """Defaults for tasks that do not say otherwise, and the bounds of patience."""

    retries: int = -1  # -1: after a failure go on for as long as attempts make progress
    backoff_s: float = 1.0
    backoff_max_s: float = 900.0
    transient_backoff_s: float = 10.0
    transient_backoff_max_s: float = 900.0
    timeout_s: float = 0.0
    journal: bool = False  # output to journald, too
    grace_s: float = 10.0
    ask_s: float = 2.0  # for a checkpoint, before the stop signal, where a task makes them
    stalls_max: int = 3  # failures in a row without progress
    crashes_max: int = 2  # oom or crash deaths at the same cursor
    host_deaths_max: int = 2  # deaths together with daemon or host, without progress
    interruptions_max: int = 100
    attempts_max: int = 1_000
    retry_after_max_s: float = 86_400.0
    on_oom: str = "count"  # of a task that does not say; see ckptd/protocol/on_oom.py
    finished_max: int = 100_000
    finished_age_s: float = 30 * 86_400.0
    checkpoints_age_s: float = 86_400.0  # after success; those of other ends stay with the task
    slots: int = 1  # what `parallel = 0` stands for: processors
    starts_per_turn_max: int = 64  # so that one turn stays short
    active_max: int = 10_000  # attempts at once over all groups: descriptors are finite
    rules: Rules = Rules()
    runs_as: int = -1  # uid of a daemon that can run tasks as nobody else; -1: as who submits


class Now(msgspec.Struct, frozen=True, gc=False):
    """One turn's moment. `seed` is fresh randomness, the only source of jitter."""

    at_ns: int
    seed: int = 0


class Caller(msgspec.Struct, frozen=True, gc=False):
    """Who asks, by the kernel's word, and with which roles; what these allow is in `rights.py`."""

    uid: int
    gid: int
    admin: bool
    reads: bool = False
    submits: bool = True
    accounts: dict[int, int] = {}
    """uid -> primary gid, by the user database, of those whom the request names beside the caller;
    unknown ones are missing."""
