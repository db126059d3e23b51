"""Who is in which group: the user database's part of who may do what.

Groups are those of the database at the moment, further ones included, and the primary group that
the asking process had; what its other groups were, the kernel does not tell. Looked up once in
KEPT_S for each uid, so that a request costs one look into a dictionary, and that who is taken out
of a group has lost its rights that much later, also over a connection that stays open.
Belongs to the loop's thread. Read next: `ckptd/core/rights.py` (what roles allow), `zap.py`.
"""

import grp
import pwd
from collections.abc import Iterable
from typing import Final

from ckptd.core.policy import Caller, Rules
from ckptd.core.rights import EVERYBODY, caller_of
from ckptd.door import zap
from ckptd.door.zap import Peer

KEPT_S: Final = 5.0
_KEPT_NS: Final = int(KEPT_S * 1e9)
_KEPT_MAX: Final = 4_096


class Roles:
    """Makes a Caller of a peer, by the rules in force."""

    def __init__(self, own_uid: int, door: zap.Access) -> None:
        self._own_uid, self._door = own_uid, door
        self._rules: Rules | None = None
        self._known: dict[tuple[int, int], tuple[int, Caller]] = {}

    def caller(self, peer: Peer, rules: Rules, mono_ns: int) -> Caller:
        """Return who asks, with what it may do now."""
        if rules is not self._rules:  # a reload takes effect at once
            self._rules = rules
            self._known.clear()
        key = (peer.uid, peer.gid)
        until_ns, caller = self._known.get(key, (0, None))
        if caller is not None and mono_ns < until_ns:
            return caller
        caller = caller_of(rules, *key, self._own_uid, self._member_of(peer, rules))
        if len(self._known) >= _KEPT_MAX:  # Bound: uids come and go
            self._known.clear()
        self._known[key] = (mono_ns + _KEPT_NS, caller)
        return caller

    def _member_of(self, peer: Peer, rules: Rules) -> list[str]:
        """Return those groups that the rules name and the peer is in; EVERYBODY is one."""
        if peer.uid in {0, self._own_uid}:
            return [EVERYBODY]
        groups = {peer.gid, *zap.groups_of(peer.uid)}
        if not self._door.permits(peer, groups):
            return []  # a member no more, over a connection from before
        named = {*rules.read, *rules.submit, *rules.admin} - {EVERYBODY}
        return [EVERYBODY, *(name for name in named if gid_of(name) in groups)]


def gid_of(group: str) -> int:
    """Return the number of a group, -1 where there is none of this name."""
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return -1


def missing_groups(rules: Rules) -> list[str]:
    """Return the groups that the rules name and this machine does not know, by name."""
    named = {*rules.read, *rules.submit, *rules.admin} - {EVERYBODY}
    return sorted(name for name in named if gid_of(name) < 0)


def accounts(uids: Iterable[int]) -> dict[int, int]:
    """Return uid -> primary gid of those uids that the user database knows."""
    found: dict[int, int] = {}
    for uid in set(uids):
        try:
            found[uid] = pwd.getpwuid(uid).pw_gid
        except KeyError:
            continue
    return found
