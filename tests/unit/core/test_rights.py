"""Every role and every verb; whose task is whose; as whom a task runs."""

from typing import Any

import pytest
from msgspec.structs import replace

from ckptd.core import query
from ckptd.core.events import event, may_follow
from ckptd.core.policy import Caller, Rules
from ckptd.core.records import Phase
from ckptd.core.rights import EVERYBODY, caller_of, check_verb, may_open, roles
from ckptd.protocol import messages as m
from ckptd.protocol.errors import Denied, Rejected
from tests.unit.core.world import ROOT, World

OWNER, OTHER, OWN_UID = 1000, 2000, 0
RULES = Rules(read=("watch",), submit=("jobs",), admin=("ops",))
GROUPS_OF = {
    "none": (),
    "read": ("watch",),
    "submit": ("jobs",),
    "read+submit": ("watch", "jobs"),
    "admin": ("ops",),
}
FREE = {"ping"}
LOOKS = {"groups", "daemon", "config", "status", "show", "wait", "events", "stats"}
OPENS = {"output", "checkpoints"}
RULING = {"group_set", "group_remove", "reload", "shutdown"}
STEERS = {"submit", *m.TASK_CHANGES}
MAY = {
    "none": FREE,
    "read": FREE | LOOKS | OPENS,
    "submit": FREE | LOOKS | OPENS | STEERS,
    "read+submit": FREE | LOOKS | OPENS | STEERS,
    "admin": FREE | LOOKS | OPENS | STEERS | RULING,
}
SEES_OTHERS = {"read", "read+submit", "admin"}


def member(role: str, uid: int = OTHER, rules: Rules = RULES) -> Caller:
    return caller_of(rules, uid, uid, OWN_UID, (EVERYBODY, *GROUPS_OF[role]))


def world_with(rules: Rules = RULES) -> World:
    return World(rules=rules)  # type: ignore[arg-type]


def view(world: World, caller: Caller) -> query.View:
    return query.View(world.state, world.observed, caller, world.now, world.policy)


def command(verb: str, select: m.Selector) -> Any:
    kind = m.TASK_CHANGES[verb]
    more: dict[str, Any] = {
        "signal": {"signal": 10}, "edit": {"priority": 1}, "drill": {"how": "kill9"},
    }.get(verb, {})  # fmt: skip
    return kind(select=select, **more)  # type: ignore[call-arg]


@pytest.mark.parametrize("role", list(MAY))
@pytest.mark.parametrize("verb", list(m.VERBS))
def test_a_verb_is_open_to_these_roles_and_to_no_others(role: str, verb: str) -> None:
    if verb in MAY[role]:
        check_verb(verb, member(role), RULES)
        return
    with pytest.raises(Denied) as denied:
        check_verb(verb, member(role), RULES)
    assert denied.value.exit_code == 77


def test_a_refusal_says_which_group_to_join() -> None:
    for verb, group in (("status", "jobs (submit); watch (read)"), ("cancel", "jobs (submit)")):
        with pytest.raises(Denied) as denied:
            check_verb(verb, member("none"), RULES)
        assert denied.value.hint == f"members of these groups may: {group}"
    with pytest.raises(Denied) as denied:
        check_verb("reload", member("submit"), Rules())
    assert "ask root" in denied.value.hint


@pytest.mark.parametrize(
    ("role", "held"),
    [
        ("none", ()),
        ("read", ("read",)),
        ("submit", ("submit",)),
        ("read+submit", ("read", "submit")),
        ("admin", ("read", "submit", "admin")),
    ],
)
def test_roles_add_up_and_the_highest_includes_the_others(role: str, held: tuple[str]) -> None:
    assert roles(member(role)) == held


def test_root_and_the_daemons_own_uid_are_admin_whatever_the_rules_say() -> None:
    nobody = Rules(submit=())
    assert caller_of(nobody, 0, 0, 77, ()).admin
    assert caller_of(nobody, 77, 77, 77, ()).admin
    assert not caller_of(nobody, 78, 78, 77, (EVERYBODY,)).admin


def test_by_default_whoever_may_connect_may_submit_and_who_no_longer_may_has_no_role() -> None:
    assert roles(caller_of(Rules(), 5, 5, 0, (EVERYBODY,))) == ("submit",)
    assert roles(caller_of(Rules(), 5, 5, 0, ())) == ()


@pytest.mark.parametrize("role", list(GROUPS_OF))
@pytest.mark.parametrize("verb", list(m.TASK_CHANGES))
def test_only_an_admin_changes_another_users_task(role: str, verb: str) -> None:
    for phase in (Phase.STARTING, Phase.HELD, Phase.SUCCEEDED, Phase.QUARANTINED):
        world = world_with()
        number = _task_in(world, phase)
        before, records = world.task(number), len(world.log)
        one, wide = m.Selector(ids=(number,)), m.Selector(all=True)
        if role == "admin":
            _tried(world, command(verb, one), member(role))
            continue
        with pytest.raises(Denied):
            world.ask(command(verb, one), member(role))
        answer = _tried(world, command(verb, wide), member(role))
        assert answer in {None, m.Changed(())}
        assert (world.task(number), len(world.log)) == (before, records)


def _task_in(world: World, phase: Phase) -> int:
    owner = member("submit", OWNER)
    number = world.submit(caller=owner, hold=phase is Phase.HELD)
    if phase is Phase.SUCCEEDED:
        world.begins(number)
        world.ends(number)
    elif phase is Phase.QUARANTINED:
        world.policy = replace(world.policy, stalls_max=1)
        world.begins(number)
        world.ends(number, "signal", signal=11)
    return number


def _tried(world: World, asked: m.Message, caller: Caller) -> m.Answer | None:
    try:
        return world.ask(asked, caller)
    except Rejected:
        return None


@pytest.mark.parametrize("role", list(GROUPS_OF))
def test_who_sees_anothers_task_and_what_of_it(role: str) -> None:
    world, caller = world_with(), member(role)
    owner = member("submit", OWNER)
    number = world.submit(caller=owner, env={"TOKEN": "s3cret"}, hold=True)
    seen = view(world, caller)
    one = m.Selector(ids=(number,))
    page = query.status(seen, m.Status())
    told = [found for n, record in enumerate(world.log) if (found := event(n, record))]
    if role not in SEES_OTHERS:
        assert (page.tasks, page.totals) == ((), {})
        assert not any(may_follow(world.state, found, caller) for found in told)
        for ask in (m.Show(one), m.Wait(one), m.Status(one)):
            with pytest.raises(Denied):
                _asked(seen, ask)
        return
    assert [row.id for row in page.tasks] == [number]
    assert page.totals == {"held": 1}
    assert all(may_follow(world.state, found, caller) for found in told)
    assert query.waited(seen, m.Wait(one)).tasks[0].uid == OWNER
    (detail,) = query.show(seen, m.Show(one), "/state").tasks
    assert may_open(world.task(number), caller) is (role == "admin")
    assert ("s3cret" in str(detail)) is (role == "admin")
    assert "s3cret" not in str(told)
    if role == "admin":
        (detail,) = query.show(seen, m.Show(one, env=True), "/state").tasks
        assert detail.env == {"TOKEN": "s3cret"}
        return
    with pytest.raises(Denied, match="environment"):
        query.show(seen, m.Show(one, env=True), "/state")


def _asked(seen: query.View, ask: Any) -> m.Answer:
    if isinstance(ask, m.Show):
        return query.show(seen, ask, "/state")
    return query.waited(seen, ask) if isinstance(ask, m.Wait) else query.status(seen, ask)


def test_who_may_read_only_keeps_what_it_submitted_and_steers_it_no_more() -> None:
    world = world_with()
    number = world.submit(caller=member("submit"))
    reader = member("read")
    assert may_open(world.task(number), reader)
    with pytest.raises(Denied, match="its roles are: read"):
        world.ask(m.Cancel(m.Selector(ids=(number,))), reader)


def test_a_reader_does_not_hold_others_tasks_by_depending_on_them() -> None:
    world = world_with()
    number = world.submit(caller=member("submit", OWNER))
    with pytest.raises(Denied, match="not yours"):
        world.submit(caller=member("read+submit"), after=(m.Dependency(number),))


# --- as whom ----------------------------------------------------------------------------------

AS = replace(RULES, submit_as=True)


def test_what_an_admin_submits_runs_as_that_admin_and_never_as_root() -> None:
    world = world_with(AS)
    task = world.task(world.submit(caller=member("admin")))
    assert (task.uid, task.unpacked().gid) == (OTHER, OTHER)


def test_root_submits_for_a_user_with_the_gid_of_the_user_database() -> None:
    world = world_with(AS)
    root = replace(ROOT, accounts={OWNER: 555})
    number = world.submit(caller=root, uid=OWNER, key="nightly")
    task = world.task(number)
    assert (task.uid, task.unpacked().gid) == (OWNER, 555)
    (told,) = (
        found
        for n, record in enumerate(world.log)
        if (found := event(n, record)) and found.type == "submitted"
    )
    assert (told.fields["uid"], told.fields["by"]) == (OWNER, 0)
    owner = member("submit", OWNER)
    assert world.submit(caller=root, uid=OWNER, key="nightly") == number
    next_one = world.submit(caller=root, uid=OWNER, after=(m.Dependency(key="nightly"),))
    assert world.task(next_one).needs[0].task == number
    world.ask(m.Cancel(m.Selector(keys=("nightly",))), owner)
    assert world.task(number).phase is Phase.STOPPING


@pytest.mark.parametrize("role", list(GROUPS_OF))
def test_nobody_but_root_submits_for_another_user(role: str) -> None:
    world = world_with(AS)
    caller = replace(member(role), accounts={OWNER: OWNER, 0: 0})
    for uid in (OWNER, 0):
        with pytest.raises(Denied):
            world.submit(caller=caller, uid=uid)
    assert world.state.next_id == 1


def test_ones_own_uid_is_as_good_as_none() -> None:
    world = world_with()
    assert world.task(world.submit(caller=member("submit"), uid=OTHER)).uid == OTHER


@pytest.mark.parametrize(
    ("rules", "accounts", "why"),
    [(RULES, {OWNER: 1}, "switched off"), (AS, {}, "there is no user with uid 1000")],
)
def test_root_submits_for_others_only_as_configured_and_for_users_that_there_are(
    rules: Rules, accounts: dict[int, int], why: str
) -> None:
    with pytest.raises(Denied, match=why):
        world_with(rules).submit(caller=replace(ROOT, accounts=accounts), uid=OWNER)


def test_all_or_none_where_one_task_of_a_submit_is_for_somebody_else() -> None:
    world = world_with(AS)
    tasks = (m.TaskSpec(argv=("a",)), m.TaskSpec(argv=("b",), uid=OWNER))
    with pytest.raises(Denied):
        world.ask(m.Submit(tasks), member("submit"))
    assert world.log == []


def test_a_daemon_that_is_not_roots_refuses_tasks_for_anybody_else() -> None:
    world = world_with(AS)
    world.policy = replace(world.policy, runs_as=OWNER)
    assert world.submit(caller=member("submit", OWNER)) == 1
    root = replace(ROOT, accounts={OTHER: OTHER})
    for caller, more in ((root, {}), (root, {"uid": OTHER})):
        with pytest.raises(Denied, match=f"runs everything as uid {OWNER}"):
            world.submit(caller=caller, **more)


def test_without_root_tasks_nothing_new_runs_as_root_and_what_was_accepted_goes_on() -> None:
    world = world_with()
    waiting, held, ended = (
        world.submit(caller=ROOT, in_s=60.0),
        world.submit(caller=ROOT, hold=True),
        world.submit(caller=ROOT),
    )
    world.begins(ended)
    world.ends(ended, code=1)
    world.policy = replace(world.policy, rules=replace(RULES, root_tasks=False))
    with pytest.raises(Denied, match="switched off"):
        world.submit(caller=ROOT)
    for number, asked in (
        (ended, m.Retry(m.Selector(ids=(ended,)))),
        (held, m.Release(m.Selector(ids=(held,)))),
        (waiting, m.Edit(m.Selector(ids=(waiting,)), argv=("other",))),
    ):
        answer = world.ask(asked, ROOT)
        assert isinstance(answer, m.Changed)
        (row,) = answer.tasks
        assert row.error is not None, number
        assert row.error.exit_code == 77
    world.pass_time(61)
    assert world.phase(waiting) is Phase.STARTING
    world.begins(waiting)
    world.ask(m.Pause(m.Selector(ids=(waiting,))), ROOT)
    world.ask(m.Resume(m.Selector(ids=(waiting,))), ROOT)
    assert world.phase(waiting) is Phase.RUNNING
    world.ask(m.Cancel(m.Selector(ids=(held,))), ROOT)
    assert world.phase(held) is Phase.CANCELLED


@pytest.mark.parametrize("what", [{"argv": ("id",)}, {"cwd": "/elsewhere"}])
def test_an_admin_cannot_make_another_users_task_run_something_else(what: dict[str, Any]) -> None:
    world = world_with()
    of_root = world.submit(caller=ROOT, hold=True)
    of_owner = world.submit(caller=member("submit", OWNER), hold=True)
    own = world.submit(caller=member("admin"), hold=True)
    edit = m.Edit(m.Selector(ids=(of_root, of_owner, own)), **what)
    before = [world.task(number).unpacked() for number in (of_root, of_owner)]
    answer = world.ask(edit, member("admin"))
    assert isinstance(answer, m.Changed)
    assert [row.error is None for row in answer.tasks] == [False, False, True]
    assert [world.task(number).unpacked() for number in (of_root, of_owner)] == before
    answer = world.ask(edit, ROOT)
    assert isinstance(answer, m.Changed)
    assert [row.error for row in answer.tasks] == [None, None, None]


def test_a_verb_that_is_not_in_the_table_would_be_noticed() -> None:
    assert set(m.VERBS) == FREE | LOOKS | OPENS | STEERS | RULING
