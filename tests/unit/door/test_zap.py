"""Who may connect: the kernel's word only."""

import os
import pwd

import pytest

from ckptd.door.zap import Access, Peer, answer, parse_peer

OWN = 1_234


def question(address: str) -> list[bytes]:
    return [b"1.0", b"7", b"ckptd", address.encode(), b"", b"NULL"]


def test_the_peer_is_read_from_the_address_that_the_kernel_gave() -> None:
    assert parse_peer("localhost:1000:100:42") == Peer(1000, 100, 42)


@pytest.mark.parametrize(
    "address", ["", "localhost", "localhost:1:2", "127.0.0.1:5555", "localhost:-1:0:0", "a:0:0:0"]
)
def test_any_other_address_is_nobody_and_is_refused(address: str) -> None:
    assert parse_peer(address) is None
    reply, refused = answer(question(address), Access(OWN, "root"))
    assert reply[:3] == [b"1.0", b"7", b"400"]
    assert refused


def test_root_and_the_own_uid_are_let_in_under_the_uid_of_the_kernel() -> None:
    for uid in (0, OWN):
        reply, refused = answer(question(f"localhost:{uid}:5:9"), Access(OWN, ""))
        assert reply == [b"1.0", b"7", b"200", b"ok", str(uid).encode(), b""]
        assert refused is None


def test_a_member_of_the_group_is_let_in_by_primary_or_further_group() -> None:
    access = Access(OWN, "daemon")
    assert access.permits(Peer(65_534, 1, 9))
    assert not access.permits(Peer(65_534, 65_534, 9))
    member = pwd.getpwnam("daemon").pw_uid
    assert access.permits(Peer(member, 65_534, 9))
    assert 1 in os.getgrouplist("daemon", 1)


def test_without_the_group_or_the_user_nobody_else_is_let_in() -> None:
    for group in ("", "no-such-group"):
        assert not Access(OWN, group).permits(Peer(65_534, 1, 9))
    assert not Access(OWN, "daemon").permits(Peer(2_000_000_000, 2, 9))
