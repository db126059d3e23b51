"""make bench: print the table, write bench.json, say where a goal is missed."""

import argparse
import json
import os
import sys
import time

from bench.measures import Figure, idle, sizes, slices, starts, submits
from bench.rig import sweep
from bench.sdk import sdk
from bench.units import units

PARTS = {"submits": submits, "starts": starts, "sizes": sizes, "slices": slices, "idle": idle,
         "sdk": sdk, "units": units}  # fmt: skip


def line(figure: Figure) -> str:
    """Return one line of the table."""
    value = f"{figure.value:,.2f} {figure.unit}"
    goal = f"{figure.sense} {figure.goal:g} {figure.unit}"
    verdict = "ok    " if figure.is_met else "MISSED"
    return f"  {figure.what:30} {value:>14}   {goal:>11}  {verdict}  {figure.beside}"


def main() -> int:
    """Measure what was asked for; a missed goal is told, not an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="only these")
    parser.add_argument("--base", default="/tmp", help="directory on the disk to measure")  # noqa: S108
    parser.add_argument("--out", default="bench.json")
    options = parser.parse_args()
    figures: list[Figure] = []
    print(f"  {'what':30} {'value':>14}   {'goal':>11}")
    try:
        for name in options.parts or PARTS:
            for figure in PARTS[name](options.base):
                figures.append(figure)
                print(line(figure), flush=True)
    finally:
        sweep()
    missed = [figure.what for figure in figures if not figure.is_met]
    report = {
        "schema": "ckptd.bench/1",
        "at_s": int(time.time()),
        "processors": os.cpu_count(),
        "python": sys.version.split()[0],
        "figures": [{**figure._asdict(), "met": figure.is_met} for figure in figures],
    }
    with open(options.out, "w") as file:
        json.dump(report, file, indent=1)
        file.write("\n")
    print(f"\n{len(figures) - len(missed)} of {len(figures)} goals met; written to {options.out}")
    if missed:
        print(f"missed: {'; '.join(missed)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
