"""An end in words, as `explain` tells it."""

from ckptd.core.explain import ending
from ckptd.core.state import Past

SECOND_NS = 1_000_000_000


def lost(text: str) -> str:
    return ending(Past(1, SECOND_NS, 3 * SECOND_NS, "lost", 0, 0, 0, 0.0, 0.0, 0, text))


def test_a_lost_attempt_says_once_how_it_was_lost() -> None:
    assert lost("its supervisor was killed; what it ran, too") == (
        "lost after at most 2.0s (its supervisor was killed; what it ran, too)"
    )
    assert lost("") == "lost: its supervisor was killed after at most 2.0s"
