"""Random people with random roles do random things: who is no admin touches own tasks only."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.decide import Case, decide
from ckptd.core.policy import Caller
from ckptd.core.records import AnyRecord, Submitted
from ckptd.core.rights import caller_of
from ckptd.protocol import messages as m
from ckptd.protocol.errors import Rejected
from tests.property.test_replay import one_thing
from tests.unit.core.test_rights import AS, GROUPS_OF, command
from tests.unit.core.world import World

UIDS = (1000, 2000, 3000)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_nobody_below_admin_leaves_a_trace_in_anothers_task(seed: int) -> None:
    dice = random.Random(seed)
    world = World(rules=AS)  # type: ignore[arg-type]
    for _ in range(60):
        one_thing(world, dice)  # the owner of all of it is uid 1000
        caller = _somebody(dice)
        owners = {task.id: task.uid for task in world.state.tasks.ascending(0)}
        case = Case(world.state, caller, world.now, world.policy)
        try:
            records, _ = decide(case, _something(dice, list(owners)))
        except Rejected:
            continue
        for record in records:
            _is_own_doing(record, caller, owners)
        world.put(records)
        world.turn()


def _somebody(dice: random.Random) -> Caller:
    uid = dice.choice(UIDS)
    role = dice.choice([role for role in GROUPS_OF if role != "admin"])
    return caller_of(AS, uid, uid, 0, ("*", *GROUPS_OF[role]))


def _something(dice: random.Random, known: list[int]) -> m.Message:
    verb = dice.choice(["submit", *m.TASK_CHANGES])
    if verb == "submit":
        uid = dice.choice([None, None, *UIDS, 0])
        after = (m.Dependency(dice.choice(known)),) if known and dice.random() < 0.3 else ()
        return m.Submit((m.TaskSpec(argv=("x",), uid=uid, after=after),))
    chosen = tuple(dice.sample(known, min(len(known), dice.randint(0, 3))))
    wide = m.Selector(all=True) if dice.random() < 0.5 else m.Selector(names=("*",))
    return command(verb, m.Selector(ids=chosen) if chosen else wide)  # type: ignore[no-any-return]


def _is_own_doing(record: AnyRecord, caller: Caller, owners: dict[int, int]) -> None:
    assert caller.submits
    if isinstance(record, Submitted):
        assert record.uid == caller.uid
        owners[record.task] = record.uid
    else:
        assert owners[record.task] == caller.uid, record  # type: ignore[union-attr]
