"""`python -m tests.torture`: kill real processes for a given time, then audit every side effect.

python -m tests.torture --seconds 120 --seed 7
python -m tests.torture --soak --seconds 3600
python -m tests.torture --calm --seconds 1800     one daemon lives all the time: does it grow?
python -m tests.torture --audit DIR               the audit alone, of a stage that was kept
"""

import argparse
import random
import sys
from pathlib import Path

from tests import figures
from tests.torture.run import Options, judged, run, told


def main(argv: list[str]) -> int:
    """Run as asked; 0 only where nothing at all was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture")
    parser.add_argument("--seconds", type=float, default=120.0, help="for how long things die")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument(
        "--soak", dest="kind", action="store_const", const="soak", default="torture",
        help="forget what ended; watch all sizes",
    )  # fmt: skip
    parser.add_argument(
        "--calm", dest="kind", action="store_const", const="calm",
        help="a soak that never kills the daemon",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="keep the stage also where all is well")
    parser.add_argument(
        "--audit", type=Path, metavar="DIR", help="only audit a stage that was kept"
    )
    args = parser.parse_args(argv)
    if args.audit:
        return told(judged(args.audit), keeps=True)
    figures.begin(args.kind)
    return told(run(Options(args.seconds, args.seed, args.kind)), keeps=args.keep)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
