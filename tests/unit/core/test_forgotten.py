"""What is forgotten leaves nothing behind: not in State, not in its indexes, not in a snapshot."""

from collections.abc import Sized

import pytest

from ckptd.core import image
from ckptd.core.records import Answered
from ckptd.core.state import STALE_MAX, State
from ckptd.protocol import messages as m
from ckptd.protocol.limits import REQUESTS_REMEMBERED
from tests.unit.core.world import ROOT, World

HEAPS = ("timers", "ended", "spent")  # a stale entry is dropped when its turn comes
KEPT = 5


def spend(world: World, number: int) -> None:
    """Submit what fills every index, see it through, and have it answered."""
    word = f"{number:06}"
    world.ask(m.GroupSet(f"g{word}"), ROOT)
    first = world.submit(word, group=f"g{word}", key=word, timeout_s=9.0, labels={"of": word})
    spec = m.TaskSpec(argv=("true", word), after=(m.Dependency(first),), deadline_ns=1 << 62)
    answer = world.ask(m.Submit((spec,), env={"ONLY": word}))
    assert isinstance(answer, m.Submitted)
    world.put([Answered(word, 1000, b"{}")])
    for task in (first, *answer.ids):
        world.begins(task)
        world.saves(task, 1)
        world.ends(task)
    world.ask(m.Clean(m.Selector(ids=(first,))))
    world.ask(m.GroupRemove(f"g{word}"), ROOT)


def sizes(state: State) -> dict[str, int]:
    """Return how much everything in a State holds."""
    holds = {name: len(one) for name, one in vars(state).items() if isinstance(one, Sized)}
    return {name: count for name, count in holds.items() if name not in HEAPS}


def snapshot_bytes(world: World) -> int:
    return sum(len(chunk) for chunk in image.chunks(world.state))


@pytest.fixture
def world() -> World:
    """A daemon that has answered so much already that each answer drives out another."""
    made = World(finished_max=KEPT)
    for number in range(REQUESTS_REMEMBERED):
        made.put([Answered(f"a{number:05}", 1000, b"{}")])
    for number in range(300):  # ids of one size from here on
        spend(made, number)
    return made


def test_a_thousand_tasks_that_are_forgotten_leave_nothing_behind(world: World) -> None:
    held, written, totals = sizes(world.state), snapshot_bytes(world), world.state.totals()
    for number in range(300, 800):
        spend(world, number)
    assert world.state.totals() == totals
    assert sizes(world.state) == held
    assert snapshot_bytes(world) == written
    heaps = [getattr(world.state, name) for name in HEAPS] + list(world.state.ready.values())
    assert max(map(len, heaps)) <= STALE_MAX + 2 * KEPT
    assert not world.observed.instances
    assert held["answers"] == REQUESTS_REMEMBERED
    assert sum(held.values()) - REQUESTS_REMEMBERED < 100


def test_a_replay_holds_no_more_than_the_daemon_did(world: World) -> None:
    again = image.load(image.chunks(world.state))
    again.index()
    held, before = sizes(again), sizes(world.state)
    for name in ("tasks", "answers", "envs", "env_names", "by_group", "by_uid", "keys"):
        assert held[name] == before[name], name
    assert sum(held.values()) <= sum(before.values())
