"""The engine without coverage: mutations by chance, where atheris has no wheel, and in tests."""

import random
import time
from typing import NamedTuple

from tests.fuzz.every import kept
from tests.fuzz.target import Script, Target, damaged


class Find(NamedTuple):
    """An input and what escaped."""

    data: bytes
    error: BaseException


class Hunt(NamedTuple):
    """How far a hunt went."""

    executions: int
    finds: list[Find]
    slowest_s: float


def hunt(target: Target, seed: int, seconds: float, executions_max: int = 1 << 40) -> Hunt:
    """Run a target on damaged seeds until a find, the time or the number is up."""
    dice = random.Random(f"{target.name} {seed}")
    pool = [*target.seeds(), *kept(target)]
    until, count, slowest_s = time.monotonic() + seconds, 0, 0.0
    while count < executions_max and time.monotonic() < until:  # Bound: both
        script = dice.randbytes(dice.choice((4, 8, 16, 40)))
        data = damaged(dice.choice(pool), Script(script))[: target.input_bytes_max]
        began = time.perf_counter()
        count += 1
        try:
            target.run(data)
        except Exception as error:  # noqa: BLE001 - whatever escapes is what is looked for
            return Hunt(count, [Find(data, error)], slowest_s)
        slowest_s = max(slowest_s, time.perf_counter() - began)
    return Hunt(count, [], slowest_s)
