"""Which tasks a selector names: every filter counts, and all of them together."""

import pytest

from ckptd.core.select import selected
from ckptd.protocol import limits
from ckptd.protocol import messages as m
from ckptd.protocol.errors import BadRequest
from tests.unit.core.world import ME, ROOT, World


def three_tasks() -> World:
    """Return 1, which runs, 2, which is held, and 3, which is held in another group."""
    world = World()
    world.ask(m.GroupSet("slow"), ROOT)
    world.begins(world.submit(labels={"kind": "a"}))
    world.submit(hold=True, labels={"kind": "b"})
    world.submit(hold=True, group="slow", labels={"kind": "a", "night": "1"})
    return world


@pytest.mark.parametrize(
    ("select", "numbers"),
    [
        (m.Selector(all=True), [1, 2, 3]),
        (m.Selector(phases=("held",)), [2, 3]),
        (m.Selector(phases=("running", "paused")), [1]),
        (m.Selector(all=True, phases=("succeeded",)), []),
        (m.Selector(ids=(1, 3), phases=("held",)), [3]),
        (m.Selector(group="default"), [1, 2]),
        (m.Selector(group="default", phases=("held",)), [2]),
        (m.Selector(labels={"kind": "a"}), [1, 3]),
        (m.Selector(labels={"kind": "a", "night": "1"}), [3]),
        (m.Selector(group="default", labels={"night": "1"}), []),
    ],
)
def test_a_task_is_selected_only_where_it_passes_every_filter(
    select: m.Selector, numbers: list[int]
) -> None:
    world = three_tasks()
    assert [task.id for task in selected(world.state, select, ME)] == numbers


def test_a_cancel_of_what_is_held_leaves_what_runs_alone() -> None:
    world = three_tasks()
    world.ask(m.Cancel(m.Selector(all=True, phases=("held",))))
    phases = [world.phase(number).word for number in (1, 2, 3)]
    assert phases == ["running", "cancelled", "cancelled"]


def test_more_tasks_than_one_request_may_touch_are_refused_and_none_is_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = three_tasks()
    monkeypatch.setattr(limits, "SELECTED_MAX", 2)
    with pytest.raises(BadRequest, match="3 tasks selected, at most 2 at once"):
        world.ask(m.Cancel(m.Selector(all=True)))
    assert world.phase(1).word == "running"
    world.ask(m.Cancel(m.Selector(group="default")))
    assert [world.phase(number).word for number in (1, 2)] == ["stopping", "cancelled"]
