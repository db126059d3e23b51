"""Notify lines: what tasks say about themselves, well-formed and otherwise."""

import math
import os
import tempfile

import pytest

from ckptd.core.port import TelemetrySeen
from ckptd.runner.notify import TEXT_CHARS_MAX, Hints, Said
from ckptd.runner.watch import Watch


def heard(*datagrams: bytes) -> TelemetrySeen:
    said = Said()
    for datagram in datagrams:
        said.hear(datagram)
    return said.told(1, 2, 3)


@pytest.mark.parametrize(
    ("line", "done", "total"),
    [
        (b"PROGRESS=3/10", 3, 10),
        (b"PROGRESS=3", 3, 0),
        (b"PROGRESS=37.5%", 37.5, 100),
        (b"PROGRESS=-3/-10", 0, 0),
        (b"PROGRESS=nan/inf", 0, 0),
        (b"PROGRESS=1e300/1e300", 1e15, 1e15),
        (b"PROGRESS=", 0, 0),
        (b"PROGRESS=a/b/c", 0, 0),
    ],
)
def test_progress_is_a_pair_of_bounded_numbers(line: bytes, done: float, total: float) -> None:
    said = heard(line)

    assert (said.done, said.total) == (done, total)


def test_a_line_replaces_what_it_names_and_keeps_the_rest() -> None:
    said = heard(b"PROGRESS=1/2\nSTATUS=half", b"STATUS=still half", b"WATCHDOG=1")

    assert (said.done, said.total, said.text) == (1, 2, "still half")


def test_an_extension_is_asked_for_once() -> None:
    said = Said()
    said.hear(b"EXTEND_TIMEOUT_USEC=2500000")

    assert said.told(1, 1, 1).extend_s == 2.5
    assert said.told(1, 1, 1).extend_s == 0


def test_a_checkpoint_line_is_a_hint_and_no_news() -> None:
    said = Said()
    said.hear(b"CHECKPOINT=1")

    assert said.is_hint
    assert not said.is_news


@pytest.mark.parametrize(
    "datagram", [b"", b"\0\xff\xfe", b"=", b"STATUS=\x1b[31mred\x07", b"STATUS=" + b"x" * 4_000]
)
def test_anything_can_be_heard_and_stays_printable_and_short(datagram: bytes) -> None:
    said = heard(datagram, datagram)

    assert len(said.text) <= TEXT_CHARS_MAX
    assert said.text.isprintable()
    assert math.isfinite(said.done)


def test_tasks_of_all_users_reach_their_sockets_and_see_no_names_there() -> None:
    watch, before = Watch(), os.umask(0o077)
    try:
        with tempfile.TemporaryDirectory(prefix="ck-", dir="/tmp") as run:
            directory = f"{run}/notify"
            hints = Hints(directory, watch)
            made = os.stat(directory).st_mode & 0o777
            os.rmdir(directory)  # as a cleaner does
            one = hints.listen(7, 1, os.getuid(), lambda: None)
            again = os.stat(directory).st_mode & 0o777
            assert os.path.exists(one.path)
            hints.unlisten(one)
            hints.close()
    finally:
        os.umask(before)
        watch.close()
    assert (made, again) == (0o711, 0o711)
