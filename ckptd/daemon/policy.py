"""From the configuration to what `core` works with: its knobs, and its groups."""

import os

from ckptd.core.policy import Policy
from ckptd.core.records import GroupChanged
from ckptd.core.state import State
from ckptd.daemon.config import Config

UNLIMITED = 1 << 60
FOR_EVER_S = 1e9  # 30 years


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
        ask_s=config.task.ask_s,
        stalls_max=config.retry.stalls_max,
        crashes_max=config.retry.crashes_max,
        host_deaths_max=config.retry.host_deaths_max,
        interruptions_max=config.retry.interruptions_max,
        attempts_max=config.retry.attempts_max,
        finished_max=config.retention.finished_max or UNLIMITED,
        finished_age_s=config.retention.age_s or FOR_EVER_S,
        slots=len(os.sched_getaffinity(0)),
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
