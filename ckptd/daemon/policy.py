"""From the configuration to what `core` works with: its knobs, and its groups."""

import os
import resource
from collections.abc import Iterable

from ckptd.core.policy import Policy, Rules
from ckptd.core.records import GroupChanged
from ckptd.core.state import State
from ckptd.host.config import Config

UNLIMITED = 1 << 60
FOR_EVER_S = 1e9  # 30 years
DESCRIPTORS_PER_ATTEMPT = 4  # supervisor's socket, notify socket, and what reading files takes
DESCRIPTORS_KEPT = 1_024  # for clients, the log and what the libraries open


def policy_of(config: Config) -> Policy:
    """Return the policy that a configuration means on this machine."""
    return Policy(
        retries=config.task.retries,
        backoff_s=config.retry.backoff_s,
        backoff_max_s=config.retry.backoff_max_s,
        transient_backoff_s=config.retry.transient_backoff_s,
        transient_backoff_max_s=config.retry.transient_backoff_max_s,
        grace_s=config.task.grace_s,
        timeout_s=config.task.timeout_s,
        journal=config.task.journal,
        ask_s=config.task.ask_s,
        on_oom=config.task.on_oom,
        stalls_max=config.retry.stalls_max,
        crashes_max=config.retry.crashes_max,
        host_deaths_max=config.retry.host_deaths_max,
        interruptions_max=config.retry.interruptions_max,
        attempts_max=config.retry.attempts_max,
        finished_max=config.retention.finished_max or UNLIMITED,
        finished_age_s=config.retention.age_s or FOR_EVER_S,
        checkpoints_age_s=config.retention.checkpoints_age_s or FOR_EVER_S,
        slots=len(os.sched_getaffinity(0)),
        active_max=_active_max(),
        rules=Rules(
            read=config.access.read,
            submit=config.access.submit,
            admin=config.access.admin,
            root_tasks=config.access.root_tasks,
            submit_as=config.access.submit_as,
        ),
        runs_as=os.geteuid() or -1,
    )


def group_changes(config: Config, state: State) -> list[GroupChanged]:
    """Return what the configuration changes of the groups; what a person has set stays."""
    changes = []
    for name, wanted in config.groups.items():
        known = state.groups.get(name)
        if known is None or (not known.by_person and known.parallel != wanted.parallel):
            paused = known.paused if known is not None else False
            changes.append(GroupChanged(name, wanted.parallel, paused))
    return changes


def kept_groups(config: Config, state: State, keys: Iterable[str]) -> tuple[str, ...]:
    """Return those of the changed keys whose group stays as it is.

    It is no longer in the file, which removes none, or a person has set it.
    """
    kept = []
    for key in keys:
        table, _, name = key.partition(".")
        known = state.groups.get(name) if table == "groups" else None
        wanted = config.groups.get(name)
        if known is not None and (wanted is None or wanted.parallel != known.parallel):
            kept.append(key)
    return tuple(kept)


def _active_max() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # the server raises the soft limit to it
    if hard == resource.RLIM_INFINITY:
        hard = 1 << 20
    return (hard - min(DESCRIPTORS_KEPT, hard // 2)) // DESCRIPTORS_PER_ATTEMPT
