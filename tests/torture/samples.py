"""How large the daemon and its directory are over time, and whether they grow.

The daemon is killed in most of a soak, so each cycle has a calm part, in which everybody else is
killed still: only there can a leak of the daemon itself add up. A calm soak has no other part: one
daemon lives through all of it, and through many snapshots.
"""

import os
import statistics
import time
from collections.abc import Iterator
from itertools import combinations, groupby
from operator import itemgetter
from typing import Any, Final, NamedTuple

from tests.torture.clients import Story
from tests.torture.stage import Stage

_EVERY_S: Final = 10.0
_CYCLE_S: Final = 600.0
_WILD_SHARE: Final = 0.5
_SAMPLES_MIN: Final = 12
_ANSWERS_KEPT: Final = 16_384
"""Until so many changes were answered the daemon remembers more of them. Source: PROTOCOL.md."""
_GROWTH_MAX: Final = 0.15
"""Of the median: what noise makes of a value that does not grow, over the last two thirds."""
_PEAK_MAX: Final = 1.5
"""Times the median: nothing that comes and goes is larger. As measured, 1.33 (segments)."""
_PARTS: Final = ("wild", "calm")
_SLACK: Final = {
    "rss_kb": 4096, "descriptors": 8, "threads": 1, "processes": 8, "bytes": 1 << 20,
}  # fmt: skip
_OF_PROCESS: Final = ("rss_kb", "descriptors", "threads")
_WATCHED: Final = (
    *_OF_PROCESS, "files", "bytes", "segments", "snapshots", "processes",
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
        sample |= {"pid": process.pid, "changes": self.stage.changes}
        try:
            sample |= _of_process(process.pid) | _of_state(str(self.stage.daemon.state))
        except (OSError, KeyError):  # it has ended meanwhile
            return
        sample["processes"] = sum(1 for _ in self.stage.processes())
        self.samples.append(sample)
        self.stage.note("samples", sample)


def growth(samples: list[dict[str, int]], seconds: float) -> Growth:
    """Return plateau, maximum and slope of all that is watched, over so many seconds.

    Over the last two thirds, from life to life; and within every life of the daemon that was long
    enough, since its own memory and descriptors begin anew with each: before its first snapshot,
    and after it, for it takes the pages for one once. What it remembers of answers is full by then,
    or that is waited for: until then it has to grow.
    """
    full = [one for one in samples if one["changes"] >= _ANSWERS_KEPT]
    late = samples[len(samples) // 3 :]
    late = min(late, full or late, key=len)
    spans = _spans(samples, late)
    figures: dict[str, Any] = {
        "samples": len(samples),
        "samples_judged": len(late),
        "lives_judged": len({span[0]["pid"] for span in spans}),
        "snapshots_seen": len({one["snapshot_lsn"] for one in samples} - {0}),
        "rss_kb_by_part": _medians(samples, "rss_kb"),
    }
    violations = list(_too_few(samples, figures["lives_judged"], seconds))
    for name in _WATCHED if late else ():
        figures[name] = found = _trend(late, name)
        violations += _judged(name, found, late)
        if name in _OF_PROCESS and spans:
            found["grown_in_a_life_max"] = max(_grown(span, name) for span in spans)
            violations += [text for span in spans for text in _judged_span(name, span)]
    return Growth(figures, violations)


def _too_few(samples: list[dict[str, int]], lives: int, seconds: float) -> Iterator[str]:
    """Without samples nothing is known."""
    if len(samples) < seconds / _EVERY_S / 2:
        yield f"only {len(samples)} samples in {seconds:.0f} s"
    if seconds >= 2 * _CYCLE_S and lives < seconds // _CYCLE_S // 2:
        yield f"only {lives} lives of the daemon were long enough to be judged"


def _judged(name: str, found: dict[str, float], late: list[dict[str, int]]) -> Iterator[str]:
    plateau = found["plateau"]
    grown = found["slope_per_1000_tasks"] * (late[-1]["tasks"] - late[0]["tasks"]) / 1000
    if len(late) >= _SAMPLES_MIN and grown > _allowed(name, plateau):
        yield f"{name} grew by {grown:.0f} over a plateau of {plateau}"
    if found["max"] > _PEAK_MAX * plateau + _SLACK.get(name, 0):
        yield f"{name} came to {found['max']} over a plateau of {plateau}"


def _judged_span(name: str, span: list[dict[str, int]]) -> Iterator[str]:
    grown, plateau = _grown(span, name), statistics.median(one[name] for one in span)
    if grown > _allowed(name, plateau):
        took_s = span[-1]["t_s"] - span[0]["t_s"]
        yield f"{name} grew by {grown:.0f} in one life of {took_s} s, around {plateau}"


def _allowed(name: str, plateau: float) -> float:
    return max(_GROWTH_MAX * plateau, _SLACK.get(name, 0))


def _spans(samples: list[dict[str, int]], late: list[dict[str, int]]) -> list[list[dict[str, int]]]:
    """Return what is late of each daemon's life before its first snapshot, and after it.

    Only what is long enough.
    """
    found: list[list[dict[str, int]]] = []
    for _, samples_of_life in groupby(samples, itemgetter("pid")):
        life = list(samples_of_life)
        before = [one for one in life if one["snapshot_lsn"] == life[0]["snapshot_lsn"]]
        found += [before, life[len(before) :]]
    since_s = late[0]["t_s"] if late else 0
    judged = ([one for one in span if one["t_s"] >= since_s] for span in found)
    return [span for span in judged if len(span) >= _SAMPLES_MIN]


def _grown(span: list[dict[str, int]], name: str) -> float:
    """Return what the last third of a span has more than the second: the first warms it up."""
    values = [one[name] for one in span]
    third = len(values) // 3
    return statistics.median(values[-third:]) - statistics.median(values[third:-third])


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
    """Count files and the bytes that they take on disk; they come and go while we look.

    Without the bytes of segments, which are counted by themselves, and of the one torn tail that
    is kept: whole ones come and go, and hide what grows beside them.
    """
    count = size = 0
    for folder, _, names in os.walk(place):
        for name in names:
            try:
                took_bytes = os.lstat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:
                continue
            count += 1
            size += 0 if os.path.basename(folder) == "wal" or ".wal.torn-" in name else took_bytes
    snapshots = sorted(name for name in os.listdir(f"{place}/snap") if name.endswith(".snap"))
    return {
        "files": count,
        "bytes": size,
        "segments": sum(name.endswith(".wal") for name in os.listdir(f"{place}/wal")),
        "snapshots": len(snapshots),
        "snapshot_lsn": int(snapshots[-1].partition(".")[0]) if snapshots else 0,
    }
