import argparse
import io

import pytest

from ckptctl import selectors
from ckptd.protocol.errors import BadRequest
from ckptd.protocol.messages import Selector


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    selectors.add_options(parser)
    return parser.parse_args(words)


def existing(first: int, end: int) -> list[int]:
    """Task 4 was cleaned."""
    return [number for number in range(first, end + 1) if number != 4]


def selected(*words: str) -> Selector:
    return selectors.selector(parsed(*words), existing)


def test_ids_ranges_and_lists() -> None:
    assert selected("7", "3-5", "9,11").ids == (7, 9, 11, 3, 5)
    assert selected("3..5", "5").ids == (5, 3)


def test_last_keys_and_names() -> None:
    chosen = selected("@last", "@~2", "key:nightly", "name:build*")
    assert (chosen.last, chosen.keys, chosen.names) == ((0, 2), ("nightly",), ("build*",))


def test_filters_alone_mean_all_that_fit_and_with_ids_they_narrow() -> None:
    assert selected("-g", "gpu") == Selector(all=True, group="gpu")
    assert selected("7", "--state", "failed") == Selector(ids=(7,), phases=("failed",))
    assert selected("-l", "a=b", "--all").labels == {"a": "b"}


def test_states_have_collective_names() -> None:
    assert selectors.parse_states(["active,failed"])[-2:] == ("stopping", "failed")
    with pytest.raises(BadRequest, match="unknown state 'runing'") as caught:
        selectors.parse_states(["runing"])
    assert "running" in caught.value.hint


def test_nothing_named_is_an_error_or_the_last_task() -> None:
    with pytest.raises(BadRequest, match="which tasks"):
        selected()
    assert selectors.selector(parsed(), existing, default_last=True) == Selector(last=(0,))


def test_a_bare_word_is_not_taken_for_a_name() -> None:
    with pytest.raises(BadRequest, match="not a task: 'census'") as caught:
        selected("census")
    assert caught.value.hint == "for a name write name:census"


@pytest.mark.parametrize("word", ["0", "9-3", "-1", "1-", "1e3"])
def test_malformed_ids_are_refused(word: str) -> None:
    with pytest.raises(BadRequest):
        selectors.words_of([word])


def test_a_dash_reads_ids_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("3\n4 5\n"))
    assert selected("-", "9").ids == (3, 4, 5, 9)
