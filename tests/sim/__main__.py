"""`python -m tests.sim`: many lives, or one with its trace; see README of this rig in docs."""

import sys

from tests.sim.life import Life
from tests.sim.model import Violation


def main() -> int:
    first, count = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    for seed in range(first, first + count):
        life = Life(seed, print if count == 1 else None)
        try:
            life.run()
        except Violation as broken:
            for line in list(life.last)[-30:]:
                print(line)
            print("seed", seed, "VIOLATION:", broken)
            return 1
    print(dict(life.counts), life.model.checks)
    return 0


sys.exit(main())
