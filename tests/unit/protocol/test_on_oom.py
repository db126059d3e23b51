"""The words for what becomes of a task that hits its memory limit."""

import pytest

from ckptd.protocol.on_oom import OnOom, parse_on_oom

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("", OnOom("count")),
        ("count", OnOom("count")),
        ("fail", OnOom("fail")),
        ("hold", OnOom("hold")),
        ("retry:x2,max=16G", OnOom("retry", 2.0, 16 * GIB)),
        ("retry:x1.5,max=512MiB", OnOom("retry", 1.5, 512 << 20)),
        ("retry:x4,max=1048576", OnOom("retry", 4.0, 1 << 20)),
    ],
)
def test_every_policy_is_understood(text: str, meaning: OnOom) -> None:
    assert parse_on_oom(text) == meaning


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("restart", "'restart' is none of count, fail, hold"),
        ("retry", "needs a factor and a largest limit"),
        ("retry:x2", "needs a factor and a largest limit"),
        ("retry:x2,max=much", "needs a factor and a largest limit"),
        ("retry:x1,max=16G", "the factor 1 is not from 1.1 to 100"),
        ("retry:x2,max=99999999T", "max=99999999T is not from 1 byte to 4 EiB"),
        ("retry:x2,max=0", "max=0 is not from 1 byte"),
    ],
)
def test_what_is_wrong_is_said(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_on_oom(text)


def test_a_limit_grows_by_the_factor_up_to_its_bound_and_never_shrinks() -> None:
    wanted = parse_on_oom("retry:x2,max=5G")
    assert wanted.next_bytes(2 * GIB) == 4 * GIB
    assert wanted.next_bytes(4 * GIB) == 5 * GIB
    assert wanted.next_bytes(5 * GIB) == 5 * GIB
    assert wanted.next_bytes(8 * GIB) == 8 * GIB
    assert wanted.next_bytes(0) == 0
    assert parse_on_oom("count").next_bytes(GIB) == GIB
