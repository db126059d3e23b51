"""A target with a bug that only coverage leads to: if the engine finds it, the engine works."""

from tests.fuzz.target import Target


def run_canary(data: bytes) -> None:
    """Fail behind five comparisons; by chance that takes 2**40 inputs."""
    depth = 0
    for place, byte in enumerate(b"ckptd"):
        if len(data) <= place or data[place] != byte:
            break
        depth = place + 1
        if depth == 1:
            continue
        if depth == 2:
            continue
        if depth == 3:
            continue
        if depth == 4:
            continue
        raise KeyError("the canary sings")


CANARY = Target("canary", run_canary, lambda: [b"x"])
