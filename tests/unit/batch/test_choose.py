"""Which items a run is about: what was asked for, less what the same wish brought about already."""

from ckptd.batch import place
from ckptd.batch.choose import choose, errors_allowed
from ckptd.batch.place import Batch, Item, Next
from ckptd.batch.spec import Config, Knobs
from ckptd.storage.facts import Facts, item_done

KEYS = "abcdef"


def batch(wish: Next | None = None, **knobs: object) -> Batch:
    made = place.new_batch("b", Config(argv=["true"]), Knobs(**knobs))  # type: ignore[arg-type]
    made.next = wish or Next()
    return made


def known(**results: tuple[int, str]) -> Facts:
    """Return a ledger with a result of this run and status for each key."""
    facts = Facts()
    for key, (run, status) in results.items():
        facts.take(run, {**item_done(key, status), "at_ns": 1})
    return facts


def chosen(made: Batch, facts: Facts) -> str:
    return "".join(item.key for item in choose(made, items(), facts).todo)


def items() -> list[Item]:
    return [Item(key, key, at) for at, key in enumerate(KEYS, 1)]


def test_only_what_was_named_runs_whatever_result_it_has() -> None:
    wish = Next(base_run=3, only=["b", "d"])
    assert chosen(batch(wish), known(b=(1, "pass"), c=(1, "error"))) == "bd"
    assert chosen(batch(wish), known(b=(4, "pass"))) == "d", "the killed run had come so far"


def test_a_limit_counts_what_the_killed_run_had_done_of_it() -> None:
    wish = Next(base_run=1)
    found = choose(batch(wish, limit=3), items(), known(a=(2, "pass"), b=(2, "fail")))
    assert [item.key for item in found.todo] == ["c"]
    assert (found.left, found.selected) == (3, 6)


def test_bad_results_of_the_killed_run_still_count_against_those_allowed() -> None:
    facts = known(a=(2, "error"), b=(2, "quarantined"), c=(2, "pass"), d=(1, "error"))
    assert choose(batch(Next(base_run=1)), items(), facts).bad == 2


def test_errors_of_before_run_again_where_that_is_asked_for_and_nothing_else_does() -> None:
    facts = known(a=(1, "error"), b=(1, "pass"), c=(1, "fail"), d=(2, "error"))
    assert chosen(batch(Next(base_run=1, statuses=["error"])), facts) == "aef"
    assert chosen(batch(Next(base_run=1)), facts) == "ef"


def test_a_share_of_errors_is_one_of_all_that_was_selected() -> None:
    assert errors_allowed(Knobs(max_errors="50%"), 6) == 3
    assert errors_allowed(Knobs(max_errors="2"), 6) == 2
