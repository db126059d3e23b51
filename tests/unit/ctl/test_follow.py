import pytest

from ckptctl.follow import Markers

OUTPUT = (
    b"--- ckptd: attempt 1 started 2026-11-20T18:00:00Z ---\none\n---\n--- mine\nno newline\n"
    b"--- ckptd: attempt 1 ended 2026-11-20T18:00:01Z, signal 9 ---\n"
    b"--- ckptd: attempt 2 started 2026-11-20T18:00:02Z, resumes from checkpoint 3 ---\n"
    b"two --- ckptd: attempt 9\n\n"
    b"--- ckptd: attempt 2 ended 2026-11-20T18:00:03Z, exit code 0 ---\n"
)
OWN = b"one\n---\n--- mine\nno newline\ntwo --- ckptd: attempt 9\n\n"


@pytest.mark.parametrize("size", [1, 2, 7, 50, 10_000])
def test_markers_are_taken_out_wherever_the_stream_is_cut(size: int) -> None:
    heard: list[str] = []
    markers = Markers(heard.append)
    pieces = [OUTPUT[place : place + size] for place in range(0, len(OUTPUT), size)]
    assert b"".join(map(markers.feed, pieces)) + markers.rest() == OWN
    assert heard == ["attempt 2 started, resumes from checkpoint 3"]


def test_a_prompt_without_a_line_break_is_not_held_back() -> None:
    markers = Markers(lambda _: None)
    assert markers.feed(b"name? ") == b"name? "
    assert markers.feed(b"--- ckptd: attempt 1 x") == b"--- ckptd: attempt 1 x"


def test_what_was_held_back_comes_at_the_end() -> None:
    markers = Markers(lambda _: None)
    assert markers.feed(b"ok\n--- ck") == b"ok\n"
    assert markers.rest() == b"--- ck"
