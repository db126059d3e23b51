"""`python -m tests.sim`: lives of the whole daemon, one after the other; `--seed` for one, told.

Without options: LIVES lives from seed 1 on, as CI runs it: the same each time, and together with
`tests.sim.states` at most a minute of one core. A violation prints the seed, the last events and
the command that brings it back, and ends the run with 1.
"""

import argparse
import itertools
import random
import sys
import time
from collections import Counter

from tests import figures
from tests.sim.crash_states import Broken
from tests.sim.life import Life
from tests.sim.model import Violation

LIVES = 50
SHOWN = 60  # of the last events before a violation


def main() -> int:
    """Run as told on the command line."""
    options = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    options.add_argument("--seed", type=int, help="one life, with all that happens in it")
    options.add_argument("--first", type=int, default=1, help="the first seed; 0: any")
    options.add_argument("--lives", type=int, help=f"how many; {LIVES}, where no time is given")
    options.add_argument("--seconds", type=float, help="of processor time; may end in any life")
    options.add_argument("--forever", action="store_true", help="until it is interrupted")
    chosen = options.parse_args()
    if chosen.seed is not None:
        return one(chosen.seed)
    first = chosen.first or random.SystemRandom().randrange(1 << 40)
    is_timed = chosen.forever or chosen.seconds is not None
    lives = chosen.lives or (0 if is_timed else LIVES)
    found = many(first, lives, chosen.seconds or float("inf"))
    print(" ".join(f"{name}={value}" for name, value in found.items()))
    again = f"python -m tests.sim --first {first} --lives {found.get('lives', 0)}"
    figures.write("sim", found, command=again)
    return 1 if found["violations"] else 0


def one(seed: int) -> int:
    """Live one life and tell it; return the exit code."""
    life = Life(seed, print)
    try:
        print(f"hash {life.run()}")
    except (Violation, Broken) as broken:
        print(f"seed {seed}: VIOLATION: {broken}")
        return 1
    print(" ".join(f"{name}={value}" for name, value in sorted(life.counts.items())))
    return 0


def many(first: int, lives: int, seconds: float) -> dict[str, object]:
    """Live from seed `first` on until a bound is met or a promise is broken; return the figures."""
    counts: Counter[str] = Counter()
    begun = time.process_time()
    broken_seed = None
    seeds = itertools.count(first)
    try:
        for seed in itertools.islice(seeds, lives or None):
            if time.process_time() - begun >= seconds:
                break
            life = Life(seed)
            try:
                life.run()
            except (Violation, Broken) as broken:
                broken_seed = seed
                tell(life, broken)
                break
            finally:
                counts.update(life.counts)
            counts["lives"] += 1
    except KeyboardInterrupt:
        print("interrupted")
    cpu_s = time.process_time() - begun
    return {
        "violations": int(broken_seed is not None), "first_seed": first, "broken_seed": broken_seed,
        **dict(sorted(counts.items())), "cpu_s": round(cpu_s, 1),
    }  # fmt: skip


def tell(life: Life, broken: AssertionError) -> None:
    """Show what led to a violation, and how to see it again."""
    for line in list(life.last)[-SHOWN:]:
        print(line)
    print(f"seed {life.seed}: VIOLATION: {broken}")
    print(f"again, with all that happened: make sim SEED={life.seed}")


if __name__ == "__main__":
    sys.exit(main())
