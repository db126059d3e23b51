"""How large the daemon and its directory are over time, and whether they grow.

The daemon is killed in most of a soak, so each cycle has a calm part, in which everybody else is
killed still: only there can a leak of the daemon itself add up. A calm soak has no other part: one
daemon lives through all of it, and through many snapshots.
"""

import os
import statistics
import time
from itertools import combinations, groupby
from typing import Any, Final, NamedTuple

from tests.torture.clients import Story
from tests.torture.stage import Stage

_EVERY_S: Final = 10.0
_CYCLE_S: Final = 600.0
_WILD_SHARE: Final = 0.5
_SAMPLES_MIN: Final = 12
_GROWTH_MAX: Final = 0.15
"""Of the median: what noise makes of a value that does not grow, over the last two thirds."""
_PARTS: Final = ("wild", "calm")
_SLACK: Final = {"rss_kb": 4096, "descriptors": 8, "threads": 1, "processes": 8}
_WATCHED: Final = (
    "rss_kb", "descriptors", "threads", "files", "bytes", "segments", "snapshots", "processes",
)  # fmt: skip


class Growth(NamedTuple):
    """Figures, and what grew without end."""

    figures: dict[str, Any]
    violations: list[str]


class Sampler:
    """Looks every ten seconds."""

    def __init__(self, stage: Stage, story: Story, *, is_calm: bool = False) -> None:
        """`is_calm`: the daemon is left alone all the time."""
        self.stage, self.story = stage, story
        self._wild_s = 0.0 if is_calm else _CYCLE_S * _WILD_SHARE
        self.began = time.monotonic()
        self.samples: list[dict[str, int]] = []
        self._next = 0.0

    def is_calm(self) -> bool:
        """Tell whether the daemon is to be left alone now."""
        return self._age() % _CYCLE_S >= self._wild_s

    def _age(self) -> float:
        return time.monotonic() - self.began

    def sample_if_due(self) -> None:
        """Take a sample where the last one is ten seconds old."""
        if self._age() < self._next:
            return
        self._next = self._age() + _EVERY_S
        process = self.stage.daemon.process
        if process is None:
            return
        sample = {"t_s": int(self._age()), "tasks": self.story.ended, "calm": int(self.is_calm())}
        try:
            sample |= _of_process(process.pid) | _of_state(str(self.stage.daemon.state))
        except (OSError, KeyError):  # it has ended meanwhile
            return
        sample["processes"] = sum(1 for _ in self.stage.processes())
        self.samples.append(sample)
        self.stage.note("samples", sample)

    def growth(self) -> Growth:
        """Return plateau, maximum and slope of all that is watched."""
        late = self.samples[len(self.samples) // 3 :]
        figures: dict[str, Any] = {
            "samples": len(self.samples),
            "snapshots_seen": len({one["snapshot_lsn"] for one in self.samples} - {0}),
            "rss_kb_by_part": _medians(self.samples, "rss_kb"),
        }
        violations = []
        for name in _WATCHED if late else ():
            found = _trend(late, name)
            figures[name] = found
            grown = found["slope_per_1000_tasks"] * (late[-1]["tasks"] - late[0]["tasks"]) / 1000
            allowed = max(_GROWTH_MAX * found["plateau"], _SLACK.get(name, 0))
            if len(late) >= _SAMPLES_MIN and grown > allowed:
                violations.append(
                    f"{name} grew by {grown:.0f} over a plateau of {found['plateau']}"
                )
        return Growth(figures, violations)


def _trend(samples: list[dict[str, int]], name: str) -> dict[str, float]:
    values = [one[name] for one in samples]
    return {
        "plateau": statistics.median(values),
        "max": max(values),
        "slope_per_1000_tasks": round(1000 * slope(*_parts(samples, name)), 3),
    }


def _medians(samples: list[dict[str, int]], name: str) -> list[tuple[str, float]]:
    """Return the median of each part of each cycle, in order."""
    parts = groupby(samples, lambda one: (one["t_s"] // int(_CYCLE_S), one["calm"]))
    return [
        (_PARTS[calm], statistics.median(one[name] for one in part)) for (_, calm), part in parts
    ]


def _parts(samples: list[dict[str, int]], name: str) -> list[list[tuple[int, int]]]:
    """Return (tasks, value) of the wild parts and of the calm ones: a long life holds more."""
    return [[(s["tasks"], s[name]) for s in samples if s["calm"] == calm] for calm in (0, 1)]


def slope(*parts: list[tuple[int, int]]) -> float:
    """Return the median of the slopes between all pairs of points of one part.

    Source: Theil and Sen; robust to 29 %.
    """
    pairs = (pair for part in parts for pair in combinations(part, 2))
    found = [(b - y) / (a - x) for (x, y), (a, b) in pairs if a != x]
    return statistics.median(found) if found else 0.0


def _of_process(pid: int) -> dict[str, int]:
    with open(f"/proc/{pid}/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return {
        "rss_kb": int(lines["VmRSS"].split()[0]),
        "threads": int(lines["Threads"]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
    }


def _of_state(place: str) -> dict[str, int]:
    """Count files and the bytes that they take on disk; they come and go while we look."""
    count = size = 0
    for folder, _, names in os.walk(place):
        for name in names:
            try:
                size += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:
                continue
            count += 1
    snapshots = sorted(name for name in os.listdir(f"{place}/snap") if name.endswith(".snap"))
    return {
        "files": count,
        "bytes": size,
        "segments": sum(name.endswith(".wal") for name in os.listdir(f"{place}/wal")),
        "snapshots": len(snapshots),
        "snapshot_lsn": int(snapshots[-1].partition(".")[0]) if snapshots else 0,
    }
