"""Who may connect: the kernel's word on a peer, and the answer at the handshake (ZAP).

libzmq asks for every connection, also without any security mechanism, once a ZAP domain is set.
The peer's uid and gid come from SO_PEERCRED, never from what the peer says; the User-Id in our
answer replaces one that the peer may have claimed. What a peer may *do* is decided per request
by the core. Source: https://rfc.zeromq.org/spec/27/, unix(7). Read next: `guard.py`.
"""

import grp
import os
import pwd
from collections.abc import Collection
from typing import Final, NamedTuple

DOMAIN: Final = b"ckptd"
ENDPOINT: Final = "inproc://zeromq.zap.01"


class Peer(NamedTuple):
    """The process that called connect(2). `pid` is information for people, never authority."""

    uid: int
    gid: int
    pid: int


def parse_peer(address: str) -> Peer | None:
    """Return the peer behind libzmq's `localhost:UID:GID:PID`, None for any other address."""
    match address.split(":"):
        case ["localhost", uid, gid, pid] if uid.isdigit() and gid.isdigit() and pid.isdigit():
            return Peer(int(uid), int(gid), int(pid))
        case _:
            return None


class Access:
    """The rule: root, the daemon's own uid, and members of one group."""

    def __init__(self, own_uid: int, group: str) -> None:
        self._own_uid = own_uid
        self._group = group

    def permits(self, peer: Peer, groups: Collection[int] = ()) -> bool:
        """Tell whether the peer may connect. Looks groups up afresh: membership may change.

        `groups` are the peer's where the caller has just looked them up.
        """
        if peer.uid in (0, self._own_uid):
            return True
        if not self._group:
            return False
        try:
            gid = grp.getgrnam(self._group).gr_gid
        except KeyError:
            return False
        return peer.gid == gid or gid in (groups or groups_of(peer.uid))


def groups_of(uid: int) -> list[int]:
    """Return the groups of a user by the user database; none of one that it does not know."""
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return []
    return os.getgrouplist(user.pw_name, user.pw_gid)


def answer(question: list[bytes], access: Access) -> tuple[list[bytes], Peer | None]:
    """Return the reply to one handshake, and the peer where it was refused.

    Question: version, request id, domain, address, identity, mechanism.
    Answer: version, request id, status, text, user id, metadata.
    """
    version, request_id, _domain, address = (*question, b"", b"", b"", b"")[:4]
    peer = parse_peer(address.decode("ascii", "replace"))
    if peer is not None and access.permits(peer):
        return [version, request_id, b"200", b"ok", b"%d" % peer.uid, b""], None
    refused = peer or Peer(-1, -1, -1)
    return [version, request_id, b"400", b"this uid may not connect", b"", b""], refused
