"""`python -m tests.sim`: lives of the whole daemon, one after the other; `--seed` for one, told.

Without options: LIVES lives from seed 1 on, as CI runs it: the same each time, and together with
`tests.sim.states` at most a minute of one core. A violation, or a crash of whatever code, prints
the seed, the last events and the command that brings it back; the run goes on and ends with 1. So
it does where too little happened for so many lives (`minima.py`).
"""

import argparse
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable

from tests import figures
from tests.sim.broken import ENDS, words
from tests.sim.life import Life
from tests.sim.minima import lacking

LIVES = 50
SHOWN = 60  # of the last events before a violation
TOLD_MAX = 5  # violations; of more the seed alone


def main(argv: list[str]) -> int:
    """Run as told on the command line."""
    options = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    options.add_argument("--seed", type=int, help="one life, with all that happens in it")
    options.add_argument("--first", type=int, default=1, help="the first seed; 0: any")
    options.add_argument("--lives", type=int, help=f"how many; {LIVES}, where no time is given")
    options.add_argument("--seconds", type=float, help="of processor time; may end in any life")
    options.add_argument("--forever", action="store_true", help="until it is interrupted")
    chosen = options.parse_args(argv)
    if chosen.seed is not None:
        return one(chosen.seed)
    figures.begin("sim")
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
    try:
        life = Life(seed, print)
        print(f"hash {life.run()}")
    except ENDS as broken:
        print(f"seed {seed}: VIOLATION: {words(broken)}")
        return 1
    print(" ".join(f"{name}={value}" for name, value in sorted(life.counts.items())))
    return 0


def many(first: int, lives: int, seconds: float) -> dict[str, object]:
    """Live from seed `first` on until a bound is met; return the figures."""
    counts: Counter[str] = Counter()
    broken: list[int] = []
    begun = time.process_time()
    try:
        for seed in itertools.islice(itertools.count(first), lives or None):
            if time.process_time() - begun >= seconds:
                break
            if not live(seed, counts, is_told=len(broken) < TOLD_MAX):
                broken.append(seed)
            counts["lives"] += 1
    except KeyboardInterrupt:
        print("interrupted")
    cpu_s = time.process_time() - begun
    too_few = lacking(counts)
    for one in too_few:
        print(f"VIOLATION: {one}: the run proves nothing")
    return {
        "violations": len(broken) + len(too_few), "first_seed": first, "broken_seeds": broken,
        "lacking": too_few, **dict(sorted(counts.items())), "cpu_s": round(cpu_s, 1),
    }  # fmt: skip


def live(seed: int, counts: Counter[str], *, is_told: bool) -> bool:
    """Live one life and add what happened; return whether it kept every promise."""
    life: Life | None = None
    try:
        life = Life(seed)
        life.run()
    except ENDS as broken:
        tell(seed, life.last if life and is_told else (), broken)
        return False
    else:
        return True
    finally:
        if life is not None:
            counts.update(life.counts)


def tell(seed: int, last: Iterable[str], broken: BaseException) -> None:
    """Show what led to a violation, and how to see it again."""
    for line in list(last)[-SHOWN:]:
        print(line)
    print(f"seed {seed}: VIOLATION: {words(broken)}")
    print(f"again, with all that happened: make sim SEED={seed}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
