"""An end, and what a task waits for, in words, as `explain` tells them."""

import pytest
from msgspec.structs import replace

from ckptd.core.explain import ending, explain
from ckptd.core.records import Phase
from ckptd.core.state import Past
from ckptd.protocol import messages as m
from tests.unit.core.world import World

SECOND_NS = 1_000_000_000


def lost(text: str) -> str:
    return ending(Past(1, SECOND_NS, 3 * SECOND_NS, "lost", 0, 0, 0, 0.0, 0.0, 0, text))


def test_a_lost_attempt_says_once_how_it_was_lost() -> None:
    assert lost("its supervisor was killed; what it ran, too") == (
        "lost after at most 2.0s (its supervisor was killed; what it ran, too)"
    )
    assert lost("") == "lost: its supervisor was killed after at most 2.0s"


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("after", "waits for tasks to be judged"),
        ("at", "is to start in 1m30s"),
        ("backoff", "tries again in 1m30s, after failure 2"),
        ("rate_limit", "asked to wait (rate limit), goes on in 1m30s; no failure is counted"),
        ("transient", "met something transient, tries again in 1m30s; no failure is counted"),
    ],
)
def test_a_task_that_waits_says_what_for_and_how_long(reason: str, said: str) -> None:
    world = World()
    task = world.task(world.submit())
    assert task.run is not None
    waits = replace(
        task,
        phase=Phase.WAITING,
        reason=reason,
        until_ns=world.at_ns + 90 * SECOND_NS,
        run=replace(task.run, failures=2),
    )
    assert explain(world.state, waits, world.now, world.policy) == said


def test_who_waits_for_others_is_told_for_whom_of_them_still() -> None:
    world = World(slots=8)
    ended, runs, held = world.submit(), world.submit(), world.submit(hold=True)
    for number in (ended, runs):
        world.begins(number)
    world.ends(ended)
    after = tuple(m.Dependency(number, when="any") for number in (ended, runs, held))
    waits = world.task(world.submit(after=after))
    text = explain(world.state, waits, world.now, world.policy)
    assert text == f"waits for tasks {runs} (running), {held} (held)"
