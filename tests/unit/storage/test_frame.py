import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.storage import frame
from ckptd.storage.frame import Chain

SEED = 0xC0FFEE


def one(payload: bytes, first: int = 7, count: int = 3) -> bytes:
    return Chain(SEED, epoch=2, crc=99).encode(payload, first, first - 1, count)


@given(st.binary(max_size=300), st.integers(0, 1 << 60), st.integers(0, 0xFFFF))
def test_what_is_encoded_is_decoded_and_aligned(payload: bytes, first: int, count: int) -> None:
    data = Chain(SEED, 5).encode(payload, first, 3, count)
    head = frame.decode(memoryview(data), 0, SEED)
    assert head
    assert len(data) % 8 == 0
    assert len(data) == head.size == frame.frame_bytes(len(payload))
    assert (head.first_lsn, head.records, head.durable_lsn, head.epoch) == (first, count, 3, 5)
    assert frame.payload_of(memoryview(data), 0, head) == payload


@given(st.binary(max_size=200), st.integers(0, 64))
def test_bytes_that_are_no_frame_are_never_one(data: bytes, offset: int) -> None:
    assert frame.decode(memoryview(data), offset, SEED) is None


@given(st.binary(max_size=120), st.integers(0, 1 << 20))
def test_every_single_flip_is_seen_padding_included(payload: bytes, where: int) -> None:
    data = bytearray(one(payload))
    data[where // 8 % len(data)] ^= 1 << where % 8
    assert frame.decode(memoryview(data), 0, SEED) is None


@given(st.binary(min_size=1, max_size=400), st.integers(0, 1 << 20))
def test_the_flipped_bit_is_named(payload: bytes, where: int) -> None:
    data = bytearray(one(payload))
    head = frame.peek(memoryview(data), 0)
    byte, bit = 8 + where // 8 % (len(data) - 8), where % 8
    data[byte] ^= 1 << bit
    assert head
    assert frame.flipped_bit(data[4:], head.crc, SEED) == (byte - 4, bit)


def test_two_flips_are_not_taken_for_one() -> None:
    data = bytearray(one(b"x" * 100))
    head = frame.peek(memoryview(data), 0)
    data[50] ^= 1
    data[51] ^= 1
    assert head
    assert frame.flipped_bit(data[4:], head.crc, SEED) is None


def test_a_frame_of_another_store_does_not_check() -> None:
    assert frame.decode(memoryview(one(b"hello")), 0, SEED + 1) is None


def test_frames_are_found_behind_anything() -> None:
    chain = Chain(SEED, 1)
    frames = [chain.encode(b"a" * n, n + 1, n, 1) for n in range(5)]
    marker = chain.encode(b"", 6, 5, 0, frame.IDLE)
    data = b"\xff" * 24 + frames[0] + b"junk" * 10 + b"".join(frames[2:]) + marker + bytes(500)
    found = [head.first_lsn for _, head in frame.find_later(memoryview(data), 3, SEED)]
    assert found == [1, 3, 4, 5, 6]


@pytest.mark.parametrize("size", [0, 1, 40, 1 << 16, (1 << 16) + 1, 200_000])
def test_the_written_end_is_after_the_last_byte_that_is_not_zero(size: int) -> None:
    data = bytearray(300_000)
    assert frame.written_end(memoryview(data), 100) == 100
    data[100 + size] = 1
    assert frame.written_end(memoryview(data), 100) == 101 + size


def test_a_frame_over_the_bound_is_none_although_it_checks() -> None:
    for size, is_frame in ((frame.PAYLOAD_BYTES_MAX, True), (frame.PAYLOAD_BYTES_MAX + 1, False)):
        found = frame.decode(memoryview(one(bytes(size))), 0, SEED)
        assert (found is not None) is is_frame
