"""`make fuzz`: every target under the coverage-guided engine, one after another.

    python -m tests.fuzz --target journal --seconds 60 --seed 7
    python -m tests.fuzz --keep          what reaches further joins the kept corpus
    python -m tests.fuzz --replay FILE --target journal

Exit code 1: something was found; its input is in build/fuzz and the line that repeats it is said.
Exit code 2: a target could not run, or its corpus could not be merged.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests import figures
from tests.fuzz.chance import hunt
from tests.fuzz.every import CORPUS, ROOT, TARGETS, kept, tidy
from tests.fuzz.target import Target

BUILD = ROOT / "build" / "fuzz"
INPUT_S_MAX = 10
START_S_MAX = 600  # to be instrumented and to read the corpus, on a machine that is busy
RSS_MIB_MAX = 192  # three times what a target takes: what grows with the inputs passes it
KEPT_BYTES_MAX = 2_048  # longer inputs reach little more, and a repository keeps them for ever
_COVERED = re.compile(r"cov: (\d+) ft: (\d+)")
_STAT = re.compile(r"stat::(\w+):\s+(\d+)")


def main() -> int:
    """Run what was asked for; return 1 where something was found."""
    asked = _asked()
    targets = [TARGETS[name] for name in asked.target] or list(TARGETS.values())
    if asked.replay:
        targets[0].run(Path(asked.replay).read_bytes())
        return 0
    figures.begin("fuzz")
    is_guided = importlib.util.find_spec("atheris") is not None
    if not is_guided:
        print("fuzz: no atheris for this Python; by chance alone, without coverage")
    run = _guided if is_guided else _by_chance
    rows = {}
    shares_s = shared_s(targets, asked.seconds)
    for target in targets:
        seconds = shares_s[target.name]
        rows[target.name] = row = {"seconds": seconds, **run(target, asked.seed, seconds)}
        print(f"{target.name:12} {row['executions']:9,} inputs  {row['finds']} finds  {row}")
        if asked.keep and is_guided and not row["finds"]:
            _keep(target)
    tidy()
    finds = sum(row["finds"] for row in rows.values())
    figures.write("fuzz", summed(rows, asked.seed), command=_command(asked))
    return 1 if finds else 0


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", action="append", default=[], choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=10, help="of a target, on average")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", action="store_true", help="grow the kept corpus")
    parser.add_argument("--replay", metavar="FILE", help="run one input alone")
    return parser.parse_args()


def _command(asked: argparse.Namespace) -> str:
    """Return the line that does the same again."""
    some = "".join(f" --target {name}" for name in asked.target)
    return f"python -m tests.fuzz{some} --seconds {asked.seconds} --seed {asked.seed}"


def shared_s(targets: list[Target], seconds: int) -> dict[str, int]:
    """Return the seconds of each target, by their weights; on average they have `seconds`."""
    each = seconds * len(targets) / sum(target.weight for target in targets)
    return {target.name: max(1, round(each * target.weight)) for target in targets}


def summed(rows: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return the figures of a run; `inputs_min` are those of the target that got the fewest."""
    fewest = min(rows, key=lambda name: rows[name]["executions"])
    return {
        "seed": seed,
        "executions": sum(row["executions"] for row in rows.values()),
        "inputs_min": rows[fewest]["executions"],
        "inputs_min_target": fewest,
        "finds": sum(row["finds"] for row in rows.values()),
        "kept_inputs": sum(len(kept(TARGETS[name])) for name in rows),
        "targets": rows,
    }


def _guided(target: Target, seed: int, seconds: int) -> dict[str, Any]:
    """Run libFuzzer over a target; its own bounds on time and memory are ours."""
    grown, finds = BUILD / target.name, BUILD / "finds"
    grown.mkdir(parents=True, exist_ok=True)
    finds.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.seeds()):
        (grown / f"seed-{number}").write_bytes(data)
    corpus = [str(grown), *_directory(CORPUS / target.name)]
    options = [
        f"-max_total_time={seconds}", f"-seed={seed % (1 << 31) + 1}",
        f"-max_len={target.input_bytes_max}", f"-timeout={INPUT_S_MAX}",
        f"-rss_limit_mb={RSS_MIB_MAX}", f"-artifact_prefix={finds}/{target.name}-",
        "-print_final_stats=1",
    ]  # fmt: skip
    before = set(finds.iterdir())
    code, said = _fuzzer(target, [*corpus, *options], seconds + START_S_MAX)
    found = sorted(set(finds.iterdir()) - before)
    stats = {name: int(value) for name, value in _STAT.findall(said)}
    covered = _COVERED.findall(said) or [("0", "0")]
    if code:
        print(said[-3000:])
        if not found:
            raise SystemExit(2)
        for path in found:
            print(f"again: python -m tests.fuzz --target {target.name} --replay {path}")
    return {
        "executions": stats.get("number_of_executed_units", 0),
        "a_second": stats.get("average_exec_per_sec", 0),
        "edges": int(covered[-1][0]),
        "features": int(covered[-1][1]),
        "slowest_s": stats.get("slowest_unit_time_sec", 0),
        "peak_rss_mib": stats.get("peak_rss_mb", 0),
        "kept_inputs": len(kept(target)),
        "finds": len(found),
    }


def _fuzzer(target: Target, arguments: list[str], timeout_s: int) -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.fuzz.guided", target.name, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, timeout=timeout_s)
    return done.returncode, done.stderr.decode(errors="replace")


def _directory(path: Path) -> list[str]:
    return [str(path)] if path.is_dir() else []


def _keep(target: Target) -> None:
    """Take over what reaches code that the kept corpus does not."""
    folder = CORPUS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    code, said = _fuzzer(target, ["-merge=1", str(folder), str(BUILD / target.name)], START_S_MAX)
    if code or not any(folder.iterdir()):
        print(f"{target.name}: the corpus could not be merged\n{said[-2000:]}")
        raise SystemExit(2)
    for path in folder.iterdir():
        if path.stat().st_size > KEPT_BYTES_MAX:
            path.unlink()


def _by_chance(target: Target, seed: int, seconds: int) -> dict[str, Any]:
    found = hunt(target, seed, seconds)
    for find in found.finds:
        path = BUILD / "finds" / f"{target.name}-{seed}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(find.data)
        print(f"{find.error!r}\nagain: python -m tests.fuzz --target {target.name} --replay {path}")
    return {
        "executions": found.executions,
        "slowest_s": round(found.slowest_s, 3),
        "kept_inputs": len(kept(target)),
        "finds": len(found.finds),
    }


if __name__ == "__main__":
    sys.exit(main())
