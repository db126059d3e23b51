"""What a run of lives must have seen to count as one: a daemon that does nothing breaks nothing.

The means are those of seeds 1 to 120. What happens in nearly every life must add up to a quarter of
them; faults have whole lives without them, so theirs is a sixth, and only behind the first 30
lives: by chance a run falls below less than once in ten thousand.
"""

from collections.abc import Mapping

WORK = {
    "accepted": 18.6, "attempts": 20.5, "recoveries": 2.2, "checks": 220.0, "task_death": 3.8,
    "steered": 9.2,
}  # fmt: skip
FAULTS = {
    "kill": 0.51, "power": 0.57, "in_recovery": 0.43, "gave_up": 0.67, "disk_errors": 0.91,
    "eio_write": 0.2, "eio_sync": 0.27, "eio_sync_dir": 0.26, "stall": 0.18, "enospc": 1.6,
    "jump": 2.0, "sigterm": 0.35, "shim_death": 0.63, "oom": 0.38, "messages_lost": 6.9,
    "messages_doubled": 10.3, "messages_late": 1.6, "examined": 35.6,
}  # fmt: skip
"""How often each happens in a life, on average."""
_WORK_FREE, _WORK_SHARE = 5, 1 / 4
_FAULTS_FREE, _FAULTS_SHARE = 30, 1 / 6
_DISK_ERRORS = ("eio_write", "eio_sync", "eio_sync_dir", "stall")


def least(lives: int) -> dict[str, int]:
    """Return how often each must have happened in so many lives; one life must be lived."""
    work = max(0, lives - _WORK_FREE) * _WORK_SHARE
    faults = max(0, lives - _FAULTS_FREE) * _FAULTS_SHARE
    return {
        "lives": 1,
        **{name: int(mean * work) for name, mean in WORK.items()},
        **{name: int(mean * faults) for name, mean in FAULTS.items()},
    }


def lacking(counts: Mapping[str, int]) -> list[str]:
    """Return in words what happened too seldom for the lives that were lived."""
    found = {**counts, "disk_errors": sum(counts.get(name, 0) for name in _DISK_ERRORS)}
    return [
        f"{found.get(name, 0)} {name}, {wanted} at least were to be expected"
        for name, wanted in least(counts.get("lives", 0)).items()
        if found.get(name, 0) < wanted
    ]
