"""What may go wrong in one life, drawn from its seed: kinds, chances, and how hard."""

import random
from dataclasses import dataclass

from tests.sim.network import Weather


class Blow(BaseException):
    """The daemon is no more: no `except Exception` in it may stop this."""


class Killed(Blow):
    """SIGKILL: the page cache and the tasks live on."""


class PowerCut(Blow):
    """The machine is off: what was not synced is there, or not, sector by sector."""


KINDS = (
    "kill", "power", "eio_write", "eio_sync", "eio_sync_dir", "enospc", "stall", "jump",
    "shim_death", "task_death", "message", "reboot_idle", "sigterm",
)  # fmt: skip


@dataclass
class Climate:
    """How one life is: drawn once, so that each seed stresses something else."""

    busy_s: float  # of simulated time with faults
    people: int
    acts: int  # of each of them at most
    pause_s: float
    segment_bytes: int
    snapshot_every_bytes: int
    finished_max: int  # ended tasks that are remembered
    checkpoints_age_s: float  # after success
    reign_edges: int  # how long a reign lasts at most, where it is cut short
    cut_short: float  # chance for that
    power: float  # of blows that are power cuts
    keep: float  # of unsynced things that survive one; -1: drawn each time
    weather: Weather
    delay_s: float  # of orders and sightings
    looks: float  # chance for each operation of the disk that its crash states are looked at
    trouble_s: float  # between two troubles of the machine, on average
    kinds: tuple[str, ...]


def draw(dice: random.Random) -> Climate:
    """Return the climate of one life."""
    rough = dice.random() < 0.7
    weather = Weather(
        loss=dice.choice([0.0, 0.02, 0.2]) if rough else 0.0,
        double=dice.choice([0.0, 0.05, 0.3]) if rough else 0.0,
        delay_s=dice.choice([0.0005, 0.01, 0.5]),
        late=dice.choice([0.0, 0.05]) if rough else 0.0,
    )
    kinds = [kind for kind in KINDS if dice.random() < 0.6]
    return Climate(
        busy_s=dice.choice([20, 60, 120]),
        people=dice.randint(1, 4),
        acts=dice.choice([8, 20, 50]),
        pause_s=dice.choice([0.05, 0.5, 3.0]),
        segment_bytes=dice.choice([16 << 10, 16 << 10, 32 << 10]),
        snapshot_every_bytes=dice.choice([4 << 10, 16 << 10, 64 << 10]),
        finished_max=dice.choice([100_000, 100_000, 3]),
        checkpoints_age_s=dice.choice([86_400.0, 86_400.0, 5.0]),
        reign_edges=dice.choice([12, 60, 300, 1_000]),
        cut_short=dice.choice([0.3, 0.8, 0.95]),
        power=dice.choice([0.0, 0.5, 1.0]),
        keep=dice.choice([-1.0, -1.0, 0.0, 0.5, 1.0]),
        weather=weather,
        delay_s=dice.choice([0.001, 0.05, 1.0]),
        looks=dice.choice([0.0, 0.0, 0.01, 0.1]),
        trouble_s=dice.choice([1.0, 5.0, 20.0]),
        kinds=tuple(kinds),
    )
