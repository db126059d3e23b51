"""From the configuration to the knobs of `core`."""

import os

from ckptd.core.policy import Policy
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
