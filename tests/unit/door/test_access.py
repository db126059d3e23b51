"""Roles from groups: looked up for each uid now and then, never for each request."""

import grp
import os
import pwd

import pytest

from ckptd.core.policy import Rules
from ckptd.core.rights import roles
from ckptd.door.access import KEPT_S, Roles, accounts, missing_groups
from ckptd.door.zap import Access, Peer

OWN = 1_234
KEPT_NS = int(KEPT_S * 1e9)


def everyone(rules: Rules, peer: Peer, *, door: str = "daemon") -> tuple[str, ...]:
    return roles(Roles(OWN, Access(OWN, door)).caller(peer, rules, 1))


def member() -> Peer:
    """A user that the machine knows, over a process whose own group says nothing."""
    return Peer(pwd.getpwnam("daemon").pw_uid, 65_534, 9)


def test_a_role_is_held_by_primary_group_of_the_database_and_of_the_process() -> None:
    rules = Rules(admin=("daemon",))
    assert everyone(rules, member()) == ("read", "submit", "admin")
    assert everyone(rules, Peer(2_000_000_000, grp.getgrnam("daemon").gr_gid, 9)) == (
        "read",
        "submit",
        "admin",
    )


def test_a_role_is_held_by_a_further_group() -> None:
    for group in grp.getgrall():
        for name in group.gr_mem:
            uid, gid = pwd.getpwnam(name)[2:4]
            if gid != group.gr_gid and uid:
                peer = Peer(uid, 65_534, 9)
                assert everyone(Rules(read=(group.gr_name,)), peer, door=group.gr_name)[0] == "read"
                return
    pytest.skip("no user of this machine is in a further group")


def test_a_group_that_is_not_there_gives_nobody_a_role_and_is_named() -> None:
    rules = Rules(read=("no-such",), submit=("*",), admin=("none-either", "daemon"))
    assert everyone(Rules(read=("no-such",)), member()) == ("submit",)
    assert missing_groups(rules) == ["no-such", "none-either"]


def test_root_and_the_own_uid_need_no_group() -> None:
    for uid in (0, OWN):
        assert everyone(Rules(submit=()), Peer(uid, 5, 9)) == ("read", "submit", "admin")


def test_a_role_is_for_those_only_who_may_still_connect() -> None:
    assert everyone(Rules(), member()) == ("submit",)
    assert everyone(Rules(), member(), door="no-such") == ()


def test_groups_are_asked_for_once_in_a_while_and_a_reload_counts_at_once() -> None:
    door, old, new = Access(OWN, "daemon"), Rules(), Rules(submit=())
    kept = Roles(OWN, door)
    first = kept.caller(member(), old, 1)
    assert kept.caller(member(), old, KEPT_NS) is first
    again = kept.caller(member(), old, 1 + KEPT_NS)
    assert again is not first
    assert again == first
    assert roles(kept.caller(member(), new, 2 + KEPT_NS)) == ()


def test_accounts_are_those_of_the_user_database_with_their_primary_group() -> None:
    known = pwd.getpwnam("daemon")
    assert accounts([known.pw_uid, 2_000_000_000, known.pw_uid]) == {known.pw_uid: known.pw_gid}
    assert accounts([os.getuid()])
